#!/usr/bin/env python3
"""Asks the real cuDNN, on a machine without a GPU, whether it takes the trainer's convolutions on a Hopper card.

cuDNN 9.8 and later plan for a device that is only described (the properties of an H100 stand below). The descriptors, attributes and types are those of
trainer/src/gpu/convolution.rs. For each pass of each convolution of the final model at full width, and of each different one in the ONNX files that are named (the transfer learners', made by
`trainer export --random-init --model resnet50 --width 1 --seed 1 --out resnet50.onnx`): how many of cuDNN's proposals can be planned, and their workspace. Exit 1 where a pass has none, or
none of the first eight, which the trainer times, is on the matrix units.

    pip download --no-deps nvidia-cudnn-cu13==9.13.0.50 nvidia-cuda-runtime==13.0.96   # unpack all
    pip download --no-deps nvidia-cublas==13.1.0.3; pip install onnx   # where ONNX files are named
    LD_LIBRARY_PATH=nvidia/cudnn/lib:nvidia/cu13/lib tests/reference/cudnn_plans.py nvidia/cudnn/lib [MODEL.onnx...]
"""

import ctypes
import json
import sys

H100 = {
    "cudaDeviceId": 0, "deviceName": "NVIDIA H100 80GB HBM3", "deviceVer": 900, "driverVer": 13000, "cudnnVersion": 91300,
    "maxGridSize": [2147483647, 65535, 65535], "maxBlockSize": [1024, 1024, 64], "regsPerBlock": 65536, "multiProcessorCount": 132,
    "smClockRateKHz": 1980000, "memClockRateKHz": 2619000, "l2CacheSize": 52428800, "warpSize": 32, "maxSharedMemoryPerBlock": 49152,
    "maxSharedMemoryPerBlockOptin": 232448, "reservedSharedMemoryPerBlock": 1024, "maxRegistersPerSM": 65536, "pciDeviceId": 0, "maxCtasPerSM": 32,
    "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048, "isTccDriver": 0, "supportCoopLaunch": 1, "totalGlobalMem": 85017755648,
}  # fmt: skip
BF16, F32 = 9, 0
TENSOR_CORE = 0
# Proposals that the trainer times at the least.
TIMED = 8
# Descriptor, and its attributes alpha, beta, convolution, input, filter, output.
PASSES = {
    "forward": (10, 700, 701, 702, 704, 703, 705),
    "input gradient": (12, 706, 707, 708, 710, 709, 711),
    "filter gradient": (11, 712, 713, 714, 716, 715, 717),
}
DATA_TYPE, INT64, FLOAT, MODE, HEURISTIC, NOTE, DESCRIPTOR, CHAR = 1, 3, 4, 7, 8, 11, 15, 24

folder = sys.argv[1]
for name in ["graph", "ops", "engines_runtime_compiled", "engines_precompiled", "heuristic"]:
    ctypes.CDLL(f"{folder}/libcudnn_{name}.so.9", mode=ctypes.RTLD_GLOBAL)
cudnn = ctypes.CDLL(f"{folder}/libcudnn.so.9", mode=ctypes.RTLD_GLOBAL)
H100["cudnnVersion"] = cudnn.cudnnGetVersion()


def check(status, what):
    if status:
        sys.exit(f"cuDNN refuses {what}: status {status}")


def create(kind):
    descriptor = ctypes.c_void_p()
    check(cudnn.cudnnBackendCreateDescriptor(kind, ctypes.byref(descriptor)), f"descriptor {kind}")
    return descriptor.value


def put(descriptor, name, kind, values, c_type):
    array = (c_type * len(values))(*values)
    check(cudnn.cudnnBackendSetAttribute(ctypes.c_void_p(descriptor), name, kind, ctypes.c_int64(len(values)), array), f"attribute {name}")


def link(descriptor, name, other):
    put(descriptor, name, DESCRIPTOR, [other], ctypes.c_void_p)


def get(descriptor, name, kind, array):
    n = ctypes.c_int64()
    check(cudnn.cudnnBackendGetAttribute(ctypes.c_void_p(descriptor), name, kind, ctypes.c_int64(len(array)), ctypes.byref(n), array), f"reading {name}")
    return min(n.value, len(array))


def finalize(descriptor):
    return cudnn.cudnnBackendFinalize(ctypes.c_void_p(descriptor))


def tensor(identity, data_type, sizes):
    _, channels, rows, columns = sizes
    made = create(17)
    put(made, 901, DATA_TYPE, [data_type], ctypes.c_int)
    put(made, 902, INT64, sizes, ctypes.c_int64)
    put(made, 903, INT64, [rows * columns * channels, 1, columns * channels, channels], ctypes.c_int64)
    put(made, 906, INT64, [identity], ctypes.c_int64)
    put(made, 900, INT64, [16], ctypes.c_int64)
    check(finalize(made), f"tensor {sizes}")
    return made


def plans(device, name, data_type, n, shape):
    channels_in, channels_out, sides, kernel, stride, padding = shape
    out = [(sides[d] + 2 * padding[d] - kernel[d]) // stride + 1 for d in range(2)]
    tensors = [
        tensor(1, data_type, [n, channels_in, *sides]),
        tensor(2, data_type, [channels_out, channels_in, *kernel]),
        tensor(3, data_type, [n, channels_out, *out]),
    ]
    convolution = create(1)
    put(convolution, 100, DATA_TYPE, [F32], ctypes.c_int)
    put(convolution, 101, MODE, [1], ctypes.c_int)
    put(convolution, 106, INT64, [2], ctypes.c_int64)
    for attribute, values in [(102, [1, 1]), (103, [stride, stride]), (105, padding), (104, padding)]:
        put(convolution, attribute, INT64, values, ctypes.c_int64)
    check(finalize(convolution), "convolution")
    kind, alpha, beta, by, *names = PASSES[name]
    operation = create(kind)
    put(operation, alpha, FLOAT, [1.0], ctypes.c_float)
    put(operation, beta, FLOAT, [0.0], ctypes.c_float)
    link(operation, by, convolution)
    for attribute, value in zip(names, tensors):
        link(operation, attribute, value)
    check(finalize(operation), name)
    graph = create(15)
    link(graph, 801, operation)
    check(finalize(graph), f"graph of {name}")
    heuristic = create(4)
    put(heuristic, 200, HEURISTIC, [3], ctypes.c_int)
    link(heuristic, 201, graph)
    link(heuristic, 204, device)
    check(finalize(heuristic), "heuristic")
    proposals = (ctypes.c_void_p * 24)(*[create(3) for _ in range(24)])
    found = []
    for proposal in proposals[: get(heuristic, 202, DESCRIPTOR, proposals)]:
        engine = (ctypes.c_void_p * 1)(create(2))
        get(proposal, 300, DESCRIPTOR, engine)
        notes = (ctypes.c_int * 16)()
        is_on_matrix_units = TENSOR_CORE in notes[: get(engine[0], 1303, NOTE, notes)]
        plan = create(5)
        link(plan, 401, proposal)
        link(plan, 407, device)
        if finalize(plan) == 0:
            size = (ctypes.c_int64 * 1)()
            get(plan, 402, INT64, size)
            found.append((is_on_matrix_units, size[0]))
    return found


def shapes_of(path):
    """The different convolutions of an ONNX file, as the trainer has them on a GPU: channels filled up to a multiple of 8."""
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    sides = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim][2:] for value in [*model.graph.input, *model.graph.value_info]}
    kernels = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "Conv":
            attributes = {attribute.name: list(attribute.ints) for attribute in node.attribute}
            channels_out, channels_in, *kernel = kernels[node.input[1]]
            padding = attributes.get("pads", [0] * 4)[:2]
            filled = [-(-channels // 8) * 8 for channels in (channels_in, channels_out)]
            shape = (*filled, sides[node.input[0]], kernel, attributes.get("strides", [1])[0], padding)
            found[str(shape)] = (node.name or node.output[0], shape)
    return found.values()


device = create(38)
text = json.dumps(H100).encode()
check(cudnn.cudnnBackendSetAttribute(ctypes.c_void_p(device), 2702, CHAR, ctypes.c_int64(len(text) + 1), ctypes.c_char_p(text)), "device")
check(finalize(device), "the description of an H100")
print(f"cuDNN {cudnn.cudnnGetVersion()}, batch 50, bf16")
is_complete = True
models = {"final": [("conv2", (512, 256, [127, 127], [3, 3], 1, [0, 0])), ("conv3", (256, 128, [62, 62], [3, 3], 1, [0, 0]))]}
models.update({path: shapes_of(path) for path in sys.argv[2:]})
for model, layers in models.items():
    for layer, shape in layers:
        for name in PASSES:
            found = plans(device, name, BF16, 50, shape)
            fast = sum(is_fast for is_fast, _ in found[:TIMED])
            is_complete &= fast > 0
            print(f"{model} {layer} {name}: {len(found)} plans, {fast} of the first {TIMED} on matrix units, workspace up to {max([b for _, b in found], default=0)} bytes")
sys.exit(0 if is_complete else 1)
