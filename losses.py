"""SI-SDR, permutation-invariant training, and the three losses that Codecformer can be trained with.

Each training loss has the same signature, so that a new one is one function and one line in LOSSES:

    loss(codec, estimates, sources, margins) -> pairwise [B, S, S]

with `estimates` the waveforms [B, S, T] that the separator arrives at, or their latents [B, S, D, F] where its line
says so, and `sources` [B, S, T] the clean sources at the gain that brought their mixture to the codec's level, so that
their latents are what a mask on the mixture's latents can reach; `margins` frames before and after are there for the
codec's sake and not scored. Entry (b, i, j) says how badly estimate i fits source j, in dB, lower is better; `pit` then
picks the permutation.

SI-SDR is Le Roux et al., 2019, https://arxiv.org/abs/1811.02508; cSI-SDR is the
Codecformer paper's, https://arxiv.org/abs/2406.12434; the embedding loss follows Codecformer-EL,
https://arxiv.org/abs/2411.17998.
"""

from itertools import permutations

import torch

EPS = 1e-10  # an energy: it keeps silence finite and lies far below one 16-bit step in a second of audio


def si_sdr(estimates: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """Scale-invariant signal-to-distortion ratio in dB over the last axis; [..., T], [..., T] -> [...].

    Means are removed first. Silent or constant input gives a finite value.
    """
    estimates = estimates - estimates.mean(-1, keepdim=True)
    sources = sources - sources.mean(-1, keepdim=True)
    scale = (estimates * sources).sum(-1, keepdim=True) / (sources.square().sum(-1, keepdim=True) + EPS)
    target = scale * sources
    distortion = estimates - target
    return 10 * torch.log10((target.square().sum(-1) + EPS) / (distortion.square().sum(-1) + EPS))


def pit(pairwise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Permutation-invariant loss: the best assignment of estimates to sources, one per mixture.

    pairwise: [B, S, S], the loss of estimate i against source j.
    Returns the mean loss of the best assignment [B] and the assignment [B, S]: entry j is the estimate that
    belongs to source j. All permutations are tried, 120 for five speakers.
    """
    columns = torch.arange(pairwise.shape[-1], device=pairwise.device)
    candidates = torch.tensor(list(permutations(range(len(columns)))), device=pairwise.device)  # [P, S]
    loss, best = pairwise[:, candidates, columns].mean(-1).min(-1)  # over [B, P]
    return loss, candidates[best]


def keep_hard(loss: torch.Tensor, threshold: float = -30.0) -> torch.Tensor:
    """Drops mixtures that are separated already: those with a loss [B] at or below the threshold in dB.

    Sepformer's recipe does the same, so that easy mixtures don't drown the others. What is left may be empty.
    """
    return loss[~(loss <= threshold)]  # NaN stays, for the caller to see


def pairwise_negative_si_sdr(estimates: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """[B, S, T], [B, S, T] -> [B, S, S], entry (i, j) the negative SI-SDR of estimate i against source j."""
    return -si_sdr(estimates[:, :, None], sources[:, None])


def pairwise_latent_error(estimates: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Latents [B, S, D, F] twice -> [B, S, S], squared error relative to the target's energy, in dB."""
    error = (estimates[:, :, None] - targets[:, None]).square().mean((-1, -2))
    return 10 * torch.log10((error + EPS) / (targets.square().mean((-1, -2))[:, None] + EPS))


def crop(codec, latents, sources, position, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same `frames` of latents [B, S, D, F] and of sources [B, S, T], at positions [B] from 0 to 1.

    The codec is most of a step with the waveform losses, and a part of a segment tells how good its latents are.
    """
    samples = codec.samples_per_frame
    starts = (position * (max(sources.shape[-1] // samples - frames, 0) + 1)).int().tolist()
    return (
        torch.stack([z[..., start : start + frames] for z, start in zip(latents, starts)]),
        torch.stack([s[..., start * samples : (start + frames) * samples] for s, start in zip(sources, starts)]),
    )


def inner(signal: torch.Tensor, margins: tuple[int, int], per_frame: int) -> torch.Tensor:
    return signal[..., margins[0] * per_frame : signal.shape[-1] - margins[1] * per_frame]


def si_sdr_loss(codec, estimates, sources, margins=(0, 0)):
    """Negative SI-SDR against the clean sources."""
    if any(margins):
        estimates, sources = (inner(x, margins, codec.samples_per_frame) for x in (estimates, sources))
    return pairwise_negative_si_sdr(estimates, sources)


def csi_sdr_loss(codec, estimates, sources, margins=(0, 0)):
    """Negative codec SI-SDR: against the sources as the codec itself would have transmitted them."""
    return si_sdr_loss(codec, estimates, codec.transmit(sources), margins)


def embedding_loss(codec, latents, sources, margins=(0, 0)):
    """The latents' error against those of the clean sources; nothing is decoded."""
    targets = codec.encode(sources)[..., : latents.shape[-1]]  # those of a late codec are more
    return pairwise_latent_error(inner(latents, margins, 1), inner(targets, margins, 1))


# For each name: the loss, and whether its estimates are latents, not decoded.
LOSSES = {"si_sdr": (si_sdr_loss, False), "csi_sdr": (csi_sdr_loss, False), "embedding": (embedding_loss, True)}
