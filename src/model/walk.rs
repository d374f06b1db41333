//! A decoder walked layer by layer, by those who put something else in the place of its feed-forward networks: only
//! the residual stream is in memory, for as many tokens as one likes.
//!
//! ```text
//! x = begin(tokens)     of each layer: input = attend(layer, x);  x = add(layer, x, network(input))     hidden = end(x)
//! ```

use candle_core::Tensor;

use super::block::scaled;
use super::decoder::Decoder;
use super::feed_forward::FeedForward;
use super::network::Network;
use crate::error::Result;
use crate::ops::rotary::Angles;
use crate::ops::{Documents, Gradients, Pass, Trainables, add};

/// The residual stream of a flat batch somewhere between two layers.
#[derive(Debug, Clone)]
pub struct Stream {
    documents: Documents,
    angles: Angles,
    /// `[tokens, hidden]`
    x: Tensor,
}

impl Stream {
    /// The documents of the batch.
    #[must_use]
    pub fn documents(&self) -> &Documents {
        &self.documents
    }

    /// The residual stream, `[tokens, hidden]`.
    #[must_use]
    pub fn residual(&self) -> &Tensor {
        &self.x
    }
}

impl Decoder {
    /// The stream before the first layer.
    pub fn begin_stream(&self, tokens: &[u32], documents: Documents) -> Result<Stream> {
        let (ids, angles) = self.begin(tokens, &documents)?;
        let x = self.embed(&ids)?;
        Ok(Stream { documents, angles, x })
    }

    /// Adds the attention of a layer to the stream; gives the normalised input of its feed-forward network.
    pub fn attend(&self, layer: usize, stream: &mut Stream) -> Result<Tensor> {
        let block = &self.blocks[layer];
        let pass = Pass::inference(&stream.documents);
        let (normalised, _) = block.input_norm.forward(&stream.x)?;
        let (mixed, _) = block.attention.forward(&normalised, &stream.angles, &pass, &mut [])?;
        let (x, normalised, _) =
            block.post_norm.forward_of_sum(&stream.x, &scaled(mixed, block.residual)?)?;
        stream.x = x;
        Ok(normalised)
    }

    /// Adds what a feed-forward network gave, `[tokens, hidden]`.
    pub fn add_to_stream(&self, layer: usize, stream: &mut Stream, y: &Tensor) -> Result<()> {
        let term = scaled(y.to_dtype(stream.x.dtype())?, self.blocks[layer].residual)?;
        stream.x = add(&stream.x, &term)?;
        Ok(())
    }

    /// Goes through the layers and back, for those who want to know what a loss makes of the feed-forward networks:
    /// `d_hidden` gives the gradient of the loss from the hidden states, `[tokens, hidden]` both, and `visit` gets, from the
    /// last layer to the first, the layer's number, the normalised input of its network and the gradient of what the
    /// network gives, `[tokens, hidden]` both. Only the inputs of layers are kept.
    pub fn walk_back(
        &self,
        tokens: &[u32],
        documents: &Documents,
        d_hidden: impl FnOnce(&Tensor) -> Result<Tensor>,
        visit: &mut dyn FnMut(usize, &Tensor, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let pass = Pass::inference(documents).with_ids(tokens);
        let (ids, angles) = self.begin(tokens, documents)?;
        let mut x = self.embed(&ids)?; // [tokens, hidden]
        let mut inputs = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let (y, _, _) = block.forward(&x, &angles, &pass, &mut [])?;
            inputs.push(std::mem::replace(&mut x, y));
        }
        let (hidden, norm) = self.norm.forward(&x)?;
        let logits = self.config.multipliers.logits;
        let d_hidden = scaled(d_hidden(&scaled(hidden, logits)?)?, logits)?;
        let mut none = Gradients::of(&Trainables::new());
        let mut dx = self.norm.backward(&norm, &d_hidden, None, &mut none)?;
        for (layer, block) in self.blocks.iter().enumerate().rev() {
            let Some(x) = inputs.pop() else { break };
            let (_, _, saved) = block.forward(&x, &angles, &pass, &mut [])?;
            visit(layer, &block.network_input(&saved)?, &scaled(dx.clone(), block.residual)?)?;
            if layer > 0
                && let Some(below) = block.backward(saved, &angles, &pass, (&dx, None), true, &mut none)?
            {
                dx = below;
            }
        }
        Ok(())
    }

    /// What the head is applied to.
    pub fn end_stream(&self, stream: &Stream) -> Result<Tensor> {
        scaled(self.norm.forward(&stream.x)?.0, self.config.multipliers.logits)
    }

    /// The feed-forward network of a layer, unless it is a mixture of experts.
    #[must_use]
    pub fn feed_forward(&self, layer: usize) -> Option<&FeedForward> {
        match &self.blocks[layer].feed_forward {
            Network::Dense(network) => Some(network),
            Network::Sparse(_) => None,
        }
    }
}
