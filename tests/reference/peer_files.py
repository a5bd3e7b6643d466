"""The network of an int8 file of ours in the forms of LiteRT and ncnn, which read no ONNX.

In: a file of `trainer quantize` that is one chain of convolutions and dense layers. Out: a .tflite file with the same integers (activations less 128,
as LiteRT has them signed) and ncnn's text and weights (activations of 7 bits, as ncnn has them signed and symmetric). Imported by peer_bench.py.
"""

import struct

import numpy as np
import onnx
from onnx import numpy_helper


class Layer:
    """One quantized convolution or dense layer: weights s8 [output, ...], their scales, i32 bias, scales of input and output."""

    def __init__(self, weights, scales, bias, input_scale):
        self.weights, self.scales, self.bias, self.input_scale = weights, scales, bias, np.float32(input_scale)
        self.output_scale = None
        self.is_convolution = weights.ndim == 4

    @property
    def n_outputs(self):
        return len(self.bias)


def read_chain(path):
    """The layers in order; the last has no output scale."""
    graph = onnx.load(path).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    writers = {output: node for node in graph.node for output in node.output}

    def dequantized(value):
        node = writers[value]
        assert node.op_type == "DequantizeLinear", f"{node.name}: no quantized parameter"
        return [numpy_helper.to_array(constants[name]) for name in node.input[:2]]

    layers = []
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        weights, scales = dequantized(node.input[1])
        bias, bias_scales = dequantized(node.input[2])
        if node.op_type == "Gemm" and not any(a.name == "transB" and a.i for a in node.attribute):
            weights = weights.T
        scales = np.broadcast_to(scales, bias.shape)
        layers.append(Layer(weights, scales, bias, (bias_scales / scales).ravel()[0]))
    for layer, following in zip(layers, layers[1:]):
        layer.output_scale = following.input_scale
    return layers


def write_ncnn(layers, stem, side=256):
    """Writes STEM.param and STEM.bin, as ncnn2int8 would: weights s8, everything between layers dequantized."""
    lines, blob, channels = [], bytearray(), 3
    previous = "image"

    def add(kind, name, parameters):
        nonlocal previous
        lines.append(f"{kind:16} {name:16} 1 1 {previous} {name} {parameters}")
        previous = name

    for index, layer in enumerate(layers):
        is_last = layer is layers[-1]
        weights = np.ascontiguousarray(layer.weights)
        if layer.is_convolution:
            add("Convolution", f"conv{index}", f"0={layer.n_outputs} 1=3 5=1 6={weights.size} 8=2 9=1")
            add("Pooling", f"pool{index}", "0=0 1=2 2=2 5=1")
        else:
            add("InnerProduct", f"dense{index}", f"0={layer.n_outputs} 1=1 2={weights.size} 8=2" + ("" if is_last else " 9=1"))
        data = weights.tobytes()
        blob += struct.pack("<I", 0x000D4B38) + data + bytes(-len(data) % 4)
        blob += (layer.bias * (layer.input_scale * layer.scales)).astype("<f4").tobytes()
        blob += (1 / layer.scales).astype("<f4").tobytes()
        blob += struct.pack("<f", 127 / (255 * layer.input_scale))
    with open(f"{stem}.param", "w") as file:
        file.write(f"7767517\n{len(lines) + 1} {len(lines) + 1}\nInput            image            0 1 image\n" + "\n".join(lines) + "\n")
    with open(f"{stem}.bin", "wb") as file:
        file.write(blob)
    return previous


def write_litert(layers, path, logit_scale, side=256):
    """Writes a .tflite file; the logit is s8 in steps of `logit_scale`."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.subgraphs = 3, [graph]
    model.buffers = [schema.BufferT()]
    graph.tensors, graph.operators, graph.name = [], [], "network"
    kinds = [schema.BuiltinOperator.CONV_2D, schema.BuiltinOperator.MAX_POOL_2D, schema.BuiltinOperator.RESHAPE, schema.BuiltinOperator.FULLY_CONNECTED]
    model.operatorCodes = []
    for kind, version in zip(kinds, (3, 2, 1, 4)):
        code = schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = kind
        code.version = version
        model.operatorCodes.append(code)

    def tensor(name, shape, kind, scales=None, zero=0, data=None):
        t = schema.TensorT()
        t.name, t.shape, t.type, t.buffer = name, list(map(int, shape)), kind, 0
        if scales is not None:
            t.quantization = q = schema.QuantizationParametersT()
            q.scale = np.atleast_1d(np.float32(scales))
            q.zeroPoint = np.full(len(q.scale), zero, np.int64)
        if data is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)
            model.buffers.append(buffer)
            t.buffer = len(model.buffers) - 1
        graph.tensors.append(t)
        return len(graph.tensors) - 1

    def operator(kind, inputs, output, options_kind, options):
        op = schema.OperatorT()
        op.opcodeIndex, op.inputs, op.outputs = kinds.index(kind), inputs, [output]
        op.builtinOptionsType, op.builtinOptions = options_kind, options
        graph.operators.append(op)

    s8, s32 = schema.TensorType.INT8, schema.TensorType.INT32
    relu, none = schema.ActivationFunctionType.RELU, schema.ActivationFunctionType.NONE
    channels = layers[0].weights.shape[1]
    value = tensor("image", (1, side, side, channels), s8, layers[0].input_scale, -128)
    graph.inputs = [value]
    is_flat = False
    for index, layer in enumerate(layers):
        is_last = layer is layers[-1]
        scale, zero = (logit_scale, 0) if is_last else (layer.output_scale, -128)
        if layer.is_convolution:
            weights = layer.weights.transpose(0, 2, 3, 1)
        elif not is_flat:
            flat = tensor("flat", (1, side * side * channels), s8, layer.input_scale, -128)
            shape = tensor("shape", (2,), s32, data=np.array([1, side * side * channels], "<i4"))
            options = schema.ReshapeOptionsT()
            options.newShape = [1, side * side * channels]
            operator(schema.BuiltinOperator.RESHAPE, [value, shape], flat, schema.BuiltinOptions.ReshapeOptions, options)
            value, is_flat = flat, True
            weights = layer.weights.reshape(-1, channels, side, side).transpose(0, 2, 3, 1).reshape(layer.n_outputs, -1)
        else:
            weights = layer.weights
        w = tensor(f"weights{index}", weights.shape, s8, layer.scales, 0, weights)
        b = tensor(f"bias{index}", (layer.n_outputs,), s32, layer.input_scale * layer.scales, 0, layer.bias.astype("<i4"))
        if layer.is_convolution:
            convolved = tensor(f"conv{index}", (1, side - 2, side - 2, layer.n_outputs), s8, scale, zero)
            options = schema.Conv2DOptionsT()
            options.padding, options.strideW, options.strideH = schema.Padding.VALID, 1, 1
            options.fusedActivationFunction = relu
            operator(schema.BuiltinOperator.CONV_2D, [value, w, b], convolved, schema.BuiltinOptions.Conv2DOptions, options)
            side, channels = (side - 2) // 2, layer.n_outputs
            value = tensor(f"pool{index}", (1, side, side, channels), s8, scale, zero)
            options = schema.Pool2DOptionsT()
            options.padding, options.fusedActivationFunction = schema.Padding.VALID, none
            options.strideW = options.strideH = options.filterWidth = options.filterHeight = 2
            operator(schema.BuiltinOperator.MAX_POOL_2D, [convolved], value, schema.BuiltinOptions.Pool2DOptions, options)
        else:
            out = tensor("logit" if is_last else f"dense{index}", (1, layer.n_outputs), s8, scale, zero)
            options = schema.FullyConnectedOptionsT()
            options.fusedActivationFunction = none if is_last else relu
            operator(schema.BuiltinOperator.FULLY_CONNECTED, [value, w, b], out, schema.BuiltinOptions.FullyConnectedOptions, options)
            value = out
    graph.outputs = [value]
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    with open(path, "wb") as file:
        file.write(builder.Output())
