//! One file of a repository: fetched, checked against what was promised of it, and given its name in the cache.
//!
//! The Hub answers with a redirect that says what the file is (ETag, size), and storage elsewhere sends the bytes. Both
//! are answers to one request, so that what is looked at is what is used.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, Write};
use std::path::Path;

use sha2::{Digest, Sha256};
use ureq::Body;
use ureq::http::{HeaderMap, Response};

use super::super::digest::hexadecimal;
use super::super::output::free_bytes;
use super::cache::{Etag, Repository};
use super::client::{Client, Failure, Reply, Request, describe, encoded};
use super::{HubId, HubSettings};
use crate::error::{Context, Error, Result};

/// How often a file is begun anew when what is here turns out to be of another one.
const MOST_ATTEMPTS: usize = 3;

/// Bytes that are read at once.
const PIECE: usize = 1 << 18;

/// What the answers say about a file.
#[derive(Default)]
struct Promise {
    etag: Option<Etag>,
    size: Option<u64>,
}

impl Promise {
    /// Takes what a redirect says about the file that it leads to.
    fn learn(&mut self, headers: &HeaderMap, commit: &str) -> Result<()> {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        if let Some(other) = text("x-repo-commit").filter(|other| *other != commit) {
            return Err(changed(&format!("commit `{}`, expected `{commit}`", other.escape_debug())));
        }
        if let Some(etag) = text("x-linked-etag").map(Etag::read).transpose()? {
            if self.etag.as_ref().is_some_and(|known| *known != etag) {
                return Err(changed("two ETags for one file"));
            }
            self.etag = Some(etag);
        }
        if let Some(size) = text("x-linked-size").and_then(|size| size.parse().ok()) {
            self.size = Some(size);
        }
        Ok(())
    }

    /// Where the bytes of an answer begin, asked for from `have` on, and how many the whole file has.
    fn extent(&self, name: &str, response: &Response<Body>, have: u64) -> Result<(u64, u64)> {
        let (start, total) = match response.status().as_u16() {
            206 => range(response)
                .filter(|(start, _)| *start == have)
                .ok_or_else(|| changed(&format!("other bytes of `{name}` than those from {have} on")))?,
            // A server that does not know ranges sends everything.
            _ => (0, length(response)),
        };
        let size = self.size.or(total).ok_or_else(|| changed(&format!("no length for `{name}`")))?;
        match total.filter(|total| *total != size) {
            Some(total) => Err(short(name, total, size)),
            None if start > size => Err(short(name, start, size)),
            None => Ok((start, size)),
        }
    }
}

fn changed(what: &str) -> Error {
    Error::invalid(format!("the server answers with {what}")).with_hint("try again; or check HF_ENDPOINT")
}

/// Fetches files of one commit.
pub(super) struct Download<'a> {
    pub(super) client: &'a Client<'a>,
    pub(super) cache: &'a Repository<'a>,
    pub(super) settings: &'a HubSettings,
    pub(super) id: &'a HubId,
    pub(super) commit: &'a str,
}

impl Download<'_> {
    /// Fetches one file unless it is there.
    pub(super) fn file(&self, name: &str) -> Result<(), Failure> {
        if self.cache.snapshot(self.commit).join(name).is_file() {
            return Ok(());
        }
        for _ in 0..MOST_ATTEMPTS {
            if let Some(etag) = self.attempt(name)? {
                return Ok(self.cache.link(&etag, self.commit, name)?);
            }
        }
        Err(changed(&format!("another `{name}` each time that it is asked for")).into())
    }

    /// Gets the bytes into the cache. `None` where what was kept of an earlier try did not fit, and is gone now.
    fn attempt(&self, name: &str) -> Result<Option<Etag>, Failure> {
        let name_there: Vec<String> = name.split('/').map(encoded).collect();
        let path = format!("{}/resolve/{}/{}", self.id.id, self.commit, name_there.join("/"));
        let mut request = self.client.request(&path)?;
        let mut promise = Promise::default();
        let first = self.identify(&mut request, &mut promise)?;
        let etag = match &promise.etag {
            Some(etag) => etag.clone(),
            None => own_etag(first.as_ref())?,
        };
        let expected = promise.size.or_else(|| first.as_ref().and_then(length));
        if self.cache.has_blob(&etag, expected) {
            return Ok(Some(etag));
        }
        let _lock = self.cache.lock(&etag, |length| self.tell(name, length, expected.unwrap_or(length)))?;
        // What the wait has told of is over, so that a signal does not speak of a part.
        let whole = expected.unwrap_or_default();
        if self.cache.has_blob(&etag, expected) {
            self.tell(name, whole, whole);
            return Ok(Some(etag));
        }
        let part = self.cache.part(&etag)?;
        if expected.is_some_and(|expected| is_whole(&part, &etag, expected)) {
            self.cache.keep(&etag, &part, &File::open(&part).at(&part)?)?;
            self.tell(name, whole, whole);
            return Ok(Some(etag));
        }
        let have = match fs::metadata(&part).map_or(0, |part| part.len()) {
            // All bytes or more, and they are wrong, or nothing says that they are right.
            have if expected.is_some_and(|expected| have >= expected) => 0,
            have => have,
        };
        let response = match first.filter(|_| have == 0) {
            Some(response) => response,
            None => request.answer(have, |headers| promise.learn(headers, self.commit))?,
        };
        let is_usable = matches!(response.status().as_u16(), 200 | 206);
        let is_other = is_usable && promise.etag.is_none() && own_etag(Some(&response))? != etag;
        if have > 0 && (response.status() == 416 || is_other) {
            fs::remove_file(&part).at(&part)?;
            return Ok(None);
        }
        if !is_usable {
            return Err(request.failed(response.status().as_u16()));
        }
        let (start, size) = promise.extent(name, &response, have)?;
        refuse_full_disk(name, &part, size.saturating_sub(start))?;
        let mut file = open_part(&part).at(&part)?;
        let mut digest = Sha256::new();
        hash_start(&mut file, start, &mut digest).at(&part)?;
        self.receive(response, (name, size), (&mut file, start), &part, &mut digest)?;
        let found = hexadecimal(&digest.finalize());
        match etag.sha256().filter(|promised| !promised.eq_ignore_ascii_case(&found)) {
            None => {
                self.cache.keep(&etag, &part, &file)?;
                Ok(Some(etag))
            }
            Some(promised) => {
                fs::remove_file(&part).at(&part)?;
                if start > 0 {
                    return Ok(None);
                }
                Err(Error::invalid(format!("`{name}` came with SHA-256 {found}, expected {promised}"))
                    .with_hint("try again; a proxy or a mirror changed bytes on the way")
                    .into())
            }
        }
    }

    /// Asks until the answers have said which file it is. Gives the answer with the bytes, if that one had to say it.
    fn identify(
        &self,
        request: &mut Request<'_>,
        promise: &mut Promise,
    ) -> Result<Option<Response<Body>>, Failure> {
        while promise.etag.is_none() {
            match request.ask(0)? {
                Reply::Moved(headers) => promise.learn(&headers, self.commit)?,
                Reply::Answer(response) if response.status() == 200 => {
                    promise.learn(response.headers(), self.commit)?;
                    return Ok(Some(response));
                }
                Reply::Answer(response) => return Err(request.failed(response.status().as_u16())),
            }
        }
        Ok(None)
    }

    /// Writes the body behind the `start` bytes that are there. What has come is kept if it stops in the middle.
    fn receive(
        &self,
        response: Response<Body>,
        (name, size): (&str, u64),
        (file, start): (&mut File, u64),
        part: &Path,
        digest: &mut Sha256,
    ) -> Result<(), Failure> {
        let mut body = response.into_body().into_reader();
        let mut piece = vec![0; PIECE];
        let mut done = start;
        self.tell(name, done, size);
        loop {
            let count = match body.read(&mut piece) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => {
                    return Err(Failure::Transport(describe(&error.into(), self.settings.silence)));
                }
            };
            if count as u64 > size - done {
                fs::remove_file(part).at(part)?;
                return Err(Error::invalid(format!(
                    "`{name}` came with more than the {size} bytes promised"
                ))
                .with_hint("try again, or check HF_ENDPOINT")
                .into());
            }
            file.write_all(&piece[..count]).at(part)?;
            digest.update(&piece[..count]);
            done += count as u64;
            self.tell(name, done, size);
        }
        if done < size { Err(short(name, done, size).into()) } else { Ok(()) }
    }

    fn tell(&self, name: &str, done: u64, total: u64) {
        if let Some(told) = &self.settings.on_progress {
            told(name, done, total);
        }
    }
}

/// The ETag of the answer that has the bytes, where no redirect gave one.
fn own_etag(response: Option<&Response<Body>>) -> Result<Etag> {
    let header = response.and_then(|response| response.headers().get("etag")?.to_str().ok());
    Etag::read(header.ok_or_else(|| changed("no ETag, by which files are kept"))?)
}

/// The bytes that a whole answer has; unknown where they are compressed.
fn length(response: &Response<Body>) -> Option<u64> {
    let text = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
    match text("content-encoding") {
        None | Some("identity") => text("content-length")?.parse().ok(),
        Some(_) => None,
    }
}

/// The first byte of a part and the size of the whole: `bytes 1000-1999/2000`.
fn range(response: &Response<Body>) -> Option<(u64, Option<u64>)> {
    let text = response.headers().get("content-range")?.to_str().ok()?;
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    Some((range.split_once('-')?.0.parse().ok()?, total.parse().ok()))
}

/// Whether a process died when all bytes were there and had no name yet.
fn is_whole(part: &Path, etag: &Etag, size: u64) -> bool {
    let Some(promised) = etag.sha256() else { return false };
    let has_size = fs::metadata(part).is_ok_and(|part| part.len() == size);
    let mut digest = Sha256::new();
    has_size
        && open_part(part).and_then(|mut file| hash_start(&mut file, size, &mut digest)).is_ok()
        && promised.eq_ignore_ascii_case(&hexadecimal(&digest.finalize()))
}

fn short(name: &str, found: u64, size: u64) -> Error {
    Error::invalid(format!("`{name}` came with {found} bytes instead of {size}"))
        .with_hint("try again; the connection was cut")
}

fn open_part(part: &Path) -> std::io::Result<File> {
    OpenOptions::new().create(true).truncate(false).read(true).write(true).open(part)
}

/// Reads what is already there into the digest, and cuts off what lies behind.
fn hash_start(file: &mut File, start: u64, digest: &mut Sha256) -> std::io::Result<()> {
    file.set_len(start)?;
    let mut piece = vec![0; PIECE];
    loop {
        match file.read(&mut piece)? {
            0 => break,
            count => digest.update(&piece[..count]),
        }
    }
    file.seek(std::io::SeekFrom::Start(start)).map(drop)
}

/// Refuses a file that does not fit on the cache's disk before any of it is fetched.
fn refuse_full_disk(name: &str, part: &Path, needed: u64) -> Result<()> {
    match free_bytes(part) {
        Some(free) if free < needed => Err(Error::invalid(format!(
            "`{name}` needs {needed} bytes more, and the disk of the cache has {free} left"
        ))
        .with_hint("free some space, or set HF_HUB_CACHE to a folder on another disk"))
        .at(part.parent().unwrap_or(part)),
        _ => Ok(()),
    }
}
