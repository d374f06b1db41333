//! `README.md`: the model card that Hub pages are made from.

use std::fmt::Write;

use super::super::config::LoraConfig;
use super::super::target::Placements;
use super::Provenance;

/// The whole card.
pub(super) fn text(config: &LoraConfig, placements: &Placements, provenance: &Provenance) -> String {
    let mut text = String::from("---\n");
    let base = provenance.base_model.as_deref();
    let mut line = |line: std::fmt::Arguments| {
        text.push_str(&line.to_string());
        text.push('\n');
    };
    if let Some(base) = base {
        line(format_args!("base_model: {}", yaml(base)));
    }
    line(format_args!("library_name: peft\npipeline_tag: text-generation\ntags:"));
    if let Some(base) = base {
        line(format_args!("- {}", yaml(&format!("base_model:adapter:{base}"))));
    }
    line(format_args!("- lora\n---\n"));
    line(format_args!("# LoRA adapter\n"));
    if let Some(base) = base {
        line(format_args!("For {}.\n", code(base)));
    }
    line(format_args!(
        "Rank {}, alpha {}{}, on {} linear layers, {} parameters:\n",
        config.rank,
        config.alpha(),
        if config.rslora { ", rank-stabilised" } else { "" },
        placements.placements.len(),
        placements.num_parameters(config.lora_bias),
    ));
    let mut listed = String::new();
    for count in &placements.counts {
        let _ = writeln!(listed, "- {}: {} layers", code(&count.target), count.placed);
    }
    line(format_args!("{listed}"));
    let base = base.unwrap_or("BASE_MODEL");
    line(format_args!(
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n"
    ));
    line(format_args!("model = AutoModelForCausalLM.from_pretrained({})", yaml(base)));
    line(format_args!("model = PeftModel.from_pretrained(model, \"path/to/this/folder\")\n```\n"));
    let base = shell_word(base);
    line(format_args!("```sh\npeft merge --model {base} --adapter path/to/this/folder --output merged\n```"));
    text
}

/// A string of YAML, JSON and Python, all of which read JSON strings in which control characters are escaped.
fn yaml(value: &str) -> String {
    let quoted = serde_json::Value::from(value).to_string();
    quoted.chars().map(shown).collect()
}

/// Text in a span of Markdown code, between more backticks than it has in a row.
fn code(text: &str) -> String {
    let text: String = text.chars().map(shown).collect();
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest + 1);
    let blank = if longest > 0 { " " } else { "" };
    format!("{fence}{blank}{text}{blank}{fence}")
}

/// Writes a string as one word of a shell, quoted where it has to be, with control characters as escapes.
pub(crate) fn shell_word(word: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "/._-@+:,=".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_string();
    }
    if !word.contains(is_hidden) {
        return format!("'{}'", word.replace('\'', "'\\''"));
    }
    let word: String = word.replace('\\', "\\\\").replace('\'', "\\'").chars().map(shown).collect();
    format!("$'{word}'")
}

/// Characters that end a line or are not seen, which a card would be broken by.
fn is_hidden(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}')
}

fn shown(c: char) -> String {
    if is_hidden(c) { format!("\\u{:04x}", c as u32) } else { c.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_names_stay_plain() {
        let name = "HuggingFaceTB/SmolLM2-135M";
        assert_eq!(yaml(name), format!("\"{name}\""));
        assert_eq!(code(name), format!("`{name}`"));
        assert_eq!(shell_word(name), name);
    }

    #[test]
    fn odd_paths_are_quoted_for_who_reads_them() {
        let odd = "a \"b\" `` 'c'\n---\n```\u{9b}";
        assert_eq!(yaml(odd), r#""a \"b\" `` 'c'\n---\n```\u009b""#);
        assert_eq!(serde_json::from_str::<String>(&yaml(odd)).unwrap(), odd);
        assert_eq!(code(odd), r#"```` a "b" `` 'c'\u000a---\u000a```\u009b ````"#);
        assert_eq!(shell_word(odd), r#"$'a "b" `` \'c\'\u000a---\u000a```\u009b'"#);
        assert_eq!(shell_word("it's `x`"), r"'it'\''s `x`'");
        assert_eq!(shell_word(""), "''");
    }
}
