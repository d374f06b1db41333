//! What people bring from other tools: keys that they are used to, and whole configurations.
//!
//! One table, [`keys`], says what each key means here. An unknown key of a recipe gets its hint from it, and a configuration
//! of axolotl, LLaMA-Factory or mlx-lm is converted by it.

mod convert;
mod data_files;
mod draft;
mod keys;
mod tool;
mod values;
mod yaml;

pub use convert::{Converted, convert};
pub use draft::Remark;
pub(super) use keys::key_of;
pub use keys::{ForeignKey, Meaning, Reading, foreign_keys, hint};
pub use tool::Tool;
