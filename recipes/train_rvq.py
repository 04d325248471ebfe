"""Trains the half of a codec that makes codes: 6 kbit/s of the latents of recipes/train_codec.py.

    python -m recipes.train_rvq --latents FILE --data voices --valid libri/valid --out runs/codec
    python -m recipes.train_rvq --latents runs/codec/codec.pth --trained ...     longer, from there

--out gets codec.pth (the whole codec, for `Codec.load`) and log.csv. Encoder and decoder stay as
they are: what is trained are the networks between latents and RVQ, and the codebooks.

What is unusual:
- The loss is on what the frozen decoder makes of the quantised latents: mostly the log mel
  spectrum, which is what one hears of so few bits, and a little SI-SDR.
- Two examples in five bypass the RVQ, and are to keep the waveform: so the networks keep of it what
  the points between them can hold, and codes come to stand for waveforms. Without them the mel
  spectrum alone decides, and quality stands still after minutes.
- The networks start as the projection onto the latents' 64 principal axes, and back, and first
  learn without the RVQ. That starts by k-means. Its entries then are running means of the points
  that choose them: the same aim as a codebook loss under Adam, reached several times sooner.
- There are twice as many latents as samples, so that many decode alike: what half of their
  dimensions hold is never heard. But it is seen by a separator, which has learned from latents as
  the encoder makes them. So the last layer after the RVQ brings quantised ones back to those. It is
  not trained but fitted, whenever the codec is saved.
- The commitment loss is relative to the points' variance, of which no gradient is taken: with it,
  the loss is lowered most easily by points that hold less, a few clusters far apart.
- No adversarial losses: on CPUs they made a step twelve times slower.

Straight-through RVQ with a commitment loss, running means and entries that start again are
SoundStream's (Zeghidour et al., 2021, https://arxiv.org/abs/2107.03312); quantiser dropout is as in
DAC (Kumar et al., 2023, https://arxiv.org/abs/2306.06546).
"""

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from dac_wrapper import load_file
from data import SpeakerMixtures
from losses import si_sdr
from program import Parser, UserError, choose_device, number, run_program, whole, writing
from recipes.train_codec import (
    CLIP,
    N_REFERENCE,
    RATE,
    SECONDS,
    SPEEDS,
    Examples,
    LogMel,
    learning_rate,
    read_utterances,
    report_rounded,
    validate,
)
from soundstream import ResidualUnit, SoundStream, nearest, on_frames, save_soundstream

LEARNING_RATE = 1e-3
BATCH_SIZE = 16
MIXTURES = 0.2  # share of mixtures drawn that stay mixed
RVQ_STARTS = 200  # steps before
QUANTISED = 0.6  # share of the examples that pass it
ALL_CODEBOOKS = 0.6  # share of the steps that use them all; the others as many as chance says
NOISE = 0.2  # in the latents that the projection is fitted to, as a share of their deviation
DECAY = 0.99  # of an entry's running means
DEAD = 0.05  # points a step that choose an entry; below it the entry starts again
# weights of the losses, beside that of the mel spectrum
SI_SDR_QUANTISED = 0.02  # a dB; of the same examples before the RVQ starts, too
SI_SDR_BYPASSED = 0.05
COMMITMENT = 0.25


def train(
    latents: str,
    trained: bool,
    data: str,
    valid: str,
    out: Path,
    minutes: float,
    every: float,
    seed: int,
) -> None:
    """A whole run; see the flags of `main`. Raises UserError."""
    device = choose_device()
    voices = SpeakerMixtures(data, RATE, seconds=SECONDS, size=10**9, seed=seed, speeds=SPEEDS)
    examples = Examples(voices, BATCH_SIZE, MIXTURES)
    utterances = read_utterances(valid)
    network, _ = load_file(latents)
    if not isinstance(network, SoundStream) or network.config.code_dim is None:
        raise UserError(f"{latents} was not written by recipes.train_codec: give its latents.pth")
    network.to(device).requires_grad_(False)
    reference = [examples[10**6 + i].to(device) for i in range(N_REFERENCE // BATCH_SIZE)]
    torch.manual_seed(seed)
    if not trained:
        start_as_axes(network, torch.cat([network.encoder(wav) for wav in reference]))
    rvq_starts = 0 if trained else RVQ_STARTS
    weights = [*network.analysis.parameters(), *network.synthesis[:-1].parameters()]
    for weight in weights:
        weight.requires_grad_(True)
    codebooks = Codebooks(network.quantizer.codebooks.data)
    optimizer = torch.optim.AdamW(weights, LEARNING_RATE, betas=(0.8, 0.99), fused=True)
    log_mel = LogMel().to(device)
    autocast = torch.autocast(device.type, torch.bfloat16)
    batches = iter(DataLoader(examples, batch_size=None, sampler=range(10**9), num_workers=1))
    with writing(out):
        out.mkdir(parents=True)

    step = 0
    start = time.monotonic()
    saved = -math.inf  # it is scored as it starts
    while True:
        spent = (time.monotonic() - start) / 60  # minutes
        if spent >= minutes or time.monotonic() - saved > 60 * every:
            fit_projection(network, reference)
            save_soundstream(network, out / "codec.pth", half=True)
            scores = validate(network, utterances, quantize=True)
            report_rounded(out / "log.csv", {"step": step, "minutes": spent, **scores})
            saved = time.monotonic()
        if spent >= minutes:
            return

        torch.manual_seed(seed + step)
        if step == rvq_starts and not trained:
            with torch.no_grad():
                points = [on_frames(network.analysis, network.encoder(wav)) for wav in reference]
                codebooks.fit(as_rows(torch.cat(points)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(LEARNING_RATE, step, spent / minutes)

        wav = next(batches).to(device)  # [B, 1, T]
        with torch.no_grad():
            encoded = network.encoder(wav)  # [B, D, F]
        with autocast:
            points = on_frames(network.analysis, encoded).float()  # [B, code_dim, F]
        passes = torch.rand(len(wav), device=device) < QUANTISED  # [B]
        given = points
        commitment = 0.0
        if step >= rvq_starts:
            n_codebooks = draw_n_codebooks(network.n_codebooks)
            with torch.no_grad():
                entries, codes = network.quantizer(points, n_codebooks)
            straight_through = points + (entries - points).detach()
            given = torch.where(passes[:, None, None], straight_through, points)
            commitment = (points - entries).square().mean() / points.detach().var()
        with autocast:
            received = on_frames(network.synthesis[:-1], given)  # [B, D, F]
            decoded = network.decoder(received).float()[:, 0]  # [B, T]
        mel = log_mel(decoded, wav[:, 0])  # [B]
        sdr = si_sdr(decoded, wav[:, 0])  # [B]
        weight = torch.where(passes, SI_SDR_QUANTISED, SI_SDR_BYPASSED)
        loss = (mel - weight * sdr).mean() + COMMITMENT * commitment
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        if step >= rvq_starts:
            codebooks.follow(points.detach(), codes)
        step += 1


def draw_n_codebooks(n_codebooks: int) -> int:
    """How many a step uses."""
    if torch.rand(()) < ALL_CODEBOOKS:
        return n_codebooks
    return int(torch.randint(1, n_codebooks, ()))


def as_rows(points: torch.Tensor) -> torch.Tensor:
    """[B, D, F] -> [B * F, D]"""
    return points.transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def start_as_axes(network: SoundStream, latents: torch.Tensor) -> None:
    """Makes of the networks around the RVQ the principal axes of latents [B, D, F], and back."""
    for module in [*network.analysis, *network.synthesis]:
        if isinstance(module, ResidualUnit):  # adds nothing yet
            module.layers[-1].weight.zero_()
            module.layers[-1].bias.zero_()
    rows = as_rows(latents)
    _, axes = torch.linalg.eigh(rows.T @ rows)  # [D, D], by rising variance
    axes = axes[:, -network.config.code_dim :].T  # [code_dim, D]
    there = network.analysis[-1]
    back = network.synthesis[0]
    there.weight.copy_(axes[:, :, None, None])
    back.weight.copy_(axes.T[:, :, None, None])
    there.bias.zero_()
    back.bias.zero_()


@torch.no_grad()
def fit_projection(network: SoundStream, reference: list[torch.Tensor]) -> None:
    """Makes the last layer after the RVQ do what decoding and encoding again would.

    It is linear and sees three frames: least squares, on what quantised latents of `reference`
    [B, 1, T] hold before it. A little noise keeps that from being ill-conditioned.
    """
    projection = network.synthesis[-1]
    inputs = []
    outputs = []
    for wav in reference:
        points = on_frames(network.analysis, network.encoder(wav))
        entries, _ = network.quantizer(points, network.n_codebooks)
        latents = on_frames(network.synthesis[:-1], entries)  # [B, D, F]
        latents = latents + NOISE * latents.std() * torch.randn_like(latents)
        seen = F.pad(latents, projection.ends).unfold(2, 3, 1)  # [B, D, F, 3]
        inputs.append(seen.transpose(1, 2).flatten(2).flatten(0, 1))  # [B * F, D * 3]
        outputs.append(as_rows(network.encoder(network.decoder(latents))))
    matrix = torch.linalg.lstsq(torch.cat(inputs), torch.cat(outputs)).solution  # [D * 3, D]
    projection.weight.copy_(matrix.T.view_as(projection.weight))


class Codebooks:
    """Moves the entries of an RVQ after the points that choose them, as SoundStream does.

    entries: [n_codebooks, codebook_size, dim], changed in place.
    """

    def __init__(self, entries: torch.Tensor):
        self.entries = entries
        # Running means: of how many points chose an entry in a step, and of their sum.
        self.counts = torch.ones_like(entries[..., 0])
        self.sums = entries.clone()

    @torch.no_grad()
    def fit(self, points: torch.Tensor, iterations: int = 6) -> None:
        """Codebook after codebook by k-means, on what the ones before leave of points [N, D]."""
        per_step = BATCH_SIZE * round(SECONDS * 50)  # points that `follow` is given
        rest = points
        for k, entries in enumerate(self.entries):
            means, chosen = k_means(rest, len(entries), iterations)
            times_chosen = torch.bincount(chosen, minlength=len(means)).clamp(min=1)
            entries.copy_(means)
            self.counts[k] = times_chosen * per_step / len(points)
            self.sums[k] = means * self.counts[k, :, None]
            rest = rest - means[chosen]

    @torch.no_grad()
    def follow(self, points: torch.Tensor, codes: torch.Tensor) -> None:
        """One step of the running means, by points [B, D, F] and what they chose [B, n, F].

        Entries that hardly any chooses any more start again at a point.
        """
        rest = as_rows(points)
        for k, chosen in enumerate(codes.transpose(0, 1).flatten(1)):  # [B * F]
            left = rest - self.entries[k, chosen]
            counts = self.counts[k]
            sums = self.sums[k]
            ones = torch.ones_like(rest[:, 0])
            counts.mul_(DECAY).index_add_(0, chosen, ones, alpha=1 - DECAY)
            sums.mul_(DECAY).index_add_(0, chosen, rest, alpha=1 - DECAY)
            dead = counts < DEAD
            anew = rest[torch.randint(len(rest), dead.shape, device=rest.device)]
            sums.copy_(torch.where(dead[:, None], 2 * DEAD * anew, sums))
            counts.masked_fill_(dead, 2 * DEAD)
            self.entries[k] = sums / counts[:, None]
            rest = left


def k_means(points: torch.Tensor, n: int, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`n` means [n, D] of points [N, D], from random ones, and the nearest of each point [N]."""
    means = points[torch.randperm(len(points), device=points.device)[:n]]
    for _ in range(iterations):
        chosen = assign(points, means)
        counts = torch.bincount(chosen, minlength=n)[:, None]
        sums = torch.zeros_like(means).index_add_(0, chosen, points)
        means = torch.where(counts > 0, sums / counts.clamp(min=1), means)
    return means, assign(points, means)


def assign(points: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """The number of the mean nearest to each point, in parts that fit into memory."""
    return torch.cat([nearest(part, means) for part in points.split(4096)])


def main() -> None:
    parser = Parser(description="Trains the half of a codec that makes codes.")
    parser.add_argument("--latents", required=True, help="weights of recipes.train_codec")
    parser.add_argument(
        "--trained", action="store_true", help="they are of this recipe: go on from its codes"
    )
    parser.add_argument("--data", required=True, help="folder with a folder per speaker")
    parser.add_argument("--valid", required=True, help="folder of other speakers")
    parser.add_argument("--out", type=Path, required=True, help="new folder of the run")
    parser.add_argument("--minutes", type=number(1e-9), default=68.0, help="of training")
    parser.add_argument("--every", type=number(0), default=6.0, help="minutes between scores")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    args = parser.parse_args()
    if args.out.exists():
        raise UserError(f"{args.out} is there already: choose another --out")
    train(**vars(args))


if __name__ == "__main__":
    run_program(main)
