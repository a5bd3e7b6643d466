"""Runs graphs that are not the engine's chain (residual, inception, depthwise) on the engine and on onnxruntime, and compares logits.

Usage: general_graphs.py RUN [--keep DIR]

RUN is the binary of `cargo build --workspace --example run`. The graphs have random weights and are quantized by onnxruntime's own
quantize_static (QDQ, u8 activations with zero points, s8 weights per channel); then their input is made u8, as the engine wants it. The
convolutions run on our kernels in integers, the rest in tract in f32, so an activation may differ by one step where onnxruntime adds or averages
in integers: logits must agree within 2 % of their spread over the images, and the engine must give the same bits with every kernel.
"""

import argparse
import os
import subprocess
import tempfile

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

IMAGE = (3, 256, 256)


class Graph:
    """Writes an f32 graph with random weights."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.nodes, self.constants = [], []

    def node(self, op, inputs, **attributes):
        output = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def constant(self, array):
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    def conv(self, value, shape, relu=True, **attributes):
        weights = self.random.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
        bias = self.random.normal(0, 0.1, shape[0])
        value = self.node("Conv", [value, self.constant(weights), self.constant(bias)], kernel_shape=shape[2:], **attributes)
        return self.node("Relu", [value]) if relu else value

    def head(self, value, channels):
        value = self.node("Flatten", [self.node("GlobalAveragePool", [value])])
        weights = self.random.normal(0, 1 / np.sqrt(channels), (1, channels))
        self.nodes.append(helper.make_node("Gemm", [value, self.constant(weights), self.constant(np.zeros(1))], ["logit"], name="logit", transB=1))

    def save(self, path):
        graph = helper.make_graph(
            self.nodes, "network", [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", *IMAGE])],
            [helper.make_tensor_value_info("logit", TensorProto.FLOAT, ["N", 1])], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
        onnx.checker.check_model(model)
        onnx.save(model, path)


def residual(graph):
    """A stem, a projecting and an identity bottleneck of ResNet-50, narrow."""
    value = graph.conv("image", (16, 3, 7, 7), strides=[2, 2], pads=[3, 3, 3, 3])
    value = graph.node("MaxPool", [value], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for inputs, outputs, stride in ((16, 64, 2), (64, 64, 1)):
        branch = graph.conv(value, (16, inputs, 1, 1))
        branch = graph.conv(branch, (16, 16, 3, 3), strides=[stride, stride], pads=[1, 1, 1, 1])
        branch = graph.conv(branch, (outputs, 16, 1, 1), relu=False)
        if inputs != outputs:
            value = graph.conv(value, (outputs, inputs, 1, 1), relu=False, strides=[stride, stride])
        value = graph.node("Relu", [graph.node("Add", [branch, value])])
    graph.head(value, 64)


def inception(graph):
    """A stem and one block of Inception-v3: 1x1, 5x5, 1x7 and 7x1, pool and 1x1, concatenated."""
    value = graph.conv("image", (12, 3, 3, 3), strides=[4, 4])
    value = graph.conv(value, (20, 12, 3, 3), pads=[1, 1, 1, 1])
    branches = [
        graph.conv(value, (8, 20, 1, 1)),
        graph.conv(graph.conv(value, (6, 20, 1, 1)), (10, 6, 5, 5), pads=[2, 2, 2, 2]),
        graph.conv(graph.conv(value, (9, 20, 1, 7), pads=[0, 3, 0, 3]), (7, 9, 7, 1), pads=[3, 0, 3, 0]),
        graph.conv(graph.node("AveragePool", [value], kernel_shape=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1]), (5, 20, 1, 1)),
    ]
    graph.head(graph.node("Concat", branches, axis=1), 30)


def depthwise(graph):
    """Depthwise, grouped and dilated convolutions."""
    value = graph.conv("image", (24, 3, 3, 3), strides=[4, 4], pads=[0, 0, 1, 1])
    value = graph.conv(value, (24, 1, 3, 3), group=24, pads=[1, 1, 1, 1])
    value = graph.conv(value, (30, 8, 3, 3), group=3, dilations=[2, 2], pads=[2, 2, 2, 2])
    graph.head(value, 30)


class Images(CalibrationDataReader):
    def __init__(self, images):
        self.images = iter(images)

    def get_next(self):
        image = next(self.images, None)
        return None if image is None else {"image": image.astype(np.float32) / 255}


def make(build, path, images):
    """Writes the quantized file with a u8 input."""
    graph = Graph(3)
    build(graph)
    plain = path + ".f32"
    graph.save(plain)
    quantize_static(plain, path, Images(images), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8, extra_options={"ForceQuantizeNoInputCheck": True, "OpTypesToExcludeOutputQuantization": ["Gemm"]})
    os.unlink(plain)
    model = onnx.load(path)
    nodes = model.graph.node
    [first] = [node for node in nodes if node.op_type == "QuantizeLinear" and node.input[0] == "image"]
    for node in nodes:
        node.input[:] = ["image" if name == first.output[0] else name for name in node.input]
    nodes.remove(first)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    onnx.checker.check_model(model)
    onnx.save(model, path)


def engine(run, model, images, kernel):
    """Logits and the explanation."""
    with tempfile.NamedTemporaryFile(suffix=".u8") as file:
        file.write(images.tobytes())
        file.flush()
        result = subprocess.run([run, model, file.name, kernel], input="explain\n", capture_output=True, text=True, check=True)
    head, explanation = result.stdout.split("\n", 1)
    bits = [int(word, 16) for word in head.split("logits ")[1].split()]
    return np.array(bits, np.uint32).view(np.float32), explanation


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--keep", help="folder for the files")
    parser.add_argument("--explain", action="store_true")
    arguments = parser.parse_args()
    # Blurred noise of differing contrast, so that logits differ.
    random = np.random.default_rng(5)
    coarse = random.integers(0, 256, (8, *IMAGE[:1], 16, 16)).repeat(16, 2).repeat(16, 3)
    images = (coarse * random.uniform(0.2, 1, (8, 1, 1, 1))).astype(np.uint8)[:, None]
    with tempfile.TemporaryDirectory() as folder:
        folder = arguments.keep or folder
        for build in (residual, inception, depthwise):
            path = os.path.join(folder, build.__name__ + ".onnx")
            make(build, path, images)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            expected = np.array([session.run(["logit"], {"image": image})[0].ravel()[0] for image in images])
            ours, explanation = engine(arguments.run, path, images, "fastest")
            scalar, _ = engine(arguments.run, path, images, "scalar")
            where = explanation.split("\n")[0]
            spread, difference = np.ptp(expected), np.abs(ours - expected).max()
            print(f"{build.__name__:10} {where}; logits {expected.min():.4f} to {expected.max():.4f}, largest difference {difference:.2e}")
            if arguments.explain:
                print(explanation)
            assert "convolutions on" in where, "our operator runs them"
            assert difference <= 0.02 * spread, (ours, expected)
            assert np.array_equal(ours.view(np.uint32), scalar.view(np.uint32)), "every kernel gives the same bits"


if __name__ == "__main__":
    main()
