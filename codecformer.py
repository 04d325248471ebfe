"""Codecformer: the separator in the latent space of a neural audio codec.

    latents of the mixture [B, D, F]  ->  one mask per speaker [B, S, D, F]

B mixtures, D latent dimensions, F frames, S speakers. Towards Audio Codec-based Speech Separation
(Yip et al., 2024), https://arxiv.org/abs/2406.12434.

What is unusual, for a reader who knows Sepformer (sepformer.py):
- At 50 frames a second the sequence is short enough for plain self-attention over all of it: there
  are no chunks and no dual path.
- The masks pass through Snake, x + sin^2(a x) / a, not through a sigmoid or a ReLU: latents and
  masks have either sign.
- Positions are computed for the length at hand, so any length works. (The authors' table ends at
  2,500 frames.)
- Inside, features come last, [B, F, D]. The authors' 1x1 convolutions on [B, D, F] are the same
  products, but take three times as long on a CPU.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


@dataclass(frozen=True, kw_only=True)
class SeparatorConfig:
    """The sizes that every separator here has."""

    n_speakers: int = 2  # S
    d_model: int = 256
    n_layers: int
    n_heads: int = 8
    d_ffn: int = 1024
    dropout: float

    def __post_init__(self):
        """Raises ValueError for a separator that can't be built."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.type is int and value < 1:
                raise ValueError(f"{entry.name} is {value}, it must be at least 1")
        if self.n_speakers < 2:
            raise ValueError(f"n_speakers is {self.n_speakers}, it must be at least 2")
        if self.d_model % self.n_heads or self.d_model % 2:
            raise ValueError(
                f"d_model ({self.d_model}) must be even and a multiple of n_heads ({self.n_heads})"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, it must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class CodecformerConfig(SeparatorConfig):
    """The defaults are the paper's model: 17,361,408 parameters for two speakers."""

    latent_dim: int = 1024  # D, given by the codec
    n_layers: int = 16
    dropout: float = 0.1
    # The last two activations, that make the masks: snake, relu, tanh or gelu.
    activation: str = "snake"
    # What the bottleneck sees: the latents, as in the paper, the logarithm of their squares
    # (log_power), or both. Masks follow from levels, and levels are slow to learn from numbers of
    # either sign.
    features: str = "latents"
    # Frames that the bottleneck sees at once, an odd number. The paper's is 1.
    context: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.features not in ("latents", "log_power", "both"):
            raise ValueError(f"features are latents, log_power or both, not {self.features!r}")
        if self.context % 2 == 0:
            raise ValueError(f"context is {self.context}, it must be odd")
        if self.activation not in ("snake", "relu", "tanh", "gelu"):
            raise ValueError(f"activation is snake, relu, tanh or gelu, not {self.activation!r}")


class Snake(nn.Module):
    """x + sin^2(alpha x) / alpha, with one trained alpha per channel; [..., C] -> [..., C].

    Ziyin et al., 2020, https://arxiv.org/abs/2006.08195.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.sin(self.alpha * x).square() / (self.alpha + 1e-9)


def make_activation(name: str, channels: int) -> nn.Module:
    if name == "snake":
        return Snake(channels)
    return {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}[name]()


def log_power(latents: torch.Tensor) -> torch.Tensor:
    """The order of magnitude of each latent. Its floor hides what is 30 dB below a power of 1."""
    return torch.log10(latents.square() + 1e-3) + 1  # from -2, the floor, to about 1, in speech


def sinusoidal_positions(length: int, dim: int, device=None) -> torch.Tensor:
    """Positions [length, dim]: sines in the even channels, cosines in the odd ones.

    Vaswani et al., 2017, https://arxiv.org/abs/1706.03762.
    """
    time = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    channel = torch.arange(0, dim, 2, device=device)
    angle = time * torch.exp(channel * (-math.log(10000.0) / dim))  # [length, dim / 2]
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


class TransformerLayer(nn.Module):
    """Pre-norm self-attention and feed-forward; [B, F, d_model] -> [B, F, d_model]."""

    def __init__(self, d_model: int, n_heads: int, d_ffn: int, dropout: float):
        super().__init__()
        self.n_heads = n_heads
        self.attention_norm = nn.LayerNorm(d_model, eps=1e-6)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.attention_out = nn.Linear(d_model, d_model)
        self.ffn_norm = nn.LayerNorm(d_model, eps=1e-6)
        self.ffn = nn.Sequential(
            nn.Linear(d_model, d_ffn),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(d_ffn, d_model),
        )
        self.dropout = nn.Dropout(dropout)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, frames, width = x.shape
        qkv = self.qkv(x).view(batch, frames, 3, self.n_heads, width // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, F, width of a head]
        dropout = self.dropout.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        x = x.transpose(1, 2).reshape(batch, frames, width)
        return self.attention_out(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attend(self.attention_norm(x)))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Codecformer(nn.Module):
    """Latents of a mixture [B, D, F] -> masks [B, S, D, F], to be multiplied with those latents."""

    on_latents = True  # for training and evaluation: what goes in and comes out

    def __init__(self, config: CodecformerConfig = CodecformerConfig()):
        super().__init__()
        self.config = config
        dim = config.latent_dim
        width = config.d_model
        n_features = 2 * dim if config.features == "both" else dim
        self.bottleneck = nn.Linear(n_features * config.context, width, bias=False)
        self.layers = nn.ModuleList(
            TransformerLayer(width, config.n_heads, config.d_ffn, config.dropout)
            for _ in range(config.n_layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Linear(width, dim, bias=False)
        self.split = weight_norm(nn.Linear(dim, dim * config.n_speakers, bias=False))
        # The gate and the last activation are shared by the speakers.
        activation = make_activation(config.activation, dim)
        self.gate_value = nn.Sequential(nn.Linear(dim, dim), activation)
        self.gate = nn.Sequential(nn.Linear(dim, dim), nn.Sigmoid())
        self.mask_activation = make_activation(config.activation, dim)

    def see(self, latents: torch.Tensor) -> torch.Tensor:
        """What the bottleneck is given of latents; [B, D, F] -> [B, F, features * context]."""
        x = latents
        if self.config.features == "log_power":
            x = log_power(latents)
        if self.config.features == "both":
            x = torch.cat([latents, log_power(latents)], dim=1)
        around = self.config.context // 2
        # As many copies as the context has frames, each shifted by one: [B, C, context, F]. Beyond
        # the ends are zeros, which mark them: silence has other values in the logarithm.
        x = F.pad(x, (around, around)).unfold(-1, latents.shape[-1], 1)
        return x.flatten(1, 2).transpose(1, 2)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        batch, dim, frames = latents.shape
        x = self.bottleneck(self.see(latents))  # [B, F, d_model]
        x = x + sinusoidal_positions(frames, self.config.d_model, latents.device)
        for layer in self.layers:
            x = layer(x)
        x = self.split(self.expand(self.norm(x)))  # [B, F, S * D]
        x = x.view(batch, frames, self.config.n_speakers, dim)
        x = self.mask_activation(self.gate_value(x) * self.gate(x))
        return x.permute(0, 2, 3, 1)  # [B, S, D, F]

    @torch.no_grad()
    def fuse(self) -> "Codecformer":
        """For inference: one matrix in place of `expand` and `split`, 9 % fewer MACs."""
        n_outputs = self.config.latent_dim * self.config.n_speakers
        fused = nn.Linear(self.config.d_model, n_outputs, bias=False)
        fused.weight = nn.Parameter(self.split.weight @ self.expand.weight)
        self.expand = nn.Identity()
        self.split = fused
        return self


def estimate_latents(
    predict_masks,
    codec,
    latents: torch.Tensor,
    quantize_before: bool = False,
    quantize_after: bool = False,
) -> torch.Tensor:
    """Latents of mixtures [B, D, F] -> estimates of their speakers' latents [B, S, D, F].

    The two switches are the paper's "RVQ before/after": whether the separator sees quantised
    latents, and whether its estimates are quantised.
    """
    if quantize_before:
        latents = codec.quantize(latents)
    masks = predict_masks(latents).float()  # the masks alone come in mixed precision
    estimates = masks * latents.unsqueeze(1)
    if quantize_after:
        estimates = codec.quantize(estimates)
    return estimates


def separate(
    model: nn.Module,
    codec,
    mixture: torch.Tensor,
    quantize_before: bool = False,
    quantize_after: bool = False,
) -> torch.Tensor:
    """Mixtures [B, T] of any level -> waveforms of their speakers [B, S, T] at that level.

    A separator on waveforms uses the codec's `gain` alone, and never an RVQ; `separate_in` in
    evaluate.py puts it behind a codec.
    """
    gain = codec.gain(mixture)  # [B, 1]
    if model.on_latents:
        latents = codec.encode(mixture * gain)
        estimates = estimate_latents(model, codec, latents, quantize_before, quantize_after)
        estimates = codec.decode(estimates, mixture.shape[-1])
    else:
        estimates = model(mixture * gain)
    return estimates / gain.unsqueeze(1)
