//! A conversation that goes on: the model sees as many of its newest exchanges as there is room for.

use serde_json::{Value, json};

use crate::data::{Message, Role, Text};
use crate::error::Result;

/// A conversation of a user with a model.
#[derive(Debug)]
pub struct Talk<'t> {
    text: &'t Text,
    /// Tokens that the model sees, the answer included.
    most: usize,
    /// Those of them that the question and what was said before may take.
    room: usize,
    system: Option<String>,
    exchanges: Vec<Exchange>,
    /// Exchanges that the model sees no more.
    forgotten: usize,
    asked: Option<String>,
}

#[derive(Debug)]
struct Exchange {
    question: String,
    answer: String,
}

/// How a question fits into what the model sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fitted {
    /// The tokens of the conversation up to the answer, and how many exchanges were forgotten to make room.
    Prompt {
        /// The tokens.
        tokens: Vec<u32>,
        /// How many exchanges the model sees no more, which it saw before.
        forgotten: usize,
    },
    /// The question alone, with the system message, takes so many tokens, which leaves no room: it is not asked.
    TooLong(usize),
}

impl<'t> Talk<'t> {
    /// A conversation with a model that sees `most` tokens, of which an answer may take `max_new_tokens`: these keep free a
    /// quarter at most.
    #[must_use]
    pub fn new(text: &'t Text, most: usize, max_new_tokens: usize) -> Self {
        let room = most.saturating_sub(max_new_tokens.clamp(1, (most / 4).max(1)));
        Self { text, most, room, system: None, exchanges: Vec::new(), forgotten: 0, asked: None }
    }

    /// Tokens that the model sees, the answer included.
    #[must_use]
    pub fn most(&self) -> usize {
        self.most
    }

    /// Tells the model from now on what to keep to.
    ///
    /// # Errors
    /// Where the chat template has no place for that.
    pub fn set_system(&mut self, system: Option<String>) -> Result<()> {
        if let Some(system) = &system {
            self.text.check_system(system)?;
        }
        self.system = system;
        Ok(())
    }

    /// Asks a question. Whole exchanges are forgotten from the oldest on until all fits; the system message stays.
    pub fn ask(&mut self, question: &str) -> Result<Fitted> {
        let alone = self.text.prompt_tokens(&self.messages(self.exchanges.len(), question))?.len();
        if alone > self.room {
            return Ok(Fitted::TooLong(alone));
        }
        let before = self.forgotten;
        let mut tokens = self.text.prompt_tokens(&self.messages(self.forgotten, question))?;
        while tokens.len() > self.room && self.forgotten < self.exchanges.len() {
            self.forgotten += 1;
            tokens = self.text.prompt_tokens(&self.messages(self.forgotten, question))?;
        }
        self.asked = Some(question.to_string());
        Ok(Fitted::Prompt { tokens, forgotten: self.forgotten - before })
    }

    /// Takes the answer to the question that was asked.
    pub fn answer(&mut self, answer: String) {
        self.exchanges.extend(self.asked.take().map(|question| Exchange { question, answer }));
    }

    /// Takes back the last exchange; tells whether there was one.
    pub fn undo(&mut self) -> bool {
        let was_there = self.exchanges.pop().is_some();
        self.forgotten = self.forgotten.min(self.exchanges.len());
        was_there
    }

    /// Forgets all exchanges, but not the system message.
    pub fn clear(&mut self) {
        (self.exchanges, self.forgotten) = (Vec::new(), 0);
    }

    /// The whole conversation as a record of training data, and how many exchanges it lacks because nothing was answered: data
    /// with an empty message is refused. There is none where nothing has been answered.
    #[must_use]
    pub fn record(&self) -> (Option<Value>, usize) {
        let is_answered = |exchange: &&Exchange| !exchange.answer.trim().is_empty();
        let said = |role: Role, content: &str| json!({ "role": role.name(), "content": content });
        let answered: Vec<&Exchange> = self.exchanges.iter().filter(is_answered).collect();
        let left_out = self.exchanges.len() - answered.len();
        if answered.is_empty() {
            return (None, left_out);
        }
        let system = self.system.iter().map(|system| said(Role::System, system));
        let exchanges = answered.into_iter().flat_map(|Exchange { question, answer }| {
            [said(Role::User, question), said(Role::Assistant, answer)]
        });
        (Some(json!({ "messages": system.chain(exchanges).collect::<Vec<_>>() })), left_out)
    }

    /// The system message, the exchanges from number `first` on, and the question.
    fn messages(&self, first: usize, question: &str) -> Vec<Message> {
        let system = self.system.iter().map(|system| Message::new(Role::System, system));
        let exchanges = self.exchanges[first..].iter().flat_map(|Exchange { question, answer }| {
            [Message::new(Role::User, question), Message::new(Role::Assistant, answer)]
        });
        system.chain(exchanges).chain([Message::new(Role::User, question)]).collect()
    }
}
