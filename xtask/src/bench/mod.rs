//! `cargo xtask bench`: paired measurements of Viridian against QEMU's code generator and against the bare machine.
//!
//! Runs are interleaved (A B C, A B C, ...), so that what the host does meanwhile meets all contenders alike, and each
//! figure is the median of all rounds. The spread (least and greatest) is shown beside it.

pub mod boot;
pub mod cpu;
pub mod disk;
pub mod firmware;
mod inputs;
pub mod smp;
pub mod table;

/// The figures of one measurement, one for each round.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds one figure.
    pub fn add(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The middle figure, or the mean of the two middle ones.
    pub fn median(&self) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => None,
            n if n % 2 == 1 => Some(sorted[middle]),
            _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
        }
    }

    /// The least figure.
    pub fn least(&self) -> Option<f64> {
        self.0.iter().copied().min_by(f64::total_cmp)
    }

    /// The greatest figure.
    pub fn greatest(&self) -> Option<f64> {
        self.0.iter().copied().max_by(f64::total_cmp)
    }
}

/// The geometric mean; `None` of nothing or when a figure is not positive.
pub fn geometric_mean(values: &[f64]) -> Option<f64> {
    if values.is_empty() || values.iter().any(|v| *v <= 0.0 || !v.is_finite()) {
        return None;
    }
    Some((values.iter().map(|v| v.ln()).sum::<f64>() / values.len() as f64).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics() {
        let mut samples = Samples::default();
        assert_eq!(samples.median(), None);
        for value in [9.0, 1.0, 4.0] {
            samples.add(value);
        }
        assert_eq!((samples.median(), samples.least(), samples.greatest()), (Some(4.0), Some(1.0), Some(9.0)));
        samples.add(5.0);
        assert_eq!(samples.median(), Some(4.5));
        assert!((geometric_mean(&[2.0, 8.0]).unwrap() - 4.0).abs() < 1e-12);
        assert_eq!(geometric_mean(&[1.0, 0.0]), None);
    }
}
