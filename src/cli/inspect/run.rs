//! A run directory: what was trained, how far, and how well.

use std::collections::BTreeSet;
use std::fmt::{self, Display};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::row;
use crate::error::{Context, Error, Result, read_regular, read_regular_text};
use crate::recipe::{Document, Plan, Recipe};
use crate::run::figures::{bytes, count};
use crate::train;

/// No file of a run that is shown has more bytes than this: 4 GiB.
const LARGEST: u64 = 1 << 32;

/// The file that makes a folder a run.
pub(super) const METRICS_FILE: &str = "metrics.jsonl";

/// What there is to know of a run.
#[derive(Debug, Serialize)]
pub(super) struct Run {
    path: PathBuf,
    model: Option<String>,
    steps_made: u64,
    steps: Option<u64>,
    tokens: u64,
    first_loss: Option<f64>,
    last_loss: Option<f64>,
    /// The loss of each step, to be drawn.
    #[serde(skip)]
    losses: Vec<f64>,
    evaluations: Vec<Evaluation>,
    tokens_per_second: Option<f64>,
    peak_rss_bytes: Option<u64>,
    /// The steps that checkpoints were saved after.
    checkpoints: Vec<u64>,
}

/// An evaluation line of the metrics.
#[derive(Debug, Clone, Copy, Serialize)]
struct Evaluation {
    step: u64,
    eval_loss: f64,
}

/// A line of the metrics; lines of steps and of evaluations have different keys.
#[derive(Debug, Deserialize)]
struct Line {
    step: u64,
    steps: Option<u64>,
    loss: Option<f64>,
    eval_loss: Option<f64>,
    tokens: Option<u64>,
    tokens_per_second: Option<f64>,
    peak_rss_bytes: Option<u64>,
}

impl Run {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let metrics = path.join(METRICS_FILE);
        let text = read_regular(&metrics, LARGEST).at(&metrics)?;
        let mut lines = Vec::new();
        for (index, line) in text.split_inclusive(|byte| *byte == b'\n').enumerate() {
            match serde_json::from_slice::<Line>(line) {
                Ok(line) => lines.push(line),
                // A run that is killed may leave half a line at the end.
                Err(_) if !line.ends_with(b"\n") => {}
                Err(error) => {
                    return Err(
                        Error::from(error).with_hint("`peft finetune --resume` leaves out such lines")
                    )
                    .at_line(&metrics, index + 1);
                }
            }
        }
        let steps: Vec<&Line> = lines.iter().filter(|line| line.loss.is_some()).collect();
        let evaluations = lines
            .iter()
            .filter_map(|line| line.eval_loss.map(|eval_loss| Evaluation { step: line.step, eval_loss }));
        let speeds: Vec<f64> = steps.iter().filter_map(|line| line.tokens_per_second).collect();
        Ok(Self {
            path: path.to_path_buf(),
            model: model_of(&path.join("recipe.toml"))?,
            steps_made: steps.last().map_or(0, |line| line.step),
            steps: steps.last().and_then(|line| line.steps),
            tokens: steps.iter().filter_map(|line| line.tokens).sum(),
            first_loss: steps.first().and_then(|line| line.loss),
            last_loss: steps.last().and_then(|line| line.loss),
            losses: steps.iter().filter_map(|line| line.loss).collect(),
            evaluations: evaluations.collect(),
            tokens_per_second: (!speeds.is_empty()).then(|| speeds.iter().sum::<f64>() / speeds.len() as f64),
            peak_rss_bytes: steps.iter().filter_map(|line| line.peak_rss_bytes).max(),
            checkpoints: train::checkpoints(path)?.into_iter().map(|(step, _)| step).collect(),
        })
    }
}

/// The columns of a drawn course.
const COLUMNS: usize = 50;

/// Draws the course of values from the lowest to the highest in one line; a column is the mean of as many values as it takes.
fn sparkline(values: &[f64]) -> String {
    const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

    let each = values.len().div_ceil(COLUMNS).max(1);
    let means: Vec<f64> =
        values.chunks(each).map(|chunk| chunk.iter().sum::<f64>() / chunk.len() as f64).collect();
    let (low, high) =
        means.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(*x), high.max(*x)));
    let level = |mean: &f64| match high > low {
        true => LEVELS[((mean - low) / (high - low) * 7.0).round() as usize],
        false => LEVELS[0],
    };
    means.iter().map(level).collect()
}

/// The metrics of a run as CSV: the step, then a column for each number or text in any line, by name.
pub(super) fn csv(path: &Path) -> Result<String> {
    let metrics = path.join(METRICS_FILE);
    let text = read_regular_text(&metrics, LARGEST).at(&metrics)?;
    let is_whole = |line: &&str| line.ends_with('\n');
    let lines: Vec<Map<String, Value>> = text
        .split_inclusive('\n')
        .filter(is_whole)
        .enumerate()
        .map(|(index, line)| serde_json::from_str(line).at_line(&metrics, index + 1))
        .collect::<Result<_>>()?;
    let is_value = |value: &Value| !value.is_array() && !value.is_object();
    let names: BTreeSet<&str> =
        lines.iter().flatten().filter(|(_, value)| is_value(value)).map(|(key, _)| key.as_str()).collect();
    let others = names.into_iter().filter(|name| *name != "step");
    let columns: Vec<&str> = std::iter::once("step").chain(others).collect();
    let cell = |value: Option<&Value>| match value {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => format!("\"{}\"", text.replace('"', "\"\"")),
        Some(value) => value.to_string(),
    };
    let mut csv = columns.join(",") + "\n";
    for line in &lines {
        let cells: Vec<String> = columns.iter().map(|column| cell(line.get(*column))).collect();
        csv += &(cells.join(",") + "\n");
    }
    Ok(csv)
}

/// The model that the recipe of a run names; a folder of metrics alone has none.
fn model_of(recipe: &Path) -> Result<Option<String>> {
    if !recipe.is_file() {
        return Ok(None);
    }
    let document = Document::parse(recipe, &read_regular_text(recipe, LARGEST).at(recipe)?)?;
    Ok(Some(Plan::of(&Recipe::read(&document)?, "run").model.source))
}

impl Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        row(f, "run", self.path.display())?;
        if let Some(model) = &self.model {
            row(f, "model", model)?;
        }
        match self.steps {
            Some(steps) => row(f, "steps", format_args!("{} of {}", count(self.steps_made), count(steps)))?,
            None => row(f, "steps", count(self.steps_made))?,
        }
        row(f, "tokens", count(self.tokens))?;
        if let (Some(first), Some(last)) = (self.first_loss, self.last_loss) {
            row(f, "loss", format_args!("{first:.4} at first, {last:.4} at last"))?;
            row(f, "", sparkline(&self.losses))?;
        }
        if let (Some(first), Some(last)) = (self.evaluations.first(), self.evaluations.last()) {
            // Losses are finite: a run stops at the first that is not.
            let best =
                self.evaluations.iter().min_by(|x, y| x.eval_loss.total_cmp(&y.eval_loss)).unwrap_or(last);
            let (first, last) = (first.eval_loss, last.eval_loss);
            let best = format!("{:.4} at best after step {}", best.eval_loss, best.step);
            row(f, "eval loss", format_args!("{first:.4} at first, {last:.4} at last, {best}"))?;
            let losses: Vec<f64> = self.evaluations.iter().map(|evaluation| evaluation.eval_loss).collect();
            row(f, "", sparkline(&losses))?;
        }
        if let Some(speed) = self.tokens_per_second {
            row(f, "speed", format_args!("{} tokens/s", count(speed.round() as u64)))?;
        }
        if let Some(peak) = self.peak_rss_bytes {
            row(f, "peak memory", bytes(peak))?;
        }
        let checkpoints: Vec<String> = self.checkpoints.iter().map(u64::to_string).collect();
        row(f, "checkpoints", if checkpoints.is_empty() { "none".into() } else { checkpoints.join(", ") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_course_is_drawn_from_its_lowest_to_its_highest() {
        assert_eq!(sparkline(&[7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]), "█▇▆▅▄▃▂▁");
        assert_eq!(sparkline(&[1.0, 1.0]), "▁▁");
        assert_eq!(sparkline(&[]), "");
        let long: Vec<f64> = (0..1000).map(f64::from).collect();
        let drawn = sparkline(&long);
        assert!(drawn.chars().count() == 50 && drawn.starts_with('▁') && drawn.ends_with('█'), "{drawn}");
    }
}
