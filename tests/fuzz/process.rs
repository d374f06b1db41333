//! A class of inputs, read in a second process whose memory and time are bounded.

use std::any::Any;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Write as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

use peft::Error;

use super::chance::Chance;
use super::{Class, Files};

/// Inputs of a class, and the variable that says how many instead.
const COUNT: (&str, u64) = ("PEFT_FUZZ", 1000);
/// What all choices follow from, and its variable.
const SEED: (&str, u64) = ("PEFT_FUZZ_SEED", 0);
/// Names a folder that holds one input, which is read instead of mutated ones.
const REPLAY: &str = "PEFT_FUZZ_REPLAY";
/// Tells the second process the number of its first input.
const CHILD: &str = "PEFT_FUZZ_CHILD";
/// The folder that the second process works in.
const PLACE: &str = "PEFT_FUZZ_PLACE";

/// Address space of the second process: tests and threads take a quarter of it, inputs have some hundred kilobytes.
const MEMORY: u64 = 1 << 30;
/// Seconds of processor time that an input may take.
const CPU_SECONDS: u64 = 5;
/// Nothing that waits for a device or another process gets longer than this.
const SILENCE: Duration = Duration::from_secs(120);
/// A message of more characters hides what it says.
const MESSAGE: usize = 4096;
/// What a message without a file is about: something that it names, or one of the things that a command has one of.
const SUBJECTS: [&str; 4] = ["`", "the model", "the tokenizer", "the chat template"];
/// One input of so many has to be accepted at least.
const REACH: u64 = 50;
/// After so many failures a class ends: each one costs a process.
const ENOUGH: usize = 12;

/// Reads every input of a class and fails with a list of those that did not end as they should.
pub(super) fn run(name: &str, class: &dyn Class) {
    if let Some(start) = variable(CHILD) {
        read_all(name, class, start);
        return;
    }
    let count = variable(COUNT.0).unwrap_or(COUNT.1);
    let (faults, accepted) = faults(name, count);
    let mut text = String::new();
    for Fault { case, what, kept } in &faults {
        write!(text, "\ninput {case}: {what}\n  kept in {}\n", kept.display()).unwrap();
    }
    assert!(
        faults.is_empty(),
        "{} inputs of `{name}` (seed {}) failed; to read one again:\n\
         {REPLAY}=FOLDER cargo test --release -- --exact fuzz::{name}\n{text}",
        faults.len(),
        seed(),
    );
    // A class that refuses nearly everything at its door tests the door alone.
    let few = count < 1000 || replayed().is_some();
    let enough = accepted.is_none_or(|accepted| few || accepted * REACH >= count);
    assert!(enough, "only {} of {count} inputs of `{name}` were accepted", accepted.unwrap_or(0));
}

/// Where the first `count` inputs of a class go wrong, and how many are accepted by a process that comes to the end.
pub(super) fn faults(name: &str, count: u64) -> (Vec<Fault>, Option<u64>) {
    // Files that are synced cost nothing in memory.
    let place = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let mut parent = Parent { name: name.to_string(), count, place, faults: Vec::new(), accepted: None };
    let mut next = Some(0);
    while let Some(start) = next.filter(|_| parent.faults.len() < ENOUGH) {
        next = parent.watch(start);
    }
    (parent.faults, parent.accepted)
}

/// Whether this is the process that reads; it has to call [`run`].
pub(super) fn is_child() -> bool {
    variable(CHILD).is_some()
}

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

fn seed() -> u64 {
    variable(SEED.0).unwrap_or(SEED.1)
}

/// Where an input goes wrong.
pub(super) struct Fault {
    pub(super) case: u64,
    pub(super) what: String,
    pub(super) kept: PathBuf,
}

/// The process that starts others and watches them.
struct Parent {
    name: String,
    count: u64,
    place: tempfile::TempDir,
    faults: Vec<Fault>,
    accepted: Option<u64>,
}

impl Parent {
    /// Follows a process to its end, or past enough faults; gives the input to go on with where it died.
    fn watch(&mut self, start: u64) -> Option<u64> {
        let mut child = self.start(start);
        let lines = lines(child.stdout.take().unwrap());
        let mut case = None;
        let found = loop {
            match lines.recv_timeout(SILENCE) {
                Ok(line) => match line.split_once(' ') {
                    Some(("@case", number)) => case = Some(number.parse().unwrap()),
                    Some(("@fault", what)) => {
                        self.keep(case.unwrap(), &what.replace("\\n", "\n"));
                        if self.faults.len() >= ENOUGH {
                            break None;
                        }
                    }
                    Some(("@done", accepted)) => {
                        self.accepted = Some(accepted.parse().unwrap());
                        break None;
                    }
                    _ => {}
                },
                Err(RecvTimeoutError::Disconnected) => break Some(self.ending(child.wait().unwrap())),
                Err(RecvTimeoutError::Timeout) => break Some("neither ended nor took time".to_string()),
            }
        };
        child.kill().unwrap();
        child.wait().unwrap();
        let (what, case) = (found?, case.unwrap_or(start));
        self.keep(case, &what);
        Some(case + 1)
    }

    fn start(&self, start: u64) -> Child {
        let errors = fs::File::create(self.place.path().join("stderr")).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        if let Some(folder) = replayed() {
            command.env(REPLAY, folder);
        }
        command
            .args(["--exact", &format!("fuzz::{}", self.name), "--nocapture", "--test-threads=1"])
            .env(CHILD, start.to_string())
            .env(COUNT.0, self.count.to_string())
            .env(PLACE, self.place.path())
            .env("RUST_BACKTRACE", "0")
            .env("RAYON_NUM_THREADS", "2")
            // What looks like the name of a model on the Hub must not be asked for.
            .env("HF_HUB_OFFLINE", "1")
            .env("HF_HOME", self.place.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .unwrap()
    }

    /// How a process died, with its last words.
    fn ending(&self, status: ExitStatus) -> String {
        let errors = fs::read(self.place.path().join("stderr")).unwrap();
        let errors = String::from_utf8_lossy(&errors);
        let said: Vec<&str> =
            errors.lines().filter(|line| !line.is_empty() && !line.starts_with("note: ")).collect();
        let last = said[said.len().saturating_sub(3)..].join(" / ");
        #[cfg(unix)]
        if std::os::unix::process::ExitStatusExt::signal(&status) == Some(libc::SIGXCPU) {
            return format!("took more than {CPU_SECONDS} s");
        }
        format!("ended the process: {status}; {last}")
    }

    /// Puts the input where it can be read again.
    fn keep(&mut self, case: u64, what: &str) {
        let replayed = replayed();
        let kept = replayed.clone().unwrap_or_else(|| {
            let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/fuzz");
            root.join(format!("{}-{}-{case}", self.name, seed()))
        });
        if replayed.is_none() {
            let _ = fs::remove_dir_all(&kept);
            write(&kept, &files_of(&input_folder(self.place.path(), case)));
        }
        self.faults.push(Fault { case, what: what.to_string(), kept });
    }
}

fn input_folder(place: &Path, case: u64) -> PathBuf {
    place.join(format!("input-{case}"))
}

/// The folder that a class may use for what all its inputs share; only the second process has one.
pub(super) fn place() -> PathBuf {
    PathBuf::from(std::env::var_os(PLACE).unwrap())
}

fn replayed() -> Option<PathBuf> {
    // A class may change the current folder.
    let folder = std::env::var_os(REPLAY).map(PathBuf::from)?;
    Some(fs::canonicalize(&folder).unwrap_or(folder))
}

fn lines(stdout: ChildStdout) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                break;
            }
        }
    });
    receiver
}

/// The inputs of a class by their number: first the attacks, then mutated seeds.
struct Inputs<'a> {
    name: &'a str,
    class: &'a dyn Class,
    seeds: Vec<Files>,
    attacks: Vec<Files>,
}

impl<'a> Inputs<'a> {
    fn of(name: &'a str, class: &'a dyn Class) -> Self {
        let seeds = class.seeds();
        Self { name, class, attacks: class.attacks(&seeds), seeds }
    }

    fn input(&self, case: u64) -> Files {
        if let Some(attack) = self.attacks.get(case as usize) {
            return attack.clone();
        }
        let mut chance = Chance::new(self.name, seed(), case);
        let mut files = chance.pick(&self.seeds).clone();
        loop {
            self.class.mutate(&mut files, &mut chance);
            if !chance.one_in(3) {
                return files;
            }
        }
    }
}

/// What the second process does.
fn read_all(name: &str, class: &dyn Class, start: u64) {
    limit(libc::RLIMIT_AS, MEMORY);
    // A core file of each abort would fill the disk.
    limit(libc::RLIMIT_CORE, 0);
    let inputs = Inputs::of(name, class);
    let place = place();
    for (number, seed) in inputs.seeds.iter().enumerate().filter(|_| start == 0) {
        let folder = place.join("seed");
        write(&folder, seed);
        if let Err(error) = class.read(&folder) {
            panic!("seed {number} of `{name}` is not right: {error}");
        }
        fs::remove_dir_all(&folder).unwrap();
    }
    let end = if replayed().is_some() { 1 } else { variable(COUNT.0).unwrap_or(COUNT.1) };
    let mut accepted = 0;
    for case in start..end {
        say("case", &case.to_string());
        let folder = input_folder(&place, case);
        let files = match replayed() {
            Some(kept) => files_of(&kept),
            None => inputs.input(case),
        };
        write(&folder, &files);
        limit_time();
        let (is_accepted, fault) = outcome(class, &folder, &files);
        accepted += u64::from(is_accepted);
        let _ = fs::remove_dir_all(&folder);
        if let Some(fault) = fault {
            write(&folder, &files);
            say("fault", &fault);
        }
    }
    say("done", &accepted.to_string());
}

/// A line for the first process. The line before may be unfinished.
fn say(word: &str, text: &str) {
    let line = format!("\n@{word} {}\n", text.replace('\n', "\\n"));
    std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
}

/// Whether these files are accepted, and what is wrong with the way in which reading them ended.
fn outcome(class: &dyn Class, folder: &Path, files: &Files) -> (bool, Option<String>) {
    match catch_unwind(AssertUnwindSafe(|| class.read(folder))) {
        Ok(result) => (result.is_ok(), complaint(&result, folder, files)),
        Err(panic) => (false, Some(format!("panicked: {}", message(&*panic)))),
    }
}

fn complaint(result: &peft::Result<()>, folder: &Path, files: &Files) -> Option<String> {
    let added = names(folder).into_iter().find(|name| !files.contains_key(name));
    let Err(error) = result else {
        return added.filter(|name| name.contains("partial")).map(|name| format!("left `{name}` behind"));
    };
    if let Some(name) = added {
        return Some(format!("failed and left `{name}` behind"));
    }
    let text = error.to_string();
    let complaint = if text.trim().is_empty() {
        "has an empty message"
    } else if text.chars().count() > MESSAGE {
        "has a message without end"
    } else if ["panicked", "unwrap()", "RUST_BACKTRACE"].iter().any(|word| text.contains(word)) {
        "shows the inside"
    } else if !says_where(error) && !SUBJECTS.iter().any(|subject| text.contains(subject)) {
        "does not say what it is about"
    } else if !matches!(error.exit_code(), 1 | 2) {
        "has another exit status than 1 and 2"
    } else {
        return None;
    };
    Some(format!("the error {complaint}: {}", text.chars().take(300).collect::<String>()))
}

fn says_where(error: &Error) -> bool {
    matches!(error, Error::At { .. } | Error::AtLine { .. } | Error::InTensor { .. })
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or_default()
}

fn write(folder: &Path, files: &Files) {
    for (name, bytes) in files {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

fn names(folder: &Path) -> BTreeSet<String> {
    let found = crate::place::tree(folder);
    found.into_iter().filter(|(_, bytes)| bytes.is_some()).map(|(name, _)| name).collect()
}

fn files_of(folder: &Path) -> Files {
    let found = crate::place::tree(folder);
    found.into_iter().filter_map(|(name, bytes)| Some((name, bytes?))).collect()
}

/// Sets a limit of this process, which runs one test.
fn limit(resource: libc::__rlimit_resource_t, most: u64) {
    let limit = libc::rlimit { rlim_cur: most, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the call reads one struct and changes a setting of this process alone.
    assert_eq!(unsafe { libc::setrlimit(resource, &raw const limit) }, 0);
}

/// Lets the process use a few seconds more than it has used so far; the system ends it after that.
fn limit_time() {
    let mut used = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one struct, which is there.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut used) }, 0);
    limit(libc::RLIMIT_CPU, used.tv_sec as u64 + 1 + CPU_SECONDS);
}
