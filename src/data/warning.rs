//! What users are told about their data that is not an error.

use std::fmt;
use std::path::PathBuf;

use super::source::Key;

/// Documents that have something in common.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Noticed {
    /// So many documents have it in common.
    pub documents: usize,
    /// The line of the first.
    pub first_line: Option<usize>,
    /// Names what was found in the first of these documents.
    pub first: Option<String>,
}

impl Noticed {
    pub(super) fn add(&mut self, line: usize, found: String) {
        self.documents += 1;
        self.first_line.get_or_insert(line);
        self.first.get_or_insert(found);
    }
}

/// Something odd about the data that is not an error.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Warning {
    /// The model would not learn to stop.
    EosNeverSupervised,
    /// There is one distinct document only, so none was held out.
    NothingToHoldOut,
    /// So many of the documents to evaluate on are also trained on.
    EvalInTrain(usize),
    /// These keys stand more than once in an object, of which the last value counts.
    Repeated {
        /// The file.
        path: PathBuf,
        /// The keys, and how many records repeat them.
        keys: Vec<Key>,
    },
    /// Nothing reads the text that a file's records have under these keys.
    Unused {
        /// The file.
        path: PathBuf,
        /// The keys, and how many records have them.
        keys: Vec<Key>,
    },
    /// The chat template does not read these keys, which records hand to it.
    Unread {
        /// The file.
        path: PathBuf,
        /// The keys, and how many records have them.
        keys: Vec<Key>,
    },
    /// The chat template leaves out text of these documents.
    LostText(PathBuf, usize, Noticed),
    /// Control tokens stand in what was written: so many, in these documents.
    ControlTokens(PathBuf, usize, Noticed),
    /// So many documents are too long to be encoded whole.
    Cut(PathBuf, usize),
}

/// Keys with the number of their records, the first ones of many.
struct Keys<'a>(&'a [Key]);

impl fmt::Display for Keys<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MOST: usize = 8;
        for (i, Key { key, records, line }) in self.0.iter().take(MOST).enumerate() {
            let comma = if i > 0 { ", " } else { "" };
            match records {
                1 => write!(f, "{comma}`{key}` (line {line})")?,
                _ => write!(f, "{comma}`{key}` ({records} records, the first in line {line})")?,
            }
        }
        match self.0.len().checked_sub(MOST) {
            None | Some(0) => Ok(()),
            Some(more) => write!(f, " and {more} more keys"),
        }
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EosNeverSupervised => f.write_str(
                "no document has an end-of-sequence token to learn, so the model will not learn to stop",
            ),
            Self::NothingToHoldOut => {
                f.write_str("there is only one distinct document, so none was held out for evaluation")
            }
            Self::EvalInTrain(1) => f.write_str("1 document to evaluate on is also trained on"),
            Self::EvalInTrain(count) => write!(f, "{count} documents to evaluate on are also trained on"),
            Self::Repeated { path, keys } => write!(
                f,
                "{}: these keys stand more than once in an object, and only the last value is used: {}",
                path.display(),
                Keys(keys)
            ),
            Self::Unused { path, keys } => {
                write!(f, "{}: text under these keys is not used: {}", path.display(), Keys(keys))
            }
            Self::Unread { path, keys } => {
                write!(f, "{}: the chat template does not read these keys: {}", path.display(), Keys(keys))
            }
            Self::LostText(path, records, lost) => write!(
                f,
                "the chat template leaves out text of {} of {records} documents of {}, the first in line {}: {}",
                lost.documents,
                path.display(),
                lost.first_line.unwrap_or_default(),
                lost.first.as_deref().unwrap_or_default(),
            ),
            Self::ControlTokens(path, count, found) => {
                let path = path.display();
                let line = found.first_line.unwrap_or_default();
                let first = found.first.as_deref().unwrap_or_default();
                match count {
                    1 => write!(f, "1 control token stands in what")?,
                    _ => write!(f, "{count} control tokens stand in what")?,
                }
                match found.documents {
                    1 => write!(f, " 1 document of {path} says, in line {line}: `{first}`")?,
                    documents => {
                        write!(
                            f,
                            " {documents} documents of {path} say, the first in line {line}: `{first}`"
                        )?;
                    }
                }
                let encoded = if *count == 1 { "it is encoded" } else { "they are encoded" };
                write!(f, "; {encoded} as the model's own")
            }
            Self::Cut(path, count) => write!(
                f,
                "{count} documents of {} are so long that only their beginning was encoded: they have more tokens than \
                 is said of lengths",
                path.display()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_control_token_is_no_plural() {
        let told = |count, documents| {
            let found = Noticed { documents, first_line: Some(3), first: Some("</s>".into()) };
            Warning::ControlTokens("a.jsonl".into(), count, found).to_string()
        };
        assert_eq!(
            told(1, 1),
            "1 control token stands in what 1 document of a.jsonl says, in line 3: `</s>`; it is encoded as the model's own"
        );
        assert_eq!(
            told(2, 1),
            "2 control tokens stand in what 1 document of a.jsonl says, in line 3: `</s>`; they are encoded as the \
             model's own"
        );
        assert_eq!(
            told(5, 2),
            "5 control tokens stand in what 2 documents of a.jsonl say, the first in line 3: `</s>`; they are encoded as \
             the model's own"
        );
    }
}
