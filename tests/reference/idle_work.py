"""What skipping constant regions gains on real slices: the share of columns skipped and the CPU time of a slice against noise.

Usage: idle_work.py RUN MODEL TENSORS...

RUN is the binary of `cargo build --workspace --example run`; each TENSORS a folder that `edge classify --tensors` wrote (one with a model file
without body mask, one with). Bursts of noise and of slices alternate; CPU time of one thread, least and median of a slice.
"""

import glob
import os
import statistics
import sys
import tempfile

import numpy as np
from peer_bench import Engine


def main():
    run, model, *folders = sys.argv[1:]
    sets = {"noise": np.random.default_rng(1).integers(0, 256, (8, 3, 256, 256), dtype=np.uint8)}
    for folder in folders:
        sets[folder] = np.stack([np.load(path).reshape(3, 256, 256) for path in sorted(glob.glob(f"{folder}/*.npy"))])
    engines = {}
    for name, images in sets.items():
        with tempfile.NamedTemporaryFile(suffix=".u8", delete=False) as file:
            file.write(images.tobytes())
        engines[name] = Engine(run, model, file.name, "fastest", 1)
        os.unlink(file.name)
    # A burst is the whole set, so that every round has the same work.
    times = {name: [] for name in sets}
    for _ in range(5):
        for name, engine in engines.items():
            times[name].append(engine.burst(len(sets[name]))[1])
    for name, engine in engines.items():
        least, median = min(times[name]), statistics.median(times[name])
        noise = min(times["noise"])
        print(f"{name:12} {len(sets[name])} slices, {100 * float(engine.ask('idle')):5.1f} % skipped, "
              f"CPU least {least / 1e3:.2f} ms, median {median / 1e3:.2f} ms a slice, {least / noise:.3f} of noise")
        engine.stop()


if __name__ == "__main__":
    main()
