"""Trains a separator on latents that are made once: on CPUs, twice as many mixtures an hour.

    python -m recipes.train_on_latents --data voices libri/train --valid libri/valid \\
        --codec codec.pth --steps 12000 --out runs/latents
    python -m recipes.train_on_latents ... --resume          goes on where the run stopped
    python train.py --init runs/latents/best.pt ...          the losses on waveforms, after it

Nothing is encoded or resampled while the separator learns. It is validated as in train.py, on
waveforms through the whole codec. The latents are held in memory in half precision.

If a codec's latents add, as those of recipes/train_codec.py do (to 39 dB), the latents of a mixture
are taken to be the sum of its sources', so that few recordings make endless mixtures. Each is
encoded at several speeds and as if by several microphones, as often as it takes for its folder to
hold --hours. Latents of other codecs, as Lyra's, don't add: with --mixtures so many are made and
encoded, and parts of them are drawn again and again.

--out gets last.pt (to resume from), best.pt and log.csv.

The loss is the one between latents. Attention is computed in plain matrix products: torch's fused
one is twice as slow on CPUs in bfloat16.
"""

import math
import time
from pathlib import Path

import numpy as np
import torch
from scipy.signal import lfilter
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from checkpoint import build_model, check_codec, load_checkpoint, make_checkpoint
from codecformer import CodecformerConfig
from dac_wrapper import Codec
from data import Recordings, Replaced, list_speakers, open_mixtures, resample
from losses import pairwise_latent_error, pit
from program import (
    Parser,
    UserError,
    add_flags,
    choose_device,
    choose_threads,
    lock_run,
    number,
    report,
    run_program,
    save_tensors,
    whole,
)
from train import cosine_rate, save_best, start_from, validate

RATE = 8000  # Hz
SECONDS = 3.0
SPEEDS = (80, 125)  # percent, from and to
MICROPHONE = (0.4, 0.2)  # largest weights of a signal's last two samples that are added to it
LEVEL_RANGE = 5.0  # dB between the two sources, at most
PAUSE = (0.05, 0.3)  # seconds, between short recordings
MIXTURE_SECONDS = 6.0  # of the --mixtures, of which SECONDS are drawn
VALID_SIZE = 96  # mixtures
SAVE_EVERY = 500  # updates
WARMUP = 300  # updates
CLIP = 5.0
SIZES = dict(features="both", context=5, d_model=256, n_layers=6, n_heads=4, d_ffn=960, dropout=0.1)


def train(
    data: list[str],
    valid: str,
    codec_name: str,
    out: Path,
    steps: int,
    every: int,
    batch_size: int,
    lr: float,
    hours: float,
    mixtures: int | None,
    init: str | None,
    seed: int,
    resume: bool,
    sizes: dict,
) -> None:
    """A whole run; see the flags of `main`. sizes: the separator's. Raises UserError."""
    device = choose_device()
    choose_threads(workers=0)
    codec = Codec.load(codec_name, RATE, device)
    valid_mixtures = open_mixtures(valid, RATE, size=VALID_SIZE, seed=1)
    torch.manual_seed(seed)
    model = build_model("codecformer", sizes, 2, codec.latent_dim).to(device)
    if init:
        model = start_from(load_checkpoint(init), "codecformer", model, codec).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    settings = dict(
        data=data, valid=valid, steps=steps, batch_size=batch_size, lr=lr, hours=hours,
        mixtures=mixtures, init=init, seed=seed, seconds=SECONDS, **sizes,
    )  # fmt: skip
    done = 0  # updates
    best = -math.inf  # validation SI-SDRi, dB
    seconds_before = 0.0
    if resume:
        last = load_checkpoint(out / "last.pt")
        check_codec(last, out / "last.pt", codec)
        for name, value in last["settings"].items():
            if settings.get(name) != value:
                raise UserError(f"--{name} was {value} in this run, not {settings.get(name)}")
        training = last["training"]
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(training["optimizer"])
        done = training["done"]
        best = training["best"]
        seconds_before = training["seconds"]
    if mixtures:
        speech = LatentMixtures(data, codec, mixtures, seed)
    else:
        speech = LatentSpeech(data, codec, hours, seed)

    began = time.monotonic()
    rvq = (False, False)  # no RVQ before or after the separator
    losses = []  # dB, since the last validation
    for step in tqdm(range(done, steps), initial=done, total=steps, unit="step"):
        rate = cosine_rate(lr, step, steps, WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(seed + step)  # dropout's: a resumed run repeats
        mixture, sources = speech.draw(step, batch_size)
        mixture = mixture.to(device)  # [B, D, F]
        sources = sources.to(device)  # [B, 2, D, F]
        with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            masks = model(mixture)
        estimates = masks.float() * mixture.unsqueeze(1)
        loss = pit(pairwise_latent_error(estimates, sources))[0].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
        done = step + 1

        scored = done % every == 0 or done == steps
        if not scored and done % SAVE_EVERY:
            continue
        if scored:
            si_sdr_i = validate(model, codec, valid_mixtures, rvq, 0, 1, set())
        seconds = seconds_before + time.monotonic() - began
        state = make_checkpoint("codecformer", model, codec, settings)
        if scored:
            if si_sdr_i > best:
                best = si_sdr_i
                save_best(state, out / "best.pt")
            row = {
                "step": done,
                "loss": np.mean(losses),
                "valid_si_sdr_i": si_sdr_i,
                "lr": rate,
                "seconds": round(seconds),
            }
            report(out / "log.csv", row)
            losses = []
        training = {
            "optimizer": optimizer.state_dict(),
            "done": done,
            "best": best,
            "seconds": seconds,
        }
        save_tensors({**state, "training": training}, out / "last.pt")


class LatentSpeech:
    """Latents of folders of speakers, each recording as often as makes `hours` of its folder."""

    def __init__(self, roots: list, codec: Codec, hours: float, seed: int):
        self.seed = seed
        self.length = round(SECONDS * codec.frame_rate)
        self.pause = [round(seconds * codec.frame_rate) for seconds in PAUSE]
        self.dim = codec.latent_dim
        self.folders = []  # of each, of each speaker, that of each recording [frames, D]
        rng = np.random.default_rng([seed, 0])
        for root in roots:
            recordings = Recordings()
            folder = []
            speakers = list_speakers(root, recordings)
            seconds = sum(frames / rate for frames, rate in recordings.headers.values())
            copies = max(round(hours * 3600 / seconds), 1)
            for files in tqdm(speakers.values(), f"encoding {root}", unit="speaker"):
                folder.append(
                    [encode(codec, recordings, path, rng) for path in files for _ in range(copies)]
                )
            self.folders.append(folder)

    def draw(self, step: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A step's mixtures [B, D, F], of a deviation of 1, and their sources [B, 2, D, F]."""
        rng = np.random.default_rng([self.seed, 1, step])
        sources = torch.zeros(batch_size, 2, self.length, self.dim)
        for pair in sources:
            folder = self.folders[rng.integers(len(self.folders))]
            drawn = rng.choice(len(folder), 2, replace=False)
            for source, speaker in zip(pair, drawn):
                self.fill(rng, source, folder[speaker])
            pair /= pair.std((1, 2), keepdim=True) + 1e-4
            difference = rng.uniform(-LEVEL_RANGE, LEVEL_RANGE)
            pair[0] *= 10 ** (difference / 20)
            pair /= pair.sum(0).std()
        sources = sources.transpose(2, 3)
        return sources.sum(1), sources

    def fill(self, rng, source: torch.Tensor, recordings: list[torch.Tensor]) -> None:
        """Part of a long recording or several short ones, with pauses, into a source [F, D]."""
        filled = 0
        while filled < self.length:
            latents = recordings[rng.integers(len(recordings))]
            missing = self.length - filled
            start = int(rng.integers(max(len(latents) - missing, 0) + 1))
            piece = latents[start : start + missing]
            source[filled : filled + len(piece)] = piece
            filled += len(piece) + int(rng.integers(*self.pause))


@torch.no_grad()
def encode(codec: Codec, recordings: Recordings, path, rng) -> torch.Tensor:
    """A recording at some speed and by some microphone -> [frames, D] in half precision."""
    frames, rate = recordings.headers[path]
    wav = resample(recordings.read(path, 0, frames), rate * int(rng.integers(*SPEEDS)), RATE * 100)
    wav = lfilter([1, *rng.uniform(-1, 1, 2) * MICROPHONE], [1], wav).astype(np.float32)
    wav = torch.from_numpy(wav)[None].to(codec.device)
    with torch.autocast(codec.device.type, torch.bfloat16):
        latents = codec.encode(wav * codec.gain(wav))
    return latents[0].T.half().cpu()


class LatentMixtures:
    """Latents of `n` mixtures and of their sources, an equal share of them from each folder."""

    def __init__(self, roots: list, codec: Codec, n: int, seed: int):
        self.seed = seed
        self.length = round(SECONDS * codec.frame_rate)
        self.latents = []  # of each mixture, of it and its sources [3, D, frames]
        for root in roots:
            size = max(n // len(roots), 1)
            options = dict(seconds=MIXTURE_SECONDS, size=size, seed=seed, speeds=range(*SPEEDS))
            mixtures = Replaced(open_mixtures(root, RATE, **options))
            for index in tqdm(range(size), f"encoding {root}", unit="mixture"):
                self.latents.append(encode_mixture(codec, mixtures[index]))

    def draw(self, step: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Parts of a step's mixtures [B, D, F] and of their sources [B, 2, D, F]."""
        rng = np.random.default_rng([self.seed, 1, step])
        parts = []
        for index in rng.integers(len(self.latents), size=batch_size):
            latents = self.latents[index]
            start = int(rng.integers(max(latents.shape[-1] - self.length, 0) + 1))
            parts.append(latents[..., start : start + self.length])
        parts = torch.stack(parts).float()  # [B, 3, D, F]
        return parts[:, 0], parts[:, 1:]


@torch.no_grad()
def encode_mixture(codec: Codec, item: dict) -> torch.Tensor:
    """A mixture and its sources, at the level that train.py feeds them at -> [3, D, frames]."""
    mixture = torch.from_numpy(item["mixture"])[None].to(codec.device)  # [1, T]
    sources = torch.from_numpy(item["sources"]).to(codec.device)  # [2, T]
    wavs = torch.cat([mixture, sources]) * codec.gain(mixture)
    with torch.autocast(codec.device.type, torch.bfloat16):
        return codec.encode(wavs).half().cpu()


def main() -> None:
    parser = Parser(description="Trains a separator on latents that are made once.")
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        help="folders with a folder per speaker, each for an equal share of the mixtures",
    )
    parser.add_argument("--valid", required=True, help="folder of other speakers, or a fixed set")
    parser.add_argument("--codec", required=True, dest="codec_name", help="its weights")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=whole(1), default=12000, help="updates, in all")
    parser.add_argument("--every", type=whole(1), default=1000, help="updates between validations")
    parser.add_argument("--batch_size", type=whole(1), default=8, help="mixtures an update")
    parser.add_argument("--lr", type=number(1e-12), default=7e-4, help="peak rate of Adam")
    parser.add_argument(
        "--hours", type=number(0, 100), default=16.0, help="of latents of each folder, at least all"
    )
    parser.add_argument(
        "--mixtures", type=whole(1), help="for codecs whose latents don't add: to encode so many"
    )
    parser.add_argument("--init", help="checkpoint whose separator to start from")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    add_flags(parser, CodecformerConfig, SIZES, leave_out=("n_speakers", "latent_dim"))
    args = vars(parser.parse_args())
    names = CodecformerConfig.__dataclass_fields__
    sizes = SIZES | {name: args.pop(name) for name in names if name in args}
    with lock_run(parser, args["out"], args["resume"]):
        train(**args, sizes=sizes)


if __name__ == "__main__":
    run_program(main)
