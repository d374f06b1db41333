//! Chat templates: Jinja as transformers runs it, on minijinja.
//!
//! The same settings (`trim_blocks`, `lstrip_blocks`, loop controls), the same functions (`raise_exception`,
//! `strftime_now`, a `tojson` that writes what Python's `json.dumps` writes) and Python's methods on strings, lists
//! and dictionaries. `{% generation %}`, which marks what the assistant says, becomes a filter block, so that trimming
//! around it stays as it is.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, ErrorKind, State, Value};
use serde_json::Map;

use super::conversation::{Message, Role};
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
    /// Whether the role `developer` means something to the template.
    knows_developer: bool,
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
        // Python cannot iterate over None; minijinja takes it for an empty list.
        environment.add_test("iterable", |value: &Value| {
            !matches!(value.kind(), ValueKind::None | ValueKind::Bool | ValueKind::Number)
        });
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("datetimeformat", minijinja_contrib::filters::datetimeformat);
        environment.add_function("strftime_now", move |state: &mut State, format: String| {
            let format = Kwargs::from_iter([("format", Value::from(format))]);
            state.apply_filter("datetimeformat", &[Value::from(now), Value::from(format)])
        });

        let (source, marks) = translate(source);
        let prompts = source.contains("add_generation_prompt");
        let knows_developer = ["'developer'", "\"developer\""].iter().any(|word| source.contains(word));
        environment.add_template_owned(NAME, source).map_err(|error| {
            let line = error.line().map_or(String::new(), |line| format!(" in line {line}"));
            Error::invalid(format!("the chat template is not valid{line}: {}", reason(&error)))
        })?;
        Ok(Self { environment, bos_token, eos_token, prompts, marks, knows_developer })
    }

    /// What the model reads for these messages.
    pub(crate) fn render(
        &self,
        messages: &[Message],
        tools: Option<&serde_json::Value>,
        extra: &Map<String, serde_json::Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        self.run(messages, tools, extra, add_generation_prompt, false)
    }

    /// Whether the source has this word, so that a template without it cannot read a key of this name.
    pub(crate) fn mentions(&self, word: &str) -> bool {
        self.environment.get_template(NAME).is_ok_and(|template| template.source().contains(word))
    }

    /// The spans of `rendered` (of these messages, without generation prompt) that the template itself marks as
    /// said by the assistant, in bytes; none if it marks nothing.
    pub(crate) fn marked(
        &self,
        messages: &[Message],
        tools: Option<&serde_json::Value>,
        extra: &Map<String, serde_json::Value>,
        rendered: &str,
    ) -> Option<Vec<(usize, usize)>> {
        if !self.marks || rendered.contains(MARKS) {
            return None;
        }
        let marked = self.run(messages, tools, extra, false, true).ok()?;
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
        extra: &Map<String, serde_json::Value>,
        add_generation_prompt: bool,
        mark_generation: bool,
    ) -> Result<String> {
        let mut variables: Vec<(&str, Value)> = vec![
            (
                "messages",
                messages.iter().map(|message| message_value(message, self.knows_developer)).collect(),
            ),
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
        // As in Python, where keyword arguments win over special tokens.
        variables.retain(|(name, _)| !extra.contains_key(*name));
        variables.extend(extra.iter().map(|(name, value)| (name.as_str(), json_value(value))));
        let template = self.environment.get_template(NAME).map_err(|error| Error::invalid(reason(&error)))?;
        template.render(Value::from_pairs(variables)).map_err(|error| {
            Error::invalid(format!("the chat template cannot render the conversation: {}", reason(&error)))
        })
    }
}

/// What went wrong, without minijinja's category before a message that the template itself raised.
fn reason(error: &minijinja::Error) -> String {
    error.detail().map_or_else(|| error.kind().to_string(), str::to_string)
}

fn message_value(message: &Message, knows_developer: bool) -> Value {
    let role = match message.role {
        Role::Developer if !knows_developer => Role::System,
        role => role,
    };
    let mut pairs = vec![(Value::from("role"), Value::from(role.name()))];
    pairs.extend(message.content.as_deref().map(|said| (Value::from("content"), Value::from(said))));
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

/// The source in minijinja's dialect, and whether it marks generations: `{% generation %} … {% endgeneration %}` as
/// `{% filter generation %} … {% endfilter %}`, and strings that a backslash carries on to the next line on one line.
fn translate(source: &str) -> (String, bool) {
    let (mut out, mut rest, mut marks) = (String::with_capacity(source.len()), source, false);
    let next = |rest: &str| {
        let found = ["{%", "{{", "{#"].iter().zip(["%}", "}}", "#}"]);
        found.filter_map(|(open, close)| rest.find(open).map(|at| (at, close))).min()
    };
    while let Some((at, close)) = next(rest) {
        let (text, tag) = rest.split_at(at);
        let (tag, after) = tag.split_at(tag.find(close).map_or(tag.len(), |end| end + 2));
        out.push_str(text);
        match tag.trim_matches(['{', '%', '-', '+', '}']).trim() {
            "generation" if close == "%}" => {
                marks = true;
                out.push_str(&tag.replacen("generation", "filter generation", 1));
            }
            "endgeneration" if close == "%}" => out.push_str(&tag.replacen("endgeneration", "endfilter", 1)),
            _ => out.push_str(&tag.replace("\\\n", "")),
        }
        rest = after;
    }
    out.push_str(rest);
    (out, marks)
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
            ValueKind::Number => out.push_str(&number(value)),
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

/// A number as Python writes it: floats very large or small with an exponent of two digits.
fn number(value: &Value) -> String {
    let size = match f64::try_from(value.clone()) {
        Ok(size) if !value.is_integer() && size != 0.0 && size.is_finite() => size,
        _ => return value.to_string(),
    };
    let scientific = format!("{size:e}");
    match scientific.split_once('e').map(|(digits, exponent)| (digits, exponent.parse::<i32>())) {
        Some((digits, Ok(exponent))) if !(-4..16).contains(&exponent) => {
            format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
        }
        _ => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, messages: &[Message]) -> String {
        let template = Template::new(source, Some("<s>".into()), None, 1_722_000_000).unwrap();
        template.render(messages, None, &Map::new(), false).unwrap()
    }

    #[test]
    fn json_is_written_as_python_writes_it() {
        let said =
            |filter: &str| render(&format!("{{{{ messages[0].value|tojson{filter} }}}}"), &[message()]);
        // json.dumps of the same value with the same arguments, Python 3.11.
        assert_eq!(
            said(""),
            r#"{"ü": [1, 2.5, true, null, 1e-05, 1e+20, 0.0001, -3.0], "a": "<\"&'>\n", "e": {}, "l": []}"#
        );
        assert_eq!(
            said("(ensure_ascii=true, sort_keys=true, separators=(',', ':'))"),
            r#"{"a":"<\"&'>\n","e":{},"l":[],"\u00fc":[1,2.5,true,null,1e-05,1e+20,0.0001,-3.0]}"#
        );
        let indented = said("(indent=1)");
        assert!(indented.starts_with("{\n \"ü\": [\n  1,\n  2.5,\n"), "{indented}");
        assert!(indented.ends_with("\n \"e\": {},\n \"l\": []\n}"), "{indented}");
    }

    fn message() -> Message {
        let value = serde_json::json!({
            "ü": [1, 2.5, true, null, 1e-5, 1e20, 1e-4, -3.0], "a": "<\"&'>\n", "e": {}, "l": []
        });
        let mut message = Message::new(Role::User, "hi");
        message.fields.insert("value".into(), value);
        message
    }

    #[test]
    fn blocks_are_trimmed_and_loops_controlled() {
        let source = "\
  {% for i in range(9) %}
    {%- if i == 1 %}{% continue %}{% endif %}
    {% if i == 4 %}{% break %}{% endif %}
{{ i }};
  {% endfor %}
end\n";
        assert_eq!(render(source, &[]), "0;\n2;\n3;\nend");
    }

    #[test]
    fn python_is_spoken() {
        let source = "{{ none }} {{ true }} {{ ['a', 1.0] }} {{ none is iterable }} {{ 'A b'.lower().split(' ')[::-1] }}";
        assert_eq!(render(source, &[]), "None True ['a', 1.0] False ['b', 'a']");
        assert_eq!(render("{{ 'one \\\nline' }}\\\ntwo", &[]), "one line\\\ntwo");
        assert_eq!(
            render("{{ strftime_now('%d %b %Y') }}{{ bos_token }}{{ eos_token }}", &[]),
            "26 Jul 2024<s>"
        );
    }

    #[test]
    fn reasoning_has_the_name_that_templates_read() {
        let mut message = message();
        message.fields.insert("reasoning".into(), "hm".into());
        assert_eq!(
            render("{{ messages[0].reasoning_content }}{{ messages[0].thinking }}", &[message]),
            "hmhm"
        );
    }

    #[test]
    fn generations_are_marked_and_change_nothing() {
        let source = "{# {% generation %} #}{% for m in messages %}{% if m.role == 'assistant' %}A:
            {%- generation -%}
            {{ m.content }}.
            {%- endgeneration -%}
        |{% else %}U:{{ m.content }}|{% endif %}{% endfor %}";
        let messages = [Message::new(Role::User, "q"), Message::new(Role::Assistant, "é"), message()];
        let template = Template::new(source, None, None, 0).unwrap();
        let rendered = template.render(&messages, None, &Map::new(), false).unwrap();
        assert_eq!(rendered, "U:q|A:é.|U:hi|");
        assert_eq!(template.marked(&messages, None, &Map::new(), &rendered), Some(vec![(6, 9)]));
        let unmarked = Template::new("{{ messages }}", None, None, 0).unwrap();
        assert_eq!(unmarked.marked(&messages, None, &Map::new(), &rendered), None);
    }

    #[test]
    fn errors_give_the_reason() {
        let template = Template::new("{{ raise_exception('no ' ~ 'tools') }}", None, None, 0).unwrap();
        let error = template.render(&[], None, &Map::new(), false).unwrap_err();
        assert_eq!(error.to_string(), "the chat template cannot render the conversation: no tools");
        let error = Template::new("a\n{% if %}", None, None, 0).unwrap_err().to_string();
        assert!(error.starts_with("the chat template is not valid in line 2: "), "{error}");
    }

    #[test]
    fn developers_are_named_where_the_template_knows_the_word() {
        let messages = [Message::new(Role::Developer, "d"), Message::new(Role::System, "s")];
        let plain = "{% for m in messages %}{{ m.role }}:{{ m.content }} {% endfor %}";
        assert_eq!(render(plain, &messages), "system:d system:s ");
        let knows = "{% for m in messages %}{{ 'DEV' if m.role == \"developer\" else m.role }}:{{ m.content }} {% endfor %}";
        assert_eq!(render(knows, &messages), "DEV:d system:s ");
    }

    #[test]
    fn variables_of_a_row_win() {
        let template =
            Template::new("{{ bos_token }}{{ enable_thinking }}", Some("<s>".into()), None, 0).unwrap();
        let render =
            |extra: serde_json::Value| template.render(&[], None, extra.as_object().unwrap(), false).unwrap();
        assert_eq!(render(serde_json::json!({"enable_thinking": false})), "<s>False");
        assert_eq!(render(serde_json::json!({"bos_token": "B"})), "B");
    }
}
