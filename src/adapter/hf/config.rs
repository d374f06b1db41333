//! `adapter_config.json`: what of PEFT's `LoraConfig` is applied, what is ignored because it changes nothing here, and
//! what is refused because it changes the mathematics.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::super::config::{Exclude, Init, LoraConfig, Targets};
use super::super::target::{Placements, check_patterns, few, is_named};
use super::fields::{Fields, NamesOrText, is_neutral, number};
use super::{MERGED_FORM, Provenance, experts};
use crate::error::{Context, Error, Json, Result, first_lines, read_regular_text};

/// Larger configurations are refused. One that lists all modules of a large mixture has a few hundred kilobytes.
const LARGEST: u64 = 16 << 20;

/// Adapters with a larger alpha are refused: nobody sets one but by mistake or as an attack.
const LARGEST_ALPHA: f64 = 1e6;

/// Keys that say nothing about the values computed.
const IGNORED: [&str; 15] = [
    "auto_mapping",
    "inference_mode",
    "task_type",
    "runtime_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "megatron_core",
    "qalora_group_size",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "_name_or_path",
    "merge_weights",
];

/// Keys that change the mathematics when set, and what they stand for.
const REFUSED: [(&str, &str); 14] = [
    ("use_dora", "DoRA"),
    ("use_qalora", "QALoRA"),
    ("use_bdlora", "block-diagonal LoRA"),
    ("alora_invocation_tokens", "activated LoRA"),
    ("monteclora_config", "MonteCLoRA"),
    ("kasa_config", "KaSA"),
    ("arrow_config", "Arrow"),
    ("layer_replication", "replicated layers"),
    ("megatron_config", "Megatron layers"),
    ("modules_to_save", "whole trained modules"),
    ("target_parameters", "adapters on fused parameters"),
    ("trainable_token_indices", "trained embedding rows"),
    ("enable_lora", "merged projections"),
    ("layer_indexes", "a choice of layers by another tool"),
];

/// Initialisations after which the adapter belongs to changed base weights.
const CHANGE_THE_BASE: [&str; 6] = ["pissa", "olora", "corda", "lora_ga", "loftq", "kasa"];

const CHANGED_BASE: &str = "the adapter belongs to base weights that were changed";
const NOT_BUILT: &str = "not built yet";
const PLAIN_FORM: &str = "save it again from PEFT with `save_pretrained(.., path_initial_model_for_weight_conversion=..)`, \
     which makes a plain LoRA of it";

/// What the file says.
pub(super) struct Read {
    pub(super) config: LoraConfig,
    pub(super) base_model: Option<String>,
    pub(super) revision: Option<String>,
    pub(super) warnings: Vec<String>,
    /// The values of `target_parameters`. Whether they are true shows in the tensors of the file.
    pub(super) parameters: Vec<String>,
    /// The version of PEFT that wrote it.
    pub(super) peft_version: Option<String>,
}

/// Reads and checks the file.
pub(super) fn read(path: &Path) -> Result<Read> {
    parse(&read_regular_text(path, LARGEST).at(path)?).at(path)
}

fn parse(text: &str) -> Result<Read> {
    let json: Json = serde_json::from_str(text)?;
    let repeated = json.warning().map(|warning| format!("in the adapter's configuration {warning}"));
    let Value::Object(map) = json.value else {
        return Err(Error::invalid("is not a JSON object"));
    };
    let mut fields = Fields::new(map);
    match fields.take("peft_type") {
        Some(Value::String(kind)) if kind.eq_ignore_ascii_case("lora") => {}
        Some(kind) => {
            return Err(Error::invalid(format!("`peft_type` is {kind}, and only \"LORA\" is supported")));
        }
        None => return Err(Error::invalid("has no `peft_type`, expected \"LORA\"")),
    }
    let peft_version = fields.text("peft_version");
    let parameters = fields.parameters();
    fields.forget_routers();
    fields.refuse_unsupported();
    let init = fields.init();
    let targets = fields.targets();
    let config = LoraConfig {
        rank: fields.rank(),
        alpha: Some(fields.alpha()),
        dropout: fields.dropout(),
        targets,
        exclude: match fields.names_or_text("exclude_modules") {
            None => Exclude::default(),
            Some(NamesOrText::Names(names)) => Exclude::Names(names),
            Some(NamesOrText::Text(pattern)) => Exclude::Pattern(pattern),
        },
        rank_pattern: fields.patterns("rank_pattern", "a whole number above 0 and at most 65536", rank_of),
        alpha_pattern: fields.patterns("alpha_pattern", "a number of at most 1e6", |value| {
            value.as_f64().filter(|alpha| alpha.abs() <= LARGEST_ALPHA)
        }),
        layers_to_transform: fields.layers(),
        layers_pattern: match fields.names_or_text("layers_pattern") {
            None => Vec::new(),
            Some(NamesOrText::Names(names)) => names,
            Some(NamesOrText::Text(text)) if text.is_empty() => Vec::new(),
            Some(NamesOrText::Text(text)) => vec![text],
        },
        lora_bias: fields.flag("lora_bias"),
        init,
        rslora: fields.flag("use_rslora"),
        ..LoraConfig::default()
    };
    if let Err(error) = check_patterns(&config) {
        fields.problems.push(error.to_string());
    }
    let base_model = fields.text("base_model_name_or_path");
    let revision = fields.text("revision");
    let warnings = repeated.into_iter().chain(fields.leftovers()).collect();
    if !fields.problems.is_empty() {
        let error = Error::invalid(few(&fields.problems));
        let any_ends = |end: &str| fields.problems.iter().any(|problem| problem.ends_with(end));
        return Err(match (any_ends(CHANGED_BASE), any_ends(NOT_BUILT)) {
            (true, _) => error.with_hint(PLAIN_FORM),
            (false, true) => error.with_hint(MERGED_FORM),
            (false, false) => error,
        });
    }
    Ok(Read { config, base_model, revision, warnings, parameters, peft_version })
}

/// A rank that a layer can have.
fn rank_of(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|rank| usize::try_from(rank).ok()).filter(|rank| (1..=65_536).contains(rank))
}

impl Fields {
    fn targets(&mut self) -> Targets {
        match self.names_or_text("target_modules") {
            // What PEFT falls back to for every family that is read here.
            None => Targets::names(["q_proj", "v_proj"]),
            Some(NamesOrText::Names(names)) => Targets::Names(names),
            Some(NamesOrText::Text(text)) if text.eq_ignore_ascii_case("all-linear") => Targets::AllLinear,
            Some(NamesOrText::Text(pattern)) => {
                if ["layers_to_transform", "layers_pattern"]
                    .iter()
                    .any(|key| self.map.get(*key).is_some_and(|value| !value.is_null()))
                {
                    self.problems.push(
                        "`layers_to_transform` and `layers_pattern` do not go with a regular expression as target"
                            .to_string(),
                    );
                }
                Targets::Pattern(pattern)
            }
        }
    }

    fn rank(&mut self) -> usize {
        let Some(value) = self.take("r") else { return 8 };
        rank_of(&value).unwrap_or_else(|| {
            let is_large = value.as_u64().is_some_and(|rank| rank > 0);
            let expected = if is_large { "at most 65536" } else { "a whole number above 0" };
            self.wrong("r", &value, expected);
            8
        })
    }

    fn alpha(&mut self) -> f64 {
        let alpha = self.number("lora_alpha").unwrap_or(8.0);
        if alpha.abs() > LARGEST_ALPHA {
            self.wrong("lora_alpha", &json!(alpha), "at most 1e6");
        }
        alpha
    }

    fn dropout(&mut self) -> f64 {
        let dropout = self.number("lora_dropout").unwrap_or(0.0);
        if !(0.0..1.0).contains(&dropout) {
            self.wrong("lora_dropout", &json!(dropout), "at least 0 and less than 1");
        }
        dropout
    }

    fn layers(&mut self) -> Option<Vec<usize>> {
        let value = self.take("layers_to_transform")?;
        let index = |value: &Value| value.as_u64().and_then(|index| usize::try_from(index).ok());
        let layers = match &value {
            Value::Array(list) => list.iter().map(index).collect(),
            one => index(one).map(|one| vec![one]),
        };
        if layers.is_none() {
            self.wrong("layers_to_transform", &value, "layer numbers");
        }
        layers
    }

    fn init(&mut self) -> Init {
        match self.take("init_lora_weights") {
            None | Some(Value::Bool(_)) => Init::Peft,
            Some(Value::String(name)) => {
                let lower = name.to_lowercase();
                if CHANGE_THE_BASE.iter().any(|kind| lower.starts_with(kind)) {
                    self.problems.push(format!("`init_lora_weights` is \"{name}\": {CHANGED_BASE}"));
                }
                if lower == "gaussian" { Init::Gaussian } else { Init::Peft }
            }
            Some(value) => {
                self.wrong("init_lora_weights", &value, "true, false or a name");
                Init::Peft
            }
        }
    }

    /// Takes `target_parameters` where all its values are of a known kind: see [`experts`].
    fn parameters(&mut self) -> Vec<String> {
        let known = |value: &Value| value.as_str().filter(|name| experts::is_known(name)).map(str::to_string);
        let parameters = self.map.get("target_parameters").and_then(Value::as_array);
        let parameters: Option<Vec<String>> = parameters.and_then(|list| list.iter().map(known).collect());
        if parameters.is_some() {
            self.map.shift_remove("target_parameters");
        }
        parameters.unwrap_or_default()
    }

    /// Removes `modules_to_save` where it names routers only. Their tensors in the file show that they are trained.
    fn forget_routers(&mut self) {
        let is_router = |value: &Value| value.as_str().is_some_and(experts::is_router_module);
        let modules = self.map.get("modules_to_save").and_then(Value::as_array);
        if modules.is_some_and(|list| list.iter().all(is_router)) {
            self.map.shift_remove("modules_to_save");
        }
    }

    fn refuse_unsupported(&mut self) {
        for (key, what) in REFUSED {
            if let Some(value) = self.take(key).filter(|value| !is_neutral(value)) {
                self.problems.push(format!("`{key}` is {value}: {what}, {NOT_BUILT}"));
            }
        }
        if let Some(bias) = self.take("bias").filter(|bias| bias != "none") {
            self.problems.push(format!("`bias` is {bias}: trained biases of the model, {NOT_BUILT}"));
        }
    }

    /// Refuses or warns of keys that nothing has read, because each version of PEFT adds some.
    fn leftovers(&mut self) -> Vec<String> {
        for key in IGNORED {
            self.map.shift_remove(key);
        }
        let mut warnings = Vec::new();
        for (key, value) in std::mem::take(&mut self.map) {
            match value {
                value if is_neutral(&value) => {}
                Value::Bool(_) | Value::Object(_) | Value::Array(_) => self.problems.push(format!(
                    "`{key}` is {value}, which is not known here and may change the mathematics"
                )),
                value => warnings
                    .push(format!("`{key}` in the adapter's configuration is {value}, and is ignored")),
            }
        }
        first_lines(warnings, "keys in the adapter's configuration that are ignored")
    }
}

/// The file's text. Only keys that every PEFT since 0.10 knows, and newer ones where they are needed.
pub(super) fn to_json(
    config: &LoraConfig,
    placements: &Placements,
    parameters: &BTreeSet<String>,
    routers: &[&str],
    provenance: &Provenance,
) -> Result<String> {
    // PEFT knows no rank 0: such layers are excluded instead.
    let ranks = config.rank_pattern.iter().filter(|(_, rank)| **rank > 0);
    let ranks: Map<String, Value> = ranks.map(|(pattern, rank)| (pattern.to_string(), json!(rank))).collect();
    let alphas = config.alpha_pattern.iter();
    let alphas: Map<String, Value> =
        alphas.map(|(pattern, alpha)| (pattern.to_string(), number(*alpha))).collect();
    let (mut ranks, mut alphas) = (ranks, alphas);
    experts::join_patterns(config, placements, parameters, &mut ranks, &mut alphas);
    // PEFT refuses dropout beside parameters, at inference too, where it has no effect.
    let dropout = if experts::are_adapted(placements) { 0.0 } else { config.dropout };
    let gaussian = config.init == Init::Gaussian && !config.lora_bias;
    let mut fields: BTreeMap<&str, Value> = BTreeMap::from([
        ("alpha_pattern", Value::Object(alphas)),
        ("auto_mapping", Value::Null),
        ("base_model_name_or_path", json!(provenance.base_model)),
        ("bias", json!("none")),
        ("fan_in_fan_out", json!(false)),
        ("inference_mode", json!(true)),
        ("init_lora_weights", if gaussian { json!("gaussian") } else { json!(true) }),
        (
            "layers_pattern",
            if config.layers_pattern.is_empty() { Value::Null } else { json!(config.layers_pattern) },
        ),
        ("layers_to_transform", json!(config.layers_to_transform)),
        ("lora_alpha", number(config.alpha())),
        ("lora_dropout", number(dropout)),
        ("modules_to_save", experts::router_modules(routers)),
        ("peft_type", json!("LORA")),
        ("r", json!(config.rank)),
        ("rank_pattern", Value::Object(ranks)),
        ("revision", json!(provenance.revision)),
        ("target_modules", targets_json(&config.targets, placements)),
        ("task_type", json!("CAUSAL_LM")),
        ("use_dora", json!(false)),
        ("use_rslora", json!(config.rslora)),
    ]);
    if let Some(exclude) = exclude_json(&config.exclude, &placements.without) {
        fields.insert("exclude_modules", exclude);
    }
    if !parameters.is_empty() {
        fields.insert("target_parameters", json!(parameters));
    }
    if config.lora_bias {
        fields.insert("lora_bias", json!(true));
    }
    Ok(serde_json::to_string_pretty(&fields)? + "\n")
}

fn targets_json(targets: &Targets, placements: &Placements) -> Value {
    let names: BTreeSet<&str> = match targets {
        Targets::Pattern(pattern) => return json!(pattern),
        Targets::Names(names) => {
            let is_path = |name: &&str| placements.placements.iter().any(|p| is_named(&p.linear.path, name));
            // Other programs know the projections of experts by the names of their family alone.
            let others =
                placements.placements.iter().filter(|p| !names.iter().any(|n| is_named(&p.linear.path, n)));
            let others: BTreeSet<&str> = others.map(|p| p.linear.name()).collect();
            let known = names.iter().map(String::as_str).filter(|name| others.is_empty() || is_path(name));
            known.chain(others.iter().copied()).collect()
        }
        // Other programs may not know `all-linear`; PEFT writes names in its place too.
        Targets::AllLinear => placements.placements.iter().map(|p| p.linear.name()).collect(),
    };
    json!(names)
}

fn exclude_json(exclude: &Exclude, without: &[String]) -> Option<Value> {
    match exclude {
        exclude if exclude.is_empty() && without.is_empty() => None,
        exclude if exclude.is_empty() => Some(json!(without)),
        Exclude::Names(names) => Some(json!(names.iter().chain(without).collect::<Vec<_>>())),
        Exclude::Pattern(pattern) if without.is_empty() => Some(json!(pattern)),
        Exclude::Pattern(pattern) => {
            let paths: Vec<String> = without.iter().map(|path| path.replace('.', "\\.")).collect();
            Some(json!(format!("(?:{pattern})|{}", paths.join("|"))))
        }
    }
}
