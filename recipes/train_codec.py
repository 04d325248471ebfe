"""Trains a codec's encoder and decoder: a SoundStream at 8 kHz, 50 latents of 320 numbers a second.

    python -m recipes.train_codec --data voices --valid libri/valid --minutes 12 --out runs/latents
    python -m recipes.train_codec ... --resume                     goes on where the run stopped

--out gets last.pt (to resume from), latents.pth (the weights) and log.csv. The other half of the
codec, which makes codes of the latents, is trained on these weights by recipes/train_rvq.py. They
want different things, and one network that served both was worse at each: latents are what a
separator works on, and codes what few bits carry.

What is unusual:
- The network starts transparent (see `start_transparent`). As it starts, two signals are as far
  apart in latents as in waveforms, and a loss keeps that (see `distance_loss`): a separator's error
  between latents then is its error between waveforms.
- Most examples are decoded from the sum of two examples' latents, to be the sum of their waveforms,
  or, through an ideal ratio mask, to be one of them. That is what masks need: that latents add, and
  that each is mostly of one voice.

The loss on mel spectra is as in DAC (Kumar et al., 2023, https://arxiv.org/abs/2306.06546). To
train a transform so that the ideal mask on it is best is Tzinis et al., 2019,
https://arxiv.org/abs/1910.09804.
"""

import copy
import itertools
import math
import sys
import time
import warnings
from pathlib import Path

import librosa  # for its mel filters
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dac_wrapper import LEVEL, Codec
from data import Replaced, SpeakerMixtures
from evaluate import score
from losses import si_sdr
from program import (
    Parser,
    UserError,
    choose_device,
    choose_precision,
    choose_threads,
    first_line,
    load_tensors,
    lock_run,
    number,
    report,
    run_program,
    save_tensors,
    whole,
)
from recipes.codec_scores import METRICS, read_signals
from soundstream import (
    SLOPE,
    Conv,
    ResidualUnit,
    SoundStream,
    SoundStreamConfig,
    Upsample,
    save_soundstream,
)

RATE = 8000  # Hz
SHAPE = SoundStreamConfig(
    sample_rate=RATE,
    kernel=64,
    stride=16,
    widths=(64, 192, 320, 320),
    strides=(5, 2, 1),
    group_width=1 << 20,  # no groups
    latent_dim=320,
    n_codebooks=12,
    codebook_size=1024,
    code_dim=64,
    coder_rounds=2,
    causal=False,
)
# examples
SECONDS = 0.8
SPEEDS = tuple(range(90, 113))  # percent
N_REFERENCE = 512
# optimisation
LEARNING_RATE = 5e-4
WARMUP = 100  # steps
CLIP = 1.0  # largest norm of the gradient
# weights of the losses
MEL = 1.0
SI_SDR = 0.05  # a dB
DISTANCE = 1.0
FLOOR = 1e-5  # a mel band's power, about 35 dB below that of loud speech
FFTS = {64: 10, 128: 20, 256: 40, 512: 80, 1024: 80}  # window in samples: mel bands


def train(
    data,
    valid,
    out: Path,
    steps: int,
    minutes: float,
    mixtures: float,
    sums: float,
    batch_size: int,
    workers: int,
    bf16: bool,
    every: float,
    resume: bool,
    seed: int,
) -> None:
    """A whole run; see the flags of `main`. Raises UserError."""
    device = choose_device()
    voices = SpeakerMixtures(data, RATE, seconds=SECONDS, size=10**9, seed=seed, speeds=SPEEDS)
    examples = Examples(voices, batch_size, mixtures)
    utterances = read_utterances(valid)
    choose_threads(workers)
    torch.manual_seed(seed)
    network = start_transparent(SoundStream(SHAPE)).to(device)
    weights = [*network.encoder.parameters(), *network.decoder.parameters()]
    optimizer = torch.optim.AdamW(weights, LEARNING_RATE, betas=(0.8, 0.99), fused=True)
    log_mel = LogMel().to(device)
    frames = lapped_transform(network.hop_length)[:, None].to(device)  # [2 * hop, 1, 2 * hop]
    # Batches that no step will see, to measure the latents' scale on.
    reference = [examples[10**6 + i].to(device) for i in range(N_REFERENCE // batch_size)]

    step = 0
    spent = 0.0  # minutes, before the run was resumed
    settings = dict(mixtures=mixtures, sums=sums, batch_size=batch_size, seed=seed)
    if resume:
        step, spent = load_last(out / "last.pt", network, optimizer, settings)
        if step >= steps or spent >= minutes:
            raise UserError(f"{out} has made its {step} steps: raise --steps or --minutes to go on")
    precision = choose_precision(device, "bf16" if bf16 else "auto")
    # With float16 the loss would have to be scaled: float32 then.
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)
    encode = mixed(network.encoder)
    decode = mixed(network.decoder)
    loader = DataLoader(
        examples,
        batch_size=None,  # they come in batches
        sampler=range(step, steps),
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    batches = iter(loader)

    start = time.monotonic()
    saved = start if resume else -math.inf  # a new run is scored as it starts
    totals = dict.fromkeys(("mel", "sdr", "distance"), 0.0)  # since it was saved
    seen = 0  # steps since then
    while True:
        total_minutes = spent + (time.monotonic() - start) / 60
        over = max(step / steps, total_minutes / minutes)  # share of the run that is over
        if over >= 1 or time.monotonic() - saved > 60 * every:
            save_last(out / "last.pt", network, optimizer, settings, step, total_minutes)
            save_soundstream(at_unit_scale(network, reference), out / "latents.pth", half=True)
            means = {
                name: float(total) / seen if seen else math.nan for name, total in totals.items()
            }
            scores = validate(network, utterances, quantize=False)
            report_rounded(
                out / "log.csv", {"step": step, "minutes": total_minutes, **means, **scores}
            )
            totals = dict.fromkeys(totals, 0.0)
            seen = 0
            saved = time.monotonic()
        if over >= 1:
            return

        # What is drawn depends on the step alone, so that a resumed run repeats.
        torch.manual_seed(seed + step)
        rate = learning_rate(LEARNING_RATE, step, over)
        for group in optimizer.param_groups:
            group["lr"] = rate
        summed, masked = draw_paths(batch_size, sums)
        wav = next(batches).to(device, non_blocking=True)  # [B, 1, T]
        latents = encode(wav).float()  # [B, D, F]
        given = latents_to_decode(latents, summed.to(device), masked.to(device))
        decoded = decode(given).float()[:, 0]  # [B, T]
        alone = (~summed | masked).to(device)
        target = wav + torch.where(alone[:, None, None], 0, wav.roll(1, 0))  # [B, 1, T]
        mel = log_mel(decoded, target[:, 0])  # [B], as are all losses
        sdr = si_sdr(decoded, target[:, 0])
        distance = distance_loss(latents, wav / LEVEL, frames)
        loss = MEL * mel - SI_SDR * sdr + DISTANCE * distance
        optimizer.zero_grad()
        loss.mean().backward()
        nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        step += 1
        seen += 1
        for name, values in zip(totals, (mel, sdr, distance)):
            totals[name] += values.detach().mean()


def read_utterances(valid) -> list[torch.Tensor]:
    """Ten utterances [T] of at most 4 s, for validation."""
    signals = itertools.islice(read_signals(valid), 10)
    return [torch.from_numpy(wav[: 4 * RATE]) for wav, _ in signals]


def learning_rate(peak: float, step: int, over: float) -> float:
    """A linear rise, then half a cosine down to 0. over: the share of the run that is over."""
    rise = (step + 1) / WARMUP
    fall = 0.5 + 0.5 * math.cos(math.pi * over)
    return peak * min(rise, fall)


# Examples and their paths -------------------------------------------------------------------------


class Examples:
    """Batches [size, 1, T] by step, around a codec's level.

    A share `mixtures` of the draws stay mixed, of the others each voice is an example.
    """

    def __init__(self, voices: SpeakerMixtures, size: int, mixtures: float):
        self.voices = Replaced(voices)
        self.seed = voices.seed
        self.size = size
        self.mixtures = mixtures

    def __getitem__(self, step: int) -> torch.Tensor:
        rng = np.random.default_rng([self.seed, 1, step])
        examples = []
        index = step * self.size
        while len(examples) < self.size:
            item = self.voices[index]
            if item["broken"]:
                tqdm.write(f"passed over: {item['broken']}", file=sys.stderr)
            stays_mixed = rng.random() < self.mixtures
            examples += [item["mixture"]] if stays_mixed else list(item["sources"])
            index += 1
        wav = torch.from_numpy(np.stack(examples[: self.size]))  # [size, T]
        gain = 10 ** (rng.normal(0, 4, (self.size, 1)) / 20)
        wav = wav * LEVEL / wav.std(-1, keepdim=True) * torch.from_numpy(gain).float()
        return wav[:, None]


def draw_paths(batch_size: int, sums: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Which examples are decoded from a sum, a share `sums`, and which of these through a mask.

    [B] each; half of the summed ones are masked.
    """
    summed = torch.rand(batch_size) < sums
    masked = summed & (torch.rand(batch_size) < 0.5)
    return summed, masked


def latents_to_decode(latents, summed, masked) -> torch.Tensor:
    """Latents [B, D, F] -> what each example is decoded from: itself, or its sum with another.

    Masked ones are again most of themselves: the mask is the ratio of the two powers.
    """
    other = latents.roll(1, 0)
    power = latents.square()
    mask = power / (power + other.square() + 1e-8)
    given = torch.where(summed[:, None, None], latents + other, latents)
    return torch.where(masked[:, None, None], mask * given, given)


# Losses -------------------------------------------------------------------------------------------


class LogMel(nn.Module):
    """L1 between log mel spectra at several scales, one value an example."""

    def __init__(self):
        super().__init__()
        for size, bands in FFTS.items():
            filters = librosa.filters.mel(sr=RATE, n_fft=size, n_mels=bands, norm=None)
            filters = torch.from_numpy(filters[filters.any(1)])  # [bands, bins], none empty
            self.register_buffer(f"filters_{size}", filters, persistent=False)
            window = torch.hann_window(size)
            self.register_buffer(f"window_{size}", window / window.norm(), persistent=False)

    def forward(self, estimates: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        """[B, T] twice -> [B], in units of 10 dB."""
        total = 0
        for size in FFTS:
            with torch.no_grad():
                reference = self.spectrum(references, size)
            difference = self.spectrum(estimates, size) - reference
            total = total + difference.abs().mean((1, 2))
        return total / len(FFTS)

    def spectrum(self, wav: torch.Tensor, size: int) -> torch.Tensor:
        """[B, T] -> [B, bands, frames]"""
        window = self.get_buffer(f"window_{size}")
        filters = self.get_buffer(f"filters_{size}")
        bins = torch.stft(wav, size, size // 2, window=window, return_complex=True)
        power = bins.real.square() + bins.imag.square()
        return (filters @ power + FLOOR).log10()


def distance_loss(latents: torch.Tensor, wav: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """How far distances between latents [B, D, F] are from those between waveforms [B, 1, T].

    Of each frame of each example, to the same frame of the preceding one. frames: a tight frame
    [D, 1, 2 * hop], whose distances are those of the windowed waveforms. Returns the mean squared
    logarithm of their ratio [B], in bels.
    """
    hop = frames.shape[-1] // 2
    with torch.no_grad():
        difference = F.pad(wav - wav.roll(1, 0), (0, hop))
        reference = F.conv1d(difference, frames, stride=hop).square().sum(1)  # [B, F]
        floor = 1e-2 * reference.mean()
    distance = (latents - latents.roll(1, 0)).square().sum(1)  # [B, F]
    ratio = (distance + floor) / (reference + floor)
    return ratio.log10().square().mean(1)


# The network as it starts and as it is saved ------------------------------------------------------


def lapped_transform(size: int) -> torch.Tensor:
    """Rows of `size` cosines, then `size` sines, under sine windows of two frames of samples.

    [2 * size, 2 * size], a tight frame: an analysis whose transpose is the synthesis. They are the
    MDCT and its sine twin (Princen and Bradley, 1986).
    """
    time = torch.arange(2 * size, dtype=torch.float64) + 0.5
    band = torch.arange(size, dtype=torch.float64)[:, None]
    phase = math.pi / size * (time + size / 2) * (band + 0.5)
    window = torch.sin(math.pi * time / (2 * size)) / math.sqrt(size)
    return (torch.cat([phase.cos(), phase.sin()]) * window).float()


@torch.no_grad()
def start_transparent(network: SoundStream) -> SoundStream:
    """Sets up a network that is not causal to pass waveforms through.

    That takes longer to learn than all the rest. Each layer starts as an orthogonal matrix from the
    samples it sees to as many channels, its mirror in the decoder as the transpose. Channels come
    in pairs of opposite sign, which leaky ReLUs leave linear ("looks linear", Balduzzi et al.,
    2017, https://arxiv.org/abs/1702.08591); residual units add nothing yet; all other weights keep
    a tenth of their random values. The last matrix makes of two frames the cosines and sines of
    narrow bands, a tight frame: masks can separate voices only where a latent is mostly of one of
    them.
    """
    first, *down, last = [m for m in network.encoder.layers if isinstance(m, Conv)]
    entry, *up, final = [m for m in network.decoder.layers if isinstance(m, Conv | Upsample)]
    for module in network.modules():
        if isinstance(module, ResidualUnit):
            module.layers[-1].weight.zero_()
            module.layers[-1].bias.zero_()
    for layer in (first, *down, last, entry, *up, final):
        layer.weight.mul_(0.1)
        layer.bias.zero_()

    # Of the strides in their kernels, the outermost layers start with the present one alone.
    size = first.in_channels
    basis = nn.init.orthogonal_(torch.empty(size, size))  # of the channels so far, in samples
    matrix = F.pad(basis[:, :, None] / LEVEL, first.ends)
    set_pairs(first.weight[:, :, 0], matrix, paired_in=False)
    matrix = F.pad(basis.T[:, :, None] * LEVEL, first.ends)
    set_pairs(final.weight[:, :, 0], matrix, paired_out=False)

    for before, after in zip(down, reversed(up)):
        stride = before.stride[1]
        n_channels = min(size * stride, before.out_channels // 2)
        matrix = nn.init.orthogonal_(torch.empty(n_channels, size * stride))
        matrix = matrix.view(n_channels, size, stride)
        set_pairs(before.weight[:, :, 0, before.ends[0] :], matrix)
        transposed = after.weight.transpose(0, 1)  # [out, in, 1, kernel]
        set_pairs(transposed[:, :, 0, after.start :], matrix.transpose(0, 1))
        basis = torch.einsum("ncj,cs->njs", matrix, basis).flatten(1)
        size = n_channels

    # Of this frame and the next, [D, 2, hop].
    frames = lapped_transform(network.hop_length).unflatten(1, (2, -1))
    matrix = torch.einsum("djs,cs->dcj", frames, basis)
    set_pairs(last.weight[:, :, 0, last.ends[0] :], matrix, paired_out=False)
    # Its transpose: this frame from the latents of the last one and its own.
    transpose = matrix.transpose(0, 1).flip(2)
    set_pairs(entry.weight[:, :, 0, entry.ends[0] - 1 :], transpose, paired_in=False)
    return network


def set_pairs(weight, matrix, paired_out: bool = True, paired_in: bool = True) -> None:
    """Writes [out, in, taps] into the first channels and taps of a weight.

    Where channels are paired, the second half of them is the negative of the first.
    """
    n_out, n_in, taps = matrix.shape
    if paired_in:
        matrix = matrix / (1 + SLOPE)  # a leaky ReLU makes so much of the difference of x and -x
    rows = {0: 1}  # {first channel: sign}
    columns = {0: 1}
    if paired_out:
        rows[weight.shape[0] // 2] = -1
    if paired_in:
        columns[weight.shape[1] // 2] = -1
    for row, sign in rows.items():
        for column, other_sign in columns.items():
            part = weight[row : row + n_out, column : column + n_in, :taps]
            part.copy_(matrix * sign * other_sign)


@torch.no_grad()
def at_unit_scale(network: SoundStream, batches: list[torch.Tensor]) -> SoundStream:
    """A copy that computes the same with latents of a standard deviation of 1 over [B, 1, T].

    Separators then need not know how large a codec's latents are.
    """
    network = copy.deepcopy(network)
    scale = torch.cat([network.encoder(wav) for wav in batches]).std()
    last = network.encoder.layers[-1]
    entry = network.decoder.layers[0]
    last.weight /= scale
    last.bias /= scale
    entry.weight *= scale
    return network


# The folder of a run ------------------------------------------------------------------------------


def save_last(path: Path, network, optimizer, settings: dict, step: int, minutes: float) -> None:
    state = {
        "settings": settings,
        "codec": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "minutes": minutes,
    }
    save_tensors(state, path)


def load_last(path: Path, network, optimizer, settings: dict) -> tuple[int, float]:
    """Brings a run back to where it was saved. Returns its step and minutes.

    Raises UserError if that can't be, or if `settings` differ from those it had.
    """
    state = load_tensors(path, next(network.parameters()).device)
    try:
        had = state["settings"]
        for name, value in settings.items():
            if had[name] != value:
                raise UserError(f"--{name} was {had[name]} in this run, not {value}")
        network.load_state_dict(state["codec"])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["minutes"]
    except (KeyError, RuntimeError, ValueError) as error:  # of another program, or another shape
        reason = first_line(error)
        raise UserError(f"{path} can't be resumed ({reason}): choose another --out") from None


@torch.no_grad()
def validate(network: SoundStream, utterances: list[torch.Tensor], quantize: bool) -> dict:
    """Mean scores of utterances [T] through the codec as it will be used, quantised or not."""
    device = next(network.parameters()).device
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*barely resembles")  # a quantizer that is yet to train
        codec = Codec(copy.deepcopy(network), RATE, device=device)
    decoded = [codec.transmit(wav[None].to(device), quantize)[0].cpu() for wav in utterances]
    means = {}
    for metric in METRICS:
        pairs = zip(decoded, utterances)
        values = [score(metric, estimate.numpy(), wav.numpy(), RATE) for estimate, wav in pairs]
        means[metric] = float(np.mean(values))
    return means


def report_rounded(path: Path, row: dict) -> None:
    report(path, {name: round(value, 4) for name, value in row.items()})


def main() -> None:
    parser = Parser(description="Trains a small codec of one's own.")
    share = number(0, 1)
    parser.add_argument("--data", required=True, help="folder with a folder per speaker")
    parser.add_argument("--valid", required=True, help="folder of other speakers")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=whole(1, 10**6), default=10**6, help="after which it ends")
    parser.add_argument(
        "--minutes", type=number(1e-9), default=math.inf, help="after which it ends if sooner"
    )
    parser.add_argument(
        "--mixtures", type=share, default=0.2, help="share of mixtures drawn that stay mixed"
    )
    parser.add_argument(
        "--sums", type=share, default=0.8, help="share of examples decoded from a sum"
    )
    parser.add_argument(
        "--batch_size", type=whole(2, N_REFERENCE), default=16, help="examples a step"
    )
    parser.add_argument("--workers", type=whole(0), default=1, help="processes that make examples")
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="encoder and decoder in bfloat16 on a CPU too: 1.4 times as fast",
    )
    parser.add_argument(
        "--every", type=number(0), default=5.0, help="minutes between checkpoints and validations"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    args = parser.parse_args()
    with lock_run(parser, args.out, args.resume):
        train(**vars(args))


if __name__ == "__main__":
    run_program(main)
