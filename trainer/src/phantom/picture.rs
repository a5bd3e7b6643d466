//! A study's slices as 256x256 RGB JPEG, as the publication's copy has them: quality 95, normalised by the series' range.

use std::fs;

use anyhow::Context as _;
use image::codecs::jpeg::JpegEncoder;
use shared::phantom::{PhantomSlice, StudyPlan, UidRole};
use shared::preprocess::{Preprocessor, SeriesRange};
use shared::spec::{Normalisation, PreprocessSpec};
use shared::{CHANNELS, SIDE, TENSOR_BYTES};

use super::{Layout, PhantomArgs, place, series_folder};

/// Makes the pictures of one study.
pub(super) struct Painter {
    preprocessor: Preprocessor,
    range: SeriesRange,
    tensor: Vec<u8>,
    pixels: Vec<u8>,
}

impl Painter {
    /// Looks at the whole series, because `series-minmax` needs its range.
    pub(super) fn new(plan: &StudyPlan) -> anyhow::Result<Self> {
        let spec = PreprocessSpec {
            normalisation: Normalisation::SeriesMinmax,
            ..PreprocessSpec::default()
        };
        let preprocessor = Preprocessor::new(&spec)?;
        let mut range = None;
        for slice_index in 0..plan.n_slices() {
            let slice: PhantomSlice = plan.slice(slice_index);
            range = preprocessor.series_range(&slice.pixels(&slice.bytes()), range)?;
        }
        let range = range.context("a series without a pixel that is not padding")?;
        Ok(Self {
            preprocessor,
            range,
            tensor: vec![0; TENSOR_BYTES],
            pixels: vec![0; TENSOR_BYTES],
        })
    }

    pub(super) fn write(
        &mut self,
        args: &PhantomArgs,
        plan: &StudyPlan,
        slice_index: u32,
    ) -> anyhow::Result<()> {
        let slice = plan.slice(slice_index);
        self.preprocessor.tensor_in_series(
            &slice.pixels(&slice.bytes()),
            &self.range,
            &mut self.tensor,
        )?;
        for (index, pixel) in self.pixels.chunks_exact_mut(CHANNELS).enumerate() {
            for (channel, value) in pixel.iter_mut().enumerate() {
                *value = self.tensor[channel * SIDE * SIDE + index];
            }
        }
        let mut jpeg = Vec::new();
        let side = u32::try_from(SIDE)?;
        JpegEncoder::new_with_quality(&mut jpeg, 95).encode(
            &self.pixels,
            side,
            side,
            image::ExtendedColorType::Rgb8,
        )?;
        let sop_uid = plan.uid(UidRole::Slice(slice_index));
        let path = match args.layout {
            Layout::Folders => {
                let folder = args.out.join(if slice.pe_present {
                    "pe_present"
                } else {
                    "no_pe"
                });
                fs::create_dir_all(&folder)
                    .with_context(|| format!("making {}", folder.display()))?;
                folder.join(format!("{sop_uid}.jpg"))
            }
            Layout::Rsna | Layout::Jpeg => series_folder(plan, &args.out.join("train-jpegs"))?
                .join(format!("{slice_index:04}_{sop_uid}.jpg")),
        };
        place(&path, &jpeg)
    }
}
