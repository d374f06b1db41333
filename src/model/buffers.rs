//! Tensors of a checkpoint that are no weights: buffers that programs have saved beside them.

use super::config::HEAD;
use crate::weights::{StoredType, TensorInfo};

/// Whether a tensor holds whole numbers or flags, which weights never do: positions, masks, counters.
pub(super) fn is_buffer(dtype: StoredType) -> bool {
    use safetensors::Dtype::{BOOL, I8, I16, I32, I64, U8, U16, U32, U64};

    matches!(dtype, StoredType::Other(BOOL | U8 | I8 | I16 | U16 | I32 | U32 | I64 | U64))
}

/// Says which tensors of whole numbers are left aside, but for those that transformers knows to pass over.
pub(super) fn warning<'t>(tensors: impl Iterator<Item = &'t TensorInfo>) -> Option<String> {
    let buffers = tensors.filter(|info| is_buffer(info.dtype) && !is_harmless(&info.name));
    let buffers: Vec<String> = buffers.map(|info| format!("`{}`", info.name)).collect();
    if buffers.is_empty() {
        return None;
    }
    let what = counted(buffers.len());
    Some(format!("{what} of whole numbers, which weights never are, and left aside: {}", listed(&buffers)))
}

/// Recognizes tensors that can be ignored: buffers that follow from the configuration, and the copy of a tied head.
pub(super) fn is_harmless(name: &str) -> bool {
    const BUFFERS: [&str; 6] = [
        "position_ids",
        "rotary_emb.inv_freq",
        "rotary_emb.cos_cached",
        "rotary_emb.sin_cached",
        "attn.bias",
        "attn.masked_bias",
    ];
    let is_at_end = |buffer: &str| {
        name.strip_suffix(buffer).is_some_and(|before| before.is_empty() || before.ends_with('.'))
    };
    BUFFERS.iter().any(|buffer| is_at_end(buffer)) || name == "rope_freqs.weight" || name == HEAD
}

pub(super) fn counted(count: usize) -> String {
    if count == 1 { "1 tensor is".to_string() } else { format!("{count} tensors are") }
}

pub(super) fn listed(tensors: &[String]) -> String {
    const SHOWN: usize = 8;
    match tensors.len().checked_sub(SHOWN) {
        None | Some(0) => tensors.join(", "),
        Some(more) => format!("{} and {more} more", tensors[..SHOWN].join(", ")),
    }
}
