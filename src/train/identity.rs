//! What decides the values of a run, part by part. A run goes on where each part that both sides know is the same, so that a
//! program with more keys or fields goes on with the runs of an older one.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor, value::MapAccessDeserializer};
use serde_json::{Map, Value};

/// The parts, each with its name.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize)]
pub struct Identity {
    /// A digest of the rows: tokens, labels and boundaries.
    pub data: String,
    /// A digest of the model's weights.
    pub weights: String,
    /// A digest of the teacher's weights; `None` without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<String>,
    /// The type that products are computed in; earlier versions wrote none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
    /// The keys of the model's configuration; earlier versions wrote none.
    pub config: Map<String, Value>,
    /// The keys of the resolved recipe, with their values as TOML; earlier versions wrote none.
    pub settings: BTreeMap<String, String>,
}

/// A part in which two runs differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Difference {
    /// The rows to train and to evaluate on.
    Data,
    /// The weights of the model.
    Weights,
    /// The teacher.
    Teacher,
    /// This key of the model's configuration: what it was and what it is.
    Config(String, String, String),
    /// This key of the recipe: what it was and what it is.
    Key(String, String, String),
}

impl Identity {
    /// The parts in which `now` is another run than this.
    #[must_use]
    pub fn differences(&self, now: &Self) -> Vec<Difference> {
        let whole = [
            (self.data != now.data, Difference::Data),
            (self.weights != now.weights, Difference::Weights),
            (self.teacher != now.teacher, Difference::Teacher),
        ];
        let mut found: Vec<Difference> =
            whole.into_iter().filter(|(differs, _)| *differs).map(|(_, part)| part).collect();
        if let (Some(then), Some(now)) = (&self.dtype, &now.dtype)
            && then != now
        {
            found.push(Difference::Key("model.dtype".to_string(), then.clone(), now.clone()));
        }
        for (key, then) in &self.config {
            if let Some(now) = now.config.get(key).filter(|now| *now != then) {
                found.push(Difference::Config(key.clone(), then.to_string(), now.to_string()));
            }
        }
        for (key, then) in &self.settings {
            if let Some(now) = now.settings.get(key).filter(|now| *now != then) {
                found.push(Difference::Key(key.clone(), then.clone(), now.clone()));
            }
        }
        found
    }

    /// Whether a run may go on as `now`.
    #[must_use]
    pub fn is_same(&self, now: &Self) -> bool {
        self.differences(now).is_empty()
    }

    /// Reads the words of earlier versions: `data`, `weights` and `teacher`, each with its digest behind it.
    fn of_words(text: &str) -> Self {
        let words: Vec<&str> = text.split(' ').collect();
        let part = |name: &str| {
            let at = words.iter().position(|word| *word == name)?;
            words.get(at + 1).map(ToString::to_string)
        };
        Self {
            data: part("data").unwrap_or_default(),
            weights: part("weights").unwrap_or_default(),
            teacher: part("teacher"),
            ..Self::default()
        }
    }

    /// Reads what is in the header of a file.
    pub(super) fn parse(text: &str) -> Option<Self> {
        if text.starts_with('{') { serde_json::from_str(text).ok() } else { Some(Self::of_words(text)) }
    }
}

impl<'de> Deserialize<'de> for Identity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Default, serde::Deserialize)]
        #[serde(default)]
        struct Parts {
            data: String,
            weights: String,
            teacher: Option<String>,
            dtype: Option<String>,
            config: Map<String, Value>,
            settings: BTreeMap<String, String>,
        }

        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = Identity;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the parts of a run's identity")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Identity, E> {
                Ok(Identity::of_words(text))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Identity, A::Error> {
                let Parts { data, weights, teacher, dtype, config, settings } =
                    Parts::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Identity { data, weights, teacher, dtype, config, settings })
            }
        }

        deserializer.deserialize_any(Either)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            data: "d".to_string(),
            weights: "w".to_string(),
            dtype: Some("bf16".to_string()),
            config: Map::from_iter([("rope_theta".to_string(), Value::from(10_000))]),
            settings: BTreeMap::from([("train.steps".to_string(), "5".to_string())]),
            ..Identity::default()
        }
    }

    #[test]
    fn parts_that_one_side_does_not_know_do_not_count() {
        let mut later = identity();
        later.settings.insert("train.new_key".to_string(), "1".to_string());
        later.config.insert("new_field".to_string(), Value::Bool(true));
        assert!(identity().is_same(&later) && later.is_same(&identity()));
        let words = "data d weights w settings 0123";
        let earlier: Identity = serde_json::from_value(Value::from(words)).unwrap();
        assert!(earlier.is_same(&identity()));
        assert_eq!(Identity::parse(words), Some(earlier));
        let text = serde_json::to_string(&identity()).unwrap();
        assert_eq!(Identity::parse(&text), Some(identity()));
    }

    #[test]
    fn every_part_that_both_know_counts() {
        let differences = |change: fn(&mut Identity)| {
            let mut later = identity();
            change(&mut later);
            identity().differences(&later)
        };
        assert_eq!(differences(|later| later.data.clear()), [Difference::Data]);
        assert_eq!(differences(|later| later.weights.clear()), [Difference::Weights]);
        assert_eq!(differences(|later| later.teacher = Some("t".to_string())), [Difference::Teacher]);
        let key = |key: &str, then: &str, now: &str| [Difference::Key(key.into(), then.into(), now.into())];
        let found = differences(|later| later.dtype = Some("f32".to_string()));
        assert_eq!(found, key("model.dtype", "bf16", "f32"));
        let found = differences(|later| later.config["rope_theta"] = Value::from(5));
        assert_eq!(found, [Difference::Config("rope_theta".into(), "10000".into(), "5".into())]);
        let found = differences(|later| drop(later.settings.insert("train.steps".into(), "6".into())));
        assert_eq!(found, key("train.steps", "5", "6"));
    }
}
