"""Proves that the transfer learners compute what torchvision computes.

Gives torchvision's ResNet-50 and Inception-v3 random weights, statistics of their normalisations included, and one output, writes them under
torchvision's own names, and compares logits on slices of a cache:

- torch's, of the module in evaluation mode on images normalised as its published weights want them;
- the trainer's: `trainer train --init --order` takes steps of one image at a learning rate that changes nothing, and a step's loss
  tells the logit, since loss = ln(1 + exp(-logit)) for a slice with embolus and ln(1 + exp(logit)) for one without;
- onnxruntime's, of the file that `trainer export` makes of that run (onnx.checker with full check passes).

All agree within 1e-4 x max(1, |logit|). No ImageNet weights are needed, and none are in the repository.

    python torchvision_parity.py --trainer target/debug/trainer --data CACHE [--onnx-python PYTHON]

`--onnx-python` is an interpreter with onnx and onnxruntime, where this one has torch alone. Research use only, not a medical device.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile

import numpy as np

from keras_parity import SIDE, write_safetensors

TOLERANCE = 1e-4
ROWS = ["resnet50", "resnet50-frozen", "inception-v3"]
ONNX = """
import json, sys, numpy, onnx, onnxruntime
path, images = sys.argv[1:]
onnx.checker.check_model(onnx.load(path), full_check=True)
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
print(json.dumps([float(session.run(["logit"], {"image": image[None]})[0].ravel()[0]) for image in numpy.load(images)]))
"""


def build(torch, torchvision, name):
    """The module, and what it wants of a u8 image divided by 255."""
    if name.startswith("resnet50"):
        module = torchvision.models.resnet50(weights=None)
        mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    else:
        module = torchvision.models.inception_v3(weights=None, init_weights=False, aux_logits=False, transform_input=True)
        mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    module.fc = torch.nn.Linear(module.fc.in_features, 1)
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.normal_(layer.bias, 0, 0.2)
    return module, np.array(mean, np.float32), np.array(deviation, np.float32)


def settle(torch, module, x):
    """Statistics of the images in place of mean 0 and variance 1, moved at random: no layer's output grows or dies."""
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    module.train()
    with torch.no_grad():
        module(x)
        for layer in module.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.running_mean.mul_(torch.empty_like(layer.running_mean).uniform_(0.8, 1.2))
                layer.running_var.mul_(torch.empty_like(layer.running_var).uniform_(0.8, 1.2))
    module.eval()


def trainer_logits(arguments, name, weights, rows, labels, run):
    order = os.path.join(os.path.dirname(weights), "order.csv")
    with open(order, "w") as file:
        file.writelines(f"{row}\n" for row in rows)
    command = [arguments.trainer, "train", "--data", arguments.data, "--model", name, "--init", weights, "--order", order]
    subprocess.run(command + ["--learning-rate", "1e-30", "--out", run], check=True, stdout=subprocess.DEVNULL)
    losses = np.array([float(row["loss"]) for row in csv.DictReader(open(os.path.join(run, "history.csv")))])
    against = np.log(np.expm1(losses))
    return np.where(labels[rows] == 1, -against, against)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", required=True)
    parser.add_argument("--data", required=True, help="a cache folder of `trainer prepare`")
    parser.add_argument("--onnx-python", default=sys.executable)
    parser.add_argument("--n", type=int, default=4)
    arguments = parser.parse_args()
    import torch
    import torchvision

    labels = np.array([int(row["pe_present"]) for row in csv.DictReader(open(os.path.join(arguments.data, "index.csv")))])
    images = np.memmap(os.path.join(arguments.data, "tensors.u8"), np.uint8, "r", shape=(len(labels), 3, SIDE, SIDE))
    rows = np.linspace(0, len(labels) - 1, arguments.n).astype(int)
    chosen = np.array(images[rows])
    is_equal = True
    for name in ROWS:
        torch.manual_seed(7)
        module, mean, deviation = build(torch, torchvision, name)
        x = (chosen.astype(np.float32) / 255 - mean[:, None, None]) / deviation[:, None, None]
        x = torch.from_numpy(x)
        settle(torch, module, x)
        with torch.no_grad():
            theirs = module(x).numpy().ravel()
        with tempfile.TemporaryDirectory() as folder:
            weights, run, file, array = (os.path.join(folder, name) for name in ("w.safetensors", "run", "m.onnx", "images.npy"))
            tensors = {key: value.numpy() for key, value in module.state_dict().items() if not key.endswith("num_batches_tracked")}
            write_safetensors(weights, tensors, {})
            ours = trainer_logits(arguments, name, weights, rows, labels, run)
            subprocess.run([arguments.trainer, "export", "--run", run, "--out", file], check=True, stdout=subprocess.DEVNULL)
            np.save(array, chosen)
            environment = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
            told = subprocess.run([arguments.onnx_python, "-c", ONNX, file, array], check=True, capture_output=True, env=environment)
            exported = np.array(json.loads(told.stdout))
        scale = np.maximum(1, np.abs(theirs))
        of_trainer, of_file = (float(np.max(np.abs(logits - theirs) / scale)) for logits in (ours, exported))
        print(f"{name}: logits {np.array2string(theirs, precision=4)}; the trainer's differ by {of_trainer:.1e}, the exported file's by {of_file:.1e}")
        is_equal &= max(of_trainer, of_file) <= TOLERANCE
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}: " + ("equal" if is_equal else "NOT EQUAL"))
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
