//! A Hub that errs or means harm, played by servers on this machine: the token stays at home, names stay names, bytes
//! are those that were promised, and nothing waits for ever.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use peft::weights::{Checkpoint, HubSettings};
use serde_json::json;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::place::tree;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const WEIGHTS: &str = "model.safetensors";

/// One request as a server saw it.
#[derive(Debug, Clone)]
struct Request {
    path: String,
    headers: BTreeMap<String, String>,
}

impl Request {
    fn is_for(&self, ending: &str) -> bool {
        self.path.ends_with(ending)
    }

    /// Where the range begins.
    fn start(&self) -> usize {
        let range = self.headers.get("range").map(|range| range.trim_start_matches("bytes="));
        range.map_or(0, |range| range.split_once('-').unwrap().0.parse().unwrap())
    }
}

/// What a server sends, and for how long it is silent then before it hangs up.
struct Reply {
    head: String,
    body: Vec<u8>,
    silence: Duration,
    /// Bytes of the body that are sent at once, with a short pause behind them.
    piece: usize,
}

impl Reply {
    /// Lines of the head, the status first; what a head always has is added.
    fn new(lines: &[&str], body: &[u8]) -> Self {
        Self { head: lines.join("\r\n"), body: body.to_vec(), silence: Duration::ZERO, piece: usize::MAX }
    }

    fn moved(to: &str) -> Self {
        let linked = [format!("x-linked-etag: \"{}\"", sha256(&weights())), location(to)];
        let size = format!("x-linked-size: {}", weights().len());
        Self::new(&["302 Found", &linked[0], &linked[1], &size, "content-length: 0"], b"")
    }

    /// All bytes from where the request begins on, as storage sends them.
    fn bytes(request: &Request, bytes: &[u8]) -> Self {
        let (start, end) = (request.start(), bytes.len());
        let length = format!("content-length: {}", end - start);
        let range = format!("content-range: bytes {start}-{}/{end}", end - 1);
        match start {
            0 => Self::new(&["200 OK", &length], bytes),
            _ => Self::new(&["206 Partial Content", &length, &range], &bytes[start..]),
        }
    }

    /// Sends so many bytes every tenth of a second.
    fn slow(mut self, piece: usize) -> Self {
        self.piece = piece;
        self
    }

    fn silent(mut self) -> Self {
        self.silence = Duration::from_secs(5);
        self
    }
}

fn location(to: &str) -> String {
    format!("location: {to}")
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A safetensors file with one tensor.
fn weights() -> Vec<u8> {
    let header = r#"{"x":{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    bytes.extend((0..1000).flat_map(|n: u32| (n as f32).to_le_bytes()));
    bytes
}

struct Server {
    address: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// Answers as `script` says, and where that says nothing as the Hub does, with storage on the same server.
    fn start(script: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (seen, script) = (Arc::clone(&requests), Arc::new(script));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (seen, script) = (Arc::clone(&seen), Arc::clone(&script));
                std::thread::spawn(move || answer(&stream.unwrap(), &seen, &*script));
            }
        });
        Self { address, requests }
    }

    fn settings(&self, cache: &TempDir) -> HubSettings {
        let mut settings = HubSettings::from_variables(|_| None);
        settings.endpoint.clone_from(&self.address);
        settings.cache = cache.path().join("hub");
        settings.silence = Duration::from_millis(300);
        settings
    }

    fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }

    /// Where the ranges began that storage was asked for.
    fn starts(&self) -> Vec<usize> {
        let requests = self.requests();
        requests.iter().filter(|request| request.is_for("/storage")).map(Request::start).collect()
    }
}

fn answer(stream: &TcpStream, seen: &Mutex<Vec<Request>>, script: &dyn Fn(&Request) -> Option<Reply>) {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let headers = lines.take_while(|line| !line.is_empty()).filter_map(|line| {
        let (name, value) = line.split_once(':')?;
        Some((name.to_lowercase(), value.trim().to_string()))
    });
    let request = Request { path: first.split(' ').nth(1).unwrap().to_string(), headers: headers.collect() };
    seen.lock().unwrap().push(request.clone());
    let reply = script(&request).unwrap_or_else(|| honest(&request));
    let mut stream = stream;
    // A client that has gone away is no fault of the server.
    let _ = write!(stream, "HTTP/1.1 {}\r\nconnection: close\r\n\r\n", reply.head);
    for piece in reply.body.chunks(reply.piece) {
        if stream.write_all(piece).is_err() {
            return;
        }
        if piece.len() < reply.body.len() {
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    if !reply.silence.is_zero() {
        let _ = stream.set_read_timeout(Some(reply.silence));
        let _ = stream.read(&mut [0]);
    }
}

fn honest(request: &Request) -> Reply {
    if request.path.starts_with("/api/") {
        return description(COMMIT, &["config.json", WEIGHTS]);
    }
    if request.is_for("/storage") {
        return Reply::bytes(request, &weights());
    }
    if request.is_for(WEIGHTS) {
        return Reply::moved("/storage");
    }
    assert!(request.is_for("config.json"), "{}", request.path);
    Reply::new(&["200 OK", "content-length: 2", "etag: \"bf21\"", &format!("x-repo-commit: {COMMIT}")], b"{}")
}

fn description(commit: &str, names: &[&str]) -> Reply {
    let siblings: Vec<_> = names.iter().map(|name| json!({ "rfilename": name })).collect();
    let body = json!({ "sha": commit, "siblings": siblings }).to_string();
    Reply::new(&["200 OK", &format!("content-length: {}", body.len())], body.as_bytes())
}

fn open(settings: &HubSettings) -> peft::Result<Checkpoint> {
    Checkpoint::open_with("org/name", settings)
}

/// What a user is told, soon enough.
fn refused(settings: &HubSettings) -> String {
    let begun = Instant::now();
    let error = open(settings).unwrap_err();
    assert!(begun.elapsed() < Duration::from_millis(2500), "{:?}: {error}", begun.elapsed());
    format!("{error}\nhint: {}", error.hint().unwrap_or("none"))
}

/// The model of an honest Hub is in the cache, its bytes as they are there.
fn assert_fetched(settings: &HubSettings) {
    let checkpoint = open(settings).unwrap();
    assert_eq!(fs::read(checkpoint.path().join(WEIGHTS)).unwrap(), weights());
}

fn blobs(settings: &HubSettings) -> PathBuf {
    settings.cache.join("models--org--name/blobs")
}

/// Puts an interrupted download of the weights there.
fn leave_part(settings: &HubSettings, bytes: &[u8]) -> PathBuf {
    fs::create_dir_all(blobs(settings)).unwrap();
    let part = blobs(settings).join(format!("{}.part", sha256(&weights())));
    fs::write(&part, bytes).unwrap();
    part
}

#[test]
fn the_cache_is_laid_out_as_pythons_tools_have_it() {
    let server = Server::start(|_| None);
    let cache = tempfile::tempdir().unwrap();
    let settings = server.settings(&cache);
    assert_fetched(&settings);
    let sha = sha256(&weights());
    let names: Vec<String> = tree(&settings.cache).into_keys().collect();
    let snapshot = format!("models--org--name/snapshots/{COMMIT}");
    let mut expected = vec![
        ".locks".to_string(),
        ".locks/models--org--name".to_string(),
        format!(".locks/models--org--name/{sha}.lock"),
        ".locks/models--org--name/bf21.lock".to_string(),
        "models--org--name".to_string(),
        "models--org--name/blobs".to_string(),
        format!("models--org--name/blobs/{sha}"),
        "models--org--name/blobs/bf21".to_string(),
        "models--org--name/refs".to_string(),
        "models--org--name/refs/main".to_string(),
        "models--org--name/snapshots".to_string(),
        snapshot.clone(),
        format!("{snapshot}/config.json"),
        format!("{snapshot}/{WEIGHTS}"),
    ];
    expected.sort();
    assert_eq!(names, expected);
    assert_eq!(fs::read_to_string(settings.cache.join("models--org--name/refs/main")).unwrap(), COMMIT);
    let link = fs::read_link(settings.cache.join(snapshot).join(WEIGHTS)).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(sha));
}

#[test]
fn the_token_goes_to_the_endpoint_alone() {
    // Another port is another origin; what comes back from there is not trusted with the token either.
    let home = Arc::new(Mutex::new(String::new()));
    let told = Arc::clone(&home);
    let elsewhere = Server::start(move |_| Some(Reply::moved(&format!("{}/storage", told.lock().unwrap()))));
    let away = elsewhere.address.replace("127.0.0.1", "localhost");
    let server = Server::start(move |request| {
        request.is_for(WEIGHTS).then(|| Reply::moved(&format!("{away}/weights?signature=1")))
    });
    home.lock().unwrap().clone_from(&server.address);
    let cache = tempfile::tempdir().unwrap();
    let mut settings = server.settings(&cache);
    settings.token = Some("secret".to_string());
    assert_fetched(&settings);
    for request in server.requests() {
        let token = request.headers.get("authorization").map(String::as_str);
        let expected = (!request.is_for("/storage")).then_some("Bearer secret");
        assert_eq!(token, expected, "{}", request.path);
    }
    let away = elsewhere.requests();
    assert_eq!(away.len(), 1);
    assert!(!away[0].headers.contains_key("authorization"), "{away:?}");

    // The description of the repository is asked for under the same rule.
    let other = Server::start(|_| None);
    let to = format!("{}/api/models/org/name/revision/main", other.address);
    let server = Server::start(move |_| Some(Reply::moved(&to)));
    settings.endpoint.clone_from(&server.address);
    settings.cache = cache.path().join("empty");
    refused(&settings);
    assert!(other.requests().iter().all(|request| !request.headers.contains_key("authorization")));
}

#[test]
fn a_token_with_a_line_break_is_refused_without_showing_it() {
    let server = Server::start(|_| None);
    let cache = tempfile::tempdir().unwrap();
    let mut settings = server.settings(&cache);
    settings.token = Some("sec\nret".to_string());
    let error = refused(&settings);
    assert!(error.contains("HF_TOKEN has characters that no token has\nhint: "), "{error}");
    assert!(!error.contains("sec"), "{error}");
}

#[test]
fn names_from_the_server_never_become_other_paths() {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().join("bashrc");
    let absolute = target.to_str().unwrap().to_string();
    let mut tries = 0;
    let mut refused = |server: &Server| {
        tries += 1;
        let mut settings = server.settings(&outside);
        settings.cache = outside.path().join(format!("hub{tries}"));
        refused(&settings)
    };
    for etag in [absolute.as_str(), "../../../../bashrc", "..", ".", "a/b", ""] {
        let header = format!("etag: \"{etag}\"");
        let server = Server::start(move |request| {
            request
                .is_for("config.json")
                .then(|| Reply::new(&["200 OK", "content-length: 2", &header], b"{}"))
        });
        let error = refused(&server);
        assert!(error.contains("cannot be the name of a file"), "{etag}: {error}");
        let linked = format!("x-linked-etag: \"{etag}\"");
        let server = Server::start(move |request| {
            let head = ["302 Found", "location: /storage", &linked, "content-length: 0"];
            request.is_for(WEIGHTS).then(|| Reply::new(&head, b""))
        });
        let error = refused(&server);
        assert!(error.contains("cannot be the name of a file"), "{etag}: {error}");
    }
    for commit in [absolute.as_str(), "../../x", "main", "0123", ""] {
        let sha = commit.to_string();
        let server = Server::start(move |request| {
            request.path.starts_with("/api/").then(|| description(&sha, &["config.json", WEIGHTS]))
        });
        let error = refused(&server);
        assert!(error.contains("expected 40 hexadecimal digits"), "{commit}: {error}");
    }
    for name in ["tokenizer\\..\\x", "tokenizer\u{1b}[2J", "chat_template:x", "tokenizer\u{0}"] {
        let server = Server::start(move |request| {
            request.path.starts_with("/api/").then(|| description(COMMIT, &["config.json", WEIGHTS, name]))
        });
        let error = refused(&server);
        assert!(error.contains("whose name is not plain") && !error.contains('\u{1b}'), "{name}: {error}");
    }
    let written: Vec<String> = tree(outside.path()).into_keys().collect();
    assert!(!target.exists() && written.iter().all(|name| name.starts_with("hub")), "{written:?}");
}

#[test]
fn another_commit_than_the_one_that_was_asked_for_is_refused() {
    let other = format!("x-repo-commit: {}", COMMIT.replace('0', "f"));
    let server = Server::start(move |request| {
        let head = ["200 OK", "content-length: 2", "etag: \"bf21\"", &other];
        request.is_for("config.json").then(|| Reply::new(&head, b"{}"))
    });
    let cache = tempfile::tempdir().unwrap();
    let error = refused(&server.settings(&cache));
    assert!(error.contains(&format!("expected `{COMMIT}`")), "{error}");
    let settings = server.settings(&cache);
    let asked = "f".repeat(40);
    let error = Checkpoint::open_with(&format!("org/name@{asked}"), &settings).unwrap_err().to_string();
    assert!(error.contains(&format!("at `{asked}` is the commit `{COMMIT}`")), "{error}");
}

#[test]
fn a_flipped_bit_is_found_and_not_kept() {
    let mut flipped = weights();
    flipped[2000] ^= 1;
    let bytes = flipped.clone();
    let server =
        Server::start(move |request| request.is_for("/storage").then(|| Reply::bytes(request, &bytes)));
    let cache = tempfile::tempdir().unwrap();
    let error = refused(&server.settings(&cache));
    let expected =
        format!("`{WEIGHTS}` came with SHA-256 {}, expected {}", sha256(&flipped), sha256(&weights()));
    assert!(error.contains(&expected), "{error}");
    let server = Server::start(|_| None);
    let settings = server.settings(&cache);
    assert_fetched(&settings);
    assert_eq!(server.starts(), [0]);

    // In a part of an earlier try, the bit is found when all is there, and the file is begun anew.
    let cache = tempfile::tempdir().unwrap();
    let settings = server.settings(&cache);
    leave_part(&settings, &flipped[..3000]);
    assert_fetched(&settings);
    assert_eq!(server.starts(), [3000, 0]);
}

#[test]
fn a_part_goes_on_where_the_server_can() {
    let server = Server::start(|_| None);
    let cache = tempfile::tempdir().unwrap();
    let settings = server.settings(&cache);
    leave_part(&settings, &weights()[..3000]);
    assert_fetched(&settings);
    assert_eq!(server.starts(), [3000]);

    // A server that ignores ranges, or does not have this one, sends all of it.
    for status in ["200 OK", "416 Range Not Satisfiable"] {
        let server = Server::start(move |request| {
            let length = format!("content-length: {}", weights().len());
            match request.is_for("/storage") && request.start() > 0 {
                true if status.starts_with("200") => Some(Reply::new(&[status, &length], &weights())),
                true => Some(Reply::new(&[status, "content-length: 0"], b"")),
                false => None,
            }
        });
        let cache = tempfile::tempdir().unwrap();
        let settings = server.settings(&cache);
        leave_part(&settings, &weights()[..3000]);
        assert_fetched(&settings);
    }
    // Bytes from elsewhere in the file are refused.
    let server = Server::start(|request| {
        let range = format!("content-range: bytes 2000-{}/{}", weights().len() - 1, weights().len());
        let head = ["206 Partial Content", &range];
        (request.is_for("/storage") && request.start() > 0).then(|| Reply::new(&head, &weights()[2000..]))
    });
    let cache = tempfile::tempdir().unwrap();
    let settings = server.settings(&cache);
    leave_part(&settings, &weights()[..3000]);
    assert!(refused(&settings).contains("other bytes of `model.safetensors` than those from 3000 on"));
}

/// Small files come from the Hub itself, whose answer has the ETag and the bytes.
#[test]
fn a_file_that_changes_between_two_answers_is_begun_anew() {
    let server = Server::start(|request| {
        let (etag, body) = if request.start() == 0 { ("old", "{ }") } else { ("new", "  }") };
        let later = request.headers.contains_key("range");
        request.is_for("config.json").then(|| match later {
            true => {
                let head = ["206 Partial Content", "content-range: bytes 1-3/4", "etag: \"new\""];
                Reply::new(&head, body.as_bytes())
            }
            false => {
                Reply::new(&["200 OK", "content-length: 3", &format!("etag: \"{etag}\"")], body.as_bytes())
            }
        })
    });
    let cache = tempfile::tempdir().unwrap();
    let settings = server.settings(&cache);
    fs::create_dir_all(blobs(&settings)).unwrap();
    fs::write(blobs(&settings).join("old.part"), "x").unwrap();
    assert_fetched(&settings);
    assert_eq!(fs::read_to_string(blobs(&settings).join("old")).unwrap(), "{ }");
    assert!(!blobs(&settings).join("new").exists() && !blobs(&settings).join("old.part").exists());
}

#[test]
fn a_server_that_falls_silent_is_given_up() {
    let cache = tempfile::tempdir().unwrap();
    for silent in ["/revision/main", "config.json"] {
        let server = Server::start(move |request| {
            request
                .is_for(silent)
                .then(|| Reply::new(&["200 OK", "content-length: 9", "etag: x"], b"").silent())
        });
        let error = refused(&server.settings(&cache));
        assert!(error.contains("nothing came for 0.3 s"), "{error}");
    }
    let server = Server::start(|request| {
        let whole = Reply::bytes(request, &weights());
        let cut = Reply { body: whole.body[..1500.min(whole.body.len())].to_vec(), ..whole };
        (request.is_for("/storage") && request.start() == 0).then(|| cut.silent())
    });
    let settings = server.settings(&cache);
    let error = refused(&settings);
    assert!(
        error.contains("`org/name` could not be fetched: nothing came for 0.3 s\nhint: try again;"),
        "{error}"
    );
    let part = blobs(&settings).join(format!("{}.part", sha256(&weights())));
    assert_eq!(fs::read(part).unwrap(), weights()[..1500]);
    assert_fetched(&settings);
    assert_eq!(server.starts(), [0, 1500]);
}

/// A server that is never silent for long could keep a request for ever. Weights may take as long as they take.
#[test]
fn the_description_of_a_repository_has_a_time_and_weights_have_none() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(|request| {
        request.path.starts_with("/api/").then(|| description(COMMIT, &["config.json", WEIGHTS]).slow(1))
    });
    let error = refused(&server.settings(&cache));
    assert!(error.contains("cannot be reached (the answer took too long)"), "{error}");

    let server = Server::start(|request| {
        request.is_for("/storage").then(|| Reply::bytes(request, &weights()).slow(weights().len() / 18))
    });
    let settings = server.settings(&cache);
    let begun = Instant::now();
    assert_fetched(&settings);
    assert!(begun.elapsed() > settings.silence * 5, "{:?}", begun.elapsed());
}

#[test]
fn a_repository_of_endless_shards_is_refused_before_anything_is_fetched() {
    let shards: Vec<String> = (0..400_000).map(|n| format!("model-{n}.safetensors")).collect();
    let names = ["config.json", "model.safetensors.index.json"];
    let names: Vec<&str> = names.into_iter().chain(shards.iter().map(String::as_str)).collect();
    let listing = description(COMMIT, &names);
    let server = Server::start(move |_| Some(Reply::new(&[&listing.head], &listing.body)));
    let cache = tempfile::tempdir().unwrap();
    let error = refused(&server.settings(&cache));
    assert!(error.contains("lists 400002 files of a model for `org/name`, and at most 2000"), "{error}");
    assert_eq!(server.requests().len(), 1);
}

/// The bytes of a gzip file of about so many spaces: one, and then 258 times what came before, again and again.
fn zipped_spaces(count: usize) -> Vec<u8> {
    let mut bytes = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
    // A block of the fixed code, the space, and as often as needed the length 258 and the distance 1.
    let bits = "010".chars().chain("01010000".chars());
    let bits = bits.chain("1100010100000".chars().cycle().take(count / 258 * 13));
    let (mut byte, mut used) = (0u8, 0);
    for bit in bits {
        byte |= u8::from(bit == '1') << used;
        used += 1;
        if used == 8 {
            bytes.push(byte);
            (byte, used) = (0, 0);
        }
    }
    bytes
}

#[test]
fn an_answer_that_unpacks_to_gigabytes_is_refused() {
    let packed = zipped_spaces(4 << 30);
    let server = Server::start(move |request| {
        let length = format!("content-length: {}", packed.len());
        let head = ["200 OK", "content-encoding: gzip", &length];
        request.path.starts_with("/api/").then(|| Reply::new(&head, &packed))
    });
    let cache = tempfile::tempdir().unwrap();
    let error = refused(&server.settings(&cache));
    assert!(error.contains("sent an unreadable answer: it has more than 33554432 bytes"), "{error}");
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn templates_beside_the_default_are_fetched_too() {
    let server = Server::start(|request| {
        let name = "additional_chat_templates/tool_use.jinja";
        if request.path.starts_with("/api/") {
            let aside = ["additional_chat_templates/notes.md", "additional_chat_templates/a/b.jinja"];
            return Some(description(COMMIT, &["config.json", WEIGHTS, name, aside[0], aside[1]]));
        }
        let head = ["200 OK", "content-length: 5", "etag: \"bf22\""];
        request.is_for(&format!("/resolve/{COMMIT}/{name}")).then(|| Reply::new(&head, b"tools"))
    });
    let cache = tempfile::tempdir().unwrap();
    let settings = server.settings(&cache);
    assert_fetched(&settings);
    let checkpoint = open(&settings).unwrap();
    let template = checkpoint.path().join("additional_chat_templates/tool_use.jinja");
    assert_eq!(fs::read_link(&template).unwrap(), Path::new("../../../blobs/bf22"));
    assert_eq!(checkpoint.companions().unwrap(), [template]);
    let copy = cache.path().join("copy");
    fs::create_dir(&copy).unwrap();
    checkpoint.write_companions(&copy).unwrap();
    assert_eq!(fs::read_to_string(copy.join("additional_chat_templates/tool_use.jinja")).unwrap(), "tools");
    // Nothing is asked for twice, and the rest of the folder never.
    assert_eq!(server.requests().iter().filter(|request| request.path.contains("additional")).count(), 1);

    let server = Server::start(|_| {
        Some(description(COMMIT, &["config.json", WEIGHTS, "additional_chat_templates/.x.jinja"]))
    });
    let mut settings = server.settings(&cache);
    settings.cache = cache.path().join("other");
    assert!(refused(&settings).contains("whose name is not plain"));
}

#[test]
fn revisions_and_addresses_that_cannot_be_are_refused_before_anything_is_asked() {
    let server = Server::start(|_| None);
    let cache = tempfile::tempdir().unwrap();
    let settings = server.settings(&cache);
    let told = |source: &str| {
        let error = Checkpoint::open_with(source, &settings).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        format!("{error}\nhint: {}", error.hint().unwrap_or("none"))
    };
    let long = told(&format!("org/name@{}", "a".repeat(300)));
    assert!(long.contains("the revision of `org/name` has 300 characters, expected at most 200"), "{long}");
    assert!(told(&format!("org/{}", "a".repeat(100))).contains("a model on the Hub is written `org/name`"));
    for address in
        ["https://huggingface.co/org/name", "hf://org/name", "https://huggingface.co/org/name/tree/main"]
    {
        let told = told(address);
        assert!(told.ends_with("hint: write `org/name`, which is fetched from the Hub"), "{told}");
    }
    assert_eq!(server.requests().len(), 0);
}

#[test]
fn redirects_end_and_lead_to_the_web_alone() {
    let cache = tempfile::tempdir().unwrap();
    let redirected = |lines: &'static [&'static str]| {
        Server::start(move |request| request.is_for(WEIGHTS).then(|| Reply::new(lines, b"")))
    };
    for (lines, expected) in [
        (["302 Found", "location: ?again"].as_slice(), "redirects again after 10 redirects"),
        (&["302 Found", "content-length: 0"], "redirects without saying where to"),
        (&["302 Found", "location: file:///etc/passwd"], "expected http or https"),
        (&["302 Found", "location: ftp://127.0.0.1/x"], "expected http or https"),
        (&["302 Found", "location: http://user@127.0.0.1/x"], "with a user's name in it"),
        (&["302 Found", "location: http://[x"], "no address"),
    ] {
        let server = match expected.contains("again") {
            true => Server::start(|request| {
                request.path.contains(WEIGHTS).then(|| Reply::new(&["302 Found", "location: ?again"], b""))
            }),
            false => redirected(lines),
        };
        let error = refused(&server.settings(&cache));
        assert!(error.contains(expected), "{error}");
        assert!(server.requests().len() < 20);
    }
    for form in ["/storage", "//{}/storage", "../../../../storage", "http://{}/storage"] {
        let server = Server::start(move |request| {
            let to = form.replace("{}", &request.headers["host"]);
            request.is_for(WEIGHTS).then(|| Reply::moved(&to))
        });
        let cache = tempfile::tempdir().unwrap();
        assert_fetched(&server.settings(&cache));
    }
    for endpoint in ["file:///x", "huggingface.co", "http://"] {
        let mut settings = redirected(&[]).settings(&cache);
        settings.endpoint = endpoint.to_string();
        assert!(refused(&settings).contains("is no address of a Hub\nhint: set HF_ENDPOINT"), "{endpoint}");
    }
}

#[test]
fn more_or_other_bytes_than_promised_are_refused() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(|request| {
        // Without a length, and without end as far as this client can tell.
        request.is_for("/storage").then(|| Reply::new(&["200 OK"], &vec![7; 1 << 22]))
    });
    let settings = server.settings(&cache);
    let error = refused(&settings);
    assert!(
        error.contains(&format!("came with more than the {} bytes promised", weights().len())),
        "{error}"
    );
    let names: Vec<String> = tree(&blobs(&settings)).into_keys().collect();
    assert_eq!(names, ["bf21"]);

    let server = Server::start(|request| {
        request.is_for("/storage").then(|| Reply::new(&["200 OK", "content-length: 9"], b"123456789"))
    });
    let error = refused(&server.settings(&cache));
    assert!(error.contains(&format!("came with 9 bytes instead of {}", weights().len())), "{error}");

    let server = Server::start(|request| {
        let head =
            ["302 Found", "location: /storage", "x-linked-etag: abc", "x-linked-size: 1152921504606846976"];
        request.is_for(WEIGHTS).then(|| Reply::new(&head, b"")).or_else(|| {
            let head = ["200 OK", "content-length: 1152921504606846976"];
            request.is_for("/storage").then(|| Reply::new(&head, &weights()))
        })
    });
    let error = refused(&server.settings(&cache));
    assert!(
        error.contains("needs 1152921504606846976 bytes more, and the disk of the cache has "),
        "{error}"
    );
    assert!(error.contains("hint: free some space, or set HF_HUB_CACHE"), "{error}");
}

#[test]
fn two_processes_fetch_a_file_once() {
    let server = Server::start(|request| {
        if request.is_for("/storage") {
            std::thread::sleep(Duration::from_millis(200));
        }
        None
    });
    let cache = tempfile::tempdir().unwrap();
    let settings = server.settings(&cache);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| assert_fetched(&settings));
        }
    });
    assert_eq!(server.starts(), [0]);
}

#[test]
fn a_process_that_holds_a_file_and_fetches_nothing_is_named() {
    let server = Server::start(|_| None);
    let cache = tempfile::tempdir().unwrap();
    let mut settings = server.settings(&cache);
    settings.silence = Duration::from_millis(40);
    let locks = settings.cache.join(".locks/models--org--name");
    fs::create_dir_all(&locks).unwrap();
    let lock = fs::File::create(locks.join(format!("{}.lock", sha256(&weights())))).unwrap();
    lock.lock().unwrap();
    let error = refused(&settings);
    assert!(
        error.contains("another process is fetching this file, and nothing of it has come for"),
        "{error}"
    );
    drop(lock);
    settings.silence = Duration::from_millis(300);
    assert_fetched(&settings);
}

#[cfg(unix)]
#[test]
fn an_interrupted_download_says_what_is_kept() {
    let server = Server::start(|request| {
        let whole = Reply::bytes(request, &weights());
        let cut = Reply { body: whole.body[..1500].to_vec(), ..whole };
        request.is_for("/storage").then(|| cut.silent())
    });
    for command in [&["inspect", "org/name"] as &[&str], &["merge", "--model", "org/name", "--output", "m"]] {
        let home = tempfile::tempdir().unwrap();
        let mut process = std::process::Command::new(env!("CARGO_BIN_EXE_peft"));
        process.args(command).current_dir(home.path()).env("HF_ENDPOINT", &server.address);
        process.env("HF_HOME", home.path()).env_remove("HF_HUB_OFFLINE").env_remove("HF_HUB_CACHE");
        if command[0] == "merge" {
            process.args(["--adapter", "a"]);
        }
        let child = process.stderr(std::process::Stdio::piped()).spawn().unwrap();
        let part = home.path().join("hub/models--org--name/blobs");
        let part = part.join(format!("{}.part", sha256(&weights())));
        let begun = Instant::now();
        while fs::metadata(&part).map_or(0, |part| part.len()) < 1500 {
            assert!(begun.elapsed() < Duration::from_secs(10));
            std::thread::sleep(Duration::from_millis(5));
        }
        // Bytes are written before they are told of.
        std::thread::sleep(Duration::from_millis(100));
        let id = libc::pid_t::try_from(child.id()).unwrap();
        // SAFETY: the process is a child that nobody has waited for, so the id is its own.
        assert_eq!(unsafe { libc::kill(id, libc::SIGINT) }, 0);
        let output = child.wait_with_output().unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(130), "{told}");
        let kept =
            "interrupted; 1.5 KiB of 4.0 KiB of `model.safetensors` are kept, and the same command goes on";
        assert!(told.contains(kept), "{told}");
        assert_eq!(fs::metadata(&part).unwrap().len(), 1500);
    }
}
