//! Bounds of numbers in recipes: what is refused, and how it is said.

use super::document::Value;

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

/// Which numbers a key takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Bound {
    /// Whatever its type takes.
    None,
    /// Whole numbers from the first to the second.
    Whole(u64, u64),
    /// Numbers above 0, up to this.
    Positive(f64),
    /// Numbers from 0 to this.
    NotNegative(f64),
    /// Numbers from 0 to 1, both included.
    Share,
    /// Numbers from 0 up to, but not, 1.
    BelowOne,
    /// Numbers between 0 and 1, neither included.
    Part,
}

impl Bound {
    /// Whole numbers of at least `least`.
    pub(super) const fn at_least(least: u64) -> Self {
        Self::Whole(least, LARGEST)
    }

    /// What was expected, where it is not `value`.
    pub(super) fn refuses(self, value: &Value) -> Option<String> {
        let (whole, number) = match value {
            Value::Integer(number) => (Some(*number), *number as f64),
            Value::Float(number) => (None, *number),
            _ => return None,
        };
        let number_at_most = |most: f64| (number > most).then(|| format!("a number of at most {most}"));
        let is_finite = number.is_finite();
        let unless = |fits: bool, words: &str| (!(is_finite && fits)).then(|| words.to_string());
        match self {
            Self::None => None,
            Self::Whole(least, most) => {
                let whole = u64::try_from(whole?).unwrap_or(0);
                if whole < least {
                    Some(format!("a whole number of at least {least}"))
                } else {
                    (whole > most).then(|| format!("a whole number of at most {most}"))
                }
            }
            Self::Positive(most) => unless(number > 0.0, "a number above 0").or_else(|| number_at_most(most)),
            Self::NotNegative(most) => {
                unless(number >= 0.0, "a number of at least 0").or_else(|| number_at_most(most))
            }
            Self::Share => unless((0.0..=1.0).contains(&number), "a number from 0 to 1"),
            Self::BelowOne => unless((0.0..1.0).contains(&number), "a number of at least 0 and below 1"),
            Self::Part => unless(number > 0.0 && number < 1.0, "a number above 0 and below 1"),
        }
    }

    /// What it lets pass, in words.
    pub(super) fn words(self) -> Option<String> {
        Some(match self {
            Self::None => return None,
            Self::Whole(least, LARGEST) => format!("a whole number of at least {least}"),
            Self::Whole(least, most) => format!("a whole number from {least} to {most}"),
            Self::Positive(most) => format!("a number above 0 and at most {most}"),
            Self::NotNegative(most) => format!("a number from 0 to {most}"),
            Self::Share => "a number from 0 to 1".to_string(),
            Self::BelowOne => "a number of at least 0 and below 1".to_string(),
            Self::Part => "a number above 0 and below 1".to_string(),
        })
    }
}
