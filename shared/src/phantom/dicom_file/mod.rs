//! Phantoms as DICOM files: CT Image Storage, one file a slice, and Enhanced CT Image Storage, one file a study (PS3.3 A.3 and A.38).
//!
//! Every name, number and date is obviously synthetic. Stored values follow the study's scanner ([`Storage`]); JPEG baseline alone cuts
//! them to 8 bits with a slope of 8 HU.

mod element;
mod encode;
mod enhanced;

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use dicom_core::header::{DataElement, VR};
use dicom_core::value::PrimitiveValue;
use dicom_dictionary_std::{tags, uids};
use dicom_object::InMemDicomObject;

use self::element::{decimal, decimals, short, text};
use self::encode::finish;
use self::enhanced::enhanced;
use super::{MANUFACTURER, MODEL_NAME, PhantomSlice, Storage, StudyPlan, UidRole};

/// The transfer syntaxes that [`dicom_file`] writes in every build; Deflated Explicit VR Little Endian needs the feature `deflate`.
pub const TRANSFER_SYNTAXES: [&str; 5] = [
    uids::IMPLICIT_VR_LITTLE_ENDIAN,
    uids::EXPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_BIG_ENDIAN,
    uids::RLE_LOSSLESS,
    uids::JPEG_BASELINE8_BIT,
];

/// Explicit VR Big Endian, retired but still met.
const EXPLICIT_VR_BIG_ENDIAN: &str = "1.2.840.10008.1.2.2";

/// Implementation Class UID of the files' writer.
const IMPLEMENTATION: &str = "2.25.241105329513209829430168246711223570371";

/// Why a phantom's file could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DicomFileError {
    /// The transfer syntax cannot be written by this build.
    #[error("transfer syntax {uid} cannot be written; allowed are {allowed}")]
    TransferSyntax {
        /// What was asked for.
        uid: String,
        /// What this build writes, separated by commas.
        allowed: String,
    },
    /// The JPEG encoder refused the image.
    #[error("the image could not be encoded")]
    Encode(#[source] Box<dicom_encoding::adapters::EncodeError>),
    /// The file meta information is not valid.
    #[error("the file meta information could not be built")]
    Meta(#[source] Box<dicom_object::meta::Error>),
    /// The data set could not be written.
    #[error("the data set could not be written")]
    Write(#[source] Box<dicom_object::WriteError>),
}

/// One slice as a whole Part 10 file of CT Image Storage.
///
/// Indices past the end repeat the last slice, as [`StudyPlan::slice`] does.
///
/// # Errors
///
/// A transfer syntax that this build cannot write.
pub fn dicom_file(
    plan: &StudyPlan,
    slice_index: u32,
    transfer_syntax_uid: &str,
) -> Result<Vec<u8>, DicomFileError> {
    check(transfer_syntax_uid)?;
    let slice_index = slice_index.min(plan.n_slices() - 1);
    let slice = plan.slice(slice_index);
    let sop_uid = plan.uid(UidRole::Slice(slice_index));
    let stored = Stored::new(plan, transfer_syntax_uid);
    let mut object = InMemDicomObject::new_empty();
    let object_mut = &mut object;
    common(object_mut, plan, uids::CT_IMAGE_STORAGE, &sop_uid);
    let lossy = stored.is_lossy;
    text(
        object_mut,
        tags::IMAGE_TYPE,
        VR::CS,
        if lossy {
            "DERIVED\\PRIMARY\\AXIAL"
        } else {
            "ORIGINAL\\PRIMARY\\AXIAL"
        },
    );
    text(object_mut, tags::SCAN_OPTIONS, VR::CS, "HELICAL MODE");
    text(
        object_mut,
        tags::SLICE_THICKNESS,
        VR::DS,
        &decimal(plan.scanner.thickness_mm),
    );
    text(object_mut, tags::KVP, VR::DS, "120");
    text(object_mut, tags::DATA_COLLECTION_DIAMETER, VR::DS, "500");
    text(
        object_mut,
        tags::RECONSTRUCTION_DIAMETER,
        VR::DS,
        &decimal(plan.scanner.field_of_view_mm),
    );
    text(object_mut, tags::GANTRY_DETECTOR_TILT, VR::DS, "0");
    text(object_mut, tags::TABLE_HEIGHT, VR::DS, "160");
    text(object_mut, tags::EXPOSURE_TIME, VR::IS, "500");
    text(object_mut, tags::X_RAY_TUBE_CURRENT, VR::IS, "300");
    text(object_mut, tags::EXPOSURE, VR::IS, "150");
    text(
        object_mut,
        tags::CONVOLUTION_KERNEL,
        VR::SH,
        plan.scanner.kernel.name(),
    );
    text(
        object_mut,
        tags::CONTRAST_BOLUS_AGENT,
        VR::LO,
        "SYNTHETIC CONTRAST",
    );
    text(object_mut, tags::ACQUISITION_NUMBER, VR::IS, "1");
    text(object_mut, tags::ACQUISITION_DATE, VR::DA, DATE);
    text(object_mut, tags::ACQUISITION_TIME, VR::TM, "120000");
    text(
        object_mut,
        tags::INSTANCE_NUMBER,
        VR::IS,
        &(plan.n_slices() - slice_index).to_string(),
    );
    text(
        object_mut,
        tags::IMAGE_POSITION_PATIENT,
        VR::DS,
        &decimals(&slice.position_mm),
    );
    text(
        object_mut,
        tags::IMAGE_ORIENTATION_PATIENT,
        VR::DS,
        "1\\0\\0\\0\\1\\0",
    );
    text(
        object_mut,
        tags::SLICE_LOCATION,
        VR::DS,
        &decimal(slice.position_mm[2]),
    );
    text(
        object_mut,
        tags::PIXEL_SPACING,
        VR::DS,
        &decimals(&slice.pixel_spacing_mm),
    );
    text(object_mut, tags::WINDOW_CENTER, VR::DS, "100");
    text(object_mut, tags::WINDOW_WIDTH, VR::DS, "700");
    text(
        object_mut,
        tags::RESCALE_INTERCEPT,
        VR::DS,
        &stored.intercept.to_string(),
    );
    text(
        object_mut,
        tags::RESCALE_SLOPE,
        VR::DS,
        &stored.slope.to_string(),
    );
    text(object_mut, tags::RESCALE_TYPE, VR::LO, "HU");
    stored.describe(object_mut, plan);
    let native = stored.bytes(&slice);
    finish(
        object,
        &[native],
        uids::CT_IMAGE_STORAGE,
        &sop_uid,
        transfer_syntax_uid,
        &stored,
    )
}

/// The study's first `n_frames` slices (at most all, at least one) as one file of Enhanced CT Image Storage.
///
/// Frame 1 is the lowest slice. JPEG baseline is not offered, for its 8 bits are not allowed here.
///
/// # Errors
///
/// A transfer syntax that this build cannot write.
pub fn multi_frame_file(
    plan: &StudyPlan,
    n_frames: u32,
    transfer_syntax_uid: &str,
) -> Result<Vec<u8>, DicomFileError> {
    check(transfer_syntax_uid)?;
    if transfer_syntax_uid == uids::JPEG_BASELINE8_BIT {
        return Err(refusal(transfer_syntax_uid));
    }
    let slices: Vec<PhantomSlice> = (0..n_frames.clamp(1, plan.n_slices()))
        .map(|index| plan.slice(index))
        .collect();
    let sop_uid = plan.uid(UidRole::MultiFrame);
    let stored = Stored::new(plan, transfer_syntax_uid);
    let mut object = InMemDicomObject::new_empty();
    common(&mut object, plan, uids::ENHANCED_CT_IMAGE_STORAGE, &sop_uid);
    enhanced(&mut object, plan, &slices, &stored);
    stored.describe(&mut object, plan);
    let frames: Vec<Vec<u8>> = slices.iter().map(|slice| stored.bytes(slice)).collect();
    finish(
        object,
        &frames,
        uids::ENHANCED_CT_IMAGE_STORAGE,
        &sop_uid,
        transfer_syntax_uid,
        &stored,
    )
}

/// Every phantom was made on this day.
const DATE: &str = "20000101";

fn refusal(uid: &str) -> DicomFileError {
    let mut allowed = TRANSFER_SYNTAXES.join(", ");
    if cfg!(feature = "deflate") {
        allowed = format!("{allowed}, {}", uids::DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN);
    }
    DicomFileError::TransferSyntax {
        uid: uid.to_string(),
        allowed,
    }
}

fn check(uid: &str) -> Result<(), DicomFileError> {
    let is_deflated = cfg!(feature = "deflate") && uid == uids::DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN;
    if TRANSFER_SYNTAXES.contains(&uid) || is_deflated {
        Ok(())
    } else {
        Err(refusal(uid))
    }
}

/// How values are stored in one file.
struct Stored {
    bits_allocated: u16,
    bits_stored: u16,
    is_signed: bool,
    slope: i32,
    intercept: i32,
    /// Stored Pixel Padding Value, where the scanner declares one.
    padding: Option<i32>,
    is_lossy: bool,
}

impl Stored {
    fn new(plan: &StudyPlan, transfer_syntax_uid: &str) -> Self {
        if transfer_syntax_uid == uids::JPEG_BASELINE8_BIT {
            return Self {
                bits_allocated: 8,
                bits_stored: 8,
                is_signed: false,
                slope: 8,
                intercept: -1024,
                padding: None,
                is_lossy: true,
            };
        }
        let (bits_stored, is_signed, intercept) = match plan.storage() {
            Storage::Unsigned12 => (12, false, -1024),
            Storage::Signed16 => (16, true, 0),
            Storage::Signed16Shifted => (16, true, -1024),
        };
        let scanner = &plan.scanner;
        let padding = scanner
            .padding_hu
            .filter(|_| scanner.declares_padding)
            .map(|hu| i32::from(hu) - intercept);
        Self {
            bits_allocated: 16,
            bits_stored,
            is_signed,
            slope: 1,
            intercept,
            padding,
            is_lossy: false,
        }
    }

    /// Pixel cells, little-endian.
    fn bytes(&self, slice: &PhantomSlice) -> Vec<u8> {
        let stored = |hu: &i16| (i32::from(*hu) - self.intercept).div_euclid(self.slope);
        if self.bits_allocated == 8 {
            return slice
                .hu
                .iter()
                .map(|hu| u8::try_from(stored(hu).clamp(0, 255)).unwrap_or(0))
                .collect();
        }
        slice
            .hu
            .iter()
            .flat_map(|hu| super::canvas::narrow(stored(hu)).to_le_bytes())
            .collect()
    }

    /// The Image Pixel module but Pixel Data.
    fn describe(&self, object: &mut InMemDicomObject, plan: &StudyPlan) {
        for (tag, value) in [
            (tags::SAMPLES_PER_PIXEL, 1),
            (tags::ROWS, plan.matrix()),
            (tags::COLUMNS, plan.matrix()),
            (tags::BITS_ALLOCATED, self.bits_allocated),
            (tags::BITS_STORED, self.bits_stored),
            (tags::HIGH_BIT, self.bits_stored - 1),
            (tags::PIXEL_REPRESENTATION, u16::from(self.is_signed)),
        ] {
            short(object, tag, value);
        }
        text(
            object,
            tags::PHOTOMETRIC_INTERPRETATION,
            VR::CS,
            "MONOCHROME2",
        );
        if let Some(padding) = self.padding {
            let value = PrimitiveValue::from(super::canvas::narrow(padding));
            object.put(DataElement::new(tags::PIXEL_PADDING_VALUE, VR::SS, value));
        }
        if self.is_lossy {
            text(object, tags::LOSSY_IMAGE_COMPRESSION, VR::CS, "01");
            text(object, tags::LOSSY_IMAGE_COMPRESSION_RATIO, VR::DS, "10");
            text(
                object,
                tags::LOSSY_IMAGE_COMPRESSION_METHOD,
                VR::CS,
                "ISO_10918_1",
            );
        }
    }
}

/// The modules that both kinds of object have: patient, study, series, equipment, frame of reference, SOP common.
fn common(object: &mut InMemDicomObject, plan: &StudyPlan, sop_class: &str, sop_uid: &str) {
    let (seed, study_index) = plan.origin();
    let number = format!("{}", study_index + 1);
    for (tag, vr, value) in [
        (tags::SPECIFIC_CHARACTER_SET, VR::CS, "ISO_IR 192"),
        (tags::SOP_CLASS_UID, VR::UI, sop_class),
        (tags::SOP_INSTANCE_UID, VR::UI, sop_uid),
        (tags::STUDY_DATE, VR::DA, DATE),
        (tags::SERIES_DATE, VR::DA, DATE),
        (tags::CONTENT_DATE, VR::DA, DATE),
        (tags::STUDY_TIME, VR::TM, "120000"),
        (tags::SERIES_TIME, VR::TM, "120000"),
        (tags::CONTENT_TIME, VR::TM, "120000"),
        (tags::ACCESSION_NUMBER, VR::SH, ""),
        (tags::MODALITY, VR::CS, "CT"),
        (tags::MANUFACTURER, VR::LO, MANUFACTURER),
        (tags::MANUFACTURER_MODEL_NAME, VR::LO, MODEL_NAME),
        (tags::DEVICE_SERIAL_NUMBER, VR::LO, "0"),
        (tags::SOFTWARE_VERSIONS, VR::LO, env!("CARGO_PKG_VERSION")),
        (tags::REFERRING_PHYSICIAN_NAME, VR::PN, ""),
        (
            tags::STUDY_DESCRIPTION,
            VR::LO,
            "PHANTOM CT PULMONARY ANGIOGRAPHY",
        ),
        (tags::SERIES_DESCRIPTION, VR::LO, "PHANTOM CTPA AXIAL"),
        (tags::PATIENT_NAME, VR::PN, "Phantom^Synthetic"),
        (tags::PATIENT_BIRTH_DATE, VR::DA, ""),
        (tags::PATIENT_SEX, VR::CS, "O"),
        (tags::BODY_PART_EXAMINED, VR::CS, "CHEST"),
        (tags::PATIENT_POSITION, VR::CS, "HFS"),
        (tags::SERIES_NUMBER, VR::IS, "2"),
        (tags::POSITION_REFERENCE_INDICATOR, VR::LO, ""),
    ] {
        text(object, tag, vr, value);
    }
    text(
        object,
        tags::PATIENT_ID,
        VR::LO,
        &format!("PHANTOM-{seed:016X}-{number}"),
    );
    text(object, tags::STUDY_ID, VR::SH, &number);
    text(
        object,
        tags::STUDY_INSTANCE_UID,
        VR::UI,
        &plan.uid(UidRole::Study),
    );
    text(
        object,
        tags::SERIES_INSTANCE_UID,
        VR::UI,
        &plan.uid(UidRole::Series),
    );
    text(
        object,
        tags::FRAME_OF_REFERENCE_UID,
        VR::UI,
        &plan.uid(UidRole::FrameOfReference),
    );
}

#[cfg(test)]
mod tests;
