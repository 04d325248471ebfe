"""Google's weights for Lyra V2, the codec whose shape is SoundStream's default.

    network, weights = load_lyra()    # fetched and converted once, then read from the user's cache

Lyra V2 (Apache-2.0, https://github.com/google/lyra) publishes three TFLite graphs: encoder, decoder
and quantizer. Their constants stand in the order in which the layers run, and are copied here into
a `SoundStream`, in float where the original rounds inner activations to 8 bits.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from program import UserError, download, load_tensors
from soundstream import SoundStream, Upsample, restore_soundstream, save_soundstream

URL = "https://github.com/google/lyra/raw/v1.3.2/lyra/model_coeffs/"
SHA256 = """
    soundstream_encoder.tflite 237da0b16226fb0a68d49551c81bebf614e42142af72764448359f68581e88f1
    lyragan.tflite 50e7839cda4f30599a3a34cfaddcd9c98449b049eee884e1a74295780448ad06
    quantizer.tflite 841ee05989687d32d1f616a8ad1419fc7eda37599d3c05c7cf5a0d60ccf8ac5c
"""
FILES = dict(line.split() for line in SHA256.strip().splitlines())
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "codecformer"


def load_lyra() -> tuple[SoundStream, dict]:
    """Lyra V2 and its weights. Raises UserError without a network or the files."""
    path = CACHE / "lyra_v2.pth"
    if not path.exists():
        for name in FILES:
            if not (CACHE / name).exists():
                download(URL + name, CACHE / name)
        save_soundstream(convert_lyra(CACHE), path)
    content = load_tensors(path)
    try:
        return restore_soundstream(content), content["state_dict"]
    except (KeyError, TypeError, RuntimeError):
        raise UserError(f"{path} is not what was written there: remove it") from None


@torch.no_grad()
def convert_lyra(folder) -> SoundStream:
    """Lyra V2 from its three .tflite files in `folder`.

    Raises UserError for a file that is missing or not the one published with v1.3.2.
    """
    for name, checksum in FILES.items():
        path = Path(folder) / name
        if not path.exists():
            raise UserError(f"no {path}: fetch it from {URL + name}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != checksum:
            raise UserError(f"{path} is not the file that Lyra v1.3.2 has: fetch it anew")
    encoder, decoder, quantizer = (Path(folder) / name for name in FILES)
    network = SoundStream()
    layers = read_layers(encoder)
    layers[0] = first_on_strides(*layers[0], network.encoder.stride)
    copy_layers(layers, network.encoder)
    layers = read_layers(decoder)
    layers[-1] = last_on_strides(*layers[-1], network.encoder.stride)
    copy_layers(layers, network.decoder)
    constants = read_constants(quantizer)
    names = ["transpose", *(f"transpose_{k}" for k in range(1, network.n_codebooks))]
    network.quantizer.codebooks.copy_(torch.stack([constants[name] for name in names]))
    return network.eval()


def first_on_strides(weight: torch.Tensor, bias: torch.Tensor, stride: int):
    """The encoder's first kernel [C, 1, 1, K] for the samples of a stride as channels.

    Returns [C, stride, 1, K / stride] and the bias.
    """
    strides = weight.unflatten(3, (-1, stride))  # [C, 1, 1, K / stride, stride]
    return strides[:, 0].permute(0, 3, 1, 2), bias


def last_on_strides(weight: torch.Tensor, bias: torch.Tensor, stride: int):
    """The decoder's last, transposed kernel [C, 1, 1, K] as a convolution that makes whole strides.

    Returns [stride, C, 1, K / stride] and a bias for each sample of a stride.
    """
    strides = weight.unflatten(3, (-1, stride))  # [C, 1, 1, K / stride, stride]
    strides = strides[:, 0].flip(2)  # a transposed convolution's kernel runs backwards in time
    return strides.permute(3, 0, 1, 2), bias.expand(stride)


def copy_layers(layers: list[tuple[torch.Tensor, torch.Tensor]], network: nn.Module) -> None:
    """Copies (weight, bias) of a graph's convolutions into those of an encoder or a decoder."""
    remaining = iter(layers)
    for module in network.modules():
        if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            continue
        # The graphs have a transposed convolution for each group.
        n_parts = module.groups if isinstance(module, Upsample) else 1
        parts = [next(remaining) for _ in range(n_parts)]
        module.weight.copy_(torch.cat([weight for weight, _ in parts]))
        if module.bias is not None:  # the depthwise ones' are zeros
            module.bias.copy_(torch.cat([bias for _, bias in parts]))


def open_graph(path):
    """The model in a .tflite file, and its one graph."""
    import tflite  # here, since it is only needed to convert once

    model = tflite.Model.GetRootAs(Path(path).read_bytes(), 0)
    return model, model.Subgraphs(0)


def read_constant(model, tensor) -> torch.Tensor | None:
    """A tensor of a graph as floats, 8-bit ones scaled back; None for one that is computed."""
    import tflite

    buffer = model.Buffers(tensor.Buffer())
    if not buffer.DataLength():
        return None
    kinds = {
        tflite.TensorType.FLOAT32: np.float32,
        tflite.TensorType.INT32: np.int32,
        tflite.TensorType.INT8: np.int8,
    }
    shape = [tensor.Shape(i) for i in range(tensor.ShapeLength())]
    values = buffer.DataAsNumpy().view(kinds[tensor.Type()]).reshape(shape).astype(np.float32)
    quantization = tensor.Quantization()
    if quantization and quantization.ScaleLength():
        along = [1] * len(shape)
        along[quantization.QuantizedDimension()] = -1  # a scale for each of these
        values -= quantization.ZeroPointAsNumpy().reshape(along)
        values *= quantization.ScaleAsNumpy().reshape(along)
    return torch.from_numpy(values)


def read_constants(path) -> dict[str, torch.Tensor]:
    """The constants of a .tflite file by name."""
    model, graph = open_graph(path)
    tensors = [graph.Tensors(i) for i in range(graph.TensorsLength())]
    return {tensor.Name().decode(): read_constant(model, tensor) for tensor in tensors}


def read_layers(path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(weight, bias) of the convolutions of a .tflite file, in the order they run.

    Weights are laid out as torch's: [out, in / groups, 1, kernel], of transposed convolutions
    [in, out, 1, kernel].
    """
    import tflite

    kinds = tflite.BuiltinOperator
    model, graph = open_graph(path)
    layers = []
    for i in range(graph.OperatorsLength()):
        op = graph.Operators(i)
        code = model.OperatorCodes(op.OpcodeIndex())
        kind = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        if kind not in (kinds.CONV_2D, kinds.DEPTHWISE_CONV_2D, kinds.TRANSPOSE_CONV):
            continue
        weight = read_constant(model, graph.Tensors(op.Inputs(1)))
        bias_input = 3 if kind == kinds.TRANSPOSE_CONV else 2
        bias = read_constant(model, graph.Tensors(op.Inputs(bias_input)))
        if kind == kinds.CONV_2D:  # [out, kernel, 1, in]
            weight = weight.permute(0, 3, 2, 1)
        else:  # depthwise [1, kernel, 1, channels], transposed [out, kernel, 1, in]
            weight = weight.permute(3, 0, 2, 1)
        layers.append((weight, bias))
    return layers
