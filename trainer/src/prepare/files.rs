//! Files of a unit: DICOM, the JPEG copy, loose pictures. What cannot be used is left out with its reason.

use std::collections::HashMap;
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
    // Opening a pipe would wait for whoever writes into it.
    if !std::fs::metadata(path)?.is_file() {
        return Err(std::io::Error::other("not a regular file"));
    }
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
    unit: &Unit,
    read: Vec<ReadFile<'_>>,
    spec: &PreprocessSpec,
    left: &mut Vec<LeftOut>,
) -> Result<Vec<Decoded>> {
    type Opened = std::result::Result<(dicom::Slice, dicom::Identity, Option<String>), LeftOut>;
    let opened: Vec<(&Listed, Opened)> = read
        .into_par_iter()
        .map(|(slice, bytes)| {
            let opened = bytes.and_then(|bytes| {
                let object = dicom::read(&bytes)
                    .map_err(|error| left_out(unit, slice, error.code(), &error.to_string()))?;
                let n_frames = object.n_frames();
                if n_frames > 1 {
                    let reason = format!("{n_frames} frames; a label is that of one slice");
                    return Err(left_out(unit, slice, "multi-frame", &reason));
                }
                let frame = object
                    .frame(0)
                    .map_err(|error| left_out(unit, slice, error.code(), &error.to_string()))?;
                Ok((frame, object.identity().clone(), manufacturer(&object)))
            });
            (slice, opened)
        })
        .collect();
    let mut good = Vec::new();
    for (slice, opened) in opened {
        match opened {
            Ok((frame, identity, maker)) => good.push((slice, frame, identity, maker)),
            Err(reason) => left.push(reason),
        }
    }
    let views: Vec<_> = good.iter().map(|(_, frame, ..)| frame.pixels()).collect();
    let tensors = tensors_of(&views, spec)?;
    let mut slices = Vec::new();
    for ((slice, frame, identity, maker), tensor) in good.iter().zip(tensors) {
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
                manufacturer: maker.clone(),
                tensor,
            }),
            Err(error) => left.push(left_out(unit, slice, "pixels", &format!("{error:#}"))),
        }
    }
    Ok(slices)
}

/// Manufacturer (0008,0070). The RSNA data set keeps it, as one of few elements that say which scanner it was.
fn manufacturer(object: &dicom::Object<'_>) -> Option<String> {
    let mut copied = object.copied().into_iter();
    let element = copied.find(|element| element.tag == (0x0008, 0x0070))?;
    let text = String::from_utf8_lossy(&element.value);
    let text = text.replace(char::is_control, " ");
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// `NNNN_<SOP>.jpg` of a series; NNNN is the rank by rising z, which stands for z.
pub(super) fn jpeg_series(
    unit: &Unit,
    folder: &Path,
    hasher: &mut blake3::Hasher,
    left: &mut Vec<LeftOut>,
) -> Vec<Decoded> {
    let ranks = ranks(unit, folder, left);
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

/// Rank and file of each slice in a series' folder, by its name; a second file of a slice is left out.
fn ranks(unit: &Unit, folder: &Path, left: &mut Vec<LeftOut>) -> HashMap<String, (f64, PathBuf)> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    // The order of a folder is the file system's.
    paths.sort();
    let mut ranks = HashMap::new();
    for path in paths {
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        let Some((rank, sop)) = stem.and_then(|stem| stem.split_once('_')) else {
            continue;
        };
        let Ok(rank) = rank.parse::<u32>() else {
            continue;
        };
        if let Some((first, _)) = ranks.get(sop) {
            left.push(LeftOut {
                file: format!(
                    "{}/{}/{}",
                    unit.study,
                    unit.series,
                    path.file_name().unwrap_or_default().display()
                ),
                reason: format!(
                    "repeated: the slice of rank {first} has the same name; that one is used"
                ),
            });
            continue;
        }
        ranks.insert(sop.to_owned(), (f64::from(rank), path));
    }
    ranks
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
    unit: &Unit,
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
                Err(reason) => {
                    left.push(left_out(unit, slice, "picture", &format!("{reason:#}")));
                }
            },
            bytes => slices.extend(dicom_series(unit, vec![(slice, bytes)], spec, left)?),
        }
    }
    Ok(slices)
}

/// The tensor of a 256x256 RGB picture whose channels are the three windows.
pub(super) fn picture_tensor(bytes: &[u8]) -> Result<Vec<u8>> {
    let format = image::guess_format(bytes)?;
    ensure!(
        format != image::ImageFormat::Jpeg || is_whole_jpeg(bytes),
        "the JPEG is cut off: no end of image (FF D9) follows its scans"
    );
    let mut reader = image::ImageReader::with_format(std::io::Cursor::new(bytes), format);
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
    ensure!(
        picture.color().has_color(),
        "the picture is grey, expected red, green and blue for the lung, PE and mediastinal window"
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

/// Whether an EOI marker follows a JPEG's scans (ISO/IEC 10918-1 B.1.1.2, B.2.1). The decoder does not ask: it fills with grey what a cut file
/// lacks. The EOI of a preview within a segment does not count, for segments are stepped over.
fn is_whole_jpeg(bytes: &[u8]) -> bool {
    let mut rest = bytes.get(2..).unwrap_or_default();
    let mut has_scan = false;
    while let Some(&[byte, marker]) = rest.first_chunk() {
        let n_bytes = match (byte, marker) {
            (0xff, 0xd9) => return has_scan,
            // A stuffed byte and RSTn belong to the scan's data.
            (0xff, 0x00 | 0xd0..=0xd7) => 2,
            // A byte of data, or one that fills the space before a marker.
            (0xff, 0xff) | (0..=0xfe, _) => 1,
            (0xff, _) => {
                has_scan |= marker == 0xda;
                let length = rest.get(2..4).map_or(0, |length| {
                    usize::from(u16::from_be_bytes([length[0], length[1]]))
                });
                2 + length
            }
        };
        rest = rest.get(n_bytes..).unwrap_or_default();
    }
    false
}

#[cfg(test)]
mod tests {
    use image::codecs::jpeg::JpegEncoder;
    use shared::phantom::{MANUFACTURER, StudyPlan, dicom_file, multi_frame_file};

    use super::*;

    fn jpeg() -> Vec<u8> {
        let pixels: Vec<u8> = (0..SIDE * SIDE * CHANNELS)
            .map(|index| u8::try_from(index * 7 % 251).unwrap())
            .collect();
        let side = u32::try_from(SIDE).unwrap();
        let mut jpeg = Vec::new();
        JpegEncoder::new_with_quality(&mut jpeg, 95)
            .encode(&pixels, side, side, image::ExtendedColorType::Rgb8)
            .unwrap();
        jpeg
    }

    fn prepared(bytes: &[u8], spec: &PreprocessSpec) -> (Vec<Decoded>, Vec<LeftOut>) {
        let slice = Listed {
            name: "1.2.3".into(),
            pe_present: false,
        };
        let unit = Unit {
            study: "a".into(),
            series: "b".into(),
            labels: None,
            slices: vec![slice.clone()],
            left_out: Vec::new(),
        };
        let mut left = Vec::new();
        let read = vec![(&slice, Ok(bytes.to_vec()))];
        let slices = dicom_series(&unit, read, spec, &mut left).unwrap();
        (slices, left)
    }

    #[test]
    fn a_dicom_slice_keeps_its_manufacturer_and_a_bad_one_its_path() {
        let plan = StudyPlan::new(1, 0, 2, 64);
        let file = dicom_file(&plan, 0, "1.2.840.10008.1.2.1").unwrap();
        let spec = PreprocessSpec::default();
        let (slices, left) = prepared(&file, &spec);
        assert!(left.is_empty());
        assert_eq!(slices[0].manufacturer.as_deref(), Some(MANUFACTURER));
        let (slices, left) = prepared(b"nothing", &spec);
        assert!(slices.is_empty());
        assert_eq!(left[0].file, "a/b/1.2.3");
    }

    #[test]
    fn a_grey_picture_has_no_three_windows() {
        let side = u32::try_from(SIDE).unwrap();
        let mut png = std::io::Cursor::new(Vec::new());
        let grey = image::GrayImage::new(side, side);
        grey.write_to(&mut png, image::ImageFormat::Png).unwrap();
        let error = picture_tensor(png.get_ref()).unwrap_err();
        assert!(error.to_string().contains("grey"), "{error}");
    }

    #[test]
    fn what_is_no_regular_file_is_not_opened() {
        let error = read_bounded(Path::new("/dev/zero")).unwrap_err();
        assert_eq!(error.to_string(), "not a regular file");
    }

    #[test]
    fn a_file_of_several_frames_is_left_out() {
        let plan = StudyPlan::new(1, 0, 2, 64);
        let file = multi_frame_file(&plan, 2, "1.2.840.10008.1.2.1").unwrap();
        let (slices, left) = prepared(&file, &PreprocessSpec::default());
        assert!(slices.is_empty());
        assert!(
            left[0].reason.starts_with("multi-frame: 2 frames"),
            "{left:?}"
        );
    }

    #[test]
    fn a_second_jpeg_of_a_slice_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["0003_1.2.3.jpg", "0001_1.2.3.jpg"] {
            std::fs::write(folder.path().join(name), jpeg()).unwrap();
        }
        let unit = Unit {
            study: "a".into(),
            series: "b".into(),
            labels: None,
            slices: vec![Listed {
                name: "1.2.3".into(),
                pe_present: false,
            }],
            left_out: Vec::new(),
        };
        let mut left = Vec::new();
        let slices = jpeg_series(&unit, folder.path(), &mut blake3::Hasher::new(), &mut left);
        assert_eq!(
            slices.iter().map(|slice| slice.z_mm).collect::<Vec<_>>(),
            [Some(1.0)]
        );
        assert_eq!(left[0].file, "a/b/0003_1.2.3.jpg");
    }

    #[test]
    fn a_jpeg_that_was_cut_off_has_no_tensor() {
        let whole = jpeg();
        picture_tensor(&whole).unwrap();
        for n_bytes in [3000, whole.len() - 2000, whole.len() - 2] {
            let error = picture_tensor(&whole[..n_bytes]).unwrap_err();
            assert!(error.to_string().contains("cut off"), "{n_bytes}: {error}");
        }
        // A preview's end within a segment is not the picture's.
        let preview = [&whole[..2], &[0xff, 0xe1, 0, 4, 0xff, 0xd9], &whole[2..]].concat();
        picture_tensor(&preview).unwrap();
        assert!(picture_tensor(&preview[..preview.len() - 2000]).is_err());
    }
}
