//! The filters, tests, functions and methods that templates may use, each paid for before and after it runs.

use minijinja::value::{Rest, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters, functions, tests};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::budget::{self, look_at, made, make, read, size};

/// Names of filters that templates cannot write: they stand for operators, and for checks between them.
pub(super) const CONCATENATE: &str = "~";
pub(super) const MULTIPLY: &str = "*";
pub(super) const ITEM: &str = "[]";
pub(super) const MADE: &str = "!made";
pub(super) const LOOKED_AT: &str = "!looked-at";
pub(super) const LOOPED_OVER: &str = "!looped-over";
pub(super) const NOT_A_NAMESPACE: &str = "!not-a-namespace";

/// Filters that look at no more than a list's own elements.
const SHALLOW: [&str; 14] = [
    "length",
    "count",
    "first",
    "last",
    "default",
    "d",
    "attr",
    "list",
    "items",
    "select",
    "reject",
    "selectattr",
    "rejectattr",
    "map",
];

/// Everything that templates know, beside what a template is given.
pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(|state, value, method, args| {
        before(method, std::iter::once(value).chain(args))?;
        unknown_method_callback(state, value, method, args)
    });
    environment.set_formatter(|output, state, value| {
        if value.as_object().is_some() {
            look_at(value)?;
        }
        make(size(value))?;
        minijinja::escape_formatter(output, state, value)
    });
    add_operators(environment);
    for (name, filter) in known_filters() {
        environment.add_filter(name, move |state: &mut State, args: Rest<ValueOrKwargs>| {
            let args = args.into_values();
            before(name, args.iter())?;
            made(filter.call(state, &args)?)
        });
    }
    for (name, test) in known_tests() {
        environment.add_test(name, move |state: &mut State, args: Rest<ValueOrKwargs>| {
            let args = args.into_values();
            before(name, args.iter())?;
            Ok::<_, Error>(test.call(state, &args)?.is_true())
        });
    }
    environment.add_function("range", functions::range);
    for (name, function) in [
        ("dict", Value::from_function(functions::dict)),
        ("namespace", Value::from_function(functions::namespace)),
    ] {
        environment.add_function(name, move |state: &mut State, args: Rest<ValueOrKwargs>| {
            let args = args.into_values();
            args.iter().try_for_each(look_at)?;
            args.iter().try_for_each(|value| make(size(value)))?;
            function.call(state, &args)
        });
    }
}

fn add_operators(environment: &mut Environment<'static>) {
    environment.add_filter(CONCATENATE, |left: &Value, right: &Value| concatenated(left, right));
    environment.add_filter(MULTIPLY, |left: &Value, right: &Value| multiplied(left, right));
    environment.add_filter(ITEM, |value: &Value, key: &Value| {
        read(value.as_str().map_or(0, str::len) as u64)?;
        value.get_item(key)
    });
    environment.add_filter(MADE, |value: Value| made(value));
    environment.add_filter(LOOKED_AT, |left: Value, right: Value| {
        look_at(&left)?;
        look_at(&right)?;
        // Unpacking begins at the end.
        Ok::<_, Error>(Value::from(vec![right, left]))
    });
    environment.add_filter(LOOPED_OVER, |value: Value| read(size(&value)).map(|()| value));
    environment.add_filter(NOT_A_NAMESPACE, |value: Value| match budget::is_namespace(&value) {
        true => Err(Error::new(ErrorKind::InvalidOperation, "it puts a namespace into a namespace")),
        false => Ok(value),
    });
}

fn concatenated(left: &Value, right: &Value) -> Result<Value, Error> {
    let mut text = String::new();
    for part in [left, right] {
        match part.as_str() {
            Some(part) => {
                make(part.len() as u64)?;
                text.push_str(part);
            }
            None => {
                look_at(part)?;
                text.push_str(&part.to_string());
            }
        }
    }
    make(text.len() as u64)?;
    Ok(Value::from(text))
}

fn multiplied(left: &Value, right: &Value) -> Result<Value, Error> {
    let repeats = |value: &Value| {
        value.as_str().is_some() || matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
    };
    let (many, times) = if repeats(left) { (left, right) } else { (right, left) };
    if repeats(many) {
        // Python takes what is below zero for zero.
        let Some(times) = times.as_i64().map(|times| times.max(0) as usize) else {
            return Err(unsupported(left, right));
        };
        make(size(many).saturating_mul(times as u64))?;
        return Ok(match many.as_str() {
            Some(text) => Value::from(text.repeat(times)),
            None => {
                let items: Vec<Value> = many.try_iter()?.collect();
                Value::from(std::iter::repeat_n(items, times).flatten().collect::<Vec<_>>())
            }
        });
    }
    if let (Ok(x), Ok(y)) = (i128::try_from(left.clone()), i128::try_from(right.clone())) {
        let product = x.checked_mul(y).ok_or_else(|| unsupported(left, right))?;
        return Ok(i64::try_from(product).map_or_else(|_| Value::from(product), Value::from));
    }
    match (f64::try_from(left.clone()), f64::try_from(right.clone())) {
        (Ok(x), Ok(y)) => Ok(Value::from(x * y)),
        _ => Err(unsupported(left, right)),
    }
}

fn unsupported(left: &Value, right: &Value) -> Error {
    let (left, right) = (left.kind(), right.kind());
    Error::new(ErrorKind::InvalidOperation, format!("cannot compute {left} * {right}"))
}

/// Pays for what a filter, test or method of this name looks at and may make of it.
fn before<'a>(name: &str, args: impl Iterator<Item = &'a Value> + Clone) -> Result<(), Error> {
    let is_shallow = SHALLOW.contains(&name);
    for arg in args.clone() {
        // A namespace on its own can be asked for its attributes; only within others it may make a circle.
        match arg.as_object().is_some() && !is_shallow {
            true => look_at(arg)?,
            false => read(size(arg))?,
        }
    }
    let args: Vec<&Value> = args.collect();
    let text = |i: usize| args.get(i).and_then(|arg| arg.as_str());
    let number = |i: usize| args.get(i).and_then(|arg| named(arg, &NUMBERS).or_else(|| arg.as_i64()));
    match name {
        "replace" => {
            let (Some(said), Some(from), Some(to)) = (text(0), text(1), text(2)) else { return Ok(()) };
            let found = if from.is_empty() { said.len() + 1 } else { said.matches(from).count() };
            make((found as u64).saturating_mul(to.len() as u64).saturating_add(said.len() as u64))
        }
        "split" | "splitlines" | "lines" | "list" | "join" | "sort" | "unique" | "reverse" => {
            let pieces = args.iter().map(|arg| match arg.as_str() {
                Some(said) => (said.len() as u64).saturating_mul(budget::VALUE),
                None => size(arg).saturating_mul(32),
            });
            // Of joining: what stands between all of them.
            let between = match (args.first(), args.get(1)) {
                (Some(x), Some(y)) => {
                    longest(x).saturating_mul(count(y)).saturating_add(longest(y).saturating_mul(count(x)))
                }
                _ => 0,
            };
            read(pieces.fold(0, u64::saturating_add))?;
            if name == "join" { make(between) } else { Ok(()) }
        }
        "batch" | "slice" => make((number(1).unwrap_or(0).max(0) as u64).saturating_mul(budget::VALUE)),
        "indent" => {
            let lines = text(0).map_or(0, |said| said.lines().count());
            make((lines as u64 + 1).saturating_mul(number(1).unwrap_or(4).max(0) as u64))
        }
        "format" => {
            let Some(format) = text(0) else { return Ok(()) };
            if widest(format) > 1000 {
                return Err(Error::new(ErrorKind::InvalidOperation, "it asks for more than 1000 columns"));
            }
            let longest = args.iter().map(|arg| longest(arg)).max().unwrap_or(0);
            let places = format.matches(['{', '%']).count() as u64;
            make(places.saturating_mul(longest.saturating_add(1000)))
        }
        _ => Ok(()),
    }
}

/// The keywords by which filters take a number.
const NUMBERS: [&str; 4] = ["linecount", "slices", "count", "width"];

fn named(arg: &Value, names: &[&str]) -> Option<i64> {
    if !arg.is_kwargs() {
        return None;
    }
    names.iter().find_map(|name| arg.get_attr(name).ok()?.as_i64())
}

/// The length of a text, or of the longest that a list holds.
fn longest(value: &Value) -> u64 {
    match value.as_str() {
        Some(text) => text.len() as u64,
        None => value.try_iter().map_or(0, |items| {
            items.map(|item| item.as_str().map_or(budget::VALUE, |text| text.len() as u64)).max().unwrap_or(0)
        }),
    }
}

fn count(value: &Value) -> u64 {
    match value.as_str() {
        Some(text) => text.len() as u64,
        None => value.len().unwrap_or(1) as u64,
    }
}

/// The largest number in a format.
fn widest(format: &str) -> u64 {
    let numbers = format.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    numbers.map(|digits| digits.parse().unwrap_or(u64::MAX)).max().unwrap_or(0)
}

fn known_filters() -> Vec<(&'static str, Value)> {
    vec![
        ("abs", Value::from_function(filters::abs)),
        ("attr", Value::from_function(filters::attr)),
        ("batch", Value::from_function(filters::batch)),
        ("bool", Value::from_function(filters::bool)),
        ("capitalize", Value::from_function(filters::capitalize)),
        ("chain", Value::from_function(filters::chain)),
        ("count", Value::from_function(filters::length)),
        ("d", Value::from_function(filters::default)),
        ("default", Value::from_function(filters::default)),
        ("dictsort", Value::from_function(filters::dictsort)),
        ("e", Value::from_function(filters::escape)),
        ("escape", Value::from_function(filters::escape)),
        ("first", Value::from_function(filters::first)),
        ("float", Value::from_function(filters::float)),
        ("format", Value::from_function(filters::format)),
        ("groupby", Value::from_function(filters::groupby)),
        ("indent", Value::from_function(filters::indent)),
        ("int", Value::from_function(filters::int)),
        ("items", Value::from_function(filters::items)),
        ("join", Value::from_function(filters::join)),
        ("last", Value::from_function(filters::last)),
        ("length", Value::from_function(filters::length)),
        ("lines", Value::from_function(filters::lines)),
        ("list", Value::from_function(filters::list)),
        ("lower", Value::from_function(filters::lower)),
        ("map", Value::from_function(filters::map)),
        ("max", Value::from_function(filters::max)),
        ("min", Value::from_function(filters::min)),
        ("pprint", Value::from_function(filters::pprint)),
        ("reject", Value::from_function(filters::reject)),
        ("rejectattr", Value::from_function(filters::rejectattr)),
        ("replace", Value::from_function(filters::replace)),
        ("reverse", Value::from_function(filters::reverse)),
        ("round", Value::from_function(filters::round)),
        ("safe", Value::from_function(filters::safe)),
        ("select", Value::from_function(filters::select)),
        ("selectattr", Value::from_function(filters::selectattr)),
        ("slice", Value::from_function(filters::slice)),
        ("sort", Value::from_function(filters::sort)),
        ("split", Value::from_function(filters::split)),
        ("string", Value::from_function(filters::string)),
        ("sum", Value::from_function(filters::sum)),
        ("title", Value::from_function(filters::title)),
        ("tojson", Value::from_function(super::json::to_json)),
        ("trim", Value::from_function(filters::trim)),
        ("unique", Value::from_function(filters::unique)),
        ("upper", Value::from_function(filters::upper)),
        ("zip", Value::from_function(filters::zip)),
    ]
}

fn known_tests() -> Vec<(&'static str, Value)> {
    let mut known = Vec::new();
    for (names, test) in [
        (["eq", "equalto", "=="], Value::from_function(tests::is_eq)),
        (["ne", "!=", "ne"], Value::from_function(tests::is_ne)),
        (["lt", "lessthan", "<"], Value::from_function(tests::is_lt)),
        (["le", "<=", "le"], Value::from_function(tests::is_le)),
        (["gt", "greaterthan", ">"], Value::from_function(tests::is_gt)),
        (["ge", ">=", "ge"], Value::from_function(tests::is_ge)),
        (["in", "in", "in"], Value::from_function(tests::is_in)),
        (["lower", "lower", "lower"], Value::from_function(tests::is_lower)),
        (["upper", "upper", "upper"], Value::from_function(tests::is_upper)),
        (["startingwith", "startingwith", "startingwith"], Value::from_function(tests::is_startingwith)),
        (["endingwith", "endingwith", "endingwith"], Value::from_function(tests::is_endingwith)),
    ] {
        known.extend(names.map(|name| (name, test.clone())));
    }
    known
}
