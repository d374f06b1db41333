//! A conversion, from plan to folder: everything that can be known before weights are read, then the run.

use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use super::calibration;
use super::kernels::ChosenKernels;
use super::teacher::refuse_other_tokens;
use super::told::Told;
use crate::data::Text;
use crate::error::{Error, Result};
use crate::model::Pretrained;
use crate::model::family::MixtureFormat;
use crate::recipe::{DtypeChoice, TemplateVariables, UpcyclePlan};
use crate::upcycle::{
    self, Calibration, Event, Job, Method, Outline, Refit, Report, RouterKind, Settings, SplitShape,
    dense_network,
};
use crate::weights::output::{new_folder, refuse_full_disk};

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
        new_folder(&plan.output)?;
        let base = Pretrained::open(&plan.model.source)?;
        base.check()?;
        base.check_companions()?;
        let told = Told::by_records(&base.text()?, None, TemplateVariables::fixed())?;
        let text = told.text(&base)?;
        refuse_same_checkpoints(plan)?;
        let sources: Vec<Pretrained> =
            plan.sources.iter().map(|source| Pretrained::open(source)).collect::<Result<_>>()?;
        for source in &sources {
            refuse_other_tokens(source, "source", text.tokenizer())?;
        }
        let outline = Outline::of(&base, &sources, &plan.settings)?;
        let mut lines = described(&base, plan, &outline)?;
        lines.push(ChosenKernels::of(base.config())?.to_string());
        let mut warnings = warnings_of(plan, &outline);
        warnings.extend(sources.iter().chain([&base]).flat_map(Pretrained::warnings).cloned());
        let prompts = encoded(&plan.prompts, &text, base.config().max_position_embeddings)?;
        let read = calibration::read(plan, &base, &text, outline.slices.as_ref())?;
        let Settings { method, experts, router, .. } = plan.settings;
        if router == RouterKind::HiddenKmeans && !method.cuts() {
            read.calibration.refuse_fewer_windows(experts)?;
        }
        lines.extend(read.lines);
        if read.is_templated {
            lines.extend(told.read_by(&text).map(|told| format!("template: told {told}")));
        }
        warnings.extend(read.warnings);
        let check = UpcycleCheck {
            lines,
            recipe: plan.to_toml()?,
            format: outline.format,
            expert_width: outline.width,
            tokens: read.calibration.num_tokens(),
            warnings,
        };
        refuse_full_disk(&plan.output, outline.bytes)?;
        Ok(Self { base, sources, prompts, calibration: read.calibration, check })
    }
}

/// Describes in lines the model and what will be made of it.
fn described(base: &Pretrained, plan: &UpcyclePlan, outline: &Outline) -> Result<Vec<String>> {
    let Settings { method, experts, refit, .. } = plan.settings;
    let (neurons, network) = network_of(base, method)?;
    let mut lines =
        vec![format!("model {}: {} layers of {network}", base.name(), base.config().layers.len())];
    if let Some(SplitShape { width, shared, routed, active, .. }) = outline.slices {
        let share = (100 * (shared + active) * width).min(100 * neurons) as f64 / neurons as f64;
        lines.push(format!(
            "{} slices of {width} neurons: {shared} shared, {active} of {routed} routed per token, {share:.0}% of the neurons",
            shared + routed
        ));
        let padding = width * (shared + routed) - neurons;
        if padding > 0 {
            lines.push(format!("the last slices are filled up with {padding} neurons of zeros"));
        }
    }
    lines.extend(outline.format.map(|format| format!("written as `{}`", format.name())));
    lines.extend(outline.untied.map(|untied| untied.line()));
    match method {
        Method::Split => {
            let when = if refit == Refit::None { "" } else { " before down projections are fitted" };
            lines.push(format!("checked when it is read back: with all experts on it is the dense model{when}"));
        }
        Method::Expand => lines.push(format!(
            "each layer gets {experts} new experts, copies of those that most calibration tokens are routed to"
        )),
        _ => {}
    }
    Ok(lines)
}

/// Returns warnings about the settings before the conversion begins.
fn warnings_of(plan: &UpcyclePlan, outline: &Outline) -> Vec<String> {
    let Settings { method, experts, active, router, verify, .. } = plan.settings;
    let mut warnings = Vec::new();
    if let Some(format) =
        outline.format.filter(|format| method == Method::Split && !format.has_selection_bias())
    {
        warnings.push(format!(
            "`{}` stores no bias for the choice of experts, so the router is fitted without one, which makes its choices a \
             little worse",
            format.name()
        ));
    }
    let is_copies = !method.cuts() && method != Method::Expand;
    if is_copies && active == experts {
        warnings.push(format!(
            "`upcycle.active` is {active}, as many as there are experts: every token goes through all of them, and the \
             router has nothing to choose"
        ));
    }
    if is_copies && !plan.data.is_empty() && router != RouterKind::HiddenKmeans && !verify {
        warnings.push(
            "`calibration` is not used: only `upcycle.router = \"hidden-kmeans\"` and `upcycle.verify` read text for copies"
                .to_string(),
        );
    }
    warnings
}

/// The tokens of the prompts of each expert.
fn encoded(prompts: &[Vec<String>], text: &Text, most: usize) -> Result<Vec<Vec<Vec<u32>>>> {
    let encode = |(expert, list): (usize, &Vec<String>)| -> Result<Vec<Vec<u32>>> {
        let one = |(number, prompt): (usize, &String)| {
            let tokens = text.encode_document(prompt)?;
            if (1..=most).contains(&tokens.len()) {
                return Ok(tokens);
            }
            let found = tokens.len();
            Err(Error::request(format!(
                "`upcycle.prompts[{expert}][{number}]` has {found} tokens, expected 1 to {most}, which the model sees"
            )))
        };
        list.iter().enumerate().map(one).collect()
    };
    prompts.iter().enumerate().map(encode).collect()
}

/// The neurons of each network, and what it is called.
fn network_of(base: &Pretrained, method: Method) -> Result<(usize, String)> {
    if method == Method::Expand
        && let Some((_, moe)) = base.config().sparse_layers().next()
    {
        return Ok((
            moe.width,
            format!("{} experts of {} neurons, {} active", moe.experts, moe.width, moe.active),
        ));
    }
    let (neurons, _) = dense_network(base.config())?;
    Ok((neurons, format!("{neurons} neurons")))
}

/// An error if a checkpoint of a mix is another one under another name.
fn refuse_same_checkpoints(plan: &UpcyclePlan) -> Result<()> {
    let all: Vec<&String> = std::iter::once(&plan.model.source).chain(&plan.sources).collect();
    let real: Vec<_> = all.iter().map(|source| std::fs::canonicalize(source).ok()).collect();
    let same = |one: usize, other: usize| {
        all[one] == all[other] || (real[one].is_some() && real[one] == real[other])
    };
    for other in 1..all.len() {
        if let Some(one) = (0..other).find(|one| same(*one, other)) {
            return Err(Error::request(format!(
                "`upcycle.sources` has `{}`, which is `{}` once more",
                all[other], all[one]
            ))
            .with_hint("two experts would be the same; name each checkpoint once"));
        }
    }
    Ok(())
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
    for line in &check.lines {
        say(Event::note(line.as_str()))?;
    }
    check.warnings.iter().for_each(|warning| warn(warning));
    let dtype = match plan.model.dtype {
        // Statistics are sums of squares, and what is fitted has to be better than what is rounded away.
        DtypeChoice::Auto => candle_core::DType::F32,
        chosen => chosen.or(base.compute_dtype()),
    };
    let job = Job {
        base: &base,
        sources: &sources,
        prompts: &prompts,
        calibration: &calibration,
        dtype,
        output: &plan.output,
        files: &[("recipe.toml".to_string(), check.recipe)],
        warnings: &check.warnings,
    };
    let report = upcycle::upcycle(&job, &plan.settings, say)?;
    // Those that were known before have been told.
    report.warnings.iter().skip(check.warnings.len()).for_each(|warning| warn(warning));
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
