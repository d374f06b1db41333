//! How the values of a recipe are read: every fault of a document is found, each with its key and its place.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::bounds::Bound;
use super::document::{Document, Node, Origin, Value};
use super::keys::{Key, Kind};
use super::other_tools;
use super::probe::kind_of;
use super::typed::{Fault, read_leaf};
use crate::error::{Error, Result, nearest};

/// A value of a key: how it is read, and what it may be.
pub(super) trait KeyValue: Sized {
    /// Reads a value. Where it cannot be read, the fault is added to `faults`.
    fn read(node: &Node, faults: &mut Faults) -> Option<Self>;

    /// What its values may be.
    fn kind() -> Kind;

    /// Whether a value that is no list stands for a list of it alone.
    fn stands_alone(_: &Value) -> bool {
        false
    }

    /// What is expected where a list of such values should be.
    const LIST: &str = "a list";
}

/// Types that serde reads by itself.
macro_rules! leaves {
    ($($type:ty),* $(,)?) => {
        $(
            impl $crate::recipe::reading::KeyValue for $type {
                fn read(
                    node: &$crate::recipe::document::Node,
                    faults: &mut $crate::recipe::reading::Faults,
                ) -> Option<Self> {
                    faults.kept($crate::recipe::typed::read_leaf(node), &node.origin)
                }

                fn kind() -> $crate::recipe::keys::Kind {
                    $crate::recipe::probe::kind_of::<$type>()
                }
            }
        )*
    };
}
pub(super) use leaves;

leaves!(bool, u64, usize, String, PathBuf);

impl KeyValue for f64 {
    fn read(node: &Node, faults: &mut Faults) -> Option<Self> {
        // Negative zero is zero: it would print as `-0.0` in the resolved recipe.
        faults.kept(read_leaf::<Self>(node), &node.origin).map(|number| number + 0.0)
    }

    fn kind() -> Kind {
        kind_of::<Self>()
    }
}

impl<T: KeyValue> KeyValue for Vec<T> {
    fn read(node: &Node, faults: &mut Faults) -> Option<Self> {
        let nodes = match &node.value {
            Value::Array(nodes) => nodes.as_slice(),
            value if T::stands_alone(value) => std::slice::from_ref(node),
            _ => {
                faults.add(Fault::unfit(T::LIST, node), &node.origin);
                return None;
            }
        };
        // All are read before any is missed, so that every fault is found.
        let read: Vec<Option<T>> = nodes.iter().map(|node| T::read(node, faults)).collect();
        read.into_iter().collect()
    }

    fn kind() -> Kind {
        Kind::List(Box::new(T::kind()))
    }
}

/// Everything that is wrong with a document, and the key that is being read.
#[derive(Default)]
pub(super) struct Faults {
    path: Vec<String>,
    found: Vec<Fault>,
}

impl Faults {
    /// Adds a fault of the key that is being read.
    pub(super) fn add(&mut self, fault: Fault, origin: &Origin) {
        let fault = self.path.iter().rev().fold(fault, |fault, key| fault.within(Some(key), origin));
        self.found.push(fault.within(None, origin));
    }

    pub(super) fn kept<T>(&mut self, read: Result<T, Fault>, origin: &Origin) -> Option<T> {
        read.map_err(|fault| self.add(fault, origin)).ok()
    }

    fn inside<T>(&mut self, key: &str, read: impl FnOnce(&mut Self) -> T) -> T {
        self.path.push(key.to_string());
        let value = read(self);
        self.path.pop();
        value
    }
}

/// The entries of a table while its keys are read.
pub(super) struct Entries<'a> {
    nodes: &'a BTreeMap<String, Node>,
    origin: &'a Origin,
    keys: &'static [Key],
}

impl<'a> Entries<'a> {
    /// Those of `node`, which is `expected` to be a table with some of `keys`.
    pub(super) fn of(
        node: &'a Node,
        expected: &str,
        keys: &'static [Key],
        faults: &mut Faults,
    ) -> Option<Self> {
        let Value::Table(nodes) = &node.value else {
            faults.add(Fault::unfit(expected, node), &node.origin);
            return None;
        };
        for (name, node) in nodes {
            if !keys.iter().any(|key| key.name == name) {
                let known = keys.iter().map(|key| key.name).collect();
                faults.inside(name, |faults| faults.add(Fault::unknown_key(known), &node.origin));
            }
        }
        Some(Self { nodes, origin: &node.origin, keys })
    }

    /// A key that may be left out.
    pub(super) fn optional<T: KeyValue>(
        &self,
        name: &str,
        bound: Bound,
        faults: &mut Faults,
    ) -> Option<Option<T>> {
        let Some(node) = self.nodes.get(name) else { return Some(None) };
        faults.inside(name, |faults| {
            let value = T::read(node, faults)?;
            if let Some(expected) = bound.refuses(&node.value) {
                faults.add(Fault::unfit(&expected, node), &node.origin);
            }
            Some(Some(value))
        })
    }

    /// A key that cannot be left out.
    pub(super) fn required<T: KeyValue>(
        &self,
        name: &'static str,
        bound: Bound,
        faults: &mut Faults,
    ) -> Option<T> {
        // A key that is nearly this one, or is another tool's name of it, has been named already.
        let stands_for =
            |found: &str| other_tools::key_of(found).is_some_and(|key| key.rsplit('.').next() == Some(name));
        let is_misspelt =
            |found: &&String| nearest(found, [name], 1).first() == Some(&name) || stands_for(found);
        let mut strangers = self.nodes.keys().filter(|found| !self.keys.iter().any(|key| key.name == *found));
        if !self.nodes.contains_key(name) && !strangers.any(|found| is_misspelt(&found)) {
            faults.add(Fault::missing_key(name), self.origin);
        }
        self.optional(name, bound, faults)?
    }
}

impl Document {
    /// Reads the document as a `T`, or says everything that is wrong with it, in the order of the file.
    pub(super) fn read<T: KeyValue>(&self) -> Result<T> {
        let mut faults = Faults::default();
        let read = T::read(&self.root, &mut faults);
        let mut found = faults.found;
        match read {
            Some(read) if found.is_empty() => Ok(read),
            _ => {
                found.sort_by_key(Fault::place);
                Err(Error::several(found.into_iter().map(|fault| self.error_of(fault)).collect()))
            }
        }
    }

    /// Reads one key that stands above all tables and cannot be left out; `hint` says how to begin.
    pub(super) fn key<T: KeyValue>(&self, name: &'static str, hint: &str) -> Result<T> {
        let mut faults = Faults::default();
        let nodes = match &self.root.value {
            Value::Table(nodes) => nodes,
            _ => &BTreeMap::new(),
        };
        let Some(node) = nodes.get(name) else {
            let fault = Fault::missing_key(name).within(None, &self.root.origin);
            return Err(self.error_of(fault).with_hint(hint));
        };
        let read = faults.inside(name, |faults| T::read(node, faults));
        read.ok_or_else(|| {
            Error::several(faults.found.into_iter().map(|fault| self.error_of(fault)).collect())
        })
    }
}
