"""Speed and peak memory of a training step: `trainer train` against PyTorch on the CPU, alternating in one run.

The final model at a width, both with the same number of threads, on the same cache rows. Each round starts a fresh
process of each and reports its time per step without the first (warm-up) step and its peak memory (VmHWM). Prints the
medians; exit 1 when `trainer` is slower or needs more memory.

    python train_speed.py --trainer target/debug/trainer --data CACHE --width 0.125 --batch 16 --threads 2
"""

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

UNITS, DENSE, SIDE = (512, 256, 128), 256, 256


def torch_steps(data, width, batch, threads, steps):
    import torch

    torch.set_num_threads(threads)
    units = [max(4, int(np.floor(u * width + 0.5))) for u in UNITS]
    dense = max(4, int(np.floor(DENSE * width + 0.5)))
    layers, channels = [], 3
    for u in units:
        layers += [torch.nn.Conv2d(channels, u, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
        channels = u
    layers += [torch.nn.Flatten(), torch.nn.Linear(900 * channels, dense), torch.nn.ReLU(), torch.nn.Linear(dense, 1)]
    model = torch.nn.Sequential(*layers)
    optimiser = torch.optim.Adam(model.parameters(), eps=1e-7)
    rows = list(csv.DictReader(open(os.path.join(data, "index.csv"))))
    labels = torch.tensor([float(row["pe_present"]) for row in rows])[:, None]
    images = np.memmap(os.path.join(data, "tensors.u8"), np.uint8, "r", shape=(len(rows), 3, SIDE, SIDE))
    seconds = []
    for step in range(steps):
        begin = time.perf_counter()
        chosen = [(step * batch + i) % len(rows) for i in range(batch)]
        x = torch.from_numpy(images[chosen]).float() / 255
        optimiser.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(model(x), labels[chosen]).backward()
        optimiser.step()
        seconds.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"seconds": statistics.median(seconds[1:]), "peak_mib": peak, "cpu": cpu.ru_utime + cpu.ru_stime}))


def trainer_steps(arguments):
    with tempfile.TemporaryDirectory() as folder:
        n_rows = sum(1 for _ in open(os.path.join(arguments.data, "index.csv"))) - 1
        order = os.path.join(folder, "order.csv")
        with open(order, "w") as file:
            for step in range(arguments.steps):
                rows = [(step * arguments.batch + i) % n_rows for i in range(arguments.batch)]
                file.write(" ".join(map(str, rows)) + "\n")
        command = [arguments.trainer, "train", "--data", arguments.data, "--width", str(arguments.width), "--json"]
        command += ["--order", order, "--out", os.path.join(folder, "run")]
        environment = dict(os.environ, RAYON_NUM_THREADS=str(arguments.threads))
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, status
        return {"seconds": arguments.batch / json.loads(output)["images_per_second"],
                "peak_mib": usage.ru_maxrss / 1024, "cpu": usage.ru_utime + usage.ru_stime}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer")
    parser.add_argument("--data", required=True, help="a cache folder of `trainer prepare`")
    parser.add_argument("--width", type=float, default=0.125)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torch-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.torch_only:
        torch_steps(arguments.data, arguments.width, arguments.batch, arguments.threads, arguments.steps)
        return 0
    results = {"trainer": [], "torch": []}
    for number in range(arguments.rounds):
        results["trainer"].append(trainer_steps(arguments))
        output = subprocess.run([sys.executable, __file__, "--torch-only", *sys.argv[1:]], check=True, stdout=subprocess.PIPE).stdout
        results["torch"].append(json.loads(output))
        for name, rounds in results.items():
            print(number + 1, name, {key: round(value, 3) for key, value in rounds[-1].items()}, flush=True)
    median = {name: {key: statistics.median(r[key] for r in rounds) for key in rounds[0]} for name, rounds in results.items()}
    print(json.dumps(median))
    ours, theirs = median["trainer"], median["torch"]
    print(f"a step takes {ours['seconds'] / theirs['seconds']:.2f} of torch's time, {ours['peak_mib'] / theirs['peak_mib']:.2f} of its memory")
    return 0 if ours["seconds"] <= theirs["seconds"] and ours["peak_mib"] <= theirs["peak_mib"] else 1


if __name__ == "__main__":
    sys.exit(main())
