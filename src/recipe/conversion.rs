//! A conversion, from plan to folder: everything that can be known before weights are read, then the run.

use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use super::choice::DtypeChoice;
use super::distill::refuse_other_tokens;
use super::figures;
use super::prepared::{TRAINING_DATE, text_of};
use super::upcycle::UpcyclePlan;
use crate::data::{Row, Source, load_for_perplexity};
use crate::error::{Error, Result};
use crate::model::Pretrained;
use crate::model::family::MixtureFormat;
use crate::upcycle::{
    self, Calibration, Event, Job, Method, Refit, Report, Settings, SplitShape, choose_format, dense_network,
};
use crate::weights::refuse_occupied;

/// What is known of a conversion before it begins.
#[derive(Debug, Clone, Serialize)]
pub struct UpcycleCheck {
    /// The plan in lines of text, as the conversion says it.
    pub lines: Vec<String>,
    /// The resolved recipe, as TOML.
    pub recipe: String,
    /// The family that will be written; `None`: the dense model's own.
    pub format: Option<MixtureFormat>,
    /// Neurons of an expert.
    pub expert_width: usize,
    /// Tokens to learn from and to measure on that there are.
    pub tokens: (usize, usize),
    /// What to look at before starting.
    pub warnings: Vec<String>,
}

/// A conversion that is ready to load weights.
struct Prepared {
    base: Pretrained,
    sources: Vec<Pretrained>,
    prompts: Vec<Vec<Vec<u32>>>,
    calibration: Calibration,
    check: UpcycleCheck,
}

impl Prepared {
    fn of(plan: &UpcyclePlan) -> Result<Self> {
        refuse_base(&plan.model.source, &plan.output)?;
        refuse_occupied(&plan.output)?;
        let base = Pretrained::open(&plan.model.source)?;
        base.check()?;
        base.check_companions()?;
        let text = text_of(&base, Some(TRAINING_DATE))?;
        let Settings { method, shared, active, .. } = plan.settings;
        let (neurons, network) = network_of(&base, method)?;
        let mut lines =
            vec![format!("model {}: {} layers of {network}", base.name(), base.config().layers.len())];
        let (mut format, mut width, mut warnings) = (None, neurons, Vec::new());
        if method.cuts() {
            let shape = SplitShape::of(&plan.settings, base.config())?;
            width = shape.width;
            lines.push(format!(
                "{} slices of {width} neurons: {shared} shared, {active} of {} routed per token, {:.0}% of the neurons",
                shape.shared + shape.routed,
                shape.routed,
                100.0 * shape.active_width() as f64 / neurons as f64
            ));
            let padding = width * (shape.shared + shape.routed) - neurons;
            if padding > 0 {
                lines.push(format!("the last slices are filled up with {padding} neurons of zeros"));
            }
            if method == Method::Split {
                format = Some(choose_format(plan.settings.format, base.config(), &shape.mixture())?);
            }
        }
        if let Some(format) = format {
            lines.push(format!("written as `{}`", format.name()));
            let when =
                if plan.settings.refit == Refit::None { "" } else { "before down projections are fitted, " };
            lines.push(format!("promise: {when}with all experts on it is the dense model"));
            if !format.has_selection_bias() && method == Method::Split {
                warnings.push(format!(
                    "`{}` has no bias for the choice of experts: the router goes without, which costs a little",
                    format.name()
                ));
            }
        }
        if method == Method::Expand {
            lines.push(format!(
                "{} experts more in each layer, copies of those that the calibration text goes to most",
                plan.settings.experts
            ));
        }
        let sources: Vec<Pretrained> =
            plan.sources.iter().map(|source| Pretrained::open(source)).collect::<Result<_>>()?;
        for source in &sources {
            refuse_other_tokens(source, "source", text.tokenizer())?;
        }
        let encode =
            |prompts: &Vec<String>| prompts.iter().map(|prompt| text.encode_document(prompt)).collect();
        let prompts: Vec<Vec<Vec<u32>>> = plan.prompts.iter().map(encode).collect::<Result<_>>()?;
        let mut read: Vec<(Vec<Row>, f64)> = Vec::new();
        for source in &plan.data {
            read.push((load_for_perplexity(source, &text, usize::MAX)?.0, source.weight));
        }
        let mut calibration = match read.is_empty() {
            true => Calibration::default(),
            false => Calibration::of(&read, plan.tokens, plan.held_out, plan.settings.seed)?,
        };
        for source in &plan.eval {
            let documents = load_for_perplexity(source, &text, usize::MAX)?.0;
            // Files of one name in several folders are told apart by these.
            let is_namesake = |other: &&Source| other.path.file_name() == source.path.file_name();
            let name = match plan.eval.iter().filter(is_namesake).count() {
                1 => source.path.file_name().unwrap_or_default().to_string_lossy(),
                _ => source.path.to_string_lossy(),
            };
            calibration.report_on(&name, documents, plan.held_out, plan.settings.seed)?;
        }
        let tokens = calibration.num_tokens();
        if !read.is_empty() {
            lines.push(format!(
                "calibration: {} tokens to learn from, {} held out",
                figures::count(tokens.0 as u64),
                figures::count(tokens.1 as u64)
            ));
            for further in &calibration.further {
                let count: usize = further.windows.iter().map(|batch| batch.tokens.len()).sum();
                let file = further.file.as_deref().unwrap_or_default();
                lines.push(format!("measured on {} tokens of {file} too", figures::count(count as u64)));
            }
            if tokens.0 < plan.tokens * 9 / 10 {
                warnings.push(format!(
                    "`calibration.tokens` asks for {} tokens, and the text has {}",
                    plan.tokens, tokens.0
                ));
            }
            if plan.settings.refit != Refit::None && tokens.0 < 8 * neurons {
                warnings.push(format!(
                    "{} tokens are few to fit {neurons} neurons to; fits that do not help are left out",
                    tokens.0
                ));
            }
        }
        let check =
            UpcycleCheck { lines, recipe: plan.to_toml()?, format, expert_width: width, tokens, warnings };
        Ok(Self { base, sources, prompts, calibration, check })
    }
}

/// The neurons of each network, and what it is called.
fn network_of(base: &Pretrained, method: Method) -> Result<(usize, String)> {
    if method != Method::Expand {
        let (neurons, _) = dense_network(base.config())?;
        return Ok((neurons, format!("{neurons} neurons")));
    }
    let Some((_, moe)) = base.config().sparse_layers().next() else {
        return Err(Error::request(format!("`{}` is not a mixture of experts", base.name()))
            .with_hint("`upcycle.method = \"copy\"` or `\"split\"` makes one of a dense model"));
    };
    Ok((moe.width, format!("{} experts of {} neurons, {} active", moe.experts, moe.width, moe.active)))
}

/// Opens what `plan` names, except weights, and reports on it.
pub fn check_upcycle(plan: &UpcyclePlan) -> Result<UpcycleCheck> {
    Ok(Prepared::of(plan)?.check)
}

/// Converts as `plan` says. `say` gets lines of text and progress; an error from it ends the conversion.
pub fn upcycle(
    plan: &UpcyclePlan,
    say: &mut dyn FnMut(Event) -> Result<()>,
    warn: &mut dyn FnMut(&str),
) -> Result<Report> {
    let begun = Instant::now();
    let Prepared { base, sources, prompts, calibration, check } = Prepared::of(plan)?;
    for line in check.lines {
        say(Event::note(line))?;
    }
    check.warnings.iter().for_each(|warning| warn(warning));
    let dtype = match plan.model.dtype {
        // Statistics are sums of squares, and what is fitted has to be better than what is rounded away.
        DtypeChoice::Auto => candle_core::DType::F32,
        chosen => chosen.of(&base),
    };
    let job = Job {
        base: &base,
        sources: &sources,
        prompts: &prompts,
        calibration: &calibration,
        dtype,
        output: &plan.output,
        files: &[("recipe.toml".to_string(), check.recipe)],
    };
    let report = upcycle::upcycle(&job, &plan.settings, say)?;
    for line in report.lines() {
        say(Event::note(line))?;
    }
    say(Event::End { path: plan.output.clone(), seconds: begun.elapsed().as_secs_f64() })?;
    Ok(report)
}

fn refuse_base(source: &str, output: &Path) -> Result<()> {
    match (std::fs::canonicalize(source), std::fs::canonicalize(output)) {
        (Ok(source), Ok(target)) if source == target => {
            Err(Error::request(format!("the output `{}` is the model that is converted", output.display()))
                .with_hint("choose another folder with `--output`; the model is never changed"))
        }
        _ => Ok(()),
    }
}
