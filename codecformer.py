"""Codecformer: the separator in the latent space of a neural audio codec.

    latents of the mixture [B, D, F]  ->  one mask per speaker [B, S, D, F]

Towards Audio Codec-based Speech Separation (Yip et al., 2024), https://arxiv.org/abs/2406.12434.

What is unusual, for a reader who knows Sepformer (recipes/sepformer.py):
- At 50 frames a second the sequence is short enough for plain self-attention over all of it:
  no chunks, no dual path.
- The masks pass through Snake, x + sin^2(a x)/a, not through a sigmoid or ReLU: the latents and
  the masks have either sign.
- Positions are computed for the length at hand, so any length works (the authors' table ends at 2,500
  frames).
- Inside, features come last, [B, F, D]: the authors' 1x1 convolutions on [B, D, F] are the same products, but three
  times slower on a CPU.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


@dataclass(frozen=True, kw_only=True)
class SeparatorConfig:
    """What separators are sized by."""

    n_speakers: int = 2  # S
    d_model: int = 256
    n_layers: int
    n_heads: int = 8
    d_ffn: int = 1024
    dropout: float

    def __post_init__(self):
        """Raises ValueError for a configuration that can't be built."""
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} is {value}, it must be at least 1")
        if self.n_speakers < 2:
            raise ValueError(f"n_speakers is {self.n_speakers}, it must be at least 2")
        if self.d_model % self.n_heads or self.d_model % 2:
            raise ValueError(f"d_model ({self.d_model}) must be even and a multiple of n_heads ({self.n_heads})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, it must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class CodecformerConfig(SeparatorConfig):
    """The defaults are the paper's model: 17,361,408 parameters for two speakers."""

    latent_dim: int = 1024  # D, given by the codec
    n_layers: int = 16
    dropout: float = 0.1
    activation: str = "snake"  # of the masks: a key of ACTIVATIONS
    # What the bottleneck sees: the latents, as in the paper, or the logarithm of their squares. Masks follow from
    # levels, and levels are slow to learn from numbers of either sign.
    features: str = "latents"  # or "log_power", or "both"
    context: int = 1  # frames that the bottleneck sees at once, odd

    def __post_init__(self):
        super().__post_init__()
        if self.features not in FEATURES:
            raise ValueError(f"unknown features {self.features!r}, choose from {', '.join(FEATURES)}")
        if self.context % 2 == 0:
            raise ValueError(f"context is {self.context}, it must be odd")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}, choose from {', '.join(ACTIVATIONS)}")


class Snake(nn.Module):
    """x + sin^2(alpha x) / alpha with one trained alpha per channel; [..., C] -> [..., C].

    Source: Ziyin et al., 2020, https://arxiv.org/abs/2006.08195.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.sin(self.alpha * x).square() / (self.alpha + 1e-9)


# The codec is fed at one level, so the floor of the powers is one number too.
FEATURES = {
    "latents": lambda latents: latents,
    "log_power": lambda latents: torch.log10(latents.square() + 1e-3) + 1,
    "both": lambda latents: torch.cat([latents, FEATURES["log_power"](latents)], 1),
}
# Each is built with the number of channels that it is applied to.
ACTIVATIONS = {
    "snake": Snake,
    "relu": lambda channels: nn.ReLU(),
    "tanh": lambda channels: nn.Tanh(),
    "gelu": lambda channels: nn.GELU(),
}


def sinusoidal_positions(length: int, dim: int, device=None) -> torch.Tensor:
    """Positions [length, dim], sines in the even and cosines in the odd channels (Vaswani et al., 2017)."""
    time = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    frequency = torch.exp(torch.arange(0, dim, 2, device=device) * (-math.log(10000.0) / dim))
    return torch.stack([torch.sin(time * frequency), torch.cos(time * frequency)], dim=-1).flatten(1)


class TransformerLayer(nn.Module):
    """Pre-norm self-attention and feed-forward; [B, F, d_model] -> [B, F, d_model]."""

    def __init__(self, d_model: int, n_heads: int, d_ffn: int, dropout: float):
        super().__init__()
        self.n_heads = n_heads
        self.attention_norm = nn.LayerNorm(d_model, eps=1e-6)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.attention_out = nn.Linear(d_model, d_model)
        self.ffn_norm = nn.LayerNorm(d_model, eps=1e-6)
        self.ffn = nn.Sequential(nn.Linear(d_model, d_ffn), nn.ReLU(), nn.Dropout(dropout), nn.Linear(d_ffn, d_model))
        self.dropout = nn.Dropout(dropout)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, frames, width = x.shape
        q, k, v = self.qkv(x).view(batch, frames, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout.p if self.training else 0.0)
        return self.attention_out(x.transpose(1, 2).reshape(batch, frames, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attend(self.attention_norm(x)))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Codecformer(nn.Module):
    """Latents of a mixture [B, D, F] -> masks [B, S, D, F], to be multiplied with those latents."""

    on_latents = True

    def __init__(self, config: CodecformerConfig = CodecformerConfig()):
        super().__init__()
        self.config = c = config
        n_features = c.latent_dim * (1 + (c.features == "both"))
        self.bottleneck = nn.Linear(n_features * c.context, c.d_model, bias=False)
        self.layers = nn.ModuleList(
            TransformerLayer(c.d_model, c.n_heads, c.d_ffn, c.dropout) for _ in range(c.n_layers)
        )
        self.norm = nn.LayerNorm(c.d_model, eps=1e-6)
        self.expand = nn.Linear(c.d_model, c.latent_dim, bias=False)
        self.split = weight_norm(nn.Linear(c.latent_dim, c.latent_dim * c.n_speakers, bias=False))
        # The gate and the last activation are shared by the speakers.
        self.gate_value = nn.Sequential(nn.Linear(c.latent_dim, c.latent_dim), ACTIVATIONS[c.activation](c.latent_dim))
        self.gate = nn.Sequential(nn.Linear(c.latent_dim, c.latent_dim), nn.Sigmoid())
        self.mask_activation = ACTIVATIONS[c.activation](c.latent_dim)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        batch, dim, frames = latents.shape
        x = FEATURES[self.config.features](latents)
        around = self.config.context // 2
        x = F.pad(x, (around, around)).unfold(-1, frames, 1).flatten(1, 2).transpose(1, 2)  # [B, F, D * context]
        x = self.bottleneck(x) + sinusoidal_positions(frames, self.config.d_model, latents.device)
        for layer in self.layers:
            x = layer(x)
        x = self.split(self.expand(self.norm(x)))  # [B, F, S * D]
        x = x.view(batch, frames, self.config.n_speakers, dim)
        x = self.mask_activation(self.gate_value(x) * self.gate(x))
        return x.permute(0, 2, 3, 1)

    @torch.no_grad()
    def fuse(self) -> "Codecformer":
        """Makes one map of `expand` and `split`, between which there is nothing: 9 % fewer MACs, for inference only."""
        fused = nn.Linear(self.config.d_model, self.config.latent_dim * self.config.n_speakers, bias=False)
        fused.weight = nn.Parameter(self.split.weight @ self.expand.weight)
        self.expand, self.split = nn.Identity(), fused
        return self


def estimate_latents(predict_masks, codec, latents, quantize_before: bool = False, quantize_after: bool = False):
    """Latents of mixtures [B, D, F] -> estimates of their speakers' latents [B, S, D, F].

    The two switches are the paper's "RVQ before/after": whether the separator sees quantised latents, and
    whether its estimates are quantised.
    """
    if quantize_before:
        latents = codec.quantize(latents)
    estimates = predict_masks(latents).float() * latents[:, None]
    return codec.quantize(estimates) if quantize_after else estimates


def separate(model, codec, mixture, quantize_before: bool = False, quantize_after: bool = False, situation="clean"):
    """Mixtures [B, T] of any level -> waveforms of their speakers [B, S, T] at that level.

    situation: where the separator stands in a call that travels as codec latents.
        clean        before the codec: it hears the mixture itself.
        transmitted  behind it: it hears the waveform that the receiver decoded, quantised or not as `quantize_before`
                     says. A separator on latents encodes that again.
        latents      on the way, latents in and latents out: a separator on latents works on them as they are, one on
                     waveforms decodes them first and encodes its estimates again.
    quantize_after: the estimates travel on through the RVQ.
    In the "clean" situation the only codec is that of a separator on latents: `quantize_before` quantises the latents
    between its encoder and decoder, and leaves a separator on waveforms alone.
    """
    if situation == "transmitted" or (situation == "latents" and not model.on_latents):
        mixture = codec.transmit(mixture, quantize_before)
    gain = codec.gain(mixture)
    if not model.on_latents:
        estimates = model(mixture * gain) / gain[:, None]
        return codec.transmit(estimates, quantize_after) if quantize_after or situation == "latents" else estimates
    before = quantize_before and situation != "transmitted"
    latents = estimate_latents(model, codec, codec.encode(mixture * gain), before, quantize_after)
    return codec.decode(latents, mixture.shape[-1]) / gain[:, None]
