"""Proves that `trainer train` computes what Keras computes.

Builds the publication's final model in Keras (KERAS_BACKEND: `tensorflow` or `torch`), writes its first weights and an order of batches, and takes
the same steps with Keras and with the trainer on the same cache. Two comparisons:

- **Step by step.** Before each of the 50 steps the trainer is given Keras' weights and Adam's two moments (as a checkpoint to `--resume`); then it, Keras, and
  Keras in float64 take that one step. Nothing of one step's rounding reaches the next, so loss, gradient and update of every tensor are held to
  float64 within the rounding of one step. What would differ in later steps alone (bias correction, moments, epsilon) is seen.
- **Free running.** `trainer train --init --order` takes all steps by itself; the loss of the first five agrees within 1e-3, relative to max(loss, 0.05).
  After that Adam amplifies rounding, which no implementation escapes: so Keras takes the same steps in float64, and the trainer may be no farther
  from these exact losses than Keras itself is in float32 (twice the largest and the mean difference; with `--control N` the largest of N more runs of
  Keras from first weights moved by one unit in the last place). `--learning-rate 1e-4` amplifies less: there all steps agree within 2e-2.

    KERAS_BACKEND=tensorflow python keras_parity.py --trainer target/debug/trainer --data CACHE --control 3

Needs keras, a backend, numpy, blake3 and safetensors. Research use only, not a medical device.
"""

import argparse
import csv
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile

import numpy as np

UNITS, DENSE, SIDE = (512, 256, 128), 256, 256
# Of one step, relative: of the loss; of the norm of each tensor's gradient and update. Where two values of a pool's window are equal but for rounding,
# float32 may send the gradient to the other: the probable cause of the largest figures, not isolated. Keras' own float32 has them as well: so SPREAD times
# Keras' figure is allowed too.
LIMITS = {"loss": 1e-6, "gradient": 1e-4, "update": 1e-4}
SPREAD = 4


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
    return model


def for_trainer(values):
    """Keras [3, 3, in, out] and rows, columns, channels to [out, in, 3, 3] and channels, rows, columns, under the trainer's names."""
    tensors, n_conv, n_dense, channels, side = {}, 0, 0, 3, SIDE
    for kernel, bias in zip(values[::2], values[1::2]):
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


def read_safetensors(path):
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


class Keras:
    """The publication's model with its optimiser, in float32 or float64."""

    def __init__(self, keras, arguments, first=None, dtype="float32"):
        keras.config.set_floatx(dtype)
        keras.config.set_dtype_policy(dtype)
        self.dtype = dtype
        self.model = build(keras, arguments.width)
        optimizer = keras.optimizers.Adam(arguments.learning_rate)
        self.model.compile(optimizer=optimizer, loss=keras.losses.BinaryCrossentropy(from_logits=True))
        optimizer.build(self.model.trainable_variables)
        if first is not None:
            self.model.set_weights(first)

    def copy_of(self, other):
        """Takes over weights, moments and number of steps."""
        pairs = zip(self.variables(), other.variables())
        for own, value in pairs:
            own.assign(np.asarray(value).astype(own.dtype))

    def variables(self):
        optimizer = self.model.optimizer
        return [*self.model.trainable_variables, *optimizer._momentums, *optimizer._velocities, optimizer.iterations]

    def step(self, images, labels, batch):
        """The loss before one optimiser step on the rows of `batch`."""
        x = images[batch].transpose(0, 2, 3, 1).astype(self.dtype) / np.dtype(self.dtype).type(255)
        loss = float(self.model.train_on_batch(x, labels[batch].astype(self.dtype)[:, None]))
        self.model.reset_metrics()
        return loss

    def state(self):
        """Weights and Adam's first and second moment, by the trainer's names and in its layout."""
        optimizer = self.model.optimizer
        names = [variable.path for variable in self.model.trainable_variables]
        state = {}
        for prefix, values in [("", self.model.trainable_variables), ("adam.first.", optimizer._momentums), ("adam.second.", optimizer._velocities)]:
            values = [np.asarray(value) for value in values]
            assert len(values) == len(names)
            state.update({prefix + name: value for name, value in for_trainer(values).items()})
        return state


def losses(model, images, labels, order):
    return np.array([model.step(images, labels, batch) for batch in order])


class Trainer:
    def __init__(self, arguments, folder):
        self.arguments, self.folder = arguments, folder
        self.metadata = {"architecture": "final", "width": str(arguments.width)}

    def run(self, name, weights, order, resume=False):
        """`trainer train` from `weights` over the steps of `order`; returns the run folder."""
        first, steps, run = (os.path.join(self.folder, f"{name}.{kind}") for kind in ("safetensors", "csv", "run"))
        write_safetensors(first, weights, self.metadata)
        with open(steps, "w") as file:
            file.writelines(" ".join(map(str, batch)) + "\n" for batch in order)
        command = [self.arguments.trainer, "train", "--data", self.arguments.data, "--model", "final", "--width", str(self.arguments.width)]
        command += ["--learning-rate", repr(self.arguments.learning_rate), "--init", first, "--order", steps, "--out", run]
        subprocess.run(command + ["--resume"] * resume, check=True, stdout=subprocess.DEVNULL)
        return run

    def losses(self, weights, order):
        self.free = self.run("free", weights, order)
        return np.array([float(row["loss"]) for row in csv.DictReader(open(os.path.join(self.free, "history.csv")))])

    def one_step(self, number, state, batch):
        """Loss and state after step `number` (from 0), begun with Keras' state."""
        import blake3

        _, metadata = read_safetensors(os.path.join(self.free, "checkpoint.safetensors"))
        weights = {name: value for name, value in state.items() if not name.startswith("adam.")}
        first, steps, run = (os.path.join(self.folder, f"step.{kind}") for kind in ("safetensors", "csv", "run"))
        write_safetensors(first, weights, self.metadata)
        with open(steps, "w") as file:
            file.write(" ".join(map(str, batch)) + "\n")
        fingerprint = json.loads(metadata["fingerprint"])
        fingerprint.update({name: blake3.blake3(open(path, "rb").read()).hexdigest() for name, path in [("init", first), ("order", steps)]})
        metadata.update({"fingerprint": json.dumps(fingerprint), "step": str(number), "epoch": "0", "step_in_epoch": "0", "n_images": "0", "loss_sum": "0"})
        shutil.rmtree(run, ignore_errors=True)
        os.mkdir(run)
        write_safetensors(os.path.join(run, "checkpoint.safetensors"), state, metadata)
        self.run("step", weights, [batch], resume=True)
        loss = float(next(csv.DictReader(open(os.path.join(run, "history.csv"))))["loss"])
        after, found = read_safetensors(os.path.join(run, "checkpoint.safetensors"))
        assert found["step"] == str(number + 1), found
        return loss, after


def norm(value):
    return float(np.linalg.norm(value.astype(np.float64)))


def deviations(before, after, exact):
    """Largest deviation of a tensor's gradient and update from the exact ones, relative to their norms."""
    gradients, updates = [], []
    for name in [name for name in exact if not name.startswith("adam.")]:
        # m' = m + (g - m) (1 - 0.9): a difference of m' is a tenth of one of g.
        moment = "adam.first." + name
        gradient = norm((exact[moment] - 0.9 * before[moment].astype(np.float64)) / 0.1)
        gradients.append(norm((after[moment] - exact[moment]) / 0.1) / max(gradient, 1e-12))
        updates.append(norm(after[name] - exact[name]) / max(norm(exact[name] - before[name]), 1e-12))
    return max(gradients), max(updates)


def step_by_step(trainer, model, referee, images, labels, order):
    """The losses of Keras, and per step how far trainer and Keras are from the step in float64: loss, gradient, update."""
    theirs, found = [], []
    for number, batch in enumerate(order):
        before = model.state()
        referee.copy_of(model)
        loss = model.step(images, labels, batch)
        exact_loss = referee.step(images, labels, batch)
        our_loss, ours = trainer.one_step(number, before, batch)
        exact = referee.state()
        of_loss = [abs(value - exact_loss) / max(exact_loss, 0.05) for value in (our_loss, loss)]
        of_state = [deviations(before, after, exact) for after in (ours, model.state())]
        row = [(of_loss[0], *of_state[0]), (of_loss[1], *of_state[1])]
        print(f"step {number + 1:3d}  loss {exact_loss:.6f}  off by: " + "; ".join(
            f"{who} loss {l:.1e} gradient {g:.1e} update {u:.1e}" for who, (l, g, u) in zip(("trainer", "keras"), row)), flush=True)
        theirs.append(loss)
        found.append(row)
    return np.array(theirs), np.array(found)


def relative(found, true):
    return np.abs(found - true) / np.maximum(true, 0.05)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", required=True)
    parser.add_argument("--data", required=True, help="a cache folder of `trainer prepare`")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=float, default=1 / 16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--control", type=int, default=0, metavar="N", help="runs of Keras from first weights moved by one ulp")
    parser.add_argument("--free-only", action="store_true", help="without the comparison step by step")
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
    model = Keras(keras, arguments)
    first = [np.asarray(value) for value in model.model.get_weights()]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(arguments, folder)
        ours = trainer.losses(for_trainer(first), order)
        assert len(ours) == arguments.steps, f"{len(ours)} steps in history.csv"
        exactly = [value.astype(np.float64) for value in first]
        if arguments.free_only:
            theirs, found = losses(model, images, labels, order), None
        else:
            theirs, found = step_by_step(trainer, model, Keras(keras, arguments, exactly, "float64"), images, labels, order)
    exact = losses(Keras(keras, arguments, exactly, "float64"), images, labels, order)
    for step in range(arguments.steps):
        print(f"{step + 1:3d}  trainer {ours[step]:.6f}  keras {theirs[step]:.6f}  keras in float64 {exact[step]:.6f}")
    between, of_ours, of_keras = relative(ours, theirs), relative(ours, exact), [relative(theirs, exact)]
    for run in range(arguments.control):
        nudge = np.random.default_rng(1000 + run)
        moved = [np.nextafter(value, np.where(nudge.random(value.shape) < 0.5, -np.inf, np.inf).astype(np.float32)) if value.ndim > 1 else value
                 for value in first]
        of_keras.append(relative(losses(Keras(keras, arguments, moved), images, labels, order), exact))
        print(f"control {run + 1}: keras from first weights moved by one ulp, off the exact losses by {of_keras[-1].max():.1e}, mean {of_keras[-1].mean():.1e}")
    allowed = [2 * max(control.max() for control in of_keras), 2 * max(control.mean() for control in of_keras)]
    checks = []
    for place, name in enumerate(("loss", "gradient", "update") if found is not None else ()):
        ours_off, keras_off = found[:, 0, place], found[:, 1, place]
        for what, of in (("median", np.median), ("largest", np.max)):
            checks.append((f"step by step, {what} {name} off the exact one (keras: {of(keras_off):.1e})", of(ours_off), max(LIMITS[name], SPREAD * of(keras_off))))
    checks += [
        ("free running, first five losses against keras", between[:5].max(), 1e-3),
        ("free running, largest difference to the exact losses", of_ours.max(), max(2e-2, allowed[0])),
        ("free running, mean difference to the exact losses", of_ours.mean(), max(2e-2, allowed[1])),
    ]
    print(f"keras {keras.__version__} ({keras.backend.backend()}), batch {arguments.batch}, width {arguments.width}, learning rate {arguments.learning_rate}")
    print(f"free running, all losses against keras {between.max():.1e}; keras in float32 is off its own exact losses by {of_keras[0].max():.1e}, mean {of_keras[0].mean():.1e}")
    for name, value, limit in checks:
        print(f"{'ok ' if value <= limit else 'NOT'}  {name}: {value:.1e} (at most {limit:.1e})")
    return 0 if all(value <= limit for _, value, limit in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
