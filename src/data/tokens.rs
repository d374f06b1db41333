//! Conversations to tokens, and which of them are learned.
//!
//! With `train_on = completion` that is what the assistant says, from the end of the prompt that generation will
//! give (`add_generation_prompt`) to the token that ends the turn, in every assistant message. A message that its record
//! switches off is not learned, with `train_on = all` either; one of another role that it switches on is. A prompt with
//! a completion is tokenised twice, alone and whole, and learned from where the two differ. Every document ends with
//! the end token, which is learned: a model that never sees it never stops.

use serde_json::Value;

use super::TrainOn;
use super::chat::{Chat, Turn};
use super::conversation::Conversation;
use super::lost::lost;
use super::text::Text;
use crate::error::{Error, Result};

/// Token ids, and whether each is learned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Tokens {
    pub(crate) tokens: Vec<u32>,
    pub(crate) supervised: Vec<bool>,
    /// Whether these are only the first tokens of a document that is much longer than wanted.
    pub(crate) is_cut: bool,
    /// Names the first text of the record that the template leaves out.
    pub(crate) lost: Option<String>,
    /// Control tokens in what the record says, and the first.
    pub(crate) controls: (usize, Option<String>),
}

impl Tokens {
    fn learned(tokens: Vec<u32>, learn: impl Fn(usize) -> bool) -> Self {
        let supervised = (0..tokens.len()).map(|i| i > 0 && learn(i)).collect();
        Self { tokens, supervised, ..Self::default() }
    }

    fn push_learned(&mut self, token: u32) {
        self.supervised.push(!self.tokens.is_empty());
        self.tokens.push(token);
    }
}

/// The tokens of one document, of whatever length, or of one that is much longer than `enough` at least so many;
/// `end_texts` says whether texts get the end token.
pub(crate) fn tokenise(
    conversation: &Conversation,
    text: &Text,
    train_on: TrainOn,
    end_texts: bool,
    enough: usize,
) -> Result<Tokens> {
    let mut tokens = tokens_of(conversation, text, train_on, end_texts, enough)?;
    text.refuse_unknown(&tokens.tokens[..tokens.tokens.len().min(enough)])?;
    let mut count = |said: &str| {
        let (found, first) = text.control_tokens(said);
        tokens.controls.0 += found;
        tokens.controls.1 = tokens.controls.1.take().or(first.map(str::to_string));
    };
    match conversation {
        Conversation::Text(document) => count(document),
        Conversation::PromptCompletion { prompt, completion } => {
            count(prompt);
            count(completion);
        }
        Conversation::Chat { messages, tools, extra, .. } => {
            for message in messages {
                message.content.as_deref().map(&mut count);
                message.fields.values().for_each(|value| each_text(value, &mut count));
            }
            tools.iter().chain(extra.values()).for_each(|value| each_text(value, &mut count));
        }
    }
    Ok(tokens)
}

/// Hands over all texts in a value: those that [`Text::mark`] marks.
fn each_text(value: &Value, take: &mut impl FnMut(&str)) {
    match value {
        Value::String(text) => take(text),
        Value::Array(list) => list.iter().for_each(|value| each_text(value, take)),
        Value::Object(map) => map.values().for_each(|value| each_text(value, take)),
        _ => {}
    }
}

fn tokens_of(
    conversation: &Conversation,
    text: &Text,
    train_on: TrainOn,
    end_texts: bool,
    enough: usize,
) -> Result<Tokens> {
    match conversation {
        Conversation::Text(document) => {
            let (tokens, is_cut) = text.document(document, enough)?;
            let mut document = Tokens { is_cut, ..Tokens::learned(tokens, |_| true) };
            if end_texts {
                end(&mut document, text);
            }
            Ok(document)
        }
        Conversation::PromptCompletion { prompt, completion } => {
            let (alone, _) = text.document(prompt, enough)?;
            let (whole, is_cut) = text.document(&format!("{prompt}{completion}"), enough)?;
            let common = alone.iter().zip(&whole).take_while(|(x, y)| x == y).count();
            let learned = Tokens::learned(whole, |i| train_on == TrainOn::All || i >= common);
            let mut document = Tokens { is_cut, ..learned };
            end(&mut document, text);
            Ok(document)
        }
        Conversation::Chat { messages, tools, extra, learn_from } => {
            let chat = Chat::new(messages, tools.as_ref(), extra, text, enough)?;
            let lost = lost(chat.messages, &chat.rendered);
            Ok(Tokens { lost, ..chat.tokens(train_on, *learn_from)? })
        }
    }
}

fn end(document: &mut Tokens, text: &Text) {
    match (text.eos_ids().first(), document.tokens.last()) {
        (Some(eos), Some(last)) if last != eos => document.push_learned(*eos),
        _ => {}
    }
}

impl Chat<'_> {
    fn tokens(self, train_on: TrainOn, learn_from: usize) -> Result<Tokens> {
        let last = self.messages.len() - 1;
        let switched_off = |i: usize| self.messages[i].learn == Some(false);
        let (turns, off) = match train_on {
            TrainOn::All => {
                let closed = !self.speaks(last) || self.turn(last).is_ok_and(|turn| turn.closed);
                let whole = Turn { start: 0, end: self.rendered.len(), closed };
                (vec![whole], self.turns(switched_off)?)
            }
            TrainOn::Completion => {
                let learned =
                    |i: usize| i >= learn_from && self.messages[i].learn.unwrap_or_else(|| self.speaks(i));
                if !(learn_from..=last).any(|i| self.speaks(i) || learned(i)) {
                    return Err(Error::invalid("the conversation has no `assistant` message to learn from")
                        .with_hint("set `data.train_on` = \"all\" to learn every token"));
                }
                (self.turns(learned)?, Vec::new())
            }
        };
        // A last message that is not learned has no end to learn either.
        let closed = !self.speaks(last) || switched_off(last) || turns.last().is_none_or(|turn| turn.closed);

        let overlapped = |turns: &[Turn]| -> Vec<bool> {
            let mut turns = turns.iter().peekable();
            let spans = self.spans.iter();
            spans
                .map(|&(start, end)| {
                    while turns.next_if(|turn| turn.end <= start).is_some() {}
                    turns.peek().is_some_and(|turn| end > turn.start)
                })
                .collect()
        };
        let mut supervised = overlapped(&turns);
        for (counted, off) in supervised.iter_mut().zip(overlapped(&off)) {
            *counted &= !off;
        }
        let mut tokens = Tokens { tokens: self.tokens, supervised, is_cut: self.is_cut, ..Tokens::default() };
        if let Some(bos) = self.text.missing_bos(&tokens.tokens) {
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
}

#[cfg(test)]
mod tests {
    use serde_json::Map;

    use super::*;
    use crate::data::conversation::{Message, Role};
    use crate::data::template::RENDERED;
    use crate::data::text::TemplateParts;
    use crate::data::text::tests::{CHATML, chatml, text};

    fn talk(turns: &[(Role, &str)]) -> Conversation {
        Conversation::chat(turns.iter().map(|&(role, said)| Message::new(role, said)).collect())
    }

    fn two_turns() -> Conversation {
        let turns = [
            (Role::User, " q1 "),
            (Role::Assistant, " a1\n"),
            (Role::User, "q2"),
            (Role::Assistant, "a2 é🦀"),
        ];
        talk(&turns)
    }

    /// The text with what is learned in brackets.
    fn marked(conversation: &Conversation, text: &Text, train_on: TrainOn) -> String {
        let Tokens { tokens, supervised, .. } =
            tokenise(conversation, text, train_on, true, usize::MAX).unwrap();
        assert_eq!((tokens.len(), supervised[0]), (supervised.len(), false));
        let row = crate::data::Row { tokens, supervised, document: 0 };
        let segments = crate::data::preview(&row, text).unwrap();
        segments.into_iter().map(|(said, counted)| if counted { format!("[{said}]") } else { said }).collect()
    }

    fn model(template: &str, special: &[&str], eos: &str) -> Text {
        let parts = TemplateParts {
            chat_template: Some(template.into()),
            eos_token: Some(eos.into()),
            ..TemplateParts::default()
        };
        text(special, parts, |_| {})
    }

    #[test]
    fn answers_and_their_end_tokens_are_learned() {
        assert_eq!(
            marked(&two_turns(), &chatml(), TrainOn::Completion),
            "<|im_start|>user\n q1 <|im_end|>\n<|im_start|>assistant\n[ a1\n<|im_end|>]\n\
             <|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n[a2 é🦀<|im_end|>]\n"
        );
        let question_last = talk(&[(Role::Assistant, "a"), (Role::User, "q")]);
        assert_eq!(
            marked(&question_last, &chatml(), TrainOn::Completion),
            "<|im_start|>assistant\n[a<|im_end|>]\n<|im_start|>user\nq<|im_end|>\n"
        );
        assert!(
            marked(&two_turns(), &chatml(), TrainOn::All)
                .starts_with("<|im_start|>[user\n q1 <|im_end|>\n<|im_")
        );
    }

    #[test]
    fn what_the_template_leaves_out_is_told() {
        let lost = |conversation: &Conversation, template: &str| {
            tokenise(conversation, &model(template, &[], "<|im_end|>"), TrainOn::All, true, usize::MAX)
                .unwrap()
                .lost
        };
        let users = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}";
        let shorter = "{% for m in messages %}{{ m.content.split('</think>')[-1]|trim }}{% endfor %}";
        let written = "{{ messages|tojson }}";
        let thinks = talk(&[(Role::User, "q"), (Role::Assistant, "<think>\nhm\n</think>\n\n a \n")]);
        assert_eq!(lost(&two_turns(), CHATML), None);
        assert_eq!(lost(&thinks, CHATML), None);
        assert_eq!(lost(&thinks, shorter), Some("the thoughts of message 2".into()));
        assert_eq!(lost(&two_turns(), users), Some("the content of message 2 (role `assistant`)".into()));
        assert_eq!(lost(&talk(&[(Role::User, "a \"b\"\n\\c")]), written), None);
        let empty = talk(&[(Role::User, "q"), (Role::Assistant, "<think>\n\n</think>\n\na")]);
        assert_eq!(lost(&empty, shorter), None);
        let mut field = two_turns();
        if let Conversation::Chat { messages, .. } = &mut field {
            messages[1].fields.insert("reasoning_content".into(), "hm".into());
        }
        assert_eq!(lost(&field, CHATML), Some("the thoughts of message 2".into()));
    }

    #[test]
    fn context_is_not_learned() {
        let Conversation::Chat { messages, tools, extra, .. } = two_turns() else { unreachable!() };
        let conversation = Conversation::Chat { messages, tools, extra, learn_from: 2 };
        let said = marked(&conversation, &chatml(), TrainOn::Completion);
        assert!(
            said.contains("assistant\n a1\n<|im_end|>\n") && said.ends_with("[a2 é🦀<|im_end|>]\n"),
            "{said}"
        );
    }

    /// The turns with the second, third or any other switched on or off.
    fn switched(which: &[(usize, bool)]) -> Conversation {
        let Conversation::Chat { mut messages, .. } = two_turns() else { unreachable!() };
        which.iter().for_each(|&(i, on)| messages[i].learn = Some(on));
        Conversation::chat(messages)
    }

    #[test]
    fn turns_are_switched_off_and_on() {
        let generation = CHATML
            .replace("m.role + '\n' + m.content + '<|im_end|>\n' }}", "m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}\
                {{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}");
        for text in [chatml(), model(&generation, &[], "<|im_end|>")] {
            let said = |which: &[(usize, bool)], train_on| marked(&switched(which), &text, train_on);
            let question = "<|im_start|>user\n q1 <|im_end|>\n<|im_start|>assistant\n";
            let second = "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n";
            assert_eq!(
                said(&[(1, false)], TrainOn::Completion),
                format!("{question} a1\n<|im_end|>\n{second}[a2 é🦀<|im_end|>]\n")
            );
            assert_eq!(
                said(&[(1, true), (3, false)], TrainOn::Completion),
                format!("{question}[ a1\n<|im_end|>]\n{second}a2 é🦀<|im_end|>\n")
            );
            assert_eq!(
                said(&[(1, false), (3, false)], TrainOn::Completion),
                format!("{question} a1\n<|im_end|>\n{second}a2 é🦀<|im_end|>\n")
            );
            assert_eq!(
                said(&[(1, false), (2, true)], TrainOn::Completion),
                format!(
                    "{question} a1\n<|im_end|>\n<|im_start|>user\n[q2<|im_end|>]\n<|im_start|>assistant\n[a2 é🦀<|im_end|>]\n"
                )
            );
            assert_eq!(
                said(&[(0, false), (1, false)], TrainOn::All),
                "<|im_start|>[user\n] q1 <|im_end|>[\n<|im_start|>assistant\n] a1\n<|im_end|>[\n<|im_start|>user\n\
                 q2<|im_end|>\n<|im_start|>assistant\na2 é🦀<|im_end|>\n]"
            );
        }
    }

    #[test]
    fn a_last_turn_that_is_off_gets_no_end_to_learn() {
        let plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}\
            {% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}";
        let text = model(plain, &[], "<|im_end|>");
        for train_on in [TrainOn::Completion, TrainOn::All] {
            let said = marked(&switched(&[(3, false)]), &text, train_on);
            assert!(said.contains("a1") && said.ends_with("a2 é🦀\n"), "{said}");
        }
    }

    #[test]
    fn control_tokens_are_counted_wherever_the_template_may_read_them() {
        let Conversation::Chat { mut messages, .. } = two_turns() else { unreachable!() };
        let call = serde_json::json!([{"function": {"name": "f", "arguments": {"x": ["<|im_end|>", 1]}}}]);
        messages[1].fields.insert("tool_calls".into(), call);
        messages[2].content = Some("<|im_start|>".into());
        let conversation = Conversation::Chat {
            messages,
            tools: Some(serde_json::json!([{"description": "<|im_end|><|im_end|>"}])),
            extra: Map::from_iter([("note".to_string(), serde_json::json!({"of": "<|im_start|>"}))]),
            learn_from: 0,
        };
        let tokens = tokenise(&conversation, &chatml(), TrainOn::Completion, true, usize::MAX).unwrap();
        assert_eq!(tokens.controls, (5, Some("<|im_end|>".to_string())));
    }

    #[test]
    fn calls_that_the_template_does_not_read_are_named() {
        let Conversation::Chat { mut messages, .. } = two_turns() else { unreachable!() };
        messages[1].content = None;
        messages[1].fields.insert("tool_calls".into(), serde_json::json!([{}]));
        let conversation = Conversation::chat(messages);
        let error = tokenise(&conversation, &chatml(), TrainOn::Completion, true, usize::MAX).unwrap_err();
        assert!(
            error.to_string().starts_with("message 2 calls a tool (`tool_calls` or `function_call`), which"),
            "{error}"
        );
    }

    #[test]
    fn templates_that_trim_and_have_no_prompt_of_their_own() {
        let mistral = "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content.strip() + ' [/INST]' }}\
            {% else %}{{ ' ' + m.content.strip() + eos_token }}{% endif %}{% endfor %}";
        let text = model(mistral, &["</s>"], "</s>");
        assert_eq!(
            marked(&two_turns(), &text, TrainOn::Completion),
            "[INST] q1 [/INST][ a1</s>][INST] q2 [/INST][ a2 é🦀</s>]"
        );
    }

    #[test]
    fn templates_that_change_what_came_before() {
        let thinks = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}\
            {% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}\
            {{ m.content.split('</think>')[-1] }}{{ '<|im_end|>\n' }}{% endfor %}\
            {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        let text = model(thinks, &[], "<|im_end|>");
        assert_eq!(
            marked(&two_turns(), &text, TrainOn::Completion),
            "<|im_start|>user\n q1 <|im_end|>\n<|im_start|>assistant\n[ a1\n<|im_end|>]\n\
             <|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n[<think></think>a2 é🦀<|im_end|>]\n"
        );
        // A prompt that opens the thoughts is no prefix of what is rendered without them.
        let opens = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif");
        let text = model(&opens, &[], "<|im_end|>");
        let said = marked(&two_turns(), &text, TrainOn::Completion);
        assert!(said.contains("assistant\n[ a1\n<|im_end|>]\n<|im_start|>user"), "{said}");
    }

    #[test]
    fn a_record_of_many_messages_is_rendered_as_far_as_its_tokens_are_wanted() {
        let long = talk(&[(Role::User, "q"), (Role::Assistant, "a1")].repeat(2000));
        // Templates that keep what came before, that change it, and that refuse all but the whole.
        let changes = CHATML.replace("+ m.content +", "+ ('' if loop.last else '-') + m.content +");
        let refuses =
            format!("{{% if messages|length < 4000 %}}{{{{ raise_exception('no') }}}}{{% endif %}}{CHATML}");
        for (template, times) in [(CHATML, 6), (&changes, 20), (&refuses, 20)] {
            let text = model(template, &[], "<|im_end|>");
            for train_on in [TrainOn::Completion, TrainOn::All] {
                RENDERED.set(0);
                let some = tokenise(&long, &text, train_on, true, 30).unwrap();
                assert!(
                    RENDERED.get() < times * 4000,
                    "{template}: {} messages were rendered",
                    RENDERED.get()
                );
                let first = talk(&[(Role::User, "q"), (Role::Assistant, "a1")].repeat(10));
                let whole = tokenise(&first, &text, train_on, true, usize::MAX);
                let Ok(whole) = whole else { continue };
                assert_eq!(some.tokens[..30], whole.tokens[..30]);
                assert_eq!(some.supervised[..30], whole.supervised[..30], "{template}");
            }
        }
    }

    /// The learned parts of a long conversation repeat themselves, whatever the template does to the last turn; and what is
    /// rendered to know it grows as the conversation does.
    #[test]
    fn turns_of_a_long_conversation_are_found_in_pieces_of_it() {
        const TURNS: usize = 400;
        let thinks = CHATML
            .replace(
                "m.role + '\n' +",
                "m.role + '\n' + ('<t></t>' if loop.last and m.role == 'assistant' else '') +",
            )
            .replace("{% for", "{% if messages[0].role != 'system' %}help!\n{% endif %}{% for");
        let ends = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}");
        let trims = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('order') }}\
            {% endif %}{{ '[INST] ' + m.content.strip() + ' [/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}\
            {% endfor %}";
        let turn = |q: usize| {
            format!("<|im_start|>user\nq{q}<|im_end|>\n<|im_start|>assistant\n[a é{q}<|im_end|>]\n")
        };
        let last = |q: usize, think: &str, end: &str| {
            turn(q).replace("[a", &format!("[{think}a")).replace("]\n", end)
        };
        let all = |count: usize| (0..count).map(turn).collect::<String>();
        let expected = [
            (CHATML, String::new(), all(TURNS)),
            (&thinks, "help!\n".into(), all(TURNS - 1) + &last(TURNS - 1, "<t></t>", "]\n")),
            (&ends, String::new(), all(TURNS - 1) + &last(TURNS - 1, "", "\n<|im_end|>]")),
            (
                trims,
                String::new(),
                (0..TURNS).map(|q| format!("[INST] q{q} [/INST][ a é{q}<|im_end|>]")).collect(),
            ),
        ];
        for (template, help, expected) in expected {
            let text = model(template, &[], "<|im_end|>");
            let mut messages: Vec<Message> = (0..TURNS)
                .flat_map(|q| {
                    [
                        Message::new(Role::User, format!("q{q}")),
                        Message::new(Role::Assistant, format!("a é{q}")),
                    ]
                })
                .collect();
            RENDERED.set(0);
            assert_eq!(
                marked(&Conversation::chat(messages.clone()), &text, TrainOn::Completion),
                help + &expected
            );
            assert!(RENDERED.get() < 50 * 2 * TURNS, "{template}: {} messages were rendered", RENDERED.get());
            if template == trims {
                continue;
            }
            messages.insert(0, Message::new(Role::System, "s"));
            let system = "<|im_start|>system\ns<|im_end|>\n".to_string();
            assert_eq!(marked(&Conversation::chat(messages), &text, TrainOn::Completion), system + &expected);
        }
    }

    #[test]
    fn the_message_that_a_template_refuses_is_found_among_many() {
        let refuses = format!(
            "{{% for m in messages %}}{{% if m.content == 'bad' %}}{{{{ raise_exception('bad') }}}}{{% endif %}}{{% endfor %}}{CHATML}"
        );
        let text = model(&refuses, &[], "<|im_end|>");
        for bad in [0, 5, 30, 31, 32, 33, 1500, 3999] {
            let mut turns = [(Role::User, "q"), (Role::Assistant, "a1")].repeat(2000);
            turns[bad].1 = "bad";
            RENDERED.set(0);
            let error = tokenise(&talk(&turns), &text, TrainOn::Completion, true, 30).unwrap_err();
            let named = format!("the chat template refuses message {} of 4000", bad + 1);
            assert!(error.to_string().starts_with(&named), "{error}");
            assert!(RENDERED.get() < 20 * 4000, "{} messages were rendered", RENDERED.get());
        }
    }

    #[test]
    fn the_end_of_the_whole_is_learned_too() {
        let phi = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}\
            {% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}";
        let text = model(phi, &["<|end|>", "<|user|>", "<|assistant|>", "</s>"], "</s>");
        assert_eq!(
            marked(&two_turns(), &text, TrainOn::Completion),
            "<|user|>\n q1 <|end|>\n<|assistant|>\n[ a1\n<|end|>]\n<|user|>\nq2<|end|>\n\
             <|assistant|>\n[a2 é🦀<|end|>\n</s>]"
        );
    }

    #[test]
    fn turns_without_end_tokens() {
        let plain = "{% for m in messages %}{{ m.role + ': ' + m.content.strip() + '\n' }}{% endfor %}\
            {% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}";
        let expected = "user: q1\nassistant:[ a1]\nuser: q2\nassistant:[ a2 é🦀\n<|im_end|>]";
        assert_eq!(marked(&two_turns(), &model(plain, &[], "<|im_end|>"), TrainOn::Completion), expected);

        let glm = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content.strip() }}{% endfor %}\
            {% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}";
        let special = ["<|user|>", "<|assistant|>"];
        let parts = |eos| TemplateParts {
            chat_template: Some(glm.into()),
            eos_token: Some("<|endoftext|>".into()),
            eos_token_ids: eos,
            ..TemplateParts::default()
        };
        let user = text(&special, parts(vec![]), |_| {}).encode("<|user|>").unwrap();
        let text = text(&special, parts(user), |_| {});
        assert_eq!(
            marked(&two_turns(), &text, TrainOn::Completion),
            "<|user|>\nq1<|assistant|>[\na1<|user|>]\nq2<|assistant|>[\na2 é🦀<|endoftext|>]"
        );
    }

    #[test]
    fn spaces_that_the_tokenizer_trims_belong_to_their_token() {
        let parts = TemplateParts {
            chat_template: Some("{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}".into()),
            eos_token: Some("<|im_end|>".into()),
            ..TemplateParts::default()
        };
        let trims = serde_json::json!(
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}
        );
        let text = text(&[], parts, |file| file["post_processor"] = trims);
        let conversation = talk(&[(Role::User, "q"), (Role::Assistant, " a1 ")]);
        assert_eq!(marked(&conversation, &text, TrainOn::Completion), "user:qassistant:[ a1 <|im_end|>]");
    }

    #[test]
    fn what_the_template_marks_is_learned() {
        let generation = CHATML
            .replace(
                "{{ '<|im_start|>' + m.role",
                "{% if m.role == 'assistant' %}<|im_start|>model says\n\
                {%- generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}\
                {% else %}{{ '<|im_start|>' + m.role",
            )
            .replace("{% endfor", "{% endif %}{% endfor");
        let text = model(&generation, &[], "<|im_end|>");
        let said = marked(&two_turns(), &text, TrainOn::Completion);
        assert!(
            said.contains("model says[ a1\n<|im_end|>]\n") && said.ends_with("says[a2 é🦀<|im_end|>]\n"),
            "{said}"
        );
    }

    #[test]
    fn what_cannot_be_learned_is_an_error() {
        let none = tokenise(&talk(&[(Role::User, "q")]), &chatml(), TrainOn::Completion, true, usize::MAX)
            .unwrap_err();
        assert_eq!(none.to_string(), "the conversation has no `assistant` message to learn from");
        let loses = "{% for m in messages %}{{ m.content|length }}{% endfor %}";
        let text = model(loses, &[], "<|im_end|>");
        let lost = tokenise(&two_turns(), &text, TrainOn::Completion, true, usize::MAX).unwrap_err();
        assert!(lost.to_string().contains("content of message 2,"), "{lost}");
        assert_eq!(marked(&two_turns(), &text, TrainOn::All), "4[425<|im_end|>]");
    }

    #[test]
    fn a_completion_is_learned_from_where_it_differs() {
        let text = chatml();
        let pair = |prompt: &str, completion: &str| {
            let pair =
                Conversation::PromptCompletion { prompt: prompt.into(), completion: completion.into() };
            (marked(&pair, &text, TrainOn::Completion), marked(&pair, &text, TrainOn::All))
        };
        assert_eq!(
            pair("ab ", "cd").0,
            "ab[ cd<|im_end|>]",
            "the space belongs to the token that begins with it"
        );
        assert_eq!(pair("a:", " cd<|im_end|>").0, "a:[ cd<|im_end|>]");
        assert_eq!(pair("a:", " cd").1, "a[: cd<|im_end|>]");
    }

    #[test]
    fn a_text_is_learned_whole() {
        let text = chatml();
        assert_eq!(marked(&Conversation::Text("1 2".into()), &text, TrainOn::Completion), "1[ 2<|im_end|>]");
        assert_eq!(
            marked(&Conversation::Text("1<|im_end|>".into()), &text, TrainOn::Completion),
            "1[<|im_end|>]"
        );
        let endless = text_without_end();
        assert_eq!(marked(&Conversation::Text("1 2".into()), &endless, TrainOn::Completion), "1[ 2]");
    }

    #[test]
    fn what_stops_generation_is_learned_before_what_only_closes() {
        let template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}\
            {% if m.role == 'assistant' %}</call>{% endif %}{% endfor %}\
            {% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}";
        let parts = TemplateParts {
            chat_template: Some(template.into()),
            eos_token: Some("<|user|>".into()),
            ..TemplateParts::default()
        };
        let special = ["<|user|>", "<|assistant|>", "</call>"];
        assert_eq!(
            marked(
                &talk(&[(Role::User, "q"), (Role::Assistant, "a"), (Role::User, "r")]),
                &text(&special, parts, |_| {}),
                TrainOn::Completion
            ),
            "<|user|>q<|assistant|>[a</call><|user|>]r"
        );
    }

    fn text_without_end() -> Text {
        text(&[], TemplateParts::default(), |_| {})
    }
}
