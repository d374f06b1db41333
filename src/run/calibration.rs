//! The calibration text of a conversion: read, and looked at for what would make the account misleading.

use std::path::Path;

use super::figures;
use crate::data::{self, Row, Source, load_for_perplexity};
use crate::error::{Context, Error, Result};
use crate::model::Pretrained;
use crate::recipe::{UpcyclePlan, name_of};
use crate::upcycle::{Calibration, Method, Origin, Refit, SplitShape, Text, WINDOW};

/// With fewer tokens for each expert than this, neither routers nor experts can be told from noise.
const TOKENS_OF_EXPERT: usize = 512;
/// Tokens for each neuron that a fit of down projections takes.
const TOKENS_OF_NEURON: usize = 8;

/// Text that is ready, and what to say of it.
pub(super) struct Read {
    pub(super) calibration: Calibration,
    pub(super) lines: Vec<String>,
    pub(super) warnings: Vec<String>,
    /// Whether any document went through the chat template.
    pub(super) is_templated: bool,
}

/// Reads the text of `plan` in the tokens of `text`; `slices` are those that are fitted to it.
pub(super) fn read(
    plan: &UpcyclePlan,
    base: &Pretrained,
    text: &data::Text,
    slices: Option<&SplitShape>,
) -> Result<Read> {
    let (seed, longest) = (plan.settings.seed, WINDOW.min(base.config().max_position_embeddings));
    refuse_same_files(plan)?;
    let (mut warnings, mut is_templated) = (Vec::new(), false);
    let mut load = |source: &Source| -> Result<Vec<Row>> {
        let (documents, counts) = load_for_perplexity(source, text, usize::MAX)?;
        is_templated |= counts.templated > 0;
        warnings.extend(counts.warnings(text).iter().map(ToString::to_string));
        Ok(documents)
    };
    let mut read: Vec<(Vec<Row>, f64)> = Vec::new();
    for source in &plan.data {
        read.push((load(source)?, source.weight));
    }
    let mut calibration = match read.is_empty() {
        true => Calibration::default(),
        false => Calibration::of(&read, (plan.tokens, plan.held_out), longest, seed)?,
    };
    for source in &plan.eval {
        let documents = load(source)?;
        // Files of one name in several folders are told apart by these.
        let is_namesake = |other: &&Source| other.path.file_name() == source.path.file_name();
        let name = match plan.eval.iter().filter(is_namesake).count() {
            1 => source.path.file_name().unwrap_or_default().to_string_lossy(),
            _ => source.path.to_string_lossy(),
        };
        calibration.report_on(&name, documents, plan.held_out, longest, seed)?;
    }
    warnings.extend(repetitions(&calibration)?);
    warnings.extend(calibration.measure_neutral(text, base.config().vocab_size, longest)?);
    let mut lines = Vec::new();
    if !read.is_empty() {
        lines.extend(counts(plan, &calibration));
        warnings.extend(shortages(plan, &calibration, slices));
    }
    Ok(Read { calibration, lines, warnings, is_templated })
}

/// Describes in lines how many tokens are fitted to and how many are held out.
fn counts(plan: &UpcyclePlan, calibration: &Calibration) -> Vec<String> {
    let count = |tokens: usize| figures::count(tokens as u64);
    let (fitted, held_out) = calibration.num_tokens();
    let of = match plan.data.as_slice() {
        [one] => format!(", all of `{}`", one.path.display()),
        many => format!(" of the same {} files", many.len()),
    };
    let mut lines = vec![format!(
        "calibration: {} tokens to learn from, {} held out{of}",
        count(fitted),
        count(held_out)
    )];
    for text in &calibration.further {
        let what = match text.origin {
            Origin::Neutral => "the built-in neutral text",
            Origin::File | Origin::HeldOut => text.file.as_deref().unwrap_or_default(),
        };
        lines.push(format!("measured on {} tokens of {what} too", count(text.num_tokens())));
    }
    lines
}

/// Where there is too little text, or of too few kinds, for what is made of it.
fn shortages(plan: &UpcyclePlan, calibration: &Calibration, slices: Option<&SplitShape>) -> Vec<String> {
    let settings = &plan.settings;
    let (tokens, _) = calibration.num_tokens();
    let mut warnings = Vec::new();
    if tokens < plan.tokens * 9 / 10 {
        warnings
            .push(format!("`calibration.tokens` asks for {} tokens, and the text has {tokens}", plan.tokens));
    }
    let Some(SplitShape { neurons, routed, active, .. }) = slices else { return warnings };
    if settings.method == Method::Split {
        let each = tokens * active / routed;
        if each < TOKENS_OF_EXPERT {
            warnings.push(format!(
                "{tokens} calibration tokens give each of {routed} experts about {each}, and {TOKENS_OF_EXPERT} are the least \
                 to tell experts apart by; raise `calibration.tokens` to {} or more",
                TOKENS_OF_EXPERT * routed / active
            ));
        }
        if settings.partition.takes_gradients() && plan.data.len() == 1 {
            let name = name_of(settings.partition);
            warnings.push(format!(
                "`upcycle.partition = \"{name}\"` makes an expert for each kind of text, and `calibration.data` names one \
                 file: unless it holds several kinds of text, name one file of each"
            ));
        } else if plan.data.len() == 1 && plan.eval.is_empty() {
            warnings.push(
                "`calibration.data` names one file and `calibration.eval` none: held-out text is like what is fitted, and \
                 only the built-in text tells what other text costs; name files of several kinds"
                    .to_string(),
            );
        }
    }
    if settings.refit != Refit::None && tokens < TOKENS_OF_NEURON * neurons {
        warnings.push(format!(
            "{tokens} calibration tokens are few to fit down projections of {neurons} neurons, which take {} or more; where a \
             fit does not help on text that was kept from it, the dense weights stay",
            TOKENS_OF_NEURON * neurons
        ));
    }
    warnings
}

/// Refuses text to measure on that was all fitted to, and warns of text that was for the most part.
fn repetitions(calibration: &Calibration) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    for text in calibration.texts() {
        let Text { repeated, file, .. } = text;
        let windows = text.num_windows();
        if 2 * repeated < windows {
            continue;
        }
        match file {
            Some(file) if *repeated == windows => {
                return Err(Error::request(format!(
                    "`{file}` of `calibration.eval`: all text that would be measured on is in the calibration text"
                ))
                .with_hint("what is learned from cannot be measured on; name a file of other text"));
            }
            Some(file) => warnings.push(format!(
                "{repeated} of {windows} windows of `{file}` are in the calibration text too: the loss there says little \
                 about other text"
            )),
            None => warnings.push(format!(
                "{repeated} of {windows} held-out windows are in the text that is fitted to, too: their loss says little \
                 about other text; remove repeated documents from `calibration.data`"
            )),
        }
    }
    Ok(warnings)
}

/// Refuses a file that is named twice, under whatever path, or twice there under two names.
fn refuse_same_files(plan: &UpcyclePlan) -> Result<()> {
    for (number, source) in plan.data.iter().enumerate() {
        for earlier in &plan.data[..number] {
            if is_same(&earlier.path, &source.path)? {
                return Err(Error::request(format!(
                    "`calibration.data` has the same file twice, `{}` and `{}`: its text would be held out and fitted to",
                    earlier.path.display(),
                    source.path.display()
                ))
                .with_hint("name it once, with a larger `weight` if it is to count more"));
            }
        }
    }
    for source in &plan.eval {
        for own in &plan.data {
            if is_same(&own.path, &source.path)? {
                return Err(Error::request(format!(
                    "`calibration.eval` has `{}`, which is `{}` of `calibration.data`",
                    source.path.display(),
                    own.path.display()
                ))
                .with_hint(
                    "what is learned from cannot be measured on; `held_out` keeps a part of each file out",
                ));
            }
        }
    }
    Ok(())
}

/// Whether two paths lead to the same file, or to files with the same bytes. A file that is not there is told of later.
fn is_same(one: &Path, other: &Path) -> Result<bool> {
    if one == other {
        return Ok(true);
    }
    let (Ok(first), Ok(second)) = (std::fs::metadata(one), std::fs::metadata(other)) else {
        return Ok(false);
    };
    if !first.is_file() || !second.is_file() || first.len() != second.len() {
        return Ok(false);
    }
    Ok(std::fs::read(one).at(one)? == std::fs::read(other).at(other)?)
}
