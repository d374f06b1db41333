//! Models from the Hugging Face Hub, by id, into the cache that Python's tools use too.
//!
//! A revision is resolved to a commit first, and every file is taken from that commit, so that a model that changes
//! during a download is never mixed. Only what a model needs is fetched; pickled weights never are. A server is not
//! trusted: `client` has the rules of its answers, `cache` those of names, and `download` checks the bytes.

mod cache;
mod client;
mod download;
mod id;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use cache::{Repository, check_name, is_commit};
use client::{Client, Failure, describe, encoded};
use download::Download;
use id::{HubId, LONGEST_REVISION, id_in_address};

use crate::error::{Error, Result, nearest_path};

/// The most bytes of the Hub's description of a repository.
const LARGEST_ANSWER: u64 = 32 << 20;

/// The Hub's description of a repository may take this many times the longest silence, all in all.
const LONGEST_ANSWER: u32 = 4;

/// The most files that are fetched of one repository; the largest published models have some hundreds.
const MOST_FILES: usize = 2000;

/// Told about a download: the file, the bytes that are there, and the bytes it will have.
pub type OnProgress = Arc<dyn Fn(&str, u64, u64) + Send + Sync>;

/// Like the variables of the environment, one for the whole process: a model is opened in many places, and none of them
/// has anything to do with a terminal.
static TOLD: OnceLock<OnProgress> = OnceLock::new();

/// Tells `told` about the downloads of models that are opened by name alone. Only the first call counts.
pub fn report_downloads(told: OnProgress) {
    let _ = TOLD.set(told);
}

/// Where the Hub is and how to talk to it.
#[derive(Clone)]
pub struct HubSettings {
    /// The Hub's address, or a mirror's.
    pub endpoint: String,
    /// The folder that repositories are kept in.
    pub cache: PathBuf,
    /// Proves who asks; needed for gated and private models.
    pub token: Option<String>,
    /// Use only what is in the cache.
    pub offline: bool,
    /// A server may be silent for this long: while connecting, before its answer, and within a file.
    pub silence: Duration,
    /// Told about downloads.
    pub on_progress: Option<OnProgress>,
}

impl std::fmt::Debug for HubSettings {
    /// Without the token, which must not get into logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HubSettings")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .field("token", &self.token.as_ref().map(|_| "..."))
            .field("offline", &self.offline)
            .field("silence", &self.silence)
            .finish_non_exhaustive()
    }
}

impl HubSettings {
    /// From `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN` (or the file `token` in `HF_HOME`) and `HF_HUB_OFFLINE`;
    /// downloads are told to whom [`report_downloads`] names.
    #[must_use]
    pub fn from_env() -> Self {
        let on_progress = TOLD.get().cloned();
        Self { on_progress, ..Self::from_variables(|name| std::env::var(name).ok()) }
    }

    /// From variables that `get` knows, empty ones as if they were not set.
    #[must_use]
    pub fn from_variables(get: impl Fn(&str) -> Option<String>) -> Self {
        let get =
            |name: &str| get(name).map(|value| value.trim().to_string()).filter(|value| !value.is_empty());
        let home = get("HF_HOME").map(PathBuf::from).unwrap_or_else(|| {
            let user = get("XDG_CACHE_HOME").map(PathBuf::from);
            let user = user.or_else(|| Some(Path::new(&get("HOME")?).join(".cache")));
            user.unwrap_or_else(|| PathBuf::from(".cache")).join("huggingface")
        });
        let token = get("HF_TOKEN").or_else(|| {
            let text = std::fs::read_to_string(home.join("token")).ok()?;
            Some(text.trim().to_string()).filter(|token| !token.is_empty())
        });
        let endpoint = get("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string());
        let offline = get("HF_HUB_OFFLINE")
            .is_some_and(|value| ["1", "on", "yes", "true"].contains(&value.to_lowercase().as_str()));
        Self {
            endpoint: endpoint.trim_end_matches('/').to_string(),
            cache: get("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            token,
            offline,
            silence: Duration::from_secs(30),
            on_progress: None,
        }
    }
}

/// The folder of a model that is no path on this machine.
pub(super) fn find(source: &str, settings: &HubSettings) -> Result<PathBuf> {
    let message = format!("`{source}` is neither a folder nor a .gguf file");
    if let Some(id) = id_in_address(source, &settings.endpoint) {
        return Err(Error::request(message).with_hint(format!("write `{id}`, which is fetched from the Hub")));
    }
    if let Some((id, revision)) = source.split_once('@')
        && revision.len() > LONGEST_REVISION
        && HubId::parse(id).is_some()
    {
        return Err(Error::request(format!(
            "the revision of `{id}` has {} characters, expected at most {LONGEST_REVISION}",
            revision.len()
        ))
        .with_hint("write the name of a branch or a tag, or a commit of 40 hexadecimal digits"));
    }
    let is_gguf = |path: &Path| path.extension().is_some_and(|ending| ending == "gguf");
    let parsed = HubId::parse(source).filter(|_| !is_gguf(Path::new(source)));
    let hub = match parsed {
        Some(hub) if !is_below_what_is_here(source) => hub,
        parsed => {
            let id = if parsed.is_some() { format!("{source}@main") } else { "org/name".to_string() };
            let hub = format!("a model on the Hub is written `{id}`");
            let near = nearest_path(Path::new(source), |path| path.is_dir() || is_gguf(path));
            let near = near.map(|near| format!("did you mean `{}`?", near.display()));
            let hint = match near {
                Some(near) if parsed.is_some() => format!("{near} {hub}"),
                near => near.unwrap_or(hub),
            };
            return Err(Error::request(message).with_hint(hint));
        }
    };
    fetch(&hub, settings).map_err(|error| {
        let both = format!("{message}, nor could it be fetched from the Hub: {error}");
        let both = if error.exit_code() == 2 { Error::request(both) } else { Error::invalid(both) };
        match error.hint() {
            Some(hint) => both.with_hint(hint),
            None => both,
        }
    })
}

/// Whether what could be an id is more likely a path with a slip in it: what it would be in is here. With a revision it
/// is an id whatever is here.
fn is_below_what_is_here(source: &str) -> bool {
    !source.contains('@') && Path::new(source).parent().is_some_and(Path::exists)
}

/// The folder of a model in the cache, all of its files there.
fn fetch(hub: &HubId, settings: &HubSettings) -> Result<PathBuf> {
    let cache = Repository::new(settings, hub);
    if settings.offline {
        return cache.cached().ok_or_else(|| {
            Error::request(format!(
                "`{}` at `{}` is not in the cache, and HF_HUB_OFFLINE is set",
                hub.id, hub.revision
            ))
            .with_hint("unset HF_HUB_OFFLINE to fetch it, or give a local folder")
        });
    }
    let client = Client::new(settings)?;
    let (commit, names) = match resolve(&client, hub, settings)? {
        Answer::Revision { commit, names } => (commit, names),
        // Like Python's tools: without a network, what the cache has is good enough.
        Answer::Unreachable(reason) => {
            return cache.cached().ok_or_else(|| {
                Error::invalid(format!(
                    "{} cannot be reached ({reason}), and `{}` is not in the cache",
                    settings.endpoint, hub.id
                ))
                .with_hint("check the network, set HF_ENDPOINT to a mirror, or give a local folder")
            });
        }
    };
    let wanted = wanted_files(&names).map_err(|reason| reason.at(hub, &names))?;
    if wanted.len() > MOST_FILES {
        return Err(Error::invalid(format!(
            "{} lists {} files of a model for `{}`, and at most {MOST_FILES} are fetched",
            settings.endpoint,
            wanted.len(),
            hub.id
        ))
        .with_hint(
            "check HF_ENDPOINT; or download the repository by other means, and give the local folder",
        ));
    }
    for name in &wanted {
        // The folder of further templates is the only one from which files are fetched.
        check_name(super::companion::template_name(name).unwrap_or(name))?;
    }
    let download = Download { client: &client, cache: &cache, settings, id: hub, commit: &commit };
    for name in &wanted {
        download.file(name).map_err(|failure| explain(failure, hub, settings))?;
    }
    // Only now, so that a reference means that everything is there.
    cache.refer(&commit)?;
    Ok(cache.snapshot(&commit))
}

/// What the Hub says about a revision.
enum Answer {
    Revision { commit: String, names: Vec<String> },
    Unreachable(String),
}

fn resolve(client: &Client<'_>, hub: &HubId, settings: &HubSettings) -> Result<Answer> {
    let path = format!("api/models/{}/revision/{}", hub.id, encoded(&hub.revision));
    let mut request = client.request(&path)?.within(settings.silence * LONGEST_ANSWER);
    let mut response = match request.answer(0, |_| Ok(())) {
        Ok(response) => response,
        Err(Failure::Transport(reason)) => return Ok(Answer::Unreachable(reason)),
        Err(failure) => return Err(explain(failure, hub, settings)),
    };
    let status = response.status().as_u16();
    match status {
        200 => {}
        401 | 403 => return Err(forbidden(hub, settings, status)),
        404 => {
            return Err(Error::request(format!(
                "{} has no model `{}` with a revision `{}`",
                settings.endpoint, hub.id, hub.revision
            ))
            .with_hint("check the spelling; a private model needs HF_TOKEN"));
        }
        500.. => return Ok(Answer::Unreachable(format!("status {status}"))),
        _ => return Err(Error::invalid(format!("{} answered {status} for `{}`", settings.endpoint, hub.id))),
    }
    // Counted where bytes are read, because a compressed answer may unpack to any size.
    let mut bytes = Vec::new();
    let read = response.body_mut().as_reader().take(LARGEST_ANSWER + 1).read_to_end(&mut bytes);
    if let Err(error) = read {
        return Ok(Answer::Unreachable(describe(&ureq::Error::from(error), settings.silence)));
    }
    let unreadable =
        |what: &str| Error::invalid(format!("{} sent an unreadable answer: {what}", settings.endpoint));
    if bytes.len() as u64 > LARGEST_ANSWER {
        return Err(unreadable(&format!("it has more than {LARGEST_ANSWER} bytes")));
    }
    let info: hf_hub::api::RepoInfo =
        serde_json::from_slice(&bytes).map_err(|error| unreadable(&error.to_string()))?;
    let is_other = is_commit(&hub.revision) && !info.sha.eq_ignore_ascii_case(&hub.revision);
    if !is_commit(&info.sha) || is_other {
        let sha: String = info.sha.chars().take(80).collect();
        return Err(Error::invalid(format!(
            "{} says that `{}` at `{}` is the commit `{}`, expected 40 hexadecimal digits",
            settings.endpoint,
            hub.id,
            hub.revision,
            sha.escape_debug()
        ))
        .with_hint("the server is broken or means harm; check HF_ENDPOINT"));
    }
    let names = info.siblings.into_iter().map(|file| file.rfilename).collect();
    Ok(Answer::Revision { commit: info.sha, names })
}

/// Says what a failed download is to the user.
fn explain(failure: Failure, hub: &HubId, settings: &HubSettings) -> Error {
    match failure {
        Failure::Refused(error) => error,
        Failure::Denied(status) => forbidden(hub, settings, status),
        Failure::Transport(text) => Error::invalid(format!("`{}` could not be fetched: {text}", hub.id))
            .with_hint("try again; what has arrived is kept. Or give a local folder"),
    }
}

/// Why a repository's files are no model that can be read.
enum Unusable {
    NoConfig,
    NoWeights,
}

impl Unusable {
    fn at(self, hub: &HubId, names: &[String]) -> Error {
        let has = |ending: &str| names.iter().any(|name| name.ends_with(ending));
        let error = |what: &str| Error::request(format!("`{}` at `{}` {what}", hub.id, hub.revision));
        match self {
            Self::NoConfig if has(".gguf") => error("has .gguf files and no config.json")
                .with_hint("download the .gguf file that you want, and give its path"),
            Self::NoConfig if has("adapter_config.json") => {
                error("is an adapter, not a model").with_hint("give the model that it was trained on")
            }
            Self::NoConfig => error("has no config.json"),
            Self::NoWeights if has(".bin") => {
                error("has only pickled weights, which can run code when they are read")
                    .with_hint("look for a revision or a copy that has safetensors")
            }
            Self::NoWeights => error("has no model.safetensors"),
        }
    }
}

/// The files of a repository that a model needs, weights last.
fn wanted_files(names: &[String]) -> Result<Vec<&str>, Unusable> {
    let has = |wanted: &str| names.iter().any(|name| name == wanted);
    if !has("config.json") {
        return Err(Unusable::NoConfig);
    }
    let in_root = names.iter().map(String::as_str).filter(|name| !name.contains('/'));
    let mut wanted = vec!["config.json"];
    wanted.extend(in_root.clone().filter(|name| super::companion::is_companion(name)));
    let all = names.iter().map(String::as_str);
    wanted.extend(all.filter(|name| super::companion::template_name(name).is_some()));
    if has(super::folder::SINGLE) {
        wanted.push(super::folder::SINGLE);
    } else if has(super::folder::INDEX) {
        wanted.push(super::folder::INDEX);
        wanted.extend(in_root.filter(|name| name.starts_with("model-") && name.ends_with(".safetensors")));
    } else {
        return Err(Unusable::NoWeights);
    }
    Ok(wanted)
}

fn forbidden(hub: &HubId, settings: &HubSettings, status: u16) -> Error {
    let error = Error::request(format!(
        "{} does not let {} read `{}` (status {status})",
        settings.endpoint,
        if settings.token.is_some() { "the owner of this token" } else { "just anyone" },
        hub.id
    ));
    error.with_hint("check the spelling; for a gated model accept its terms on its page, and set HF_TOKEN to a token that may read it")
}
