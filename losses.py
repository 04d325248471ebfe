"""SI-SDR, permutation-invariant training (PIT), and the three losses Codecformer is trained with.

A training loss compares every estimate with every source of its mixture, and `pit` then picks the
assignment that is best for each mixture. All have the same signature, so that a new loss is one
function and one line in LOSSES, which also says what the loss compares:

    loss(codec, estimates, sources, margin) -> pairwise [B, S, S], in dB, lower is better

    estimates   what the separator arrives at: waveforms [B, S, T], or latents [B, S, D, F]
    sources     the clean sources [B, S, T], multiplied by the gain that brought their mixture to
                the codec's level: their latents are what a mask on the mixture's latents can reach.
                For cSI-SDR, the sources as the codec transmits them
    margin      frames at either end that the codec needs for context, and that are not scored

Entry [b, i, j] says how badly estimate i fits source j of mixture b.

SI-SDR is Le Roux et al., 2019, https://arxiv.org/abs/1811.02508; the codec SI-SDR (cSI-SDR) is the
Codecformer paper's, https://arxiv.org/abs/2406.12434; the loss between latents follows
Codecformer-EL, https://arxiv.org/abs/2411.17998.
"""

from itertools import permutations

import torch

# An energy. It keeps silence finite, and lies below that of a single 16-bit step.
EPS = 1e-10


def si_sdr(estimates: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """Scale-invariant signal-to-distortion ratio in dB; [..., T], [..., T] -> [...].

    Means are removed first. Silent or constant signals give a finite value.
    """
    estimates = estimates - estimates.mean(-1, keepdim=True)
    sources = sources - sources.mean(-1, keepdim=True)
    dot = (estimates * sources).sum(-1, keepdim=True)
    energy = sources.square().sum(-1, keepdim=True)
    target = dot / (energy + EPS) * sources  # the part of the estimate that is the source
    distortion = estimates - target
    ratio = (target.square().sum(-1) + EPS) / (distortion.square().sum(-1) + EPS)
    return 10 * torch.log10(ratio)


def pairwise_negative_si_sdr(estimates: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """[B, S, T], [B, S, T] -> [B, S, S]: the negative SI-SDR of estimate i against source j."""
    every_estimate = estimates.unsqueeze(2)  # [B, S, 1, T]
    every_source = sources.unsqueeze(1)  # [B, 1, S, T]
    return -si_sdr(every_estimate, every_source)


def pairwise_latent_error(estimates: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Latents [B, S, D, F] twice -> [B, S, S]: squared error over the target's energy, in dB."""
    every_estimate = estimates.unsqueeze(2)  # [B, S, 1, D, F]
    every_target = targets.unsqueeze(1)  # [B, 1, S, D, F]
    error = (every_estimate - every_target).square().mean((-1, -2))  # [B, S, S]
    energy = every_target.square().mean((-1, -2))  # [B, 1, S]
    return 10 * torch.log10((error + EPS) / (energy + EPS))


def pit(pairwise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Permutation-invariant training: the best assignment of estimates to sources of each mixture.

    pairwise: [B, S, S], the loss of estimate i against source j.
    Returns the mean loss of the best assignment, [B], and the assignment, [B, S], whose entry j is
    the estimate that belongs to source j. All permutations are tried: 2 for two speakers, 120 for
    five.
    """
    n_speakers = pairwise.shape[-1]
    device = pairwise.device
    candidates = torch.tensor(list(permutations(range(n_speakers))), device=device)  # [P, S]
    sources = torch.arange(n_speakers, device=device)  # [S]
    losses = pairwise[:, candidates, sources].mean(-1)  # [B, P]: of source j with estimate p[j]
    best_loss, best = losses.min(-1)
    return best_loss, candidates[best]


def without_margin(signals: torch.Tensor, margin: int) -> torch.Tensor:
    """Leaves out the first and last `margin` steps; [..., T] -> [..., T - 2 * margin]."""
    return signals[..., margin : signals.shape[-1] - margin]


def si_sdr_loss(codec, estimates, sources, margin: int = 0) -> torch.Tensor:
    """Negative SI-SDR; against sources as the codec transmits them it is the codec SI-SDR."""
    if margin:
        samples = margin * codec.samples_per_frame
        estimates = without_margin(estimates, samples)
        sources = without_margin(sources, samples)
    return pairwise_negative_si_sdr(estimates, sources)


def embedding_loss(codec, latents, sources, margin: int = 0) -> torch.Tensor:
    """The error of the latents against those of the clean sources; nothing is decoded."""
    targets = codec.encode(sources)
    # Of a crop that train.py made, a codec that is late makes more frames than the crop has.
    targets = targets[..., : latents.shape[-1]]
    return pairwise_latent_error(without_margin(latents, margin), without_margin(targets, margin))


# Name: the loss, and what it compares: "waveforms", "transmitted" (waveforms, of sources that were
# encoded, quantised and decoded) or "latents" (nothing is decoded).
LOSSES = {
    "si_sdr": (si_sdr_loss, "waveforms"),
    "csi_sdr": (si_sdr_loss, "transmitted"),
    "embedding": (embedding_loss, "latents"),
}
