//! Limits the bytes that a template may make and look at, in addition to minijinja's limit on steps. A step can double
//! a text, so steps alone bound neither memory nor time.

use std::cell::Cell;

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

/// Steps of a rendering; a published template takes some thousand for a short conversation.
const STEPS: u64 = 5_000_000;
/// Further steps for each message.
const STEPS_PER_MESSAGE: u64 = 20_000;
/// Bytes that a rendering may make, and how many more for each byte of the conversation.
const MADE: (u64, u64) = (64 << 20, 64);
/// Bytes that it may look at, and how many more for each byte of the conversation.
const READ: (u64, u64) = (1 << 30, 1024);
/// Lists and dictionaries inside each other. JSON is read to 128 levels.
const DEEPEST: usize = 256;
/// Every value counts as this many bytes in addition to its text.
pub(super) const VALUE: u64 = 32;

thread_local! {
    static MADE_LEFT: Cell<u64> = const { Cell::new(0) };
    static READ_LEFT: Cell<u64> = const { Cell::new(0) };
}

/// Fills the budget of this thread for a conversation of so many messages and bytes, and gives the steps it may take.
pub(super) fn begin(messages: usize, bytes: usize) -> u64 {
    let of = |(least, each): (u64, u64)| least.saturating_add(each.saturating_mul(bytes as u64));
    MADE_LEFT.set(of(MADE));
    READ_LEFT.set(of(READ));
    STEPS.saturating_add(STEPS_PER_MESSAGE.saturating_mul(messages as u64)).min(i64::MAX as u64)
}

/// Takes from the bytes that may be made.
pub(super) fn make(bytes: u64) -> Result<(), Error> {
    take(&MADE_LEFT, bytes, "it makes too much text of what it was given")
}

/// Takes from the bytes that may be looked at.
pub(super) fn read(bytes: u64) -> Result<(), Error> {
    take(&READ_LEFT, bytes, "it takes too long")
}

fn take(
    left: &'static std::thread::LocalKey<Cell<u64>>,
    bytes: u64,
    what: &'static str,
) -> Result<(), Error> {
    match left.get().checked_sub(bytes) {
        Some(rest) => {
            left.set(rest);
            Ok(())
        }
        None => Err(Error::new(ErrorKind::InvalidOperation, what)),
    }
}

/// Returns the bytes of a value itself: a text counts its length, and a list counts one [`VALUE`] for each entry.
pub(super) fn size(value: &Value) -> u64 {
    match value.as_str() {
        Some(text) => text.len() as u64 + VALUE,
        None if value.as_object().is_some() => {
            VALUE.saturating_mul(value.len().unwrap_or(1).saturating_add(1) as u64)
        }
        None => VALUE,
    }
}

/// Looks at a value with all that it holds; refuses what is nested too deeply or holds a namespace, which may hold itself.
pub(super) fn look_at(value: &Value) -> Result<(), Error> {
    walk(value, 0)
}

fn walk(value: &Value, depth: usize) -> Result<(), Error> {
    let text = value.as_str().map_or(0, str::len);
    read(VALUE + text as u64)?;
    let kind = value.kind();
    if !matches!(kind, ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
        return Ok(());
    }
    if depth >= DEEPEST {
        return Err(Error::new(ErrorKind::InvalidOperation, "it nests lists too deeply"));
    }
    if depth > 0 && is_namespace(value) {
        return Err(Error::new(ErrorKind::InvalidOperation, "it puts a namespace into another value"));
    }
    for item in value.try_iter()? {
        if kind == ValueKind::Map {
            walk(&value.get_item(&item)?, depth + 1)?;
        }
        walk(&item, depth + 1)?;
    }
    Ok(())
}

/// Whether this is what `namespace()` gives.
pub(super) fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace"))
}

/// A value that an operation has made: paid for, and with lazy lists written out, which could nest without end.
pub(super) fn made(value: Value) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        make(text.len() as u64)?;
        return Ok(value);
    }
    match value.kind() {
        ValueKind::Iterable => {
            let mut items = Vec::new();
            for item in value.try_iter()? {
                make(VALUE)?;
                items.push(item);
            }
            let list = Value::from(items);
            look_at(&list)?;
            Ok(list)
        }
        ValueKind::Seq | ValueKind::Map => {
            make(size(&value))?;
            look_at(&value)?;
            Ok(value)
        }
        _ => Ok(value),
    }
}
