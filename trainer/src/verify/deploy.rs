//! What was found, in the manifest of the file that may be deployed.

use shared::manifest::{Level, METADATA_KEY, Metric, Validation};

use crate::onnx;
use crate::temperature::is_at_bound;

use super::{Pair, VerifyReport, manifest_of};

/// The int8 file with the report's findings in its manifest: validation, temperature, metrics, and the operating point's figures. `None` where the
/// gate failed and nobody forced it.
///
/// # Errors
///
/// Where the file has no readable manifest.
pub fn deployable(
    int8: &[u8],
    report: &VerifyReport,
    is_forced: bool,
) -> anyhow::Result<Option<Vec<u8>>> {
    if !report.faults.is_empty() && !is_forced {
        return Ok(None);
    }
    let mut model = onnx::read(int8)?;
    let mut manifest = manifest_of(&model)?;
    manifest.validation = match &report.operating_point {
        _ if !report.faults.is_empty() => Validation::Forced,
        None => Validation::Unvalidated,
        Some(_) => Validation::Validated,
    };
    // Where the search found none, that of the f32 file stands.
    let is_found = report.int8_temperature.is_finite() && !is_at_bound(report.int8_temperature);
    if is_found && report.operating_point.is_some() {
        manifest.temperature = Some(report.int8_temperature);
    }
    if let (Some(found), Some(point)) = (
        &report.operating_point,
        manifest.operating_points.first_mut(),
    ) {
        point.sensitivity = found.sensitivity.int8;
        point.specificity = found.specificity.int8;
    }
    let change = |name: &str, pair: Pair| Metric {
        name: name.to_owned(),
        level: Level::Slice,
        part: report.part.to_owned(),
        value: pair.change,
        low: pair.low,
        high: pair.high,
    };
    let mut found = vec![change("auroc-change-int8", report.auroc)];
    if let Some(point) = &report.operating_point {
        found.push(change("sensitivity-change-int8", point.sensitivity));
        found.push(change("specificity-change-int8", point.specificity));
    }
    manifest
        .metrics
        .retain(|metric| found.iter().all(|new| new.name != metric.name));
    manifest.metrics.extend(found.into_iter().filter(|metric| {
        metric.value.is_finite() && metric.low.is_finite() && metric.high.is_finite()
    }));
    model.set_metadata(METADATA_KEY, manifest.to_json());
    Ok(Some(onnx::write(&model)?))
}
