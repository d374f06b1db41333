//! Numbers as recipes may say them: each function reads one optional number and refuses what lies outside.

use serde::de::{Deserialize, Deserializer, Error, Unexpected};

/// Seeds and sizes end where TOML's whole numbers do, so that every plan can be written down.
const LARGEST: u64 = i64::MAX as u64;

/// A whole number of at least `LEAST`.
pub(super) fn at_least<'de, D: Deserializer<'de>, const LEAST: u64>(
    deserializer: D,
) -> Result<Option<u64>, D::Error> {
    let number = u64::deserialize(deserializer)?;
    if (LEAST..=LARGEST).contains(&number) {
        return Ok(Some(number));
    }
    let expected = format!("a whole number of at least {LEAST}");
    Err(D::Error::invalid_value(Unexpected::Unsigned(number), &expected.as_str()))
}

/// As [`at_least`], for what counts things in memory.
pub(super) fn count<'de, D: Deserializer<'de>, const LEAST: u64>(
    deserializer: D,
) -> Result<Option<usize>, D::Error> {
    let number = at_least::<D, LEAST>(deserializer)?;
    number.map(|number| usize::try_from(number).map_err(D::Error::custom)).transpose()
}

/// A number above 0.
pub(super) fn positive<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    number(deserializer, "a number above 0", |x| x > 0.0)
}

/// A number above 0 that ends somewhere: each epoch is counted before a run begins.
pub(super) fn epochs<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    number(deserializer, "a number above 0 and at most 10000", |x| x > 0.0 && x <= 10_000.0)
}

/// A number of at least 0.
pub(super) fn not_negative<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    number(deserializer, "a number of at least 0", |x| x >= 0.0)
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
