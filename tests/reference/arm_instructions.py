"""Instructions that one slice takes on aarch64: the engine against onnxruntime's and LiteRT's wheels, the same network, under qemu-aarch64.

Usage: arm_instructions.py RUN MODEL [--root DIR --site DIR]

RUN is the example `run`, built for aarch64-unknown-linux-gnu; MODEL a file of `trainer quantize`. DIR of --root holds Debian's arm64 packages of Python 3.11
unpacked (python3.11-minimal, libpython3.11-stdlib, libc6, libstdc++6, ...), DIR of --site the aarch64 wheels of onnxruntime, ai-edge-litert and numpy. Each
program runs two and three slices; the difference is one. onnxruntime's logit must be ours to the bit; LiteRT reads the file that peer_files.py writes,
and its logit, of eight bits, must be ours to two steps. A program whose logit is another is not counted. onnxruntime's processor library reads
/proc/cpuinfo, so an ARM one is written into the root for each CPU. Needs qemu-user with plugins, gcc and libc6-dev-arm64-cross.
"""

import argparse
import os
import re
import subprocess
import tempfile

import numpy as np
import peer_files

# CPU of qemu: kernel of ours, part number and features in /proc/cpuinfo.
COMMON = "fp asimd evtstrm aes pmull sha1 sha2 crc32"
DOT = COMMON + " atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
CPUS = {
    "cortex-a72": ("neon", 0xD08, COMMON + " cpuid"),
    "neoverse-n1": ("neon-dot", 0xD0C, DOT),
    "max,sve=off": ("neon-i8mm", 0xD4F, DOT + " i8mm bf16"),
}

ONNXRUNTIME = """
import sys, numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
image = np.fromfile(sys.argv[2], np.uint8).reshape(1, 3, 256, 256)
for _ in range(int(sys.argv[3])):
    logit = session.run(["logit"], {"image": image})[0]
print(f"logits {logit.view(np.uint32).item():08x}")
"""

LITERT = """
import sys, numpy as np
from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter(sys.argv[1], num_threads=1)
interpreter.allocate_tensors()
[image_in], [logit_out] = interpreter.get_input_details(), interpreter.get_output_details()
image = np.fromfile(sys.argv[2], np.uint8).reshape(1, 3, 256, 256)
image = np.ascontiguousarray((image.transpose(0, 2, 3, 1) ^ 128).view(np.int8))
for _ in range(int(sys.argv[3])):
    interpreter.set_tensor(image_in["index"], image)
    interpreter.invoke()
logit = interpreter.get_tensor(logit_out["index"]) * np.float32(logit_out["quantization"][0])
print(f"logits {logit.astype(np.float32).view(np.uint32).item():08x}")
"""

# LiteRT's step of the logit, as a part of it.
STEP = 0.01


def count(plugin, cpu, prefix, command, text=""):
    """Instructions of a program and the bits of its logit."""
    with tempfile.NamedTemporaryFile("r") as log:
        qemu = ["qemu-aarch64", "-cpu", cpu, "-plugin", plugin, "-d", "plugin", "-D", log.name, *prefix]
        out = subprocess.run(qemu + command, input=text, capture_output=True, text=True, check=True).stdout
        return int(re.search(r"instructions (\d+)", log.read())[1]), re.search(r"logits (\w+)", out)[1]


def number(bits):
    return float(np.uint32(int(bits, 16)).view(np.float32))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("model")
    parser.add_argument("--root")
    parser.add_argument("--site")
    parser.add_argument("--cpus", nargs="*", default=list(CPUS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plugin, image = os.path.join(folder, "count.so"), os.path.join(folder, "image.u8")
        source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "instruction_count.c")
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", plugin, source], check=True)
        np.random.default_rng(7).integers(0, 256, 3 * 256 * 256, dtype=np.uint8).tofile(image)
        for cpu in arguments.cpus:
            kernel, part, features = CPUS[cpu]
            ours = [count(plugin, cpu, ["-L", "/usr/aarch64-linux-gnu"], [arguments.run, arguments.model, image, kernel], f"{n}\n") for n in (2, 3)]
            one_slice = ours[1][0] - ours[0][0]
            line = f"{cpu:12} {kernel:9} {one_slice / 1e6:8.1f} million"
            if arguments.root:
                info = os.path.join(arguments.root, "proc", "cpuinfo")
                os.makedirs(os.path.dirname(info), exist_ok=True)
                with open(info, "w") as file:
                    file.write(f"processor\t: 0\nFeatures\t: {features}\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
                               f"CPU variant\t: 0x0\nCPU part\t: {part:#x}\nCPU revision\t: 3\n\n")
                prefix = ["-L", arguments.root, "-E", f"PYTHONPATH={arguments.site}", "-E", "OPENBLAS_NUM_THREADS=1"]
                logit = number(ours[0][1])
                litert = os.path.join(folder, "network.tflite")
                peer_files.write_litert(peer_files.read_chain(arguments.model), litert, abs(logit) * STEP)
                for name, script, model in (("onnxruntime", ONNXRUNTIME, arguments.model), ("LiteRT", LITERT, litert)):
                    python = [os.path.join(arguments.root, "usr/bin/python3.11"), "-c", script, model, image]
                    peer = [count(plugin, cpu, prefix, [*python, str(n)]) for n in (2, 3)]
                    allowed = 0 if name == "onnxruntime" else 2 * STEP * abs(logit)
                    if abs(number(peer[0][1]) - logit) > allowed:
                        line += f", {name} computes {number(peer[0][1]):.4f} for {logit:.4f} and is not counted"
                        continue
                    theirs = peer[1][0] - peer[0][0]
                    line += f", {name} {theirs / 1e6:8.1f} million ({one_slice / theirs:.2f})"
            print(line, flush=True)


if __name__ == "__main__":
    main()
