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
        line(format_args!("For `{base}`.\n"));
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
        let _ = writeln!(listed, "- `{}`: {} layers", count.target, count.placed);
    }
    line(format_args!("{listed}"));
    let base = base.unwrap_or("BASE_MODEL");
    line(format_args!(
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n"
    ));
    line(format_args!("model = AutoModelForCausalLM.from_pretrained(\"{base}\")"));
    line(format_args!("model = PeftModel.from_pretrained(model, \"path/to/this/folder\")\n```\n"));
    line(format_args!("```sh\npeft merge --model {base} --adapter path/to/this/folder --output merged\n```"));
    text
}

/// A YAML scalar: JSON strings are YAML strings.
fn yaml(value: &str) -> String {
    serde_json::Value::from(value).to_string()
}
