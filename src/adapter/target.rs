//! Which linear layers get an adapter, and of what rank and scale: the rules of PEFT, applied to the configuration of
//! a model before any weight is read.
//!
//! | key | a layer with path `p` |
//! |---|---|
//! | names | is one of them, or ends with a dot and one of them; `gate_proj` and the like name an expert's projections in every family |
//! | pattern | is matched as a whole |
//! | `all-linear` | is neither the output embedding nor a router nor the gate of a shared expert, which has one row |
//! | `exclude` | is out, whatever the targets say |
//! | `layers_to_transform` | has one of these numbers after its first `.name.` |
//! | `rank_pattern`, `alpha_pattern` | ends with what the pattern matches, at the start or after a dot; the first wins |

use fancy_regex::Regex;

use super::config::{Exclude, LoraConfig, Targets};
use super::patterns::Patterns;
use crate::error::{Error, Result, nearest};
use crate::model::config::{DecoderConfig, LinearConfig, MoeNames, Projection, Site};

/// An adapter on one linear layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Placement {
    /// The layer.
    pub linear: LinearConfig,
    /// Its number among all linear layers of the model in the order of their paths; does not depend on the targets.
    pub module: u64,
    /// Rows of A, columns of B.
    pub rank: usize,
    /// The numerator of the scale.
    pub alpha: f64,
    /// What `B A` is multiplied with.
    pub scale: f64,
}

/// Counts the layers that one target selects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetCount {
    /// The target as it was written.
    pub target: String,
    /// The number of layers that it matches, before `exclude` and the like take some away.
    pub matched: usize,
    /// The number of layers that it matches and that get an adapter.
    pub placed: usize,
}

/// The layers of a model that an adapter goes to.
#[derive(Debug, Clone, PartialEq)]
pub struct Placements {
    /// In the order of the forward pass.
    pub placements: Vec<Placement>,
    /// In the order of the targets.
    pub counts: Vec<TargetCount>,
    /// The paths of layers that are targeted and get no adapter, because `rank_pattern` gives them rank 0.
    pub without: Vec<String>,
    /// Names the modules of the model's experts and says how PEFT reads adapters on them; `None` for a dense model.
    pub names: Option<MoeNames>,
    /// The number of experts in a layer; 0 for a dense model.
    pub experts: usize,
    /// The end of the name of a router's weight here, and its end in transformers 5; `None` where both are the same.
    pub router: Option<(String, &'static str)>,
}

impl Placements {
    /// Numbers in all A and B (and biases of B) together.
    #[must_use]
    pub fn num_parameters(&self, lora_bias: bool) -> usize {
        let of = |p: &Placement| {
            let LinearConfig { in_features, out_features, .. } = p.linear;
            p.rank * (in_features + out_features) + if lora_bias { out_features } else { 0 }
        };
        self.placements.iter().map(of).sum()
    }
}

/// Finds the layers of `model` that a new adapter goes to. Layers of rank 0 get none.
///
/// Refuses what PEFT lets pass in silence: a target, an exclusion or a pattern that matches nothing, a layer that does
/// not exist, a rank larger than the layer. Refuses the output embedding too: the model computes with an adapter on any
/// other layer.
pub fn resolve(config: &LoraConfig, model: &DecoderConfig) -> Result<Placements> {
    config.validate()?;
    let resolved = place(config, model)?;
    if config.rank == 0 {
        return Ok(resolved);
    }
    let linears = model.linears();
    let unmatched =
        resolved.counts.iter().filter(|count| count.matched == 0).map(|count| count.target.as_str());
    some_match("targets", unmatched.collect(), &config.targets, &linears)?;
    if let Exclude::Names(names) = &config.exclude {
        let unmatched = names.iter().filter(|name| !linears.iter().any(|linear| names_linear(name, linear)));
        some_match("exclude", unmatched.map(String::as_str).collect(), &config.targets, &linears)?;
    }
    if let Some(layer) = config.layers_to_transform.iter().flatten().find(|l| **l >= model.layers.len()) {
        return Err(Error::request(format!(
            "`layers_to_transform` has {layer}, and the model has layers 0 to {}",
            model.layers.len().saturating_sub(1)
        )));
    }
    if resolved.placements.iter().any(|placement| placement.linear.projection == Projection::Head) {
        return Err(Error::request("an adapter on `lm_head` cannot be trained")
            .with_hint("leave `lm_head` out of `adapter.targets`"));
    }
    if resolved.placements.is_empty() {
        return Err(Error::request("the targets, less what is excluded, leave no layer to adapt"));
    }
    check_patterns_are_used(config, model)?;
    check_ranks(&resolved.placements)?;
    Ok(resolved)
}

/// Finds the layers that the adapter goes to. A target that matches nothing is no error, as in PEFT.
pub(super) fn place(config: &LoraConfig, model: &DecoderConfig) -> Result<Placements> {
    let rules = Rules::new(config)?;
    let linears = model.linears();
    let modules = module_numbers(&linears);
    let mut counts: Vec<TargetCount> = match &config.targets {
        Targets::Names(names) => names.clone(),
        Targets::Pattern(pattern) => vec![pattern.clone()],
        Targets::AllLinear => vec!["all-linear".to_string()],
    }
    .into_iter()
    .map(|target| TargetCount { target, matched: 0, placed: 0 })
    .collect();

    let (mut placements, mut without) = (Vec::new(), Vec::new());
    for (linear, module) in linears.into_iter().zip(modules) {
        let matching = rules.matching_targets(&linear)?;
        let rank = rules.ranks.first(&linear.path)?.unwrap_or(config.rank);
        let wanted = !matching.is_empty()
            && config.rank > 0
            && !rules.is_excluded(&linear)?
            && rules.is_in_layers(&linear.path)?;
        let placed = wanted && rank > 0;
        for index in matching {
            counts[index].matched += 1;
            counts[index].placed += usize::from(placed);
        }
        if placed {
            let alpha = rules.alphas.first(&linear.path)?.unwrap_or(config.alpha());
            placements.push(Placement { linear, module, rank, alpha, scale: config.scale(rank, alpha) });
        } else if wanted {
            without.push(linear.path);
        }
    }
    let first = model.sparse_layers().next().map(|(_, moe)| moe);
    let (names, experts) = (first.map(|moe| moe.names), first.map_or(0, |moe| moe.experts));
    let router =
        names.and_then(|names| Some((format!("{}.weight", names.router), names.router_in_transformers()?)));
    Ok(Placements { placements, counts, without, names, experts, router })
}

/// The settings with every pattern compiled.
struct Rules<'c> {
    config: &'c LoraConfig,
    target: Option<Regex>,
    exclude: Option<Regex>,
    layers: Vec<Regex>,
    ranks: FirstMatch<usize>,
    alphas: FirstMatch<f64>,
}

/// Refuses what is no regular expression, by the keys that `adapter_config.json` has.
pub(super) fn check_patterns(config: &LoraConfig) -> Result<()> {
    Rules::named(config, "target_modules", "exclude_modules").map(drop)
}

impl<'c> Rules<'c> {
    fn new(config: &'c LoraConfig) -> Result<Self> {
        Self::named(config, "targets", "exclude")
    }

    fn named(config: &'c LoraConfig, targets: &str, exclude: &str) -> Result<Self> {
        let target = match &config.targets {
            Targets::Pattern(pattern) => Some(compile(targets, pattern, |p| format!("^(?:{p})$"))?),
            _ => None,
        };
        let exclude = match &config.exclude {
            Exclude::Pattern(pattern) if !pattern.is_empty() => {
                Some(compile(exclude, pattern, |p| format!("^(?:{p})$"))?)
            }
            _ => None,
        };
        let layers = if config.layers_pattern.is_empty() {
            vec![compile("layers_pattern", r"[^.]*", |p| format!(r"^.*?\.{p}\.(?<index>\d+)\."))?]
        } else {
            let each = config.layers_pattern.iter();
            each.map(|p| compile("layers_pattern", p, |p| format!(r"^(?:|.*?\.){p}\.(?<index>\d+)\.")))
                .collect::<Result<_>>()?
        };
        let ranks = FirstMatch::new("rank_pattern", &config.rank_pattern)?;
        let alphas = FirstMatch::new("alpha_pattern", &config.alpha_pattern)?;
        Ok(Self { config, target, exclude, layers, ranks, alphas })
    }

    /// Indices of the targets that lead to this layer.
    fn matching_targets(&self, linear: &LinearConfig) -> Result<Vec<usize>> {
        Ok(match &self.config.targets {
            Targets::Names(names) => {
                names.iter().enumerate().filter(|(_, n)| names_linear(n, linear)).map(|(i, _)| i).collect()
            }
            Targets::Pattern(_) if matches(self.target.as_ref(), &linear.path)? => vec![0],
            Targets::AllLinear if !linear.projection.is_special() => {
                vec![0]
            }
            Targets::Pattern(_) | Targets::AllLinear => vec![],
        })
    }

    fn is_excluded(&self, linear: &LinearConfig) -> Result<bool> {
        match &self.config.exclude {
            Exclude::Names(names) => Ok(names.iter().any(|name| names_linear(name, linear))),
            Exclude::Pattern(_) => matches(self.exclude.as_ref(), &linear.path),
        }
    }

    fn is_in_layers(&self, path: &str) -> Result<bool> {
        // An empty list means no restriction, as in PEFT.
        let Some(wanted) = self.config.layers_to_transform.as_ref().filter(|wanted| !wanted.is_empty())
        else {
            return Ok(true);
        };
        for regex in &self.layers {
            let Some(found) = regex.captures(path).map_err(too_costly)? else { continue };
            let index = found.name("index").and_then(|digits| digits.as_str().parse().ok());
            return Ok(index.is_some_and(|index: usize| wanted.contains(&index)));
        }
        Ok(false)
    }
}

/// Patterns that match the end of a path, with their values. The first pattern that matches decides.
struct FirstMatch<T>(Vec<(Regex, T)>);

impl<T: Copy> FirstMatch<T> {
    fn new(key: &str, patterns: &Patterns<T>) -> Result<Self> {
        let each = patterns.iter();
        each.map(|(pattern, value)| Ok((compile(key, pattern, |p| format!(r"^(?:.*\.)?(?:{p})$"))?, *value)))
            .collect::<Result<_>>()
            .map(Self)
    }

    fn position(&self, path: &str) -> Result<Option<usize>> {
        for (index, (regex, _)) in self.0.iter().enumerate() {
            if regex.is_match(path).map_err(too_costly)? {
                return Ok(Some(index));
            }
        }
        Ok(None)
    }

    fn first(&self, path: &str) -> Result<Option<T>> {
        Ok(self.position(path)?.map(|index| self.0[index].1))
    }
}

/// Whether a name selects a layer. The name ends the layer's path, or is the common name of an expert's projection, such as
/// `gate_proj`.
fn names_linear(name: &str, linear: &LinearConfig) -> bool {
    let is_expert = matches!(linear.site, Site::Expert(_));
    is_named(&linear.path, name) || (is_expert && linear.projection.name() == name)
}

pub(super) fn is_named(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

fn matches(regex: Option<&Regex>, path: &str) -> Result<bool> {
    regex.map_or(Ok(false), |regex| regex.is_match(path).map_err(too_costly))
}

/// Compiles `pattern` inside the text that `around` adds. It is compiled alone first, so that an error counts positions in
/// the pattern as it was written.
fn compile(key: &str, pattern: &str, around: impl Fn(&str) -> String) -> Result<Regex> {
    Regex::new(pattern).and_then(|_| Regex::new(&around(pattern))).map_err(|error| {
        let what = match &error {
            fancy_regex::Error::ParseError(position, what) => format!("at position {position}: {what}"),
            other => other.to_string(),
        };
        Error::request(format!("`{key}` has the invalid regular expression `{pattern}`, {what}"))
    })
}

/// The alpha of a module or parameter at this path.
pub(super) fn alpha_at(config: &LoraConfig, path: &str) -> Result<f64> {
    let alphas = FirstMatch::new("alpha_pattern", &config.alpha_pattern)?;
    Ok(alphas.first(path)?.unwrap_or(config.alpha()))
}

fn too_costly(error: fancy_regex::Error) -> Error {
    Error::request(format!("a regular expression takes too long to match: {error}"))
}

/// The place of each linear in the order of paths.
fn module_numbers(linears: &[LinearConfig]) -> Vec<u64> {
    let mut order: Vec<usize> = (0..linears.len()).collect();
    order.sort_by(|x, y| linears[*x].path.cmp(&linears[*y].path));
    let mut numbers = vec![0; linears.len()];
    for (number, index) in order.into_iter().enumerate() {
        numbers[index] = number as u64;
    }
    numbers
}

/// Refuses the targets or exclusions that match nothing. The head, which cannot be trained, is not proposed.
fn some_match(key: &str, unmatched: Vec<&str>, targets: &Targets, linears: &[LinearConfig]) -> Result<()> {
    let Some(first) = unmatched.first() else { return Ok(()) };
    let verb = if unmatched.len() == 1 { "matches" } else { "match" };
    let error = Error::request(format!(
        "`{}` in `{key}` {verb} no linear layer of the model",
        unmatched.join("`, `")
    ));
    let trained = linears.iter().filter(|linear| linear.projection != Projection::Head);
    let kinds = kinds(trained.clone());
    if let Targets::Pattern(pattern) = targets
        && pattern == first
    {
        return Err(error.with_hint(format!(
            "a string is a regular expression for a whole path such as `{}`; names go into a list: [\"{}\"]",
            linears.first().map_or("", |linear| linear.path.as_str()),
            nearest(first, kinds.iter().copied(), 1).first().unwrap_or(&"q_proj"),
        )));
    }
    let mut near: Vec<&str> = Vec::new();
    for name in &unmatched {
        near.extend(match name.contains('.') {
            true => nearest(name, trained.clone().map(|linear| linear.path.as_str()), 3),
            false => nearest(name, kinds.iter().copied(), 3),
        });
    }
    let mut seen = std::collections::BTreeSet::new();
    near.retain(|name| seen.insert(*name));
    let (title, names) = if near.is_empty() { ("the model has", kinds) } else { ("nearest are", near) };
    Err(error.with_hint(format!("{title} `{}`", names.join("`, `"))))
}

/// The distinct last parts of paths, in order of appearance.
fn kinds<'l>(linears: impl Iterator<Item = &'l LinearConfig>) -> Vec<&'l str> {
    let mut kinds = Vec::new();
    for linear in linears {
        if !kinds.contains(&linear.name()) {
            kinds.push(linear.name());
        }
    }
    kinds
}

fn check_patterns_are_used(config: &LoraConfig, model: &DecoderConfig) -> Result<()> {
    let rules = Rules::new(config)?;
    let (mut ranks, mut alphas) =
        (vec![false; config.rank_pattern.0.len()], vec![false; config.alpha_pattern.0.len()]);
    for linear in model.linears() {
        if rules.matching_targets(&linear)?.is_empty() {
            continue;
        }
        if let Some(index) = rules.ranks.position(&linear.path)? {
            ranks[index] = true;
        }
        if let Some(index) = rules.alphas.position(&linear.path)? {
            alphas[index] = true;
        }
    }
    let rank_keys = config.rank_pattern.iter().map(|(key, _)| ("rank_pattern", key)).zip(ranks);
    let alpha_keys = config.alpha_pattern.iter().map(|(key, _)| ("alpha_pattern", key)).zip(alphas);
    match rank_keys.chain(alpha_keys).find(|(_, used)| !used) {
        None => Ok(()),
        Some(((table, key), _)) => Err(Error::request(format!(
            "`{key}` in `{table}` matches no target, or only those that an earlier pattern matches"
        ))),
    }
}

fn check_ranks(placements: &[Placement]) -> Result<()> {
    let too_large: Vec<String> = placements
        .iter()
        .filter(|p| p.rank > p.linear.in_features.min(p.linear.out_features))
        .map(|p| {
            let LinearConfig { path, in_features, out_features, .. } = &p.linear;
            format!("`{path}` is [{out_features}, {in_features}] and its rank {}", p.rank)
        })
        .collect();
    if too_large.is_empty() {
        return Ok(());
    }
    Err(Error::request(format!("rank larger than a dimension of the weight: {}", few(&too_large)))
        .with_hint("choose a smaller `adapter.rank`, or leave these layers out of `adapter.targets`"))
}

/// Lists the first few of many texts and says how many more there are.
pub(super) fn few(all: &[String]) -> String {
    const MOST: usize = 8;
    let shown = all[..all.len().min(MOST)].join("; ");
    if all.len() > MOST { format!("{shown}; and {} more", all.len() - MOST) } else { shown }
}
