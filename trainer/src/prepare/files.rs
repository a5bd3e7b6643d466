//! Files of a unit: DICOM, the JPEG copy, loose pictures. What cannot be used is left out with its reason.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use rayon::prelude::*;
use shared::spec::PreprocessSpec;
use shared::{CHANNELS, SIDE, TENSOR_BYTES, dicom};

use super::decode::{Decoded, tensors_of};
use crate::cache::LeftOut;
use crate::source::{Listed, Unit, identifier};

/// Largest file that is read.
const MAX_FILE_BYTES: u64 = 512 << 20;

/// A file's bytes or the reason why there are none, with its listing.
pub(super) type ReadFile<'a> = (&'a Listed, std::result::Result<Vec<u8>, LeftOut>);

pub(super) fn read_files<'a>(
    unit: &'a Unit,
    path_of: impl Fn(&Listed) -> PathBuf + Sync,
    hasher: &mut blake3::Hasher,
) -> Vec<ReadFile<'a>> {
    let read: Vec<ReadFile<'_>> = unit
        .slices
        .par_iter()
        .map(|slice| {
            let bytes = read_bounded(&path_of(slice));
            let bytes = bytes.map_err(|error| left_out(unit, slice, "file", &error.to_string()));
            (slice, bytes)
        })
        .collect();
    for (_, bytes) in &read {
        hash_of(bytes.as_deref().unwrap_or_default(), hasher);
    }
    read
}

pub(super) fn hash_of(bytes: &[u8], hasher: &mut blake3::Hasher) {
    hasher.update(blake3::hash(bytes).as_bytes());
}

pub(super) fn read_bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    if length > MAX_FILE_BYTES {
        return Err(std::io::Error::other(format!(
            "the file has {length} bytes, allowed {MAX_FILE_BYTES}"
        )));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

pub(super) fn left_out(unit: &Unit, slice: &Listed, code: &str, reason: &str) -> LeftOut {
    let mut file = String::new();
    for part in [&unit.study, &unit.series] {
        if !part.is_empty() {
            file.push_str(part);
            file.push('/');
        }
    }
    LeftOut {
        file: file + &slice.name,
        reason: format!("{code}: {reason}"),
    }
}

pub(super) fn dicom_series(
    read: Vec<ReadFile<'_>>,
    spec: &PreprocessSpec,
    left: &mut Vec<LeftOut>,
) -> Result<Vec<Decoded>> {
    type Opened = std::result::Result<(dicom::Slice, dicom::Identity), (String, String)>;
    let opened: Vec<(&Listed, Opened)> = read
        .into_par_iter()
        .map(|(slice, bytes)| {
            let opened = bytes
                .map_err(|left_out| ("file".to_owned(), left_out.reason))
                .and_then(|bytes| {
                    let object = dicom::read(&bytes)
                        .map_err(|error| (error.code().to_owned(), error.to_string()))?;
                    let frame = object
                        .frame(0)
                        .map_err(|error| (error.code().to_owned(), error.to_string()))?;
                    Ok((frame, object.identity().clone()))
                });
            (slice, opened)
        })
        .collect();
    let mut good = Vec::new();
    for (slice, opened) in opened {
        match opened {
            Ok((frame, identity)) => good.push((slice, frame, identity)),
            Err((code, reason)) => left.push(LeftOut {
                file: slice.name.to_string(),
                reason: format!("{code}: {reason}"),
            }),
        }
    }
    let views: Vec<_> = good.iter().map(|(_, frame, _)| frame.pixels()).collect();
    let tensors = tensors_of(&views, spec)?;
    let mut slices = Vec::new();
    for ((slice, frame, identity), tensor) in good.iter().zip(tensors) {
        match tensor {
            Ok(tensor) => slices.push(Decoded {
                study: identity.study_uid.clone(),
                series: identity.series_uid.clone(),
                sop: identity
                    .sop_uid
                    .clone()
                    .unwrap_or_else(|| identifier(&slice.name)),
                pe_present: slice.pe_present,
                z_mm: frame.attributes.z_mm,
                spacing_mm: frame.attributes.pixel_spacing_mm.map(|spacing| spacing[0]),
                manufacturer: None,
                tensor,
            }),
            Err(error) => left.push(LeftOut {
                file: slice.name.to_string(),
                reason: format!("pixels: {error}"),
            }),
        }
    }
    Ok(slices)
}

/// `NNNN_<SOP>.jpg` of a series; NNNN is the rank by rising z, which stands for z.
pub(super) fn jpeg_series(
    unit: &Unit,
    folder: &Path,
    hasher: &mut blake3::Hasher,
    left: &mut Vec<LeftOut>,
) -> Vec<Decoded> {
    let mut ranks: std::collections::HashMap<String, (f64, PathBuf)> = Default::default();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        if let Some((rank, sop)) = stem.and_then(|stem| stem.split_once('_'))
            && let Ok(rank) = rank.parse::<u32>()
        {
            ranks.insert(sop.to_owned(), (f64::from(rank), path));
        }
    }
    let read = read_files(
        unit,
        |slice| {
            let found = ranks.get(&*slice.name);
            found.map_or_else(|| folder.join(&*slice.name), |(_, path)| path.clone())
        },
        hasher,
    );
    let decoded: Vec<_> = read
        .into_par_iter()
        .map(|(slice, bytes)| {
            let tensor = bytes.and_then(|bytes| {
                picture_tensor(&bytes)
                    .map_err(|reason| left_out(unit, slice, "picture", &format!("{reason:#}")))
            });
            (slice, tensor)
        })
        .collect();
    let mut ranked = Vec::new();
    for (slice, tensor) in decoded {
        match tensor {
            Ok(tensor) => {
                let rank = ranks.get(&*slice.name).map_or(0.0, |(rank, _)| *rank);
                ranked.push((rank, picture(slice, tensor)));
            }
            Err(reason) => left.push(reason),
        }
    }
    ranked.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    ranked
        .into_iter()
        .map(|(rank, slice)| Decoded {
            z_mm: Some(rank),
            ..slice
        })
        .collect()
}

pub(super) fn picture(slice: &Listed, tensor: Vec<u8>) -> Decoded {
    Decoded {
        study: None,
        series: None,
        sop: identifier(&slice.name),
        pe_present: slice.pe_present,
        z_mm: None,
        spacing_mm: None,
        manufacturer: None,
        tensor,
    }
}

/// Files that know nothing of each other: pictures, or DICOM, which brings its own identity.
pub(super) fn loose_files(
    read: Vec<ReadFile<'_>>,
    spec: &PreprocessSpec,
    left: &mut Vec<LeftOut>,
) -> Result<Vec<Decoded>> {
    let mut slices = Vec::new();
    for (slice, bytes) in read {
        let is_picture = bytes
            .as_deref()
            .is_ok_and(|bytes| image::guess_format(bytes).is_ok());
        match bytes {
            Ok(bytes) if is_picture => match picture_tensor(&bytes) {
                Ok(tensor) => slices.push(picture(slice, tensor)),
                Err(reason) => left.push(LeftOut {
                    file: slice.name.to_string(),
                    reason: format!("picture: {reason:#}"),
                }),
            },
            bytes => slices.extend(dicom_series(vec![(slice, bytes)], spec, left)?),
        }
    }
    Ok(slices)
}

/// The tensor of a 256x256 RGB picture whose channels are the three windows.
pub(super) fn picture_tensor(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut reader = image::ImageReader::new(std::io::Cursor::new(bytes)).with_guessed_format()?;
    let mut limits = image::Limits::default();
    limits.max_image_width = Some(4096);
    limits.max_image_height = Some(4096);
    limits.max_alloc = Some(256 << 20);
    reader.limits(limits);
    let picture = reader.decode()?;
    let found = (picture.width(), picture.height());
    let side = u32::try_from(SIDE)?;
    ensure!(
        found == (side, side),
        "the picture is {} x {}, expected {SIDE} x {SIDE}",
        found.0,
        found.1
    );
    let rgb = picture.to_rgb8();
    let mut tensor = vec![0; TENSOR_BYTES];
    for (index, pixel) in rgb.as_raw().chunks_exact(CHANNELS).enumerate() {
        for (channel, value) in pixel.iter().enumerate() {
            tensor[channel * SIDE * SIDE + index] = *value;
        }
    }
    Ok(tensor)
}
