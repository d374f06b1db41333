//! Ends the program with a message where no error can be returned: out of memory, and a mapped file that became
//! unreadable. The exit status is 1. Unfinished output keeps its temporary name, and the next command that writes there
//! removes it.

use std::alloc::Layout;
use std::sync::atomic::{AtomicBool, Ordering};

use super::terminal::Log;
use crate::error::{Error, Result, allocation_may_fail};

/// Tells a user what to do when the system refuses threads.
pub(super) const TOO_TIGHT: &str =
    "allow more memory or processes (`ulimit -v`, `ulimit -u`), or compute with `--threads 1`";

/// The most threads that compute: more only wait for each other, and each has a stack.
pub(super) const MOST_THREADS: usize = 1024;

/// Whether messages are JSON.
static AS_JSON: AtomicBool = AtomicBool::new(false);

/// Ends the program because the system has no memory for `layout`. The binary's allocator calls it. Where the caller of the
/// allocator gives an error of its own, that error names the file, and the program goes on.
pub fn out_of_memory(layout: Layout) {
    if allocation_may_fail() {
        return;
    }
    let mut message = Message::error();
    message.text(b"out of memory: the system refused ");
    message.number(layout.size());
    message.text(b" bytes");
    message.hint();
    message.text(b"for training, lower `train.memory_budget`, `train.batch_size` or `data.max_length`, and go on from the last ");
    message.text(b"checkpoint with `--resume`; otherwise take a smaller model or prompt, or raise the limit (`ulimit -v`)");
    message.end()
}

/// Bytes that a handler's own work takes at most, beside what the system saves before it.
#[cfg(target_os = "linux")]
const HANDLER: usize = 64 << 10;

/// Listens for mapped files that cannot be read, and starts the threads that compute: as many as are asked for, else as many as
/// the environment says.
pub(super) fn begin(log: Log, threads: Option<u64>) -> Result<()> {
    AS_JSON.store(log == Log::Json, Ordering::Relaxed);
    // A file beyond the limit of its size is an error of the write then, and not the end of the program.
    #[cfg(unix)]
    // SAFETY: ignoring a signal is always valid.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
    #[cfg(target_os = "linux")]
    bus::listen();
    let threads = threads.map_or_else(threads_of_environment, |threads| Ok(threads as usize))?;
    let threads = rayon::ThreadPoolBuilder::new().num_threads(threads).start_handler(|_| {
        #[cfg(target_os = "linux")]
        bus::make_room();
    });
    threads.build_global().map_err(|error| {
        Error::invalid(format!(
            "out of memory or threads: the threads that compute cannot be started: {error}"
        ))
        .with_hint(TOO_TIGHT)
    })
}

/// The threads that `RAYON_NUM_THREADS` asks for; 0 where it is not set, which stands for one per processor.
fn threads_of_environment() -> Result<usize> {
    const VARIABLE: &str = "RAYON_NUM_THREADS";

    let Some(value) = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()) else { return Ok(0) };
    let value = value.to_string_lossy();
    match value.parse() {
        Ok(threads) if threads <= MOST_THREADS => Ok(threads),
        _ => {
            let processors = std::thread::available_parallelism().map_or(1, usize::from);
            Err(Error::request(format!(
                "`{VARIABLE}` is `{value}`; expected a whole number up to {MOST_THREADS}"
            ))
            .with_hint(format!("leave it unset to use all {processors} processors")))
        }
    }
}

fn is_json() -> bool {
    AS_JSON.load(Ordering::Relaxed)
}

/// A message that is put together without allocating, for where nothing else works.
struct Message {
    bytes: [u8; 2048],
    len: usize,
}

impl Message {
    /// The beginning of an error, in the form that messages have.
    fn error() -> Self {
        let mut message = Self { bytes: [0; 2048], len: 0 };
        // A progress bar may stand there.
        #[cfg(unix)]
        // SAFETY: asks about a descriptor, and may be asked at any place.
        if unsafe { libc::isatty(libc::STDERR_FILENO) } == 1 {
            message.text(b"\r\x1b[2K");
        }
        message.text(if is_json() { b"{\"event\":\"error\",\"text\":\"" } else { b"error: " });
        message
    }

    /// Begins the hint; the text that is added next belongs to it.
    fn hint(&mut self) {
        self.text(if is_json() { b"\",\"hint\":\"" } else { b"\nhint: " });
    }

    /// Adds a byte of a name that somebody else has chosen.
    fn foreign(&mut self, byte: u8) {
        match byte {
            b'"' | b'\\' if is_json() => self.text(&[b'\\', byte]),
            0..b' ' | 127 => self.byte(b'?'),
            byte => self.byte(byte),
        }
        // Control characters of two bytes, and what separates lines or turns text around.
        let obeyed = match self.bytes[..self.len] {
            [.., 0xc2, 0x80..0xa0] | [.., 0xd8, 0x9c] => 2,
            [.., 0xe2, 0x80, 0x8e | 0x8f | 0xa8..0xaf] | [.., 0xe2, 0x81, 0xa6..0xaa] => 3,
            _ => return,
        };
        self.len -= obeyed;
        self.byte(b'?');
    }

    /// Adds a byte; what does not fit is left out.
    fn byte(&mut self, byte: u8) {
        if let Some(free) = self.bytes.get_mut(self.len) {
            *free = byte;
            self.len += 1;
        }
    }

    fn text(&mut self, text: &[u8]) {
        text.iter().for_each(|byte| self.byte(*byte));
    }

    fn number(&mut self, number: usize) {
        let mut digits = [0; 20];
        let (mut rest, mut count) = (number, 0);
        while rest > 0 || count == 0 {
            digits[count] = b'0' + (rest % 10) as u8;
            (rest, count) = (rest / 10, count + 1);
        }
        digits[..count].iter().rev().for_each(|digit| self.byte(*digit));
    }

    fn last(&mut self) {
        self.text(if is_json() { b"\",\"exit_code\":1}\n" } else { b"\n" });
    }

    /// Writes the message to stderr, once in a program however many threads fail, and ends the program with status 1.
    #[cfg(unix)]
    fn end(&mut self) -> ! {
        static ENDED: AtomicBool = AtomicBool::new(false);
        if ENDED.swap(true, Ordering::SeqCst) {
            // Another thread is writing. It ends the program, and with it this wait.
            loop {
                std::hint::spin_loop();
            }
        }
        self.last();
        // SAFETY: the bytes are this message's, and both calls may be made at any place, signal handlers included.
        unsafe {
            libc::write(libc::STDERR_FILENO, self.bytes.as_ptr().cast(), self.len);
            libc::_exit(1)
        }
    }

    #[cfg(not(unix))]
    fn end(&mut self) -> ! {
        use std::io::Write;

        self.last();
        // Stderr is not buffered. Where even that fails, the status has to do.
        let _ = std::io::stderr().write_all(&self.bytes[..self.len]);
        std::process::exit(1)
    }
}

/// SIGBUS: the pages of a mapped file are gone, because somebody cut the file or its disk failed.
#[cfg(target_os = "linux")]
mod bus {
    use std::ptr;
    use std::sync::OnceLock;

    use super::{HANDLER, Message};
    use crate::weights::mapped_path_at;

    /// Stores the previous signal action, which is used for addresses outside of our mapped files.
    static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

    /// Installs the handler, and room for it on the calling thread.
    pub(super) fn listen() {
        make_room();
        // SAFETY: all zeros are an action; the handler has the signature that `SA_SIGINFO` asks for and calls nothing that
        // may not be called in a handler.
        unsafe {
            let mut before: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut before) != 0 {
                return;
            }
            // Set before the handler can run, so that it never waits for it.
            let _ = BEFORE.set(before);
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&raw mut action.sa_mask);
            libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut());
        }
    }

    extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        // SAFETY: the system hands over a valid `info` of this signal.
        let address = unsafe { (*info).si_addr() } as usize;
        let mut message = Message::error();
        message.text(b"`");
        if !mapped_path_at(address, |byte| message.foreign(byte)) {
            return pass_on(signal, info, context);
        }
        message.text(b"` can no longer be read: the file was cut while it was in use, or its disk failed");
        message.hint();
        message.text(b"begin again with a whole file that stays as it is; a training run goes on from its last checkpoint with ");
        message.text(b"`--resume`");
        message.end()
    }

    /// Does what would have been done without this handler.
    fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        let before = BEFORE.get().filter(|before| {
            before.sa_flags & libc::SA_SIGINFO != 0
                && before.sa_sigaction != libc::SIG_DFL
                && before.sa_sigaction != libc::SIG_IGN
        });
        // SAFETY: with `SA_SIGINFO` the action is a function of these three arguments. The default action is always valid;
        // the instruction that failed runs again and meets it.
        unsafe {
            match before {
                Some(before) => {
                    type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
                    let handler = std::mem::transmute::<usize, Handler>(before.sa_sigaction);
                    handler(signal, info, context);
                }
                None => {
                    libc::signal(signal, libc::SIG_DFL);
                }
            }
        }
    }

    /// Gives the calling thread a stack for handlers. That of the standard library is as large as what the system saves on it,
    /// tiles of AMX included, and has no room for a handler's own work.
    pub(super) fn make_room() {
        // SAFETY: asks for a number.
        let saved = unsafe { libc::getauxval(libc::AT_MINSIGSTKSZ) } as usize;
        let size = (saved + HANDLER).next_multiple_of(4 << 10);
        // SAFETY: the mapping is new and stays for as long as the thread, that is, to the end of the program. Where there is
        // no memory for it, the stack that the thread has has to do.
        unsafe {
            let (access, flags) =
                (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let stack = libc::mmap(ptr::null_mut(), size, access, flags, -1, 0);
            if stack != libc::MAP_FAILED {
                let stack = libc::stack_t { ss_sp: stack, ss_flags: 0, ss_size: size };
                libc::sigaltstack(&raw const stack, ptr::null_mut());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_the_last_message_cannot_turn_text_around() {
        let name = "a\nö\u{85}漢\u{2028}\u{202e}\u{2069}\u{200f}\u{61c}z";
        let mut message = Message { bytes: [0; 2048], len: 0 };
        name.bytes().for_each(|byte| message.foreign(byte));
        assert_eq!(str::from_utf8(&message.bytes[..message.len]).unwrap(), "a?ö?漢?????z");
    }
}
