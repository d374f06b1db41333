//! Numbers as recipes may say them: each function reads one optional number and refuses what lies outside.

use serde::de::{Deserialize, Deserializer, Error, Unexpected};

/// Seeds and sizes end where TOML's whole numbers do, so that every plan can be written down.
const LARGEST: u64 = i64::MAX as u64;

/// Steps of a run, and how many of them may lie between two events: more than a machine takes in its life.
pub(super) const STEPS: u64 = 1 << 40;
/// Documents of a batch, batches of a step: each is in memory, or in a list that is.
pub(super) const ROWS: u64 = 65_536;
/// Tokens of a document; ten times those of the longest context there is.
pub(super) const TOKENS: u64 = 1 << 27;
/// Rank of an adapter: no layer of any model is as wide.
pub(super) const RANK: u64 = 65_536;
/// Experts of a layer, and slices of a network.
pub(super) const EXPERTS: u64 = 65_536;
/// Checkpoints that are kept.
pub(super) const CHECKPOINTS: u64 = 1_000_000;

/// A whole number of at least `LEAST`.
pub(super) fn at_least<'de, D: Deserializer<'de>, const LEAST: u64>(
    deserializer: D,
) -> Result<Option<u64>, D::Error> {
    between::<D, LEAST, LARGEST>(deserializer)
}

/// A whole number from `LEAST` to `MOST`.
pub(super) fn between<'de, D: Deserializer<'de>, const LEAST: u64, const MOST: u64>(
    deserializer: D,
) -> Result<Option<u64>, D::Error> {
    let number = u64::deserialize(deserializer)?;
    let expected = match number {
        number if number < LEAST => format!("a whole number of at least {LEAST}"),
        number if number > MOST => format!("a whole number of at most {MOST}"),
        number => return Ok(Some(number)),
    };
    Err(D::Error::invalid_value(Unexpected::Unsigned(number), &expected.as_str()))
}

/// Reads a number like [`between`], as a `usize`.
pub(super) fn count<'de, D: Deserializer<'de>, const LEAST: u64, const MOST: u64>(
    deserializer: D,
) -> Result<Option<usize>, D::Error> {
    let number = between::<D, LEAST, MOST>(deserializer)?;
    number.map(|number| usize::try_from(number).map_err(D::Error::custom)).transpose()
}

/// A number above 0 and at most `MOST`.
pub(super) fn positive<'de, D: Deserializer<'de>, const MOST: u64>(
    deserializer: D,
) -> Result<Option<f64>, D::Error> {
    at_most::<D, MOST>(number(deserializer, "a number above 0", |x| x > 0.0)?)
}

/// A number from 0 to `MOST`.
pub(super) fn not_negative<'de, D: Deserializer<'de>, const MOST: u64>(
    deserializer: D,
) -> Result<Option<f64>, D::Error> {
    at_most::<D, MOST>(number(deserializer, "a number of at least 0", |x| x >= 0.0)?)
}

fn at_most<'de, D: Deserializer<'de>, const MOST: u64>(number: Option<f64>) -> Result<Option<f64>, D::Error> {
    match number {
        Some(number) if number > MOST as f64 => {
            let expected = format!("a number of at most {MOST}");
            Err(D::Error::invalid_value(Unexpected::Float(number), &expected.as_str()))
        }
        number => Ok(number),
    }
}

/// A number above 0 that ends somewhere: each epoch is counted before a run begins.
pub(super) fn epochs<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    number(deserializer, "a number above 0 and at most 10000", |x| x > 0.0 && x <= 10_000.0)
}

/// A number from 0 to 1, both included.
pub(super) fn share<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    number(deserializer, "a number from 0 to 1", |x| (0.0..=1.0).contains(&x))
}

/// A number from 0 up to, but not, 1.
pub(super) fn below_one<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    number(deserializer, "a number of at least 0 and below 1", |x| (0.0..1.0).contains(&x))
}

/// A number between 0 and 1, neither included.
pub(super) fn part<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    number(deserializer, "a number above 0 and below 1", |x| x > 0.0 && x < 1.0)
}

fn number<'de, D: Deserializer<'de>>(
    deserializer: D,
    expected: &'static str,
    fits: fn(f64) -> bool,
) -> Result<Option<f64>, D::Error> {
    let number = f64::deserialize(deserializer)?;
    // Negative zero is zero: it would print as `-0.0` in the resolved recipe.
    let number = number + 0.0;
    if number.is_finite() && fits(number) {
        return Ok(Some(number));
    }
    Err(D::Error::invalid_value(Unexpected::Float(number), &expected))
}
