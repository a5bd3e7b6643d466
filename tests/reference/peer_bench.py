"""Compares the engine with onnxruntime, OpenVINO, LiteRT, ncnn and tract as it comes on one network: results, then times, interleaved.

Usage: peer_bench.py RUN MODEL [--rounds N] [--threads 1 2] [--kernel NAME] [--peers NAME ...]

RUN is the binary of `cargo build --workspace --example run`; MODEL a file of `trainer quantize`, whose logits must equal onnxruntime's bit for bit, or
of `trainer export`, whose probabilities must be within 1e-5 of them. With --make a
file of random weights in that form, with --float in f32, is written to MODEL first: calibrated on noise so that the activations use their range.
LiteRT and ncnn get an int8 file in their own form (peer_files.py), tract the ONNX file, on one thread; their probabilities, and OpenVINO's, must be within 0.02
of ours. Every engine runs the same noise images, which allow no skipping, in turns of a few images, so that all see the same machine. In brackets: our
time as a part of each. On a machine that others use too, the least CPU time is the figure to trust (one thread; with more, onnxruntime's spin).

Needs onnx, onnxruntime, openvino, ai-edge-litert and ncnn from PyPI, or those that --peers names.
"""

import argparse
import glob
import itertools
import multiprocessing
import os
import statistics
import subprocess
import tempfile
import time

import numpy as np
import onnx
import peer_files
from onnx import TensorProto, helper, numpy_helper

IMAGE = (3, 256, 256)


def make(path, convolutions, dense, seed=1):
    """Writes a QDQ file of random weights; scales are chosen from the statistics of sums of random products."""
    rng = np.random.default_rng(seed)
    nodes, constants = [], []
    counter = 0

    def name(kind):
        nonlocal counter
        counter += 1
        return f"{kind}_{counter}"

    def constant(kind, array):
        constants.append(numpy_helper.from_array(array, name(kind)))
        return constants[-1].name

    def node(op, inputs, **attributes):
        output = name(op)
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def dequantize(value, scale):
        return node("DequantizeLinear", [value, constant("scale", np.float32(scale)), constant("zero", np.uint8(0))])

    def requantize(value, scale):
        quantized = node("QuantizeLinear", [value, constant("scale", np.float32(scale)), constant("zero", np.uint8(0))])
        return dequantize(quantized, scale)

    def layer(op, value, shape, scale, **attributes):
        inputs = int(np.prod(shape[1:]))
        spread = np.sqrt(inputs) * 73 * 148
        weights = rng.integers(-127, 128, shape, dtype=np.int8)
        scales = (rng.uniform(0.5, 2, shape[0]) / spread / scale).astype(np.float32)
        bias = rng.integers(-int(spread / 2), int(spread / 2), shape[0], dtype=np.int32)
        zero8, zero32 = np.zeros(shape[0], np.int8), np.zeros(shape[0], np.int32)
        w = node("DequantizeLinear", [constant("w", weights), constant("scale", scales), constant("zero", zero8)], axis=0)
        b_scale = constant("scale", np.float32(scale) * scales)
        b = node("DequantizeLinear", [constant("b", bias), b_scale, constant("zero", zero32)], axis=0)
        return node(op, [value, w, b], **attributes)

    scale, inputs, side = 1 / 255, 3, 256
    value = dequantize("image", scale)
    for outputs in convolutions:
        value = layer("Conv", value, (outputs, inputs, 3, 3), scale, kernel_shape=[3, 3])
        scale = 3 / 255
        value = requantize(value, scale)
        value = requantize(node("MaxPool", [value], kernel_shape=[2, 2], strides=[2, 2]), scale)
        inputs, side = outputs, (side - 2) // 2
    value = requantize(node("Flatten", [value], axis=1), scale)
    inputs *= side * side
    for outputs in dense:
        value = requantize(layer("Gemm", value, (outputs, inputs), scale, transB=1), scale)
        inputs = outputs
    value = layer("Gemm", value, (1, inputs), scale, transB=1)
    nodes[-1].output[0] = "logit"
    nodes.append(helper.make_node("Sigmoid", ["logit"], ["probability"]))
    save(path, nodes, constants)


def make_float(path, layers):
    """Writes quantized layers in real numbers, in the form of `trainer export`."""
    constants, nodes, value = [], [], "image"

    def constant(name, array):
        constants.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    def node(op, inputs, output, **attributes):
        nonlocal value
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        value = output

    node("Cast", [value], "cast", to=TensorProto.FLOAT)
    node("Mul", [value, constant("scale", layers[0].input_scale)], "scaled")
    for index, layer in enumerate(layers):
        per_output = layer.scales.reshape(-1, *[1] * (layer.weights.ndim - 1))
        w = constant(f"w{index}", layer.weights * per_output)
        b = constant(f"b{index}", layer.bias * (layer.input_scale * layer.scales))
        if layer.is_convolution:
            node("Conv", [value, w, b], f"conv{index}", kernel_shape=[3, 3])
            node("Relu", [value], f"relu{index}")
            node("MaxPool", [value], f"pool{index}", kernel_shape=[2, 2], strides=[2, 2])
            continue
        if layers[index - 1].is_convolution:
            node("Flatten", [value], "flat", axis=1)
        is_last = layer is layers[-1]
        node("Gemm", [value, w, b], "logit" if is_last else f"dense{index}", transB=1)
        if not is_last:
            node("Relu", [value], f"relu{index}")
    node("Sigmoid", [value], "probability")
    save(path, nodes, constants)


def save(path, nodes, constants):
    graph = helper.make_graph(
        nodes, "network",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", *IMAGE])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 1]) for n in ("logit", "probability")],
        constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    onnx.checker.check_model(model)
    onnx.save(model, path)


class Engine:
    """Our engine, in its own process."""

    def __init__(self, run, model, images, kernel, threads):
        command = [run, model, images, kernel, str(threads)]
        # Peers are started by spawning: a forked one would hold the other end of this pipe open.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.head = self.process.stdout.readline().strip()
        self.bits = self.head.split("logits ")[1].split()

    def ask(self, line):
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def cpu(self):
        """Nanoseconds on a CPU of all threads; exact while they wait for the next line."""
        tasks = glob.glob(f"/proc/{self.process.pid}/task/*/schedstat")
        return sum(int(open(task).read().split()[0]) for task in tasks)

    def burst(self, n):
        """Wall times of `n` images and the CPU time of one on average, in microseconds."""
        before = self.cpu()
        times = [float(t) for t in self.ask(n).split()]
        return times, (self.cpu() - before) / n / 1e3

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


class Peer:
    """A runtime in a process of its own, so that no other's threads are counted."""

    def __init__(self, start, model, threads, images):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, start, model, threads, images), daemon=True)
        self.process.start()
        other.close()
        self.bits = self.pipe.recv()

    def burst(self, n):
        self.pipe.send(n)
        return self.pipe.recv()

    def stop(self):
        self.pipe.send(0)
        self.process.join()


def serve(pipe, start, model, threads, images):
    prepare, infer = start(model, threads)
    images = [prepare(image) for image in images]
    pipe.send([f"{np.float32(infer(image)).view(np.uint32):08x}" for image in images])
    images = itertools.cycle(images)
    while n := pipe.recv():
        times, before = [], time.process_time()
        for image in itertools.islice(images, n):
            begun = time.perf_counter()
            infer(image)
            times.append((time.perf_counter() - begun) * 1e6)
        pipe.send((times, (time.process_time() - before) / n * 1e6))


# Each runtime: how it wants an image, which is not timed, and the logit of such a one.


def onnxruntime(model, threads):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return as_it_is, lambda image: session.run(["logit"], {"image": image})[0].ravel()[0]


def openvino(model, threads):
    import openvino as ov

    # As float files are compared: without the hint OpenVINO would round them to bf16 where the CPU has it.
    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(model, "CPU", hints)
    request = compiled.create_infer_request()
    return as_it_is, lambda image: request.infer({"image": image})["logit"].ravel()[0]


def litert(model, threads):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(f"{model}.tflite", num_threads=threads)
    interpreter.allocate_tensors()
    [image_in], [logit_out] = interpreter.get_input_details(), interpreter.get_output_details()

    def infer(image):
        interpreter.set_tensor(image_in["index"], image)
        interpreter.invoke()
        return interpreter.get_tensor(logit_out["index"]).ravel()[0] * np.float32(logit_out["quantization"][0])

    return lambda image: np.ascontiguousarray((image.transpose(0, 2, 3, 1) ^ 128).view(np.int8)), infer


def ncnn(model, threads):
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads
    assert net.load_param(f"{model}.param") == 0 and net.load_model(f"{model}.bin") == 0
    last = net.output_names()[0]

    def prepare(image):
        pixels = image[0] / np.float32(255)  # named, because a Mat does not keep it alive
        return ncnn.Mat(pixels).clone()

    def infer(image):
        extractor = net.create_extractor()
        extractor.input("image", image)
        return np.array(extractor.extract(last)[1]).ravel()[0]

    return prepare, infer


def as_it_is(image):
    return image


PEERS = {peer.__name__: peer for peer in (onnxruntime, openvino, litert, ncnn)}


def is_quantized(model):
    return any(node.op_type == "QuantizeLinear" for node in onnx.load(model).graph.node)


def compare(name, ours, theirs, is_quantized):
    """Asserts that a peer computes the same network."""
    if name == "onnxruntime" and is_quantized:
        assert ours == theirs, "engine and onnxruntime differ"
        return
    ours, theirs = (np.array([int(b, 16) for b in bits], np.uint32).view(np.float32).astype(float) for bits in (ours, theirs))
    change = np.abs(1 / (1 + np.exp(-ours)) - 1 / (1 + np.exp(-theirs))).max()
    print(f"  probabilities differ from {name}'s by at most {change:.1e}")
    assert change <= (0.02 if is_quantized else 1e-5), f"engine and {name} differ"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("model")
    parser.add_argument("--make", help="convolutions/hidden dense layers to write, as 512,256,128/256")
    parser.add_argument("--float", action="store_true", help="writes it in f32")
    parser.add_argument("--kernel", default="fastest")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--burst", type=int, default=2)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--peers", nargs="*", default=[*PEERS, "tract"])
    arguments = parser.parse_args()
    model = arguments.model
    if arguments.make:
        convolutions, dense = ([int(n) for n in part.split(",") if n] for part in arguments.make.split("/"))
        make(model, convolutions, dense)
        if arguments.float:
            make_float(model, peer_files.read_chain(model))

    images = np.random.default_rng(7).integers(0, 256, (4, 1, *IMAGE), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        images_file = os.path.join(folder, "images.u8")
        images.tofile(images_file)
        for threads in arguments.threads:
            bench(arguments, folder, images, images_file, threads)


def bench(arguments, folder, images, images_file, threads):
    model, is_int8 = arguments.model, is_quantized(arguments.model)
    engine = Engine(arguments.run, model, images_file, arguments.kernel, threads)
    engines, files = {"engine": engine}, {}
    if is_int8 and {"litert", "ncnn"} & set(arguments.peers):
        stem, layers = os.path.join(folder, "network"), peer_files.read_chain(model)
        logits = np.array([int(bits, 16) for bits in engine.bits], np.uint32).view(np.float32)
        peer_files.write_litert(layers, f"{stem}.tflite", float(np.abs(logits).max() / 100))
        peer_files.write_ncnn(layers, stem)
        files = {"litert": stem, "ncnn": stem}
    for name in arguments.peers:
        if name == "tract" and threads == 1:
            engines[name] = Engine(arguments.run, model, images_file, name, threads)
        elif name in PEERS and (is_int8 or name not in ("litert", "ncnn")):
            engines[name] = Peer(PEERS[name], files.get(name, model), threads, images)
    print(f"{threads} thread(s), load {os.getloadavg()[0]:.1f}; {engine.head}")
    for name, peer in engines.items():
        print(f"  {name:12} logit bits {' '.join(peer.bits)}")
    for name, peer in engines.items():
        if peer is not engine:
            compare(name, engine.bits, peer.bits, is_int8)
    wall, cpu, alone = ({name: [] for name in engines} for _ in range(3))
    for _ in range(arguments.rounds):
        for name, engine in engines.items():
            alone[name] += engine.burst(1)[0]  # brings its weights and code back into the caches
            times, of_one = engine.burst(arguments.burst)
            wall[name] += times
            cpu[name].append(of_one)
    columns = {
        "one slice after the others'": {name: statistics.median(alone[name]) for name in engines},
        "wall median": {name: statistics.median(wall[name]) for name in engines},
        "wall least": {name: min(wall[name]) for name in engines},
        "CPU median": {name: statistics.median(cpu[name]) for name in engines},
        "CPU least": {name: min(cpu[name]) for name in engines},
    }
    for name in engines:
        figures = [f"{what} {of[name] / 1e3:8.3f} ms ({of['engine'] / of[name]:.3f})" for what, of in columns.items()]
        print(f"  {name:12} {', '.join(figures)}")
    for engine in engines.values():
        engine.stop()


if __name__ == "__main__":
    main()
