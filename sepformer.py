"""Sepformer, the baseline: mixtures [B, T]  ->  estimates [B, S, T], on waveforms.

    a learned transform at 1,000 frames a second  ->  one mask per speaker  ->  back

Attention is All You Need in Speech Separation (Subakan et al., 2021),
https://arxiv.org/abs/2010.13154. So many frames are too long for attention over all of them: they
are cut into chunks that share halves, and attention runs within the chunks and across them in turn
("dual path"). That is what Codecformer, on 50 frames a second, can leave out.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from codecformer import SeparatorConfig, TransformerLayer, sinusoidal_positions


@dataclass(frozen=True, kw_only=True)
class SepformerConfig(SeparatorConfig):
    """The defaults are SpeechBrain's WSJ0-2mix recipe: 25,679,361 parameters for two speakers."""

    n_layers: int = 8  # of each of the transformers, two a block
    dropout: float = 0.0
    n_blocks: int = 2
    chunk: int = 250  # frames; half of them shared with the next chunk
    kernel: int = 16  # samples; half of them shared with the next frame

    def __post_init__(self):
        super().__post_init__()
        for name in ("chunk", "kernel"):
            size = getattr(self, name)
            if size < 2 or size % 2:
                raise ValueError(f"{name} is {size}, it must be even, since halves are shared")


class Transformer(nn.Sequential):
    """Positions, layers and a norm along the third axis of [B, C, length, others]."""

    def __init__(self, config: SepformerConfig):
        layers = [
            TransformerLayer(config.d_model, config.n_heads, config.d_ffn, config.dropout)
            for _ in range(config.n_layers)
        ]
        super().__init__(*layers, nn.LayerNorm(config.d_model, eps=1e-6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, width, length, others = x.shape
        x = x.permute(0, 3, 2, 1).reshape(batch * others, length, width)
        x = super().forward(x + sinusoidal_positions(length, width, x.device))
        return x.view(batch, others, length, width).permute(0, 3, 2, 1)


class DualPathBlock(nn.Module):
    """Attention within chunks, then across them; [B, C, chunks, chunk] -> the same."""

    def __init__(self, config: SepformerConfig):
        super().__init__()
        self.within = Transformer(config)
        self.across = Transformer(config)
        self.within_norm = nn.GroupNorm(1, config.d_model, eps=1e-8)
        self.across_norm = nn.GroupNorm(1, config.d_model, eps=1e-8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        within = self.within(x.transpose(2, 3)).transpose(2, 3)
        x = x + self.within_norm(within)
        return x + self.across_norm(self.across(x))


class Sepformer(nn.Module):
    """Mixtures [B, T] of any length and level -> estimates [B, S, T]."""

    on_latents = False

    def __init__(self, config: SepformerConfig = SepformerConfig()):
        super().__init__()
        self.config = config
        width = config.d_model
        hop = config.kernel // 2
        self.encoder = nn.Conv1d(1, width, config.kernel, hop, bias=False)
        self.norm = nn.GroupNorm(1, width, eps=1e-8)
        self.bottleneck = nn.Conv1d(width, width, 1, bias=False)
        self.blocks = nn.Sequential(*(DualPathBlock(config) for _ in range(config.n_blocks)))
        self.split = nn.Sequential(nn.PReLU(), nn.Conv2d(width, width * config.n_speakers, 1))
        # As in Codecformer, the gate is shared by the speakers.
        self.gate_value = nn.Sequential(nn.Conv1d(width, width, 1), nn.Tanh())
        self.gate = nn.Sequential(nn.Conv1d(width, width, 1), nn.Sigmoid())
        self.expand = nn.Conv1d(width, width, 1, bias=False)
        self.decoder = nn.ConvTranspose1d(width, 1, config.kernel, hop, bias=False)

    def forward(self, mixture: torch.Tensor) -> torch.Tensor:
        batch, length = mixture.shape
        kernel = self.config.kernel
        # So many zeros at the end that every sample lies in whole frames.
        whole = max(length, kernel)
        whole += -whole % (kernel // 2)
        missing = whole - length
        padded = F.pad(mixture, (0, missing))
        encoded = torch.relu(self.encoder(padded.unsqueeze(1)))  # [B, C, L]
        masked = self.predict_masks(encoded) * encoded.unsqueeze(1)  # [B, S, C, L]
        decoded = self.decoder(masked.flatten(0, 1))  # [B * S, 1, T]
        return decoded.view(batch, self.config.n_speakers, -1)[..., :length]

    def predict_masks(self, encoded: torch.Tensor) -> torch.Tensor:
        """[B, C, L] -> [B, S, C, L]"""
        batch, width, length = encoded.shape
        n_speakers = self.config.n_speakers
        chunk = self.config.chunk
        half = chunk // 2
        # Half a chunk before and after, so that every frame lies in two chunks, and what is missing
        # in the last one: as in SpeechBrain, a whole chunk where nothing is.
        gap = chunk - (half + length) % chunk
        x = F.pad(self.bottleneck(self.norm(encoded)), (half, half + gap))
        padded_length = x.shape[-1]
        x = x.unfold(-1, chunk, half)  # [B, C, chunks, chunk]
        x = self.split(self.blocks(x))  # [B, S * C, chunks, chunk]
        x = x.reshape(batch * n_speakers, width, -1, chunk)  # the speakers join the batch
        # The chunks are added where they overlap.
        x = x.transpose(2, 3).flatten(1, 2)  # [B * S, C * chunk, chunks]
        x = F.fold(x, (1, padded_length), (1, chunk), stride=(1, half))
        x = x[:, :, 0, half : half + length]  # [B * S, C, L]
        x = torch.relu(self.expand(self.gate_value(x) * self.gate(x)))
        return x.view(batch, n_speakers, width, length)
