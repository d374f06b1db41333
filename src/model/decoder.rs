//! The decoder of every family: embedding, layers, norm, head. Its backward walks the layers in reverse.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};

use super::block::{self, Block, scaled};
use super::cache::Cache;
use super::config::{DecoderConfig, EMBEDDING, HEAD, Multipliers};
use super::linear::Linear;
use super::load::{in_shape, load_block, parameter};
use super::norm::Norm;
use super::pretrained::Pretrained;
use super::rotary::Rotary;
use super::router::{Router, Routing, RoutingGradient};
use crate::error::{Context, Error, Result};
use crate::ops::rotary::Angles;
use crate::ops::{
    Documents, Gradients, Parameter, Pass, Trainables, Weight, embedding, matmul_f32, rms_norm,
};

/// A decoder with its weights.
#[derive(Debug, Clone)]
pub struct Decoder {
    pub(super) config: DecoderConfig,
    embedding: Weight,
    pub(super) blocks: Vec<Block>,
    pub(super) norm: Norm,
    /// The embedding itself when tied.
    head: Weight,
    rotary: Rotary,
    device: Device,
}

/// What a forward pass gives.
#[derive(Debug, Clone)]
pub struct Output {
    /// `[tokens, hidden]`, after the last norm and scaled as logits are: what the head is applied to.
    pub hidden: Tensor,
    /// What the router of each sparse layer decided, in the order of layers.
    pub routing: Vec<Routing>,
}

/// What the forward of a layer keeps for the backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
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
        let config = pretrained.config();
        let decoder = Self::load(config, device, |name| {
            let dtype = if config.is_held_in_f32(name) { DType::F32 } else { dtype };
            pretrained.weight(name, dtype, device)
        })?;
        pretrained.checkpoint().release_files();
        Ok(decoder)
    }

    /// A decoder whose weights come from `read(name)`, each in the type that products are computed in.
    pub fn load(
        config: &DecoderConfig,
        device: &Device,
        read: impl FnMut(&str) -> Result<Weight>,
    ) -> Result<Self> {
        let mut read = in_shape(config, read);
        let embedding = read(EMBEDDING)?;
        let blocks = config
            .layers
            .iter()
            .enumerate()
            .map(|(index, layer)| load_block(&mut read, config, index, layer))
            .collect::<Result<_>>()?;
        let norm = Norm { weight: parameter(&mut read, "model.norm.weight")?, eps: config.norm_eps };
        let head = if config.tie_word_embeddings { embedding.clone() } else { read(HEAD)? };
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

    /// The weight of the embedding, `[vocab, hidden]`.
    pub(super) fn embedding(&self) -> &Weight {
        &self.embedding
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

    /// Hidden states of a flat batch; nothing is saved.
    pub fn forward(&self, tokens: &[u32], documents: &Documents) -> Result<Output> {
        self.run(tokens, documents, &mut [])
    }

    /// Hidden states of documents that follow those in `caches`, one for each; keys and values are added to them.
    pub(super) fn run(
        &self,
        tokens: &[u32],
        documents: &Documents,
        caches: &mut [&mut Cache],
    ) -> Result<Output> {
        let pass = Pass::inference(documents).with_ids(tokens);
        let (ids, angles) = self.begin(tokens, documents)?;
        let mut x = self.embed(&ids)?; // [tokens, hidden]
        let mut decided = Vec::new();
        for (index, block) in self.blocks.iter().enumerate() {
            let mut layers: Vec<_> = caches.iter_mut().map(|cache| &mut cache.layers[index]).collect();
            let (y, routing, _) = block.forward(&x, &angles, &pass, &mut layers)?;
            decided.extend(routing);
            x = y;
        }
        let hidden = scaled(self.norm.forward(&x)?.0, self.config.multipliers.logits)?;
        Ok(Output { hidden, routing: decided })
    }

    /// Hidden states, and what [`Decoder::backward`] needs for the gradients that `gradients` wants.
    pub fn forward_training(
        &self,
        tokens: &[u32],
        pass: &Pass<'_>,
        recompute: Recompute,
        gradients: &Gradients,
    ) -> Result<(Output, Saved)> {
        let pass = &pass.with_ids(tokens);
        let (ids, angles) = self.begin(tokens, pass.documents)?;
        let lowest = self.lowest_trained(gradients);
        let mut x = self.embed(&ids)?; // [tokens, hidden]
        let mut blocks = Vec::with_capacity(self.blocks.len());
        let mut decided = Vec::new();
        for (index, block) in self.blocks.iter().enumerate() {
            let (y, routing, mut saved) = block.forward(&x, &angles, pass, &mut [])?;
            decided.extend(routing);
            saved.trim();
            blocks.push(match recompute {
                _ if index < lowest => Kept::Nothing,
                Recompute::Block => Kept::Input(x),
                Recompute::None => Kept::All(Box::new(saved)),
            });
            x = y;
        }
        let (hidden, norm) = self.norm.forward(&x)?;
        let hidden = scaled(hidden, self.config.multipliers.logits)?;
        Ok((Output { hidden, routing: decided }, Saved { ids, angles, blocks, norm }))
    }

    /// The gradients of everything wanted, from that of the hidden states. What was saved is freed on the way.
    pub fn backward(
        &self,
        saved: Saved,
        pass: &Pass<'_>,
        d_hidden: &Tensor,
        gradients: &mut Gradients,
    ) -> Result<()> {
        self.backward_with_routing(saved, pass, d_hidden, &BTreeMap::new(), gradients)
    }

    /// As [`Decoder::backward`], with losses on what routers gave: the gradient of the logits, by layer.
    pub fn backward_with_routing(
        &self,
        saved: Saved,
        pass: &Pass<'_>,
        d_hidden: &Tensor,
        of_losses: &BTreeMap<usize, RoutingGradient>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let Saved { ids, angles, mut blocks, norm } = saved;
        let tokens: Vec<u32> = ids.to_vec1()?;
        let pass = &pass.with_ids(&tokens);
        let wants_embedding = gradients.wanted(&self.embedding).is_some();
        let lowest = self.lowest_trained(gradients);
        let Multipliers { embedding: of_embedding, logits, .. } = self.config.multipliers;
        let mut dx = self.norm.backward(&norm, &scaled(d_hidden.clone(), logits)?, None, gradients)?;
        drop(norm);
        for (index, block) in self.blocks.iter().enumerate().rev() {
            let saved = match blocks.pop() {
                Some(Kept::All(saved)) => *saved,
                Some(Kept::Input(x)) => block.forward(&x, &angles, pass, &mut [])?.2,
                Some(Kept::Nothing) | None => return Ok(()),
            };
            let wants_dx = index > lowest || wants_embedding;
            match block.backward(saved, &angles, pass, (&dx, of_losses.get(&index)), wants_dx, gradients)? {
                Some(below) => dx = below,
                None => return Ok(()),
            }
        }
        embedding::backward(&ids, &self.embedding, &scaled(dx, of_embedding)?, gradients)
    }

    pub(super) fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        scaled(embedding::forward(ids, &self.embedding)?, self.config.multipliers.embedding)
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

    /// Holds the weights of routers that are stored scaled down as they are before that, for training: the same logits to the
    /// bit. What is stored of them afterwards is multiplied with [`super::config::MoeConfig::router_unit`], weights and what a
    /// low-rank term adds alike.
    pub fn unscale_routers(&mut self) -> Result<()> {
        self.blocks.iter_mut().filter_map(Block::router_mut).try_for_each(Router::unscale)
    }

    /// Makes the weights of routers trainable and returns them.
    pub fn make_routers_trainable(&mut self) -> Result<Trainables> {
        let mut trainables = Trainables::new();
        for router in self.blocks.iter_mut().filter_map(Block::router_mut) {
            if let Some(weight) = router.linear.weight.parameter_mut() {
                make_variable(weight, &mut trainables)?;
            }
        }
        Ok(trainables)
    }

    /// Puts a weight of zeros beside each router, from which the deviation of learned noise comes, and returns them all.
    pub fn make_noise_trainable(&mut self) -> Result<Trainables> {
        let mut trainables = Trainables::new();
        for router in self.blocks.iter_mut().filter_map(Block::router_mut) {
            let path = format!("{}.noise", router.linear.path);
            let zeros = Tensor::zeros(router.linear.weight.dims()?, DType::F32, &self.device)?;
            let mut weight = Parameter::new(format!("{path}.weight"), &zeros);
            make_variable(&mut weight, &mut trainables)?;
            router.noise = Some(Linear { path, weight: Weight::Dense(weight), bias: None, low_rank: None });
        }
        Ok(trainables)
    }

    /// Makes the biases that only the choice of experts sees into variables and returns them by layer. They get no gradient:
    /// see [`super::balanced`].
    pub fn make_selection_biases_variable(&mut self) -> Result<BTreeMap<usize, (Arc<str>, Var)>> {
        let mut biases = BTreeMap::new();
        for (layer, block) in self.blocks.iter_mut().enumerate() {
            if let Some(bias) = block.router_mut().and_then(|router| router.bias.as_mut()) {
                let mut variable = Trainables::new();
                make_variable(bias, &mut variable)?;
                biases.extend(variable.into_iter().map(|named| (layer, named)));
            }
        }
        Ok(biases)
    }

    /// [`super::config::MoeConfig::selection_unit`] of a layer, 1 where it has no experts.
    #[must_use]
    pub fn selection_unit(&self, layer: usize) -> f64 {
        let mut sparse = self.config.sparse_layers();
        sparse.find(|(index, _)| *index == layer).map_or(1.0, |(_, moe)| moe.selection_unit())
    }

    /// Puts other values into the weights and biases of routers, by name, as they are stored.
    pub fn set_routers(&mut self, values: &BTreeMap<String, Tensor>) -> Result<()> {
        for router in self.blocks.iter_mut().filter_map(Block::router_mut) {
            let weight = router.linear.weight.parameter_mut().map(|weight| (weight, router.unit));
            for (parameter, unit) in weight.into_iter().chain(router.bias.as_mut().map(|bias| (bias, 1.0))) {
                if let Some(tensor) = values.get(parameter.name()) {
                    let (found, expected) = (tensor.dims(), parameter.tensor().dims());
                    if found != expected {
                        return Err(Error::invalid(format!("has shape {found:?}, expected {expected:?}")))
                            .in_tensor(parameter.name());
                    }
                    parameter.replace(&(tensor.to_dtype(DType::F32)? / unit)?);
                }
            }
        }
        Ok(())
    }

    /// The names of all values in routed experts: of those that get no token, nothing is learned.
    #[must_use]
    pub fn routed_parameters(&self) -> BTreeSet<Arc<str>> {
        let linears = self.blocks.iter().flat_map(Block::routed_linears);
        linears.flat_map(Linear::parameters).map(|parameter| Arc::from(parameter.name())).collect()
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

    pub(super) fn begin(&self, tokens: &[u32], documents: &Documents) -> Result<(Tensor, Angles)> {
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
