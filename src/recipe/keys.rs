//! The keys of recipes, each written down once.
//!
//! One list of [`keys!`] makes three things of a table: the struct of what was written, the struct of what will happen, and the
//! [`Key`]s that help, schema and conversions read. What a value may be is asked of its type.

use std::fmt;

use super::bounds::Bound;
use super::kind::Kind;

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
}

impl Table {
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
        match (self.example, self.default) {
            (Some(example), _) => example.to_string(),
            (None, _) => self.default(),
        }
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

/// Declares the keys of a table.
///
/// | a key | in what was written | in the plan |
/// |---|---|---|
/// | `name: type [bound] = value;` | may be left out | has `value` then |
/// | `name: type [bound] => "words", "example";` | may be left out | is resolved by hand; `words` say what happens then |
/// | `name: type, "example";` | must be given | is there |
///
/// The doc comment of a key is its meaning. `of_keys` fills in the defaults, given the further fields of the plan, and
/// [`Written`] goes back.
macro_rules! keys {
    (
        table $table:literal like $like:literal;
        $(#[$written_meta:meta])*
        written $written_vis:vis struct $written:ident;
        $(#[$planned_meta:meta])*
        planned $planned_vis:vis struct $planned:ident { $($extra:tt)* }
        $($keys:tt)*
    ) => {
        keys! {
            @each
            [$table] [$like] [$(#[$written_meta])* $written_vis $written]
            [$(#[$planned_meta])* $planned_vis $planned { $($extra)* }]
            [] [] [] []
            $($keys)*
        }
    };
    // `name: type [bound] = value;`
    (
        @each $table:tt $like:tt $written:tt $planned:tt [$($all:tt)*] [$($defaulted:tt)*] $required:tt $others:tt
        $(#[doc = $doc:literal])+
        $name:ident: $type:ty $([$bound:expr])? = $default:expr $(, $example:literal)?;
        $($rest:tt)*
    ) => {
        keys! {
            @each $table $like $written $planned
            [
                $($all)*
                {
                    [$($doc)+] $name (Option<$type>) ($type) optional [$($bound)?]
                    [$crate::recipe::keys::Default::Value(|| {
                        let value: $type = $default;
                        $crate::recipe::keys::toml_of(&value)
                    })]
                    [$($example)?]
                }
            ]
            [$($defaulted)* { [$($doc)+] $name ($type) ($default) }]
            $required $others
            $($rest)*
        }
    };
    // `name: type [bound] => "words", "example";`
    (
        @each $table:tt $like:tt $written:tt $planned:tt [$($all:tt)*] $defaulted:tt $required:tt [$($others:tt)*]
        $(#[doc = $doc:literal])+
        $name:ident: $type:ty $([$bound:expr])? => $words:literal, $example:literal;
        $($rest:tt)*
    ) => {
        keys! {
            @each $table $like $written $planned
            [
                $($all)*
                {
                    [$($doc)+] $name (Option<$type>) ($type) optional [$($bound)?]
                    [$crate::recipe::keys::Default::Words($words)] [$example]
                }
            ]
            $defaulted $required [$($others)* $name]
            $($rest)*
        }
    };
    // `name: type, "example";`
    (
        @each $table:tt $like:tt $written:tt $planned:tt [$($all:tt)*] $defaulted:tt [$($required:tt)*] $others:tt
        $(#[doc = $doc:literal])+
        $name:ident: $type:ty, $example:literal;
        $($rest:tt)*
    ) => {
        keys! {
            @each $table $like $written $planned
            [
                $($all)*
                {
                    [$($doc)+] $name ($type) ($type) required []
                    [$crate::recipe::keys::Default::Required] [$example]
                }
            ]
            $defaulted [$($required)* { [$($doc)+] $name ($type) }] $others
            $($rest)*
        }
    };
    (
        @each [$table:literal] [$like:literal] [$(#[$written_meta:meta])* $written_vis:vis $written:ident]
        [
            $(#[$planned_meta:meta])* $planned_vis:vis $planned:ident {
                $($(#[doc = $extra_doc:literal])+ $extra:ident: $extra_type:ty,)*
            }
        ]
        [$({
            [$($doc:literal)+] $name:ident ($written_type:ty) ($type:ty) $read:ident [$($bound:expr)?] [$shown:expr]
            [$($example:literal)?]
        })*]
        [$({ [$($default_doc:literal)+] $defaulted:ident ($default_type:ty) ($default:expr) })*]
        [$({ [$($required_doc:literal)+] $required:ident ($required_type:ty) })*]
        [$($other:ident)*]
    ) => {
        $(#[$written_meta])*
        #[derive(Debug, Clone, PartialEq, serde::Serialize)]
        $written_vis struct $written {
            $($(#[doc = $doc])+ $written_vis $name: $written_type,)*
        }

        $(#[$planned_meta])*
        #[derive(Debug, Clone, PartialEq)]
        $planned_vis struct $planned {
            $($(#[doc = $required_doc])+ $planned_vis $required: $required_type,)*
            $($(#[doc = $default_doc])+ $planned_vis $defaulted: $default_type,)*
            $($(#[doc = $extra_doc])+ $planned_vis $extra: $extra_type,)*
        }

        impl $written {
            /// The table with its keys.
            pub(super) const TABLE: $crate::recipe::keys::Table = $crate::recipe::keys::Table {
                name: $table,
                keys: &[$(
                    $crate::recipe::keys::Key::new(
                        (stringify!($name), &[$($doc),+]),
                        <$type as $crate::recipe::reading::KeyValue>::kind,
                        keys!(@bound $($bound)?),
                        $shown,
                        keys!(@example $($example)?),
                    ),
                )*],
            };
        }

        impl $crate::recipe::reading::KeyValue for $written {
            fn read(
                node: &$crate::recipe::document::Node,
                faults: &mut $crate::recipe::reading::Faults,
            ) -> Option<Self> {
                let entries = $crate::recipe::reading::Entries::of(node, $like, Self::TABLE.keys, faults)?;
                $(let $name = entries.$read(stringify!($name), keys!(@bound $($bound)?), faults);)*
                Some(Self { $($name: $name?,)* })
            }

            fn kind() -> $crate::recipe::kind::Kind {
                $crate::recipe::kind::Kind::Table(Self::TABLE.keys)
            }
        }

        impl $planned {
            /// Fills in the defaults.
            fn of_keys(recipe: &$written, $($extra: $extra_type),*) -> Self {
                Self {
                    $($required: Clone::clone(&recipe.$required),)*
                    $($defaulted: Option::unwrap_or_else(Clone::clone(&recipe.$defaulted), || $default),)*
                    $($extra,)*
                }
            }
        }

        impl $crate::recipe::keys::Written for $planned {
            type Table = $written;

            fn written(&self) -> $written {
                $written {
                    $($required: Clone::clone(&self.$required),)*
                    $($defaulted: Some(Clone::clone(&self.$defaulted)),)*
                    $($other: None,)*
                }
            }
        }
    };
    (@bound) => { $crate::recipe::bounds::Bound::None };
    (@bound $bound:expr) => { $bound };
    (@example) => { None };
    (@example $example:literal) => { Some($example) };
}
pub(super) use keys;
