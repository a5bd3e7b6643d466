//! The signal-to-noise ratios as SVG.

use std::fmt::Write as _;

use super::{SNR_TARGET_DB, TensorNoise};

/// Bars of the signal-to-noise ratio of each tensor, with a line at [`SNR_TARGET_DB`], as SVG.
#[must_use]
pub fn noise_plot(tensors: &[TensorNoise]) -> String {
    const ROW: usize = 22;
    const LEFT: f64 = 190.0;
    const PER_DB: f64 = 8.0;
    let height = tensors.len() * ROW + 50;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"760\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\
         <rect width=\"760\" height=\"{height}\" fill=\"white\"/><text x=\"8\" y=\"18\">Signal-to-noise ratio of the int8 file, dB ({})</text>",
        shared::RESEARCH_USE
    );
    for (index, tensor) in tensors.iter().enumerate() {
        let y = index * ROW + 30;
        let width = if tensor.snr_db.is_finite() {
            tensor.snr_db.clamp(0.0, 65.0) * PER_DB
        } else {
            65.0 * PER_DB
        };
        let colour = if tensor.snr_db < SNR_TARGET_DB {
            "#b2182b"
        } else {
            "#2166ac"
        };
        let name = tensor.tensor.replace('&', "&amp;").replace('<', "&lt;");
        // Writing to a string cannot fail.
        let _written = write!(
            svg,
            "<text x=\"8\" y=\"{}\">{name}</text><rect x=\"{LEFT}\" y=\"{y}\" width=\"{width:.1}\" height=\"16\" fill=\"{colour}\"/>\
             <text x=\"{:.1}\" y=\"{}\">{:.1}</text>",
            y + 13,
            LEFT + width + 4.0,
            y + 13,
            tensor.snr_db
        );
    }
    let x = LEFT + SNR_TARGET_DB * PER_DB;
    let _written = write!(
        svg,
        "<line x1=\"{x}\" x2=\"{x}\" y1=\"26\" y2=\"{}\" stroke=\"black\" stroke-dasharray=\"4 3\"/>\
         <text x=\"{x}\" y=\"{}\" text-anchor=\"middle\">at least {SNR_TARGET_DB} dB wanted</text></svg>",
        height - 18,
        height - 4
    );
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plot_names_every_tensor() {
        let noise = |tensor: &str, snr_db| TensorNoise {
            tensor: tensor.to_owned(),
            snr_db,
        };
        let svg = noise_plot(&[
            noise("relu1", 40.0),
            noise("a<b", f64::INFINITY),
            noise("logit", 12.0),
        ]);
        assert!(svg.contains("relu1") && svg.contains("a&lt;b") && svg.ends_with("</svg>"));
    }
}
