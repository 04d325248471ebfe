"""Trains a separator: the explicit loop, on one process or several.

    python train.py                              the bundled speech and codec, about 10 minutes on 2 CPU cores
    python train.py @config/wsj0_2mix.txt        the paper's run
    torchrun --nproc_per_node=4 train.py         the same on 4 GPUs (nccl) or 4 CPU processes (gloo)
    python train.py --resume                     goes on where the run in --out stopped

A run's folder holds last.pt (everything, to resume), best.pt (the weights with the best validation SI-SDRi, in half
precision, for evaluate.py), log.csv and TensorBoard scalars.

What is unusual:
- Every mixture is a pure function of (seed, epoch, index), and a step's global batch is the same however many
  processes share it, so resuming needs no more state than a step number, and N ranks with a batch of B compute
  what one rank computes with N * B.
- The codec is frozen and stays outside DDP and autocast: only the separator learns, only it runs in mixed precision.

The paper's recipe is config/wsj0_2mix.txt; the defaults are a small model and a short run.
"""

import contextlib
import csv
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from codecformer import ACTIVATIONS, FEATURES, SEPARATORS, estimate_latents, separate
from dac_wrapper import ASSETS, Codec, CodecError, first_line
from data import DataError, FixedMixtures, Parser, SpeakerMixtures, is_fixed_set
from losses import LOSSES, ON_LATENTS, keep_hard, pairwise_latent_error, pairwise_negative_si_sdr, pit, si_sdr


class SettingsError(ValueError):
    """A setting, checkpoint or folder doesn't fit; the message is one line that says what to do."""


def parse_args(argv=None):
    parser = Parser(
        description="Trains Codecformer. @FILE reads flags from a file, one a line.", fromfile_prefix_chars="@"
    )
    parser.convert_arg_line_to_args = lambda line: line.split("#")[0].split()
    add = parser.add_argument
    # data
    add("--data", default=str(ASSETS / "speech/train"), help="folder of speakers, or a fixed set with mix, s1, s2")
    add("--valid", default=str(ASSETS / "speech/valid"), help="the same, for validation")
    add("--sample_rate", type=int, default=8000, help="Hz, of the data and the estimates")
    add("--seconds", type=float, default=2.0, help="length of a training segment")
    add("--speeds", type=int, nargs="+", default=[90, 95, 100, 105, 110], help="percent, drawn per source")
    add("--n_speakers", type=int, default=2)
    add("--epoch_size", type=int, default=2400, help="mixtures an epoch (a fixed set has its own size)")
    add("--valid_size", type=int, default=40, help="validation mixtures drawn from a folder of speakers")
    add("--cache", help="folder for the latents of a fixed set, encoded once; for --loss embedding")
    add("--workers", type=int, default=1, help="processes that make mixtures")
    # model; the defaults are the small one, config/wsj0_2mix.txt has the paper's
    add("--model", choices=list(SEPARATORS), default="codecformer")
    add("--d_model", type=int, default=192)
    add("--n_layers", type=int, default=6)
    add("--n_heads", type=int, default=6)
    add("--d_ffn", type=int, default=768)
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
    add("--loss_seconds", type=float, default=0.0, help="decode only a random crop for the loss; 0: the whole segment")
    add("--threshold", type=float, default=-30.0, help="dB; mixtures with a loss below it are left out of the step")
    add("--lr", type=float, default=1e-3)
    add("--schedule", choices=["plateau", "cosine"], default="cosine", help="plateau is the paper's")
    add("--patience", type=int, default=2, help="plateau: epochs without gain before the rate is halved")
    add("--plateau_start", type=int, default=5, help="plateau: first epoch after which it may be halved")
    add("--batch_size", type=int, default=12, help="mixtures per process and forward pass")
    add("--accumulate", type=int, default=1, help="forward passes per update")
    add("--clip", type=float, default=5.0, help="gradient norm")
    add("--epochs", type=int, default=5)
    add("--seed", type=int, default=0)
    # run
    add("--out", default="runs/bundled", help="folder of the run")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--save_every", type=int, default=200, help="updates between checkpoints, beside the one after each epoch")
    args = parser.parse_args(argv)
    for name in ("epoch_size", "valid_size", "batch_size", "accumulate", "epochs", "save_every", "patience"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, it must be at least 1")
    for name in ("seconds", "lr", "clip"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name} is {getattr(args, name)}, it must be positive")
    if args.seconds < 0.1:
        parser.error(f"--seconds is {args.seconds}, it must be at least 0.1")
    if args.workers < 0 or args.seed < 0:
        parser.error("--workers and --seed can't be negative")
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


def total(value: float, device) -> float:
    """The sum of a number over all processes."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.item()


def open_mixtures(path, args, size: int, seed: int, train: bool):
    """A folder of speakers, mixed on the fly, or a fixed set; cut and perturbed only for training."""
    speeds = args.speeds if train else [100]
    if is_fixed_set(path):
        dataset = FixedMixtures(path, args.sample_rate, args.seconds if train else None, seed, speeds)
    else:
        seconds = args.seconds if train else 4.0
        dataset = SpeakerMixtures(path, args.sample_rate, seconds, size, seed, args.n_speakers, speeds)
    if dataset.n_speakers != args.n_speakers:
        raise SettingsError(f"{path} has {dataset.n_speakers} speakers a mixture, --n_speakers says {args.n_speakers}")
    return dataset


def epoch_batches(dataset, args, epoch: int, rank: int, world: int, first_step: int = 0) -> list[list[int]]:
    """This rank's batches of indices. Each update takes world * accumulate * batch_size mixtures in a fixed order."""
    order = np.random.default_rng([args.seed, epoch]).permutation(len(dataset))
    per_update = world * args.accumulate * args.batch_size
    updates = len(order) // per_update
    order = order[: updates * per_update].reshape(updates, args.accumulate, world, args.batch_size)
    return order[first_step:, :, rank].reshape(-1, args.batch_size).tolist()


class CachedLatents:
    """The latents of a fixed set, encoded once into `folder`, so that training needs no codec.

    Items are `latents` [1 + S, D, F]: the mixture's and its sources', cut at random to `seconds`. A stored hour of
    8 kHz mixtures of two takes about 1 GB with a codec of 1,024 dimensions.
    """

    def __init__(self, mixtures: FixedMixtures, codec: Codec, folder, seconds: float, seed: int, rank: int, world: int):
        self.mixtures, self.folder, self.seed, self.epoch = mixtures, Path(folder) / codec.fingerprint, seed, 0
        self.frames = round(seconds * codec.frame_rate)
        self.folder.mkdir(parents=True, exist_ok=True)
        for index in tqdm(range(rank, len(mixtures), world), desc="encoding", unit="mixture"):
            if self._path(index).exists():
                continue
            item = mixtures[index]
            wav = torch.from_numpy(np.concatenate([item["mixture"][None], item["sources"]])).to(codec.device)
            latents = codec.encode(wav * codec.gain(wav[:1]))
            temporary = self._path(index).with_suffix(".tmp")
            with open(temporary, "wb") as file:
                np.save(file, latents.half().cpu().numpy())
            os.replace(temporary, self._path(index))
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


MARGIN = 4  # frames at each end of a crop that are decoded but not scored: there the decoder lacks their neighbours


def random_crop(codec: Codec, latents, sources, seconds: float) -> tuple:
    """The same random `seconds` (and MARGIN) of latents [B, S, D, F] and sources [B, S, T], and the margin in samples.

    Decoding is most of a step with a big codec, and a part of a segment tells how good its latents are.
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
    batch = {k: v.to(device) for k, v in batch.items() if k != "name"}
    if "latents" in batch:
        latents, targets = batch["latents"][:, 0], batch["latents"][:, 1:]
        estimates = estimate_latents(predict, codec, latents, args.quantize_before, args.quantize_after)
        return keep_hard(pit(pairwise_latent_error(estimates, targets))[0], args.threshold)
    mixture, sources = batch["mixture"], batch["sources"]
    gain = codec.gain(mixture)
    mixture, sources, margin = mixture * gain, sources * gain[:, None], 0
    if args.model == "sepformer":
        estimates = predict(mixture).float()
    else:
        latents = codec.encode(mixture)
        estimates = estimate_latents(predict, codec, latents, args.quantize_before, args.quantize_after)
        if args.loss not in ON_LATENTS:
            if args.loss_seconds:
                estimates, sources, margin = random_crop(codec, estimates, sources, args.loss_seconds)
            estimates = codec.decode(estimates, sources.shape[-1])
    loss, _ = pit(LOSSES[args.loss](codec, estimates, sources, margin))
    return keep_hard(loss, args.threshold)


@torch.no_grad()
def validate(model, codec, dataset, args, device, rank, world) -> float:
    """Mean SI-SDR improvement in dB over the validation mixtures, shared out between the ranks."""
    model.eval()
    improvement = count = 0
    for index in range(rank, len(dataset), world):
        item = dataset[index]
        mixture = torch.from_numpy(item["mixture"])[None].to(device)
        sources = torch.from_numpy(item["sources"])[None].to(device)
        estimates = separate(model, codec, mixture, args.quantize_before, args.quantize_after)
        loss, _ = pit(pairwise_negative_si_sdr(estimates, sources))
        improvement += -loss.item() - si_sdr(mixture[:, None], sources).mean().item()
        count += 1
    model.train()
    return total(improvement, device) / total(count, device)


def ignore_signals(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the workers must live until the loop has saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def git_revision() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def save(path: Path, checkpoint: dict) -> None:
    """Writes a checkpoint so that a reader, or a kill at any moment, finds the old one or the new one whole."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
        temporary.unlink(missing_ok=True)
        raise SettingsError(f"can't write {path} ({first_line(error)}): free space, then --resume") from None


def load_checkpoint(path) -> dict:
    """Reads a checkpoint as plain tensors, never as code. Raises SettingsError if it is missing or none of ours."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["config"], checkpoint["model"], checkpoint["codec"]["name"]
        checkpoint.setdefault("separator", "codecformer")  # the bundled one is older than the choice
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
        raise SettingsError(
            f"the weights in {path} don't fit its config: it is damaged or from another version"
        ) from None
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
    """The checkpoint that a run starts from, if any; makes the run's folder. Raises SettingsError."""
    last = out / "last.pt"
    if args.resume and not last.exists():
        raise SettingsError(f"nothing to resume in {out}: it holds no last.pt (see --out)")
    if not args.resume and last.exists():
        raise SettingsError(f"{out} holds a run already: go on with it by --resume, or choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"can't write to {out} ({error.strerror}): choose another --out") from None
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
    valid = open_mixtures(args.valid, args, args.valid_size, args.seed + 1, train=False)
    updates = len(dataset) // (world * args.accumulate * args.batch_size)
    if updates < 1:
        raise SettingsError(f"an epoch of {len(dataset)} mixtures is less than one update: lower --batch_size")
    codec = Codec.load(args.codec, args.sample_rate, device)

    model = build_model(args, codec)
    checkpoint = load_checkpoint(start) if start else None
    if checkpoint:
        if (checkpoint["separator"], checkpoint["config"]) != (args.model, asdict(model.config)):
            raise SettingsError(
                f"{start} was trained with another config than the flags say: "
                f"{checkpoint['separator']}, {checkpoint['config']}"
            )
        check_codec(checkpoint, start, codec)
        model = restore_model(checkpoint, start)
    model.to(device)
    ddp = DistributedDataParallel(model) if world > 1 else model

    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    scheduler = make_scheduler(optimizer, args, updates)
    half = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda" and half is torch.float16)

    def predict(x):  # the separator alone in mixed precision
        with torch.autocast(device.type, half, enabled=device.type == "cuda"):
            return ddp(x)

    epoch, step, best, skipped, seconds = 0, 0, -math.inf, 0, 0.0
    if args.resume:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        scaler.load_state_dict(checkpoint["scaler"])
        torch.set_rng_state(checkpoint["rng"])
        epoch, step, best = checkpoint["epoch"], checkpoint["step"], checkpoint["best"]
        skipped, seconds = checkpoint["skipped"], checkpoint["seconds"]

    revision = git_revision()

    def state(**extra) -> dict:
        return {
            "separator": args.model, "config": asdict(model.config), "sample_rate": args.sample_rate,
            "codec": {"name": args.codec, "fingerprint": codec.fingerprint},
            "quantize_before": args.quantize_before, "quantize_after": args.quantize_after,
            "args": vars(args), "git": revision, "epoch": epoch, "step": step, "best": best, **extra,
        }  # fmt: skip

    def save_last() -> None:
        save(out / "last.pt", state(
            model=model.state_dict(), optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(),
            scaler=scaler.state_dict(), rng=torch.get_rng_state(), skipped=skipped,
            seconds=seconds + time.time() - started,
        ))  # fmt: skip

    stop = []  # filled by a signal, read after each update, so that no update is lost half way
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: stop.append(received))

    started = time.time()
    if rank == 0:
        writer = SummaryWriter(out)
        log = open(out / "log.csv", "a", newline="")
        if log.tell() == 0:
            csv.writer(log).writerow(["epoch", "step", "loss", "valid_si_sdr_i", "lr", "skipped", "seconds"])
        bar = tqdm(total=args.epochs * updates, initial=epoch * updates + step, unit="step", smoothing=0.05)
        parameters = sum(p.numel() for p in model.parameters())
        bar.write(f"{parameters:,} parameters on {world} x {device.type}, codec {args.codec} with lag {codec.lag}")
    if epoch == step == 0:
        before = validate(model, codec, valid, args, device, rank, world)
        if rank == 0:
            bar.write(f"epoch 0: validation SI-SDRi {before:.2f} dB before training")
            csv.writer(log).writerow([0, 0, "", f"{before:.4f}", args.lr, 0, 0])
    while epoch < args.epochs:
        dataset.epoch = epoch
        batches = epoch_batches(dataset, args, epoch, rank, world, step)
        loader = iter(
            DataLoader(dataset, batch_sampler=batches, num_workers=args.workers, worker_init_fn=ignore_signals)
        )
        losses = []
        while step < updates:
            for micro in range(args.accumulate):
                # DDP averages over ranks, so the sum is scaled to make it the mean over the mixtures of all ranks.
                wait = micro < args.accumulate - 1 and world > 1
                with ddp.no_sync() if wait else contextlib.nullcontext():
                    kept = separation_loss(predict, codec, next(loader), args, device)
                    n_kept = total(len(kept), device)
                    loss = kept.sum() * world / max(n_kept, 1)
                    scaler.scale(loss / args.accumulate).backward()
                if n_kept:
                    losses.append(total(loss.item(), device) / world)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            if torch.isfinite(norm) or scaler.is_enabled():  # a scaler skips by itself
                scaler.step(optimizer)
            else:
                skipped += 1
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if args.schedule == "cosine":
                scheduler.step()
            if rank == 0:
                recent = np.mean(losses[-50:]) if losses else math.nan
                bar.update()
                bar.set_postfix(loss=f"{recent:.2f}", SI_SDRi="-" if best == -math.inf else f"{best:.2f}")
                if (epoch * updates + step) % 20 == 0:
                    writer.add_scalar("train/loss", recent, epoch * updates + step)
                if step % args.save_every == 0:
                    save_last()
            if total(len(stop), device):
                if rank == 0:
                    save_last()
                    bar.write(f"stopped by signal; go on with --resume --out {out}")
                sys.exit(130)
        epoch, step = epoch + 1, 0
        improvement = validate(model, codec, valid, args, device, rank, world)
        if args.schedule == "plateau" and epoch >= args.plateau_start:
            scheduler.step(improvement)
        is_best = improvement > best
        best = max(best, improvement)
        if rank == 0:
            lr = optimizer.param_groups[0]["lr"]
            loss = np.mean(losses) if losses else math.nan
            bar.write(f"epoch {epoch}: loss {loss:.2f} dB, validation SI-SDRi {improvement:.2f} dB, rate {lr:.1e}")
            elapsed = seconds + time.time() - started
            csv.writer(log).writerow(
                [epoch, epoch * updates, f"{loss:.4f}", f"{improvement:.4f}", lr, skipped, round(elapsed)]
            )
            log.flush()
            writer.add_scalar("valid/si_sdr_i", improvement, epoch * updates)
            writer.add_scalar("train/lr", lr, epoch * updates)
            if is_best:
                save(out / "best.pt", state(model={k: v.half() for k, v in model.state_dict().items()}))
            save_last()
    if rank == 0:
        bar.close()
        writer.close()
        print(f"best validation SI-SDRi {best:.2f} dB; score it with: python evaluate.py --ckpt {out / 'best.pt'}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        train(parse_args())
    except (DataError, CodecError, SettingsError) as error:
        # An error in a process of the DataLoader arrives with its traceback in front of the message.
        sys.exit("error: " + str(error).strip().splitlines()[-1].removeprefix("data.DataError: "))
