//! The recipes built into the binary.

use std::path::PathBuf;

use crate::error::{Error, Result, nearest};
use crate::recipe::{Document, Work};

/// Path below `recipes/` without its ending, and text.
const RECIPES: &[(&str, &str)] = &[
    ("moe-lora", include_str!("../../recipes/moe-lora.toml")),
    ("quickstart", include_str!("../../recipes/quickstart.toml")),
    ("smollm2-135m", include_str!("../../recipes/smollm2-135m.toml")),
    ("tiny-llama-pretrain", include_str!("../../recipes/tiny-llama-pretrain.toml")),
    ("upcycle-heal", include_str!("../../recipes/upcycle-heal.toml")),
    ("upcycle-tiny", include_str!("../../recipes/upcycle-tiny.toml")),
];

/// A recipe built into the binary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Builtin {
    /// What it is called on the command line.
    pub(super) name: &'static str,
    /// Its TOML.
    pub(super) text: &'static str,
}

impl Builtin {
    /// All of them, by name.
    pub(super) fn all() -> impl Iterator<Item = Self> {
        RECIPES.iter().map(|&(name, text)| Self { name, text })
    }

    /// The one of this name.
    pub(super) fn find(name: &str) -> Option<Self> {
        Self::all().find(|recipe| recipe.name == name)
    }

    /// The one of this name; the nearest names otherwise.
    pub(super) fn named(name: &str) -> Result<Self> {
        Self::find(name).ok_or_else(|| {
            let error = Error::request(format!("there is no built-in recipe `{name}`"));
            match nearest(name, Self::all().map(|recipe| recipe.name), 1).first() {
                Some(near) => error.with_hint(format!("did you mean `{near}`?")),
                None => error.with_hint("`peft recipes` lists them"),
            }
        })
    }

    fn work(self) -> Result<Work> {
        Work::of(&Document::parse(self.name, self.text)?, self.name)
    }

    /// What it teaches: the first line of its header comment.
    pub(super) fn about(self) -> &'static str {
        self.text.lines().next().unwrap_or_default().trim_start_matches('#').trim()
    }
}

/// Refuses a plan that names files of this project's repository where they are not: a built-in recipe runs anywhere, its
/// files do not come along.
pub(super) fn refuse_absent(work: &Work) -> Result<()> {
    let ours: Vec<(Builtin, PathBuf)> = Builtin::all()
        .filter_map(|recipe| Some((recipe, recipe.work().ok()?)))
        .flat_map(|(recipe, work)| work.files().into_iter().map(move |(_, path)| (recipe, path)))
        .filter(|(_, path)| path.starts_with("examples") || path.starts_with("datasets"))
        .collect();
    let (mut absent, mut flags, mut made) = (Vec::new(), Vec::new(), None);
    for (key, path) in work.files() {
        let Some((recipe, _)) = ours.iter().find(|(_, ours)| *ours == path && !path.exists()) else {
            continue;
        };
        absent.push(format!("`{}`", path.display()));
        if !flags.contains(&key) {
            flags.push(key);
        }
        made = made.or(path.starts_with("datasets/generated").then_some(recipe.name));
    }
    if absent.is_empty() {
        return Ok(());
    }
    let (verb, they) = if absent.len() == 1 { ("is", "it belongs") } else { ("are", "they belong") };
    let own = flags.iter().map(|key| format!("`--set {key}=…`")).collect::<Vec<_>>().join(", ");
    let mut hint = format!("{they} to peft's repository: run in a clone of it, or name your own with {own}");
    if let Some(name) = made {
        hint += &format!("; `peft recipes show {name}` begins with the commands that make what is generated");
    }
    Err(Error::request(format!("{} {verb} not here", absent.join(", "))).with_hint(hint))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn names_below(folder: &Path, prefix: &str, names: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_str().unwrap();
            if path.is_dir() {
                names_below(&path, &format!("{prefix}{name}/"), names);
            } else {
                assert_eq!(path.extension().unwrap(), "toml", "recipes/ holds recipes only");
                names.push(format!("{prefix}{name}"));
            }
        }
    }

    #[test]
    fn every_recipe_of_the_repository_is_built_in() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
        let mut names = Vec::new();
        names_below(&root, "", &mut names);
        names.sort();
        let built_in: Vec<&str> = Builtin::all().map(|recipe| recipe.name).collect();
        assert_eq!(built_in, names);
        for recipe in Builtin::all() {
            let text = std::fs::read_to_string(root.join(format!("{}.toml", recipe.name))).unwrap();
            assert_eq!(recipe.text, text, "{} is another recipe's text", recipe.name);
        }
    }

    #[test]
    fn every_recipe_says_what_it_teaches() {
        for recipe in Builtin::all() {
            assert!(recipe.text.starts_with("# "), "{} has no header", recipe.name);
            assert!(recipe.about().len() > 10, "{} does not say what it teaches", recipe.name);
        }
    }
}
