//! A conversation as text and tokens, and the place of each message in them.

use std::cell::OnceCell;

use serde_json::{Map, Value};

use super::conversation::{Message, Role};
use super::encode::Rendered;
use super::template::Template;
use super::text::Text;
use crate::error::{Error, Result};
use windows::Window;

mod turns;
mod windows;

pub(super) use turns::Turn;

/// A character that data hardly holds, to find where a message's content goes.
const PROBE: &str = "\u{10FFF0}";

/// A conversation, rendered and tokenised.
pub(super) struct Chat<'a> {
    pub(super) messages: &'a [Message],
    tools: Option<&'a Value>,
    extra: &'a Map<String, Value>,
    pub(super) text: &'a Text,
    pub(super) rendered: String,
    pub(super) tokens: Vec<u32>,
    /// Where each token's text begins and ends in `rendered`, without gaps: what a tokenizer trims belongs to the
    /// token after it.
    pub(super) spans: Vec<(usize, usize)>,
    /// Whether both ends of the spans never go back from token to token.
    in_order: bool,
    /// Whether the tokens may end before the text.
    pub(super) is_cut: bool,
    /// Where the text of the last token ends that is wanted; there may be many more tokens.
    wanted_to: usize,
    /// Pieces of a long conversation, once they are asked for.
    windows: OnceCell<Vec<Window>>,
}

impl<'a> Chat<'a> {
    pub(super) fn new(
        messages: &'a [Message],
        tools: Option<&'a Value>,
        extra: &'a Map<String, Value>,
        text: &'a Text,
        enough: usize,
    ) -> Result<Self> {
        let marked = text.controls.marked_messages(messages)?;
        let mut marked_tools = tools.cloned();
        marked_tools.as_mut().map_or(Ok(()), |tools| text.controls.mark(tools))?;
        let mut marked_extra = extra.clone();
        marked_extra.values_mut().try_for_each(|value| text.controls.mark(value))?;
        let template = text.template(tools)?;
        let said = marked.as_deref().unwrap_or(messages);
        let rendered = template.render(said, marked_tools.as_ref(), &marked_extra, false).map_err(|error| {
            let calls = messages.iter().position(|message| message.fields.contains_key("tool_calls"));
            match calls.filter(|_| !template.mentions("tool_calls")) {
                Some(i) => Error::invalid(format!(
                    "message {} calls a tool (`tool_calls` or `function_call`), which the chat template does not read: {error}",
                    i + 1
                ))
                .with_hint("take a model whose template knows `tool_calls`, or write the call as text into `content`"),
                None => error,
            }
        })?;
        let Rendered { rendered, tokens, spans, is_cut } = text.encode_rendered(rendered, enough)?;
        let mut reached = 0;
        let spans: Vec<(usize, usize)> = spans
            .into_iter()
            .map(|(start, end)| {
                let span = (start.min(reached), end);
                reached = reached.max(end);
                span
            })
            .collect();
        let in_order = spans.is_sorted_by(|one, next| one.0 <= next.0 && one.1 <= next.1);
        let wanted_to = match spans.get(..enough) {
            Some(wanted) => wanted.iter().map(|&(_, end)| end).max().unwrap_or(0),
            None => usize::MAX,
        };
        let windows = OnceCell::new();
        Ok(Self {
            messages,
            tools,
            extra,
            text,
            rendered,
            tokens,
            spans,
            in_order,
            is_cut,
            wanted_to,
            windows,
        })
    }

    /// Whether message `i` is the model's own.
    pub(super) fn speaks(&self, i: usize) -> bool {
        self.messages[i].role == Role::Assistant
    }

    /// Finds the content of message `i` as `probe` does, in `rendered`, the text of these messages with or without a
    /// prompt.
    fn probed(
        &self,
        template: &Template,
        (messages, prompt): (&[Message], bool),
        i: usize,
        rendered: &str,
    ) -> Option<(usize, usize, usize)> {
        let mut probed = messages.to_vec();
        probed[i].content = Some(PROBE.to_string());
        let whole = template.tried(&probed, self.tools, self.extra, prompt)?;
        let (before, after) = whole.split_once(PROBE)?;
        if !rendered.starts_with(before)
            || !rendered.ends_with(after)
            || before.len() + after.len() > rendered.len()
        {
            return None;
        }
        let (content, content_end) = (before.len(), rendered.len() - after.len());
        let alone = template.tried(&probed[..=i], self.tools, self.extra, false);
        let suffix =
            alone.as_deref().and_then(|alone| alone.split_once(PROBE)).map_or("", |(_, suffix)| suffix);
        Some((content, content_end, content_end + common_prefix(suffix, after)))
    }
}

fn common_prefix(x: &str, y: &str) -> usize {
    x.chars().zip(y.chars()).take_while(|(x, y)| x == y).map(|(c, _)| c.len_utf8()).sum()
}
