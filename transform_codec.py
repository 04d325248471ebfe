"""The codec `transform`: a windowed Fourier transform whose codebooks were fitted by k-means.

No gradients were involved, so this is no neural codec. It asks whether learned latents matter,
since it keeps the waveform exactly. 8 kHz, sine windows of 40 ms every 20 ms (50 frames a second),
6 kbit/s. Each window goes to 160 cosines and 160 sines, the MDCT and its sine twin (Princen and
Bradley, 1986), which overlap and add to the waveform.
"""

import math

import torch
from torch import nn

HOP = 160
# One scale for all latents, so that distances between them are those between waveforms; loud ones
# come to about 1.
SCALE = 32.0


def lapped_transform(size: int) -> torch.Tensor:
    """Rows of `size` cosines, then `size` sines, under sine windows of two frames of samples.

    [2 * size, 2 * size], a tight frame: an analysis whose transpose is the synthesis.
    """
    time = torch.arange(2 * size, dtype=torch.float64) + 0.5
    band = torch.arange(size, dtype=torch.float64)[:, None]
    phase = math.pi / size * (time + size / 2) * (band + 0.5)
    window = torch.sin(math.pi * time / (2 * size)) / math.sqrt(size)
    return (torch.cat([phase.cos(), phase.sin()]) * window).float()


class TransformCodec(nn.Module):
    """A bare network for `Codec`: its convolutions are the transform, its quantizer is DAC's."""

    sample_rate = 8000
    hop_length = HOP
    latent_dim = 2 * HOP
    n_codebooks = 12
    codebook_size = 1024

    def __init__(self, quantizer: nn.Module):
        super().__init__()
        basis = lapped_transform(HOP)[:, None]
        self.encoder = nn.Conv1d(1, 2 * HOP, 2 * HOP, HOP, padding=HOP // 2, bias=False)
        self.encoder.weight = nn.Parameter(basis * SCALE)
        self.decoder = nn.ConvTranspose1d(2 * HOP, 1, 2 * HOP, HOP, padding=HOP // 2, bias=False)
        self.decoder.weight = nn.Parameter(basis / SCALE)
        self.quantizer = quantizer
