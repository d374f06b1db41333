//! Files that commands write beside their output.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::Path;

use crate::error::{Context, Error, Result};

/// Writes a file that must not exist yet, whole or not at all; `taken` is the error where it does.
pub(super) fn write_new(path: &Path, text: &str, taken: Error) -> Result<()> {
    let mut file = match File::create_new(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            return Err(taken).at(path);
        }
        created => created.at(path)?,
    };
    file.write_all(text.as_bytes())
        .inspect_err(|_| {
            let _ = fs::remove_file(path);
        })
        .at(path)
}
