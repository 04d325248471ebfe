"""SoundStream: the neural codec of Lyra V2, with Google's weights or with weights of its own.

    codec, weights = load_lyra()                 # fetched once; or load_lyra(folder of the three .tflite files)
    latents = codec.encoder(wav)                 # [B, 1, F * 320] at 16 kHz -> [B, 64, F], 50 frames/s
    wav = codec.decoder(codec.quantize(latents, 30))  # 30 of 46 codebooks are 6 kbit/s

What is unusual:
- Lyra publishes streaming TFLite graphs of one frame a call. Here the same layers are plain convolutions over whole
  signals, padded with the zeros that the streams start from, in float where the original rounds its inner
  activations to 8 bits. Gradients flow through all of it.
- Inside, signals are [B, C, 1, T] in torch's channels-last layout: two-dimensional convolutions with a kernel one
  high run there 1.5 times as fast on CPUs as one-dimensional ones on [B, C, T], whose depthwise ones are slow.
- The outermost convolutions, whose kernel is a multiple of their stride, see the samples of a stride as channels,
  which is a mere view in that layout: the same sums, in a third of the time (a tenth for the last).

SoundStream is Zeghidour et al., 2021, https://arxiv.org/abs/2107.03312; Lyra V2 (Apache-2.0) is
https://github.com/google/lyra, whose graphs define the structure below.
"""

import hashlib
import os
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

LYRA_URL = "https://github.com/google/lyra/raw/v1.3.2/lyra/model_coeffs/"
LYRA_FILES = {  # and their sha256
    "soundstream_encoder.tflite": "237da0b16226fb0a68d49551c81bebf614e42142af72764448359f68581e88f1",
    "lyragan.tflite": "50e7839cda4f30599a3a34cfaddcd9c98449b049eee884e1a74295780448ad06",
    "quantizer.tflite": "841ee05989687d32d1f616a8ad1419fc7eda37599d3c05c7cf5a0d60ccf8ac5c",
}
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "codecformer"
SLOPE = 0.3  # of every leaky ReLU
DILATIONS = (1, 3, 9)  # of a stage's residual units


@dataclass(frozen=True)
class SoundStreamConfig:
    """The shape of a SoundStream; Lyra's by default.

    The first convolution makes `widths[0]` channels with that kernel (a multiple of its stride). Stage i, three
    residual units of `widths[i]` and a convolution of kernel 2 * strides[i], makes `widths[i + 1]`. The decoder mirrors
    all that. Convolutions from `group_width` channels on work in groups of so many, as far as Lyra's do.
    codebook_dim: of a factorised codebook, as DAC's are, which sees that many projections of the latents; None: of the
    latents themselves, as Lyra's are.
    causal: pad on the left only, so that no frame waits for later samples.
    """

    sample_rate: int = 16000
    kernel: int = 64
    stride: int = 16
    widths: tuple = (64, 128, 256, 512)
    strides: tuple = (5, 2, 2)
    group_width: int = 64
    latent_dim: int = 64
    n_codebooks: int = 46
    codebook_size: int = 16
    codebook_dim: int | None = None
    causal: bool = True


class Conv(nn.Conv2d):
    """[B, C, 1, T] -> [B, D, 1, T / stride], padded so that nothing is lost."""

    def __init__(self, width, out, kernel, stride=1, dilation=1, groups=1, bias=True, causal=True):
        super().__init__(width, out, (1, kernel), (1, stride), 0, (1, dilation), groups, bias)
        missing = (kernel - 1) * dilation + 1 - stride
        self.ends = (missing, 0) if causal else (missing // 2, missing - missing // 2)

    def forward(self, x):
        return super().forward(F.pad(x, self.ends) if any(self.ends) else x)


class Depthwise(Conv):
    """A convolution of kernel 3 for each channel on its own."""

    def __init__(self, width, dilation, causal):
        super().__init__(width, width, 3, dilation=dilation, groups=width, bias=False, causal=causal)

    def forward(self, x):
        dilation, length = self.dilation[1], x.shape[-1]
        if x.is_cuda:  # as a sum, which a compiler fuses with its neighbours
            x = F.pad(x, self.ends)
            return sum(self.weight[:, 0, :, k, None] * x[..., k * dilation :][..., :length] for k in range(3))
        if dilation <= 3:
            return super().forward(x)
        # On CPUs the gradient of wide dilations takes three times as long as this: rows of `dilation` samples,
        # which a convolution of three neighbouring rows, undilated, combines just as well.
        rows = F.pad(x, (self.ends[0], self.ends[1] + -length % dilation)).unflatten(3, (-1, dilation))[:, :, 0]
        return F.conv2d(rows, self.weight.transpose(2, 3), groups=self.groups).flatten(2)[:, :, None, :length]


class Upsample(nn.ConvTranspose2d):
    """[B, C, 1, T] -> [B, D, 1, T * stride] by a transposed convolution of kernel 2 * stride."""

    def __init__(self, width, out, stride, groups, causal):
        super().__init__(width, out, (1, 2 * stride), (1, stride), groups=groups)
        self.start = 0 if causal else stride // 2

    def forward(self, x):
        return super().forward(x)[..., self.start : self.start + x.shape[-1] * self.stride[1]]


class ResidualUnit(nn.Module):
    def __init__(self, width, dilation, groups, causal):
        super().__init__()
        self.layers = nn.Sequential(
            nn.LeakyReLU(SLOPE),
            Depthwise(width, dilation, causal),
            Conv(width, width, 1),
            nn.LeakyReLU(SLOPE),
            Conv(width, width, 1, groups=groups),
        )

    def forward(self, x):
        return x + self.layers(x)


class Encoder(nn.Module):
    """Waveforms [B, 1, F * hop] -> latents [B, D, F]. Raises ValueError for other lengths."""

    def __init__(self, c: SoundStreamConfig):
        super().__init__()
        self.stride, self.hop = c.stride, c.stride * prod(c.strides)
        layers = [Conv(c.stride, c.widths[0], c.kernel // c.stride, causal=c.causal)]
        for width, out, stride in zip(c.widths, c.widths[1:], c.strides):
            groups = max(width // c.group_width, 1)
            layers += [ResidualUnit(width, dilation, groups, c.causal) for dilation in DILATIONS]
            layers += [nn.LeakyReLU(SLOPE), Conv(width, out, 2 * stride, stride, groups=groups, causal=c.causal)]
        layers += [nn.LeakyReLU(SLOPE), Conv(c.widths[-1], c.latent_dim, 3, groups=groups, causal=c.causal)]
        self.layers = nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def forward(self, wav):
        if wav.shape[-1] % self.hop or not wav.shape[-1]:
            raise ValueError(f"{wav.shape[-1]} samples are no multiple of the codec's {self.hop} a frame")
        samples = wav.reshape(len(wav), -1, 1, self.stride).transpose(1, 3)  # [B, stride, 1, T]
        return self.layers(samples)[:, :, 0]


class Decoder(nn.Module):
    """Latents [B, D, F] -> waveforms [B, 1, F * hop]."""

    def __init__(self, c: SoundStreamConfig):
        super().__init__()
        groups = max(c.widths[-2] // c.group_width, 1)
        layers = [Conv(c.latent_dim, c.widths[-1], 3, groups=groups, causal=c.causal)]
        for width, out, stride in zip(c.widths[:0:-1], c.widths[-2::-1], c.strides[::-1]):
            groups = max(out // c.group_width, 1)
            layers += [nn.LeakyReLU(SLOPE), Upsample(width, out, stride, groups, c.causal)]
            layers += [ResidualUnit(out, dilation, groups, c.causal) for dilation in DILATIONS]
        layers += [nn.LeakyReLU(SLOPE), Conv(c.widths[0], c.stride, c.kernel // c.stride, causal=c.causal)]
        self.layers = nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def forward(self, latents):
        samples = self.layers(latents[:, :, None].contiguous(memory_format=torch.channels_last))  # [B, stride, 1, T]
        return samples.transpose(1, 3).reshape(len(latents), 1, -1)


def nearest(points: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """The number of the entry [K, D] with the least Euclidean distance to each point; [..., D] -> [...]."""
    return (entries.square().sum(-1) - 2 * F.linear(points, entries)).argmin(-1)  # the points' own norm is in all


class ResidualVectorQuantizer(nn.Module):
    """Each codebook in turn gives its entry nearest to what the ones before have left.

    A factorised codebook has entries of `codebook_dim` < `dim` numbers: `project` brings latents there, `restore` back.
    """

    def __init__(self, n_codebooks, codebook_size, dim, codebook_dim=None):
        super().__init__()
        self.codebooks = nn.Parameter(torch.randn(n_codebooks, codebook_size, codebook_dim or dim))
        self.factorised = codebook_dim is not None
        if self.factorised:
            self.project = nn.Parameter(torch.randn(n_codebooks, codebook_dim, dim) / dim**0.5)
            self.restore = nn.Parameter(self.project.data.transpose(1, 2).clone())

    def forward(self, latents, n_codebooks):
        """Latents [B, D, F] -> the sum of the chosen entries [B, D, F] and their numbers [B, n_codebooks, F]."""
        rest = latents.detach().transpose(1, 2)  # [B, F, D]
        total, codes = 0, []
        for k in range(n_codebooks):
            points = F.linear(rest, self.project[k].detach()) if self.factorised else rest
            codes.append(nearest(points, self.codebooks[k].detach()))
            entry = F.embedding(codes[-1], self.codebooks[k])
            if self.factorised:
                entry = F.linear(entry, self.restore[k])
            total = total + entry
            rest = rest - entry.detach()
        return total.transpose(1, 2), torch.stack(codes, 1)


class SoundStream(nn.Module):
    """Encoder, quantizer and decoder, the bare network that `Codec` wraps."""

    def __init__(self, config: SoundStreamConfig = SoundStreamConfig()):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantizer = ResidualVectorQuantizer(
            config.n_codebooks, config.codebook_size, config.latent_dim, config.codebook_dim
        )
        self.sample_rate, self.hop_length, self.latent_dim = config.sample_rate, self.encoder.hop, config.latent_dim
        self.n_codebooks, self.codebook_size = config.n_codebooks, config.codebook_size

    def quantize(self, latents: torch.Tensor, n_codebooks: int) -> torch.Tensor:
        """Latents [B, D, F] through the first `n_codebooks` and back; gradients pass straight through to them."""
        return latents + (self.quantizer(latents, n_codebooks)[0] - latents).detach()


def save_soundstream(codec: SoundStream, path) -> None:
    """Writes weights and shape; a run that is stopped leaves no half of a file."""
    partial = Path(path).with_suffix(f".{os.getpid()}.part")
    torch.save({"state_dict": codec.state_dict(), "metadata": {"kwargs": asdict(codec.config)}}, partial)
    os.replace(partial, path)


# Google's weights ----------------------------------------------------------------------------------------------------


def load_lyra(folder=None) -> tuple[SoundStream, dict]:
    """Lyra V2 and its weights: converted from the files in `folder`, or fetched once and kept in the user's cache.

    Raises CodecError with one line that says what to do.
    """
    if folder is not None:
        codec = convert_lyra(folder)
        return codec, codec.state_dict()
    from dac_wrapper import download, load_file  # here, since that module knows this one

    path = CACHE / "lyra_v2.pth"
    if not path.exists():
        for name in LYRA_FILES:
            if not (CACHE / name).exists():
                download(LYRA_URL + name, CACHE / name)
        save_soundstream(load_lyra(CACHE)[0], path)
    return load_file(path)


@torch.no_grad()
def convert_lyra(folder) -> SoundStream:
    """Lyra V2 from its three .tflite files in `folder`.

    Raises CodecError for a file that is missing or not the one published with v1.3.2.
    """
    from dac_wrapper import CodecError  # here, since that module knows this one

    for name, checksum in LYRA_FILES.items():
        path = Path(folder) / name
        if not path.exists():
            raise CodecError(f"no {path}: fetch it from {LYRA_URL + name}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != checksum:
            raise CodecError(f"{path} is not the file that Lyra v1.3.2 has: remove it and fetch it anew")
    (_, encoder), (_, decoder), (constants, _) = (read_tflite(Path(folder) / name) for name in LYRA_FILES)
    codec = SoundStream()
    first, last = codec.encoder.layers[0], codec.decoder.layers[-1]
    samples = (-1, first.kernel_size[1], 1, first.in_channels)  # a kernel's 64 samples as four strides of 16
    for network, layers in ((codec.encoder, iter(encoder)), (codec.decoder, iter(decoder))):
        for module in network.layers.modules():
            if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                continue
            # The graphs have a transposed convolution for each group.
            parts = [next(layers) for _ in range(module.groups if isinstance(module, Upsample) else 1)]
            weight, bias = (torch.cat(tensors) for tensors in zip(*parts))
            if module is first:
                weight = weight.view(samples).transpose(1, 3)
            elif module is last:  # transposed: its kernel runs backwards in time
                weight = weight.view(samples).flip(1).permute(3, 0, 2, 1)
            module.weight.copy_(weight)
            if module.bias is not None:  # the depthwise ones' are zeros
                module.bias.copy_(bias)  # the last one's for all samples of a stride
    names = ["transpose", *(f"transpose_{i}" for i in range(1, codec.n_codebooks))]
    codec.quantizer.codebooks.copy_(torch.stack([constants[name] for name in names]))
    return codec.eval()


def read_tflite(path) -> tuple[dict[str, torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
    """The constants of a .tflite file by name, and (weight, bias) of its convolutions in the order they run.

    8-bit constants are scaled back to floats. Weights are laid out as torch's: [out, in / groups, 1, kernel], of
    transposed convolutions [in, out, 1, kernel].
    """
    import tflite  # to convert once

    model = tflite.Model.GetRootAs(Path(path).read_bytes(), 0)
    graph = model.Subgraphs(0)
    kinds = {tflite.TensorType.FLOAT32: np.float32, tflite.TensorType.INT32: np.int32, tflite.TensorType.INT8: np.int8}
    constants = []  # by number
    for tensor in (graph.Tensors(i) for i in range(graph.TensorsLength())):
        buffer = model.Buffers(tensor.Buffer())
        if not buffer.DataLength():
            constants.append(None)
            continue
        shape = [tensor.Shape(i) for i in range(tensor.ShapeLength())]
        values = buffer.DataAsNumpy().view(kinds[tensor.Type()]).reshape(shape).astype(np.float32)
        quantization = tensor.Quantization()
        if quantization and quantization.ScaleLength():
            axis = [1] * len(shape)
            axis[quantization.QuantizedDimension()] = -1
            values -= quantization.ZeroPointAsNumpy().reshape(axis)
            values *= quantization.ScaleAsNumpy().reshape(axis)
        constants.append(torch.from_numpy(values))
    layers = []
    for op in (graph.Operators(i) for i in range(graph.OperatorsLength())):
        code = model.OperatorCodes(op.OpcodeIndex())
        code = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        # TFLite's weights are [out, kernel, 1, in], of depthwise convolutions [1, kernel, 1, channels].
        if code == tflite.BuiltinOperator.CONV_2D:
            layers.append((constants[op.Inputs(1)].permute(0, 3, 2, 1), constants[op.Inputs(2)]))
        elif code == tflite.BuiltinOperator.DEPTHWISE_CONV_2D:
            layers.append((constants[op.Inputs(1)].permute(3, 0, 2, 1), constants[op.Inputs(2)]))
        elif code == tflite.BuiltinOperator.TRANSPOSE_CONV:
            layers.append((constants[op.Inputs(1)].permute(3, 0, 2, 1), constants[op.Inputs(3)]))
    return {graph.Tensors(i).Name().decode(): constant for i, constant in enumerate(constants)}, layers
