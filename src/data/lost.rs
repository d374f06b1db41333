//! Text of a conversation that its chat template leaves out.

use super::conversation::{Message, REASONING};

/// The first thing that the record says and the template leaves out, line by line: templates change space between
/// lines, and write some texts as JSON.
pub(super) fn lost(messages: &[Message], rendered: &str) -> Option<String> {
    let mut reached = 0;
    let mut holds = |line: &str| {
        if let Some(at) = rendered[reached..].find(line) {
            reached += at + line.len();
            return true;
        }
        let quoted = serde_json::Value::from(line).to_string();
        rendered.contains(line) || rendered.contains(&quoted[1..quoted.len() - 1])
    };
    let mut is_lost = |said: &str| {
        let lines = said.lines().map(str::trim);
        // Tags stand for parts that have names of their own in other templates.
        let is_tag =
            |line: &str| line.starts_with('<') && line.ends_with('>') && !line.contains(char::is_whitespace);
        lines.filter(|line| !line.is_empty() && !is_tag(line)).any(|line| !holds(line))
    };
    for (message, number) in messages.iter().zip(1..) {
        let content = message.content.as_deref().unwrap_or_default();
        let thoughts = REASONING.iter().find_map(|name| message.fields.get(*name)?.as_str());
        if thoughts.is_some_and(&mut is_lost) {
            return Some(format!("the thoughts of message {number}"));
        }
        if let Some((thoughts, answer)) = content.split_once("</think>") {
            if is_lost(thoughts.trim_start().trim_start_matches("<think>")) {
                return Some(format!("the thoughts of message {number}"));
            }
            if !is_lost(answer) {
                continue;
            }
        } else if !is_lost(content) {
            continue;
        }
        return Some(format!("the content of message {number} (role `{}`)", message.role.name()));
    }
    None
}
