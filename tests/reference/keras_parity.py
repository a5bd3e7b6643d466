"""Proves that `trainer train` computes what Keras computes.

Builds the publication's final model in Keras (any backend; KERAS_BACKEND=torch needs no TensorFlow), writes its first
weights and an order of batches, lets `trainer train --init --order` and Keras each take the same steps on the same cache,
and compares the loss of every step: the first five within 1e-3, all within 2e-2, relative to max(loss, 0.05). (Adam's
first steps divide by the root of a tiny mean, which amplifies rounding.)

`--control N` says how much of a difference is rounding alone: Keras takes the same steps N more times from first weights of which each
was moved by one unit in the last place, up or down at random, and is compared with itself. Then the trainer is held to the
limits above, or to the control's largest difference where that is larger.

    KERAS_BACKEND=torch python keras_parity.py --trainer target/debug/trainer --data CACHE --control 3
"""

import argparse
import csv
import json
import os
import struct
import subprocess
import sys
import tempfile

import numpy as np

UNITS, DENSE, SIDE = (512, 256, 128), 256, 256


def scaled(units, width):
    return max(4, int(np.floor(units * width + 0.5)))


def build(keras, width):
    layers = keras.layers
    model = keras.Sequential([keras.Input((SIDE, SIDE, 3))])
    for units in UNITS:
        model.add(layers.Conv2D(scaled(units, width), (3, 3), activation="relu"))
        model.add(layers.MaxPooling2D((2, 2)))
    model.add(layers.Flatten())
    model.add(layers.Dense(scaled(DENSE, width), activation="relu"))
    model.add(layers.Dense(1))
    model.compile(optimizer=keras.optimizers.Adam(), loss=keras.losses.BinaryCrossentropy(from_logits=True))
    return model


def weights_for_trainer(model):
    """Keras [3, 3, in, out] and rows, columns, channels to [out, in, 3, 3] and channels, rows, columns."""
    tensors, n_conv, n_dense, channels, side = {}, 0, 0, 3, SIDE
    for layer in model.layers:
        if not layer.weights:
            continue
        kernel, bias = (np.asarray(value) for value in layer.get_weights())
        if kernel.ndim == 4:
            n_conv += 1
            name, kernel = f"conv{n_conv}", kernel.transpose(3, 2, 0, 1)
            channels, side = kernel.shape[0], (side - 2) // 2
        else:
            n_dense += 1
            name = f"dense{n_dense}"
            if n_dense == 1:
                kernel = kernel.reshape(side, side, channels, -1).transpose(2, 0, 1, 3).reshape(kernel.shape)
            kernel = kernel.T
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = kernel, bias
    return tensors


def write_safetensors(path, tensors, metadata):
    header, end = {"__metadata__": metadata}, 0
    parts = []
    for name, value in tensors.items():
        part = np.ascontiguousarray(value, "<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [end, end + len(part)]}
        end += len(part)
        parts.append(part)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head + b"".join(parts))


def keras_losses(model, images, labels, order):
    losses = []
    for batch in order:
        x = images[batch].transpose(0, 2, 3, 1).astype(np.float32) / np.float32(255)
        losses.append(float(model.train_on_batch(x, labels[batch].astype(np.float32)[:, None])))
        model.reset_metrics()
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", required=True)
    parser.add_argument("--data", required=True, help="a cache folder of `trainer prepare`")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=float, default=1 / 16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--control", type=int, default=0, metavar="N", help="runs of Keras against itself, moved by one ulp")
    arguments = parser.parse_args()
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    keras.utils.set_random_seed(arguments.seed)
    rows = list(csv.DictReader(open(os.path.join(arguments.data, "index.csv"))))
    labels = np.array([int(row["pe_present"]) for row in rows])
    images = np.memmap(os.path.join(arguments.data, "tensors.u8"), np.uint8, "r", shape=(len(rows), 3, SIDE, SIDE))
    random = np.random.default_rng(arguments.seed)
    classes = [np.flatnonzero(labels == label) for label in (0, 1)]
    half = arguments.batch // 2
    order = [np.concatenate([random.choice(rows, half) for rows in classes]) for _ in range(arguments.steps)]
    model = build(keras, arguments.width)
    with tempfile.TemporaryDirectory() as folder:
        weights, steps, run = (os.path.join(folder, name) for name in ("first.safetensors", "order.csv", "run"))
        metadata = {"architecture": "final", "width": str(arguments.width)}
        write_safetensors(weights, weights_for_trainer(model), metadata)
        with open(steps, "w") as file:
            file.writelines(" ".join(map(str, batch)) + "\n" for batch in order)
        command = [arguments.trainer, "train", "--data", arguments.data, "--model", "final", "--width", str(arguments.width)]
        command += ["--init", weights, "--order", steps, "--out", run]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        ours = [float(row["loss"]) for row in csv.DictReader(open(os.path.join(run, "history.csv")))]
    first = [np.asarray(value) for value in model.get_weights()]
    theirs = keras_losses(model, images, labels, order)
    ours, theirs = np.array(ours), np.array(theirs)
    assert len(ours) == arguments.steps, f"{len(ours)} steps in history.csv"
    error = np.abs(ours - theirs) / np.maximum(theirs, 0.05)
    for step in range(arguments.steps):
        print(f"{step + 1:3d}  trainer {ours[step]:.6f}  keras {theirs[step]:.6f}  relative {error[step]:.1e}")
    limits = [1e-3, 2e-2]
    for run in range(arguments.control):
        moved = build(keras, arguments.width)
        nudge = np.random.default_rng(1000 + run)
        moved.set_weights([np.nextafter(value, np.where(nudge.random(value.shape) < 0.5, -np.inf, np.inf).astype(np.float32))
                           if value.ndim > 1 else value for value in first])
        control = np.abs(np.array(keras_losses(moved, images, labels, order)) - theirs) / np.maximum(theirs, 0.05)
        print(f"control {run + 1}: keras against keras moved by one ulp: first five {control[:5].max():.1e}, all {control.max():.1e}")
        limits = [max(limits[0], control[:5].max()), max(limits[1], control.max())]
    is_equal = error[:5].max() <= limits[0] and error.max() <= limits[1]
    print(f"keras {keras.__version__} ({keras.backend.backend()}): first five {error[:5].max():.1e}, all {error.max():.1e}: "
          + ("equal" if is_equal else "NOT EQUAL"))
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
