//! Paths that stand for several data files: a folder, or a pattern such as `data/*.jsonl`.

use std::fs;
use std::path::{Path, PathBuf};

use super::source::Source;
use crate::error::{Context, Error, Result};

impl Source {
    /// The files that the source stands for, sorted by their paths. A path of a file stands for itself, there or not.
    pub fn files(&self) -> Result<Vec<Self>> {
        let paths = if self.path.is_dir() {
            of_folder(&self.path).at(&self.path)?
        } else {
            match self.path.to_str() {
                Some(pattern) if pattern.contains(['*', '?', '[']) && !self.path.exists() => {
                    of_pattern(pattern).at(&self.path)?
                }
                _ => return Ok(vec![self.clone()]),
            }
        };
        Ok(paths.into_iter().map(|path| Self { path, ..self.clone() }).collect())
    }
}

/// The `.jsonl` and `.json` files of a folder, without hidden ones.
fn of_folder(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
        let is_hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if ["jsonl", "json"].contains(&ending.to_lowercase().as_str()) && !is_hidden && path.is_file() {
            paths.push(path);
        }
    }
    if paths.is_empty() {
        return Err(Error::request("a folder without a `.jsonl` or `.json` file, expected one at least"));
    }
    paths.sort();
    Ok(paths)
}

/// The files whose paths fit a pattern.
fn of_pattern(pattern: &str) -> Result<Vec<PathBuf>> {
    let found = glob::glob(pattern).map_err(|error| {
        Error::request(format!("not a pattern of paths: {} at character {}", error.msg, error.pos + 1))
    })?;
    let mut paths = Vec::new();
    for path in found {
        let path = path.map_err(std::io::Error::from)?;
        if path.is_file() {
            paths.push(path);
        }
    }
    if paths.is_empty() {
        let hint = "`*` stands for any part of a name, and `**` for any folders; paths begin in the folder that the \
                    command runs in";
        return Err(Error::request("no file has a path of this pattern").with_hint(hint));
    }
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Format;

    fn names(folder: &Path, path: &str) -> Result<Vec<String>> {
        let source = Source { path: folder.join(path), weight: 0.5, format: Format::Text };
        let files = source.files()?;
        assert!(files.iter().all(|file| file.weight == 0.5 && file.format == Format::Text));
        let below = |file: &Source| file.path.strip_prefix(folder).unwrap().display().to_string();
        Ok(files.iter().map(below).collect())
    }

    #[test]
    fn folders_and_patterns_are_their_files_in_order() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path();
        fs::create_dir_all(folder.join("parts/more.jsonl")).unwrap();
        fs::create_dir_all(folder.join("empty")).unwrap();
        for name in ["b.jsonl", "a.json", ".c.jsonl", "d.txt", "more.jsonl/e.jsonl"] {
            fs::write(folder.join("parts").join(name), "").unwrap();
        }
        fs::write(folder.join("odd[1].jsonl"), "").unwrap();

        assert_eq!(names(folder, "parts").unwrap(), ["parts/a.json", "parts/b.jsonl"]);
        assert_eq!(names(folder, "parts/*.jsonl").unwrap(), ["parts/.c.jsonl", "parts/b.jsonl"]);
        assert_eq!(names(folder, "**/e.jsonl").unwrap(), ["parts/more.jsonl/e.jsonl"]);
        assert_eq!(names(folder, "odd[1].jsonl").unwrap(), ["odd[1].jsonl"]);
        assert_eq!(names(folder, "none.jsonl").unwrap(), ["none.jsonl"]);

        let refusal = |path: &str| {
            let error = names(folder, path).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            error.to_string().rsplit_once(&format!("{path}: ")).unwrap().1.to_string()
        };
        let empty = "a folder without a `.jsonl` or `.json` file, expected one at least";
        assert_eq!(refusal("empty"), empty);
        assert_eq!(refusal("parts/*.parquet"), "no file has a path of this pattern");
        assert!(refusal("parts/[a").starts_with("not a pattern of paths: "), "{}", refusal("parts/[a"));
    }
}
