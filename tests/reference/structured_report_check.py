"""Validates the structured reports that `edge report` writes, with software that is not ours.

usage: structured_report_check.py [--edge target/debug/edge]

For every result in tests/reference/results, as Comprehensive 3D SR and as Comprehensive SR:
The secondary capture passes dciodvfy and pydicom reads its frames.
dciodvfy and PixelMed's DicomSRValidator print no line with "Error" (their exit codes say nothing), dsrdump reads it,
pydicom's content tree is the one written here, and highdicom reads finding, presence and probability through its own TID 1500.
Needs dicom3tools, pixelmed-apps and dcmtk on the PATH, and requirements.txt.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import highdicom
import pydicom
from pydicom.sr.codedict import codes

HERE = pathlib.Path(__file__).parent
# The JDK's default bounds are too small for the validator's own style sheet.
JAVA = " ".join(f"-Djdk.xml.xpath{name}Limit=0" for name in ("TotalOp", "ExprOp", "ExprGrp"))
CLASSES = {"comprehensive-3d-sr": "1.2.840.10008.5.1.4.1.1.88.34", "comprehensive-sr": "1.2.840.10008.5.1.4.1.1.88.33"}
PRESENCE = {"positive": "260373001", "not_detected": "260415000"}


def said(*command):
    environment = {**os.environ, "JAVA_TOOL_OPTIONS": JAVA}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, errors="replace")
    return done.stdout + done.stderr


def name_of(item):
    code = item.ConceptNameCodeSequence[0]
    return code.CodeMeaning


def tree(item):
    """(relation, type, name) of every item, depth first, with its depth."""
    found = []

    def walk(item, depth):
        found.append((depth, item.get("RelationshipType", ""), item.ValueType, name_of(item)))
        for below in item.get("ContentSequence", []):
            walk(below, depth + 1)

    walk(item, 0)
    return found


def expected_tree(result):
    context, modifier, contains = "HAS OBS CONTEXT", "HAS CONCEPT MOD", "CONTAINS"
    judged = result["outcome"]["kind"] != "not_analysed"
    items = [
        (0, "", "CONTAINER", "Imaging Measurement Report"),
        (1, modifier, "CODE", "Language of Content Item and Descendants"),
        (1, context, "CODE", "Observer Type"),
        (1, context, "UIDREF", "Device Observer UID"),
        (1, context, "TEXT", "Device Observer Name"),
        (1, context, "TEXT", "Device Observer Manufacturer"),
        (1, context, "TEXT", "Device Observer Model Name"),
        (1, context, "TEXT", "Device Observer Serial Number"),
        (1, modifier, "CODE", "Procedure reported"),
        (1, contains, "CONTAINER", "Imaging Measurements"),
        (2, contains, "CONTAINER", "Measurement Group"),
        (3, context, "TEXT", "Tracking Identifier"),
        (3, context, "UIDREF", "Tracking Unique Identifier"),
    ]
    if judged:
        items += [(3, contains, "CODE", "Finding"), (3, modifier, "CODE", "Finding Site")]
    items += [(3, modifier, "TEXT", f"Algorithm {what}") for what in ("Name", "Version", "Parameters")]
    if judged:
        top = len(result["top"])
        items += [(3, contains, "IMAGE", "Source of Measurement")] * top
        items += [(3, contains, "NUM", "Probability")]
        items += [(4, "INFERRED FROM", "IMAGE", "Source of Measurement")] * top
        items += [(3, contains, "CODE", "Presence")]
    return items + [(3, contains, "CODE", "Summary of Detections"), (3, contains, "TEXT", "Comment")]


def check_validators(path):
    for command in (["dciodvfy", path], ["DicomSRValidator", path]):
        lines = [line for line in said(*command).splitlines() if "Error" in line or "Exception" in line]
        assert not lines, f"{command[0]}: {lines}"
    validator = said("DicomSRValidator", path)
    assert "Found Root Template TID_1500" in validator and "IOD validation complete" in validator, validator
    dump = said("dsrdump", path)
    assert "Imaging Measurement Report" in dump and "\nE: " not in f"\n{dump}", dump


def check_attributes(data_set, result, sop_class):
    assert data_set.SOPClassUID == data_set.file_meta.MediaStorageSOPClassUID == sop_class
    assert data_set.SOPInstanceUID == data_set.file_meta.MediaStorageSOPInstanceUID
    assert data_set.SOPInstanceUID.startswith("2.25.")
    assert data_set.VerificationFlag == "UNVERIFIED"
    partial = result["state"] == "provisional"
    assert data_set.CompletionFlag == ("PARTIAL" if partial else "COMPLETE")
    assert all(data_set.get(key) for key in ("Manufacturer", "ManufacturerModelName", "DeviceSerialNumber", "SoftwareVersions"))
    for element in result["patient"]["elements"]:
        tag = pydicom.tag.Tag(element["tag"])
        copied = data_set[tag].value
        charset = "utf-8"
        assert str(copied) == bytes(element["value"]).decode(charset), tag
    if result["series_uid"]:
        (study,) = data_set.CurrentRequestedProcedureEvidenceSequence
        (series,) = study.ReferencedSeriesSequence
        assert (study.StudyInstanceUID, series.SeriesInstanceUID) == (result["study_uid"], result["series_uid"])
        found = [(one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID) for one in series.ReferencedSOPSequence]
        assert len(found) == len(set(found))
        assert set(found) == {(one["sop_class_uid"], one["sop_uid"]) for one in result["slices"]}


def check_highdicom(path, result):
    report = highdicom.sr.srread(path)
    groups = report.content.get_image_measurement_groups()
    assert len(groups) == 1
    (group,) = groups
    kind = result["outcome"]["kind"]
    if kind == "not_analysed":
        assert group.finding_type is None and not group.get_measurements()
        return
    assert group.finding_type == codes.SCT.PulmonaryEmbolism
    (measurement,) = group.get_measurements()
    probability = 100 / (1 + 2.718281828459045 ** -result["score"])
    assert measurement.unit.value == "%" and abs(measurement.value - probability) < 0.01, measurement.value
    evaluations = {one.name.value: one.value.value for one in group.get_qualitative_evaluations()}
    assert evaluations["705057003"] == PRESENCE[kind], evaluations
    tops = [result["slices"][index] for index in result["top"]]
    sources = [(one.referenced_sop_instance_uid, one.referenced_frame_numbers) for one in group.source_images]
    assert sources == [(top["sop_uid"], top["frame"] and [top["frame"]]) for top in tops], sources


def check_capture(path, result):
    """The secondary capture of a judged, complete study: a page of words and the key slices."""
    lines = [line for line in said("dciodvfy", path).splitlines() if "Error" in line]
    assert not lines, lines
    capture = pydicom.dcmread(path)
    assert capture.BurnedInAnnotation == "YES" and capture.SOPInstanceUID == capture.file_meta.MediaStorageSOPInstanceUID
    assert capture.pixel_array.reshape(-1, 512, 512, 3).shape[0] == 1 + len(result["top"]), capture.pixel_array.shape
    assert len(capture.get("SourceImageSequence", [])) == len(result["top"])
    return capture.SOPInstanceUID


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edge", default=HERE.parents[1] / "target/debug/edge")
    edge = parser.parse_args().edge
    results = sorted((HERE / "results").glob("*.json"))
    assert results, "no results to check"
    uids = set()
    for path in results:
        result = json.loads(path.read_text())
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([edge, "report", path, "--out", folder], check=True, capture_output=True)
            for name, sop_class in CLASSES.items():
                file = f"{folder}/{name}.dcm"
                check_validators(file)
                data_set = pydicom.dcmread(file)
                check_attributes(data_set, result, sop_class)
                assert tree(data_set) == expected_tree(result), tree(data_set)
                check_highdicom(file, result)
                uids.add(data_set.SOPInstanceUID)
                print(f"{path.stem} as {name}: no error, content tree as expected")
            uids.add(check_capture(f"{folder}/secondary-capture.dcm", result))
            print(f"{path.stem} as secondary capture: no error")
    assert len(uids) == 3 * len(results), "two documents share a UID"


if __name__ == "__main__":
    sys.exit(main())
