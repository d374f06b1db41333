//! How a model's place on the Hub is written.

/// The most characters of `org/name`; the Hub has no longer ones.
const LONGEST_ID: usize = 96;

/// The most characters of a revision, which becomes the name of a file in the cache.
pub(super) const LONGEST_REVISION: usize = 200;

/// A model's place on the Hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HubId {
    pub(super) id: String,
    pub(super) revision: String,
}

impl HubId {
    /// Reads `org/name[@revision]`; anything else is no id.
    pub(super) fn parse(source: &str) -> Option<Self> {
        let (id, revision) = source.split_once('@').unwrap_or((source, "main"));
        let (organisation, name) = id.split_once('/')?;
        let is_word = |word: &str| {
            !word.is_empty()
                && !word.starts_with(['.', '-'])
                && word.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
        };
        // Like git's names of branches and tags, which a reference in the cache is a path of.
        let is_revision = revision.len() <= LONGEST_REVISION
            && revision.split('/').all(|part| !part.is_empty() && !part.starts_with('.'))
            && !revision.contains("..")
            && !revision.contains(|c: char| c.is_control() || r#" ~^:?*[\<>|""#.contains(c));
        (is_word(organisation) && is_word(name) && id.len() <= LONGEST_ID && is_revision)
            .then(|| Self { id: id.to_string(), revision: revision.to_string() })
    }
}

/// How a model is written whose address on the Hub somebody gives: `https://huggingface.co/org/name/tree/main`.
pub(super) fn id_in_address(source: &str, endpoint: &str) -> Option<String> {
    let hosts =
        ["https://huggingface.co/", "http://huggingface.co/", "huggingface.co/", "https://hf.co/", "hf.co/"];
    let own = format!("{endpoint}/");
    let hosts = hosts.into_iter().chain(["hf://models/", "hf://", &own]);
    let path = hosts.filter_map(|host| source.strip_prefix(host)).next()?;
    let path = path.split(['?', '#']).next().unwrap_or_default();
    let mut parts = path.trim_end_matches('/').splitn(4, '/');
    let id = format!("{}/{}", parts.next()?, parts.next()?);
    let revision = match (parts.next(), parts.next()) {
        // A file has no revision of its own: its first part is one that may have slashes.
        (Some("blob" | "resolve"), Some(rest)) => rest.split('/').next(),
        (Some("tree" | "commit"), revision) => revision,
        _ => None,
    };
    let written = match revision.filter(|revision| *revision != "main") {
        Some(revision) => format!("{id}@{revision}"),
        None => id,
    };
    HubId::parse(&written).map(|_| written)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_models_say_how_a_model_is_written() {
        for (address, expected) in [
            ("https://huggingface.co/org/name", Some("org/name")),
            ("https://huggingface.co/org/name/", Some("org/name")),
            ("https://huggingface.co/org/name/tree/main", Some("org/name")),
            ("https://huggingface.co/org/name/tree/refs/pr/7", Some("org/name@refs/pr/7")),
            ("https://huggingface.co/org/name/blob/v1/config.json?x=1", Some("org/name@v1")),
            ("https://mirror:8000/org/name", Some("org/name")),
            ("huggingface.co/org/name#files", Some("org/name")),
            ("hf://org/name", Some("org/name")),
            ("hf://models/org/name", Some("org/name")),
            ("https://huggingface.co/org", None),
            ("https://huggingface.co/org/na me", None),
            ("https://elsewhere/org/name", None),
            ("org/name", None),
        ] {
            assert_eq!(id_in_address(address, "https://mirror:8000").as_deref(), expected, "{address}");
        }
    }
}
