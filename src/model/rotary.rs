//! The angles of rotary position embedding: frequencies from the configuration, cosine and sine per position.

use candle_core::{Device, Tensor};

use super::config::{RotaryConfig, RotaryScaling};
use crate::error::Result;
use crate::ops::rotary::Angles;

/// The frequencies of one model.
#[derive(Debug, Clone)]
pub(super) struct Rotary {
    /// A value for every two columns that are rotated, in f32 as Hugging Face holds them.
    frequencies: Vec<f32>,
    head_dim: usize,
}

impl Rotary {
    pub(super) fn new(config: &RotaryConfig, head_dim: usize) -> Self {
        let width = (head_dim as f64 * config.share) as usize;
        let frequencies = (0..width.div_ceil(2))
            .map(|i| config.theta.powf(-((2 * i) as f64) / width as f64))
            .map(|frequency| stretched(frequency, &config.scaling) as f32)
            .collect();
        Self { frequencies, head_dim }
    }

    /// `[tokens, rotated / 2]` cosines and sines, computed in f32 so that they agree with Hugging Face's.
    pub(super) fn angles(&self, positions: &[u32], device: &Device) -> Result<Angles> {
        let shape = (positions.len(), self.frequencies.len());
        let values = positions.len() * self.frequencies.len();
        let (mut cos, mut sin) = (Vec::with_capacity(values), Vec::with_capacity(values));
        for &position in positions {
            for &frequency in &self.frequencies {
                let (s, c) = (position as f32 * frequency).sin_cos();
                cos.push(c);
                sin.push(s);
            }
        }
        let head_dim = self.head_dim;
        let (cos, sin) = (Tensor::from_vec(cos, shape, device)?, Tensor::from_vec(sin, shape, device)?);
        Ok(Angles { cos, sin, head_dim })
    }
}

fn stretched(frequency: f64, scaling: &RotaryScaling) -> f64 {
    match *scaling {
        RotaryScaling::None => frequency,
        RotaryScaling::Linear { factor } => frequency / factor,
        RotaryScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_length } => {
            let wavelength = 2.0 * std::f64::consts::PI / frequency;
            if wavelength > original_length / low_freq_factor {
                frequency / factor
            } else if wavelength < original_length / high_freq_factor {
                frequency
            } else {
                let share =
                    (original_length / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - share) * frequency / factor + share * frequency
            }
        }
    }
}
