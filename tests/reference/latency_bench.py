"""How soon the PACS knows: from a slice to the provisional positive, from the end of the quiet time to the final result.

Starts `edge serve` as shipped (quiet time 60 s), a PACS by pynetdicom that notes when each report comes, and sends phantom studies
one after the other at a console's rate. Which slice decides a study is worked out here, by itself, from the logits that
`edge classify` gives and the study rule of the model file: the first in the order of sending with which the series covers 80 mm and
the score reaches the threshold. Counted is from the moment at which the C-STORE of that slice began; for the final result from the answer
to the last C-STORE, plus the quiet time.

    python tests/reference/latency_bench.py --edge target/debug/edge --trainer target/debug/trainer --model runs/mine/model-int8.onnx

Needs pynetdicom. Prints each study, both distributions and one JSON object. Exit 1 when fewer than ten studies have either figure or the
slowest of one takes longer than 1.0 s.
"""

import argparse
import json
import multiprocessing
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import pydicom
from pynetdicom import AE, evt

CT = "1.2.840.10008.5.1.4.1.1.2"
REPORTS = ["1.2.840.10008.5.1.4.1.1.88.34", "1.2.840.10008.5.1.4.1.1.88.33"]
EXPLICIT = "1.2.840.10008.1.2.1"
QUIET_S = 60
COVERAGE_MM = 80
BOUND_S = 1.0
LEAST_STUDIES = 10


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def study_rule(model):
    text = model.read_bytes()
    manifest = text[text.index(b'{"format_version"'):].decode(errors="replace")
    return json.JSONDecoder().raw_decode(manifest)[0]["study_rule"]


def score(rule, logits):
    """As shared/src/study.rs has it."""
    reach = rule["smoothing_slices"] // 2
    windows = (logits[max(0, at - reach):at + reach + 1] for at in range(len(logits)))
    highest = sorted((statistics.fmean(window) for window in windows), reverse=True)
    return statistics.fmean(highest[:rule["top_slices"]])


def deciding(rule, slices):
    """Index of the slice with which the study becomes positive; `slices` are (z, logit) in the order of sending."""
    for n in range(rule["top_slices"], len(slices) + 1):
        sent = sorted(slices[:n])
        if sent[-1][0] - sent[0][0] >= COVERAGE_MM and score(rule, [logit for _, logit in sent]) >= rule["logit_threshold"]:
            return n - 1
    return None


def classified(edge, model, folder):
    """Logit by SOP Instance UID."""
    said = subprocess.run([edge, "classify", "--json", "--model", model, folder], capture_output=True, text=True, check=True)
    lines = map(json.loads, said.stdout.splitlines())
    return {line["sop_uid"]: line["logit"] for line in lines if line.get("logit") is not None}


def pacs(port, came):
    """In a process of its own: notes when the first report of each kind about a study comes. Monotonic time is that of the machine."""

    def store(event):
        now, report = time.monotonic(), event.dataset
        came.setdefault((str(report.StudyInstanceUID), report.PreliminaryFlag == "PRELIMINARY"), now)
        return 0

    entity = AE(ae_title="PACS")
    for report in REPORTS:
        entity.add_supported_context(report, EXPLICIT)
    entity.start_server(("127.0.0.1", port), evt_handlers=[(evt.EVT_C_STORE, store)])


def send(port, slices, rate):
    """When each C-STORE began and was answered."""
    entity = AE(ae_title="CT")
    entity.add_requested_context(CT, EXPLICIT)
    association = entity.associate("127.0.0.1", port, ae_title="PEEDGE")
    assert association.is_established
    times, begin = [], time.monotonic()
    for index, one in enumerate(slices):
        time.sleep(max(0, begin + index / rate - time.monotonic()))
        began = time.monotonic()
        status = association.send_c_store(one)
        assert status.Status == 0, status
        times.append((began, time.monotonic()))
    association.release()
    return times


def distribution(name, seconds):
    if len(seconds) < LEAST_STUDIES:
        print(f"{name}: only {len(seconds)} studies")
        return False
    seconds = sorted(seconds)
    print(f"{name}: {len(seconds)} studies, least {seconds[0]:.3f} s, median {statistics.median(seconds):.3f} s, most {seconds[-1]:.3f} s")
    return seconds[-1] <= BOUND_S


def run(arguments, folder):
    studies = folder / "studies"
    subprocess.run([arguments.trainer, "phantom", "--out", studies, "--studies", str(arguments.studies), "--seed",
                    str(arguments.seed), "--slices", str(arguments.slices)], check=True, stdout=subprocess.DEVNULL)
    rule, logits = study_rule(arguments.model), classified(arguments.edge, arguments.model, studies)
    came, port, pacs_port = multiprocessing.Manager().dict(), free_port(), free_port()
    receiver = multiprocessing.Process(target=pacs, args=(pacs_port, came), daemon=True)
    receiver.start()
    config = folder / "edge.toml"
    config.write_text(
        f'dicom_bind = "127.0.0.1"\ndicom_port = {port}\nhttp_bind = "127.0.0.1:0"\nstate_dir = "state"\n'
        f'model = "{arguments.model.resolve()}"\n[pacs]\nae_title = "PACS"\nhost = "127.0.0.1"\nport = {pacs_port}\n'
        "[retention]\nkeep_free_mib = 16\n")
    node = subprocess.Popen([arguments.edge, "serve", "--config", config], stderr=subprocess.DEVNULL)
    try:
        time.sleep(3)
        return measure(arguments, studies, rule, logits, came, port)
    finally:
        node.terminate()
        node.wait(60)
        receiver.terminate()


def measure(arguments, studies, rule, logits, reports, port):
    sent = []
    folders = sorted({path.parent for path in studies.rglob("*.dcm")})
    for files in folders:
        slices = sorted(map(pydicom.dcmread, files.iterdir()), key=lambda one: one.ImagePositionPatient[2])
        for one in slices:
            one.PixelData  # Read before the clock runs.
        by = deciding(rule, [(float(one.ImagePositionPatient[2]), logits[one.SOPInstanceUID]) for one in slices])
        times = send(port, slices, arguments.rate)
        sent.append((slices[0].StudyInstanceUID, by, times))
    time.sleep(QUIET_S + 10)
    provisional, final = [], []
    for study, by, times in sent:
        came, said = reports.get((study, True)), reports.get((study, False))
        assert (came is None) == (by is None), f"{study}: decided by {by}, provisional report {came}"
        assert said is not None, f"{study}: no final report"
        if came is not None:
            provisional.append(came - times[by][0])
        final.append(said - times[-1][1] - QUIET_S)
        print(f"…{study[-6:]} decided by slice {by}, provisional {provisional[-1] if came else float('nan'):.3f} s, final {final[-1]:.3f} s")
    is_good = distribution("provisional positive", provisional)
    is_good &= distribution("final result", final)
    print(json.dumps({"provisional_s": provisional, "final_s": final, "rate": arguments.rate, "slices": arguments.slices}))
    return 0 if is_good else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edge", default="target/debug/edge")
    parser.add_argument("--trainer", default="target/debug/trainer")
    parser.add_argument("--model", required=True, type=pathlib.Path)
    parser.add_argument("--studies", type=int, default=20)
    parser.add_argument("--slices", type=int, default=64)
    parser.add_argument("--seed", type=int, default=9001)
    parser.add_argument("--rate", type=float, default=50, help="slices a second")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return run(arguments, pathlib.Path(folder))


if __name__ == "__main__":
    sys.exit(main())
