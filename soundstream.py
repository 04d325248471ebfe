"""SoundStream: the neural codec whose shape Lyra V2 has, and the one trained in this repository.

    network = SoundStream()                            # Lyra's shape, random weights
    latents = network.encoder(wav)                     # [B, 1, F * 320] -> [B, 64, F]
    latents, codes = network.quantize(latents, 30)     # codes [B, 30, F], 6 kbit/s
    wav = network.decoder(network.dequantize(codes))   # [B, 64, F] -> [B, 1, F * 320]

What is unusual:
- Lyra publishes streaming graphs of one frame a call. Here the same layers are plain convolutions
  over whole signals, padded with the zeros that the streams start from. Gradients flow through all
  of it.
- Inside, signals are [B, C, 1, T] in torch's channels-last layout: two-dimensional convolutions
  with a kernel one high run there 1.5 times as fast on CPUs as one-dimensional ones on [B, C, T],
  whose depthwise ones are slow.
- Between latents and RVQ there can be networks too: latents then may be what separates best, and
  codes what few bits carry best. Where there are more latents than samples, many decode alike, of
  which a separator knows only those that the encoder makes: a last, linear layer after the RVQ
  brings quantised latents close to these.
- The outermost convolutions, whose kernel is a multiple of their stride, see the samples of a
  stride as channels, which is a mere view in that layout: the same sums, in a third of the time.

SoundStream is Zeghidour et al., 2021, https://arxiv.org/abs/2107.03312. Lyra V2 is
https://github.com/google/lyra, whose graphs define the structure below; lyra.py reads its weights.
"""

from dataclasses import asdict, dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import nn

from program import save_tensors

SLOPE = 0.3  # of every leaky ReLU
DILATIONS = (1, 3, 9)  # of a stage's residual units


@dataclass(frozen=True)
class SoundStreamConfig:
    """The shape of a SoundStream; Lyra's by default.

    The first convolution makes widths[0] channels. Stage i, three residual units of widths[i] and a
    convolution of kernel 2 * strides[i], makes widths[i + 1]. The decoder mirrors all that.
    """

    sample_rate: int = 16000
    kernel: int = 64  # of the first convolution, a multiple of its stride
    stride: int = 16
    widths: tuple = (64, 128, 256, 512)
    strides: tuple = (5, 2, 2)
    group_width: int = 64  # convolutions of more channels work in groups of so many, as Lyra's do
    latent_dim: int = 64
    n_codebooks: int = 46
    codebook_size: int = 16
    # Around the RVQ, networks that bring latents to `code_dim` dimensions and back, of so many
    # rounds of residual units, and a projection. Lyra has none: its codebooks hold latents.
    code_dim: int | None = None
    coder_rounds: int = 0
    causal: bool = True  # pad on the left only, so that no frame waits for later samples


class SoundStream(nn.Module):
    """Encoder, quantizer and decoder: a bare network, which `Codec` in dac_wrapper.py wraps."""

    def __init__(self, config: SoundStreamConfig = SoundStreamConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.analysis, self.synthesis = make_coder(config)
        code_dim = config.code_dim or config.latent_dim
        self.quantizer = ResidualVectorQuantizer(config.n_codebooks, config.codebook_size, code_dim)
        self.sample_rate = config.sample_rate
        self.hop_length = self.encoder.hop
        self.latent_dim = config.latent_dim
        self.n_codebooks = config.n_codebooks
        self.codebook_size = config.codebook_size

    def quantize(self, latents: torch.Tensor, n_codebooks: int):
        """Latents [B, D, F] -> the same through the first n codebooks, and their codes [B, n, F].

        Gradients pass the RVQ straight through, as if nothing had been rounded, and the networks
        around it as any. What is here does not learn: recipes/train_rvq.py trains it by calling
        its parts.
        """
        points = on_frames(self.analysis, latents)  # [B, code_dim, F]
        entries, codes = self.quantizer(points, n_codebooks)
        entries = entries.detach() + (points - points.detach())
        return on_frames(self.synthesis, entries), codes

    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [B, n, F] of the first n codebooks -> latents [B, D, F]."""
        return on_frames(self.synthesis, self.quantizer.look_up(codes))


class Conv(nn.Conv2d):
    """[B, C, 1, T] -> [B, D, 1, T / stride], padded so that nothing is lost."""

    def __init__(self, width, out, kernel, stride=1, dilation=1, groups=1, bias=True, causal=True):
        super().__init__(width, out, (1, kernel), (1, stride), 0, (1, dilation), groups, bias)
        missing = (kernel - 1) * dilation + 1 - stride
        self.ends = (missing, 0) if causal else (missing // 2, missing - missing // 2)

    def forward(self, x):
        if any(self.ends):
            x = F.pad(x, self.ends)
        return super().forward(x)


class Depthwise(Conv):
    """A convolution of kernel 3 for each channel on its own."""

    def __init__(self, width, dilation, causal):
        super().__init__(
            width, width, 3, dilation=dilation, groups=width, bias=False, causal=causal
        )

    def forward(self, x):
        dilation = self.dilation[1]
        if dilation <= 3 or x.is_cuda:
            return super().forward(x)
        # On CPUs the gradient of wide dilations takes three times as long as this: rows of
        # `dilation` samples, of which an undilated convolution combines three neighbouring ones.
        length = x.shape[-1]
        left, right = self.ends
        to_whole_rows = -length % dilation
        rows = F.pad(x, (left, right + to_whole_rows))
        rows = rows.unflatten(3, (-1, dilation))[:, :, 0]  # [B, C, rows, dilation]
        combined = F.conv2d(rows, self.weight.transpose(2, 3), groups=self.groups)
        return combined.flatten(2)[:, :, None, :length]


class Upsample(nn.ConvTranspose2d):
    """[B, C, 1, T] -> [B, D, 1, T * stride] by a transposed convolution of kernel 2 * stride."""

    def __init__(self, width, out, stride, groups, causal):
        super().__init__(width, out, (1, 2 * stride), (1, stride), groups=groups)
        self.start = 0 if causal else stride // 2

    def forward(self, x):
        longer = super().forward(x)
        return longer[..., self.start : self.start + x.shape[-1] * self.stride[1]]


class ResidualUnit(nn.Module):
    """[B, width, 1, T] -> the same."""

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

    def __init__(self, config: SoundStreamConfig):
        super().__init__()
        widths = config.widths
        causal = config.causal
        self.stride = config.stride
        self.hop = config.stride * prod(config.strides)
        layers = [Conv(config.stride, widths[0], config.kernel // config.stride, causal=causal)]
        for width, out, stride in zip(widths, widths[1:], config.strides):
            groups = max(width // config.group_width, 1)
            layers += [ResidualUnit(width, dilation, groups, causal) for dilation in DILATIONS]
            layers.append(nn.LeakyReLU(SLOPE))
            layers.append(Conv(width, out, 2 * stride, stride, groups=groups, causal=causal))
        layers.append(nn.LeakyReLU(SLOPE))
        # In as many groups as the last stage, as Lyra's.
        layers.append(Conv(widths[-1], config.latent_dim, 3, groups=groups, causal=causal))
        self.layers = nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def forward(self, wav):
        batch, _, length = wav.shape
        if length == 0 or length % self.hop:
            raise ValueError(f"{length} samples are no multiple of the codec's {self.hop} a frame")
        strides = wav.reshape(batch, -1, 1, self.stride).transpose(1, 3)  # [B, stride, 1, T]
        return self.layers(strides)[:, :, 0]


class Decoder(nn.Module):
    """Latents [B, D, F] -> waveforms [B, 1, F * hop]: the encoder's mirror."""

    def __init__(self, config: SoundStreamConfig):
        super().__init__()
        widths = config.widths[::-1]
        causal = config.causal
        groups = max(widths[1] // config.group_width, 1)
        layers = [Conv(config.latent_dim, widths[0], 3, groups=groups, causal=causal)]
        for width, out, stride in zip(widths, widths[1:], config.strides[::-1]):
            groups = max(out // config.group_width, 1)
            layers.append(nn.LeakyReLU(SLOPE))
            layers.append(Upsample(width, out, stride, groups, causal))
            layers += [ResidualUnit(out, dilation, groups, causal) for dilation in DILATIONS]
        layers.append(nn.LeakyReLU(SLOPE))
        layers.append(
            Conv(widths[-1], config.stride, config.kernel // config.stride, causal=causal)
        )
        self.layers = nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def forward(self, latents):
        x = latents[:, :, None].contiguous(memory_format=torch.channels_last)
        strides = self.layers(x)  # [B, stride, 1, T]
        return strides.transpose(1, 3).reshape(len(latents), 1, -1)


def nearest(points: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """The number of the entry [K, D] with the least Euclidean distance to each point [..., D]."""
    # The square of the point itself is the same for all entries.
    distances = entries.square().sum(-1) - 2 * F.linear(points, entries)  # [..., K]
    return distances.argmin(-1)


class ResidualVectorQuantizer(nn.Module):
    """RVQ: each codebook in turn gives its entry nearest to what the ones before have left."""

    def __init__(self, n_codebooks: int, codebook_size: int, dim: int):
        super().__init__()
        self.codebooks = nn.Parameter(torch.randn(n_codebooks, codebook_size, dim))

    def forward(self, points: torch.Tensor, n_codebooks: int):
        """Points [B, D, F] -> the sum of the chosen entries [B, D, F], their numbers [B, n, F]."""
        rest = points.detach().transpose(1, 2)  # [B, F, D]
        total = torch.zeros_like(rest)
        codes = []
        for codebook in self.codebooks[:n_codebooks]:
            chosen = nearest(rest, codebook)  # [B, F]
            entries = F.embedding(chosen, codebook)
            total = total + entries
            rest = rest - entries.detach()
            codes.append(chosen)
        return total.transpose(1, 2), torch.stack(codes, dim=1)

    def look_up(self, codes: torch.Tensor) -> torch.Tensor:
        """Numbers [B, n, F] of entries -> their sum [B, D, F], added in the order of `forward`."""
        total = torch.zeros((), device=codes.device)
        for k in range(codes.shape[1]):
            total = total + F.embedding(codes[:, k], self.codebooks[k])
        return total.transpose(1, 2)


def make_coder(config: SoundStreamConfig) -> tuple[nn.Sequential, nn.Sequential]:
    """The networks before and after the RVQ: empty ones where the config has no code_dim.

    The last layer is linear, see `fit_projection` in recipes/train_rvq.py.
    """
    dim = config.latent_dim

    def units() -> list[nn.Module]:
        dilations = DILATIONS * config.coder_rounds
        return [ResidualUnit(dim, dilation, 1, config.causal) for dilation in dilations]

    if config.code_dim is None:
        return nn.Sequential(), nn.Sequential()
    analysis = nn.Sequential(*units(), Conv(dim, config.code_dim, 1))
    projection = Conv(dim, dim, 3, bias=False, causal=config.causal)
    synthesis = nn.Sequential(Conv(config.code_dim, dim, 1), *units(), projection)
    channels_last = torch.channels_last
    return analysis.to(memory_format=channels_last), synthesis.to(memory_format=channels_last)


def on_frames(network: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """A network of this file's layers on [B, D, F], which they see as [B, D, 1, F]."""
    x = x[:, :, None].contiguous(memory_format=torch.channels_last)
    return network(x)[:, :, 0]


def save_soundstream(network: SoundStream, path, half: bool = False) -> None:
    """Writes weights, if asked in half precision, and shape in the layout of DAC's releases.

    Raises UserError.
    """
    weights = network.state_dict()
    if half:
        weights = {name: tensor.half() for name, tensor in weights.items()}
    save_tensors({"state_dict": weights, "metadata": {"kwargs": asdict(network.config)}}, path)


def restore_soundstream(content: dict) -> SoundStream:
    """The network of what `save_soundstream` wrote. Raises KeyError, TypeError or RuntimeError."""
    network = SoundStream(SoundStreamConfig(**content["metadata"]["kwargs"]))
    weights = content["state_dict"]
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return network
