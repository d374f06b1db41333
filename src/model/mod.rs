//! One decoder for all families: weights read by Hugging Face names, one forward and the backward that mirrors it.
//!
//! Shape legend of this room: `tokens` of a flat batch, `hidden` the residual stream, `d` a head, `width` the neurons
//! of a feed-forward network.

mod agreement;
mod attention;
mod block;
mod buffers;
mod cache;
pub mod config;
mod decoder;
mod decoding;
pub mod family;
mod feed_forward;
pub mod footprint;
mod linear;
mod load;
mod moe;
mod network;
mod norm;
mod pretrained;
mod rotary;
mod router;
mod router_loss;
mod rule;
mod shared;
mod spread;
mod tied;
mod walk;

pub use cache::Cache;
pub use config::DecoderConfig;
pub use decoder::{Decoder, Output, Recompute, Saved};
pub use feed_forward::FeedForward;
pub use linear::Linear;
pub use pretrained::Pretrained;
pub use router::{Routing, RoutingGradient};
pub use router_loss::{RouterLosses, Terms};
pub use rule::Rule;
pub use spread::{Spread, Tally, balanced};
pub use walk::Stream;
