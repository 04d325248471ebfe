"""The separators: Codecformer, in the latent space of a neural audio codec, and its baseline Sepformer, on waveforms.

Towards Audio Codec-based Speech Separation (Yip et al., 2024), https://arxiv.org/abs/2406.12434.
Attention is All You Need in Speech Separation (Subakan et al., 2021), https://arxiv.org/abs/2010.13154.

    Codecformer: latents of the mixture [B, D, F]  ->  one mask per speaker [B, S, D, F]
    Sepformer:   the mixture [B, T]                ->  estimates [B, S, T]

What is unusual in Codecformer, for a reader who knows Sepformer:
- At 50 frames a second the sequence is short enough for plain self-attention over all of it:
  no chunks, no dual path.
- The masks pass through Snake, x + sin^2(a x)/a, not through a sigmoid or ReLU: the latents and
  the masks have either sign.
- Positions are computed for the length at hand, so any length works (the authors' table ends at 2,500
  frames).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


@dataclass(frozen=True, kw_only=True)
class SeparatorConfig:
    """What both separators are sized by."""

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
    # What the bottleneck sees: the latents, as in the paper, or the logarithm of their squares. Masks follow from levels,
    # and levels are slow to learn from numbers of either sign.
    features: str = "latents"  # or "log_power"
    context: int = 1  # frames that the bottleneck sees at once, odd

    def __post_init__(self):
        super().__post_init__()
        if self.features not in FEATURES:
            raise ValueError(f"unknown features {self.features!r}, choose from {', '.join(FEATURES)}")
        if self.context % 2 == 0:
            raise ValueError(f"context is {self.context}, it must be odd")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}, choose from {', '.join(ACTIVATIONS)}")


@dataclass(frozen=True, kw_only=True)
class SepformerConfig(SeparatorConfig):
    """The defaults are SpeechBrain's WSJ0-2mix recipe: 25,679,361 parameters for two speakers."""

    n_layers: int = 8  # of each of the transformers, two a block
    dropout: float = 0.0
    n_blocks: int = 2
    chunk: int = 250  # frames; half of them shared with the next chunk
    kernel: int = 16  # samples; half of them shared with the next frame


class Snake1d(nn.Module):
    """x + sin^2(alpha x) / alpha with one trained alpha per channel; [B, C, F] -> [B, C, F].

    Source: Ziyin et al., 2020, https://arxiv.org/abs/2006.08195.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.sin(self.alpha * x).square() / (self.alpha + 1e-9)


# The codec is fed at one level, so the floor of the powers is one number too.
FEATURES = {
    "latents": lambda latents: latents,
    "log_power": lambda latents: torch.log10(latents.square() + 1e-3) + 1,
}
# Each is built with the number of channels that it is applied to.
ACTIVATIONS = {
    "snake": Snake1d,
    "relu": lambda channels: nn.ReLU(),
    "tanh": lambda channels: nn.Tanh(),
    "gelu": lambda channels: nn.GELU(),
    "prelu": nn.PReLU,
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

    def __init__(self, config: CodecformerConfig = CodecformerConfig()):
        super().__init__()
        self.config = c = config
        self.bottleneck = nn.Conv1d(c.latent_dim, c.d_model, c.context, padding=c.context // 2, bias=False)
        self.layers = nn.ModuleList(
            TransformerLayer(c.d_model, c.n_heads, c.d_ffn, c.dropout) for _ in range(c.n_layers)
        )
        self.norm = nn.LayerNorm(c.d_model, eps=1e-6)
        self.expand = nn.Conv1d(c.d_model, c.latent_dim, 1, bias=False)
        self.split = weight_norm(nn.Conv1d(c.latent_dim, c.latent_dim * c.n_speakers, 1, bias=False))
        # The gate and the last activation are shared by the speakers.
        self.gate_value = nn.Sequential(
            nn.Conv1d(c.latent_dim, c.latent_dim, 1), ACTIVATIONS[c.activation](c.latent_dim)
        )
        self.gate = nn.Sequential(nn.Conv1d(c.latent_dim, c.latent_dim, 1), nn.Sigmoid())
        self.mask_activation = ACTIVATIONS[c.activation](c.latent_dim)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        batch, dim, frames = latents.shape
        x = self.bottleneck(FEATURES[self.config.features](latents)).transpose(1, 2)  # [B, F, d_model]
        x = x + sinusoidal_positions(frames, x.shape[-1], x.device)
        for layer in self.layers:
            x = layer(x)
        x = self.split(self.expand(self.norm(x).transpose(1, 2)))  # [B, S * D, F]
        x = x.reshape(-1, dim, frames)  # the speakers join the batch
        x = self.mask_activation(self.gate_value(x) * self.gate(x))
        return x.view(batch, self.config.n_speakers, dim, frames)


class DualPathBlock(nn.Module):
    """Attention within chunks, then across them; [B, C, chunks, chunk] -> the same."""

    def __init__(self, c: SepformerConfig):
        super().__init__()
        self.within, self.across = (
            nn.Sequential(
                *(TransformerLayer(c.d_model, c.n_heads, c.d_ffn, c.dropout) for _ in range(c.n_layers)),
                nn.LayerNorm(c.d_model, eps=1e-6),
            )
            for _ in range(2)
        )
        self.within_norm, self.across_norm = (nn.GroupNorm(1, c.d_model, eps=1e-8) for _ in range(2))

    @staticmethod
    def attend(transformer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Runs a transformer along the third axis of [B, C, length, others]."""
        batch, width, length, others = x.shape
        x = x.permute(0, 3, 2, 1).reshape(batch * others, length, width)
        x = transformer(x + sinusoidal_positions(length, width, x.device))
        return x.view(batch, others, length, width).permute(0, 3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.within_norm(self.attend(self.within, x.transpose(2, 3)).transpose(2, 3))
        return x + self.across_norm(self.attend(self.across, x))


class Sepformer(nn.Module):
    """Mixtures [B, T] of any length and level -> estimates [B, S, T]."""

    def __init__(self, config: SepformerConfig = SepformerConfig()):
        super().__init__()
        self.config = c = config
        width = c.d_model
        self.encoder = nn.Conv1d(1, width, c.kernel, c.kernel // 2, bias=False)
        self.norm = nn.GroupNorm(1, width, eps=1e-8)
        self.bottleneck = nn.Conv1d(width, width, 1, bias=False)
        self.blocks = nn.Sequential(*(DualPathBlock(c) for _ in range(c.n_blocks)))
        self.split = nn.Sequential(nn.PReLU(), nn.Conv2d(width, width * c.n_speakers, 1))
        # As in Codecformer, the gate is shared by the speakers.
        self.gate_value = nn.Sequential(nn.Conv1d(width, width, 1), nn.Tanh())
        self.gate = nn.Sequential(nn.Conv1d(width, width, 1), nn.Sigmoid())
        self.expand = nn.Conv1d(width, width, 1, bias=False)
        self.decoder = nn.ConvTranspose1d(width, 1, c.kernel, c.kernel // 2, bias=False)

    def forward(self, mixture: torch.Tensor) -> torch.Tensor:
        length, hop = mixture.shape[-1], self.config.kernel // 2
        missing = max(self.config.kernel - length, 0) + -max(length, self.config.kernel) % hop
        encoded = torch.relu(self.encoder(F.pad(mixture, (0, missing))[:, None]))  # [B, C, L]
        x = self._mask(encoded) * encoded[:, None]
        x = self.decoder(x.flatten(0, 1)).view(len(mixture), self.config.n_speakers, -1)
        return x[..., :length]

    def _mask(self, encoded: torch.Tensor) -> torch.Tensor:
        """[B, C, L] -> [B, S, C, L]"""
        batch, width, length = encoded.shape
        chunk, half = self.config.chunk, self.config.chunk // 2
        # Half a chunk before and after, so that every frame lies in two chunks, and what fills the last one.
        gap = chunk - (half + length) % chunk
        x = F.pad(self.bottleneck(self.norm(encoded)), (half, half + gap))
        padded = x.shape[-1]
        x = self.split(self.blocks(x.unfold(-1, chunk, half)))  # [B, S * C, chunks, chunk]
        x = x.reshape(batch * self.config.n_speakers, width, -1, chunk)  # the speakers join the batch
        # The chunks are added where they overlap.
        x = x.transpose(2, 3).flatten(1, 2)
        x = F.fold(x, (1, padded), (1, chunk), stride=(1, half))[:, :, 0, half : half + length]
        x = torch.relu(self.expand(self.gate_value(x) * self.gate(x)))
        return x.view(batch, self.config.n_speakers, width, length)


SEPARATORS = {"codecformer": (Codecformer, CodecformerConfig), "sepformer": (Sepformer, SepformerConfig)}


def estimate_latents(predict_masks, codec, latents, quantize_before: bool = False, quantize_after: bool = False):
    """Latents of mixtures [B, D, F] -> Codecformer's estimates of their speakers' latents [B, S, D, F].

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
                     says. Codecformer encodes that again.
        latents      on the way, latents in and latents out: Codecformer works on them as they are, Sepformer decodes
                     them first and encodes its estimates again.
    quantize_after: the estimates travel on through the RVQ.
    In the "clean" situation the only codec is Codecformer's own: `quantize_before` quantises the latents between its
    encoder and decoder, and leaves Sepformer alone.
    """
    waveforms = isinstance(model, Sepformer)
    if situation == "transmitted" or (situation == "latents" and waveforms):
        mixture = codec.transmit(mixture, quantize_before)
    if waveforms:
        estimates = model(mixture)
        return codec.transmit(estimates, quantize_after) if quantize_after or situation == "latents" else estimates
    gain = codec.gain(mixture)
    before = quantize_before and situation != "transmitted"
    latents = estimate_latents(model, codec, codec.encode(mixture * gain), before, quantize_after)
    return codec.decode(latents, mixture.shape[-1]) / gain[:, None]
