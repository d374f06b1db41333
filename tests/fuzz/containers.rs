//! Mutations that know how safetensors and GGUF files are laid out.

use std::ops::Range;

use serde_json::Value;

use super::chance::{Chance, mutate_bytes};
use super::json;

/// Changes a safetensors file: its header as JSON, the header's length, or bytes.
pub(super) fn mutate_safetensors(bytes: &mut Vec<u8>, chance: &mut Chance) {
    let header = header_of(bytes).and_then(|range| {
        let header = serde_json::from_slice::<Value>(&bytes[range.clone()]).ok()?;
        Some((range, header))
    });
    let Some((range, mut header)) = header else { return mutate_bytes(bytes, chance) };
    match chance.below(8) {
        0 => {
            let length = chance.integer(range.len() as u64);
            bytes[..8].copy_from_slice(&length.to_le_bytes());
        }
        1 => mutate_bytes(bytes, chance),
        2 => {
            // Values: infinity, NaN, and what a short read leaves.
            let values = bytes.len() - range.end;
            let at = range.end + chance.below(values.saturating_sub(4));
            let special = *chance.pick(&[f32::NAN, f32::INFINITY, f32::MAX, f32::MIN_POSITIVE]);
            let end = (at + 4).min(bytes.len());
            bytes[at..end].copy_from_slice(&special.to_le_bytes()[..end - at]);
        }
        _ => {
            json::mutate(&mut header, chance);
            let text = json::write(&header);
            let length = text.len() as u64;
            bytes.splice(range, text);
            bytes[..8].copy_from_slice(&length.to_le_bytes());
        }
    }
}

fn header_of(bytes: &[u8]) -> Option<Range<usize>> {
    let length = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
    let end = usize::try_from(length).ok()?.checked_add(8)?;
    (end <= bytes.len()).then_some(8..end)
}

/// Changes a GGUF file: a count, a length, a type, a dimension, an offset, a value of its metadata, or bytes.
pub(super) fn mutate_gguf(bytes: &mut Vec<u8>, chance: &mut Chance) {
    let Fields { head, metadata, tensors } = Fields::of(bytes).unwrap_or_default();
    let fields = match chance.below(8) {
        0 => &head,
        1..4 => &tensors,
        4..7 => &metadata,
        _ => return mutate_bytes(bytes, chance),
    };
    if fields.is_empty() {
        return mutate_bytes(bytes, chance);
    }
    let field = chance.pick(fields).clone();
    let mut now = [0; 8];
    let width = field.len().min(8);
    now[..width].copy_from_slice(&bytes[field.start..field.start + width]);
    let new = match chance.below(8) {
        0 => u64::from(f32::NAN.to_bits()),
        1 => u64::from(f32::MAX.to_bits()),
        _ => chance.integer(u64::from_le_bytes(now)),
    };
    bytes[field.start..field.start + width].copy_from_slice(&new.to_le_bytes()[..width]);
}

/// Where the numbers and texts of a GGUF file are.
#[derive(Default)]
struct Fields {
    head: Vec<Range<usize>>,
    metadata: Vec<Range<usize>>,
    tensors: Vec<Range<usize>>,
}

impl Fields {
    /// Those of a whole file of version 3, or as many as there are before something is wrong.
    fn of(bytes: &[u8]) -> Option<Self> {
        let mut fields = Self { head: vec![4..8, 8..16, 16..24], ..Self::default() };
        let mut walk = Walk { bytes, at: 8 };
        let (tensors, entries) = (walk.number(8)?.1, walk.number(8)?.1);
        for _ in 0..entries {
            walk.text(&mut fields.metadata)?;
            let (place, kind) = walk.number(4)?;
            fields.metadata.push(place);
            walk.value(kind, &mut fields.metadata)?;
        }
        for _ in 0..tensors {
            walk.text(&mut fields.tensors)?;
            let (place, dimensions) = walk.number(4)?;
            fields.tensors.push(place);
            for _ in 0..dimensions {
                fields.tensors.push(walk.number(8)?.0);
            }
            fields.tensors.push(walk.number(4)?.0);
            fields.tensors.push(walk.number(8)?.0);
        }
        Some(fields)
    }
}

struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Walk<'_> {
    fn number(&mut self, width: usize) -> Option<(Range<usize>, u64)> {
        let place = self.at..self.at + width;
        let mut wide = [0; 8];
        wide[..width].copy_from_slice(self.bytes.get(place.clone())?);
        self.at = place.end;
        Some((place, u64::from_le_bytes(wide)))
    }

    fn text(&mut self, found: &mut Vec<Range<usize>>) -> Option<()> {
        let (place, length) = self.number(8)?;
        let end = self.at.checked_add(length as usize).filter(|end| *end <= self.bytes.len())?;
        found.extend([place, self.at..end]);
        self.at = end;
        Some(())
    }

    fn value(&mut self, kind: u64, found: &mut Vec<Range<usize>>) -> Option<()> {
        match kind {
            0 | 1 | 7 => found.push(self.number(1)?.0),
            2 | 3 => found.push(self.number(2)?.0),
            4..=6 => found.push(self.number(4)?.0),
            8 => self.text(found)?,
            9 => {
                let (kind_place, kind) = self.number(4)?;
                let (place, length) = self.number(8)?;
                found.extend([kind_place, place]);
                for _ in 0..length {
                    self.value(kind, found)?;
                }
            }
            _ => found.push(self.number(8)?.0),
        }
        Some(())
    }
}

/// A GGUF file is walked to its last field: without that, mutations would only hit bytes by chance.
#[test]
fn fields_of_a_gguf_file_are_found() {
    let file = &super::toy::gguf()["model.gguf"];
    let fields = Fields::of(file).unwrap();
    assert!(fields.metadata.len() > 100 && fields.tensors.len() > 100);
    let names: Vec<&str> =
        fields.tensors.iter().filter_map(|at| str::from_utf8(&file[at.clone()]).ok()).collect();
    assert!(names.contains(&"blk.1.attn_q.weight") && names.contains(&"token_embd.weight"));
}
