//! Requests to the Hub, under rules about tokens, redirects and silence that the client library leaves to its user.
//!
//! - The token goes to the endpoint's own scheme, host and port, and after a redirect to another origin never again.
//! - Redirects lead to http or https, never from https to http, and a bounded number of times.
//! - Connecting, waiting for an answer, and every pause within a body have a time limit.
//! - A request that says so has a limit for all of its answer too. Those for weights have none: files may be large.

use std::time::{Duration, Instant};

use ureq::Agent;
use ureq::Body;
use ureq::http::uri::{Authority, Scheme};
use ureq::http::{HeaderMap, Response, Uri};

use super::HubSettings;
use crate::error::{Error, Result};

/// The most redirects that one request may take.
const MOST_REDIRECTS: usize = 10;

/// Why a request has no answer that can be used.
pub(super) enum Failure {
    /// The network or the server failed; trying again may help.
    Transport(String),
    /// The Hub itself does not let this user read the file.
    Denied(u16),
    /// The answer breaks a rule, or this machine cannot take it.
    Refused(Error),
}

impl<E: Into<Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Refused(error.into())
    }
}

/// Sends requests to one endpoint.
pub(super) struct Client<'a> {
    agent: Agent,
    endpoint: Uri,
    settings: &'a HubSettings,
}

impl<'a> Client<'a> {
    pub(super) fn new(settings: &'a HubSettings) -> Result<Self> {
        let is_address = |uri: &Uri| is_web(uri) && uri.host().is_some_and(|host| !host.is_empty());
        let endpoint = settings.endpoint.parse::<Uri>().ok().filter(is_address).ok_or_else(|| {
            Error::request(format!("`{}` is no address of a Hub", settings.endpoint.escape_debug()))
                .with_hint("set HF_ENDPOINT to an address such as `https://huggingface.co`, or unset it")
        })?;
        if settings.token.as_ref().is_some_and(|token| !token.bytes().all(|byte| byte.is_ascii_graphic())) {
            return Err(Error::request("HF_TOKEN has characters that no token has")
                .with_hint("set it to the token alone, which begins with `hf_`"));
        }
        let patience = Some(settings.silence);
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            // Compressed bodies would have another length and digest than the file.
            .accept_encoding("identity")
            .user_agent(concat!("peft/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(patience)
            .timeout_connect(patience)
            .timeout_send_request(patience)
            .timeout_recv_response(patience)
            .timeout_per_read(patience)
            .build();
        Ok(Self { agent: agent.into(), endpoint, settings })
    }

    /// Begins a request for a path below the endpoint.
    pub(super) fn request(&self, path: &str) -> Result<Request<'_>> {
        let url = format!("{}/{path}", self.settings.endpoint);
        let at = url
            .parse()
            .map_err(|error| Error::request(format!("`{}` is no address: {error}", url.escape_debug())))?;
        Ok(Request { client: self, at, redirects: 0, is_home: true, until: None })
    }
}

/// A request on its way, from redirect to redirect.
pub(super) struct Request<'a> {
    client: &'a Client<'a>,
    at: Uri,
    redirects: usize,
    /// Whether every address so far had the endpoint's origin.
    is_home: bool,
    /// When the whole answer has to be there.
    until: Option<Instant>,
}

/// Represents the response of one server to a request.
pub(super) enum Reply {
    /// The file is elsewhere; the request has moved on to there.
    Moved(HeaderMap),
    /// The answer itself, whatever its status.
    Answer(Response<Body>),
}

impl Request<'_> {
    /// Gives up after this time, redirects and the body of the answer counted in.
    pub(super) fn within(mut self, time: Duration) -> Self {
        self.until = Some(Instant::now() + time);
        self
    }

    /// Asks for the bytes from `start` on, at the address where the request stands.
    pub(super) fn ask(&mut self, start: u64) -> Result<Reply, Failure> {
        let Client { agent, settings, .. } = self.client;
        let left = self.until.map(|until| until.saturating_duration_since(Instant::now()));
        let mut request = agent.get(&self.at).config().timeout_global(left).build();
        if let Some(token) = settings.token.as_ref().filter(|_| self.is_home) {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        // Without a beginning to skip there is no range: some servers refuse any range of an empty file.
        if start > 0 {
            request = request.header("Range", format!("bytes={start}-"));
        }
        let response =
            request.call().map_err(|error| Failure::Transport(describe(&error, settings.silence)))?;
        if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
            return Ok(Reply::Answer(response));
        }
        self.follow(response.headers())?;
        Ok(Reply::Moved(response.into_parts().0.headers))
    }

    /// Asks, and asks again wherever redirects lead; `moved` sees the headers of each.
    pub(super) fn answer(
        &mut self,
        start: u64,
        mut moved: impl FnMut(&HeaderMap) -> Result<()>,
    ) -> Result<Response<Body>, Failure> {
        loop {
            match self.ask(start)? {
                Reply::Moved(headers) => moved(&headers)?,
                Reply::Answer(response) => return Ok(response),
            }
        }
    }

    /// Returns the failure for an unwanted status; only 401 and 403 from the endpoint mean that access is denied.
    pub(super) fn failed(&self, status: u16) -> Failure {
        match status {
            // Storage that answers so is no matter of the user's rights: its addresses expire.
            401 | 403 if self.is_home => Failure::Denied(status),
            _ => Failure::Transport(format!("{} answered with status {status}", shown(&self.at))),
        }
    }

    fn follow(&mut self, headers: &HeaderMap) -> Result<()> {
        let from = shown(&self.at);
        let wrong = |what: String| {
            Error::invalid(format!("{from} redirects {what}"))
                .with_hint("check HF_ENDPOINT and the proxy; or give a local folder")
        };
        if self.redirects == MOST_REDIRECTS {
            return Err(wrong(format!("again after {MOST_REDIRECTS} redirects")));
        }
        let location = headers.get("location").ok_or_else(|| wrong("without saying where to".to_string()))?;
        let location = location.to_str().map_err(|_| wrong("to an address that is not ASCII".to_string()))?;
        if scheme(location).is_some_and(|scheme| !["http", "https"].contains(&&*scheme.to_lowercase())) {
            return Err(wrong(format!("to `{location}`, expected http or https")));
        }
        let to = resolved(&self.at, location).filter(is_web);
        let to = to.ok_or_else(|| wrong(format!("to `{location}`, which is no address")))?;
        if to.authority().is_some_and(|authority| authority.as_str().contains('@')) {
            return Err(wrong("to an address with a user's name in it".to_string()));
        }
        if self.at.scheme() == Some(&Scheme::HTTPS) && to.scheme() != Some(&Scheme::HTTPS) {
            return Err(wrong(format!("from https to {}, where anybody can read and change it", shown(&to))));
        }
        self.is_home &= origin(&to) == origin(&self.client.endpoint);
        self.redirects += 1;
        self.at = to;
        Ok(())
    }
}

/// Says what failed, a silence with its length.
pub(super) fn describe(error: &ureq::Error, silence: Duration) -> String {
    match error {
        ureq::Error::Timeout(ureq::Timeout::Global) => "the answer took too long".to_string(),
        ureq::Error::Timeout(_) => format!("nothing came for {} s", silence.as_secs_f64()),
        error => error.to_string(),
    }
}

fn is_web(uri: &Uri) -> bool {
    matches!(uri.scheme_str(), Some("http" | "https"))
}

/// The scheme, host and port of an address.
fn origin(uri: &Uri) -> (Option<&str>, Option<String>, Option<u16>) {
    let default = match uri.scheme_str() {
        Some("https") => Some(443),
        Some("http") => Some(80),
        _ => None,
    };
    (uri.scheme_str(), uri.host().map(str::to_lowercase), uri.port_u16().or(default))
}

/// An address as messages show it: its query may hold a signature that opens the file to everybody.
fn shown(uri: &Uri) -> String {
    let host = uri.authority().map_or("", Authority::as_str);
    format!("{}://{host}{}", uri.scheme_str().unwrap_or_default(), uri.path())
}

/// Returns the scheme of an absolute address; `None` for a relative one.
fn scheme(location: &str) -> Option<&str> {
    let (scheme, _) = location.split_once(':')?;
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
    (scheme.starts_with(|c: char| c.is_ascii_alphabetic()) && scheme.chars().all(fits)).then_some(scheme)
}

/// The address that `location` means in an answer from `base`.
fn resolved(base: &Uri, location: &str) -> Option<Uri> {
    if scheme(location).is_some() {
        return location.parse().ok();
    }
    let scheme = base.scheme_str()?;
    if location.starts_with("//") {
        return format!("{scheme}:{location}").parse().ok();
    }
    let host = base.authority()?;
    if location.starts_with('/') {
        return format!("{scheme}://{host}{location}").parse().ok();
    }
    if location.is_empty() || location.starts_with(['?', '#']) {
        return format!("{scheme}://{host}{}{location}", base.path()).parse().ok();
    }
    let (path, rest) = location.split_at(location.find(['?', '#']).unwrap_or(location.len()));
    let mut parts: Vec<&str> = base.path().split('/').collect();
    // The last part is the file that the answer is about.
    parts.pop();
    for part in path.split('/') {
        match part {
            "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    let path = parts.join("/");
    format!("{scheme}://{host}/{}{rest}", path.trim_start_matches('/')).parse().ok()
}

/// Writes text so that it is one part of a path in an address.
pub(super) fn encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => encoded.push(byte.into()),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_understood_in_every_form() {
        let base: Uri = "https://hub:8443/org/name/resolve/main/x.json?a=1".parse().unwrap();
        for (location, expected) in [
            ("http://other/y", "http://other/y"),
            ("HTTPS://other/y?b=:", "https://other/y?b=:"),
            ("//other/y", "https://other/y"),
            ("/y?b=http://z", "https://hub:8443/y?b=http://z"),
            ("y", "https://hub:8443/org/name/resolve/main/y"),
            ("./y/../z?b=1", "https://hub:8443/org/name/resolve/main/z?b=1"),
            ("../../../../../../y", "https://hub:8443/y"),
            ("?b=1", "https://hub:8443/org/name/resolve/main/x.json?b=1"),
        ] {
            assert_eq!(resolved(&base, location).unwrap().to_string(), expected, "{location}");
        }
    }

    #[test]
    fn a_redirect_from_https_stays_there() {
        let settings = HubSettings::from_variables(|_| None);
        let client = Client::new(&settings).unwrap();
        let moved = |to: &str| {
            let mut request = client.request("org/name").unwrap();
            let headers = HeaderMap::from_iter([(ureq::http::header::LOCATION, to.parse().unwrap())]);
            request.follow(&headers).map(|()| request.is_home).map_err(|error| error.to_string())
        };
        assert_eq!(moved("/x"), Ok(true));
        assert_eq!(moved("https://huggingface.co:443/x"), Ok(true));
        assert_eq!(moved("https://cdn.huggingface.co/x"), Ok(false));
        assert!(
            moved("http://huggingface.co/x").unwrap_err().contains("from https to http://huggingface.co/x")
        );
        for to in ["file:///etc/passwd", "ftp://other/y", "javascript:x", "data:,x"] {
            assert!(moved(to).unwrap_err().contains("expected http or https"), "{to}");
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let same = |x: &str, y: &str| origin(&x.parse().unwrap()) == origin(&y.parse().unwrap());
        assert!(same("https://Hub/a", "https://hub:443/b"));
        assert!(same("http://hub:80", "http://hub/"));
        for other in ["http://hub/", "https://hub:444/", "https://hub.evil/", "https://evil/hub"] {
            assert!(!same("https://hub/", other), "{other}");
        }
    }

    #[test]
    fn parts_of_a_path_are_encoded() {
        assert_eq!(encoded("refs/pr/7"), "refs%2Fpr%2F7");
        assert_eq!(encoded("a b?c#d%\u{e4}"), "a%20b%3Fc%23d%25%C3%A4");
    }
}
