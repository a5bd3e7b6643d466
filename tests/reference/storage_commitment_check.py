"""Storage commitment of `edge serve` with pynetdicom on the other side, both ways.

usage: storage_commitment_check.py [--edge target/debug/edge]

As PACS: takes the report of a phantom study that `edge demo` sends, is asked to commit to it, and reports on an association of its own as
provider by role selection; the node's audit log must say so. As console: stores an object, asks the node to commit to it and to one that it
never sent, and takes the report on the same association, then another by a new association to its own address. Needs pynetdicom 3.
"""

import argparse
import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE, build_role, evt
from pynetdicom.sop_class import (
    Comprehensive3DSRStorage, ComprehensiveSRStorage, SecondaryCaptureImageStorage, StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(what, happened, seconds=60):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


class Peer:
    """A listener that stores reports, is asked to commit and hears commitments."""

    def __init__(self, title):
        self.port, self.stored, self.asked, self.heard = free_port(), [], [], []
        entity = AE(ae_title=title)
        for uid in (Comprehensive3DSRStorage, ComprehensiveSRStorage):
            entity.add_supported_context(uid)
        entity.add_supported_context(StorageCommitmentPushModel, scu_role=True, scp_role=True)
        handlers = [(evt.EVT_C_STORE, self.store), (evt.EVT_N_ACTION, self.action), (evt.EVT_N_EVENT_REPORT, self.event)]
        self.server = entity.start_server(("127.0.0.1", self.port), block=False, evt_handlers=handlers)

    def store(self, event):
        self.stored.append(event.dataset.SOPInstanceUID)
        return 0x0000

    def action(self, event):
        assert event.request.RequestedSOPInstanceUID == StorageCommitmentPushModelInstance and event.action_type == 1
        self.asked.append(event.action_information)
        return 0x0000, None

    def event(self, event):
        self.heard.append((event.event_type, event.event_information))
        return 0x0000, None


def report(port, request):
    """As provider, on an association of its own: everything is committed."""
    entity = AE(ae_title="PACS")
    entity.add_requested_context(StorageCommitmentPushModel)
    role = build_role(StorageCommitmentPushModel, scp_role=True)
    association = entity.associate("127.0.0.1", port, ae_title="PEEDGE", ext_neg=[role])
    assert association.is_established and association.accepted_contexts[0].as_scp
    status, _ = association.send_n_event_report(
        request, 1, StorageCommitmentPushModel, StorageCommitmentPushModelInstance)
    association.release()
    return status.Status


def transaction(uid, instances):
    request = Dataset()
    request.TransactionUID = uid
    request.ReferencedSOPSequence = []
    for instance in instances:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = SecondaryCaptureImageStorage, instance
        request.ReferencedSOPSequence.append(item)
    return request


def secondary_capture():
    image = Dataset()
    image.SOPClassUID, image.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    image.StudyInstanceUID, image.SeriesInstanceUID, image.PatientID = generate_uid(), generate_uid(), "PHANTOM"
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return image


def check_as_pacs(edge, config, port, pacs, audit):
    demo = subprocess.run([edge, "demo", "--slices", "12", "--config", config], capture_output=True, text=True, check=False)
    assert demo.returncode == 0, demo.stderr
    wait_for("no N-ACTION came", lambda: pacs.asked)
    request = pacs.asked[0]
    instances = [item.ReferencedSOPInstanceUID for item in request.ReferencedSOPSequence]
    assert set(instances) <= set(pacs.stored), (instances, pacs.stored)
    stranger = transaction(generate_uid(), instances)
    assert report(port, stranger) == 0x0115, "a transaction that nobody began"
    assert report(port, request) == 0x0000 and report(port, request) == 0x0000, "once, and once more"

    def is_recorded():
        lines = [json.loads(line) for line in audit.read_text().splitlines()]
        return [line["how"] for line in lines if line["event"] == "commitment"] == ["committed"]
    wait_for("the audit log does not say so", is_recorded)
    print("as PACS: asked after the C-STORE, reported by role selection, recorded")


def check_as_console(port, console):
    heard = []

    def event(reported):
        heard.append((reported.event_type, reported.event_information))
        return 0x0000, None
    entity = AE(ae_title="CONSOLE")
    entity.add_requested_context(SecondaryCaptureImageStorage, ExplicitVRLittleEndian)
    entity.add_requested_context(StorageCommitmentPushModel)
    association = entity.associate("127.0.0.1", port, ae_title="PEEDGE", evt_handlers=[(evt.EVT_N_EVENT_REPORT, event)])
    assert association.is_established
    image = secondary_capture()
    assert association.send_c_store(image).Status == 0x0000
    request = transaction(generate_uid(), [image.SOPInstanceUID, generate_uid()])
    ask = (1, StorageCommitmentPushModel, StorageCommitmentPushModelInstance)
    assert association.send_n_action(request, *ask)[0].Status == 0x0000
    wait_for("no report on the association", lambda: heard)
    kind, said = heard[0]
    assert kind == 2 and said.TransactionUID == request.TransactionUID
    assert [item.ReferencedSOPInstanceUID for item in said.ReferencedSOPSequence] == [image.SOPInstanceUID]
    assert [item.FailureReason for item in said.FailedSOPSequence] == [0x0112]
    request = transaction(generate_uid(), [image.SOPInstanceUID])
    # Refuses the report here, so that it comes to the address of the configuration.
    association.unbind(evt.EVT_N_EVENT_REPORT, event)
    association.bind(evt.EVT_N_EVENT_REPORT, lambda reported: (0x0110, None))
    assert association.send_n_action(request, *ask)[0].Status == 0x0000
    time.sleep(1)
    association.release()
    wait_for("no report on a new association", lambda: console.heard)
    kind, said = console.heard[0]
    assert kind == 1 and said.TransactionUID == request.TransactionUID
    print("as console: committed in part with reasons, then by an association of the node's own")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edge", default=pathlib.Path(__file__).parents[2] / "target/debug/edge", type=pathlib.Path)
    edge = parser.parse_args().edge.absolute()
    pacs, console, port = Peer("PACS"), Peer("CONSOLE"), free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = pathlib.Path(folder) / "edge.toml"
        config.write_text(
            f'dicom_bind = "127.0.0.1"\ndicom_port = {port}\nhttp_bind = "127.0.0.1:{free_port()}"\nstate_dir = "state"\n'
            f'quiet_time_s = 2\n[retention]\nkeep_free_mib = 1\n[commitment]\nkeep_days = 1\n'
            f'[peers.CONSOLE]\nreport_to = "127.0.0.1:{console.port}"\n[peers.PACS]\n'
            f'[pacs]\nae_title = "PACS"\nhost = "127.0.0.1"\nport = {pacs.port}\nstorage_commitment = true\n')
        log = open(pathlib.Path(folder) / "log", "wb")
        node = subprocess.Popen([edge, "serve", "--config", config], stderr=log, stdout=log)
        try:
            wait_for("the node does not start", lambda: b"listening" in (pathlib.Path(folder) / "log").read_bytes())
            check_as_pacs(edge, config, port, pacs, pathlib.Path(folder) / "state/audit/audit.jsonl")
            check_as_console(port, console)
        except AssertionError:
            print((pathlib.Path(folder) / "log").read_text()[-4000:], file=sys.stderr)
            raise
        finally:
            node.terminate()
            node.wait(30)
    for peer in (pacs, console):
        peer.server.shutdown()


if __name__ == "__main__":
    sys.exit(main())
