//! What people bring from other tools: the keys that they are used to.
//!
//! An unknown key of a recipe gets its hint from the table in [`keys`], which says what each key means here.

mod keys;

pub(super) use keys::hint;
pub use keys::{ForeignKey, Meaning, Reading, foreign_keys};
