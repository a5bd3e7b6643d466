"""Durable intake of a CT study: `edge serve` against DCMTK storescp and Orthanc, interleaved in one run.

Every receiver gets the same study from the same sender (DCMTK storescu) and must have it durable when it answers: edge by its
spool, Orthanc by SyncStorageArea, storescp by a file system mounted sync,dirsync. All write to ext4 images on one medium, mounted
through loop devices (root is needed). Only ratios within one run mean anything: machines and their other work differ.

    python tests/reference/intake_bench.py --edge target/release/edge --trainer target/release/trainer

Needs dcmtk, orthanc, strace, and pynetdicom. Prints a table and one JSON object. Exit 1 when a figure misses its bound.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from pynetdicom import AE

AE_TITLE = "PEEDGE"
SPEED_BOUND = 1.5
SYNCS_BOUND = 1.2
WRITTEN_BOUND = 1.1
ECHO_START_BOUND_S = 0.3
RESIDENT_BOUND_MIB = 96
ECHO_BOUND_S = 1.0


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def echo(port):
    entity = AE(ae_title="BENCH")
    entity.connection_timeout = entity.acse_timeout = entity.dimse_timeout = 30
    entity.add_requested_context("1.2.840.10008.1.1")
    association = entity.associate("127.0.0.1", port, ae_title=AE_TITLE)
    if not association.is_established:
        return False
    status = association.send_c_echo()
    association.release()
    return bool(status) and status.Status == 0


def wait_for_port(port, process):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"receiver ended with {process.returncode}")
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return
        time.sleep(0.002)
    raise RuntimeError("receiver does not listen")


class Receiver:
    """A receiver in a fresh folder on a mounted image."""

    def __init__(self, command, port, folder):
        self.port, self.folder = port, folder
        self.log = open(folder / "log", "wb")
        # A session of its own, so that what strace runs is stopped with it.
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=self.log, cwd=folder, start_new_session=True)
        wait_for_port(port, self.process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.log.close()
        shutil.rmtree(self.folder)


def edge_config(folder, port):
    config = folder / "edge.toml"
    config.write_text(
        f'dicom_bind = "127.0.0.1"\ndicom_port = {port}\nhttp_bind = "127.0.0.1:0"\n'
        'state_dir = "state"\n[retention]\nkeep_free_mib = 16\n'
    )
    return config


def start_edge(arguments, mount, wrap=()):
    folder = Path(tempfile.mkdtemp(dir=mount))
    port = free_port()
    command = [*wrap, arguments.edge, "serve", "--config", str(edge_config(folder, port))]
    return Receiver(command, port, folder)


def start_storescp(_, mount):
    folder = Path(tempfile.mkdtemp(dir=mount))
    port = free_port()
    return Receiver(["storescp", "-od", str(folder), str(port)], port, folder)


def start_orthanc(_, mount):
    folder = Path(tempfile.mkdtemp(dir=mount))
    port = free_port()
    (folder / "orthanc.json").write_text(json.dumps({
        "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"),
        "DicomPort": port, "DicomAet": AE_TITLE, "HttpServerEnabled": False,
        "SyncStorageArea": True, "DicomAlwaysAllowStore": True, "DicomAlwaysAllowEcho": True,
        "StorageCompression": False, "DicomCheckCalledAet": False,
    }))
    return Receiver(["Orthanc", str(folder / "orthanc.json")], port, folder)


def send(port, files, title="SENDER"):
    """Seconds from the start of the sender to its end."""
    start = time.monotonic()
    sent = subprocess.run(
        ["storescu", "-aet", title, "-aec", AE_TITLE, "-R", "127.0.0.1", str(port), *files],
        capture_output=True, text=True, check=False)
    seconds = time.monotonic() - start
    if sent.returncode or "Error" in sent.stderr:
        raise RuntimeError(sent.stderr[-2000:])
    return seconds


@contextlib.contextmanager
def mounted(work, name, options, mebibytes):
    """An ext4 image on the medium of the work folder, mounted through a loop device."""
    image, mount = work / f"{name}.img", work / name
    mount.mkdir()
    with open(image, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, mebibytes << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    subprocess.run(["mount", "-o", ",".join(["loop", *options]), str(image), str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=False)


def throughput(arguments, files, plain, synced):
    receivers = {
        "edge": (start_edge, plain),
        "storescp": (start_storescp, synced),
        "orthanc": (start_orthanc, plain),
    }
    seconds = {name: [] for name in receivers}
    for _ in range(arguments.rounds):
        for name, (start, mount) in receivers.items():
            with start(arguments, mount) as receiver:
                seconds[name].append(send(receiver.port, files))
    medians = {name: statistics.median(all_of) for name, all_of in seconds.items()}
    ratios = {
        name: [peer / own for peer, own in zip(seconds[name], seconds["edge"])]
        for name in ("storescp", "orthanc")
    }
    return {
        "seconds": seconds, "median_seconds": medians,
        "times_faster": {name: statistics.median(all_of) for name, all_of in ratios.items()},
        "times_faster_range": {name: [min(all_of), max(all_of)] for name, all_of in ratios.items()},
    }


def sync_calls(arguments, files, plain, delay_us=0):
    """Sync calls and bytes written on the spool, as strace sees them."""
    trace = Path(tempfile.mktemp())
    calls = "fsync,fdatasync,sync_file_range,msync,write,writev,pwrite64,pwritev"
    wrap = ["strace", "-f", "-y", "-e", f"trace={calls}", "-e", "signal=none", "-s", "0", "-o", str(trace)]
    if delay_us:
        wrap[1:1] = ["-e", f"inject=fsync,fdatasync:delay_exit={delay_us}"]
    with start_edge(arguments, plain, wrap) as receiver:
        seconds = send(receiver.port, files)
    syncs = written = 0
    begun = {}
    for line in trace.read_text(errors="replace").splitlines():
        thread, _, call = line.partition(" ")
        resumed = re.search(r"<\.\.\. (\w+) resumed>", call)
        name = begun.pop(thread, None) if resumed else None
        if found := re.match(r"\s*(\w+)\(\d+<[^>]*/spool(?:/[^>]*)?>", call):
            name = found[1]
            if "<unfinished" in call:
                begun[thread] = name
                continue
        if name is None:
            continue
        if "sync" in name:
            syncs += 1
        elif result := re.search(r"= (\d+)", call):
            written += int(result[1])
    trace.unlink()
    payload = sum(os.path.getsize(file) for file in files)
    return {
        "syncs_per_slice": syncs / len(files), "written_per_payload": written / payload,
        "written_bytes_per_study": written, "seconds": seconds,
    }


def start_to_echo(arguments, mount):
    times = []
    for _ in range(5):
        folder = Path(tempfile.mkdtemp(dir=mount))
        port = free_port()
        command = [arguments.edge, "serve", "--config", str(edge_config(folder, port))]
        begin = time.monotonic()
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        wait_for_port(port, process)
        assert echo(port)
        times.append(time.monotonic() - begin)
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder)
    return statistics.median(times)


def resident_mib(pid, field):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+)", status)[1]) / 1024


def children(pid):
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in listed.stdout.split()]


def memory(arguments, files, plain):
    """Peak resident memory of the node's process, and of its worker, while four associations send; one sends a large object."""
    with start_edge(arguments, plain) as receiver:
        quiet = resident_mib(receiver.process.pid, "VmRSS")
        jobs = [files, files, files, [arguments.enhanced] * 2 if arguments.enhanced else files]
        senders = [threading.Thread(target=send, args=(receiver.port, job, f"S{index}"))
                   for index, job in enumerate(jobs)]
        for sender in senders:
            sender.start()
        worker = 0
        while any(sender.is_alive() for sender in senders):
            for child in children(receiver.process.pid):
                with contextlib.suppress(OSError, TypeError):
                    worker = max(worker, resident_mib(child, "VmRSS"))
            time.sleep(0.05)
        peak = resident_mib(receiver.process.pid, "VmHWM")
        return {"idle_mib": quiet, "peak_mib": peak, "worker_mib": worker}


def echo_under_drip(arguments, plain):
    """The slowest of ten echoes while 300 connections send a byte a second each."""
    with start_edge(arguments, plain) as receiver:
        drips = [socket.create_connection(("127.0.0.1", receiver.port)) for _ in range(300)]
        stop = threading.Event()

        def drip():
            request = bytes([1, 0, 0, 0, 200, 0]) + bytes(200)
            for index in range(len(request)):
                if stop.wait(1):
                    return
                for stream in drips:
                    with contextlib.suppress(OSError):
                        stream.send(request[index:index + 1])

        dripping = threading.Thread(target=drip)
        dripping.start()
        times = []
        for _ in range(10):
            begin = time.monotonic()
            assert echo(receiver.port)
            times.append(time.monotonic() - begin)
            time.sleep(0.3)
        stop.set()
        dripping.join()
        for stream in drips:
            stream.close()
        return max(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edge", default="target/debug/edge", type=os.path.abspath)
    parser.add_argument("--trainer", default="target/debug/trainer", type=os.path.abspath)
    parser.add_argument("--slices", type=int, default=245)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--study", help="folder with *.dcm instead of a phantom")
    parser.add_argument("--enhanced", help="an Enhanced CT file that one of four senders sends, for the memory figure")
    parser.add_argument("--work", help="folder on the medium that is measured")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=arguments.work))
    if arguments.study:
        study = Path(arguments.study)
    else:
        study = work / "phantom"
        subprocess.run([arguments.trainer, "phantom", "--out", str(study), "--studies", "1", "--seed", "7",
                        "--slices", str(arguments.slices)], check=True, capture_output=True)
    files = sorted(str(path) for path in study.rglob("*.dcm"))
    payload = sum(os.path.getsize(file) for file in files)
    figures = {"slices": len(files), "payload_mib": payload / 2**20}
    room = 5 * int(payload / 2**20) + 1600
    with mounted(work, "plain", [], room) as plain, mounted(work, "synced", ["sync", "dirsync"], room) as synced:
        stages = {
            "intake": lambda: throughput(arguments, files, plain, synced),
            "syncs": lambda: sync_calls(arguments, files, plain),
            "syncs_30_ms": lambda: sync_calls(arguments, files[:60], plain, 30_000),
            "start_to_echo_s": lambda: start_to_echo(arguments, plain),
            "echo_under_drip_s": lambda: echo_under_drip(arguments, plain),
            "memory": lambda: memory(arguments, files, plain),
        }
        for name, stage in stages.items():
            figures[name] = stage()
            print(name, json.dumps(figures[name]), file=sys.stderr, flush=True)
    shutil.rmtree(work, ignore_errors=True)
    bounds = [
        ("times as fast as storescp (sync,dirsync)", figures["intake"]["times_faster"]["storescp"], ">=", SPEED_BOUND),
        ("times as fast as Orthanc (SyncStorageArea)", figures["intake"]["times_faster"]["orthanc"], ">=", SPEED_BOUND),
        ("sync calls a slice", figures["syncs"]["syncs_per_slice"], "<=", SYNCS_BOUND),
        ("bytes written per byte of payload", figures["syncs"]["written_per_payload"], "<=", WRITTEN_BOUND),
        ("start to first C-ECHO, s", figures["start_to_echo_s"], "<=", ECHO_START_BOUND_S),
        ("C-ECHO under 300 drips, s", figures["echo_under_drip_s"], "<=", ECHO_BOUND_S),
        ("peak resident with four senders, MiB", figures["memory"]["peak_mib"], "<=", RESIDENT_BOUND_MIB),
    ]
    is_missed = False
    for name, value, relation, bound in bounds:
        is_met = value >= bound if relation == ">=" else value <= bound
        is_missed |= not is_met
        print(f"{name:45} {value:8.2f}  {relation} {bound}  {'ok' if is_met else 'MISSED'}")
    print(json.dumps(figures))
    sys.exit(is_missed)


if __name__ == "__main__":
    main()
