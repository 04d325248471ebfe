"""Sepformer, the baseline: mixtures [B, T]  ->  estimates [B, S, T], on waveforms.

Attention is All You Need in Speech Separation (Subakan et al., 2021), https://arxiv.org/abs/2010.13154.
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
        if any(size < 2 or size % 2 for size in (self.chunk, self.kernel)):
            raise ValueError(f"chunk {self.chunk} and kernel {self.kernel} must be even, since halves are shared")


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

    on_latents = False

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
