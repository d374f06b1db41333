//! Conversations to tokens, and which of them are learned.
//!
//! With `train_on = completion` that is what the assistant says, from the end of the prompt that generation will
//! give (`add_generation_prompt`) to the token that ends the turn, in every assistant message. A prompt with a
//! completion is tokenised twice, alone and whole, and learned from where the two differ. Every document ends with
//! the end token, which is learned: a model that never sees it never stops.

use tokenizers::Encoding;

use super::TrainOn;
use super::conversation::{Conversation, Message, Role};
use super::text::Text;
use crate::error::{Error, Result};

/// A character that data hardly holds, to find where a message's content goes.
const PROBE: &str = "\u{10FFF0}";

/// Token ids, and whether each is learned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Tokens {
    pub(crate) tokens: Vec<u32>,
    pub(crate) supervised: Vec<bool>,
}

impl Tokens {
    fn learned(tokens: Vec<u32>, learn: impl Fn(usize) -> bool) -> Self {
        let supervised = (0..tokens.len()).map(|i| i > 0 && learn(i)).collect();
        Self { tokens, supervised }
    }

    fn push_learned(&mut self, token: u32) {
        self.supervised.push(!self.tokens.is_empty());
        self.tokens.push(token);
    }
}

/// The tokens of one document, of whatever length.
pub(crate) fn tokenise(conversation: &Conversation, text: &Text, train_on: TrainOn) -> Result<Tokens> {
    match conversation {
        Conversation::Text(document) => {
            let mut document = Tokens::learned(text.encode_document(document)?, |_| true);
            end(&mut document, text);
            Ok(document)
        }
        Conversation::PromptCompletion { prompt, completion } => {
            let alone = text.encode_document(prompt)?;
            let whole = text.encode_document(&format!("{prompt}{completion}"))?;
            let common = alone.iter().zip(&whole).take_while(|(x, y)| x == y).count();
            let mut document = Tokens::learned(whole, |i| train_on == TrainOn::All || i >= common);
            end(&mut document, text);
            Ok(document)
        }
        Conversation::Chat { messages, tools, learn_from } => {
            Chat::new(messages, tools.as_ref(), text)?.tokens(train_on, *learn_from)
        }
    }
}

fn end(document: &mut Tokens, text: &Text) {
    match (text.eos_ids().first(), document.tokens.last()) {
        (Some(eos), Some(last)) if last != eos => document.push_learned(*eos),
        _ => {}
    }
}

/// A conversation, rendered and tokenised.
struct Chat<'a> {
    messages: &'a [Message],
    tools: Option<&'a serde_json::Value>,
    text: &'a Text,
    rendered: String,
    encoding: Encoding,
    /// Where each token's text begins and ends in `rendered`, without gaps: what a tokenizer trims belongs to the
    /// token after it.
    spans: Vec<(usize, usize)>,
}

/// What one assistant message gave, in bytes of the rendered conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Turn {
    start: usize,
    end: usize,
    /// Whether it ends with an end token.
    closed: bool,
}

impl<'a> Chat<'a> {
    fn new(messages: &'a [Message], tools: Option<&'a serde_json::Value>, text: &'a Text) -> Result<Self> {
        let rendered = text.template()?.render(messages, tools, false)?;
        let encoding = text.encoding(&rendered)?;
        let mut reached = 0;
        let spans = encoding
            .get_offsets()
            .iter()
            .map(|&(start, end)| {
                let span = (start.min(reached), end);
                reached = reached.max(end);
                span
            })
            .collect();
        Ok(Self { messages, tools, text, rendered, encoding, spans })
    }

    fn tokens(self, train_on: TrainOn, learn_from: usize) -> Result<Tokens> {
        let assistant = |i: &usize| self.messages[*i].role == Role::Assistant;
        let last = self.messages.len() - 1;
        let (turns, closed) = match train_on {
            TrainOn::All => {
                let closed = !assistant(&last) || self.turn(last).is_ok_and(|turn| turn.closed);
                (vec![Turn { start: 0, end: self.rendered.len(), closed }], closed)
            }
            TrainOn::Completion => {
                if !(learn_from..=last).any(|i| assistant(&i)) {
                    return Err(Error::invalid("the conversation has no `assistant` message to learn from")
                        .with_hint("set `data.train_on` = \"all\" to learn every token"));
                }
                let turns = self.turns(learn_from)?;
                let closed = !assistant(&last) || turns.last().is_none_or(|turn| turn.closed);
                (turns, closed)
            }
        };

        let mut turns = turns.iter().peekable();
        let mut supervised = vec![false; self.spans.len()];
        for (counted, &(start, end)) in supervised.iter_mut().zip(&self.spans) {
            while turns.next_if(|turn| turn.end <= start).is_some() {}
            *counted = turns.peek().is_some_and(|turn| end > turn.start);
        }
        let mut tokens = Tokens { tokens: self.encoding.get_ids().to_vec(), supervised };
        if let Some(bos) = self.text.missing_bos(&tokens.tokens)? {
            tokens.tokens.insert(0, bos);
            tokens.supervised.insert(0, false);
        }
        if let Some(first) = tokens.supervised.first_mut() {
            *first = false;
        }
        if !closed {
            end(&mut tokens, self.text);
        }
        Ok(tokens)
    }

    /// The turns to learn, in order.
    fn turns(&self, learn_from: usize) -> Result<Vec<Turn>> {
        let wanted: Vec<usize> =
            (0..self.messages.len()).filter(|&i| self.messages[i].role == Role::Assistant).collect();
        let marked = match self.text.template() {
            Ok(template) => template.marked(self.messages, self.tools, &self.rendered),
            Err(_) => None,
        };
        match marked {
            Some(spans) if spans.len() == wanted.len() => Ok(wanted
                .iter()
                .zip(spans)
                .filter(|(i, _)| **i >= learn_from)
                .map(|(_, (start, end))| self.close_marked(start, end))
                .collect()),
            _ => wanted.into_iter().filter(|&i| i >= learn_from).map(|i| self.turn(i)).collect(),
        }
    }

    /// A span that the template marked, and the end token if it follows.
    fn close_marked(&self, start: usize, end: usize) -> Turn {
        if let Some(last) = self.closing(start, end) {
            return Turn { start, end: last, closed: true };
        }
        let next = self.spans.iter().position(|&(_, stop)| stop > end);
        match next.filter(|&next| self.text.eos_ids().contains(&self.encoding.get_ids()[next])) {
            Some(next) => Turn { start, end: self.spans[next].1, closed: true },
            None => self.open(start, end, end == self.rendered.len()),
        }
    }

    fn turn(&self, i: usize) -> Result<Turn> {
        let template = self.text.template()?;
        let last = i + 1 == self.messages.len();
        let prefix = |count: usize, prompt: bool| {
            let rendered = template.render(&self.messages[..count], self.tools, prompt).ok()?;
            self.rendered.starts_with(&rendered).then_some(rendered.len())
        };
        let start = if i > 0 && template.prompts { prefix(i, true) } else { None };
        let stop = if last { Some(self.rendered.len()) } else { prefix(i + 1, false) };
        if let (Some(start), Some(stop)) = (start, stop)
            && start < stop
        {
            return Ok(match self.closing(start, stop) {
                Some(end) => Turn { start, end, closed: true },
                None => self.open(start, stop, last),
            });
        }

        let (content, content_end, stop) = self.probe(i)?;
        let start = start.filter(|&start| start <= content).unwrap_or(content);
        Ok(match self.first_special(content_end, stop) {
            Some(end) => Turn { start, end, closed: true },
            None => self.open(start, if last { self.rendered.len() } else { content_end }, last),
        })
    }

    /// Without an end token: the last message is learned to the very end, where one is appended; another to the end
    /// of what it says.
    fn open(&self, start: usize, stop: usize, last: bool) -> Turn {
        let said = self.rendered[start..stop].trim_end().len();
        Turn { start, end: if last { stop } else { start + said }, closed: false }
    }

    /// The end of the last special token before `stop`, if it ends a turn: only white space follows, or it is an
    /// end token.
    fn closing(&self, start: usize, stop: usize) -> Option<usize> {
        let ids = self.encoding.get_ids();
        let inside = |&i: &usize| self.spans[i].0 >= start && self.spans[i].1 <= stop;
        (0..ids.len())
            .rev()
            .filter(inside)
            .find(|&i| self.text.is_special(ids[i]))
            .filter(|&i| {
                self.text.eos_ids().contains(&ids[i])
                    || self.rendered[self.spans[i].1..stop].trim().is_empty()
            })
            .map(|i| self.spans[i].1)
    }

    fn first_special(&self, from: usize, stop: usize) -> Option<usize> {
        let ids = self.encoding.get_ids();
        (0..ids.len())
            .find(|&i| self.spans[i].0 >= from && self.spans[i].1 <= stop && self.text.is_special(ids[i]))
            .map(|i| self.spans[i].1)
    }

    /// Where the content of message `i` begins and ends, and where its turn ends, in templates that change earlier
    /// text when messages follow: rendered again with a probe in its place.
    fn probe(&self, i: usize) -> Result<(usize, usize, usize)> {
        let template = self.text.template()?;
        let mut probed = self.messages.to_vec();
        probed[i].content = PROBE.to_string();
        let lost = || {
            Error::invalid(format!(
                "the chat template changes or leaves out the content of message {}, so what to learn cannot be told",
                i + 1
            ))
            .with_hint("set `data.train_on` = \"all\", or mark the answers in the template with `{% generation %}`")
        };
        let whole = template.render(&probed, self.tools, false).map_err(|_| lost())?;
        let (before, after) = whole.split_once(PROBE).ok_or_else(lost)?;
        if !self.rendered.starts_with(before)
            || !self.rendered.ends_with(after)
            || before.len() + after.len() > self.rendered.len()
        {
            return Err(lost());
        }
        let (content, content_end) = (before.len(), self.rendered.len() - after.len());
        let alone = template.render(&probed[..=i], self.tools, false).ok();
        let suffix =
            alone.as_deref().and_then(|alone| alone.split_once(PROBE)).map_or("", |(_, suffix)| suffix);
        let stop = content_end + common_prefix(suffix, after);
        Ok((content, content_end, stop))
    }
}

fn common_prefix(x: &str, y: &str) -> usize {
    x.chars().zip(y.chars()).take_while(|(x, y)| x == y).map(|(c, _)| c.len_utf8()).sum()
}
