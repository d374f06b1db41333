//! Losses on the same windows of text, and the difference of two with its standard error.
//!
//! The loss on a text is what its windows sum to, divided by the tokens predicted. Two models are compared window by window:
//! with `d_w` the difference of their sums on window `w` and `n_w` its tokens, the mean difference is the ratio
//! `D = sum d_w / sum n_w`, of standard error `sqrt(m / (m - 1) * sum (d_w - D n_w)^2) / sum n_w` over `m` windows (Cochran,
//! Sampling Techniques, 1977, chapter 6). That some text is harder than other text cancels out. Windows are taken as drawn
//! independently; those of one document are not quite.

use serde::Serialize;

/// The mean loss of a model on a text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Loss {
    /// Natural-log loss per predicted token.
    pub nll: f64,
    /// Its exponential.
    pub perplexity: f64,
    /// The difference to the dense model.
    pub above_dense: Difference,
    /// The loss of each window, summed over its predicted tokens.
    pub window_sums: Vec<f64>,
}

/// A difference between two mean losses on the same text, nats per token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Difference {
    /// The difference.
    pub mean: f64,
    /// Its standard error over windows; `None` where there is only one.
    pub standard_error: Option<f64>,
}

impl Loss {
    /// Computes the loss from the sums of windows with `tokens` predicted tokens each, and its difference to the dense model.
    pub(super) fn of(sums: Vec<f64>, dense: &[f64], tokens: &[usize]) -> Self {
        let nll = sums.iter().sum::<f64>() / tokens.iter().sum::<usize>() as f64;
        let above_dense = Difference::of(&sums, dense, tokens);
        Self { nll, perplexity: nll.exp(), above_dense, window_sums: sums }
    }
}

impl Difference {
    /// Computes `one - other` from the sums of both on windows with `tokens` predicted tokens each.
    pub(super) fn of(one: &[f64], other: &[f64], tokens: &[usize]) -> Self {
        let total = tokens.iter().sum::<usize>() as f64;
        let differences: Vec<f64> = one.iter().zip(other).map(|(one, other)| one - other).collect();
        let mean = differences.iter().sum::<f64>() / total;
        let squares: f64 =
            differences.iter().zip(tokens).map(|(d, tokens)| (d - mean * *tokens as f64).powi(2)).sum();
        let windows = tokens.len() as f64;
        let standard_error = (windows > 1.0).then(|| (squares * windows / (windows - 1.0)).sqrt() / total);
        Self { mean, standard_error }
    }
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.standard_error {
            Some(error) => write!(f, "{:+.4} ± {error:.4}", self.mean),
            None => write!(f, "{:+.4}", self.mean),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `numpy.std(d, ddof=1) / sqrt(4)` of `d = [0.1, 0.3, 0.2, 0.6]` is 0.1080.
    #[test]
    fn of_windows_of_one_length_it_is_the_error_of_their_mean() {
        let tokens = [10; 4];
        let found = Difference::of(&[21.0, 33.0, 42.0, 56.0], &[20.0, 30.0, 40.0, 50.0], &tokens);
        assert!((found.mean - 0.3).abs() < 1e-12);
        assert!((found.standard_error.unwrap() - 0.108_012_344).abs() < 1e-8);
        assert_eq!(found.to_string(), "+0.3000 ± 0.1080");
    }

    #[test]
    fn a_constant_difference_per_token_has_no_error() {
        let found = Difference::of(&[6.0, 12.0], &[1.0, 2.0], &[10, 20]);
        assert_eq!((found.mean, found.standard_error), (0.5, Some(0.0)));
        let one = Difference::of(&[6.0], &[1.0], &[10]);
        assert_eq!((one.standard_error, one.to_string()), (None, "+0.5000".to_string()));
    }

    #[test]
    fn longer_windows_count_more() {
        let loss = Loss::of(vec![10.0, 90.0], &[10.0, 60.0], &[10, 30]);
        assert_eq!((loss.nll, loss.above_dense.mean), (2.5, 0.75));
        assert_eq!(loss.above_dense.standard_error.map(|e| (e * 1e6).round()), Some(375_000.0));
    }
}
