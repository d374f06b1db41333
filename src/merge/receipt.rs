//! The receipt of a merge: measurements that are kept beside the merged weights and show that the adapter is in them.

use serde::Serialize;

/// What a merge did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Receipt {
    /// The program and its version.
    pub tool: String,
    /// What was merged into.
    pub base: String,
    /// What was merged, in the order of the request.
    pub adapters: Vec<AdapterReceipt>,
    /// The tensors that adapters go to, by name.
    pub tensors: Vec<TensorReceipt>,
    /// How many tensors were read back from the output and are the base's, byte for byte.
    pub identical: usize,
    /// How many tensors no adapter goes to were converted to the requested type.
    pub converted: usize,
    /// Values in the targeted tensors, and how many of them changed.
    pub values: usize,
    /// See `values`.
    pub changed: usize,
    /// The share of the delta `d` that is in the result `R = round(W + d)`, `<R - round(W), d> / <d, d>`, over all
    /// targeted tensors: 1 when rounding loses nothing on balance.
    pub kept: f64,
    /// `||R - round(W)|| / ||d||` over all targeted tensors; above 1 where a small delta tips many values over.
    pub written: f64,
    /// `||R - (W + d)|| / ||d||` over all targeted tensors.
    pub lost: f64,
    /// The share of the delta's energy that survives rounding, `1 - (||R - (W + d)||^2 - ||round(W) - W||^2) / ||d||^2`
    /// over all targeted tensors, held within 0 and 1. What rounding costs the base itself does not count.
    pub survived: f64,
    /// Whether a head that was the embedding became a tensor of its own.
    pub untied: bool,
    /// Says which adapter the tokenizer and chat template are of, and what differs from the base; none where they are the
    /// base's.
    pub text: Option<String>,
    /// What one should know.
    pub warnings: Vec<String>,
}

/// One adapter.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AdapterReceipt {
    /// Its folder.
    pub source: String,
    /// The model that it names as its base.
    pub base_model: Option<String>,
    /// Its rank where no pattern says otherwise.
    pub rank: usize,
    /// Its alpha where no pattern says otherwise.
    pub alpha: f64,
    /// Whether scales are `alpha / sqrt(rank)`.
    pub rslora: bool,
    /// Linear layers it goes to.
    pub layers: usize,
    /// Whether all its deltas are zero, as before training.
    pub zero: bool,
}

/// One targeted tensor.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorReceipt {
    /// Its name in the merged model.
    pub name: String,
    /// The type of its values there.
    pub dtype: String,
    /// The scale of each adapter that goes to it.
    pub scales: Vec<f64>,
    /// How many values it has.
    pub values: usize,
    /// How many of them are not what they were.
    pub changed: usize,
    /// `||d||`, Frobenius.
    pub delta_norm: f64,
    /// The largest `|d|`.
    pub delta_max: f64,
    /// As in [`Receipt`]; 1 for a delta of zero.
    pub kept: f64,
    /// As in [`Receipt`]; 1 for a delta of zero.
    pub written: f64,
    /// As in [`Receipt`]; 0 for a delta of zero.
    pub lost: f64,
    /// As in [`Receipt`]; 1 for a delta of zero.
    pub survived: f64,
    /// Whether the delta is exactly zero (B is, as before training).
    pub zero: bool,
    /// SHA-256 of its bytes, the same when read back.
    pub sha256: String,
}
