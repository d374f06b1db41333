//! `tojson`: what Python's `json.dumps` writes, as templates of transformers get it.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{ErrorKind, Value};

use super::budget;

/// Columns of an indent.
const WIDEST: usize = 100;

/// `tojson` as transformers defines it: `json.dumps(value, ensure_ascii=False, indent=…)`.
pub(super) fn to_json(value: &Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent = options.get::<Option<usize>>("indent")?;
    if indent.is_some_and(|columns| columns > WIDEST) {
        let message = format!("`tojson` is to indent by more than {WIDEST} columns");
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, message));
    }
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
        // An indented value is paid for with its indent.
        budget::make(budget::size(value).saturating_add((self.indent.unwrap_or(0) * depth) as u64))?;
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
