//! One document before it becomes tokens: a conversation, a prompt with its completion, or a text.

use serde_json::{Map, Value};

/// One document before it becomes tokens.
#[derive(Debug, Clone, PartialEq)]
pub enum Conversation {
    /// Messages that go through the model's chat template.
    Chat {
        /// In order.
        messages: Vec<Message>,
        /// Descriptions of tools, handed to the template as they are.
        tools: Option<Value>,
        /// Further variables for the template (`chat_template_kwargs`); they win over all that come from elsewhere.
        extra: Map<String, Value>,
        /// Assistant messages before this one are context only.
        learn_from: usize,
    },
    /// Two strings that are joined as they are; the second is learned.
    PromptCompletion {
        /// What is given.
        prompt: String,
        /// What is learned, without the end token.
        completion: String,
    },
    /// A text that is learned whole.
    Text(String),
}

/// The keys under which messages hold the reasoning before an answer, the one of most templates first.
pub(super) const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said; none beside tool calls.
    pub content: Option<String>,
    /// Whether the record switches learning of this message on or off; left out, only assistant messages are learned.
    pub learn: Option<bool>,
    /// Holds the record's other keys for the template, such as `tool_calls`, `reasoning_content` and `name`. Keys that
    /// are null are left out, as in transformers 5.
    pub fields: Map<String, Value>,
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Instructions that hold for the whole conversation.
    System,
    /// Instructions of the application's developer; templates that do not know the word get `system`.
    Developer,
    /// The one who asks.
    User,
    /// The model.
    Assistant,
    /// What a tool answered.
    Tool,
}

impl Role {
    /// The name that chat templates know.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Developer => "developer",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

impl Message {
    /// A plain message.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: Some(content.into()), learn: None, fields: Map::new() }
    }
}

impl Conversation {
    /// A conversation of which every assistant message is learned.
    #[must_use]
    pub fn chat(messages: Vec<Message>) -> Self {
        Self::Chat { messages, tools: None, extra: Map::new(), learn_from: 0 }
    }
}
