"""Compares every intermediate tensor of an int8 file between the engine and onnxruntime, bit for bit.

Usage: intermediates.py RUN MODEL [--projections N]

RUN is the binary of `cargo build --workspace --example run`. The engine hands out logits only, so the file is cut after each pooled map and each
hidden layer and ended by a dense layer with random weights of -1 and 1: the logit is then an exact integer, a projection of the tensor, in both. One
element that differs changes every projection; several that cancel out in one do not in all. Sums stay below 2^24, where f32 is exact.
"""

import argparse
import os
import tempfile

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from peer_bench import Engine


def cuts(model):
    """Values after the last DequantizeLinear of each layer, with their shapes for one image."""
    nodes = model.graph.node
    readers = {name: node for node in nodes for name in node.input}
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    found = []
    for node in nodes:
        if node.op_type == "MaxPool" or (node.op_type == "Gemm" and readers[node.output[0]].op_type == "QuantizeLinear"):
            value = readers[readers[node.output[0]].output[0]].output[0]
            found.append((node.name or node.output[0], value))
            probe.graph.output.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    shapes = session.run([value for _, value in found], {"image": np.zeros((1, 3, 256, 256), np.uint8)})
    return [(name, value, array.shape) for (name, value), array in zip(found, shapes)]


def projected(model, value, shape, seed):
    """The file up to `value`, then a projection of it."""
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    graph, size = cut.graph, int(np.prod(shape))
    producers = {name: node for node in graph.node for name in node.output}
    dequantize = producers[value]
    needed, nodes = [value], []
    while needed:
        node = producers.get(needed.pop())
        if node is not None and node not in nodes:
            nodes.append(node)
            needed += node.input
    nodes = [node for node in graph.node if node in nodes]
    scale, zero = dequantize.input[1:3]
    constants = {
        "p_weights": np.random.default_rng(seed).choice(np.array([-1, 1], np.int8), (1, size)),
        "p_scale": np.ones(1, np.float32),
        "p_zero": np.zeros(1, np.int8),
    }
    if len(shape) == 4:
        nodes += [
            helper.make_node("Flatten", [value], ["p_flat"], axis=1),
            helper.make_node("QuantizeLinear", ["p_flat", scale, zero], ["p_q"]),
            helper.make_node("DequantizeLinear", ["p_q", scale, zero], ["p_dq"]),
        ]
        value = "p_dq"
    nodes += [
        helper.make_node("DequantizeLinear", ["p_weights", "p_scale", "p_zero"], ["p_w"], axis=0),
        helper.make_node("Gemm", [value, "p_w"], ["logit"], name="projection", transB=1),
    ]
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    kept += [numpy_helper.from_array(array, name) for name, array in constants.items()]
    new = helper.make_graph(nodes, "cut", graph.input, [helper.make_tensor_value_info("logit", TensorProto.FLOAT, ["N", 1])], kept)
    return helper.make_model(new, opset_imports=cut.opset_import, ir_version=cut.ir_version)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("model")
    parser.add_argument("--projections", type=int, default=3)
    parser.add_argument("--kernel", default="fastest")
    arguments = parser.parse_args()
    model = onnx.load(arguments.model)
    random = np.random.default_rng(11)
    images = random.integers(0, 256, (3, 1, 3, 256, 256), dtype=np.uint8)
    images[1, :, :, 60:220, :150] = 59  # a constant region, which the engine skips
    with tempfile.TemporaryDirectory() as folder:
        raw, path = os.path.join(folder, "images"), os.path.join(folder, "cut.onnx")
        images.tofile(raw)
        for name, value, shape in cuts(model):
            for seed in range(arguments.projections):
                onnx.save(projected(model, value, shape, seed), path)
                engine = Engine(arguments.run, path, raw, arguments.kernel, 1)
                engine.stop()
                session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
                expected = [session.run(["logit"], {"image": image})[0].ravel()[0] for image in images]
                bits = [f"{np.float32(value).view(np.uint32):08x}" for value in expected]
                assert engine.bits == bits, (name, seed, engine.bits, bits)
            print(f"{name:12} {list(shape)}: {arguments.projections} projections of {len(images)} images equal, bit for bit")


if __name__ == "__main__":
    main()
