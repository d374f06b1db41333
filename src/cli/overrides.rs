//! `--set train.learning_rate=1e-4`: values from the command line, laid over the recipe before it is typed.
//!
//! The value is TOML. What is not TOML and does not begin like a string, list or table is taken as a string, so
//! that `--set model.source=examples/tiny-llama` needs no quotes inside quotes.

use toml::de::DeValue;

use crate::error::{Error, Result};
use crate::recipe::Document;

/// Keys that say one thing in two ways: a flag with one takes the place of the other, wherever that was said.
const EITHER: [(&str, &str); 2] = [("train.steps", "train.epochs"), ("data.eval", "data.eval_share")];

/// Lays `set`, the text of one `--set`, over `document`; gives the key that it took the place of, if that was another.
pub(super) fn lay_over(document: &mut Document, set: &str) -> Result<Option<&'static str>> {
    let flag = format!("--set {set}");
    let (key, text) = set.split_once('=').ok_or_else(|| {
        Error::request(format!("`{flag}`: expected a key and a value"))
            .with_hint("write it as `--set train.steps=100`")
    })?;
    let (key, text) = (key.trim(), text.trim());
    let bare = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if key.split('.').any(|part| part.is_empty() || !part.chars().all(bare)) {
        return Err(Error::request(format!("`{flag}`: expected a key such as `train.steps`, found `{key}`")));
    }
    if text.is_empty() {
        return Err(Error::request(format!("`{flag}`: the value is missing")));
    }
    let value = value(text).map_err(|message| Error::request(format!("`{flag}`: {message}")))?;
    document.set(key, value, &flag)?;
    let other = EITHER.iter().find_map(|&(one, other)| match key {
        _ if key == one => Some(other),
        _ if key == other => Some(one),
        _ => None,
    });
    Ok(other.filter(|other| document.remove(other)))
}

/// Sets `key` to a string that needs no reading: what a flag such as `--output` says.
pub(super) fn lay_string(document: &mut Document, key: &str, text: &str, flag: &str) -> Result<()> {
    document.set(key, DeValue::String(text.into()), &format!("{flag} {text}"))
}

fn value(text: &str) -> Result<DeValue<'_>, String> {
    match DeValue::parse(text) {
        Ok(value) => Ok(value.into_inner()),
        Err(error) if text.starts_with(['[', '{', '"', '\'']) => {
            Err(format!("not a TOML value: {}", error.message()))
        }
        Err(_) => Ok(DeValue::String(text.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::Targets;
    use crate::recipe::{AdapterPlan, Length, Plan, Recipe, Trained};

    const RECIPE: &str = r#"
        task = "finetune"
        model.source = "model"
        adapter.rank = 8
        data.train = [{ path = "data.jsonl" }]
    "#;

    fn plan(sets: &[&str]) -> Result<Plan> {
        let mut document = Document::parse("test.toml", RECIPE)?;
        for set in sets {
            lay_over(&mut document, set)?;
        }
        Ok(Plan::of(&Recipe::read(&document)?, "test"))
    }

    fn error(set: &str) -> String {
        let error = plan(&[set]).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        match error.hint() {
            Some(hint) => format!("{error}\nhint: {hint}"),
            None => error.to_string(),
        }
    }

    #[test]
    fn values_are_toml_and_bare_words_are_strings() {
        let plan = plan(&[
            "train.learning_rate=1e-3",
            "train.steps = 7",
            "model.source=hub/name@main",
            "adapter.targets=[\"q_proj\", \"v_proj\"]",
            "adapter.init=gaussian",
            "data.pack=false",
            "output=runs/a=b",
        ])
        .unwrap();
        assert_eq!(plan.train.learning_rate, 1e-3);
        assert_eq!(plan.train.length, Length::Steps(7));
        assert_eq!(plan.model.source, "hub/name@main");
        assert!(!plan.data.pack);
        assert_eq!(plan.output.to_str(), Some("runs/a=b"));
        let Trained::Adapter(adapter) = plan.trained else { panic!("the recipe has an adapter") };
        let AdapterPlan::Fresh(adapter) = *adapter else { panic!("the adapter is a new one") };
        assert_eq!(adapter.config.rank, 8);
        assert_eq!(adapter.config.targets, Targets::names(["q_proj", "v_proj"]));
    }

    #[test]
    fn words_that_begin_like_toml_are_strings_all_the_same() {
        for word in ["true story", "1.2.3/model", "2024-runs", "a # b"] {
            assert_eq!(plan(&[&format!("model.source={word}")]).unwrap().model.source, word);
        }
    }

    #[test]
    fn the_last_flag_wins() {
        let plan = plan(&["seed=1", "seed=2"]).unwrap();
        assert_eq!(plan.seed, 2);
    }

    #[test]
    fn a_flag_takes_the_place_of_the_key_that_says_the_same_in_another_way() {
        let recipe = format!("{RECIPE}\ntrain.steps = 100\ndata.eval_share = 0.5");
        let laid = |sets: &[&str]| {
            let mut document = Document::parse("test.toml", &recipe).unwrap();
            let replaced: Vec<_> =
                sets.iter().filter_map(|set| lay_over(&mut document, set).unwrap()).collect();
            (Plan::of(&Recipe::read(&document).unwrap(), "test"), replaced)
        };
        let (plan, replaced) = laid(&["train.epochs=2"]);
        assert_eq!((plan.train.length, &replaced[..]), (Length::Epochs(2.0), &["train.steps"][..]));
        let (plan, replaced) = laid(&["train.epochs=2", "train.steps=7"]);
        assert_eq!(
            (plan.train.length, &replaced[..]),
            (Length::Steps(7), &["train.steps", "train.epochs"][..])
        );
        assert_eq!(laid(&["train.steps=7"]).1, [""; 0]);
        let (plan, _) = laid(&["data.eval=[{ path = \"e.jsonl\" }]"]);
        assert!(matches!(plan.data.eval, crate::recipe::Evaluation::Files(_)));
    }

    #[test]
    fn errors_name_the_flag() {
        insta::assert_snapshot!(error("train.learnign_rate=1"), @"
        `--set train.learnign_rate=1`: unknown key `train.learnign_rate`
        hint: did you mean `learning_rate`?
        ");
        insta::assert_snapshot!(error("train.steps=many"), @r#"`--set train.steps=many`: `train.steps`: expected a whole number, found the string "many""#);
        insta::assert_snapshot!(error("train.steps"), @"
        `--set train.steps`: expected a key and a value
        hint: write it as `--set train.steps=100`
        ");
        insta::assert_snapshot!(error("train..steps=1"), @"`--set train..steps=1`: expected a key such as `train.steps`, found `train..steps`");
        insta::assert_snapshot!(error("train.steps="), @"`--set train.steps=`: the value is missing");
        insta::assert_snapshot!(error("adapter.targets=[\"q_proj\""), @r#"`--set adapter.targets=["q_proj"`: not a TOML value: unclosed array, expected `]`"#);
        insta::assert_snapshot!(error("model.source.name=x"), @r#"`--set model.source.name=x`: `model.source` is the string "model", so it has no key `name`"#);
        insta::assert_snapshot!(error("seed=99999999999999999999"), @"`--set seed=99999999999999999999`: `99999999999999999999` is too large: whole numbers end at 9223372036854775807");
        insta::assert_snapshot!(error("data.train=[{ path = \"a\", weigth = 2 }]"), @r#"
        `--set data.train=[{ path = "a", weigth = 2 }]`: unknown key `data.train.weigth`
        hint: did you mean `weight`?
        "#);
    }
}
