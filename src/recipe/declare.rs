//! The list that declares the keys of a table, each written down once.
//!
//! One list of [`keys!`] makes three things of a table: the struct of what was written, the struct of what will happen, and the
//! [`Key`](super::keys::Key)s that users are told of. What a value may be is asked of its type.

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
                        ($crate::recipe::keys::written_name(stringify!($name)), &[$($doc),+]),
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
                $(let $name = entries.$read(
                    $crate::recipe::keys::written_name(stringify!($name)),
                    keys!(@bound $($bound)?), faults);)*
                Some(Self { $($name: $name?,)* })
            }

            fn kind() -> $crate::recipe::keys::Kind {
                $crate::recipe::keys::Kind::Table(Self::TABLE.keys)
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
