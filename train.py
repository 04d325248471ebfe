"""Trains a separator: the explicit loop, on one process or several.

    python train.py                              the bundled speech and codec, about 10 minutes on 2 CPU cores
    python train.py @config/wsj0_2mix.txt        the paper's run
    torchrun --nproc_per_node=4 train.py         the same on 4 GPUs (nccl) or 4 CPU processes (gloo)
    python train.py --resume                     goes on where the run in --out stopped

A run's folder holds last.pt (everything, to resume), best.pt (the weights with the best validation SI-SDRi, in half
precision, for evaluate.py), steps.csv (a row an update), log.csv (a row an epoch) and TensorBoard scalars.

What is unusual:
- Every mixture is a pure function of (seed, epoch, index), and a step's global batch is the same however many
  processes share it, so resuming needs no more state than a step number, and N ranks with a batch of B compute
  what one rank computes with N * B. Dropout is seeded anew for every update.
- A mixture that can't be read is named and replaced by the next one, in training and validation; many stop the run.
- The codec is frozen and stays outside DDP and autocast: only the separator learns, only it runs in mixed precision.

The paper's recipe is config/wsj0_2mix.txt; the defaults are a small model and a short run.
"""

import contextlib
import io
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from codecformer import ACTIVATIONS, FEATURES, SEPARATORS, estimate_latents, separate
from dac_wrapper import ASSETS, Codec, CodecError, first_line
from data import MIX_FOLDERS, WHAM_SNR, DataError, FixedMixtures, Parser, SpeakerMixtures, is_fixed_set
from losses import LOSSES, ON_LATENTS, keep_hard, pairwise_latent_error, pairwise_negative_si_sdr, pit, si_sdr

LOGS = {
    "steps.csv": "step,loss,gradient_norm,lr",
    "log.csv": "epoch,step,loss,valid_si_sdr_i,lr,skipped,seconds,broken,mixtures_per_second",
}


class SettingsError(ValueError):
    """A setting, checkpoint or folder doesn't fit; the message is one line that says what to do."""


def parse_args(argv=None):
    parser = Parser(description="Trains a separator. @FILE reads flags from a file.", fromfile_prefix_chars="@")
    parser.convert_arg_line_to_args = lambda line: line.split("#")[0].split()
    add = parser.add_argument
    # data
    add("--data", default=str(ASSETS / "speech/train"), help="folder of speakers, or a fixed set with mix, s1, s2")
    add("--valid", default=str(ASSETS / "speech/valid"), help="the same, for validation")
    add("--sample_rate", type=int, default=8000, help="Hz, of the data and the estimates")
    add("--seconds", type=float, default=2.0, help="length of a training segment")
    add("--speeds", type=int, nargs="+", default=[90, 95, 100, 105, 110], help="percent, drawn per source")
    add("--n_speakers", type=int, default=2)
    add("--mix_folder", choices=MIX_FOLDERS, help="of a fixed set, where it has several")
    add("--noise", help="folder of noise for mixtures drawn on the fly")
    add("--snr", type=float, nargs=2, default=WHAM_SNR, metavar=("LOW", "HIGH"), help="dB of the speech over the noise")
    add("--epoch_size", type=int, default=2400, help="mixtures an epoch (a fixed set has its own size)")
    add("--valid_size", type=int, default=40, help="validation mixtures drawn from a folder of speakers")
    add("--cache", help="folder for the latents of a fixed set, encoded once; for --loss embedding")
    add("--workers", type=int, default=1, help="processes that make mixtures")
    # model; the defaults are the small one, config/wsj0_2mix.txt has the paper's
    add("--model", choices=list(SEPARATORS), default="codecformer")
    add("--d_model", type=int, default=160)
    add("--n_layers", type=int, default=5)
    add("--n_heads", type=int, default=5)
    add("--d_ffn", type=int, default=640)
    add("--dropout", type=float, default=0.0)
    add("--activation", choices=list(ACTIVATIONS), default="snake", help="of Codecformer's masks")
    add("--features", choices=list(FEATURES), default="log_power", help="what Codecformer's bottleneck sees")
    add("--context", type=int, default=5, help="frames that Codecformer's bottleneck sees at once")
    add("--init", help="checkpoint whose separator to start from")
    # codec
    add("--codec", default="bundled", help="bundled, dac_16khz, dac_24khz, dac_44khz or a DAC weights file")
    add("--quantize_before", action="store_true", help="RVQ on the mixture's latents")
    add("--quantize_after", action="store_true", help="RVQ on the estimates' latents")
    # loss and optimisation
    add("--loss", choices=list(LOSSES), default="embedding")
    add(
        "--loss_seconds",
        type=float,
        default=0.0,
        help="of a random crop that the loss is taken on; 0: the whole segment",
    )
    add("--threshold", type=float, default=-30.0, help="dB; mixtures with a loss below it are left out of the step")
    add("--lr", type=float, default=1e-3)
    add("--schedule", choices=["plateau", "cosine"], default="cosine", help="plateau is the paper's")
    add("--patience", type=int, default=2, help="plateau: epochs without gain before the rate is halved")
    add("--plateau_start", type=int, default=5, help="plateau: first epoch after which it may be halved")
    add("--batch_size", type=int, default=8, help="mixtures per process and forward pass")
    add("--accumulate", type=int, default=1, help="forward passes per update")
    add("--clip", type=float, default=5.0, help="gradient norm")
    add("--epochs", type=int, default=5)
    add("--seed", type=int, default=0)
    # run
    add("--out", default="runs/bundled", help="folder of the run")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--save_every", type=int, default=200, help="updates between checkpoints, beside the one after each epoch")
    add("--compile", action="store_true", help="torch.compile the separator")
    args = parser.parse_args(argv)
    counts = ("epoch_size", "valid_size", "batch_size", "accumulate", "epochs", "save_every", "patience")
    for name, least in {**dict.fromkeys(counts, 1), "seconds": 0.1, "workers": 0, "seed": 0}.items():
        if not least <= getattr(args, name) < math.inf:
            parser.error(f"--{name} is {getattr(args, name)}, it must be at least {least}")
    for name in ("lr", "clip"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name} is {getattr(args, name)}, it must be positive")
    if args.loss_seconds != 0 and not 0.1 <= args.loss_seconds < math.inf:
        parser.error(f"--loss_seconds is {args.loss_seconds}, it must be 0 (the whole segment) or at least 0.1")
    if args.cache and (args.loss not in ON_LATENTS or args.speeds != [100]):
        parser.error(f"--cache holds latents as they are: it needs --speeds 100 and --loss {', '.join(ON_LATENTS)}")
    if args.model == "sepformer" and (args.loss in ON_LATENTS or args.quantize_before or args.quantize_after):
        parser.error(f"sepformer has no latents: train it without --quantize_* and --loss {', '.join(ON_LATENTS)}")
    return args


def setup_process() -> tuple[int, int, torch.device]:
    """This process's rank, the number of processes, and its device; the one place that chooses devices."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def total(device, *values: float) -> list[float]:
    """The sums of numbers over all processes."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor.tolist()


class SkipBroken:
    """Gives the next mixture for one that can't be read, and why as `broken`, a line each; DataError after 100."""

    def __init__(self, mixtures):
        self.mixtures = mixtures

    def __len__(self) -> int:
        return len(self.mixtures)

    def __getitem__(self, index: int) -> dict:
        broken = []
        while len(broken) < 100:
            try:
                return {**self.mixtures[(index + len(broken)) % len(self)], "broken": "\n".join(broken)}
            except DataError as error:
                # How much of a file is missing depends on the segment: without it, a file is named once.
                broken.append(re.sub(r" \(\d+ of \d+ samples\)", "", str(error)))
        raise DataError(f"100 mixtures in a row can't be made: {broken[-1]}")


def open_mixtures(path, args, size: int, seed: int, train: bool):
    """A folder of speakers, mixed on the fly, or a fixed set; cut and perturbed only for training."""
    speeds = args.speeds if train else [100]
    if is_fixed_set(path):
        seconds = args.seconds if train else None
        dataset = FixedMixtures(path, args.sample_rate, seconds, seed, speeds, args.mix_folder)
    else:
        seconds = args.seconds if train else 4.0
        dataset = SpeakerMixtures(
            path, args.sample_rate, seconds, size, seed, args.n_speakers, speeds, noise=args.noise, snr=args.snr
        )
    if dataset.n_speakers != args.n_speakers:
        raise SettingsError(f"{path} has {dataset.n_speakers} speakers a mixture, --n_speakers says {args.n_speakers}")
    return SkipBroken(dataset)


def epoch_batches(dataset, args, epoch: int, rank: int, world: int, first_step: int = 0) -> list[list[int]]:
    """This rank's batches of indices. Each update takes world * accumulate * batch_size mixtures in a fixed order."""
    order = np.random.default_rng([args.seed, epoch]).permutation(len(dataset))
    per_update = world * args.accumulate * args.batch_size
    updates = len(order) // per_update
    order = order[: updates * per_update].reshape(updates, args.accumulate, world, args.batch_size)
    return order[first_step:, :, rank].reshape(-1, args.batch_size).tolist()


class CachedLatents:
    """The latents of a fixed set, encoded once into `folder`, so that training needs no codec.

    Items are `latents` [1 + S, D, F]: the mixture's and its sources', cut at random to `seconds`. An hour of mixtures
    of two takes 1.1 GB with a codec of 1,024 dimensions. Raises SettingsError for mixtures drawn on the fly.
    """

    def __init__(self, mixtures: FixedMixtures, codec: Codec, folder, seconds: float, seed: int, rank: int, world: int):
        if not isinstance(mixtures, FixedMixtures):
            raise SettingsError("--cache needs a fixed set as --data: mixtures drawn on the fly never come twice")
        self.mixtures, self.folder, self.seed, self.epoch = mixtures, Path(folder) / codec.fingerprint, seed, 0
        self.frames = round(seconds * codec.frame_rate)
        self.folder.mkdir(parents=True, exist_ok=True)
        for index in tqdm(range(rank, len(mixtures), world), desc="encoding", unit="mixture"):
            path, mixture = self._path(index), mixtures.files[index]
            if path.exists() and path.stat().st_mtime > mixture.stat().st_mtime:
                continue
            item = mixtures[index]
            wav = torch.from_numpy(np.concatenate([item["mixture"][None], item["sources"]])).to(codec.device)
            latents = codec.encode(wav * codec.gain(wav[:1]))
            with open(path.with_suffix(".tmp"), "wb") as file:
                np.save(file, latents.half().cpu().numpy())
            os.replace(file.name, path)
        if dist.is_initialized():
            dist.barrier()

    def _path(self, index: int) -> Path:
        return self.folder / f"{self.mixtures.files[index].stem}.npy"

    def __len__(self) -> int:
        return len(self.mixtures)

    def __getitem__(self, index: int) -> dict:
        latents = np.load(self._path(index), mmap_mode="r")
        rng = np.random.default_rng([self.seed, self.epoch, index])
        start = int(rng.integers(max(latents.shape[-1] - self.frames, 0) + 1))
        cut = latents[..., start : start + self.frames].astype(np.float32)
        return {"latents": np.pad(cut, ((0, 0), (0, 0), (0, self.frames - cut.shape[-1])))}


MARGIN = 4  # frames at each end of a crop that are coded but not scored: there the codec lacks their neighbours


def random_crop(codec: Codec, latents, sources, seconds: float) -> tuple:
    """The same random `seconds` (and MARGIN) of latents [B, S, D, F] and sources [B, S, T], and the margin in samples.

    The codec is most of a step with the waveform losses, and a part of a segment tells how good its latents are.
    """
    samples = codec.hop * codec.sample_rate / codec.codec_rate  # a frame's
    if samples % 1:
        raise SettingsError(f"a frame of {codec.name} is no whole number of samples: train it with --loss_seconds 0")
    samples, frames = int(samples), round(seconds * codec.frame_rate) + 2 * MARGIN
    start = int(torch.randint(max(latents.shape[-1] - frames, 0) + 1, ()))
    sources = sources[..., start * samples : (start + frames) * samples]
    return latents[..., start : start + frames], sources, MARGIN * samples


def separation_loss(predict, codec, batch, args, device) -> torch.Tensor:
    """The losses of the mixtures of a batch that are not separated well already, in dB [<= B]."""
    if "latents" in batch:
        latents, *targets = batch["latents"].to(device).unbind(1)
        estimates = estimate_latents(predict, codec, latents, args.quantize_before, args.quantize_after)
        pairwise = pairwise_latent_error(estimates, torch.stack(targets, 1))
    else:
        mixture, sources = batch["mixture"].to(device), batch["sources"].to(device)
        gain, margin = codec.gain(mixture), 0
        mixture, sources = mixture * gain, sources * gain[:, None]
        if args.model == "sepformer":
            estimates = predict(mixture).float()
        else:
            latents = codec.encode(mixture)
            estimates = estimate_latents(predict, codec, latents, args.quantize_before, args.quantize_after)
            if args.loss_seconds:
                estimates, sources, margin = random_crop(codec, estimates, sources, args.loss_seconds)
            if args.loss not in ON_LATENTS:
                estimates = codec.decode(estimates, sources.shape[-1])
        pairwise = LOSSES[args.loss](codec, estimates, sources, margin)
    loss, _ = pit(pairwise)
    return keep_hard(loss, args.threshold)


@torch.no_grad()
def validate(model, codec, dataset, args, device, rank, world, broken: list, sync) -> float:
    """Mean SI-SDR improvement in dB over the validation mixtures, shared out between the ranks.

    Why mixtures couldn't be read is added to `broken`; all ranks call `sync` after each round.
    """
    model.eval()
    improvement = 0.0
    for first in range(0, len(dataset), world):
        if first + rank < len(dataset):
            item = dataset[first + rank]
            broken += item["broken"].splitlines()
            mixture = torch.from_numpy(item["mixture"])[None].to(device)
            sources = torch.from_numpy(item["sources"])[None].to(device)
            estimates = separate(model, codec, mixture, args.quantize_before, args.quantize_after)
            loss, _ = pit(pairwise_negative_si_sdr(estimates, sources))
            improvement += -loss.item() - si_sdr(mixture[:, None], sources).mean().item()
        sync()
    model.train()
    return total(device, improvement)[0] / len(dataset)


def ignore_signals(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the workers must live until the loop has saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def git_revision() -> str:
    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def save(path: Path, checkpoint: dict) -> None:
    """Writes a checkpoint so that a reader, or a kill at any moment, finds the old one or the new one whole."""
    temporary, buffer = path.with_suffix(".tmp"), io.BytesIO()
    torch.save(checkpoint, buffer)
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # a power cut must not undo the renaming
    os.close(folder)


def append(path: Path, *row) -> None:
    """Adds a row to a csv file, floats in full, and hands it to the system, so that no kill loses it."""
    with open(path, "a") as file:
        print(*row, sep=",", file=file)


def load_checkpoint(path) -> dict:
    """Reads a checkpoint as plain tensors, never as code. Raises SettingsError if it is missing or none of ours."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["separator"], checkpoint["config"], checkpoint["model"], checkpoint["codec"]["name"]
    except FileNotFoundError:
        raise SettingsError(f"no checkpoint {path}: train one with train.py or give another path") from None
    except Exception as error:  # torch.load raises half a dozen types on a file that is not one of ours
        raise SettingsError(f"{path} is no checkpoint of train.py ({first_line(error)}): give another path") from None
    return checkpoint


def check_codec(checkpoint: dict, path, codec: Codec) -> None:
    """Raises SettingsError if `codec` is not the one that the checkpoint's separator was trained on."""
    trained_on = checkpoint["codec"]
    if codec.fingerprint != trained_on["fingerprint"]:
        raise SettingsError(
            f"{path} was trained on another codec than {codec.name} ({trained_on['name']}, weights "
            f"{trained_on['fingerprint']}): give that one with --codec"
        )


def restore_model(checkpoint: dict, path) -> torch.nn.Module:
    """The separator of a checkpoint. Raises SettingsError if its weights don't fit its own config."""
    try:
        separator, config = SEPARATORS[checkpoint["separator"]]
        model = separator(config(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
    except (KeyError, RuntimeError, TypeError, ValueError):
        raise SettingsError(f"the weights in {path} don't fit its config: damaged, or another version's") from None
    return model


def build_model(args, codec: Codec) -> torch.nn.Module:
    """The separator that the flags describe, untrained. Raises SettingsError if they don't fit together."""
    separator, config = SEPARATORS[args.model]
    settings = {**vars(args), "latent_dim": codec.latent_dim}
    try:
        return separator(config(**{f.name: settings[f.name] for f in fields(config) if f.name in settings}))
    except ValueError as error:
        raise SettingsError(str(error)) from None


def start_from(args, out: Path) -> Path | None:
    """The checkpoint that a run starts from, if any. Raises SettingsError if --resume and the run's folder disagree."""
    last = out / "last.pt"
    if args.resume and not last.exists():
        raise SettingsError(f"nothing to resume in {out}: it holds no last.pt (see --out)")
    if not args.resume and last.exists():
        raise SettingsError(f"{out} holds a run already: go on with it by --resume, or choose another --out")
    return last if args.resume else args.init


def make_scheduler(optimizer, args, updates: int):
    """Stepped once an epoch by validation SI-SDRi (plateau), or after every one of the `updates` an epoch (cosine)."""
    if args.schedule == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=args.patience)
    warmup, last = 100, args.epochs * updates
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 1) * (0.01 + 0.495 * (1 + math.cos(math.pi * min(s / last, 1))))
    )


def train(args) -> None:
    rank, world, device = setup_process()
    torch.manual_seed(args.seed)
    out = Path(args.out)
    start = start_from(args, out)
    dataset = open_mixtures(args.data, args, args.epoch_size, args.seed, train=True)
    valid = open_mixtures(args.valid, args, args.valid_size, 1, train=False)  # the same whatever the run's seed
    per_update = world * args.accumulate * args.batch_size
    updates = len(dataset) // per_update
    if updates < 1:
        raise SettingsError(f"an epoch of {len(dataset)} mixtures is less than one update: lower --batch_size")
    codec = Codec.load(args.codec, args.sample_rate, device)
    if args.cache:
        whole = open_mixtures(args.data, args, args.epoch_size, args.seed, train=False).mixtures
        dataset = SkipBroken(CachedLatents(whole, codec, args.cache, args.seconds, args.seed, rank, world))

    model = build_model(args, codec)
    checkpoint = load_checkpoint(start) if start else None
    if checkpoint:
        if (checkpoint["separator"], checkpoint["config"]) != (args.model, asdict(model.config)):
            trained = f"{checkpoint['separator']}, {checkpoint['config']}"
            raise SettingsError(f"{start} was trained with another config than the flags say: {trained}")
        check_codec(checkpoint, start, codec)
        model = restore_model(checkpoint, start)
    model.to(device)
    if args.compile:
        model.compile()  # in place, so that the weights keep their names
    ddp = DistributedDataParallel(model) if world > 1 else model

    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    scheduler = make_scheduler(optimizer, args, updates)
    half = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda" and half is torch.float16)

    predict = torch.autocast(device.type, half, enabled=device.type == "cuda")(ddp)  # the separator alone
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}

    # epoch: how many are complete; step: updates of the one under way, losses: theirs. A run starts with the validation
    # of an epoch before the first.
    run = SimpleNamespace(epoch=-1, step=updates, losses=[], best=-math.inf, skipped=0, in_a_row=0, broken=0, seconds=0)
    if args.resume:
        if "sizes" not in checkpoint:
            raise SettingsError(f"{start} is no last.pt of this version: start from it by --init")
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        run = SimpleNamespace(**{name: checkpoint[name] for name in vars(run)})
    done, started, revision = run.epoch * updates + run.step, time.time() - run.seconds, git_revision()

    def state(**extra) -> dict:
        return {
            "separator": args.model, "config": asdict(model.config), "sample_rate": args.sample_rate,
            "codec": {"name": args.codec, "fingerprint": codec.fingerprint},
            "quantize_before": args.quantize_before, "quantize_after": args.quantize_after,
            "args": vars(args), "git": revision, **vars(run), "seconds": time.time() - started, **extra,
        }  # fmt: skip

    def save_last() -> None:
        writer.flush()
        sizes = {name: (out / name).stat().st_size for name in LOGS}
        save(out / "last.pt", state(sizes=sizes, **{name: part.state_dict() for name, part in parts.items()}))

    stop = []  # filled by a signal, read after each update, so that no update is lost half way
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: stop.append(received))
    broken, named = [], set()  # why mixtures couldn't be read: not counted yet, told already

    def sync() -> None:  # what a signal or a broken recording on any rank means for all
        n_stop, n_broken = total(device, len(stop), len(broken))
        for reason in sorted(set(broken) - named):
            tqdm.write(f"left out: {reason}", file=sys.stderr)
        named.update(broken)
        broken.clear()
        run.broken += int(n_broken)
        if run.broken > 10 + 0.1 * done * per_update:
            raise DataError(f"{run.broken} mixtures couldn't be read, more than a tenth: see above for the recordings")
        if n_stop:
            if rank == 0:
                save_last()
                bar.write(f"stopped by signal; go on with --resume --out {out}")
            total(device, 0)  # where one process ends, torchrun ends the others: wait for rank 0
            raise KeyboardInterrupt

    out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        for name, columns in LOGS.items():
            if args.resume:  # what was written after the checkpoint will be written once more
                os.truncate(out / name, checkpoint["sizes"][name])
            else:
                (out / name).write_text(columns + "\n")
        writer = SummaryWriter(out, purge_step=done + 1)
        bar = tqdm(total=args.epochs * updates, initial=done, unit="step", smoothing=0.05)
        parameters = sum(p.numel() for p in model.parameters())
        bar.write(f"{parameters:,} parameters on {world} x {device.type}, codec {args.codec} with lag {codec.lag}")
    while run.epoch < args.epochs:
        dataset.mixtures.epoch = run.epoch
        batches = epoch_batches(dataset, args, max(run.epoch, 0), rank, world, run.step)
        loader = DataLoader(dataset, batch_sampler=batches, num_workers=args.workers, worker_init_fn=ignore_signals)
        batches, first, began = iter(loader), run.step, time.time()
        while run.step < updates:
            torch.manual_seed(int(np.random.default_rng([args.seed, done, rank]).integers(2**63)))
            summed = n_mixtures = 0
            for micro in range(args.accumulate):
                # DDP averages over ranks, so the sum is scaled to make it the mean over the mixtures of all ranks.
                wait = micro < args.accumulate - 1 and world > 1
                with ddp.no_sync() if wait else contextlib.nullcontext():
                    batch = next(batches)
                    kept = separation_loss(predict, codec, batch, args, device)
                    (n_kept,) = total(device, len(kept))
                    scaler.scale(kept.sum() * world / max(n_kept, 1) / args.accumulate).backward()
                summed, n_mixtures = summed + kept.sum().item(), n_mixtures + n_kept
                broken += "\n".join(filter(None, batch["broken"])).splitlines()
            (summed,) = total(device, summed)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip).item()
            lr, loss = optimizer.param_groups[0]["lr"], summed / n_mixtures if n_mixtures else math.nan
            if finite := math.isfinite(summed + norm):  # the same on all ranks
                scaler.step(optimizer)
                run.losses += [loss] * (n_mixtures > 0)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            run.skipped, run.in_a_row = run.skipped + (not finite), 0 if finite else run.in_a_row + 1
            run.step, done = run.step + 1, done + 1
            if args.schedule == "cosine":
                scheduler.step()
            if rank == 0:
                append(out / "steps.csv", done, loss, norm, lr)
                recent = np.mean(run.losses[-50:]) if run.losses else math.nan
                bar.update()
                bar.set_postfix(loss=f"{recent:.2f}", SI_SDRi=f"{run.best:.2f}")
                if done % 20 == 0:
                    writer.add_scalar("train/loss", recent, done)
            sync()
            if run.in_a_row == 100:
                raise SettingsError(
                    f"no finite loss and gradient from update {done - 99} on: lower --lr, check the data"
                )
            if rank == 0 and run.step % args.save_every == 0:
                save_last()
        speed = (run.step - first) * per_update / (time.time() - began)
        improvement = validate(model, codec, valid, args, device, rank, world, broken, sync)
        loss = np.mean(run.losses) if run.losses else math.nan
        is_best = improvement > run.best
        run.epoch, run.step, run.losses, run.best = run.epoch + 1, 0, [], max(improvement, run.best)
        if args.schedule == "plateau" and run.epoch >= args.plateau_start:
            scheduler.step(improvement)
        if rank == 0:
            lr = optimizer.param_groups[0]["lr"]
            bar.write(f"epoch {run.epoch}: loss {loss:.2f} dB, validation SI-SDRi {improvement:.2f} dB, rate {lr:.1e}")
            append(
                out / "log.csv", run.epoch, done, f"{loss:.4f}", f"{improvement:.4f}", lr, run.skipped,
                round(time.time() - started), run.broken, f"{speed:.2f}",
            )  # fmt: skip
            writer.add_scalar("valid/si_sdr_i", improvement, done)
            writer.add_scalar("train/lr", lr, done)
            if is_best:
                save(out / "best.pt", state(model={k: v.half() for k, v in model.state_dict().items()}))
            save_last()
    if rank == 0:
        bar.close()
        writer.close()
        print(f"left out: {run.broken} mixtures that couldn't be read, {run.skipped} updates that weren't finite")
        print(f"best validation SI-SDRi {run.best:.2f} dB; score it with: python evaluate.py --ckpt {out / 'best.pt'}")
    if world > 1:
        dist.destroy_process_group()


def main(argv=None) -> None:
    args = parse_args(argv)
    status, message = 1, None
    try:
        status = train(args)
    except KeyboardInterrupt:
        status = 130
    except (DataError, CodecError, SettingsError) as error:
        # An error in a process of the DataLoader arrives with its traceback in front of the message.
        message = str(error).strip().splitlines()[-1].removeprefix("data.DataError: ")
    except OSError as error:
        message = f"can't write to {args.out} ({error}): make room and --resume, or choose another --out"
    if message:
        tqdm.write(f"error: {message}", file=sys.stderr)  # above the bar
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():  # after an error they live, deaf, and the exit would wait for them
        worker.kill()
    sys.exit(status)


if __name__ == "__main__":
    main()
