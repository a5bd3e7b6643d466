#!/usr/bin/env python3
"""Checks and times training on a GPU, in one command, and prints one table (`gpu-check.json` holds the same).

    tests/reference/gpu_build.sh                       # anywhere; makes gpu-kit/
    python3 gpu-kit/gpu_check.py gpu-kit --out OUT     # on the GPU machine, whose python3 has PyTorch with CUDA 13

In this order: the operators against their definition in f64 (the crate's own tests, here on the real card), the same under compute-sanitizer where there is one, 50 steps
of the full model beside the CPU trainer, a whole run in bf16 and in f32, speed beside PyTorch (channels_last, bf16 autocast, torch.compile, fused Adam, images in GPU memory; in
turn, twice each), ten epochs, memory, world size 1 through NCCL. Nothing is skipped silently: what could not be done is a row that says so, and the exit code is 1 unless every check held.
A machine without a GPU: exit code 69.
"""

import argparse
import csv
import glob
import json
import os
import pathlib
import shutil
import site
import statistics
import subprocess
import sys
import tempfile
import time

GFLOP_AN_IMAGE = 121.0
BATCH = 50
# Loss per step against the CPU's, relative to max(loss, 0.05): bf16 keeps 8 bits, and Adam's first steps amplify what is lost.
F32_FIRST, F32_ALL, BF16_FIRST, BF16_ALL = 1e-3, 5e-2, 2e-2, 2e-1
BENCH = """
import json, sys, time, torch
from torch import nn
torch.backends.cudnn.benchmark = True
n_images, batch, steps = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(1)
images = torch.randint(0, 256, (n_images, 3, 256, 256), dtype=torch.uint8, device="cuda")
labels = torch.randint(0, 2, (n_images,), device="cuda").float()
def block(i, o): return [nn.Conv2d(i, o, 3), nn.ReLU(), nn.MaxPool2d(2)]
net = nn.Sequential(*block(3, 512), *block(512, 256), *block(256, 128), nn.Flatten(), nn.Linear(115200, 256), nn.ReLU(), nn.Linear(256, 1))
net = net.cuda().to(memory_format=torch.channels_last)
optimiser = torch.optim.Adam(net.parameters(), lr=1e-3, eps=1e-7, fused=True)
compiled = torch.compile(net)
def step(rows):
    x = (images[rows].float() / 255).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16):
        logit = compiled(x)
    loss = nn.functional.binary_cross_entropy_with_logits(logit.float().squeeze(1), labels[rows])
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
order = torch.randint(0, n_images, (steps + 20, batch), device="cuda")
for i in range(20): step(order[i])
torch.cuda.synchronize()
begin = time.perf_counter()
for i in range(20, steps + 20): step(order[i])
torch.cuda.synchronize()
seconds = time.perf_counter() - begin
free, total = torch.cuda.mem_get_info()
print(json.dumps({"images_per_second": steps * batch / seconds, "used_bytes": total - free, "peak_allocated": torch.cuda.max_memory_allocated()}))
"""
MATRIX = """
import torch
a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
times = []
for _ in range(20):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record(); a @ b; end.record(); torch.cuda.synchronize(); times.append(begin.elapsed_time(end))
print(2 * 8192**3 / sorted(times)[10] / 1e9)
"""

parser = argparse.ArgumentParser()
parser.add_argument("kit", type=pathlib.Path)
parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("."))
parser.add_argument("--images", type=int, default=4000)
parser.add_argument("--phantom", type=int, default=130, help="studies of 50 slices in the cache")
arguments = parser.parse_args()
rows, results = [], {}


def row(what, value, wanted="", holds=None):
    rows.append((what, value, wanted, "" if holds is None else "yes" if holds else "NO"))
    results[what] = {"value": value, "wanted": wanted, "holds": holds}
    # Each time: the machine may be taken away before the end.
    (arguments.out / "gpu-check.json").write_text(json.dumps(results, indent=1))
    print(f"[{time.strftime('%H:%M:%S')}] {what}: {value} {rows[-1][3]}", flush=True)


def run(command, extra=None, timeout=300):
    """Standard output and error, and the exit code; None where it took too long."""
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=timeout, env={**environment, **(extra or {})})
    except subprocess.TimeoutExpired:
        return "", f"no end after {timeout} s", None
    return done.stdout, done.stderr, done.returncode


def train(out, *options, extra=None, timeout=300):
    """The summary of a run; None, and a row that says why, where it failed."""
    command = [trainer, "train", "--data", cache, "--out", work / out, "--json", "--sampling", "all", "--images", arguments.images, *options]
    stdout, stderr, code = run(command, extra, timeout)
    if code != 0:
        row(f"trainer train ({out})", f"exit {code}: {(stderr.strip().splitlines() or [''])[-1]}", "exit 0", False)
        return None
    return json.loads(stdout.strip().splitlines()[-1])


def losses(out):
    with open(work / out / "history.csv") as file:
        return [float(line["loss"]) for line in csv.DictReader(file)]


# The libraries that PyTorch brings; NVIDIA's driver is found by itself.
folders = [folder for base in site.getsitepackages() for folder in glob.glob(f"{base}/nvidia/*/lib")]
environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(folders + [os.environ.get("LD_LIBRARY_PATH", "")])}
if shutil.which("nvidia-smi") is None or run(["nvidia-smi", "-L"])[2] != 0:
    print("no NVIDIA GPU here: nothing was checked", file=sys.stderr)
    sys.exit(69)
trainer, tests = arguments.kit / "trainer", arguments.kit / "trainer-tests"
work = pathlib.Path(tempfile.mkdtemp())
cache = work / "cache"
arguments.out.mkdir(parents=True, exist_ok=True)

row("card", run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"])[0].strip())

# Operators.
stdout, stderr, code = run([tests, "gpu::", "--test-threads=1"], timeout=200)
row("operators against the definition in f64", next((line for line in stdout.splitlines() if line.startswith("test result")), stderr[-300:]), "ok", code == 0)
(arguments.out / "gpu-tests.log").write_text(stdout + stderr)
if shutil.which("compute-sanitizer"):
    for tool in ["memcheck", "racecheck"]:
        stdout, stderr, code = run(["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", tests, "gpu::tests::step_is_the_definition", "--test-threads=1"], timeout=120)
        (arguments.out / f"{tool}.log").write_text(stdout + stderr)
        row(f"compute-sanitizer {tool}", f"exit {code}", "exit 0", code == 0)
else:
    row("compute-sanitizer", "not on this machine", "exit 0", False)

# Data.
begin = time.time()
_, stderr, code = run([trainer, "prepare", "--phantom", arguments.phantom, "--slices", "50", "--out", cache], timeout=200)
row("phantom cache", f"{time.time() - begin:.0f} s", "exit 0", code == 0)

# 50 steps of the full model beside the CPU.
with open(cache / "index.csv") as file:
    n_rows = sum(1 for _ in file) - 1
order = work / "order.csv"
order.write_text("\n".join(" ".join(str((step * 7919 + place * 104729) % n_rows) for place in range(4)) for step in range(50)) + "\n")
first = ["--order", order, "--width", "1", "--seed", "3"]
if train("cpu", *first, "--device", "cpu"):
    expected = losses("cpu")
    for precision, bounds in [("f32", (F32_FIRST, F32_ALL)), ("bf16", (BF16_FIRST, BF16_ALL))]:
        if train(f"gpu-{precision}", *first, "--device", "cuda:0", "--precision", precision):
            apart = [abs(a - b) / max(b, 0.05) for a, b in zip(losses(f"gpu-{precision}"), expected)]
            row(f"50 steps in {precision}, loss against the CPU: first five, all", f"{max(apart[:5]):.1e}, {max(apart):.1e}", f"{bounds[0]:.0e}, {bounds[1]:.0e}",
                max(apart[:5]) <= bounds[0] and max(apart) <= bounds[1])  # fmt: skip

# A whole run in both precisions.
found = {}
for precision in ["f32", "bf16"]:
    if train(f"whole-{precision}", "--width", "0.125", "--epochs", "3", "--learning-rate", "0.0004", "--device", "cuda:0", "--precision", precision):
        command = [trainer, "evaluate", "--model", work / f"whole-{precision}" / "model.safetensors", "--data", cache, "--out", work / f"report-{precision}", "--json"]
        stdout, stderr, code = run(command)
        if code == 0:
            found[precision] = json.loads((work / f"report-{precision}" / "metrics.json").read_text())["auroc"]
if len(found) == 2:
    f32, bf16 = found["f32"], found["bf16"]
    row("AUROC of a run in bf16 (f32)", f"{bf16['value']:.3f} ({f32['value']:.3f} [{f32['low']:.3f}, {f32['high']:.3f}])", "within the interval", f32["low"] <= bf16["value"] <= f32["high"])
else:
    row("AUROC of a run in bf16 (f32)", "not measured", "within the interval", False)

# Speed and memory, in turn.
peak = run([sys.executable, "-c", MATRIX])[0].strip()
row("bf16 matrix rate, 8192 x 8192 x 8192, TFLOP/s", peak)
ours, theirs = [], []
for turn in range(2):
    summary = train(f"speed-{turn}", "--width", "1", "--epochs", "2", "--batch", BATCH, "--device", "cuda:0")
    if summary:
        ours.append(summary)
    stdout, stderr, code = run([sys.executable, "-c", BENCH, arguments.images, BATCH, "120"])
    if code == 0:
        theirs.append(json.loads(stdout.strip().splitlines()[-1]))
    else:
        row("PyTorch", (stderr.strip().splitlines() or [""])[-1], "runs", False)
if ours:
    rate = statistics.median(summary["images_per_second"] for summary in ours)
    row("final model, batch 50, images/s", f"{rate:.0f} ({', '.join(format(s['images_per_second'], '.0f') for s in ours)})")
    if peak:
        row("share of the matrix rate", f"{rate * GFLOP_AN_IMAGE / 1000 / float(peak):.2f}")
    row("memory in use at the end, GB", f"{ours[0]['gpu']['used_bytes'] / 1e9:.2f} (images {ours[0]['gpu']['image_bytes'] / 1e9:.2f}, workspace {ours[0]['gpu']['workspace_bytes'] / 1e9:.2f})")
    row("one epoch of 1,790,594 images, min", f"{1790594 / rate / 60:.1f}")
if theirs:
    torch_rate = statistics.median(found["images_per_second"] for found in theirs)
    row("PyTorch, the same, images/s", f"{torch_rate:.0f} ({', '.join(format(f['images_per_second'], '.0f') for f in theirs)})")
    row("PyTorch, memory in use, GB", f"{theirs[0]['used_bytes'] / 1e9:.2f}")
if ours and theirs:
    row("images/s relative to PyTorch's", f"{rate / torch_rate:.2f}", "1.2", rate >= 1.2 * torch_rate)
    row("memory relative to PyTorch's", f"{ours[0]['gpu']['used_bytes'] / theirs[0]['used_bytes']:.2f}", "1.0", ours[0]["gpu"]["used_bytes"] <= theirs[0]["used_bytes"])
summary = train("ten", "--width", "1", "--epochs", "10", "--batch", BATCH, "--device", "cuda:0", timeout=200)
if summary:
    n = sum(summary["n_train"])
    row(f"{n} images, 10 epochs: training s (choosing plans, all)", f"{summary['training_seconds']:.1f} ({summary['tuning_seconds']:.1f}, {summary['seconds']:.1f})", "15", summary["training_seconds"] <= 15)
streamed = train("streamed", "--width", "1", "--epochs", "2", "--batch", BATCH, "--device", "cuda:0", extra={"PE_EDGE_STREAM_IMAGES": "1"})
if streamed and ours:
    row("the same with images from the cache step by step, images/s", f"{streamed['images_per_second']:.0f}")

# NCCL with one rank.
launched = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
if train("nccl", "--width", "1", "--epochs", "2", "--batch", BATCH, extra=launched):
    # cuDNN's plans are chosen by time, so that two runs differ in the last bits.
    apart = max(abs(a - b) / max(b, 0.05) for a, b in zip(losses("nccl")[:5], losses("speed-0")[:5]))
    row("world size 1 through NCCL: first five losses beside those without", f"{apart:.1e}", "1e-02", apart <= 1e-2)

row("ResNet-50, Inception-v3", "train on the CPU only", "half of PyTorch's rate", False)
shutil.rmtree(work)
widths = [max(len(str(line[column])) for line in rows) for column in range(4)]
print()
for line in [("what", "found", "wanted", "holds"), *rows]:
    print("  ".join(str(part).ljust(width) for part, width in zip(line, widths)).rstrip())
sys.exit(0 if all(line[3] != "NO" for line in rows) else 1)
