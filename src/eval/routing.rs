//! How a mixture of experts spreads the tokens of a text.

use crate::data::Batch;
use crate::error::{Error, Result};
use crate::model::{Decoder, Spread, Tally};
use crate::ops::Documents;

/// What the router of each sparse layer does with all tokens of `batches`, labelled or not.
pub fn routing(model: &Decoder, batches: &[Batch]) -> Result<Vec<Spread>> {
    if model.config().sparse_layers().next().is_none() {
        return Err(Error::request("the model is dense: it has no experts, and no router that chooses"));
    }
    let mut tally = Tally::default();
    for batch in batches {
        let documents = Documents::new(batch.offsets.clone(), batch.documents.clone());
        tally.add(&model.forward(&batch.tokens, &documents)?.routing);
    }
    let spreads = tally.spreads();
    if spreads.is_empty() {
        return Err(Error::invalid("the data has no tokens"));
    }
    Ok(spreads)
}
