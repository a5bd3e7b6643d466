//! The exam labels of the RSNA pulmonary embolism data set and the rules that bind them together.
//!
//! Source: RSPECT (Colak et al. 2021, 10.1148/ryai.2021200254) and the label-consistency rules of its challenge.

/// The labels of one exam, as `train.csv` repeats them on each of its slices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExamLabels {
    /// No embolus on any slice, and the exam could be judged.
    pub negative_exam_for_pe: bool,
    /// The exam could not be judged because of its quality.
    pub indeterminate: bool,
    /// All emboli are chronic.
    pub chronic_pe: bool,
    /// Acute and chronic emboli together.
    pub acute_and_chronic_pe: bool,
    /// An embolus in the pulmonary trunk or in a main pulmonary artery.
    pub central_pe: bool,
    /// An embolus in the left lung's arteries.
    pub leftsided_pe: bool,
    /// An embolus in the right lung's arteries.
    pub rightsided_pe: bool,
    /// Ratio of right to left ventricular diameter at least 1 (positive exams only).
    pub rv_lv_ratio_gte_1: bool,
    /// Ratio of right to left ventricular diameter below 1 (positive exams only).
    pub rv_lv_ratio_lt_1: bool,
    /// Quality: motion.
    pub qa_motion: bool,
    /// Quality: contrast.
    pub qa_contrast: bool,
    /// Artefact of mixing contrast.
    pub flow_artifact: bool,
    /// A true filling defect that is not an embolus, a tumour for example.
    pub true_filling_defect_not_pe: bool,
}

impl ExamLabels {
    /// The columns of `train.csv` after `pe_present_on_image`, in its order, each with this exam's value.
    #[must_use]
    pub const fn columns(&self) -> [(&'static str, bool); 13] {
        [
            ("negative_exam_for_pe", self.negative_exam_for_pe),
            ("qa_motion", self.qa_motion),
            ("qa_contrast", self.qa_contrast),
            ("flow_artifact", self.flow_artifact),
            ("rv_lv_ratio_gte_1", self.rv_lv_ratio_gte_1),
            ("rv_lv_ratio_lt_1", self.rv_lv_ratio_lt_1),
            ("leftsided_pe", self.leftsided_pe),
            ("chronic_pe", self.chronic_pe),
            (
                "true_filling_defect_not_pe",
                self.true_filling_defect_not_pe,
            ),
            ("rightsided_pe", self.rightsided_pe),
            ("acute_and_chronic_pe", self.acute_and_chronic_pe),
            ("central_pe", self.central_pe),
            ("indeterminate", self.indeterminate),
        ]
    }

    /// Whether the labels obey the challenge's rules, given whether any slice of the exam is positive.
    ///
    /// A positive exam has exactly one RV/LV label, at least one of central, left and right, not both chronic and acute-and-chronic,
    /// and is neither negative nor indeterminate. Any other exam has exactly one of negative and indeterminate and no other label of an embolus.
    #[must_use]
    pub const fn is_consistent(&self, has_positive_slice: bool) -> bool {
        let located = self.central_pe || self.leftsided_pe || self.rightsided_pe;
        if has_positive_slice {
            (self.rv_lv_ratio_gte_1 != self.rv_lv_ratio_lt_1)
                && located
                && !(self.chronic_pe && self.acute_and_chronic_pe)
                && !self.negative_exam_for_pe
                && !self.indeterminate
        } else {
            (self.negative_exam_for_pe != self.indeterminate)
                && !located
                && !self.chronic_pe
                && !self.acute_and_chronic_pe
                && !self.rv_lv_ratio_gte_1
                && !self.rv_lv_ratio_lt_1
        }
    }
}

/// What a study is asked to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// At least one slice shows an embolus.
    Positive,
    /// No embolus.
    Negative,
    /// No embolus, and a quality that forbids a judgement.
    Indeterminate,
}
