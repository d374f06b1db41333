//! Finds keys of an upcycling recipe that contradict each other, before any file is opened.

use super::{CalibrationRecipe, FormatChoice, MethodRecipe, UpcyclePlan, UpcycleRecipe, name_of};
use crate::data::Source;
use crate::error::Error;
use crate::upcycle::{KeepDense, Method, Refit, RouterKind, Settings};

/// A key, and what is wrong with its value.
type Conflict = (&'static str, Error);

fn conflict(key: &'static str, message: impl Into<String>, hint: &str) -> Option<Conflict> {
    Some((key, Error::request(message).with_hint(hint)))
}

impl UpcycleRecipe {
    /// The keys that contradict another, each with what is wrong.
    pub(super) fn conflicts(&self) -> Vec<Conflict> {
        let settings = UpcyclePlan::of(self, "").settings;
        let found = [
            self.idle_key(settings.method),
            self.conflict_of_sources(settings.method),
            self.conflict_of_numbers(&settings),
            self.conflict_of_calibration(settings.method),
            self.conflict_of_router(&settings),
        ];
        found.into_iter().flatten().collect()
    }

    /// A key that asks for something that the method does not do.
    fn idle_key(&self, method: Method) -> Option<Conflict> {
        let MethodRecipe {
            shared,
            active,
            partition,
            router,
            refit,
            drop_ratio,
            groups,
            baselines,
            keep_dense,
            format,
            ..
        } = self.table();
        if method == Method::Expand && active.is_some() {
            let message = "`upcycle.active` does nothing with `upcycle.method = \"expand\"`: a token keeps the number \
                           of experts that it has in the mixture";
            let hint = "leave it out; `num_experts_per_tok` of the mixture's `config.json` says the number";
            return conflict("upcycle.active", message, hint);
        }
        let (cuts, draws) = (method.cuts(), method.draws());
        let has_no_format = matches!(method, Method::Prune | Method::Expand);
        let idle = [
            ("upcycle.shared", !cuts && shared.is_some_and(|shared| shared > 0)),
            ("upcycle.partition", method != Method::Split && partition.is_some()),
            ("upcycle.router", method == Method::Prune && router.is_some()),
            ("upcycle.refit", !cuts && refit.is_some_and(|refit| refit != Refit::None)),
            ("upcycle.baselines", method != Method::Split && baselines.is_some()),
            ("upcycle.drop_ratio", !draws && drop_ratio.is_some()),
            ("upcycle.groups", method != Method::VirtualGroups && groups.is_some_and(|groups| groups > 1)),
            ("upcycle.keep_dense", method == Method::Expand && keep_dense.is_some()),
            ("upcycle.format", has_no_format && format.is_some_and(|format| format != FormatChoice::Auto)),
        ];
        let (key, _) = idle.into_iter().find(|(_, idle)| *idle)?;
        let message = format!("`{key}` does nothing with `upcycle.method = \"{}\"`", name_of(method));
        conflict(key, message, "leave it out")
    }

    fn conflict_of_sources(&self, method: Method) -> Option<Conflict> {
        const KEY: &str = "upcycle.sources";
        let sources = self
            .upcycle
            .as_ref()
            .and_then(|table| table.sources.as_ref())
            .filter(|sources| !sources.is_empty());
        let Some(sources) = sources else {
            return match method {
                Method::Mix => {
                    let message = "`upcycle.method = \"mix\"` needs further checkpoints";
                    conflict(KEY, message, "name them in `upcycle.sources`")
                }
                _ => None,
            };
        };
        if method != Method::Mix {
            let message = format!("`upcycle.sources` is for `method = \"mix\"`, found `{}`", name_of(method));
            return conflict(KEY, message, "leave it out");
        }
        let all: Vec<&String> = std::iter::once(&self.model.source).chain(sources).collect();
        if let Some(twice) = (1..all.len()).find(|at| all[..*at].contains(&all[*at])) {
            let message = format!("`upcycle.sources` has `{}` twice, or it is `model.source`", all[twice]);
            return conflict(KEY, message, "two experts would be the same; name each checkpoint once");
        }
        match self.table().experts {
            Some(experts) if experts != all.len() => {
                let message = format!(
                    "`upcycle.experts` is {experts}, and `mix` makes an expert of each of {} checkpoints",
                    all.len()
                );
                conflict("upcycle.experts", message, "leave it out; `model.source` is the first checkpoint")
            }
            _ => None,
        }
    }

    fn conflict_of_numbers(&self, settings: &Settings) -> Option<Conflict> {
        let Settings { method, experts, shared, active, keep_dense, .. } = *settings;
        if keep_dense.every == 0 {
            let hint = "1 converts every layer, 2 each second one";
            return conflict("upcycle.keep_dense", "`upcycle.keep_dense.every` is 0", hint);
        }
        if method == Method::Prune && keep_dense != KeepDense::default() {
            let message = "`upcycle.keep_dense`: all layers of a pruned model have to be of one width";
            return conflict("upcycle.keep_dense", message, "leave it out");
        }
        if method == Method::Expand {
            return None;
        }
        let cuts = method.cuts();
        if cuts && shared >= experts {
            let message = format!("`upcycle.shared` is {shared}, and there are {experts} slices in all");
            return conflict("upcycle.shared", message, "leave slices for the router to choose from");
        }
        let routed = if cuts { experts - shared } else { experts };
        if active > routed {
            let message = format!("`upcycle.active` is {active}, and a token can be routed to {routed}");
            return conflict("upcycle.active", message, "lower it, or raise `upcycle.experts`");
        }
        if routed < 2 {
            let part = if cuts { "slice" } else { "expert" };
            let message = format!("`upcycle.experts` of {experts} leaves one {part} to route to");
            return conflict("upcycle.experts", message, "a router needs two or more to choose from");
        }
        if cuts && active == routed {
            let means = match method {
                Method::Prune => "no neuron would be pruned",
                _ => "every token would go through all of them, as in the dense model",
            };
            let message = format!(
                "`upcycle.shared` of {shared} and `upcycle.active` of {active} are all {experts} slices: {means}"
            );
            let hint = "lower one of them; half of `upcycle.experts` together is usual";
            return conflict("upcycle.active", message, hint);
        }
        None
    }

    fn conflict_of_calibration(&self, method: Method) -> Option<Conflict> {
        let cuts = method.cuts();
        let Some(CalibrationRecipe { data, eval, .. }) = &self.calibration else {
            if !cuts && method != Method::Expand {
                return None;
            }
            let message = format!("`upcycle.method = \"{}\"` needs calibration text", name_of(method));
            return conflict("calibration", message, "name files in `calibration.data`");
        };
        if data.is_empty() {
            let message = "`calibration.data` is empty: expected at least one file";
            return Some(("calibration.data", Error::request(message)));
        }
        let is_learned_from = |file: &&Source| data.iter().any(|own| own.path == file.path);
        if let Some(file) = eval.iter().flatten().find(is_learned_from) {
            let path = file.path.display();
            let message = format!("`calibration.eval` has `{path}`, which `calibration.data` has too");
            let hint = "what is learned from cannot be measured on; `held_out` keeps a part of each file out";
            return conflict("calibration.eval", message, hint);
        }
        if eval.is_some() && !cuts {
            let message = format!("`calibration.eval` is for slices, found `{}`", name_of(method));
            return conflict("calibration.eval", message, "copies begin as the dense model; leave it out");
        }
        None
    }

    fn conflict_of_router(&self, settings: &Settings) -> Option<Conflict> {
        const KEY: &str = "upcycle.prompts";
        let Settings { method, experts, router, .. } = *settings;
        let prompts = self.table().prompts.unwrap_or_default();
        if (router == RouterKind::Prompts) == prompts.is_empty() {
            let message = match prompts.is_empty() {
                false => "`upcycle.prompts` is for `router = \"prompts\"`",
                true => "`upcycle.router = \"prompts\"` needs prompts",
            };
            return conflict(KEY, message, "give a list of prompts for each expert");
        }
        if method.cuts() && router == RouterKind::Prompts {
            let message =
                "`upcycle.router = \"prompts\"` is for copies, and slices are cut by what neurons do";
            return conflict("upcycle.router", message, "leave it out; `ridge` is the router of slices");
        }
        let hint = "give each expert prompts of the kind of text that it is for";
        for (expert, list) in prompts.iter().enumerate() {
            if list.is_empty() {
                return conflict(KEY, format!("`upcycle.prompts[{expert}]` is an empty list"), hint);
            }
            if let Some(blank) = list.iter().position(|prompt| prompt.trim().is_empty()) {
                return conflict(
                    KEY,
                    format!("`upcycle.prompts[{expert}][{blank}]` is an empty prompt"),
                    hint,
                );
            }
            let same = prompts[..expert].iter().position(|other| distinct(other) == distinct(list));
            if let Some(same) = same {
                let message = format!(
                    "`upcycle.prompts[{same}]` and `upcycle.prompts[{expert}]` are the same: the router could not \
                     tell their experts apart"
                );
                return conflict(KEY, message, hint);
            }
        }
        if !prompts.is_empty() && prompts.len() != experts {
            let message =
                format!("`upcycle.prompts` has {} lists, and there are {experts} experts", prompts.len());
            return conflict(KEY, message, "give a list of prompts for each expert");
        }
        None
    }
}

/// The prompts of a list, whatever their order.
fn distinct(prompts: &[String]) -> Vec<&str> {
    let mut prompts: Vec<&str> = prompts.iter().map(|prompt| prompt.trim()).collect();
    prompts.sort_unstable();
    prompts.dedup();
    prompts
}
