//! What Enhanced CT Image Storage has beyond CT Image Storage: functional groups, shared and of each frame.

use alloc::string::ToString;
use alloc::vec;

use dicom_core::header::{DataElement, Tag, VR};
use dicom_core::smallvec::SmallVec;
use dicom_core::value::PrimitiveValue;
use dicom_dictionary_std::tags;
use dicom_object::InMemDicomObject;

use super::Stored;
use super::element::{decimal, decimals, double, item, sequence, short, text};
use crate::phantom::{PhantomSlice, StudyPlan, UidRole};

/// The modules and functional groups of Enhanced CT (PS3.3 A.38 and C.8.15).
pub(super) fn enhanced(
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
