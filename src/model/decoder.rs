//! The decoder of every family: embedding, layers, norm, head. Its backward walks the layers in reverse.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};

use super::attention::Attention;
use super::block::{self, Block};
use super::cache::Cache;
use super::config::{AttentionConfig, DecoderConfig, FeedForwardConfig, LayerConfig, Projection};
use super::feed_forward::FeedForward;
use super::linear::Linear;
use super::norm::Norm;
use super::pretrained::Pretrained;
use super::rotary::Rotary;
use crate::error::{Context, Error, Result};
use crate::ops::attention::Heads;
use crate::ops::rotary::Angles;
use crate::ops::{
    Documents, Gradients, Parameter, Pass, Trainables, Weight, embedding, matmul_f32, rms_norm,
};

/// A decoder with its weights.
#[derive(Debug, Clone)]
pub struct Decoder {
    config: DecoderConfig,
    embedding: Weight,
    blocks: Vec<Block>,
    norm: Norm,
    /// The embedding itself when tied.
    head: Weight,
    rotary: Rotary,
    device: Device,
}

/// What a forward pass gives.
#[derive(Debug, Clone)]
pub struct Output {
    /// `[tokens, hidden]`, after the last norm: what the head is applied to.
    pub hidden: Tensor,
}

/// What the forward of a layer keeps for the backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recompute {
    /// Everything that the backward needs.
    None,
    /// The layer's input only; the backward runs its forward again.
    Block,
}

/// What the backward needs.
#[derive(Debug)]
pub struct Saved {
    ids: Tensor,
    angles: Angles,
    blocks: Vec<Kept>,
    norm: rms_norm::Saved,
}

#[derive(Debug)]
enum Kept {
    /// Nothing below is trained.
    Nothing,
    Input(Tensor),
    All(Box<block::Saved>),
}

impl Decoder {
    /// The decoder of a checkpoint, computing in `dtype`. Its tensors are read one by one; quantized matrices stay so.
    pub fn open(pretrained: &Pretrained, dtype: DType, device: &Device) -> Result<Self> {
        pretrained.check()?;
        let decoder = Self::load(pretrained.config(), device, |name| pretrained.weight(name, dtype, device))?;
        pretrained.checkpoint().release_files();
        Ok(decoder)
    }

    /// A decoder whose weights come from `read(name)`, each in the type that products are computed in.
    pub fn load(
        config: &DecoderConfig,
        device: &Device,
        mut read: impl FnMut(&str) -> Result<Weight>,
    ) -> Result<Self> {
        let embedding = read("model.embed_tokens.weight")?;
        let blocks = config
            .layers
            .iter()
            .enumerate()
            .map(|(index, layer)| load_block(&mut read, config, index, layer))
            .collect::<Result<_>>()?;
        let norm = Norm { weight: parameter(&mut read, "model.norm.weight")?, eps: config.norm_eps };
        let head = if config.tie_word_embeddings { embedding.clone() } else { read("lm_head.weight")? };
        // Rotation is the same in every layer, and all layers have heads of one width.
        let head_dim = config.layers.first().map_or(0, |layer| layer.attention.head_dim);
        let rotary = Rotary::new(&config.rotary, head_dim);
        Ok(Self { config: config.clone(), embedding, blocks, norm, head, rotary, device: device.clone() })
    }

    /// What it was built from.
    #[must_use]
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The weight of the head, `[vocab, hidden]`.
    #[must_use]
    pub fn head(&self) -> &Weight {
        &self.head
    }

    /// Where it computes.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The type that activations are held in.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.embedding.dtype()
    }

    /// An empty cache for [`Decoder::forward_cached`].
    #[must_use]
    pub fn new_cache(&self) -> Cache {
        Cache::new(self.blocks.len())
    }

    /// Hidden states of a flat batch; nothing is saved.
    pub fn forward(&self, tokens: &[u32], documents: &Documents) -> Result<Output> {
        self.run(tokens, documents, None)
    }

    /// Hidden states of the tokens that follow those in `cache`, which they are added to.
    pub fn forward_cached(&self, tokens: &[u32], cache: &mut Cache) -> Result<Output> {
        let documents = Documents::single(tokens.len(), cache.len);
        let output = self.run(tokens, &documents, Some(cache))?;
        cache.len += tokens.len();
        Ok(output)
    }

    fn run(&self, tokens: &[u32], documents: &Documents, mut cache: Option<&mut Cache>) -> Result<Output> {
        let pass = Pass::inference(documents);
        let (ids, angles) = self.begin(tokens, documents)?;
        let mut x = embedding::forward(&ids, &self.embedding)?; // [tokens, hidden]
        for (index, block) in self.blocks.iter().enumerate() {
            let cache = cache.as_deref_mut().map(|cache| &mut cache.layers[index]);
            (x, _) = block.forward(&x, &angles, &pass, cache)?;
        }
        Ok(Output { hidden: self.norm.forward(&x)?.0 })
    }

    /// Hidden states, and what [`Decoder::backward`] needs for the gradients that `gradients` wants.
    pub fn forward_training(
        &self,
        tokens: &[u32],
        pass: &Pass<'_>,
        recompute: Recompute,
        gradients: &Gradients,
    ) -> Result<(Output, Saved)> {
        let (ids, angles) = self.begin(tokens, pass.documents)?;
        let lowest = self.lowest_trained(gradients);
        let mut x = embedding::forward(&ids, &self.embedding)?; // [tokens, hidden]
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for (index, block) in self.blocks.iter().enumerate() {
            let (y, mut saved) = block.forward(&x, &angles, pass, None)?;
            saved.trim();
            blocks.push(match recompute {
                _ if index < lowest => Kept::Nothing,
                Recompute::Block => Kept::Input(x),
                Recompute::None => Kept::All(Box::new(saved)),
            });
            x = y;
        }
        let (hidden, norm) = self.norm.forward(&x)?;
        Ok((Output { hidden }, Saved { ids, angles, blocks, norm }))
    }

    /// The gradients of everything wanted, from that of the hidden states. What was saved is freed on the way.
    pub fn backward(
        &self,
        saved: Saved,
        pass: &Pass<'_>,
        d_hidden: &Tensor,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let Saved { ids, angles, mut blocks, norm } = saved;
        let wants_embedding = gradients.wanted(&self.embedding).is_some();
        let lowest = self.lowest_trained(gradients);
        let mut dx = self.norm.backward(&norm, d_hidden, None, gradients)?;
        drop(norm);
        for (index, block) in self.blocks.iter().enumerate().rev() {
            let saved = match blocks.pop() {
                Some(Kept::All(saved)) => *saved,
                Some(Kept::Input(x)) => block.forward(&x, &angles, pass, None)?.1,
                Some(Kept::Nothing) | None => return Ok(()),
            };
            let wants_dx = index > lowest || wants_embedding;
            match block.backward(saved, &angles, pass, &dx, wants_dx, gradients)? {
                Some(below) => dx = below,
                None => return Ok(()),
            }
        }
        embedding::backward(&ids, &self.embedding, &dx, gradients)
    }

    /// `[rows, hidden] -> [rows, vocab]` in f32.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        matmul_f32(hidden, self.head.t())
    }

    /// The linear layers that an adapter can go to, in the order of the forward pass.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.blocks.iter_mut().flat_map(Block::linears_mut)
    }

    /// The linear layers that an adapter can go to, in the order of the forward pass.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.blocks.iter().flat_map(Block::linears)
    }

    /// Makes every weight of the model trainable and returns them all, in the type that they compute in.
    pub fn make_trainable(&mut self) -> Result<Trainables> {
        let weights = [&self.embedding, &self.head].into_iter().chain(self.linears().map(|l| &l.weight));
        if let Some(weight) = weights.into_iter().find(|weight| weight.parameter().is_none()) {
            return Err(Error::invalid("is quantized, and quantized weights cannot be trained"))
                .in_tensor(weight.name());
        }
        let mut trainables = Trainables::new();
        let blocks = self.blocks.iter_mut().flat_map(Block::base_parameters_mut);
        let embedding = self.embedding.parameter_mut().into_iter();
        for parameter in embedding.chain([&mut self.norm.weight]).chain(blocks) {
            make_variable(parameter, &mut trainables)?;
        }
        if self.config.tie_word_embeddings {
            self.head = self.embedding.clone();
        } else {
            if let Some(head) = self.head.parameter_mut() {
                make_variable(head, &mut trainables)?;
            }
        }
        Ok(trainables)
    }

    fn begin(&self, tokens: &[u32], documents: &Documents) -> Result<(Tensor, Angles)> {
        if let Some(id) = tokens.iter().find(|id| **id as usize >= self.config.vocab_size) {
            let vocab = self.config.vocab_size;
            return Err(Error::invalid(format!("token id {id} is outside of the vocabulary of {vocab}"))
                .with_hint("the tokenizer belongs to another model"));
        }
        let ids = Tensor::new(tokens, &self.device)?;
        Ok((ids, self.rotary.angles(&documents.positions(), &self.device)?))
    }

    /// The first layer that something trained is in or below; the number of layers when there is none.
    fn lowest_trained(&self, gradients: &Gradients) -> usize {
        if gradients.wanted(&self.embedding).is_some() {
            return 0;
        }
        let trained = |block: &Block| block.is_trained(gradients);
        self.blocks.iter().position(trained).unwrap_or(self.blocks.len())
    }
}

fn make_variable(parameter: &mut Parameter, trainables: &mut Trainables) -> Result<()> {
    let variable = Var::from_tensor(parameter.tensor())?;
    parameter.replace(variable.as_tensor());
    trainables.insert(Arc::from(parameter.name()), variable);
    Ok(())
}

/// Plain values: those of norms and biases.
fn parameter(read: &mut impl FnMut(&str) -> Result<Weight>, name: &str) -> Result<Parameter> {
    match read(name)? {
        Weight::Dense(parameter) => Ok(parameter),
        Weight::Quantized(_) => {
            Err(Error::invalid("is quantized; norms and biases have plain values")).in_tensor(name)
        }
    }
}

fn load_block(
    read: &mut impl FnMut(&str) -> Result<Weight>,
    config: &DecoderConfig,
    index: usize,
    layer: &LayerConfig,
) -> Result<Block> {
    let LayerConfig { attention: a, feed_forward } = layer;
    let path = format!("model.layers.{index}");
    let FeedForwardConfig::Dense { bias, activation, .. } = *feed_forward;
    let mut linear = |block: &str, projection: Projection, bias: bool| -> Result<Linear> {
        let path = format!("{path}.{block}.{}", projection.name());
        let weight = read(&format!("{path}.weight"))?;
        let bias = if bias { Some(parameter(read, &format!("{path}.bias"))?) } else { None };
        Ok(Linear { path, weight, bias, low_rank: None })
    };
    let q = linear("self_attn", Projection::Q, a.qkv_bias)?;
    let k = linear("self_attn", Projection::K, a.qkv_bias)?;
    let v = linear("self_attn", Projection::V, a.qkv_bias)?;
    let o = linear("self_attn", Projection::O, a.output_bias)?;
    let gate = linear("mlp", Projection::Gate, bias)?;
    let up = linear("mlp", Projection::Up, bias)?;
    let down = linear("mlp", Projection::Down, bias)?;
    let mut norm = |name: &str| -> Result<Norm> {
        Ok(Norm { weight: parameter(read, &format!("{path}.{name}.weight"))?, eps: config.norm_eps })
    };
    let qk_norm = if a.qk_norm { Some((norm("self_attn.q_norm")?, norm("self_attn.k_norm")?)) } else { None };
    Ok(Block {
        input_norm: norm("input_layernorm")?,
        attention: Attention { q, k, v, o, qk_norm, heads: heads(a) },
        post_norm: norm("post_attention_layernorm")?,
        feed_forward: FeedForward { gate, up, down, activation },
    })
}

fn heads(config: &AttentionConfig) -> Heads {
    Heads {
        num_heads: config.num_heads,
        num_kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        window: config.window,
        scale: 1.0 / (config.head_dim as f64).sqrt(),
    }
}
