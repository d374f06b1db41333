//! How a mixture of experts spreads its tokens, as `peft eval routing` and the end of a run tell it.

use std::io::Read;
use std::path::Path;

use crate::error::{Context, Error, Result, is_there, open_regular};
use crate::eval::{heatmap, routing};
use crate::model::Spread;
use crate::weights::output::{refuse_below_file, refuse_unexpanded, refuse_unwritable};
use crate::weights::write_atomic;

use super::Eval;
use super::models::{open, rows};
use super::terminal::Terminal;
use crate::data::eval_batches;

/// Columns of the numbers before the load.
const BEFORE: usize = 32;
/// Columns of the load.
const LOAD: usize = 48;
/// More experts than this are told by blocks, not by numbers.
const NUMBERED: usize = 8;

pub(super) fn eval(arguments: &Eval, terminal: &mut Terminal) -> Result<()> {
    if let Some(path) = &arguments.svg {
        refuse_unexpanded(path)?;
        refuse_below_file(path)?;
        refuse_other_file(path)?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        refuse_unwritable(folder.unwrap_or(Path::new("."))).at(path)?;
    }
    let loaded = open(&arguments.model, terminal)?;
    let rows = rows(&arguments.data, arguments.max_length, &loaded, terminal)?;
    let spreads = routing(&loaded.model, &eval_batches(&rows, super::models::EVAL_TOKENS))?;
    if let Some(path) = &arguments.svg {
        write_atomic(path, heatmap(&spreads).as_bytes())?;
        terminal.say(format_args!("wrote {}", path.display()));
    }
    if arguments.json {
        let tokens: usize = rows.iter().map(|row| row.tokens.len()).sum();
        return terminal.write_json(&serde_json::json!({ "tokens": tokens, "layers": spreads }));
    }
    terminal.write(format_args!("{}\n", table(&spreads)))
}

/// Refuses to write over a file that is no picture: a slip of the pen could name the data or the model.
fn refuse_other_file(path: &Path) -> Result<()> {
    if !is_there(path) {
        return Ok(());
    }
    let is_picture = open_regular(path).ok().is_some_and(|file| {
        let mut first = Vec::new();
        file.take(4).read_to_end(&mut first).is_ok() && first == b"<svg"
    });
    match is_picture {
        true => Ok(()),
        false => Err(Error::request(format!("`{}` is there and is no SVG picture", path.display()))
            .with_hint("name a new file for `--svg`")),
    }
}

/// A line per layer, of at most 80 columns; where there are many experts, more.
pub(super) fn table(spreads: &[Spread]) -> String {
    let experts = spreads.iter().map(|spread| spread.load.len()).max().unwrap_or(0);
    let head = if experts <= NUMBERED {
        "load of each expert, %"
    } else {
        "load of each expert: ▄ equal, █ twice, · dead"
    };
    let mut table = format!("layer  entropy  max/mean  dead  {head}");
    for Spread { layer, load, entropy, max_over_mean, dead, .. } in spreads {
        let numbers = format!("{layer:>5}  {entropy:>7.3}  {max_over_mean:>8.2}  {dead:>4}  ");
        let mut before = numbers;
        for line in lines(load) {
            table += &format!("\n{before}{line}");
            before = " ".repeat(BEFORE);
        }
    }
    table
}

fn lines(load: &[f64]) -> Vec<String> {
    if load.len() <= NUMBERED {
        let shares: Vec<String> = load.iter().map(|share| format!("{:>5.1}", 100.0 * share)).collect();
        return vec![shares.join(" ")];
    }
    let blocks: Vec<char> = load.iter().map(|share| block(share * load.len() as f64)).collect();
    blocks.chunks(LOAD).map(|line| line.iter().collect()).collect()
}

/// A share `times` an equal one.
fn block(times: f64) -> char {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    if times < 0.1 {
        return '·';
    }
    BLOCKS[((4.0 * times).round() as usize).clamp(1, 8) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_experts_have_numbers() {
        let spreads = [Spread::of(0, &[2; 8], 0), Spread::of(11, &[90, 10, 0, 0, 0, 0, 0, 0], 0)];
        insta::assert_snapshot!(table(&spreads), @"
        layer  entropy  max/mean  dead  load of each expert, %
            0    1.000      1.00     0   12.5  12.5  12.5  12.5  12.5  12.5  12.5  12.5
           11    0.156      7.20     6   90.0  10.0   0.0   0.0   0.0   0.0   0.0   0.0
        ");
    }

    #[test]
    fn many_experts_have_blocks() {
        let counts: Vec<u64> = (0..60).map(|expert| expert % 9).collect();
        insta::assert_snapshot!(table(&[Spread::of(3, &counts, 0)]), @"
        layer  entropy  max/mean  dead  load of each expert: ▄ equal, █ twice, · dead
            3    0.934      2.08     7  ·▁▂▃▄▅▆▇█·▁▂▃▄▅▆▇█·▁▂▃▄▅▆▇█·▁▂▃▄▅▆▇█·▁▂▃▄▅▆▇█·▁▂
                                        ▃▄▅▆▇█·▁▂▃▄▅
        ");
    }

    #[test]
    fn tables_fit_into_eighty_columns() {
        for experts in [1, 8, 9, 48, 512] {
            let spread = Spread::of(99, &vec![1; experts], 0);
            let widest = table(&[spread]).lines().map(|line| line.chars().count()).max().unwrap();
            assert!(widest <= 80, "{experts}: {widest}");
        }
    }
}
