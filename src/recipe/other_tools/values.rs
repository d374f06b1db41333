//! Values of other tools as the keys of a recipe take them.

use toml::Value as Toml;

use super::keys::Reading;
use super::yaml::Value;

/// What a value comes to.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Taken {
    /// The key takes this.
    Value(Toml),
    /// It asks for what happens without the key.
    Nothing,
    /// It asks for no evaluation.
    NoEvaluation,
    /// It is this share of all steps.
    ShareOfSteps(f64),
    /// The key takes the share of so many steps in all steps.
    OfSteps(f64),
}

/// Reads a value, or says why it is none for us.
pub(super) fn read(reading: Reading, value: &Value) -> Result<Taken, String> {
    use Taken::{Nothing, OfSteps, ShareOfSteps};

    let text = value.text();
    let word = |word: &str| Ok(Taken::Value(word.into()));
    match reading {
        Reading::Same => plain(value).map(Taken::Value).ok_or_else(|| "expected a single value".to_string()),
        Reading::Share => match value.number() {
            Some(0.0) => Ok(Taken::NoEvaluation),
            Some(share) if share < 1.0 => Ok(Taken::Value(share.into())),
            _ => Err("`data.eval_share` is a share of the documents, and no number of them".to_string()),
        },
        Reading::MaxSteps => match value.number() {
            Some(steps) if steps <= 0.0 => Ok(Nothing),
            _ => Ok(Taken::Value(whole(value)?)),
        },
        Reading::Interval => match value.number() {
            Some(share) if share > 0.0 && share < 1.0 => Ok(ShareOfSteps(share)),
            _ => Ok(Taken::Value(whole(value)?)),
        },
        Reading::WarmupSteps => match value.number() {
            Some(0.0) => Ok(Taken::Value(0.0.into())),
            Some(share) if share > 0.0 && share < 1.0 => Ok(Taken::Value(share.into())),
            // A recipe takes 1 for all steps.
            Some(1.0) => Ok(OfSteps(1.0)),
            Some(steps) if steps > 1.0 => whole(value).map(Taken::Value),
            _ => Err("expected a number of steps".to_string()),
        },
        Reading::Strategy => match text.as_str() {
            "no" | "false" => Ok(Taken::Value(0.into())),
            "steps" => Ok(Nothing),
            _ => Err("a recipe counts in steps, of which `peft check` says how many there are".to_string()),
        },
        Reading::Schedule => match text.as_str() {
            "constant" | "constant_with_warmup" => word("constant"),
            "linear" | "linear_schedule" => word("linear"),
            "cosine" | "cosine_decay" => word("cosine"),
            _ => Err("`train.schedule` is \"constant\", \"linear\" or \"cosine\"".to_string()),
        },
        Reading::Dtype => match text.trim_start_matches("torch.") {
            "auto" => word("auto"),
            "float32" | "fp32" | "f32" | "float" => word("f32"),
            "bfloat16" | "bf16" => word("bf16"),
            _ => Err("`model.dtype` is \"auto\", \"f32\" or \"bf16\"".to_string()),
        },
        Reading::Bf16 => match text.as_str() {
            "true" | "full" => word("bf16"),
            "false" | "auto" => Ok(Nothing),
            _ => Err("expected `true`, `false` or `auto`".to_string()),
        },
        Reading::Init => match text.as_str() {
            "true" | "default" => word("peft"),
            "gaussian" => word("gaussian"),
            _ => Err("`adapter.init` has no such beginning; it stays \"peft\"".to_string()),
        },
        Reading::Targets => match value {
            Value::Text(text) if ["all", "all-linear", "all_linear"].contains(&text.as_str()) => {
                word("all-linear")
            }
            // A regular expression.
            Value::Text(text) if text.contains(['*', '(', '[', '\\', '|', '^', '$', '+']) => word(text),
            value => Ok(Taken::Value(value.words().into())),
        },
        Reading::AllLinear => match value.flag() {
            Some(true) => word("all-linear"),
            _ => Ok(Nothing),
        },
        Reading::PromptLearned | Reading::AnswersLearned => match value.flag() {
            Some(flag) if flag == (reading == Reading::PromptLearned) => word("all"),
            Some(_) => word("completion"),
            None => Err("expected `true` or `false`".to_string()),
        },
        Reading::Recompute => match text.as_str() {
            "false" => Ok(Nothing),
            _ => word("block"),
        },
        Reading::Files => Err("name the files in `data.train` and `data.eval`".to_string()),
    }
}

/// A single value, or a list of them.
fn plain(value: &Value) -> Option<Toml> {
    Some(match value {
        Value::Flag(flag) => (*flag).into(),
        Value::Integer(number) => (*number).into(),
        Value::Float(number) => (*number).into(),
        Value::Text(text) => text.as_str().into(),
        Value::List(nodes) => {
            Toml::Array(nodes.iter().map(|node| plain(&node.value)).collect::<Option<Vec<_>>>()?)
        }
        Value::Null | Value::Table(_) => return None,
    })
}

/// A whole number, also where it is written with a point.
fn whole(value: &Value) -> Result<Toml, String> {
    match (value, value.number()) {
        (Value::Integer(number), _) => Ok((*number).into()),
        (_, Some(number)) if number.fract() == 0.0 && number.abs() < 1e15 => Ok((number as i64).into()),
        _ => Err("expected a whole number".to_string()),
    }
}
