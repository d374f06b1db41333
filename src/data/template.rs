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

use self::compiled::Compiled;
use super::conversation::{Message, REASONING, Role};
use crate::error::{Error, Result};

mod budget;
mod builtins;
mod compiled;
mod json;
mod source;

/// So many messages are tried one after the other to find one that a template refuses.
const LOOKED_AT_ONE_BY_ONE: usize = 32;

/// Characters of a message that a template raises.
const LONGEST_MESSAGE: usize = 1000;

/// Marks an error that the template itself raised.
#[derive(Debug, thiserror::Error)]
#[error("raised by the template")]
struct Raised;

/// Private-use characters that stand around what `{% generation %}` encloses.
const MARKS: [char; 2] = ['\u{10FF00}', '\u{10FF01}'];

#[cfg(test)]
thread_local! {
    /// Counts the messages that this thread has rendered.
    pub(super) static RENDERED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Holds the variables that templates get in addition to the conversation.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Variables {
    /// The function `strftime_now` formats this time, which is in seconds since 1970 (UTC).
    pub(crate) now: i64,
    /// Further variables by name, handed over as they are.
    pub(crate) others: serde_json::Map<String, serde_json::Value>,
}

/// A compiled chat template.
#[derive(Debug)]
pub(crate) struct Template {
    environment: Environment<'static>,
    compiled: Compiled,
    bos_token: Option<String>,
    eos_token: Option<String>,
    variables: Variables,
    /// Whether the template ends with the beginning of an answer when asked to.
    pub(crate) prompts: bool,
    marks: bool,
    /// Whether the role `developer` means something to the template.
    knows_developer: bool,
    source: String,
}

impl Template {
    /// Compiles `source`.
    pub(crate) fn new(
        source: &str,
        bos_token: Option<String>,
        eos_token: Option<String>,
        variables: Variables,
    ) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let syntax = syntax.expect("the default delimiters are valid");
        builtins::add_to(&mut environment);
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
        environment.add_function("raise_exception", |message: &Value| -> Result<Value, minijinja::Error> {
            budget::look_at(message)?;
            let message: String = message.to_string().chars().take(LONGEST_MESSAGE).collect();
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message).with_source(Raised))
        });
        environment.add_filter("datetimeformat", minijinja_contrib::filters::datetimeformat);
        let now = variables.now;
        environment.add_function("strftime_now", move |state: &mut State, format: String| {
            if format.len() > LONGEST_MESSAGE {
                return Err(minijinja::Error::new(
                    ErrorKind::InvalidOperation,
                    "the format of a date is too long",
                ));
            }
            let format = Kwargs::from_iter([("format", Value::from(format))]);
            state.apply_filter("datetimeformat", &[Value::from(now), Value::from(format)])
        });

        source::refuse_unbounded(source, &syntax)?;
        let (source, marks) = source::translate(source);
        let compiled = Compiled::new(&source, syntax).map_err(|error| {
            let line = error.line().map_or(String::new(), |line| format!(" in line {line}"));
            Error::invalid(format!("the chat template is not valid{line}: {}", reason(&error)))
        })?;
        let prompts = compiled.asks_for("add_generation_prompt");
        let knows_developer = ["'developer'", "\"developer\""].iter().any(|word| source.contains(word));
        Ok(Self {
            environment,
            compiled,
            bos_token,
            eos_token,
            variables,
            prompts,
            marks,
            knows_developer,
            source,
        })
    }

    /// Whether the source has this word, so that a template without it cannot read a key of this name.
    pub(crate) fn mentions(&self, word: &str) -> bool {
        self.source.contains(word)
    }

    /// Whether the template reads a variable, or calls a function, of this name.
    pub(crate) fn asks_for(&self, name: &str) -> bool {
        self.compiled.asks_for(name)
    }

    /// What the model reads for these messages.
    pub(crate) fn render(
        &self,
        messages: &[Message],
        tools: Option<&serde_json::Value>,
        extra: &Map<String, serde_json::Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        self.run(messages, tools, extra, add_generation_prompt, false).map_err(|error| {
            if std::error::Error::source(&error).is_some_and(|source| source.is::<Raised>()) {
                return self.refusal(messages, tools, extra, &reason(&error));
            }
            let what = match error.kind() {
                ErrorKind::OutOfFuel => "it takes too many steps".to_string(),
                _ => reason(&error),
            };
            Error::invalid(format!("the chat template cannot render the conversation: {what}"))
        })
    }

    /// Renders these messages; `None` if the template refuses them.
    pub(crate) fn tried(
        &self,
        messages: &[Message],
        tools: Option<&serde_json::Value>,
        extra: &Map<String, serde_json::Value>,
        add_generation_prompt: bool,
    ) -> Option<String> {
        self.run(messages, tools, extra, add_generation_prompt, false).ok()
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
    ) -> Result<String, minijinja::Error> {
        #[cfg(test)]
        RENDERED.set(RENDERED.get() + messages.len());
        let others = self.variables.others.iter();
        let mut variables: Vec<(&str, Value)> =
            others.map(|(name, value)| (name.as_str(), json_value(value))).collect();
        variables.extend([
            (
                "messages",
                messages.iter().map(|message| message_value(message, self.knows_developer)).collect(),
            ),
            ("add_generation_prompt", add_generation_prompt.into()),
            ("tools", tools.map_or(Value::from(()), json_value)),
            ("documents", Value::from(())),
            ("mark_generation", mark_generation.into()),
        ]);
        for (name, token) in [("bos_token", &self.bos_token), ("eos_token", &self.eos_token)] {
            if let Some(token) = token {
                variables.push((name, token.as_str().into()));
            }
        }
        // As in Python, where keyword arguments win over special tokens.
        variables.retain(|(name, _)| !extra.contains_key(*name));
        variables.extend(extra.iter().map(|(name, value)| (name.as_str(), json_value(value))));
        let of_row = extra.values().map(json_size).sum::<usize>() + tools.map_or(0, json_size);
        let bytes = messages.iter().map(message_size).sum::<usize>() + of_row;
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(budget::begin(messages.len(), bytes)));
        self.compiled.render(&environment, Value::from_pairs(variables))
    }

    /// Finds the first message that the template refuses, and returns an error with the template's reason.
    fn refusal(
        &self,
        messages: &[Message],
        tools: Option<&serde_json::Value>,
        extra: &Map<String, serde_json::Value>,
        said: &str,
    ) -> Error {
        let count = messages.len();
        let is_refused = |n: &usize| self.run(&messages[..*n], tools, extra, false, false).is_err();
        // A beginning that holds a refused message is refused as well: among many, it is found by halves.
        let mut refused = (1..count.min(LOOKED_AT_ONE_BY_ONE)).find(is_refused).unwrap_or(count);
        let mut taken = count.min(LOOKED_AT_ONE_BY_ONE).saturating_sub(1);
        while refused.saturating_sub(taken) > 1 {
            let middle = taken.midpoint(refused);
            *if is_refused(&middle) { &mut refused } else { &mut taken } = middle;
        }
        let Some(message) = refused.checked_sub(1).and_then(|i| messages.get(i)) else {
            return Error::invalid(format!(
                "the chat template refuses a conversation without messages: {said}"
            ));
        };
        let role = message.role.name();
        Error::invalid(format!("the chat template refuses message {refused} of {count} (role `{role}`): {said}"))
            .with_hint("change or leave out that message, or give the model a template that takes it: a `chat_template.jinja` in its folder")
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
    let reasoning =
        REASONING.iter().find_map(|key| message.fields.get(*key).filter(|value| !value.is_null()));
    if let Some(reasoning) = reasoning {
        pairs.push((Value::from("reasoning_content"), json_value(reasoning)));
        if !message.fields.contains_key("thinking") {
            pairs.push((Value::from("thinking"), json_value(reasoning)));
        }
    }
    Value::from_pairs(pairs)
}

/// About the bytes of what a message says.
fn message_size(message: &Message) -> usize {
    message.content.as_deref().map_or(0, str::len)
        + message.fields.iter().map(|(key, value)| key.len() + json_size(value)).sum::<usize>()
}

fn json_size(value: &serde_json::Value) -> usize {
    use serde_json::Value as Json;
    match value {
        Json::String(text) => text.len(),
        Json::Array(list) => list.iter().map(json_size).sum(),
        Json::Object(map) => map.iter().map(|(key, value)| key.len() + json_size(value)).sum(),
        Json::Null | Json::Bool(_) | Json::Number(_) => 8,
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn at(now: i64) -> Variables {
        Variables { now, ..Variables::default() }
    }

    fn render(source: &str, messages: &[Message]) -> String {
        let template = Template::new(source, Some("<s>".into()), None, at(1_722_000_000)).unwrap();
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
        let template = Template::new(source, None, None, at(0)).unwrap();
        let rendered = template.render(&messages, None, &Map::new(), false).unwrap();
        assert_eq!(rendered, "U:q|A:é.|U:hi|");
        assert_eq!(template.marked(&messages, None, &Map::new(), &rendered), Some(vec![(6, 9)]));
        let unmarked = Template::new("{{ messages }}", None, None, at(0)).unwrap();
        assert_eq!(unmarked.marked(&messages, None, &Map::new(), &rendered), None);
    }

    #[test]
    fn errors_give_the_reason() {
        let template = Template::new("{{ raise_exception('no ' ~ 'tools') }}", None, None, at(0)).unwrap();
        let error = template.render(&[], None, &Map::new(), false).unwrap_err();
        assert_eq!(error.to_string(), "the chat template refuses a conversation without messages: no tools");
        let source = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no ' ~ m.role) }}{% endif %}{% endfor %}";
        let messages =
            [Message::new(Role::User, "q"), Message::new(Role::Tool, "3"), Message::new(Role::User, "q")];
        let error = Template::new(source, None, None, at(0))
            .unwrap()
            .render(&messages, None, &Map::new(), false)
            .unwrap_err();
        assert_eq!(error.to_string(), "the chat template refuses message 2 of 3 (role `tool`): no tool");
        let error = Template::new("a\n{% if %}", None, None, at(0)).unwrap_err().to_string();
        assert!(error.starts_with("the chat template is not valid in line 2: "), "{error}");
    }

    /// Each of these took minutes, gigabytes or the stack.
    #[test]
    fn untrusted_templates_end_with_a_message() {
        let deep = |text: &str, count: usize, end: &str| text.repeat(count) + end;
        let doubled = |step: &str| {
            format!("{{% set ns = namespace(s='ab', l=[1]) %}}{{% for i in range(60) %}}{step}{{% endfor %}}")
        };
        let long = |step: &str| {
            format!(
                "{{% set n = 9000000 %}}{{% set ns = namespace(s='ab' * n, l=[]) %}}{{% for i in range(100000) %}}{{% for j in range(100) %}}{step}{{% endfor %}}{{% endfor %}}"
            )
        };
        let attacks = [
            "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}".to_string(),
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}".to_string(),
            doubled("{% set ns.s = ns.s + ns.s %}"),
            doubled("{% set ns.s = ns.s ~ ns.s %}"),
            doubled("{% set ns.s = ns.s * 2 %}"),
            doubled("{% set ns.s = ns.s.replace('a', 'aa').replace('b', 'bb') %}"),
            doubled("{% set ns.s = ns.s|replace('a', ns.s) %}"),
            doubled("{% set ns.s = [ns.s, ns.s]|join %}"),
            doubled("{% set ns.s = ns.s.join([ns.s, ns.s]) %}"),
            doubled("{% set ns.s = '{}{}'.format(ns.s, ns.s) %}"),
            doubled("{% set ns.s = '%s%s'|format(ns.s, ns.s) %}"),
            doubled("{% set ns.s = [ns.s, ns.s]|tojson %}"),
            doubled("{% set ns.s = [ns.s, ns.s]|string %}"),
            doubled("{% set ns.s = [ns.s, ns.s] ~ '' %}"),
            doubled("{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}"),
            doubled("{% set ns.l = ns.l + ns.l %}"),
            doubled("{% set ns.l = ns.l * 2 %}"),
            doubled("{% set ns.l = [ns.l, ns.l] %}{{ ns.l == ns.l }}"),
            doubled("{% set ns.l = {'a': ns.l, 'b': ns.l} %}"),
            doubled("{% set ns.l = dict(a=ns.l, b=ns.l) %}"),
            doubled("{% set ns.l = (ns.l, ns.l) %}"),
            doubled("{% set ns.l = ns.l|chain(ns.l) %}"),
            "{{ [1]|slice(1000000000) }}".to_string(),
            "{{ [1]|batch(1000000000, 0) }}".to_string(),
            "{{ [1]|batch(linecount=1000000000, fill_with=0) }}".to_string(),
            "{{ 'x' * 10**10 }}".to_string(),
            "{{ 'x' * 99999999 }}".to_string(),
            "{{ (1, 2) * 99999999 }}".to_string(),
            "{{ [1] * 99999999 }}".to_string(),
            "{% set n = 99999999 %}{{ ('x' * n) ~ ('x' * n) }}{{ (1, 2) * n }}".to_string(),
            "{% set n = 99999999 %}{{ [1] * n }}".to_string(),
            "{{ 'a\nb'|indent(99999999999) }}".to_string(),
            "{{ 'a\nb'|indent(width=999999999) }}".to_string(),
            "{{ '%999999999d'|format(1) }}".to_string(),
            "{{ '{:>999999999}'.format(1) }}".to_string(),
            "{{ messages|tojson(indent=18446744073709551615) }}".to_string(),
            "{{ messages|tojson(indent=1000000) }}".to_string(),
            deep("{{ ", 1, &deep("-", 50_000, "1 }}")),
            deep("{{ x", 1, &deep(".a", 50_000, " }}")),
            deep("{{ x", 1, &deep("|upper", 40_000, " }}")),
            deep("{{ 1", 1, &deep(" + 1", 50_000, " }}")),
            deep("{{ 1", 1, &deep(" + x", 50_000, " }}")),
            deep("{{ x", 1, &deep("[0]", 50_000, " }}")),
            deep("{{ x", 1, &deep("()", 50_000, " }}")),
            deep("{{ ", 1, &deep("not ", 50_000, "x }}")),
            deep("{{ x", 1, &deep(" is defined", 20_000, " }}")),
            deep("{{ x", 1, &deep(" if x else x", 20_000, " }}")),
            deep("{{ x", 1, &deep(" == x", 50_000, " }}")),
            deep("{% if x %}", 1, &deep("{% elif x %}", 20_000, "{% endif %}")),
            deep("{% if x %}", 20_000, &deep("{% endif %}", 20_000, "")),
            deep("[", 1, "") + &deep("{{ [", 1, &deep("[", 20_000, "")),
            "x".repeat(5_000_000),
            "{% set ns = namespace(l=[]) %}{% for i in range(100000) %}{% set ns.l = [ns.l] %}{% endfor %}".to_string(),
            "{% set ns = namespace(l=[]) %}{% for i in range(100000) %}{% set ns.l = ns.l[0:] %}{% endfor %}{{ raise_exception('held') }}".to_string(),
            "{% set ns = namespace(l=[]) %}{% for i in range(100000) %}{% set ns.l = ns.l|batch(1)|list %}{% endfor %}{{ raise_exception('held') }}".to_string(),
            "{% set ns = namespace(l=[]) %}{% for i in range(100000) %}{% set ns.l = ns.l|map('upper') %}{% endfor %}{{ raise_exception('held') }}".to_string(),
            "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}".to_string(),
            "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns }}".to_string(),
            "{% set ns = namespace() %}{% for i in range(100000) %}{% set ns = namespace(a=ns) %}{% endfor %}".to_string(),
            long("{{ ns.s|length }}"),
            long("{% if ns.s|upper == 'x' %}{% endif %}"),
            long("{% if 'no' in ns.s %}{% endif %}"),
            long("{% if ns.s == ns.s + '' %}{% endif %}"),
            long("{% if ns.s[-1] == 'x' %}{% endif %}"),
            long("{% if ns.s[1:] == 'x' %}{% endif %}"),
            long("{% if ns.s.startswith('no') %}{% endif %}"),
            long("{% if ns.s is upper %}{% endif %}"),
            long("{% for c in ns.s %}{% break %}{% endfor %}"),
            long("{% if 1 < ns.s|length < 2 %}{% endif %}"),
            "{% block a %}{{ self.a() }}{% endblock %}".to_string(),
            "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}".to_string(),
            "{% include 'chat_template' %}".to_string(),
            "{{ strftime_now('%999999999Y') }}{{ raise_exception('no') }}".to_string(),
            format!("{{{{ strftime_now('{}') }}}}", "%A".repeat(2000)),
            "{% macro f() %}{{ caller() }}{% endmacro %}{% macro g() %}{% call f() %}{{ g() }}{% endcall %}{% endmacro %}{{ g() }}".to_string(),
            format!("{{% for i in range(100000) %}}{{% set x %}}{{% for j in range(50) %}}{}{{% endfor %}}{{% endset %}}{{% endfor %}}", "text ".repeat(4000)),
            format!("{{% for i in range(100000) %}}{{% for j in range(50) %}}{}{{% endfor %}}{{% endfor %}}", "text ".repeat(4000)),
            format!("{{% set a %}}{}{{% endset %}}{{% for i in range(100000) %}}{{% for j in range(50) %}}{{{{ a }}}}{{% endfor %}}{{% endfor %}}", "text ".repeat(4000)),
        ];
        let messages = [Message::new(Role::User, "q"), message()];
        for source in attacks {
            let start = std::time::Instant::now();
            let ended = Template::new(&source, None, None, at(0))
                .and_then(|template| template.render(&messages, None, &Map::new(), false));
            let error = ended.err().map(|error| error.to_string());
            let shown: String = source.chars().take(110).collect();
            assert!(error.is_some_and(|error| error.starts_with("the chat template ")), "{shown}");
            assert!(start.elapsed().as_secs() < 10, "{shown}");
        }
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
            Template::new("{{ bos_token }}{{ enable_thinking }}", Some("<s>".into()), None, at(0)).unwrap();
        let render =
            |extra: serde_json::Value| template.render(&[], None, extra.as_object().unwrap(), false).unwrap();
        assert_eq!(render(serde_json::json!({"enable_thinking": false})), "<s>False");
        assert_eq!(render(serde_json::json!({"bos_token": "B"})), "B");
    }
}
