//! A slice as a picture: one of the three windows that the network saw, with the heat map over it where it is asked for.
//!
//! In: the tensor that the worker made, u8 `[3, 256, 256]`. Out: a PNG of 256 x 256 pixels with "research use only" burnt in. It shows what
//! the network saw, at its resolution; it is not for reading.

use serde::Deserialize;
use shared::TENSOR_BYTES;

use super::{NotShown, Shown};
use crate::heatmap;

/// A window preset: a channel of the tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Window {
    /// Channel 0: level -600 HU, width 1500 HU with the default PreprocessSpec, as below.
    Lung,
    /// Channel 1: level 100 HU, width 700 HU.
    #[default]
    Pe,
    /// Channel 2: level 40 HU, width 400 HU.
    Mediastinal,
}

impl Window {
    /// In the order of the channels.
    pub(crate) const ALL: [Self; 3] = [Self::Lung, Self::Pe, Self::Mediastinal];

    /// As in an address.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Lung => "lung",
            Self::Pe => "pe",
            Self::Mediastinal => "mediastinal",
        }
    }

    /// For people.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Lung => "Lung",
            Self::Pe => "PE",
            Self::Mediastinal => "Mediastinal",
        }
    }

    fn channel(self) -> usize {
        match self {
            Self::Lung => 0,
            Self::Pe => 1,
            Self::Mediastinal => 2,
        }
    }
}

/// The PNG file.
///
/// # Errors
/// [`NotShown::Refused`] where the tensor is none or the file cannot be made.
pub(crate) fn png(shown: &Shown, window: Window) -> Result<Vec<u8>, NotShown> {
    if shown.tensor.len() != TENSOR_BYTES {
        return Err(NotShown::Refused("the worker sent no picture".into()));
    }
    heatmap::picture(
        &shown.tensor,
        window.channel(),
        shown.contributions.as_ref(),
    )
    .map_err(|error| NotShown::Refused(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_window_shows_its_own_channel() {
        let mut tensor = vec![0; TENSOR_BYTES];
        for (channel, part) in tensor.chunks_mut(TENSOR_BYTES / 3).enumerate() {
            part.fill([40, 80, 120][channel]);
        }
        let shown = Shown {
            tensor,
            contributions: None,
        };
        for (window, grey) in Window::ALL.into_iter().zip([40, 80, 120]) {
            let file = png(&shown, window).unwrap();
            let picture = image::load_from_memory(&file).unwrap().to_rgb8();
            assert_eq!(picture.get_pixel(200, 200).0, [grey; 3], "{window:?}");
        }
    }

    #[test]
    fn a_tensor_of_another_size_is_refused() {
        let shown = Shown {
            tensor: vec![0; 5],
            contributions: None,
        };
        assert!(png(&shown, Window::Pe).is_err());
    }
}
