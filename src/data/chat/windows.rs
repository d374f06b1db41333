//! Long conversations in pieces. How far a beginning of a conversation reaches in its rendering is found by rendering that
//! beginning, and of one with thousands of messages there are thousands. Where a template writes each message by what
//! stands near it, a piece of the conversation is rendered in place of all that came before.

use super::Chat;
use crate::data::conversation::{Message, Role};
use crate::data::template::Template;

/// Conversations of fewer messages are rendered whole each time.
const LONG: usize = 128;

/// A window has at least so many messages.
const LEAST: usize = 16;

/// Some messages of a conversation which the template renders on their own as it does among the others.
#[derive(Debug)]
pub(super) struct Window {
    /// The number of its first message, which a user says.
    first: usize,
    /// The number of the message after its last one.
    end: usize,
    /// The instructions that the conversation begins with, and the window's messages.
    messages: Vec<Message>,
    /// How many instructions there are.
    instructions: usize,
    /// Whether a prompt stands after the messages.
    prompt: bool,
    /// The text that the template writes for `messages`.
    rendered: String,
    /// How much of that is instructions and the first message.
    opening: usize,
    /// Where the opening ends in the rendering of the whole conversation.
    at: usize,
}

impl Window {
    /// The windows of a conversation, in order: each ends with the first message of the next. There are none where the
    /// conversation is short, or where the renderings of its windows do not make up that of the whole.
    pub(super) fn all(chat: &Chat<'_>) -> Vec<Self> {
        if chat.messages.len() < LONG {
            return Vec::new();
        }
        Self::found(chat).unwrap_or_default()
    }

    fn found(chat: &Chat<'_>) -> Option<Vec<Self>> {
        let template = chat.text.template(chat.tools).ok()?;
        let render = |messages: &[Message], prompt| template.tried(messages, chat.tools, chat.extra, prompt);
        let all = chat.messages;
        let instructs = |message: &&Message| matches!(message.role, Role::System | Role::Developer);
        let instructions = all.iter().take_while(instructs).count();
        let mut firsts: Vec<usize> = Vec::new();
        for i in instructions..all.len() - 1 {
            let is_asked = all[i].role == Role::User && all[i + 1].role == Role::Assistant;
            if is_asked && firsts.last().is_none_or(|last| last + LEAST <= i) {
                firsts.push(i);
            }
        }
        let beginning = render(&all[..=*firsts.first()?], template.prompts)?;
        let mut at = chat.rendered.starts_with(&beginning).then_some(beginning.len())?;
        let mut windows = Vec::new();
        for (i, &first) in firsts.iter().enumerate() {
            let next = firsts.get(i + 1);
            let end = next.map_or(all.len(), |next| next + 1);
            let messages = [&all[..instructions], &all[first..end]].concat();
            let opening = render(&messages[..=instructions], template.prompts)?;
            let prompt = template.prompts && next.is_some();
            let rendered = render(&messages, prompt)?;
            let rest = rendered.strip_prefix(&opening)?;
            if !chat.rendered[at..].starts_with(rest) {
                return None;
            }
            let (opening, after) = (opening.len(), at + rest.len());
            windows.push(Self { first, end, messages, instructions, prompt, rendered, opening, at });
            at = after;
        }
        (at == chat.rendered.len()).then_some(windows)
    }

    /// The window in which the first `count` messages end, after its own first one.
    pub(super) fn of(windows: &[Self], count: usize) -> Option<&Self> {
        let next = windows.partition_point(|window| window.first + 1 < count);
        windows[..next].last().filter(|window| count <= window.end)
    }

    /// Where the first `count` messages of the conversation end in its rendering, if they are the beginning of it.
    pub(super) fn prefix(
        &self,
        chat: &Chat<'_>,
        template: &Template,
        count: usize,
        prompt: bool,
    ) -> Option<usize> {
        let said = template.tried(&self.messages[..self.local(count)], chat.tools, chat.extra, prompt)?;
        let rest = said.strip_prefix(&self.rendered[..self.opening])?;
        chat.rendered[self.at..].starts_with(rest).then_some(self.at + rest.len())
    }

    /// Where the content of message `i` begins and ends, and where its turn ends, as [`Chat::probed`] finds it.
    pub(super) fn probe(
        &self,
        chat: &Chat<'_>,
        template: &Template,
        i: usize,
    ) -> Option<(usize, usize, usize)> {
        let messages = (&self.messages[..], self.prompt);
        let (content, end, stop) = chat.probed(template, messages, self.local(i), &self.rendered)?;
        let place = |local: usize| self.at + local - self.opening;
        (content >= self.opening).then(|| (place(content), place(end), place(stop)))
    }

    /// Of so many messages of the conversation, how many the window has with its instructions.
    fn local(&self, count: usize) -> usize {
        self.instructions + count - self.first
    }
}
