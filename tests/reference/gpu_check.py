#!/usr/bin/env python3
"""Checks and times training on a GPU, in one command, and prints one table (`gpu-check.json` holds the same, `gpu-check.log` what every command said).

    tests/reference/gpu_build.sh                                                # anywhere; makes gpu-kit.tar.gz
    tar xf gpu-kit.tar.gz && python3 gpu-kit/gpu_check.py gpu-kit --out OUT     # on the GPU machine, whose python3 has PyTorch with CUDA 13

The operators against their definition in f64 (the crate's own tests, here on the real card); speed and memory beside PyTorch (channels_last, bf16 autocast, torch.compile, fused Adam, images in
GPU memory; in turn, twice each); ten epochs; world size 1 through NCCL; 50 steps of the full model beside the CPU trainer; the transfer learners beside torchvision's; a whole run in bf16 and in
f32; images from the cache step by step; the operators' tests under compute-sanitizer; the transfer learners beside the CPU. It ends within --seconds, --only does some of it. A check that fails is
a row and the others go on; what could not be done is a row that says so. The exit code is 0 only if every check held; a machine without a GPU: 69.

`--rehearse LIBRARIES` runs every line at a tiny size on the emulated libraries (gpu_build.sh --emulator makes gpu-kit/emulator) and PyTorch on the CPU: it shows that the script works, and nothing else.
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
import traceback

# Operations of a step for one image of the final model, forward and back.
GFLOP_AN_IMAGE = 121.0
# Loss per step against the CPU's, relative to max(loss, 0.05): bf16 keeps 8 bits, and Adam's first steps amplify what is lost.
F32_FIRST, F32_ALL, BF16_FIRST, BF16_ALL = 1e-3, 5e-2, 2e-2, 2e-1
# device, compile or eager, images, batch, steps, model, units: gathering and scaling are within what is compiled, as they are within our first kernel. torchvision's normalisations keep
# their statistics as ours do.
BENCH = """
import json, sys, time, torch
from torch import nn
device, mode, (n_images, batch, steps), model, units = sys.argv[1], sys.argv[2], map(int, sys.argv[3:6]), sys.argv[6], [int(n) for n in sys.argv[7:]]
torch.backends.cudnn.benchmark = True
torch.manual_seed(1)
images = torch.randint(0, 256, (n_images, 3, 256, 256), dtype=torch.uint8, device=device)
labels = torch.randint(0, 2, (n_images,), device=device).float()
def block(i, o): return [nn.Conv2d(i, o, 3), nn.ReLU(), nn.MaxPool2d(2)]
if model == "final":
    a, b, c, dense = units
    net = nn.Sequential(*block(3, a), *block(a, b), *block(b, c), nn.Flatten(), nn.Linear(900 * c, dense), nn.ReLU(), nn.Linear(dense, 1))
else:
    import torchvision
    net = torchvision.models.resnet50() if model.startswith("resnet50") else torchvision.models.inception_v3(aux_logits=False, init_weights=False)
    if model != "resnet50": net.requires_grad_(False)
    net.fc = nn.Linear(2048, 1)
    net = net.eval()
net = net.to(device).to(memory_format=torch.channels_last)
optimiser = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-3, eps=1e-7, fused=True)
factor, offset = (1 / 255, 0) if model == "final" else (1 / 127.5, -1)
def loss_of(images, labels, rows):
    x = (images[rows].float() * factor + offset).contiguous(memory_format=torch.channels_last)
    with torch.autocast(device, torch.bfloat16):
        logit = net(x)
    return nn.functional.binary_cross_entropy_with_logits(logit.float().squeeze(1), labels[rows])
if mode == "compile": loss_of = torch.compile(loss_of)
def step(rows):
    optimiser.zero_grad(set_to_none=True)
    loss_of(images, labels, rows).backward()
    optimiser.step()
is_gpu = device == "cuda"
wait = torch.cuda.synchronize if is_gpu else lambda: None
warm = min(20, steps)
order = torch.randint(0, n_images, (steps + warm, batch), device=device)
for i in range(warm): step(order[i])
wait()
begin = time.perf_counter()
for i in range(warm, steps + warm): step(order[i])
wait()
seconds = time.perf_counter() - begin
found = {"images_per_second": steps * batch / seconds, "used_bytes": 1, "version": torch.__version__}
if is_gpu:
    free, total = torch.cuda.mem_get_info()
    # What was reserved at the most, and what CUDA itself and others hold.
    found["used_bytes"] = total - free - torch.cuda.memory_reserved() + torch.cuda.max_memory_reserved()
    found["version"] += f", cuDNN {torch.backends.cudnn.version()}"
print(json.dumps(found))
"""
# TFLOP/s of a product and TB/s of a copy, read and written.
CEILINGS = """
import sys, time, torch
device, n, n_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
wait = torch.cuda.synchronize if device == "cuda" else lambda: None
def median(work):
    times = []
    for _ in range(20):
        wait(); begin = time.perf_counter(); work(); wait(); times.append(time.perf_counter() - begin)
    return sorted(times)[10]
a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
product = median(lambda: a @ b)
c = torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, device=device)
d = torch.empty_like(c)
copy = median(lambda: d.copy_(c))
print(2 * n**3 / product / 1e12, 2 * n_bytes / copy / 1e12)
"""

parser = argparse.ArgumentParser()
parser.add_argument("kit", type=pathlib.Path)
parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("."))
parser.add_argument("--seconds", type=float, default=560, help="everything ends within them")
parser.add_argument("--only", nargs="+", default=[], metavar="CHECK", help="these checks alone")
parser.add_argument("--rehearse", type=pathlib.Path, metavar="LIBRARIES", help="every line at a tiny size on the emulated libraries there")
arguments = parser.parse_args()
is_rehearsal = arguments.rehearse is not None
if is_rehearsal:
    N_IMAGES, BATCH, STEPS, EPOCHS, WIDTH, SMALL, UNITS, PREPARE = 16, 2, 2, (1, 1), "0.001", "0.001", [8, 8, 8, 8], "--phantom 14 --slices 5 --matrix 64"
    ORDERED, TRANSFER_STEPS, TESTS, CEILING, TORCH, COMPILED = (6, 2), 1, "gpu::tests::nan", [256, 1 << 20], "cpu", "eager"
else:
    N_IMAGES, BATCH, STEPS, EPOCHS, WIDTH, SMALL, UNITS, PREPARE = 4000, 50, 400, (10, 3), "1", "0.125", [512, 256, 128, 256], "--phantom 130 --slices 50"
    ORDERED, TRANSFER_STEPS, TESTS, CEILING, TORCH, COMPILED = (50, 4), 200, "gpu::", [8192, 4 << 30], "cuda", "compile"
begin = time.monotonic()
# What is left for the last rows and the table.
RESERVE = 5
rows, results = [], {}
arguments.out.mkdir(parents=True, exist_ok=True)
log = open(arguments.out / "gpu-check.log", "w")


def row(what, value, wanted="", holds=None):
    rows.append((what, value, wanted, "" if holds is None else "yes" if holds else "NO"))
    results[what] = {"value": value, "wanted": wanted, "holds": holds}
    # Each time: the machine may be taken away before the end.
    (arguments.out / "gpu-check.json").write_text(json.dumps(results, indent=1))
    print(f"[{time.monotonic() - begin:4.0f} s] {what}: {value} {rows[-1][3]}", flush=True)


def run(command, environment, timeout):
    """Standard output and error, and the exit code; None where it took too long or no time was left."""
    command = [str(part) for part in command]
    left = arguments.seconds - RESERVE - (time.monotonic() - begin)
    if left < 5:
        return "", "no time left", None
    started = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=min(timeout, left), env=environment)
        stdout, stderr, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        said = (late.stderr or b"").decode(errors="replace")
        stdout, stderr, code = "", f"{said}\nno end after {time.monotonic() - started:.0f} s", None
    except OSError as error:
        stdout, stderr, code = "", str(error), None
    shown = " ".join(part if len(part) < 200 else "..." for part in command)
    log.write(f"$ {shown}\nexit {code} after {time.monotonic() - started:.1f} s\n{stdout[-200000:]}\n{stderr[-200000:]}\n\n")
    log.flush()
    return stdout, stderr, code


def last(text):
    return (text.strip().splitlines() or ["nothing was said"])[-1][:300]


def program(command, extra=None, timeout=200):
    """A command of the kit, with the libraries that PyTorch brings."""
    return run(command, {**with_libraries, **(extra or {})}, timeout)


def python(code, *options, timeout=150):
    """What a piece of PyTorch printed last; None, and why, where it failed."""
    stdout, stderr, exit_code = run([sys.executable, "-c", code, *options], os.environ, timeout)
    return (last(stdout), "") if exit_code == 0 else (None, last(stderr))


def train(out, *options, extra=None, timeout=200):
    """The summary of a run; None, and a row that says why, where it failed."""
    command = [trainer, "train", "--data", cache, "--out", work / out, "--json", *options]
    stdout, stderr, code = program(command, extra, timeout)
    if code != 0:
        row(f"trainer train ({out})", f"exit {code}: {last(stderr)}", "exit 0", False)
        return None
    return json.loads(stdout.strip().splitlines()[-1])


def losses(out):
    with open(work / out / "history.csv") as file:
        return [float(line["loss"]) for line in csv.DictReader(file)]


def apart(found, expected):
    """The largest difference relative to max(loss, 0.05)."""
    return max(abs(a - b) / max(b, 0.05) for a, b in zip(found, expected, strict=True))


def order(name, n_steps, batch, n_rows):
    """A file of the cache's rows for each step."""
    lines = (" ".join(str((step * 7919 + place * 104729) % n_rows) for place in range(batch)) for step in range(n_steps))
    (work / name).write_text("\n".join(lines) + "\n")
    return ["--order", work / name]


def operators():
    stdout, stderr, code = program([tests, TESTS, "--test-threads=1"], timeout=150)
    said = [line for line in stdout.splitlines() if line.startswith("test ") and not line.endswith(" ok")]
    row("operators against the definition in f64", "; ".join(said) or last(stderr), "ok", code == 0)


def ceilings():
    found, why = python(CEILINGS, TORCH, *CEILING, timeout=60)
    if found is None:
        row("bf16 matrix rate", why, "measured", False)
        return
    product, copy = map(float, found.split())
    known["peak"] = product
    row(f"bf16 matrix rate, {CEILING[0]} cubed, TFLOP/s; copying, TB/s", f"{product:.0f}; {copy:.2f}")


def bench(mode, model="final", n_steps=STEPS):
    found, why = python(BENCH, TORCH, mode, N_IMAGES, BATCH, n_steps, model, *UNITS)
    if found is None:
        row(f"PyTorch ({model}, {mode})", why, "runs", False)
    return found and json.loads(found)


def speed():
    fast = order("fast.csv", STEPS, BATCH, N_IMAGES)
    ours, theirs = [], []
    for turn in range(2):
        ours.append(train(f"speed-{turn}", *fast, "--width", WIDTH, "--device", "cuda:0"))
        theirs.append(bench("compile"))
    if not any(theirs):
        theirs = [bench("eager")]
    ours, theirs = [found for found in ours if found], [found for found in theirs if found]
    rates = [[found["images_per_second"] for found in side] for side in (ours, theirs)]
    named = [("final model", ours, rates[0]), ("PyTorch, the same", theirs, rates[1])]
    for name, side, all_rates in named:
        if side:
            row(f"{name}, batch {BATCH}, images/s", f"{statistics.median(all_rates):.0f} ({', '.join(format(rate, '.0f') for rate in all_rates)})")
    if ours:
        rate, gpu = statistics.median(rates[0]), ours[0]["gpu"]
        if "peak" in known:
            row("share of the matrix rate", f"{rate * GFLOP_AN_IMAGE / 1000 / known['peak']:.2f}")
        row("choosing cuDNN's plans, s", f"{ours[0]['tuning_seconds']:.1f}")
        row("memory in use at the end, GB", f"{gpu['used_bytes'] / 1e9:.2f} (images {gpu['image_bytes'] / 1e9:.2f}, workspace {gpu['workspace_bytes'] / 1e9:.2f})")
        row("one epoch of 1,790,594 images, min", f"{1790594 / rate / 60:.1f}")
    if theirs:
        row("PyTorch's version", theirs[0]["version"])
        row("PyTorch, memory at the most, GB", f"{theirs[0]['used_bytes'] / 1e9:.2f}")
    if ours and theirs:
        relative = rate / statistics.median(rates[1])
        row("images/s relative to PyTorch's", f"{relative:.2f}", "1.2", relative >= 1.2)
        relative = gpu["used_bytes"] / theirs[0]["used_bytes"]
        row("memory relative to PyTorch's", f"{relative:.2f}", "1.0", relative <= 1)
    else:
        row("images/s relative to PyTorch's", "not measured", "1.2", False)


def ten_epochs():
    summary = train("ten", "--sampling", "all", "--images", N_IMAGES, "--batch", BATCH, "--width", WIDTH, "--epochs", EPOCHS[0], "--device", "cuda:0")
    if summary:
        n = sum(summary["n_train"])
        seconds = f"{summary['training_seconds']:.1f} ({summary['tuning_seconds']:.1f}, {summary['seconds']:.1f})"
        row(f"{n} images, {EPOCHS[0]} epochs: training s (choosing plans, all with validation and checkpoints)", seconds, "15", n == N_IMAGES and summary["training_seconds"] <= 15)


def streamed():
    options = order("streamed.csv", STEPS // 2, BATCH, N_IMAGES)
    summary = train("streamed", *options, "--width", WIDTH, "--device", "cuda:0", extra={"PE_EDGE_STREAM_IMAGES": "1"})
    if summary:
        row("images from the cache step by step, images/s", f"{summary['images_per_second']:.0f}")


def nccl():
    options = [*order("few.csv", 5, BATCH, N_IMAGES), "--width", WIDTH]
    launched = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    if train("alone", *options, "--device", "cuda:0") and train("nccl", *options, extra=launched):
        # cuDNN's plans are chosen by time, so that two runs differ in the last bits.
        found = apart(losses("nccl"), losses("alone"))
        row("world size 1 through NCCL: five losses beside those without", f"{found:.1e}", "1e-02", found <= 1e-2)


def beside_cpu():
    with open(cache / "index.csv") as file:
        n_rows = sum(1 for _ in file) - 1
    options = [*order("order.csv", *ORDERED, n_rows), "--width", WIDTH, "--seed", "3"]
    cpu = train("cpu", *options, "--device", "cpu", timeout=150)
    if not cpu:
        return
    row("CPU trainer, full width, images/s", f"{cpu['images_per_second']:.1f}")
    expected = losses("cpu")
    for precision, bounds in [("f32", (F32_FIRST, F32_ALL)), ("bf16", (BF16_FIRST, BF16_ALL))]:
        if train(f"gpu-{precision}", *options, "--device", "cuda:0", "--precision", precision):
            found = losses(f"gpu-{precision}")
            both = apart(found[:5], expected[:5]), apart(found, expected)
            holds = both[0] <= bounds[0] and both[1] <= bounds[1]
            row(f"{len(expected)} steps in {precision}, loss against the CPU: first five, all", f"{both[0]:.1e}, {both[1]:.1e}", f"{bounds[0]:.0e}, {bounds[1]:.0e}", holds)


def whole_runs():
    found = {}
    for precision in ["f32", "bf16"]:
        out = f"whole-{precision}"
        options = ["--sampling", "all", "--images", N_IMAGES, "--width", SMALL, "--epochs", EPOCHS[1], "--learning-rate", "0.0004", "--batch", BATCH]
        if train(out, *options, "--device", "cuda:0", "--precision", precision):
            report = work / f"report-{precision}"
            _, stderr, code = program([trainer, "evaluate", "--model", work / out / "model.safetensors", "--data", cache, "--out", report, "--json"])
            if code == 0:
                found[precision] = json.loads((report / "metrics.json").read_text())["auroc"]
            else:
                row(f"trainer evaluate ({out})", f"exit {code}: {last(stderr)}", "exit 0", False)
    if len(found) == 2:
        f32, bf16 = found["f32"], found["bf16"]
        value = f"{bf16['value']:.3f} ({f32['value']:.3f} [{f32['low']:.3f}, {f32['high']:.3f}])"
        row("AUROC of a run in bf16 (f32)", value, "within the interval", f32["low"] <= bf16["value"] <= f32["high"])
    else:
        row("AUROC of a run in bf16 (f32)", "not measured", "within the interval", False)


def transfer_speed():
    for model in ["resnet50", "resnet50-frozen", "inception-v3"]:
        options = order("transfer.csv", TRANSFER_STEPS, BATCH, N_IMAGES)
        ours = train(f"speed-{model}", *options, "--model", model, "--random-init", "--width", WIDTH, "--device", "cuda:0")
        theirs = bench(COMPILED, model, TRANSFER_STEPS)
        if ours and theirs:
            rates = ours["images_per_second"], theirs["images_per_second"]
            relative = rates[0] / rates[1]
            row(f"{model}, batch {BATCH}: images/s, PyTorch's, relative", f"{rates[0]:.0f}, {rates[1]:.0f}, {relative:.2f}", "0.5", relative >= 0.5)
        else:
            row(f"{model}, batch {BATCH}: images/s relative to PyTorch's", "not measured", "0.5", False)


def transfer_beside_cpu():
    for model in ["resnet50", "inception-v3"]:
        options = [*order("transfer-cpu.csv", 8, ORDERED[1], N_IMAGES), "--model", model, "--random-init", "--width", WIDTH, "--seed", "3", "--learning-rate", "0.0001"]
        if not train(f"{model}-cpu", *options, "--device", "cpu"):
            continue
        for precision, bound in [("f32", F32_ALL), ("bf16", BF16_ALL)]:
            if train(f"{model}-{precision}", *options, "--device", "cuda:0", "--precision", precision):
                found = apart(losses(f"{model}-{precision}"), losses(f"{model}-cpu"))
                row(f"{model}: 8 steps in {precision}, loss against the CPU", f"{found:.1e}", f"{bound:.0e}", found <= bound)


def sanitizers():
    places = ["/usr/local/cuda/bin", *glob.glob("/usr/local/cuda*/compute-sanitizer"), *glob.glob("/opt/nvidia/*/compute-sanitizer")]
    sanitizer = shutil.which("compute-sanitizer", path=":".join([os.environ.get("PATH", ""), *places]))
    if sanitizer is None:
        row("compute-sanitizer", "not on this machine", "clean", False)
        return
    # Our kernels alone: NVIDIA's are many and large. The libraries look for functions that an older driver lacks, which is no error.
    ours = "|".join((arguments.kit / "kernels.txt").read_text().split())
    for tool in ["memcheck", "racecheck"]:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no", "--kernel-name", f"regex=^({ours})$"]
        stdout, stderr, code = program([*command, tests, "gpu::tests::step_is_the_definition_on_noise", "--test-threads=1"], timeout=120)
        said = [line.strip("= ") for line in (stdout + stderr).splitlines() if "SUMMARY" in line]
        row(f"compute-sanitizer {tool}", f"exit {code}, {(said or [last(stderr)])[-1]}", "exit 0", code == 0)


# In memory where there is room: disks are not what is measured.
memory = pathlib.Path("/dev/shm")
has_room = memory.is_dir() and shutil.disk_usage(memory).free > 20e9
work = pathlib.Path(tempfile.mkdtemp(dir=memory if has_room else None))
cache = work / "cache"
# The libraries that PyTorch brings; NVIDIA's driver is found by itself. The names without a version come first among those that are tried: without them a toolkit's cuBLAS could meet PyTorch's cuBLASLt.
folders = [str(arguments.rehearse.resolve())] if is_rehearsal else [folder for base in site.getsitepackages() for folder in glob.glob(f"{base}/nvidia/*/lib")]
for name in ["libcublas", "libcudnn"]:
    for library in [path for folder in folders for path in glob.glob(f"{folder}/{name}.so.*")][:1]:
        (work / f"{name}.so").symlink_to(library)
with_libraries = {**os.environ, "LD_LIBRARY_PATH": ":".join([str(work), *folders, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])}
trainer, tests = arguments.kit.resolve() / "trainer", arguments.kit.resolve() / "trainer-tests"
known = {}

if is_rehearsal:
    row("card", "none: a rehearsal on emulated libraries, whose figures say nothing")
else:
    listed = run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"], os.environ, 60)
    if listed[2] != 0:
        print(f"no NVIDIA GPU here: {last(listed[1])}; nothing was checked", file=sys.stderr)
        sys.exit(69)
    row("card", listed[0].strip())
_, stderr, code = program([trainer, "prepare", *PREPARE.split(), "--out", cache])
row("phantom cache", f"exit {code}" if code == 0 else last(stderr), "exit 0", code == 0)
checks = [operators, ceilings, speed, ten_epochs, nccl, beside_cpu, transfer_speed, whole_runs, streamed, sanitizers, transfer_beside_cpu]
unknown = set(arguments.only) - {check.__name__ for check in checks}
if unknown:
    parser.error(f"no check {', '.join(sorted(unknown))}: there are {', '.join(check.__name__ for check in checks)}")
for check in checks:
    if arguments.only and check.__name__ not in arguments.only:
        continue
    try:
        check()
    except Exception as error:  # What one check meets must not cost the others' figures.
        log.write(traceback.format_exc() + "\n")
        row(check.__name__, f"{type(error).__name__}: {error}"[:300], "", False)
shutil.rmtree(work, ignore_errors=True)
row("all of this, s", f"{time.monotonic() - begin:.0f}")
widths = [max(len(str(line[column])) for line in rows) for column in range(4)]
print()
for line in [("what", "found", "wanted", "holds"), *rows]:
    print("  ".join(str(part).ljust(width) for part, width in zip(line, widths)).rstrip())
sys.exit(0 if all(line[3] != "NO" for line in rows) else 1)
