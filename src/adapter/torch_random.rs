//! The random numbers of PyTorch's CPU generator, so that a seed gives the tensors that it gives there.
//!
//! | PyTorch | here |
//! |---|---|
//! | `torch.manual_seed(seed)` | [`Generator::new`] |
//! | `tensor.uniform_(from, to)` | [`Generator::uniform`] |
//! | `tensor.normal_(mean, std)` | [`Generator::normal`] |
//! | the same on a transposed view | [`Generator::normal_one_by_one`], in the order of memory |
//!
//! The generator is the Mersenne Twister MT19937 of Matsumoto and Nishimura (1998).

const STATE: usize = 624;
const MIDDLE: usize = 397;
/// Normal values of a contiguous tensor are drawn in blocks of this many.
const BLOCK: usize = 16;

/// PyTorch's CPU generator.
///
/// ```
/// use peft::adapter::torch_random::Generator;
///
/// let mut drawn = [0.0; 3];
/// Generator::new(0).normal(&mut drawn, 0.0, 1.0);
/// assert_eq!(drawn.map(|x| (x * 1e4).round()), [15410.0, -2934.0, -21788.0]);
/// ```
#[derive(Debug, Clone)]
pub struct Generator {
    state: [u32; STATE],
    used: usize,
    /// The second value of the last pair of normal values drawn one by one.
    kept: Option<f64>,
}

impl Generator {
    /// Only the low 32 bits of the seed count, as in PyTorch.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut state = [0; STATE];
        state[0] = (seed & 0xffff_ffff) as u32;
        for i in 1..STATE {
            let before = state[i - 1];
            state[i] = 1_812_433_253_u32.wrapping_mul(before ^ (before >> 30)).wrapping_add(i as u32);
        }
        Self { state, used: STATE, kept: None }
    }

    /// 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == STATE {
            self.twist();
        }
        let mut y = self.state[self.used];
        self.used += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// Values between `from` and `to`.
    pub fn uniform(&mut self, values: &mut [f32], from: f32, to: f32) {
        let width = to - from;
        for value in values {
            // One rounding, as the fused instruction that PyTorch's compiler emits.
            *value = self.unit_f32().mul_add(width, from);
        }
    }

    /// Normal values, as PyTorch draws them for a contiguous tensor.
    pub fn normal(&mut self, values: &mut [f32], mean: f64, deviation: f64) {
        if values.len() < BLOCK {
            return self.normal_one_by_one(values, mean, deviation);
        }
        for value in values.iter_mut() {
            *value = self.unit_f32();
        }
        for block in values.chunks_exact_mut(BLOCK) {
            box_muller(block, mean, deviation);
        }
        if !values.len().is_multiple_of(BLOCK) {
            let start = values.len() - BLOCK;
            let last = &mut values[start..];
            for value in last.iter_mut() {
                *value = self.unit_f32();
            }
            box_muller(last, mean, deviation);
        }
    }

    /// Normal values, as PyTorch draws them for fewer than sixteen or for a view that is not contiguous.
    pub fn normal_one_by_one(&mut self, values: &mut [f32], mean: f64, deviation: f64) {
        for value in values {
            let normal = self.kept.take().unwrap_or_else(|| {
                let angle = 2.0 * std::f64::consts::PI * self.unit_f64();
                let radius = (-2.0 * (-self.unit_f64()).ln_1p()).sqrt();
                self.kept = Some(radius * angle.sin());
                radius * angle.cos()
            });
            *value = (normal * deviation + mean) as f32;
        }
    }

    fn twist(&mut self) {
        for i in 0..STATE {
            let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % STATE] & 0x7fff_ffff);
            let odd = if y & 1 == 0 { 0 } else { 0x9908_b0df };
            self.state[i] = self.state[(i + MIDDLE) % STATE] ^ (y >> 1) ^ odd;
        }
        self.used = 0;
    }

    fn unit_f32(&mut self) -> f32 {
        (self.next_u32() & 0x00ff_ffff) as f32 * 2.0_f32.powi(-24)
    }

    fn unit_f64(&mut self) -> f64 {
        let bits = (u64::from(self.next_u32()) << 32) | u64::from(self.next_u32());
        (bits & ((1 << 53) - 1)) as f64 * 2.0_f64.powi(-53)
    }
}

/// Sixteen uniform values become sixteen normal ones: the first eight give the radius, the others the angle.
fn box_muller(block: &mut [f32], mean: f64, deviation: f64) {
    let (radii, angles) = block.split_at_mut(BLOCK / 2);
    for (first, second) in radii.iter_mut().zip(angles) {
        let radius = (-2.0 * f64::from(1.0 - *first).ln()).sqrt();
        let angle = 2.0 * std::f64::consts::PI * f64::from(*second);
        *first = (radius * angle.cos() * deviation + mean) as f32;
        *second = (radius * angle.sin() * deviation + mean) as f32;
    }
}
