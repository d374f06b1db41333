//! The keys of recipes, as help, schema and conversions read them: names, meanings, what values may be, defaults.

use std::fmt;

use super::bounds::Bound;

/// A key of a recipe, as users are told of it.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// Its last part: `rank` of `adapter.rank`.
    pub name: &'static str,
    /// What it means.
    meaning: &'static [&'static str],
    pub(super) kind: fn() -> Kind,
    pub(super) bound: Bound,
    pub(super) default: Default,
    example: Option<&'static str>,
}

/// What a key is when it is left out.
#[derive(Debug, Clone, Copy)]
pub(super) enum Default {
    /// A value, as TOML.
    Value(fn() -> String),
    /// What happens then, in words.
    Words(&'static str),
    /// It cannot be left out.
    Required,
}

/// What a value may be.
#[derive(Debug, Clone)]
pub enum Kind {
    /// `true` or `false`.
    Flag,
    /// A whole number.
    Whole,
    /// A number.
    Number,
    /// A string.
    Text,
    /// One of these names.
    Names(&'static [&'static str]),
    /// A list of such values.
    List(Box<Self>),
    /// A table with these keys.
    Table(&'static [Key]),
    /// One of several kinds.
    OneOf(Vec<Self>),
    /// What these words say.
    Words(String),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag => f.write_str("`true` or `false`"),
            Self::Whole => f.write_str("a whole number"),
            Self::Number => f.write_str("a number"),
            Self::Text => f.write_str("a string"),
            Self::Names(names) => {
                let names: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
                f.write_str(&names.join(", "))
            }
            Self::List(inner) => write!(f, "a list, each {inner}"),
            Self::Table(keys) => {
                let names: Vec<&str> = keys.iter().map(|key| key.name).collect();
                write!(f, "a table with {}", names.join(", "))
            }
            Self::OneOf(kinds) => {
                let kinds: Vec<String> = kinds.iter().map(ToString::to_string).collect();
                f.write_str(&kinds.join(" or "))
            }
            Self::Words(words) => f.write_str(words),
        }
    }
}

/// A table of a recipe with its keys.
#[derive(Debug, Clone, Copy)]
pub struct Table {
    /// Its name; empty for the keys above all tables.
    pub name: &'static str,
    /// Its keys in the order of a resolved recipe.
    pub keys: &'static [Key],
}

impl Table {
    /// The whole name of one of its keys: `adapter.rank`.
    #[must_use]
    pub fn path(&self, key: &Key) -> String {
        if self.name.is_empty() { key.name.to_string() } else { format!("{}.{}", self.name, key.name) }
    }

    /// Whether it is an element of a list, and stands in the value of another key.
    pub(super) fn is_of_list(&self) -> bool {
        self.name.contains('.')
    }
}

impl Key {
    /// Whether its value is a table of its own.
    pub(super) fn is_table(&self) -> bool {
        matches!((self.kind)(), Kind::Table(_))
    }

    pub(super) const fn new(
        (name, meaning): (&'static str, &'static [&'static str]),
        kind: fn() -> Kind,
        bound: Bound,
        default: Default,
        example: Option<&'static str>,
    ) -> Self {
        Self { name, meaning, kind, bound, default, example }
    }

    /// What it means, in a sentence or two.
    #[must_use]
    pub fn meaning(&self) -> String {
        self.meaning.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ")
    }

    /// What its value is: the type and its bounds, in words.
    #[must_use]
    pub fn values(&self) -> String {
        match self.bound.words() {
            Some(words) => words,
            None => (self.kind)().to_string(),
        }
    }

    /// What happens when it is left out: a TOML value, or words.
    #[must_use]
    pub fn default(&self) -> String {
        match self.default {
            Default::Value(value) => value(),
            Default::Words(words) => words.to_string(),
            Default::Required => "must be given".to_string(),
        }
    }

    /// A value as it is written in TOML.
    #[must_use]
    pub fn example(&self) -> String {
        self.example.map_or_else(|| self.default(), str::to_string)
    }
}

/// The name of a key as it is written: `final`, which is `r#final` in Rust.
pub(super) const fn written_name(name: &'static str) -> &'static str {
    match name.as_bytes() {
        [b'r', b'#', rest @ ..] => match std::str::from_utf8(rest) {
            Ok(written) => written,
            Err(_) => name,
        },
        _ => name,
    }
}

/// A value as TOML.
pub(super) fn toml_of(value: &impl serde::Serialize) -> String {
    toml::Value::try_from(value).map_or_else(|_| String::new(), |value| value.to_string())
}

impl fmt::Display for Key {
    /// Five lines at most: the meaning, what it may be, what it is when left out, and an example.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  {}", self.meaning())?;
        writeln!(f, "  value    {}", self.values())?;
        writeln!(f, "  default  {}", self.default())?;
        write!(f, "  example  {} = {}", self.name, self.example())
    }
}

/// What a plan says of a table, as the table that says it.
pub(super) trait Written {
    /// The table.
    type Table;

    /// The keys that have a default; those that are resolved by hand are `None`.
    fn written(&self) -> Self::Table;
}
