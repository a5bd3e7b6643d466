"""Holds exported model files against other runtimes.

  python onnx_check.py --float model.onnx [--int8 model-int8.onnx] [--images CACHE] [--n 8]
  python onnx_check.py --float RUN/model.onnx --int8 RUN/model-int8.onnx --images RUN/cache --predictions RUN/predictions.csv --n 200
  PE_EDGE_PARITY_OUT=DIR cargo test -p tests --test parity; python onnx_check.py --parity DIR

Checks, for each file given: onnx.checker with full check; opset 13, IR 7, names and types of inputs and outputs, a manifest. f32: onnxruntime and
OpenVINO agree within 1e-4 x max(1, |logit|), with --candle (one logit a line, candle's) too. int8:
onnxruntime's optimised graph holds QLinearConv, MaxPool or NhwcMaxPool and QGemm and no float operator but the sigmoid; its logits equal
those of the self-test in the manifest (our engine's, scalar kernel), and with --engine or --predictions (of
`trainer evaluate --model INT8`) those of the images, within 1e-6 relative; OpenVINO's are within
the bound below. Where the manifest has an operating point, all decide alike on every image. --parity does all of it for every network of the table, on
the phantom slices that the test wrote and, where it had PE_EDGE_REAL_DATA, on a real series of 40 slices.

Why OpenVINO's bound is what it is: it computes the same i32 sums, but requantizes with a reciprocal and fused multiply-adds, so an activation that lies
within half an f32 ulp of a rounding boundary can fall to the other side: a change of one level. What one flipped level at layer l does to the
logit is at most its scale times the largest path gain behind it; rather than that (very loose) bound we state the statistical one: flips are
independent, of magnitude one level, so the logit's change has at most the size of the quantization noise itself, whose variance is a twelfth of a
level squared for every activation: OpenVINO may differ from onnxruntime by no more than int8 differs from f32, floor 1e-3.

Twice that where the graph adds: OpenVINO adds inside the convolution before it, whose output it then does not round to a level (of ResNet-50's first
Add 19 % of the outputs are one level off for it, all before it equal). Its error is then another sample of the same noise, and the two differ by both.

On x86 without VNNI OpenVINO sums pairs of u8 x s8 products in 16 bits, which saturate: its logits are wrong there, for
any file with weights over 64. Both runtimes then get a copy whose weights are halved, scales doubled: a pair is at most 2 x 255 x 64 = 32,640.

Research use only, not a medical device.
"""

import argparse
import csv
import json
import os
import sys
import tempfile

import numpy as np
import onnx
import onnxruntime as ort

SIDE = 256
FLOAT_TOLERANCE = 1e-4
INT8_TOLERANCE = 1e-6
MASK = (1 << 64) - 1


def split_mix(state):
    """SplitMix64 (Steele et al. 2014): new state and output."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return state, z ^ (z >> 31)


def self_test_image(seed):
    """The image of shared::selftest: blocks of random brightness with noise on top, written a second time from its description."""
    per_row = SIDE // 32
    state, blocks = seed, []
    for _ in range(3 * per_row * per_row):
        state, out = split_mix(state)
        blocks.append(out >> 56)
    blocks = np.array(blocks, np.int32).reshape(3, per_row, per_row).repeat(32, 1).repeat(32, 2)
    # The remaining states are an arithmetic sequence, so numpy can mix them all at once.
    with np.errstate(over="ignore"):
        steps = np.arange(1, 3 * SIDE * SIDE + 1, dtype=np.uint64)
        z = np.uint64(state) + steps * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    noise = (z >> np.uint64(56)).astype(np.int32).reshape(3, SIDE, SIDE) // 4
    return np.maximum(np.minimum(blocks + noise, 255) - 32, 0).astype(np.uint8)


def check_form(path):
    """onnx.checker, versions, signature; returns the manifest."""
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == 7, model.ir_version
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 13)], model.opset_import
    signature = [
        (v.name, v.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
        for v in list(model.graph.input) + list(model.graph.output)
    ]
    assert signature == [
        ("image", onnx.TensorProto.UINT8, ["N", 3, SIDE, SIDE]),
        ("logit", onnx.TensorProto.FLOAT, ["N", 1]),
        ("probability", onnx.TensorProto.FLOAT, ["N", 1]),
    ], signature
    assert all(t.raw_data or np.prod(t.dims) == 0 for t in model.graph.initializer), "weights are raw data"
    known = {v.name for v in list(model.graph.value_info) + list(model.graph.output)}
    computed = {o for n in model.graph.node for o in n.output if not o.endswith((".weight", ".bias"))}
    assert computed <= known, computed - known
    return json.loads({p.key: p.value for p in model.metadata_props}["pe.manifest"])


def onnxruntime_logits(path, images):
    """Logits, and the operators after onnxruntime's own optimisation."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Without VNNI its u8 x s8 kernels saturate at 16 bit; this makes it use the exact ones.
        options.add_session_config_entry("session.x64quantprecision", "1")
        options.optimized_model_filepath = os.path.join(folder, "optimised.onnx")
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        operators = [n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node]
    logits = [session.run(["logit"], {"image": image[None]})[0] for image in images]
    return np.concatenate(logits).ravel(), operators


def openvino_logits(path, images):
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array([compiled({"image": image[None]})["logit"].ravel()[0] for image in images])


def saturates():
    """Whether this CPU has to multiply u8 by s8 with vpmaddubsw."""
    with open("/proc/cpuinfo") as file:
        flags = [set(line.split()) for line in file if line.startswith("flags")]
    return bool(flags) and not flags[0] & {"avx512_vnni", "avx_vnni"}


def without_saturation(path, to):
    """The same network with weights of 7 bits: halved, at doubled scales."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if tensor.name.endswith((".weight_quantized", ".bias_quantized")):
            array = np.rint(array / 2).astype(array.dtype)
        elif tensor.name.endswith((".weight_scale", ".bias_scale")):
            array = array * 2
        else:
            continue
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, to)


def check_openvino(path, images, f32):
    adds = any(node.op_type == "Add" for node in onnx.load(path).graph.node)
    with tempfile.TemporaryDirectory() as folder:
        if saturates():
            copy = os.path.join(folder, "copy.onnx")
            without_saturation(path, copy)
            path = copy
            print("int8: no VNNI here, so OpenVINO gets weights of 7 bits, as does onnxruntime beside it")
        int8, _ = onnxruntime_logits(path, images)
        openvino = openvino_logits(path, images)
        difference = float(np.max(np.abs(openvino - int8)))
    noise = float(np.max(np.abs(int8 - f32)))
    allowed = max(2 * noise if adds else noise, 1e-3)
    print(f"int8: OpenVINO and onnxruntime differ by {difference:.2e}, allowed {allowed:.2e} (int8 and f32 differ by {noise:.2e})")
    assert difference <= allowed
    return openvino


def relative(a, b):
    return float(np.max(np.abs(a - b) / np.maximum(1, np.abs(b))))


def load_images(path, n, rows=None):
    """The self-test's images, n of the rows of a cache folder, or all of a file of u8 [n, 3, 256, 256]."""
    if path is None:
        return [self_test_image(seed) for seed in range(1, n + 1)]
    if os.path.isfile(path):
        return list(np.fromfile(path, np.uint8).reshape(-1, 3, SIDE, SIDE))
    tensors = np.memmap(os.path.join(path, "tensors.u8"), np.uint8, "r").reshape(-1, 3, SIDE, SIDE)
    rows = spread(range(len(tensors)) if rows is None else rows, n)
    return [np.array(tensors[row]) for row in rows]


def spread(values, n):
    """n of the values, from the first to the last."""
    return [values[index] for index in np.linspace(0, len(values) - 1, min(n, len(values))).astype(int)]


def read_predictions(path, n):
    """Cache rows in a predictions.csv and n of its logits."""
    with open(path, newline="") as file:
        table = list(csv.DictReader(file))
    return [int(line["row"]) for line in table], np.array(spread([line["logit"] for line in table], n), np.float32)


def read_logits(path):
    return np.loadtxt(path, np.float32, ndmin=1)


def hold(what, a, b, tolerance):
    """Fails where logits differ by more than the tolerance, relative."""
    difference = relative(a, b)
    print(f"{what} differ by {difference:.2e}, allowed {tolerance:.0e}, {len(b)} images")
    assert difference <= tolerance


def check_float(path, images, candle):
    """Holds an f32 file; returns onnxruntime's logits."""
    check_form(path)
    f32, _ = onnxruntime_logits(path, images)
    openvino = openvino_logits(path, images)
    hold("f32: onnxruntime and OpenVINO", openvino, f32, FLOAT_TOLERANCE)
    if candle:
        candle = read_logits(candle)
        hold("f32: onnxruntime and candle", f32, candle, FLOAT_TOLERANCE)
        hold("f32: OpenVINO and candle", openvino, candle, FLOAT_TOLERANCE)
    return f32


def check_int8(path, images, f32, engine):
    manifest = check_form(path)
    theirs, operators = onnxruntime_logits(path, images)
    print("int8: onnxruntime runs", " ".join(dict.fromkeys(operators)))
    allowed = {"Transpose", "QLinearConv", "NhwcMaxPool", "MaxPool", "Flatten", "QGemm", "Sigmoid",
               "QLinearAdd", "QLinearConcat", "QLinearAveragePool", "QLinearGlobalAveragePool"}
    assert set(operators) <= allowed, set(operators) - allowed
    convolutions = sum(n.op_type == "Conv" for n in onnx.load(path).graph.node)
    dense = sum(n.op_type == "Gemm" for n in onnx.load(path).graph.node)
    assert operators.count("QLinearConv") == convolutions and operators.count("QGemm") == dense

    seeds = manifest["self_test"]
    assert seeds, "the int8 file states no self-test"
    ours = np.array([t["logit_bits"] for t in seeds], np.uint32).view(np.float32)
    on_seeds, _ = onnxruntime_logits(path, [self_test_image(t["seed"]) for t in seeds])
    hold("int8: onnxruntime and the manifest's self-test", on_seeds, ours, INT8_TOLERANCE)
    if engine is not None:
        hold("int8: onnxruntime and the engine", theirs, engine, INT8_TOLERANCE)
    openvino = check_openvino(path, images, f32)
    for point in manifest["operating_points"][:1]:
        threshold = point["logit_threshold"]
        for name, logits in [("OpenVINO", openvino), ("the engine", engine)]:
            if logits is not None:
                assert ((theirs >= threshold) == (logits >= threshold)).all(), f"{name} decides otherwise than onnxruntime"
                print(f"int8: {name} and onnxruntime decide alike at {point['name']} on all {len(images)} images")
        alike = np.mean((theirs >= threshold) == (f32 >= threshold))
        print(f"int8: f32 decides alike on {alike:.4f} of them")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = parser.add_mutually_exclusive_group(required=True)
    files.add_argument("--float", help="f32 file")
    files.add_argument("--parity", help="folder that tests/tests/parity.rs wrote")
    parser.add_argument("--int8", help="the int8 file made of it; left out for models that are deployed as f32")
    parser.add_argument("--images", help="cache folder or file of u8; without it the self-test's images")
    parser.add_argument("--candle", help="text file, one logit a line, candle's on the same images")
    parser.add_argument("--engine", help="text file, one logit a line, our engine's of the int8 file on the same images")
    parser.add_argument("--predictions", help="predictions.csv of the int8 file on the cache of --images: its rows, the engine's logits")
    parser.add_argument("--n", type=int, default=8)
    args = parser.parse_args()
    if args.parity:
        images = load_images(os.path.join(args.parity, "images.u8"), 0)
        for file in sorted(os.listdir(args.parity)):
            if file.endswith(".int8.onnx"):
                name = os.path.join(args.parity, file.removesuffix(".int8.onnx"))
                print(f"--- {os.path.basename(name)}")
                f32 = check_float(name + ".onnx", images, name + ".candle.txt")
                check_int8(name + ".int8.onnx", images, f32, read_logits(name + ".engine.txt"))
    else:
        engine = read_logits(args.engine) if args.engine else None
        rows = None
        if args.predictions:
            rows, engine = read_predictions(args.predictions, args.n)
        images = load_images(args.images, args.n, rows)
        f32 = check_float(args.float, images, args.candle)
        if args.int8:
            check_int8(args.int8, images, f32, engine)
    print("all checks passed; research use only, not a medical device")


if __name__ == "__main__":
    sys.exit(main())
