//! Rotary embedding as `config.json` says it: `rope_parameters` since transformers 5, before that `rope_theta` and
//! `rope_scaling`. Where a file has several of them, the one that counts is the one that transformers 5 takes.

use serde_json::{Map, Value};

use super::fields::{Defaults, Fields, bounded, number, unsupported, wrong};
use crate::error::{Error, Result, first_lines};
use crate::model::config::{RotaryConfig, RotaryScaling};

const KNOWN: [&str; 3] = ["default", "linear", "llama3"];

/// The largest base that frequencies are computed from; known models have up to 1e11.
const LARGEST_THETA: f64 = 1e15;

/// The largest factor that frequencies are divided by.
const LARGEST_FACTOR: f64 = 1e6;

/// The table that counts, and its name: `rope_scaling` takes the place of `rope_parameters` unless it is empty.
fn table(map: &Map<String, Value>) -> (&'static str, Option<&Value>) {
    let field = |name: &str| map.get(name).filter(|value| !value.is_null());
    match field("rope_scaling").filter(|value| value.as_object().is_none_or(|table| !table.is_empty())) {
        Some(scaling) => ("rope_scaling", Some(scaling)),
        None => ("rope_parameters", field("rope_parameters")),
    }
}

impl Fields<'_> {
    /// Base, stretching and share of the rotation; nothing of the file is passed over that would change them.
    pub(super) fn rotary(
        &self,
        max_position_embeddings: usize,
        head_dim: usize,
        defaults: &Defaults,
    ) -> Result<RotaryConfig> {
        let (field, value) = table(self.map);
        let empty = Map::new();
        let scaling = match value {
            None => &empty,
            Some(Value::Object(map)) => map,
            Some(other) => return Err(wrong(field, "a table", other)),
        };
        if let Some(nested) = scaling.values().find(|value| value.is_object()) {
            return Err(wrong(field, "one set of values for all layers", nested));
        }
        let entry = |name: &str| scaling.get(name).filter(|value| !value.is_null());
        let required = |name: &str| {
            number(entry(name), &format!("{field}.{name}"))?
                .ok_or_else(|| Error::invalid(format!("`{field}.{name}` is missing")))
        };
        let factor = || {
            required("factor")?;
            let factor = bounded(entry("factor"), &format!("{field}.factor"), 1e-6, LARGEST_FACTOR)?;
            Ok::<_, Error>(factor.unwrap_or(1.0))
        };
        let scaling = match entry("rope_type").or_else(|| entry("type")) {
            None => RotaryScaling::None,
            Some(kind) => match kind.as_str() {
                Some("default") => RotaryScaling::None,
                Some("linear") => RotaryScaling::Linear { factor: factor()? },
                Some("llama3") => {
                    let (low, high) = (required("low_freq_factor")?, required("high_freq_factor")?);
                    if low >= high {
                        return Err(Error::invalid(format!(
                            "`{field}.low_freq_factor` is {low} and `{field}.high_freq_factor` {high}, expected the \
                             second to be larger"
                        )));
                    }
                    let original = match self.get("original_max_position_embeddings") {
                        Some(value) => number(Some(value), "original_max_position_embeddings")?,
                        None => number(entry("original_max_position_embeddings"), field)?,
                    };
                    RotaryScaling::Llama3 {
                        factor: factor()?,
                        low_freq_factor: low,
                        high_freq_factor: high,
                        original_length: original.unwrap_or(max_position_embeddings as f64),
                    }
                }
                _ => return Err(unsupported(&format!("{field}.rope_type"), kind, &KNOWN)),
            },
        };
        let theta = entry("rope_theta").or_else(|| self.get("rope_theta"));
        let theta = bounded(theta, "rope_theta", 1.0, LARGEST_THETA)?.unwrap_or(defaults.theta);
        if theta == 1.0 {
            return Err(Error::invalid(
                "`rope_theta` is 1, expected more: all frequencies would be the same",
            ));
        }
        let share = self.rotated_share(entry("partial_rotary_factor"), head_dim, defaults)?;
        Ok(RotaryConfig { theta, scaling, share })
    }

    /// The share of a head that is rotated; `inner`, the value among the rope parameters, is the one that counts.
    fn rotated_share(&self, inner: Option<&Value>, head_dim: usize, defaults: &Defaults) -> Result<f64> {
        let mut share = defaults.rotary_share.unwrap_or(1.0);
        for value in [self.get("partial_rotary_factor"), inner].into_iter().flatten() {
            let rotates = |share: f64| share < 1.0 && head_dim as f64 * share >= 2.0;
            share = match value.as_f64() {
                Some(found) if found == 1.0 => found,
                Some(found) if defaults.rotary_share.is_some() && rotates(found) => found,
                _ if defaults.rotary_share.is_some() => {
                    let expected = format!("at most 1, and at least two of the {head_dim} columns of a head");
                    return Err(wrong("partial_rotary_factor", &expected, value));
                }
                _ => return Err(wrong("partial_rotary_factor", "1, the only value supported", value)),
            };
        }
        Ok(share)
    }
}

/// Warns of rotary settings that the file states twice with different values, and of those that have no effect.
pub(super) fn warnings(config: &Value) -> Vec<String> {
    let Some(map) = config.as_object() else { return Vec::new() };
    let (field, table) = table(map);
    let empty = Map::new();
    let table = table.and_then(Value::as_object).unwrap_or(&empty);
    let mut warnings = Vec::new();
    let parameters = map.get("rope_parameters").and_then(Value::as_object);
    if let Some(parameters) = parameters.filter(|parameters| field == "rope_scaling" && *parameters != table)
    {
        let (scaling, parameters) = (shown(table), shown(parameters));
        warnings.push(format!(
            "`config.json` has `rope_scaling` {scaling} and `rope_parameters` {parameters}: the first counts, as in transformers 5"
        ));
    }
    let kinds = (table.get("rope_type"), table.get("type"));
    if let (Some(kind), Some(other)) = kinds
        && kind != other
    {
        warnings.push(format!(
            "`{field}.rope_type` is {kind} and `{field}.type` {other}: the first counts, as in transformers 5"
        ));
    }
    for name in ["rope_theta", "partial_rotary_factor"] {
        let values = (table.get(name).filter(|inner| !inner.is_null()), map.get(name));
        if let (Some(inner), Some(outer)) = values
            && !outer.is_null()
            && inner.as_f64() != outer.as_f64()
        {
            warnings.push(format!(
                "`{field}.{name}` is {inner} and `{name}` {outer}: the first counts, as in transformers 5"
            ));
        }
    }
    let used: &[&str] = match table.get("rope_type").or_else(|| table.get("type")).and_then(Value::as_str) {
        Some("linear") => &["factor"],
        Some("llama3") => {
            &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
        }
        _ => &[],
    };
    let always = ["rope_type", "type", "rope_theta", "partial_rotary_factor"];
    let is_unused = |name: &str| !used.contains(&name) && !always.contains(&name);
    let unused = table.iter().filter(|(name, value)| !value.is_null() && is_unused(name));
    let unused = unused.map(|(name, value)| {
        format!("`{field}.{name}` is {value}, which this type of rotary embedding does not use")
    });
    warnings.extend(first_lines(unused.collect(), &format!("keys of `{field}` that are not used")));
    warnings
}

fn shown(table: &Map<String, Value>) -> String {
    let text: String = Value::Object(table.clone()).to_string().chars().take(200).collect();
    format!("`{text}`")
}
