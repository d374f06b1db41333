//! `peft recipes keys`: what recipes can say.

use super::terminal::Terminal;
use crate::error::{Error, Result, nearest};
use crate::recipe::{Key, Task, commented, other_tools};

/// Lists all keys with their defaults, or describes the key, or the keys of the table, of this name.
pub(super) fn keys(name: Option<&str>, terminal: &mut Terminal) -> Result<()> {
    let Some(name) = name else {
        for (task, title) in [(Task::Finetune, "task = \"finetune\""), (Task::Upcycle, "task = \"upcycle\"")]
        {
            terminal.write(format_args!("{title}\n"))?;
            let width = task.keys().map(|(path, _)| path.len()).max().unwrap_or(0);
            for (path, key) in task.keys() {
                terminal.write(format_args!("  {path:width$}  {}\n", key.default()))?;
            }
        }
        return Ok(());
    };
    let all: Vec<(String, &Key)> = Task::Finetune.keys().chain(Task::Upcycle.keys()).collect();
    let is_below = |path: &str| path.strip_prefix(name).is_some_and(|rest| rest.starts_with('.'));
    let mut found: Vec<&(String, &Key)> =
        all.iter().filter(|(path, _)| path == name || is_below(path)).collect();
    if found.is_empty() {
        // Whoever writes `rank` means the only key of this name.
        found = all.iter().filter(|(_, key)| key.name == name).collect();
    }
    found.dedup_by(|one, other| one.0 == other.0);
    if found.is_empty() {
        let last = name.rsplit('.').next().unwrap_or(name);
        let names = nearest(last, all.iter().map(|(_, key)| key.name), 2);
        let near: Vec<&str> =
            all.iter().filter(|(_, key)| names.contains(&key.name)).map(|(path, _)| path.as_str()).collect();
        let error = Error::request(format!("there is no key `{name}`"));
        let near: Vec<String> = near.iter().take(3).map(|near| format!("`{near}`")).collect();
        // Other tools write the table in front: `lora_r`.
        let foreign = other_tools::hint(last).filter(|_| name == last);
        return Err(error.with_hint(match near.is_empty() {
            _ if foreign.is_some() => foreign.unwrap_or_default(),
            true => "`peft recipes keys` lists all of them".to_string(),
            false => format!("did you mean {}?", near.join(" or ")),
        }));
    }
    for (number, (path, key)) in found.into_iter().enumerate() {
        let space = if number > 0 { "\n" } else { "" };
        terminal.write(format_args!("{space}{path}\n{key}\n"))?;
    }
    Ok(())
}

/// A recipe that shows every key, under the name that stands for one.
pub(super) fn every_key(name: &str) -> Option<String> {
    match name {
        "all" => Some(commented(Task::Finetune)),
        "all-upcycle" => Some(commented(Task::Upcycle)),
        _ => None,
    }
}
