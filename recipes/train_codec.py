"""Trains a small codec of one's own: a SoundStream at 8 kHz, 50 frames/s and 6 kbit/s.

    python -m recipes.train_codec --data speech/all --valid libri/valid --out runs/codec --minutes 120
    python -m recipes.train_codec --data speech/all --valid libri/valid --out runs/codec --minutes 120 --resume

`out` gets last.pt (to resume from), codec.pth (the weights, for `Codec.load`) and log.csv.

What is unusual:
- Every step trains two paths through one decoder: some examples pass the RVQ, the others its unquantised latents,
  which is what a separator works on. The first are pulled towards the spectrum, which is what one hears of so few
  bits, the others towards the waveform, whose SI-SDR is the ceiling of separation.
- Some of the latter are decoded from the sum of two examples' latents, to be the sum of their waveforms, or, through an
  ideal ratio mask, one of them: what masks need is that latents add, and that each is mostly of one voice.
- The network starts transparent (see `start_transparent`) and learns what few bits can carry. As it starts, two
  signals are as far apart in latents as in waveforms; a loss keeps that (see `distance_loss`), so that a separator's
  error between latents is its error between waveforms.
- The RVQ starts by k-means on the latents of a network trained without it, in the principal axes of what each codebook
  is given. Its entries then are running means of the latents that choose them: the same aim as a codebook loss under
  Adam, reached several times sooner.
- The commitment loss is relative to the latents' variance, of which gradients are taken too: otherwise it is lowered
  most easily by smaller latents, which shrank twenty times in an hour.
- No adversarial losses: on CPUs they made a step twelve times slower.

Straight-through RVQ with a commitment loss, running means and entries that start again are SoundStream's (Zeghidour
et al., 2021, https://arxiv.org/abs/2107.03312); quantiser dropout and the spectral losses are as in DAC (Kumar et al.,
2023, https://arxiv.org/abs/2306.06546).
"""

import copy
import csv
import itertools
import math
import time
from pathlib import Path

import librosa  # for its mel filters
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from checkpoint import SettingsError, at_least, choose_device, make_folder, mixed_precision, run_program, save
from dac_wrapper import LEVEL, Codec, first_line
from data import Parser, SpeakerMixtures
from evaluate import score
from losses import si_sdr
from recipes.codec_scores import read_signals
from recipes.transform_codec import k_means, lapped_transform
from soundstream import SLOPE, Conv, ResidualUnit, SoundStream, SoundStreamConfig, Upsample, save_soundstream

RATE = 8000
SHAPE = SoundStreamConfig(
    sample_rate=RATE, kernel=64, stride=16, widths=(64, 192, 320, 320), strides=(5, 2, 1), group_width=1 << 20,
    latent_dim=320, n_codebooks=12, codebook_size=1024, codebook_dim=16, causal=False,
)  # fmt: skip
SECONDS = 0.8
SPEEDS = tuple(range(90, 113))  # percent
LEARNING_RATE, WARMUP, CLIP = 7e-4, 100, 1.0
FITTED_AT = (200, 1500, 4000)  # steps at which the RVQ starts, and starts again on latents that have changed
QUANTISED = 0.6  # share of the examples that pass it
ALL_CODEBOOKS = 0.6  # share of the steps that use them all; the others as many as chance says
SI_SDR = 0.05  # weight a dB, of the examples that bypass the RVQ
MEL, COMMITMENT, DISTANCE = 1.0, 0.25, 3.0
DECAY, DEAD = 0.99, 0.05  # of an entry's running means; latents a step below which it starts again
FLOOR = 1e-5  # a mel band's power, about 35 dB below that of loud speech
RESUMED = ("counts", "sums", "step", "minutes")  # of last.pt, beside weights and optimizer
FFTS = {64: 10, 128: 20, 256: 40, 512: 80, 1024: 80}  # window in samples: mel bands


class LogMel(nn.Module):
    """L1 between log mel spectra at several scales, one value an example."""

    def __init__(self):
        super().__init__()
        for size, bands in FFTS.items():
            filters = librosa.filters.mel(sr=RATE, n_fft=size, n_mels=bands, norm=None)
            self.register_buffer(f"filters_{size}", torch.from_numpy(filters[filters.any(1)]), persistent=False)
            window = torch.hann_window(size)
            self.register_buffer(f"window_{size}", window / window.norm(), persistent=False)

    def forward(self, estimates, references):
        """[B, T] twice -> [B], in units of 10 dB."""
        total = 0
        for size in FFTS:
            with torch.no_grad():
                target = self.spectrum(references, size)
            total = total + (self.spectrum(estimates, size) - target).abs().mean((1, 2))
        return total / len(FFTS)

    def spectrum(self, wav, size):
        window, filters = self.get_buffer(f"window_{size}"), self.get_buffer(f"filters_{size}")
        bins = torch.stft(wav, size, size // 2, window=window, return_complex=True)
        return (filters @ (bins.real.square() + bins.imag.square()) + FLOOR).log10()


def distance_loss(latents: torch.Tensor, wav: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """How far distances between examples' latents [B, D, F] are from those between their waveforms [B, 1, T].

    Of each frame of each example, to the same frame of the next one. frames: a tight frame [D, 1, 2 * hop], whose
    distances are those of the windowed waveforms. Returns the mean squared logarithm of their ratio [B], in bels.
    """
    hop = frames.shape[-1] // 2
    with torch.no_grad():
        reference = F.conv1d(F.pad(wav - wav.roll(1, 0), (0, hop)), frames, stride=hop)
        reference = reference.square().sum(1)  # [B, F]
        floor = 1e-2 * reference.mean()
    distance = (latents - latents.roll(1, 0)).square().sum(1)
    return ((distance + floor) / (reference + floor)).log10().square().mean(1)


@torch.no_grad()
def start_transparent(codec: SoundStream) -> SoundStream:
    """Sets up a network that is not causal to pass waveforms through, which else takes longer to learn than the rest.

    Each layer starts as an orthogonal matrix from the samples it sees to as many channels, its mirror in the decoder as
    the transpose. Channels come in pairs of opposite sign, which leaky ReLUs leave linear ("looks linear", Balduzzi et
    al., 2017, https://arxiv.org/abs/1702.08591); residual units add nothing yet; all other weights keep a tenth of
    their random values. The last matrix makes of two frames the cosines and sines of narrow bands, a tight frame: masks
    can separate voices only where a latent is mostly of one of them.
    """
    first, *down, last = (layer for layer in codec.encoder.layers if isinstance(layer, Conv))
    entry, *up, final = (layer for layer in codec.decoder.layers if isinstance(layer, Conv | Upsample))
    for unit in codec.modules():
        if isinstance(unit, ResidualUnit):
            unit.layers[-1].weight.zero_()
            unit.layers[-1].bias.zero_()
    for layer in (first, *down, last, entry, *up, final):
        layer.weight.mul_(0.1)
        layer.bias.zero_()

    size = first.in_channels
    basis = nn.init.orthogonal_(torch.empty(size, size))  # of the channels so far, in samples
    # Of the strides in their kernels, these two layers start with the present one alone.
    set_pairs(first.weight[:, :, 0], F.pad(basis[:, :, None] / LEVEL, first.ends), paired_in=False)
    set_pairs(final.weight[:, :, 0], F.pad(basis.T[:, :, None] * LEVEL, first.ends), paired_out=False)
    for before, after in zip(down, reversed(up)):
        stride = before.stride[1]
        new = min(size * stride, before.out_channels // 2)
        matrix = nn.init.orthogonal_(torch.empty(new, size * stride)).view(new, size, stride)
        set_pairs(before.weight[:, :, 0, before.ends[0] :], matrix)
        set_pairs(after.weight.transpose(0, 1)[:, :, 0, after.start :], matrix.transpose(0, 1))
        basis, size = torch.einsum("ncj,cs->njs", matrix, basis).flatten(1), new
    frames = lapped_transform(codec.hop_length).unflatten(1, (2, -1))  # of this frame and the next
    matrix = torch.einsum("djs,cs->dcj", frames, basis)
    set_pairs(last.weight[:, :, 0, last.ends[0] :], matrix, paired_out=False)
    # Its transpose: this frame from the latents of the last one and its own.
    set_pairs(entry.weight[:, :, 0, entry.ends[0] - 1 :], matrix.transpose(0, 1).flip(2), paired_in=False)
    return codec


def set_pairs(weight, matrix, paired_out=True, paired_in=True) -> None:
    """Writes [out, in, taps] into the first channels and taps of a weight, and negated between opposite ones."""
    out, width, taps = matrix.shape
    for row, sign in ((0, 1), (len(weight) // 2, -1))[: 1 + paired_out]:
        for column, other in ((0, 1), (weight.shape[1] // 2, -1))[: 1 + paired_in]:
            # A leaky ReLU makes (1 + SLOPE) x of the difference between x and -x.
            part = matrix * sign * other / (1 + SLOPE if paired_in else 1)
            weight[row : row + out, column : column + width, :taps] = part


class Examples:
    """Batches [size, 1, T] by step, around a codec's level; a share `mixtures` of the draws stay mixed."""

    def __init__(self, voices: SpeakerMixtures, size: int, mixtures: float):
        self.voices, self.size, self.mixtures = voices, size, mixtures

    def __getitem__(self, step: int) -> torch.Tensor:
        rng = np.random.default_rng([self.voices.seed, 1, step])
        examples, index = [], step * self.size
        while len(examples) < self.size:
            item = self.voices[index]
            examples += [item["mixture"]] if rng.random() < self.mixtures else list(item["sources"])
            index += 1
        wav = torch.from_numpy(np.stack(examples[: self.size]))
        gain = 10 ** (rng.normal(0, 4, (self.size, 1)) / 20)
        return (wav * LEVEL / wav.std(-1, keepdim=True) * torch.from_numpy(gain).float())[:, None]


class Codebooks:
    """Moves the entries of an RVQ after the latents that choose them, as SoundStream does."""

    def __init__(self, codec: SoundStream):
        self.quantizer = codec.quantizer
        self.entries = codec.quantizer.codebooks.data
        self.counts = torch.ones_like(self.entries[..., 0])  # running means of how many latents chose an entry
        self.sums = self.entries.clone()  # and of their sum

    @torch.no_grad()
    def fit(self, latents: torch.Tensor, per_step: int, iterations: int = 6) -> None:
        """Codebook after codebook by k-means, on what the ones before leave of latents [N, D].

        In their principal axes, which hold most of it: full codebooks are 0.2 dB better, and twenty times as large.
        per_step: how many latents `follow` will be given.
        """
        rest, size = latents, self.entries.shape[-1]
        for k, entries in enumerate(self.entries):
            axes = torch.linalg.eigh(rest.T @ rest)[1][:, -size:].T  # [codebook_dim, D]
            self.quantizer.project[k], self.quantizer.restore[k] = axes, axes.T
            means, chosen = k_means(rest @ axes.T, len(entries), iterations)
            entries.copy_(means)
            self.counts[k] = torch.bincount(chosen, minlength=len(means)).clamp(min=1) * per_step / len(latents)
            self.sums[k] = means * self.counts[k, :, None]
            rest = rest - means[chosen] @ axes

    @torch.no_grad()
    def follow(self, latents: torch.Tensor, codes: torch.Tensor) -> None:
        """One step of the running means, by latents [B, D, F] and what they chose [B, n_codebooks, F].

        Entries that hardly any chooses any more start again at a latent.
        """
        rest = latents.transpose(1, 2).flatten(0, 1)
        for k, chosen in enumerate(codes.transpose(0, 1).flatten(1)):
            points = rest @ self.quantizer.project[k].T
            left = rest - self.entries[k, chosen] @ self.quantizer.restore[k].T
            counts, sums = self.counts[k], self.sums[k]
            counts.mul_(DECAY).index_add_(0, chosen, torch.ones_like(points[:, 0]), alpha=1 - DECAY)
            sums.mul_(DECAY).index_add_(0, chosen, points, alpha=1 - DECAY)
            dead = counts < DEAD
            anew = points[torch.randint(len(points), dead.shape, device=points.device)]
            sums.copy_(torch.where(dead[:, None], 2 * DEAD * anew, sums))
            counts.masked_fill_(dead, 2 * DEAD)
            self.entries[k] = sums / counts[:, None]
            rest = left


@torch.no_grad()
def at_unit_scale(codec: SoundStream, examples: list[torch.Tensor]) -> SoundStream:
    """A copy that computes the same with latents of a standard deviation of 1 over examples [B, 1, T].

    Separators then need not know how large a codec's latents are.
    """
    codec = copy.deepcopy(codec)
    scale = torch.cat([codec.encoder(wav) for wav in examples]).std()
    last, entry, quantizer = codec.encoder.layers[-1], codec.decoder.layers[0], codec.quantizer
    for divided in (last.weight, last.bias, quantizer.restore):
        divided /= scale
    for multiplied in (entry.weight, quantizer.project):
        multiplied *= scale
    return codec


@torch.no_grad()
def validate(network: SoundStream, utterances: list[torch.Tensor]) -> dict[str, float]:
    """Mean scores of what the codec makes of utterances [T], as it will be used, quantised ("_rvq") and not."""
    codec = Codec(copy.deepcopy(network), RATE, device=next(network.parameters()).device)
    scores = {f"{name}{path}": [] for path in ("", "_rvq") for name in ("si_sdr", "pesq", "stoi")}
    for wav in utterances:
        for path in ("", "_rvq"):
            decoded = codec.transmit(wav[None].to(codec.device), quantize=bool(path))[0].cpu()
            for name in ("si_sdr", "pesq", "stoi"):
                scores[f"{name}{path}"].append(score(name, decoded.numpy(), wav.numpy(), RATE))
    return {name: float(np.mean(values)) for name, values in scores.items()}


def report(path: Path, row: dict) -> None:
    """Prints a row of scores and appends it to a table."""
    print(*(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow({name: round(value, 4) for name, value in row.items()})


def train(
    data, valid, out: Path, steps, minutes, mixtures, sums, batch_size, workers, bf16, every, resume, seed
) -> None:
    """See the flags of `main`. Raises DataError for folders that can't be used, SettingsError for such a run."""
    device = choose_device()
    examples = Examples(SpeakerMixtures(data, RATE, SECONDS, 10**9, seed, speeds=SPEEDS), batch_size, mixtures)
    utterances = [torch.from_numpy(wav[: 4 * RATE]) for wav, _ in itertools.islice(read_signals(valid), 10)]
    torch.manual_seed(seed)
    codec, log_mel = start_transparent(SoundStream(SHAPE)), LogMel().to(device)
    frames = lapped_transform(codec.hop_length)[:, None].to(device)
    reference = [examples[10**6 + i].to(device) for i in range(math.ceil(512 / batch_size))]  # to fit and to measure on
    codec.to(device).quantizer.requires_grad_(False)  # its codebooks follow the latents instead
    books = Codebooks(codec)
    weights = [p for p in codec.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, LEARNING_RATE, betas=(0.8, 0.99), fused=True)
    step, spent = 0, 0.0
    if resume:
        try:
            state = torch.load(out / "last.pt", map_location=device, weights_only=True)
            codec.load_state_dict(state["codec"])
            optimizer.load_state_dict(state["optimizer"])
            books.counts, books.sums, step, spent = (state[name] for name in RESUMED)
        except Exception as error:  # torch.load raises half a dozen types on a file that is not one of ours
            raise SettingsError(f"{out}/last.pt can't be resumed ({first_line(error)}): choose another --out") from None
    make_folder(out)
    # With fp16 the loss would have to be scaled.
    half = torch.bfloat16 if bf16 else mixed_precision(device)
    encode, decode = (
        torch.autocast(device.type, half, enabled=half is torch.bfloat16)(part)
        for part in (codec.encoder, codec.decoder)
    )
    batches = iter(DataLoader(
        examples, None, sampler=range(step, steps), num_workers=workers, pin_memory=device.type == "cuda",
    ))  # fmt: skip

    start = time.monotonic()
    saved = start if resume else -math.inf  # a new run is scored as it starts
    totals, seen = dict.fromkeys(("mel", "sdr", "commitment", "distance"), torch.zeros((), device=device)), 0
    while True:
        total = spent + (time.monotonic() - start) / 60
        over = max(step / steps, total / minutes)
        if over >= 1 or time.monotonic() - saved > 60 * every:
            state = dict(zip(RESUMED, (books.counts, books.sums, step, total)))
            state |= {"codec": codec.state_dict(), "optimizer": optimizer.state_dict()}
            save(out / "last.pt", state)
            save_soundstream(at_unit_scale(codec, reference).half(), out / "codec.pth")
            means = {name: float(value) / seen if seen else math.nan for name, value in totals.items()}
            report(out / "log.csv", {"step": step, "minutes": total} | means | validate(codec, utterances))
            totals, seen, saved = dict.fromkeys(totals, torch.zeros((), device=device)), 0, time.monotonic()
        if over >= 1:
            return

        torch.manual_seed(seed + step)  # what is drawn depends on the step alone, so that a resumed run repeats
        if step in FITTED_AT:
            with torch.no_grad():
                latents = torch.cat([codec.encoder(wav).transpose(1, 2).flatten(0, 1) for wav in reference])
                books.fit(latents, batch_size * round(SECONDS * codec.sample_rate / codec.hop_length))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * over))

        wav = next(batches).to(device, non_blocking=True)
        latents = encode(wav).float()
        n = codec.n_codebooks if torch.rand(()) < ALL_CODEBOOKS else int(torch.randint(1, codec.n_codebooks, ()))
        quantising = step >= FITTED_AT[0]
        quantised, codes = codec.quantizer(latents, n) if quantising else (latents, None)
        passes = (torch.rand(batch_size) < QUANTISED * quantising).to(device)  # which examples pass the RVQ
        straight_through = latents + (quantised - latents).detach()
        adds = (~passes & (torch.rand(batch_size) < sums).to(device))[:, None, None]  # and which have company
        masks = adds & (torch.rand(batch_size) < 0.5).to(device)[:, None, None]  # from which they are masked out
        other, power = latents.roll(1, 0), latents.square()
        given = torch.where(passes[:, None, None], straight_through, latents + adds * other)
        given = given * torch.where(masks, power / (power + other.square() + 1e-8), 1)
        decoded, target = decode(given).float()[:, 0], (wav + (adds & ~masks) * wav.roll(1, 0))[:, 0]
        mel, sdr = log_mel(decoded, target), si_sdr(decoded, target)
        commitment = (latents - quantised).square().mean((1, 2)) / latents.var()
        distance = distance_loss(latents, wav / LEVEL, frames)
        loss = MEL * mel - SI_SDR * ~passes * sdr + COMMITMENT * commitment + DISTANCE * distance
        optimizer.zero_grad()
        loss.mean().backward()
        nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        if quantising:
            books.follow(latents, codes)
        step, seen = step + 1, seen + 1
        totals = {name: totals[name] + x.detach().mean() for name, x in zip(totals, (mel, sdr, commitment, distance))}


def main() -> None:
    parser, share = Parser(description="Trains a small codec of one's own."), at_least(0, float, 1)
    parser.add_argument("--data", required=True, help="folder with one folder per speaker")
    parser.add_argument("--valid", required=True, help="folder of other speakers")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=at_least(1), default=10**6, help="after which the run ends")
    parser.add_argument("--minutes", type=at_least(1e-9, float), default=math.inf, help="after which it ends if sooner")
    parser.add_argument("--mixtures", type=share, default=0.2, help="share of mixtures drawn that stay mixed")
    parser.add_argument("--sums", type=share, default=0.6, help="share of the unquantised ones decoded from a sum")
    parser.add_argument("--batch_size", type=at_least(1), default=16, help="examples a step")
    parser.add_argument("--workers", type=at_least(0), default=1, help="processes that make examples")
    parser.add_argument("--bf16", action="store_true", help="encoder and decoder in bfloat16 on a CPU too: 1.4 times as fast")
    parser.add_argument("--every", type=float, default=5, help="minutes between checkpoints and validations")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--seed", type=at_least(0), default=0)
    args = parser.parse_args()
    if args.resume != (args.out / "last.pt").exists():
        parser.error(f"{args.out} holds no run to resume" if args.resume else f"{args.out} holds a run: add --resume")
    train(**vars(args))


if __name__ == "__main__":
    run_program(main)
