//! What a value of a recipe may be, asked of its type.

use std::fmt;

use serde::de::{self, Deserialize, DeserializeSeed, Deserializer, Expected, SeqAccess, Unexpected, Visitor};

use super::keys::Kind;

/// Finds what values a type is read from: the type asks a deserializer for them.
pub(super) fn kind_of<'de, T: Deserialize<'de>>() -> Kind {
    match T::deserialize(Probe) {
        Err(Asked(kind)) => kind,
        Ok(_) => Kind::Words("anything".to_string()),
    }
}

/// Answers every question with the kind that was asked for, as an error.
struct Probe;

/// The kind that a type asked for.
#[derive(Debug)]
struct Asked(Kind);

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Asked {}

impl de::Error for Asked {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(Kind::Words(message.to_string()))
    }

    fn invalid_type(_: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self(Kind::Words(expected.to_string()))
    }
}

macro_rules! asks {
    ($($method:ident => $kind:expr;)*) => {
        $(
            fn $method<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Asked> {
                Err(Asked($kind))
            }
        )*
    };
}

impl<'de> Deserializer<'de> for Probe {
    type Error = Asked;

    asks! {
        deserialize_bool => Kind::Flag;
        deserialize_u64 => Kind::Whole;
        deserialize_f64 => Kind::Number;
        deserialize_str => Kind::Text;
        deserialize_string => Kind::Text;
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Asked> {
        Err(<Asked as de::Error>::invalid_type(Unexpected::Unit, &visitor))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Asked> {
        visitor.visit_some(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        names: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Asked> {
        Err(Asked(Kind::Names(names)))
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Asked> {
        visitor.visit_seq(Elements)
    }

    serde::forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u8 u16 u32 u128 f32 char bytes byte_buf unit unit_struct newtype_struct tuple
        tuple_struct map struct identifier ignored_any
    }
}

/// A list of one element, which is asked for its kind.
struct Elements;

impl<'de> SeqAccess<'de> for Elements {
    type Error = Asked;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Asked> {
        match seed.deserialize(Probe) {
            Err(Asked(kind)) => Err(Asked(Kind::List(Box::new(kind)))),
            Ok(value) => Ok(Some(value)),
        }
    }
}
