//! The Hub, played by a server on this machine: what is asked for, what is kept, and what a user is told.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device};
use peft::model::Pretrained;
use peft::weights::{Checkpoint, HubSettings};
use serde_json::json;
use tempfile::TempDir;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// One request as the server saw it.
#[derive(Debug, Clone, PartialEq)]
struct Request {
    path: String,
    range: Option<String>,
    authorization: Option<String>,
}

/// What the server has and how it misbehaves.
#[derive(Default)]
struct Site {
    files: BTreeMap<String, Vec<u8>>,
    commit: String,
    /// Status for every path that ends so.
    refused: Vec<(String, u16)>,
    /// Files of which only so many bytes are sent, although all are promised.
    cut: BTreeMap<String, usize>,
    /// Files of which only so many bytes are promised and sent, although the range says there are more.
    short: BTreeMap<String, usize>,
    requests: Vec<Request>,
}

struct Server {
    address: String,
    site: Arc<Mutex<Site>>,
}

impl Server {
    /// A repository with the files of a fixture, and with some that nobody needs.
    fn start(fixture: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(fixture);
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_string();
            if name.starts_with("model") || name.ends_with("config.json") {
                files.insert(name, fs::read(path).unwrap());
            }
        }
        for name in
            ["README.md", "pytorch_model.bin", "onnx/model.onnx", "original/params.json", "model.ckpt.index"]
        {
            files.insert(name.to_string(), b"not needed".to_vec());
        }
        files.insert("tokenizer_config.json".to_string(), b"{}".to_vec());
        files.insert("chat_template.jinja".to_string(), b"T".to_vec());
        let site = Site { files, commit: COMMIT.to_string(), ..Site::default() };
        Self::serve(site)
    }

    fn serve(site: Site) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let site = Arc::new(Mutex::new(site));
        let shared = Arc::clone(&site);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), &mut shared.lock().unwrap());
            }
        });
        Self { address, site }
    }

    fn settings(&self, cache: &TempDir) -> HubSettings {
        let mut settings = HubSettings::from_variables(|_| None);
        settings.endpoint.clone_from(&self.address);
        settings.cache = cache.path().join("hub");
        settings
    }

    fn site(&self) -> std::sync::MutexGuard<'_, Site> {
        self.site.lock().unwrap()
    }

    fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.site().requests)
    }
}

/// Answers one request as the Hub does, as far as its client looks.
fn answer(stream: TcpStream, site: &mut Site) {
    let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let headers: BTreeMap<String, String> = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| {
            Some((line.split_once(':')?.0.to_lowercase(), line.split_once(':')?.1.trim().to_string()))
        })
        .collect();
    let path = first.split(' ').nth(1).unwrap().to_string();
    site.requests.push(Request {
        path: path.clone(),
        range: headers.get("range").cloned(),
        authorization: headers.get("authorization").cloned(),
    });
    let mut stream = &stream;
    let mut send = |head: String, body: &[u8]| {
        // A client that has gone away is no fault of the server.
        let _ = stream.write_all(format!("HTTP/1.1 {head}Connection: close\r\n\r\n").as_bytes());
        let _ = stream.write_all(body);
    };
    if let Some((_, status)) = site.refused.iter().find(|(ending, _)| path.ends_with(ending)) {
        return send(format!("{status} No\r\nContent-Length: 0\r\n"), b"");
    }
    if path.starts_with("/api/models/") {
        let siblings: Vec<_> = site.files.keys().map(|name| json!({ "rfilename": name })).collect();
        let body = json!({ "sha": site.commit, "siblings": siblings }).to_string();
        return send(format!("200 OK\r\nContent-Length: {}\r\n", body.len()), body.as_bytes());
    }
    let name = path.rsplit('/').next().unwrap();
    let Some(bytes) = site.files.get(name) else {
        return send("404 Not Found\r\nContent-Length: 0\r\n".to_string(), b"");
    };
    // Large files are elsewhere, as they are on the Hub.
    if name.ends_with(".safetensors") && !path.starts_with("/elsewhere/") {
        let head = format!(
            "302 Found\r\nLocation: http://{}/elsewhere/{name}\r\nx-repo-commit: {}\r\nx-linked-etag: \"{name}-tag\"\r\n\
             x-linked-size: {}\r\nContent-Length: 0\r\n",
            headers["host"],
            site.commit,
            bytes.len()
        );
        return send(head, b"");
    }
    let Some(range) = headers.get("range").map(|range| range.trim_start_matches("bytes=")) else {
        let promised = site.short.get(name).copied().unwrap_or(bytes.len());
        let sent = site.cut.get(name).copied().unwrap_or(promised);
        let head = format!(
            "200 OK\r\nContent-Length: {promised}\r\nETag: \"{name}-tag\"\r\nx-repo-commit: {}\r\n",
            site.commit
        );
        return send(head, &bytes[..sent]);
    };
    let (start, end) = range.split_once('-').unwrap();
    let start: usize = start.parse().unwrap();
    let end = end.parse().map_or(bytes.len(), |end: usize| (end + 1).min(bytes.len()));
    let whole_file = range.ends_with('-');
    let promised = site.short.get(name).filter(|_| whole_file).copied().unwrap_or(end - start);
    let sent = site.cut.get(name).filter(|_| whole_file).copied().unwrap_or(promised);
    let head = format!(
        "206 Partial Content\r\nContent-Length: {promised}\r\nContent-Range: bytes {start}-{}/{}\r\nETag: \
         \"{name}-tag\"\r\nx-repo-commit: {}\r\n",
        end.saturating_sub(1),
        bytes.len(),
        site.commit
    );
    send(head, &bytes[start..start + sent]);
}

fn open(source: &str, settings: &HubSettings) -> peft::Result<Pretrained> {
    Pretrained::new(Checkpoint::open_with(source, settings)?)
}

fn told(result: peft::Result<Pretrained>) -> String {
    let error = result.unwrap_err();
    format!("{error}\nhint: {}", error.hint().unwrap_or("none"))
}

#[test]
fn a_model_is_fetched_once_and_then_used_from_the_cache() {
    let server = Server::start("llama3");
    let cache = tempfile::tempdir().unwrap();
    let mut settings = server.settings(&cache);
    settings.token = Some("secret".to_string());
    let model = open("org/name", &settings).unwrap();
    model.check().unwrap();
    assert_eq!(model.name(), "org/name");
    model.read("model.norm.weight", DType::F32, &Device::Cpu).unwrap();
    let names: Vec<_> = model
        .checkpoint()
        .companions()
        .unwrap()
        .iter()
        .map(|path| path.file_name().unwrap().to_owned())
        .collect();
    assert_eq!(names, ["chat_template.jinja", "generation_config.json", "tokenizer_config.json"]);

    let requests = server.requests();
    assert_eq!(requests[0].path, "/api/models/org/name/revision/main");
    assert!(requests.iter().all(|request| request.authorization.as_deref() == Some("Bearer secret")));
    let mut files: Vec<&str> =
        requests[1..].iter().map(|request| request.path.rsplit('/').next().unwrap()).collect();
    assert!(requests[1..].iter().all(|r| r.path.contains(COMMIT) || r.path.starts_with("/elsewhere/")));
    files.sort_unstable();
    files.dedup();
    assert_eq!(
        files,
        [
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer_config.json"
        ]
    );

    open("org/name", &settings).unwrap().check().unwrap();
    let again: Vec<String> = server.requests().into_iter().map(|request| request.path).collect();
    assert_eq!(again, ["/api/models/org/name/revision/main"]);

    settings.offline = true;
    open("org/name", &settings).unwrap().check().unwrap();
    assert_eq!(server.requests(), []);
}

#[test]
fn without_a_network_the_cache_is_good_enough() {
    let server = Server::start("llama");
    let cache = tempfile::tempdir().unwrap();
    let mut settings = server.settings(&cache);
    open("org/name", &settings).unwrap();
    // Nobody listens where somebody did a moment ago.
    settings.endpoint = format!("http://{}", TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
    open("org/name", &settings).unwrap().check().unwrap();
    let error = told(open("org/other", &settings));
    assert!(
        error.contains("`org/other` is neither a folder nor a .gguf file, nor could it be fetched"),
        "{error}"
    );
    assert!(error.contains("cannot be reached ("), "{error}");
    assert!(error.ends_with("hint: check the network, set HF_ENDPOINT to a mirror, or give a local folder"));
    settings.endpoint.clone_from(&server.address);
    server.site().refused.push(("main".to_string(), 503));
    open("org/name", &settings).unwrap().check().unwrap();
}

#[test]
fn a_revision_is_asked_for_and_kept_apart() {
    let server = Server::start("llama");
    let cache = tempfile::tempdir().unwrap();
    let mut settings = server.settings(&cache);
    open("org/name@refs/pr/7", &settings).unwrap();
    assert_eq!(server.requests()[0].path, "/api/models/org/name/revision/refs%2Fpr%2F7");
    let refs = settings.cache.join("models--org--name/refs");
    assert_eq!(fs::read_to_string(refs.join("refs/pr/7")).unwrap(), COMMIT);
    settings.offline = true;
    open("org/name@refs/pr/7", &settings).unwrap();
    open(&format!("org/name@{COMMIT}"), &settings).unwrap();
    assert!(told(open("org/name@main", &settings)).contains("`org/name` at `main` is not in the cache"));
}

#[test]
fn a_branch_that_moves_brings_its_new_files() {
    let server = Server::start("llama");
    let cache = tempfile::tempdir().unwrap();
    let settings = server.settings(&cache);
    let before = open("org/name", &settings).unwrap().checkpoint().path().to_path_buf();
    server.site().commit = COMMIT.replace('0', "f");
    let after = open("org/name", &settings).unwrap().checkpoint().path().to_path_buf();
    assert_ne!(before, after);
    assert!(before.join("config.json").exists());
}

/// Python's tools write no reference for the commit itself.
#[test]
fn what_another_program_has_fetched_is_not_fetched_again() {
    let server = Server::start("llama");
    let cache = tempfile::tempdir().unwrap();
    let settings = server.settings(&cache);
    open("org/name", &settings).unwrap();
    assert!(!settings.cache.join("models--org--name/refs").join(COMMIT).exists());
    server.requests();
    open("org/name", &settings).unwrap();
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn a_model_that_is_not_there_or_not_for_everybody_is_told_apart() {
    let server = Server::start("llama");
    let cache = tempfile::tempdir().unwrap();
    let mut settings = server.settings(&cache);
    server.site().refused.push(("/revision/v9".to_string(), 404));
    let error = told(open("org/name@v9", &settings));
    assert!(
        error.contains("has no model `org/name` with a revision `v9`\nhint: check the spelling"),
        "{error}"
    );
    server.site().refused.push(("/revision/main".to_string(), 401));
    let error = told(open("org/name", &settings));
    assert!(error.contains("does not let just anyone read `org/name` (status 401)\nhint: "), "{error}");
    assert!(error.contains("set HF_TOKEN"), "{error}");

    // The description of a gated model is public, its files are not.
    server.site().refused = vec![("config.json".to_string(), 403)];
    settings.token = Some("secret".to_string());
    let error = told(open("org/name", &settings));
    assert!(error.contains("does not let the owner of this token read `org/name` (status 403)"), "{error}");
    assert!(!error.contains("secret") && !format!("{settings:?}").contains("secret"));
    settings.offline = true;
    assert!(open("org/name", &settings).is_err());
}

#[test]
fn a_download_that_is_cut_goes_on_where_it_stopped() {
    let server = Server::start("llama");
    let cache = tempfile::tempdir().unwrap();
    let mut settings = server.settings(&cache);
    server.site().cut.insert("model.safetensors".to_string(), 1000);
    let error = told(open("org/name", &settings));
    assert!(error.contains("`org/name` could not be fetched: "), "{error}");
    assert!(error.ends_with("hint: try again; what has arrived is kept. Or give a local folder"), "{error}");
    settings.offline = true;
    assert!(told(open("org/name", &settings)).contains("is not in the cache"));
    settings.offline = false;
    server.site().cut.clear();
    server.requests();
    open("org/name", &settings).unwrap().check().unwrap();
    let ranges: Vec<_> = server.requests().into_iter().filter_map(|request| request.range).collect();
    assert!(ranges.contains(&"bytes=1000-".to_string()), "{ranges:?}");
}

#[test]
fn a_file_that_came_short_is_not_kept() {
    let server = Server::start("llama");
    let cache = tempfile::tempdir().unwrap();
    let settings = server.settings(&cache);
    server.site().short.insert("model.safetensors".to_string(), 1000);
    let error = told(open("org/name", &settings));
    assert!(error.contains("`model.safetensors` came with 1000 bytes instead of "), "{error}");
    server.site().short.clear();
    open("org/name", &settings).unwrap().check().unwrap();
}

/// A program that died between the last byte and the renaming.
#[test]
fn a_part_that_has_all_bytes_is_fetched_anew() {
    let server = Server::start("llama");
    let cache = tempfile::tempdir().unwrap();
    let settings = server.settings(&cache);
    let blobs = settings.cache.join("models--org--name/blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(
        blobs.join("model.safetensors-tag.part"),
        vec![7; server.site().files["model.safetensors"].len()],
    )
    .unwrap();
    let model = open("org/name", &settings).unwrap();
    model.check().unwrap();
    model.read("model.norm.weight", DType::F32, &Device::Cpu).unwrap();
}

#[test]
fn a_repository_without_readable_weights_is_refused_before_anything_is_fetched() {
    let cases: [(&[&str], &str); 5] = [
        (
            &["config.json", "pytorch_model.bin"],
            "has only pickled weights, which can run code when they are read\nhint: look for",
        ),
        (&["config.json"], "has no model.safetensors\n"),
        (
            &["a.gguf"],
            "has .gguf files and no config.json\nhint: download the .gguf file that you want, and give its path",
        ),
        (
            &["adapter_config.json", "adapter_model.safetensors"],
            "is an adapter, not a model\nhint: give the model",
        ),
        (&["README.md"], "has no config.json\n"),
    ];
    for (names, message) in cases {
        let files = names.iter().map(|name| ((*name).to_string(), Vec::new())).collect();
        let server = Server::serve(Site { files, commit: COMMIT.to_string(), ..Site::default() });
        let cache = tempfile::tempdir().unwrap();
        let error = told(open("org/name", &server.settings(&cache)));
        assert!(error.contains(message), "{error}");
        assert_eq!(server.requests().len(), 1);
    }
}

#[test]
fn downloads_are_reported() {
    let server = Server::start("llama");
    let cache = tempfile::tempdir().unwrap();
    let mut settings = server.settings(&cache);
    let last = Arc::new(Mutex::new(BTreeMap::new()));
    let seen = Arc::clone(&last);
    settings.on_progress = Some(Arc::new(move |name, done, total| {
        seen.lock().unwrap().insert(name.to_string(), (done, total));
    }));
    open("org/name", &settings).unwrap();
    let size = server.site().files["model.safetensors"].len() as u64;
    assert_eq!(last.lock().unwrap()["model.safetensors"], (size, size));
}

#[test]
fn the_program_tells_of_downloads_a_line_per_file() {
    let server = Server::start("llama");
    let cache = tempfile::tempdir().unwrap();
    let inspect = |log: &str| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_peft"));
        command.args(["inspect", "org/name", "--json", "--log", log]).current_dir(cache.path());
        command.env("HF_ENDPOINT", &server.address).env("HF_HOME", cache.path().join(log));
        let output = command.env_remove("HF_HUB_OFFLINE").env_remove("HF_HUB_CACHE").output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let told = inspect("auto");
    assert_eq!(told.lines().count(), 5, "{told}");
    assert!(told.contains("fetching model.safetensors ("), "{told}");
    assert_eq!(inspect("auto"), "", "nothing is fetched twice");
    assert_eq!(inspect("silent"), "");
    for line in inspect("json").lines() {
        assert_eq!(serde_json::from_str::<serde_json::Value>(line).unwrap()["event"], "note");
    }
}

#[test]
fn settings_come_from_the_variables_that_pythons_tools_know() {
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("token"), "from a file\n").unwrap();
    let with = |variables: &[(&str, &str)]| {
        let variables: BTreeMap<String, String> =
            variables.iter().map(|(name, value)| ((*name).to_string(), (*value).to_string())).collect();
        HubSettings::from_variables(|name| variables.get(name).cloned())
    };
    let home = home.path().to_str().unwrap();
    let settings = with(&[("HF_HOME", home), ("HF_ENDPOINT", "http://mirror/"), ("HF_HUB_OFFLINE", "1")]);
    assert_eq!(settings.endpoint, "http://mirror");
    assert_eq!(settings.cache, Path::new(home).join("hub"));
    assert_eq!(settings.token.as_deref(), Some("from a file"));
    assert!(settings.offline);
    let settings =
        with(&[("HF_HOME", home), ("HF_TOKEN", "own"), ("HF_HUB_CACHE", "/c"), ("HF_HUB_OFFLINE", "0")]);
    assert_eq!(settings.token.as_deref(), Some("own"));
    assert_eq!(settings.cache, Path::new("/c"));
    assert!(!settings.offline);
    let settings = with(&[("HOME", "/home/me"), ("HF_TOKEN", "")]);
    assert_eq!(settings.endpoint, "https://huggingface.co");
    assert_eq!(settings.cache, Path::new("/home/me/.cache/huggingface/hub"));
    assert_eq!(settings.token, None);
}
