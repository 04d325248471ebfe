"""Trains a separator on latents that are made beforehand: on CPUs, twice as many mixtures an hour.

    python -m recipes.train_on_latents --data voices libri/train --valid libri/valid \\
        --codec codec.pth --steps 12000 --out runs/latents
    python -m recipes.train_on_latents ... --resume          goes on where the run stopped
    python train.py --init runs/latents/best.pt ...          the losses on waveforms, after it, with
                                                             the same sizes of the separator

Nothing is encoded or resampled while the separator learns. It is validated as in train.py, on
waveforms through the whole codec. The latents are encoded in bfloat16 (42 dB from exact ones on
`bundled`, 28 dB on Lyra), held in memory in half precision, and made anew on --resume.

If a codec's latents add, as those of recipes/train_codec.py do (to 39 dB), the latents of a mixture
are taken to be the sum of its sources', so that few recordings make endless mixtures. Each is
encoded at several speeds and as if by several microphones, as often as it takes for its folder to
hold about --hours. Latents of other codecs, as Lyra's, don't add: with --mixtures so many are made
and encoded, at several speeds, and parts of them are drawn again and again.

--out gets last.pt (to resume from), best.pt and log.csv.

The loss is the one between latents. Attention is computed in plain matrix products: torch's fused
one is twice as slow on CPUs in bfloat16.
"""

import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from scipy.signal import lfilter
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from checkpoint import build_model, check_codec, load_checkpoint, make_checkpoint
from codecformer import CodecformerConfig, estimate_latents
from dac_wrapper import Codec
from data import (
    DataError,
    Recordings,
    Replaced,
    SpeakerMixtures,
    list_speakers,
    open_mixtures,
    resample,
)
from losses import pairwise_latent_error, pit, si_sdr
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
from train import (
    cosine_rate,
    report_broken,
    save_best,
    seed_of_update,
    start_from,
    validate,
)

RATE = 8000  # Hz
SECONDS = 3.0
SPEEDS = range(80, 125)  # percent
MICROPHONE = (0.4, 0.2)  # largest weights of a signal's last two samples that are added to it
LEVEL_RANGE = 5.0  # dB between the two sources, at most
ADDING = 20.0  # dB: how close to a mixture's latents the sum of its sources' must come at least
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
    if not mixtures:
        check_adding(codec, valid_mixtures[0])
    torch.manual_seed(seed)
    model = build_model("codecformer", sizes, 2, codec.latent_dim).to(device)
    if init and not resume:
        start_from(load_checkpoint(init), "codecformer", model, codec)
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    settings = dict(
        data=data, valid=valid, steps=steps, batch_size=batch_size, lr=lr, hours=hours,
        mixtures=mixtures, init=init, seed=seed, **asdict(model.config),
    )  # fmt: skip
    done = 0  # updates
    best = -math.inf  # validation SI-SDRi, dB
    seconds_before = 0.0  # spent before the run was resumed
    losses = []  # dB, since the last validation
    if resume:
        last = load_checkpoint(out / "last.pt")
        check_codec(last, out / "last.pt", codec)
        for name, value in settings.items():
            had = last["settings"].get(name)
            if had != value:
                raise UserError(f"--{name} was {had} in this run, not {value}")
        training = last["training"]
        if training["done"] >= steps:
            raise UserError(f"{out} has made all its {steps} updates: its weights are in best.pt")
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(training["optimizer"])
        done = training["done"]
        best = training["best"]
        seconds_before = training["seconds"]
        losses = training["losses"]

    began = time.monotonic()
    told = set()  # why mixtures were passed over
    if mixtures:
        speech = LatentMixtures(data, codec, mixtures, seed, told)
    else:
        speech = LatentSpeech(data, codec, hours, seed, told)

    def predict_masks(latents: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            return model(latents)

    rvq = (False, False)  # none before or after the separator
    bar = tqdm(total=steps, initial=done, unit="step")
    while done < steps:
        rate = cosine_rate(lr, done, steps, WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(seed_of_update(seed, done, 0))  # dropout's: a resumed run repeats
        mixture, sources = speech.draw(done, batch_size)
        mixture = mixture.to(device)  # [B, D, F]
        sources = sources.to(device)  # [B, 2, D, F]
        estimates = estimate_latents(predict_masks, codec, mixture)  # [B, 2, D, F]
        loss = pit(pairwise_latent_error(estimates, sources))[0].mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if not norm.isfinite():
            raise UserError(f"update {done + 1} has no finite gradient: go on with a lower --lr")
        optimizer.step()
        losses.append(loss.item())
        done += 1
        bar.update()
        bar.set_postfix(loss=np.mean(losses[-50:]))  # dB

        scored = done % every == 0 or done == steps
        if not scored and done % SAVE_EVERY:
            continue
        if scored:
            si_sdr_i = validate(model, codec, valid_mixtures, rvq, 0, 1, told)
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
            "losses": losses,
        }
        save_tensors({**state, "training": training}, out / "last.pt")
    bar.close()
    print(f"{done} updates; best SI-SDRi {best:.2f} dB: {out}/best.pt")


@torch.no_grad()
def check_adding(codec: Codec, item: dict) -> None:
    """Raises UserError if a mixture's latents aren't close to the sum of its sources' latents."""
    mixture, *sources = encode_mixture(codec, item).float()  # [D, F] each
    sum_of_sources = torch.stack(sources).sum(0)
    closeness = si_sdr(sum_of_sources.flatten(), mixture.flatten()).item()
    if closeness < ADDING:
        raise UserError(
            f"latents of {codec.name} don't add (their sum is {closeness:.1f} dB close to the "
            f"mixture's): give --mixtures, 16000 for instance"
        )


class LatentSpeech:
    """Latents of folders of speakers, in several versions: about `hours` of each folder."""

    def __init__(self, roots: list, codec: Codec, hours: float, seed: int, told: set):
        self.seed = seed
        self.length = round(SECONDS * codec.frame_rate)
        self.pause = [round(seconds * codec.frame_rate) for seconds in PAUSE]
        self.dim = codec.latent_dim
        self.folders = []  # [folder][speaker][version][recording]: latents [D, frames]
        deviations = []  # of the latents of recordings, each at the codec's level
        rng = np.random.default_rng([seed, 0])
        for root in roots:
            recordings = Recordings()
            speakers = list_speakers(root, recordings)
            seconds = sum(frames / rate for frames, rate in recordings.headers.values())
            n_versions = max(round(hours * 3600 / seconds), 1)
            folder = []
            for files in tqdm(speakers.values(), f"encoding {root}", unit="speaker"):
                versions = []
                for _ in range(n_versions):
                    speed = int(rng.choice(SPEEDS))
                    microphone = [1, *rng.uniform(-1, 1, 2) * MICROPHONE]
                    latents = []
                    for path in files:
                        try:
                            wav = record(recordings, path, speed, microphone)
                        except DataError as error:
                            report_broken([str(error)], told)
                            continue
                        latents.append(encode(codec, wav)[0])
                    if latents:
                        versions.append(latents)
                    deviations.extend(z.float().std().item() for z in latents)
                if versions:
                    folder.append(versions)
            if len(folder) < 2:
                raise UserError(f"{root} holds {len(folder)} readable speakers: give more")
            self.folders.append(folder)
        self.deviation = float(np.mean(deviations))

    def draw(self, step: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A step's mixtures [B, D, F], all at the codec's level, and their sources [B, 2, D, F]."""
        rng = np.random.default_rng([self.seed, 1, step])
        sources = torch.zeros(batch_size, 2, self.dim, self.length)
        for pair in sources:
            folder = self.folders[rng.integers(len(self.folders))]
            drawn = rng.choice(len(folder), 2, replace=False)
            for source, speaker in zip(pair, drawn):
                versions = folder[speaker]
                self.fill(rng, source, versions[rng.integers(len(versions))])
            pair /= pair.std((1, 2), keepdim=True) + 1e-4
            difference = rng.uniform(-LEVEL_RANGE, LEVEL_RANGE)
            pair[0] *= 10 ** (difference / 20)
            pair *= self.deviation / (pair.sum(0).std() + 1e-4)
        return sources.sum(1), sources

    def fill(self, rng, source: torch.Tensor, recordings: list[torch.Tensor]) -> None:
        """Part of a long recording or several short ones, with pauses, into a source [D, F]."""
        filled = 0
        while filled < self.length:
            latents = recordings[rng.integers(len(recordings))]  # [D, frames]
            missing = self.length - filled
            start = int(rng.integers(max(latents.shape[1] - missing, 0) + 1))
            piece = latents[:, start : start + missing]
            n = piece.shape[1]
            source[:, filled : filled + n] = piece
            filled += n + int(rng.integers(*self.pause))


def record(recordings: Recordings, path: Path, speed: int, microphone: list[float]) -> torch.Tensor:
    """A recording at a speed in percent, by a microphone -> [1, T].

    microphone: the impulse response of what stands for one.
    """
    frames, rate = recordings.headers[path]
    wav = resample(recordings.read(path, 0, frames), rate * speed, RATE * 100)
    wav = lfilter(microphone, [1], wav).astype(np.float32)
    return torch.from_numpy(wav)[None]


class LatentMixtures:
    """Latents of about `n` mixtures and of their sources, an equal share from each folder."""

    def __init__(self, roots: list, codec: Codec, n: int, seed: int, told: set):
        self.seed = seed
        self.length = round(SECONDS * codec.frame_rate)
        self.latents = []  # [mixture]: latents [3, D, frames], of itself first, then its sources
        for k, root in enumerate(roots):
            size = max(n // len(roots), 1)
            options = dict(seconds=MIXTURE_SECONDS, size=size, seed=seed, speeds=SPEEDS)
            mixtures = Replaced(SpeakerMixtures(root, RATE, **options))
            for index in tqdm(range(size), f"encoding {root}", unit="mixture"):
                item = mixtures[k, index]  # of another epoch in each folder
                report_broken([item["broken"]], told)
                self.latents.append(encode_mixture(codec, item))

    def draw(self, step: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Parts of a step's mixtures [B, D, F] and of their sources [B, 2, D, F]."""
        rng = np.random.default_rng([self.seed, 1, step])
        parts = []
        for index in rng.integers(len(self.latents), size=batch_size):
            latents = self.latents[index]
            start = int(rng.integers(latents.shape[-1] - self.length + 1))
            parts.append(latents[..., start : start + self.length])
        parts = torch.stack(parts).float()  # [B, 3, D, F]
        return parts[:, 0], parts[:, 1:]


def encode_mixture(codec: Codec, item: dict) -> torch.Tensor:
    """A mixture and its sources, at the level that train.py feeds them at -> [3, D, frames]."""
    wavs = np.concatenate([item["mixture"][None], item["sources"]])  # [3, T]
    return encode(codec, torch.from_numpy(wavs))


@torch.no_grad()
def encode(codec: Codec, wavs: torch.Tensor) -> torch.Tensor:
    """Waveforms [N, T] -> their latents [N, D, frames], in half precision.

    All are given the gain that brings the first to the codec's level.
    """
    wavs = wavs.to(codec.device)
    with torch.autocast(codec.device.type, torch.bfloat16):
        return codec.encode(wavs * codec.gain(wavs[:1])).half().cpu()


def main() -> None:
    parser = Parser(description="Trains a separator on latents that are made beforehand.")
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
        "--hours",
        type=number(0, 100),
        default=16.0,
        help="of latents of each folder, at least one version of all",
    )
    parser.add_argument(
        "--mixtures",
        type=whole(1),
        help="for codecs whose latents don't add: encode so many, in place of --hours",
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
