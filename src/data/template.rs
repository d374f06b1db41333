//! Chat templates: Jinja as transformers runs it, on minijinja.
//!
//! The same settings (`trim_blocks`, `lstrip_blocks`, loop controls), the same functions (`raise_exception`,
//! `strftime_now`, a `tojson` that writes what Python's `json.dumps` writes) and Python's methods on strings, lists
//! and dictionaries. `{% generation %}`, which marks what the assistant says, becomes a filter block, so that trimming
//! around it stays as it is.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, ErrorKind, State, Value};

use super::conversation::Message;
use crate::error::{Error, Result};

const NAME: &str = "chat_template";

/// Private-use characters that stand around what `{% generation %}` encloses.
const MARKS: [char; 2] = ['\u{10FF00}', '\u{10FF01}'];

/// A compiled chat template.
#[derive(Debug)]
pub(crate) struct Template {
    environment: Environment<'static>,
    bos_token: Option<String>,
    eos_token: Option<String>,
    /// Whether the template ends with the beginning of an answer when asked to.
    pub(crate) prompts: bool,
    marks: bool,
}

impl Template {
    /// Compiles `source`; `now` is what `strftime_now` tells, in seconds since 1970 (UTC).
    pub(crate) fn new(
        source: &str,
        bos_token: Option<String>,
        eos_token: Option<String>,
        now: i64,
    ) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("the default delimiters are valid"));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_filter("generation", |state: &State, said: String| {
            match state.lookup("mark_generation") {
                Some(wanted) if wanted.is_true() => format!("{}{said}{}", MARKS[0], MARKS[1]),
                _ => said,
            }
        });
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("datetimeformat", minijinja_contrib::filters::datetimeformat);
        environment.add_function("strftime_now", move |state: &mut State, format: String| {
            let format = Kwargs::from_iter([("format", Value::from(format))]);
            state.apply_filter("datetimeformat", &[Value::from(now), Value::from(format)])
        });

        let (source, marks) = generation_as_filter(source);
        let prompts = source.contains("add_generation_prompt");
        environment.add_template_owned(NAME, source).map_err(|error| {
            let line = error.line().map_or(String::new(), |line| format!(" in line {line}"));
            Error::invalid(format!("the chat template is not valid{line}: {}", reason(&error)))
        })?;
        Ok(Self { environment, bos_token, eos_token, prompts, marks })
    }

    /// What the model reads for these messages.
    pub(crate) fn render(
        &self,
        messages: &[Message],
        tools: Option<&serde_json::Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        self.run(messages, tools, add_generation_prompt, false)
    }

    /// The spans of `rendered` (of these messages, without generation prompt) that the template itself marks as
    /// said by the assistant, in bytes; none if it marks nothing.
    pub(crate) fn marked(
        &self,
        messages: &[Message],
        tools: Option<&serde_json::Value>,
        rendered: &str,
    ) -> Option<Vec<(usize, usize)>> {
        if !self.marks || rendered.contains(MARKS) {
            return None;
        }
        let marked = self.run(messages, tools, false, true).ok()?;
        let (mut spans, mut plain, mut start) = (Vec::new(), String::new(), None);
        for piece in marked.split_inclusive(MARKS) {
            plain.push_str(piece.trim_end_matches(MARKS));
            match piece.chars().next_back() {
                Some(last) if last == MARKS[0] => start = Some(plain.len()),
                Some(last) if last == MARKS[1] => spans.push((start.take()?, plain.len())),
                _ => {}
            }
        }
        (plain == rendered && !spans.is_empty()).then_some(spans)
    }

    fn run(
        &self,
        messages: &[Message],
        tools: Option<&serde_json::Value>,
        add_generation_prompt: bool,
        mark_generation: bool,
    ) -> Result<String> {
        let mut variables: Vec<(&str, Value)> = vec![
            ("messages", messages.iter().map(message_value).collect()),
            ("add_generation_prompt", add_generation_prompt.into()),
            ("tools", tools.map_or(Value::from(()), json_value)),
            ("documents", Value::from(())),
            ("mark_generation", mark_generation.into()),
        ];
        for (name, token) in [("bos_token", &self.bos_token), ("eos_token", &self.eos_token)] {
            if let Some(token) = token {
                variables.push((name, token.as_str().into()));
            }
        }
        let template = self.environment.get_template(NAME).map_err(|error| Error::invalid(reason(&error)))?;
        template.render(Value::from_pairs(variables)).map_err(|error| {
            Error::invalid(format!("the chat template refuses the conversation: {}", reason(&error)))
        })
    }
}

/// What went wrong, without minijinja's category before a message that the template itself raised.
fn reason(error: &minijinja::Error) -> String {
    error.detail().map_or_else(|| error.kind().to_string(), str::to_string)
}

fn message_value(message: &Message) -> Value {
    let mut pairs = vec![
        (Value::from("role"), Value::from(message.role.name())),
        (Value::from("content"), Value::from(message.content.as_str())),
    ];
    pairs.extend(message.fields.iter().map(|(key, value)| (Value::from(key.as_str()), json_value(value))));
    // As transformers: reasoning goes under the name that templates read, whichever it came by.
    let reasoning = ["reasoning_content", "thinking", "reasoning"]
        .iter()
        .find_map(|key| message.fields.get(*key).filter(|value| !value.is_null()));
    if let Some(reasoning) = reasoning {
        pairs.push((Value::from("reasoning_content"), json_value(reasoning)));
        if !message.fields.contains_key("thinking") {
            pairs.push((Value::from("thinking"), json_value(reasoning)));
        }
    }
    Value::from_pairs(pairs)
}

fn json_value(value: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    match value {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(value), _) => Value::from(value),
            (None, Some(value)) => Value::from(value),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(list) => list.iter().map(json_value).collect(),
        Json::Object(map) => {
            Value::from_pairs(map.iter().map(|(key, value)| (Value::from(key.as_str()), json_value(value))))
        }
    }
}

/// `{% generation %} … {% endgeneration %}` as `{% filter generation %} … {% endfilter %}`, and whether there was one.
fn generation_as_filter(source: &str) -> (String, bool) {
    let (mut out, mut rest, mut found) = (String::with_capacity(source.len()), source, false);
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let length = tag.find("%}").map_or(tag.len(), |end| end + 2);
        let word = tag[2..length].trim_end_matches("%}").trim_matches(['-', '+']).trim();
        match word {
            "generation" => {
                found = true;
                out.push_str(&tag[..length].replacen("generation", "filter generation", 1));
            }
            "endgeneration" => out.push_str(&tag[..length].replacen("endgeneration", "endfilter", 1)),
            _ => out.push_str(&tag[..length]),
        }
        rest = &tag[length..];
    }
    out.push_str(rest);
    (out, found)
}

/// `tojson` as transformers defines it: `json.dumps(value, ensure_ascii=False, indent=…)`.
fn to_json(value: &Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent = options.get::<Option<usize>>("indent")?;
    let ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sort = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let given = options.get::<Option<Vec<String>>>("separators")?;
    options.assert_all_used()?;
    let (item, key) = match (&given, indent) {
        (Some(pair), _) if pair.len() == 2 => (pair[0].as_str(), pair[1].as_str()),
        (_, Some(_)) => (",", ": "),
        (_, None) => (", ", ": "),
    };
    let mut out = String::new();
    Dump { indent, ascii, sort, item, key }.write(value, 1, &mut out)?;
    Ok(out)
}

struct Dump<'a> {
    indent: Option<usize>,
    ascii: bool,
    sort: bool,
    item: &'a str,
    key: &'a str,
}

impl Dump<'_> {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), minijinja::Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&value.to_string()),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list(out, ['[', ']'], depth, items.len(), |i, out| {
                    self.write(&items[i], depth + 1, out)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort {
                    keys.sort();
                }
                self.list(out, ['{', '}'], depth, keys.len(), |i, out| {
                    self.string(&keys[i].to_string(), out);
                    out.push_str(self.key);
                    self.write(&value.get_item(&keys[i])?, depth + 1, out)
                })?;
            }
            other => {
                return Err(minijinja::Error::new(
                    ErrorKind::InvalidOperation,
                    format!("a value of kind {other} cannot be written as JSON"),
                ));
            }
        }
        Ok(())
    }

    fn list(
        &self,
        out: &mut String,
        [open, close]: [char; 2],
        depth: usize,
        count: usize,
        mut element: impl FnMut(usize, &mut String) -> Result<(), minijinja::Error>,
    ) -> Result<(), minijinja::Error> {
        let line = |depth: usize, out: &mut String| {
            if let (Some(width), true) = (self.indent, count > 0) {
                out.push('\n');
                out.extend(std::iter::repeat_n(' ', width * depth));
            }
        };
        out.push(open);
        for i in 0..count {
            if i > 0 {
                out.push_str(self.item);
            }
            line(depth, out);
            element(i, out)?;
        }
        line(depth - 1, out);
        out.push(close);
        Ok(())
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}
