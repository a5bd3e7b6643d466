//! Summary picture.

/// Multi-frame True Color Secondary Capture Image Storage.
pub(crate) const SOP_CLASS_UID: &str =
    dicom_dictionary_std::uids::MULTI_FRAME_TRUE_COLOR_SECONDARY_CAPTURE_IMAGE_STORAGE;
