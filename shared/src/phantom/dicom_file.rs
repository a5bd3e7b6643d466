//! Phantoms as DICOM files: CT Image Storage, one file a slice, and Enhanced CT Image Storage, one file a study (PS3.3 A.3 and A.38).
//!
//! Every name, number and date is obviously synthetic. Stored values follow the study's scanner ([`Storage`]); JPEG baseline alone cuts
//! them to 8 bits with a slope of 8 HU.

use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use alloc::{format, vec};

use dicom_core::DicomValue;
use dicom_core::header::{DataElement, Length, Tag, VR};
use dicom_core::smallvec::SmallVec;
use dicom_core::value::{DataSetSequence, PixelFragmentSequence, PrimitiveValue};
use dicom_dictionary_std::{tags, uids};
use dicom_encoding::adapters::EncodeOptions;
use dicom_encoding::transfer_syntax::{Codec, TransferSyntaxIndex};
use dicom_object::{FileMetaTableBuilder, InMemDicomObject};
use dicom_transfer_syntax_registry::TransferSyntaxRegistry;

use super::{MANUFACTURER, MODEL_NAME, PhantomSlice, Storage, StudyPlan, UidRole, rle};

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

fn text(object: &mut InMemDicomObject, tag: Tag, vr: VR, value: &str) {
    object.put(DataElement::new(tag, vr, value));
}

fn short(object: &mut InMemDicomObject, tag: Tag, value: u16) {
    object.put(DataElement::new(tag, VR::US, PrimitiveValue::from(value)));
}

fn double(object: &mut InMemDicomObject, tag: Tag, value: f64) {
    object.put(DataElement::new(tag, VR::FD, PrimitiveValue::from(value)));
}

fn sequence(object: &mut InMemDicomObject, tag: Tag, items: Vec<InMemDicomObject>) {
    object.put(DataElement::new(
        tag,
        VR::SQ,
        DataSetSequence::new(items, Length::UNDEFINED),
    ));
}

/// An item built by `fill`.
fn item(fill: impl FnOnce(&mut InMemDicomObject)) -> InMemDicomObject {
    let mut object = InMemDicomObject::new_empty();
    fill(&mut object);
    object
}

/// A decimal string of at most 16 characters.
fn decimal(value: f64) -> String {
    let written = format!("{value:.6}");
    let written = written.trim_end_matches('0').trim_end_matches('.');
    if written == "-0" {
        "0".to_string()
    } else {
        written.to_string()
    }
}

fn decimals(values: &[f64]) -> String {
    values
        .iter()
        .map(|&value| decimal(value))
        .collect::<Vec<_>>()
        .join("\\")
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

/// The modules and functional groups of Enhanced CT (PS3.3 A.38 and C.8.15).
fn enhanced(
    object: &mut InMemDicomObject,
    plan: &StudyPlan,
    slices: &[PhantomSlice],
    stored: &Stored,
) {
    for (tag, vr, value) in [
        (tags::IMAGE_TYPE, VR::CS, "ORIGINAL\\PRIMARY\\VOLUME\\NONE"),
        (tags::PIXEL_PRESENTATION, VR::CS, "MONOCHROME"),
        (tags::VOLUMETRIC_PROPERTIES, VR::CS, "VOLUME"),
        (tags::VOLUME_BASED_CALCULATION_TECHNIQUE, VR::CS, "NONE"),
        (tags::CONTENT_QUALIFICATION, VR::CS, "RESEARCH"),
        (tags::ACQUISITION_DATE_TIME, VR::DT, "20000101120000"),
        (tags::BURNED_IN_ANNOTATION, VR::CS, "NO"),
        (tags::LOSSY_IMAGE_COMPRESSION, VR::CS, "00"),
        (tags::PRESENTATION_LUT_SHAPE, VR::CS, "IDENTITY"),
        (tags::MULTIENERGY_CT_ACQUISITION, VR::CS, "NO"),
        (tags::INSTANCE_NUMBER, VR::IS, "1"),
    ] {
        text(object, tag, vr, value);
    }
    text(
        object,
        tags::NUMBER_OF_FRAMES,
        VR::IS,
        &slices.len().to_string(),
    );
    double(object, tags::ACQUISITION_DURATION, 5.0);
    sequence(object, tags::ACQUISITION_CONTEXT_SEQUENCE, vec![]);
    let organization = plan.uid(UidRole::FrameOfReference);
    let organizations = vec![item(|item| {
        text(
            item,
            tags::DIMENSION_ORGANIZATION_UID,
            VR::UI,
            &organization,
        )
    })];
    sequence(object, tags::DIMENSION_ORGANIZATION_SEQUENCE, organizations);
    let index = item(|item| {
        text(
            item,
            tags::DIMENSION_ORGANIZATION_UID,
            VR::UI,
            &organization,
        );
        item.put(DataElement::new(
            tags::DIMENSION_INDEX_POINTER,
            VR::AT,
            PrimitiveValue::from(tags::IMAGE_POSITION_PATIENT),
        ));
        item.put(DataElement::new(
            tags::FUNCTIONAL_GROUP_POINTER,
            VR::AT,
            PrimitiveValue::from(tags::PLANE_POSITION_SEQUENCE),
        ));
    });
    sequence(object, tags::DIMENSION_INDEX_SEQUENCE, vec![index]);
    sequence(
        object,
        tags::SHARED_FUNCTIONAL_GROUPS_SEQUENCE,
        vec![shared_groups(plan, slices, stored)],
    );
    let frames = (1_u32..)
        .zip(slices)
        .map(|(number, slice)| frame_groups(number, slice))
        .collect();
    sequence(object, tags::PER_FRAME_FUNCTIONAL_GROUPS_SEQUENCE, frames);
}

/// A code of the DICOM or SNOMED terminology (PS3.3 8.8).
fn code(value: &str, scheme: &str, meaning: &str) -> InMemDicomObject {
    item(|item| {
        text(item, tags::CODE_VALUE, VR::SH, value);
        text(item, tags::CODING_SCHEME_DESIGNATOR, VR::SH, scheme);
        text(item, tags::CODE_MEANING, VR::LO, meaning);
    })
}

fn shared_groups(plan: &StudyPlan, slices: &[PhantomSlice], stored: &Stored) -> InMemDicomObject {
    let scanner = &plan.scanner;
    let group = |object: &mut InMemDicomObject, tag: Tag, fill: &dyn Fn(&mut InMemDicomObject)| {
        sequence(object, tag, vec![item(fill)]);
    };
    item(|object| {
        group(object, tags::PIXEL_MEASURES_SEQUENCE, &|item| {
            let spacing = slices
                .first()
                .map_or([1.0; 2], |slice| slice.pixel_spacing_mm);
            text(item, tags::PIXEL_SPACING, VR::DS, &decimals(&spacing));
            text(
                item,
                tags::SLICE_THICKNESS,
                VR::DS,
                &decimal(scanner.thickness_mm),
            );
        });
        group(object, tags::PLANE_ORIENTATION_SEQUENCE, &|item| {
            text(
                item,
                tags::IMAGE_ORIENTATION_PATIENT,
                VR::DS,
                "1\\0\\0\\0\\1\\0",
            );
        });
        group(object, tags::FRAME_ANATOMY_SEQUENCE, &|item| {
            text(item, tags::FRAME_LATERALITY, VR::CS, "U");
            sequence(
                item,
                tags::ANATOMIC_REGION_SEQUENCE,
                vec![code("51185008", "SCT", "Chest")],
            );
        });
        group(object, tags::FRAME_VOILUT_SEQUENCE, &|item| {
            text(item, tags::WINDOW_CENTER, VR::DS, "100");
            text(item, tags::WINDOW_WIDTH, VR::DS, "700");
        });
        group(object, tags::PIXEL_VALUE_TRANSFORMATION_SEQUENCE, &|item| {
            text(
                item,
                tags::RESCALE_INTERCEPT,
                VR::DS,
                &stored.intercept.to_string(),
            );
            text(item, tags::RESCALE_SLOPE, VR::DS, &stored.slope.to_string());
            text(item, tags::RESCALE_TYPE, VR::LO, "HU");
        });
        group(object, tags::CT_IMAGE_FRAME_TYPE_SEQUENCE, &|item| {
            text(
                item,
                tags::FRAME_TYPE,
                VR::CS,
                "ORIGINAL\\PRIMARY\\VOLUME\\NONE",
            );
            text(item, tags::PIXEL_PRESENTATION, VR::CS, "MONOCHROME");
            text(item, tags::VOLUMETRIC_PROPERTIES, VR::CS, "VOLUME");
            text(
                item,
                tags::VOLUME_BASED_CALCULATION_TECHNIQUE,
                VR::CS,
                "NONE",
            );
        });
        group(
            object,
            tags::IRRADIATION_EVENT_IDENTIFICATION_SEQUENCE,
            &|item| {
                text(
                    item,
                    tags::IRRADIATION_EVENT_UID,
                    VR::UI,
                    &plan.uid(UidRole::Series),
                );
            },
        );
        group(object, tags::CT_ACQUISITION_TYPE_SEQUENCE, &|item| {
            text(item, tags::ACQUISITION_TYPE, VR::CS, "SPIRAL");
            text(item, tags::TUBE_ANGLE, VR::CS, "");
            text(item, tags::CONSTANT_VOLUME_FLAG, VR::CS, "NO");
            text(item, tags::FLUOROSCOPY_FLAG, VR::CS, "NO");
            item.remove_element(tags::TUBE_ANGLE);
        });
        group(object, tags::CT_ACQUISITION_DETAILS_SEQUENCE, &|item| {
            text(item, tags::ROTATION_DIRECTION, VR::CS, "CW");
            double(item, tags::REVOLUTION_TIME, 0.5);
            double(item, tags::SINGLE_COLLIMATION_WIDTH, 0.6);
            double(item, tags::TOTAL_COLLIMATION_WIDTH, 38.4);
            text(item, tags::TABLE_HEIGHT, VR::DS, "160");
            text(item, tags::GANTRY_DETECTOR_TILT, VR::DS, "0");
            text(item, tags::DATA_COLLECTION_DIAMETER, VR::DS, "500");
        });
        group(object, tags::CT_TABLE_DYNAMICS_SEQUENCE, &|item| {
            double(item, tags::TABLE_SPEED, 50.0);
            double(item, tags::TABLE_FEED_PER_ROTATION, 25.0);
            double(item, tags::SPIRAL_PITCH_FACTOR, 0.65);
        });
        group(object, tags::CT_GEOMETRY_SEQUENCE, &|item| {
            text(item, tags::DISTANCE_SOURCE_TO_DETECTOR, VR::DS, "1000");
            double(item, tags::DISTANCE_SOURCE_TO_DATA_COLLECTION_CENTER, 550.0);
        });
        group(object, tags::CT_RECONSTRUCTION_SEQUENCE, &|item| {
            text(
                item,
                tags::RECONSTRUCTION_ALGORITHM,
                VR::CS,
                "FILTER_BACK_PROJ",
            );
            text(
                item,
                tags::CONVOLUTION_KERNEL,
                VR::SH,
                scanner.kernel.name(),
            );
            text(item, tags::CONVOLUTION_KERNEL_GROUP, VR::CS, "GENERAL");
            text(
                item,
                tags::RECONSTRUCTION_DIAMETER,
                VR::DS,
                &decimal(scanner.field_of_view_mm),
            );
            let spacing = scanner.field_of_view_mm / f64::from(plan.matrix());
            let spacing = PrimitiveValue::F64(SmallVec::from_slice(&[spacing, spacing]));
            item.put(DataElement::new(
                tags::RECONSTRUCTION_PIXEL_SPACING,
                VR::FD,
                spacing,
            ));
            double(item, tags::RECONSTRUCTION_ANGLE, 180.0);
            text(item, tags::IMAGE_FILTER, VR::SH, "NONE");
        });
        group(object, tags::CT_EXPOSURE_SEQUENCE, &|item| {
            double(item, tags::EXPOSURE_TIME_INMS, 500.0);
            double(item, tags::X_RAY_TUBE_CURRENT_INM_A, 300.0);
            double(item, tags::EXPOSURE_INM_AS, 150.0);
            text(item, tags::EXPOSURE_MODULATION_TYPE, VR::CS, "NONE");
        });
        group(object, tags::CTX_RAY_DETAILS_SEQUENCE, &|item| {
            text(item, tags::KVP, VR::DS, "120");
            text(item, tags::FOCAL_SPOTS, VR::DS, "1");
            text(item, tags::FILTER_TYPE, VR::SH, "FLAT");
            text(item, tags::FILTER_MATERIAL, VR::CS, "ALUMINUM");
        });
        group(object, tags::CT_POSITION_SEQUENCE, &|item| {
            let centre = [scanner.centre_mm[0], scanner.centre_mm[1], 0.0];
            for tag in [
                tags::RECONSTRUCTION_TARGET_CENTER_PATIENT,
                tags::DATA_COLLECTION_CENTER_PATIENT,
            ] {
                item.put(DataElement::new(
                    tag,
                    VR::FD,
                    PrimitiveValue::F64(SmallVec::from_slice(&centre)),
                ));
            }
            double(item, tags::TABLE_POSITION, 0.0);
        });
    })
}

fn frame_groups(number: u32, slice: &PhantomSlice) -> InMemDicomObject {
    item(|object| {
        let content = item(|item| {
            text(
                item,
                tags::FRAME_ACQUISITION_DATE_TIME,
                VR::DT,
                "20000101120000",
            );
            text(
                item,
                tags::FRAME_REFERENCE_DATE_TIME,
                VR::DT,
                "20000101120000",
            );
            double(item, tags::FRAME_ACQUISITION_DURATION, 500.0);
            short(item, tags::FRAME_ACQUISITION_NUMBER, 1);
            item.put(DataElement::new(
                tags::DIMENSION_INDEX_VALUES,
                VR::UL,
                PrimitiveValue::from(number),
            ));
            text(item, tags::STACK_ID, VR::SH, "1");
            item.put(DataElement::new(
                tags::IN_STACK_POSITION_NUMBER,
                VR::UL,
                PrimitiveValue::from(number),
            ));
        });
        sequence(object, tags::FRAME_CONTENT_SEQUENCE, vec![content]);
        let position = item(|item| {
            text(
                item,
                tags::IMAGE_POSITION_PATIENT,
                VR::DS,
                &decimals(&slice.position_mm),
            )
        });
        sequence(object, tags::PLANE_POSITION_SEQUENCE, vec![position]);
    })
}

/// Adds Pixel Data in the transfer syntax and writes the file.
fn finish(
    mut object: InMemDicomObject,
    frames: &[Vec<u8>],
    sop_class: &str,
    sop_uid: &str,
    transfer_syntax_uid: &str,
    stored: &Stored,
) -> Result<Vec<u8>, DicomFileError> {
    let meta = |uid: &str| {
        FileMetaTableBuilder::new()
            .media_storage_sop_class_uid(sop_class)
            .media_storage_sop_instance_uid(sop_uid)
            .transfer_syntax(uid)
            .implementation_class_uid(IMPLEMENTATION)
            .implementation_version_name("PE-EDGE-PHANTOM")
            .build()
            .map_err(|error| DicomFileError::Meta(Box::new(error)))
    };
    let columns = object
        .get(tags::COLUMNS)
        .and_then(|element| element.to_int::<u16>().ok())
        .unwrap_or(0);
    match transfer_syntax_uid {
        uids::RLE_LOSSLESS => {
            let fragments = frames
                .iter()
                .map(|frame| rle::encode(frame, usize::from(columns)))
                .collect();
            put_fragments(&mut object, fragments);
        }
        uids::JPEG_BASELINE8_BIT => {
            put_native(&mut object, frames, stored);
            let native = object.with_exact_meta(meta(uids::EXPLICIT_VR_LITTLE_ENDIAN)?);
            let codec = TransferSyntaxRegistry
                .get(transfer_syntax_uid)
                .map(|syntax| syntax.codec());
            let Some(Codec::EncapsulatedPixelData(_, Some(writer))) = codec else {
                return Err(refusal(transfer_syntax_uid));
            };
            let mut options = EncodeOptions::new();
            options.quality = Some(95);
            let mut jpeg = Vec::new();
            writer
                .encode_frame(&native, 0, options, &mut jpeg)
                .map_err(|error| DicomFileError::Encode(Box::new(error)))?;
            if jpeg.len() % 2 == 1 {
                jpeg.push(0);
            }
            object = native.into_inner();
            put_fragments(&mut object, vec![jpeg]);
        }
        _ => put_native(&mut object, frames, stored),
    }
    let mut file = Vec::new();
    object
        .with_exact_meta(meta(transfer_syntax_uid)?)
        .write_all(&mut file)
        .map_err(|error| DicomFileError::Write(Box::new(error)))?;
    Ok(file)
}

fn put_fragments(object: &mut InMemDicomObject, fragments: Vec<Vec<u8>>) {
    // Offsets count from the first fragment's item tag (PS3.5 A.4).
    let mut offset = 0_usize;
    let mut table: SmallVec<[u32; 2]> = SmallVec::new();
    for fragment in &fragments {
        table.push(u32::try_from(offset).unwrap_or(u32::MAX));
        offset += fragment.len() + 8;
    }
    let fragments: SmallVec<[Vec<u8>; 2]> = fragments.into();
    let value: DicomValue<InMemDicomObject, Vec<u8>> =
        DicomValue::PixelSequence(PixelFragmentSequence::new(table, fragments));
    object.put(DataElement::new(tags::PIXEL_DATA, VR::OB, value));
}

fn put_native(object: &mut InMemDicomObject, frames: &[Vec<u8>], stored: &Stored) {
    let bytes = frames.iter().flatten().copied();
    let (vr, value) = if stored.bits_allocated == 8 {
        (VR::OB, PrimitiveValue::U8(bytes.collect()))
    } else {
        // As words, so that the writer puts them into its byte order.
        let words = frames
            .iter()
            .flat_map(|frame| frame.chunks_exact(2))
            .map(|cell| u16::from_le_bytes([cell[0], cell[1]]));
        (VR::OW, PrimitiveValue::U16(words.collect()))
    };
    object.put(DataElement::new(tags::PIXEL_DATA, vr, value));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dicom;

    /// HU of one frame as the reader sees them.
    fn hu(file: &[u8], frame_index: u32) -> Vec<i32> {
        let object = dicom::read(file).expect("a readable object");
        let slice = object.frame(frame_index).expect("an accepted frame");
        let (slope, intercept) = (slice.rescale.slope, slice.rescale.intercept);
        let cell = usize::from(slice.format.bits_allocated / 8);
        let value = |cell: &[u8]| match (cell, slice.format.byte_order, slice.format.is_signed) {
            (&[byte], ..) => i32::from(byte),
            (&[a, b], crate::stored::ByteOrder::LittleEndian, true) => {
                i32::from(i16::from_le_bytes([a, b]))
            }
            (&[a, b], crate::stored::ByteOrder::LittleEndian, false) => {
                i32::from(u16::from_le_bytes([a, b]))
            }
            (&[a, b], crate::stored::ByteOrder::BigEndian, true) => {
                i32::from(i16::from_be_bytes([a, b]))
            }
            (&[a, b], crate::stored::ByteOrder::BigEndian, false) => {
                i32::from(u16::from_be_bytes([a, b]))
            }
            _ => panic!("cells of {} bytes", cell.len()),
        };
        let hu = |cell| super::super::canvas::round_i32(f64::from(value(cell)) * slope + intercept);
        slice
            .pixels
            .chunks_exact(cell)
            .map(hu)
            .take(slice.rows * slice.columns)
            .collect()
    }

    fn syntaxes() -> Vec<&'static str> {
        let mut syntaxes = TRANSFER_SYNTAXES.to_vec();
        if cfg!(feature = "deflate") {
            syntaxes.push(uids::DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN);
        }
        syntaxes
    }

    #[test]
    fn every_transfer_syntax_reads_back_to_the_same_hu() {
        let mut storages = Vec::new();
        for study_index in 0..8 {
            let plan = StudyPlan::new(5, study_index, 6, 96);
            storages.push(plan.storage());
            let expected: Vec<i32> = plan.slice(3).hu.iter().map(|&hu| i32::from(hu)).collect();
            for syntax in syntaxes() {
                let file = dicom_file(&plan, 3, syntax).expect("a syntax of the table");
                let read = hu(&file, 0);
                assert_eq!(read.len(), expected.len());
                let tolerance = if syntax == uids::JPEG_BASELINE8_BIT {
                    150
                } else {
                    0
                };
                for (read, &expected) in read.iter().zip(&expected) {
                    // Eight bits hold -1024 to 1016 HU.
                    let expected = if tolerance > 0 {
                        expected.clamp(-1024, 1016)
                    } else {
                        expected
                    };
                    assert!(
                        (read - expected).abs() <= tolerance,
                        "{syntax}: {read} for {expected} in study {study_index}"
                    );
                }
            }
        }
        for storage in [
            Storage::Unsigned12,
            Storage::Signed16,
            Storage::Signed16Shifted,
        ] {
            assert!(storages.contains(&storage), "no study stores {storage:?}");
        }
    }

    #[test]
    fn frames_of_a_multi_frame_file_equal_the_slices() {
        let plan = StudyPlan::new(5, 1, 6, 64);
        for syntax in syntaxes()
            .into_iter()
            .filter(|&syntax| syntax != uids::JPEG_BASELINE8_BIT)
        {
            let file = multi_frame_file(&plan, 4, syntax).expect("a syntax of the table");
            let object = dicom::read(&file).expect("a readable object");
            assert_eq!(object.n_frames(), 4);
            for frame_index in 0..4 {
                let expected: Vec<i32> = plan
                    .slice(frame_index)
                    .hu
                    .iter()
                    .map(|&hu| i32::from(hu))
                    .collect();
                assert_eq!(
                    hu(&file, frame_index),
                    expected,
                    "{syntax} frame {frame_index}"
                );
                let position = object
                    .frame(frame_index)
                    .expect("an accepted frame")
                    .attributes
                    .position_mm
                    .expect("a position");
                assert!((position[2] - plan.z_mm(frame_index)).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn a_foreign_transfer_syntax_is_refused_by_name() {
        let plan = StudyPlan::new(1, 0, 1, 64);
        let error = dicom_file(&plan, 0, "1.2.3").expect_err("not a syntax of the table");
        assert!(error.to_string().contains("1.2.3"));
        assert!(multi_frame_file(&plan, 1, uids::JPEG_BASELINE8_BIT).is_err());
    }
}
