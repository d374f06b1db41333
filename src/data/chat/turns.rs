//! Where the turns of a rendered conversation begin and end.

use std::ops::Range;

use super::Chat;
use super::windows::Window;
use crate::data::conversation::Role;
use crate::data::template::Template;
use crate::error::{Error, Result};

/// The place of one message in the rendered conversation, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::data) struct Turn {
    pub(in crate::data) start: usize,
    pub(in crate::data) end: usize,
    /// Whether it ends with an end token.
    pub(in crate::data) closed: bool,
}

impl Chat<'_> {
    /// The turns of the messages that are `wanted`, in order. Of those that begin after all tokens that are wanted, only
    /// some are there: each is found by rendering, and a record may have thousands.
    pub(in crate::data) fn turns(&self, wanted: impl Fn(usize) -> bool) -> Result<Vec<Turn>> {
        if !(0..self.messages.len()).any(&wanted) {
            return Ok(Vec::new());
        }
        let own: Vec<usize> = (0..self.messages.len()).filter(|&i| self.speaks(i)).collect();
        let others = (0..self.messages.len()).filter(|&i| !self.speaks(i) && wanted(i));
        let mut turns = self.found(others, |i| self.content(i))?;
        let marked = match self.text.template(self.tools) {
            Ok(template) => template.marked(self.messages, self.tools, self.extra, &self.rendered),
            Err(_) => None,
        };
        match marked {
            // A template may mark more than messages, as the end token of the whole.
            Some(spans)
                if spans.len() == own.len() || (!own.is_empty() && own.iter().all(|&i| wanted(i))) =>
            {
                let learned = |i: &usize| own.get(*i).is_none_or(|&message| wanted(message));
                let spans = spans.into_iter().enumerate().filter(|(i, _)| learned(i));
                turns.extend(
                    spans.map(|(_, (start, end))| self.finish(start, end, end == self.rendered.len())),
                );
            }
            _ => {
                turns.extend(self.found(own.into_iter().filter(|&i| wanted(i)), |i| self.turn(i))?);
            }
        }
        turns.sort_by_key(|turn| turn.start);
        Ok(turns)
    }

    /// Finds the turns of these messages: up to the first that begins after all wanted tokens, and the last of all.
    fn found(
        &self,
        mut messages: impl Iterator<Item = usize>,
        find: impl Fn(usize) -> Result<Turn>,
    ) -> Result<Vec<Turn>> {
        let mut turns = Vec::new();
        while let Some(i) = messages.next() {
            let turn = find(i)?;
            turns.push(turn);
            // Some templates put instructions behind other messages.
            let instructs = matches!(self.messages[i].role, Role::System | Role::Developer);
            if turn.start >= self.wanted_to
                && !instructs
                && let Some(last) = messages.by_ref().last()
            {
                turns.push(find(last)?);
            }
        }
        Ok(turns)
    }

    /// Finds the content of message `i` and the special token that ends it, wherever the template puts them.
    fn content(&self, i: usize) -> Result<Turn> {
        let (start, content_end, stop) = self.probe(i)?;
        let closing = self.first_special(content_end, stop);
        Ok(Turn { start, end: closing.unwrap_or(content_end), closed: closing.is_some() })
    }

    /// Finds the text that assistant message `i` added to the rendered conversation.
    pub(in crate::data) fn turn(&self, i: usize) -> Result<Turn> {
        let template = self.text.template(self.tools)?;
        let last = i + 1 == self.messages.len();
        let start = if i > 0 && template.prompts { self.prefix(template, i, true) } else { None };
        let stop = if last { Some(self.rendered.len()) } else { self.prefix(template, i + 1, false) };
        if let (Some(start), Some(stop)) = (start, stop)
            && start < stop
        {
            return Ok(self.finish(start, stop, last));
        }

        let (content, content_end, stop) = self.probe(i)?;
        let start = start.filter(|&start| start <= content).unwrap_or(content);
        if self.is_cut && self.spans.last().is_some_and(|(_, end)| *end < stop) {
            return Ok(Turn { start, end: stop, closed: true });
        }
        Ok(match self.first_special(content_end, stop) {
            Some(end) => Turn { start, end, closed: true },
            None => self.open(start, if last { self.rendered.len() } else { content_end }, last),
        })
    }

    /// Where the first `count` messages end in the rendered conversation, if they are rendered as its beginning.
    fn prefix(&self, template: &Template, count: usize, prompt: bool) -> Option<usize> {
        if let Some(window) = self.window(count) {
            return window.prefix(self, template, count, prompt);
        }
        let rendered = template.tried(&self.messages[..count], self.tools, self.extra, prompt)?;
        self.rendered.starts_with(&rendered).then_some(rendered.len())
    }

    /// The piece of a long conversation in which the first `count` messages end.
    fn window(&self, count: usize) -> Option<&Window> {
        Window::of(self.windows.get_or_init(|| Window::all(self)), count)
    }

    /// A turn that lies between these two, up to its end token: one that generation stops at, inside or right after it,
    /// or else a special token that nothing follows.
    fn finish(&self, start: usize, stop: usize, last: bool) -> Turn {
        // A turn that ends after the tokens that are there is learned as far as they go.
        if self.is_cut && self.spans.last().is_some_and(|(_, end)| *end < stop) {
            return Turn { start, end: stop, closed: true };
        }
        let closing = self.closing(start, stop);
        let stops = |&i: &usize| self.text.eos_ids().contains(&self.tokens[i]);
        let open = self.open(start, stop, last);
        match (closing.filter(stops), closing) {
            (None, _) if open.closed => open,
            (Some(i), _) | (None, Some(i)) => Turn { start, end: self.spans[i].1, closed: true },
            (None, None) => open,
        }
    }

    /// Without an end token of its own: some models end a turn with the token that begins the next. Otherwise the last
    /// message is learned to the very end, where a token is appended, and another to the end of what it says.
    fn open(&self, start: usize, stop: usize, last: bool) -> Turn {
        let said = start + self.rendered[start..stop].trim_end().len();
        let ids = &self.tokens;
        let follows = |&i: &usize| {
            let (from, to) = self.spans[i];
            to > said && !self.rendered[from..to].trim().is_empty()
        };
        let next = self.near(said, self.rendered.len()).find(follows);
        match next.filter(|&next| self.text.eos_ids().contains(&ids[next])) {
            Some(next) => Turn { start, end: self.spans[next].1, closed: true },
            None => Turn { start, end: if last { stop } else { said }, closed: false },
        }
    }

    /// The last special token before `stop`, if it ends a turn: only white space follows, or it is an end token.
    fn closing(&self, start: usize, stop: usize) -> Option<usize> {
        let ids = &self.tokens;
        let inside = |&i: &usize| self.spans[i].0 >= start && self.spans[i].1 <= stop;
        let last = self.near(start, stop).rev().filter(inside).find(|&i| self.text.is_special(ids[i]))?;
        let ends = self.rendered[self.spans[last].1..stop].trim().is_empty();
        (ends || self.text.eos_ids().contains(&ids[last])).then_some(last)
    }

    /// Tokens among which are all whose texts touch the text between these two.
    fn near(&self, from: usize, stop: usize) -> Range<usize> {
        if !self.in_order {
            return 0..self.spans.len();
        }
        let first = self.spans.partition_point(|&(_, end)| end < from);
        first..self.spans.partition_point(|&(start, _)| start <= stop).max(first)
    }

    fn first_special(&self, from: usize, stop: usize) -> Option<usize> {
        let ids = &self.tokens;
        self.near(from, stop)
            .find(|&i| self.spans[i].0 >= from && self.spans[i].1 <= stop && self.text.is_special(ids[i]))
            .map(|i| self.spans[i].1)
    }

    /// Where the content of message `i` begins and ends, and where its turn ends, in templates that change earlier
    /// text when messages follow: rendered again with a probe in its place.
    fn probe(&self, i: usize) -> Result<(usize, usize, usize)> {
        let template = self.text.template(self.tools)?;
        let near = self.window(i + 1).and_then(|window| window.probe(self, template, i));
        let found = near.or_else(|| self.probed(template, (self.messages, false), i, &self.rendered));
        found.ok_or_else(|| {
            Error::invalid(format!(
                "the chat template changes or leaves out the content of message {}, so what to learn cannot be told",
                i + 1
            ))
            .with_hint("set `data.train_on` = \"all\", or mark the answers in the template with `{% generation %}`")
        })
    }
}
