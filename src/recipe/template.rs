//! `data.template`: what chat templates are told beside the conversation.

use std::fmt;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

use crate::data::Text;

/// Variables that the conversation itself sets.
const TAKEN: [&str; 7] =
    ["messages", "tools", "documents", "add_generation_prompt", "mark_generation", "bos_token", "eos_token"];

/// A day, written `2024-07-26`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Date {
    year: i64,
    month: i64,
    day: i64,
}

impl Date {
    /// 26 July 2024, the date that Llama 3's template falls back on: for work that is to be the same on every day.
    pub const FIXED: Self = Self { year: 2024, month: 7, day: 26 };

    /// Today by the clock (UTC).
    #[must_use]
    pub fn today() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
        Self::of_day((now / 86_400) as i64)
    }

    /// So many days after 1 January 1970.
    fn of_day(days: i64) -> Self {
        // Days since 1 March 0, in cycles of 400 years.
        let days = days + 719_468;
        let (cycle, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
        let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let month = (5 * day + 2) / 153;
        let day = day - (153 * month + 2) / 5 + 1;
        let (year, month) = (400 * cycle + year, month + 3);
        if month > 12 { Self { year: year + 1, month: month - 12, day } } else { Self { year, month, day } }
    }

    /// Its beginning, in seconds since 1970 (UTC).
    #[must_use]
    pub fn seconds(self) -> i64 {
        let Self { year, month, day } = self;
        // Years that begin in March have their leap day at the end.
        let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
        let days = 365 * year + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
        (days + (153 * month + 2) / 5 + day - 1 - 719_468) * 86_400
    }
}

impl FromStr for Date {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unfit = || format!("expected a date such as `2024-07-26`, found `{text}`");
        let parts: Vec<i64> =
            text.split('-').map(|part| part.parse().map_err(|_| unfit())).collect::<Result<_, _>>()?;
        let [year, month, day] = parts[..] else { return Err(unfit()) };
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let days = match month {
            2 => 28 + i64::from(leap),
            4 | 6 | 9 | 11 => 30,
            1..=12 => 31,
            _ => return Err(unfit()),
        };
        let fits = (1..=9999).contains(&year) && (1..=days).contains(&day) && text.len() == 10;
        fits.then_some(Self { year, month, day }).ok_or_else(unfit)
    }
}

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}-{:02}-{:02}", self.year, self.month, self.day)
    }
}

/// The date, and further variables by name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TemplateVariables {
    /// Templates that ask for the date get this one, or today's where none is said. A resumed run keeps the date of its
    /// beginning.
    pub date: Option<Date>,
    /// These variables are passed to the template unchanged.
    pub others: Map<String, Value>,
}

impl TemplateVariables {
    /// The date of [`Date::FIXED`], and nothing more.
    #[must_use]
    pub fn fixed() -> Self {
        Self { date: Some(Date::FIXED), others: Map::new() }
    }

    /// The variables that no template of the model reads.
    #[must_use]
    pub fn unread(&self, text: &Text) -> Vec<String> {
        let date = self.date.is_some() && !text.template_asks_for("strftime_now");
        let others = self.others.keys().filter(|name| !text.template_asks_for(name));
        date.then(|| "date".to_string()).into_iter().chain(others.cloned()).collect()
    }
}

impl Serialize for TemplateVariables {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if let Some(date) = self.date {
            map.serialize_entry("date", &date.to_string())?;
        }
        for (name, value) in &self.others {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for TemplateVariables {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Variables;

        impl<'de> Visitor<'de> for Variables {
            type Value = TemplateVariables;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table such as { date = \"2024-07-26\", enable_thinking = false }")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut variables = TemplateVariables::default();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "date" {
                        variables.date = Some(map.next_value::<Written>()?.0);
                    } else if TAKEN.contains(&name.as_str()) {
                        return Err(de::Error::custom(format!(
                            "`{name}` comes from the conversation and the tokenizer, and cannot be set"
                        )));
                    } else {
                        variables.others.insert(name, map.next_value()?);
                    }
                }
                Ok(variables)
            }
        }

        deserializer.deserialize_map(Variables)
    }
}

/// A date as text, so that a wrong one is said to stand at its own key.
struct Written(Date);

impl<'de> Deserialize<'de> for Written {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map(Self).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_days_since_1970() {
        for (text, days) in
            [("1970-01-01", 0), ("2000-02-29", 11_016), ("2024-07-26", 19_930), ("1969-12-31", -1)]
        {
            let date: Date = text.parse().unwrap();
            assert_eq!((date.seconds(), date.to_string().as_str()), (days * 86_400, text));
            assert_eq!(Date::of_day(days), date);
        }
        for wrong in ["2023-02-29", "2024-13-01", "2024-7-26", "26 July", "2024-07-26T00:00", ""] {
            assert_eq!(
                wrong.parse::<Date>().unwrap_err(),
                format!("expected a date such as `2024-07-26`, found `{wrong}`")
            );
        }
    }
}
