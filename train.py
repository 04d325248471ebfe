"""Trains a separator: the explicit loop, on one process or several.

    python train.py                              config/bundled.txt: the speech and codec of this repository
    python train.py @config/wsj0_2mix.txt        the paper's run; flags after a file override it
    torchrun --nproc_per_node=4 train.py         the same on 4 GPUs (nccl) or 4 CPU processes (gloo)
    python train.py --resume                     goes on where the run in --out stopped, with its settings

A run's folder holds args.json (its settings), last.pt (everything, to resume), best.pt (the weights with the best
validation SI-SDRi, in half precision), steps.csv (a row an update), log.csv (a row an epoch) and curves.png.

What is unusual:
- Every mixture is a pure function of (seed, epoch, index), and an update's are the same however many processes share
  them: resuming needs no more than a step number, and N ranks with a batch of B compute what one computes with N * B,
  but for dropout, which every update and rank draws anew from a seed of its own.
- A mixture that can't be read is named and replaced by the next one; many stop the run.
- The codec is frozen and stays outside DDP and autocast: only the separator learns, and runs in mixed precision.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoint import (
    SEPARATORS, RunFolder, SettingsError, build_model, check_codec, choose_device, git_revision, load_checkpoint,
    mixed_precision, parse_args, restore_model, resumed_settings, run_program,
)  # fmt: skip
from codecformer import estimate_latents, separate
from dac_wrapper import Codec
from data import DataError, open_mixtures
from losses import LOSSES, crop, keep_hard, pairwise_latent_error, pairwise_negative_si_sdr, pit, si_sdr
from recipes.curves import draw


class SkipBroken:
    """Gives the next mixture for one that can't be read, and why as `broken`, a line each; DataError after 100."""

    def __init__(self, mixtures, seed: int = 0):
        self.mixtures, self.seed = mixtures, seed

    def __len__(self) -> int:
        return len(self.mixtures)

    def __getitem__(self, key) -> dict:
        epoch, index = key  # position: where the loss is taken with --loss_seconds, in [0, 1)
        position, broken = np.random.default_rng([self.seed, epoch, index, 1]).random(dtype=np.float32), []
        while len(broken) < 100:
            try:
                item = self.mixtures[epoch, (index + len(broken)) % len(self)]
                return {**item, "position": position, "broken": "\n".join(broken)}
            except DataError as error:
                broken.append(str(error))
        raise DataError(f"100 mixtures in a row can't be made: {broken[-1]}")


class Batches:
    """This rank's batches of (epoch, index): workers outlive epochs. shape: accumulate, world, batch_size."""

    def __init__(self, n_items: int, size: int | None, seed: int, rank: int, shape: tuple[int, int, int]):
        self.n_items, self.seed, self.rank, self.shape = n_items, seed, rank, shape
        size = min(size or n_items, n_items)
        self.updates, self.start = size // math.prod(shape), 0  # an epoch's; the update to go on after
        if self.updates < 1:
            raise SettingsError(f"an epoch of {size} mixtures is less than one update: lower --batch_size")

    def __iter__(self):
        epoch, first = divmod(self.start, self.updates)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.n_items)
        order = order[: self.updates * math.prod(self.shape)].reshape(self.updates, *self.shape)
        for batch in order[first:, :, self.rank].reshape(-1, self.shape[-1]).tolist():
            yield [(epoch, index) for index in batch]


def ignore_signals(worker: int) -> None:  # Ctrl-C reaches the workers too, who must live until the loop has saved
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def mixture_losses(predict, on_latents: bool, codec, batch, loss: str, rvq=(False, False), seconds=0.0, margins=(0, 0)):
    """The loss of each mixture of a batch [B], in dB. predict: the separator, on latents or on waveforms.

    rvq: before and after it; seconds: of the crop for the loss, without its margins (frames); 0, without any, for all.
    """
    function, between_latents = LOSSES[loss]
    if "latents" in batch:
        latents = batch["latents"].to(codec.device)
        return pit(pairwise_latent_error(estimate_latents(predict, codec, latents[:, 0], *rvq), latents[:, 1:]))[0]
    mixture, sources = (batch[name].to(codec.device, non_blocking=True) for name in ("mixture", "sources"))
    gain = codec.gain(mixture)
    mixture, sources = mixture * gain, sources * gain[:, None]
    if not on_latents:
        return pit(function(codec, predict(mixture).float(), sources))[0]
    estimates = estimate_latents(predict, codec, codec.encode(mixture), *rvq)
    if seconds:
        frames = round(seconds * codec.frame_rate) + sum(margins)
        estimates, sources = crop(codec, estimates, sources, batch["position"], frames)
    if not between_latents:
        estimates = codec.decode(estimates, sources.shape[-1])
    return pit(function(codec, estimates, sources, margins))[0]


def open_run(args, checkpoint: dict | None, rank: int, world: int) -> SimpleNamespace:
    """Opens, loads and builds what a run needs, and writes nothing. checkpoint: to resume or to start from."""
    common = {name: getattr(args, name) for name in ("n_speakers", "noise", "snr", "mix_folder")}
    segments = dict(seconds=args.seconds, size=args.epoch_size, seed=args.seed, speeds=args.speeds)
    data = open_mixtures(args.data, args.sample_rate, True, **segments, **common)
    # The same mixtures whatever the run's seed, so that seeds can be compared.
    valid = open_mixtures(args.valid, args.sample_rate, False, size=args.valid_size, seed=1, **common)
    codec = Codec.load(args.codec, args.sample_rate, choose_device())
    device = codec.device
    between_latents, separator = LOSSES[args.loss][1], SEPARATORS[args.model][0]
    rvq = args.quantize_before, args.quantize_after
    if hasattr(data, "codec") and (data.codec["fingerprint"] != codec.fingerprint or not between_latents):
        raise SettingsError(f"{args.data} holds latents of {data.codec['name']}: use --codec so and --loss embedding")
    if not separator.on_latents and (between_latents or any(rvq) or args.loss_seconds):
        raise SettingsError(f"{args.model} has no latents: give no --quantize_*, --loss_seconds or --loss embedding")
    margins = codec.margins() if args.loss_seconds else (0, 0)
    if args.loss_seconds and args.seconds * args.sample_rate <= sum(margins) * codec.samples_per_frame:
        raise SettingsError(f"{sum(margins)} frames at the ends of a segment are not scored: raise --seconds")
    batches = Batches(len(data), args.epoch_size, args.seed, rank, (args.accumulate, world, args.batch_size))
    torch.manual_seed(args.seed)
    model = build_model(vars(args), codec.latent_dim).to(device)
    if checkpoint:
        trained = checkpoint["separator"], checkpoint["config"]
        if trained != (args.model, asdict(model.config)):
            raise SettingsError(f"the checkpoint was trained with another config than the flags say: {trained}")
        check_codec(checkpoint, "the checkpoint", codec)
        model = restore_model(checkpoint, "the checkpoint", for_inference=False).to(device)
    if args.compile:
        model.compile()  # in place, so that the weights keep their names
    ddp = DistributedDataParallel(model) if world > 1 else model
    half = mixed_precision(device, args.full_precision)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    # done: updates; validated: after which of them; losses: this epoch's; skipped, in_a_row: updates not made
    progress = SimpleNamespace(**checkpoint["progress"] if args.resume else dict(
        done=0, validated=-1, losses=[], best=-math.inf, skipped=0, in_a_row=0, broken=0, seconds=0.0,
    ))  # fmt: skip
    run = SimpleNamespace(
        args=args, rank=rank, world=world, device=device, codec=codec, found=[data.found, valid.found],
        valid=SkipBroken(valid), batches=batches, updates=batches.updates, per_update=math.prod(batches.shape),
        end=min(args.epochs * batches.updates, args.max_steps or math.inf), rvq=rvq,
        losses_of=partial(
            mixture_losses, torch.autocast(device.type, half, enabled=half is not None)(ddp), separator.on_latents,
            codec, loss=args.loss, rvq=rvq, seconds=args.loss_seconds, margins=margins,
        ),
        loader=DataLoader(
            SkipBroken(data, args.seed), batch_sampler=batches, num_workers=args.workers,
            worker_init_fn=ignore_signals, persistent_workers=args.workers > 0, pin_memory=device.type == "cuda",
        ),
        model=model, ddp=ddp, optimizer=optimizer, scheduler=make_scheduler(optimizer, args, batches.updates, progress),
        scaler=torch.amp.GradScaler(device.type, enabled=half is torch.float16), progress=progress,
        stop=[], reasons=[], named=set(),  # signals; why mixtures were broken: not counted yet, told already
    )  # fmt: skip
    for name in ("optimizer", "scheduler", "scaler") if args.resume else ():
        if checkpoint[name]:  # of a scaler that was off it is empty
            getattr(run, name).load_state_dict(checkpoint[name])
    run.started, run.began = time.time() - progress.seconds, (time.time(), progress.done)
    return run


def make_scheduler(optimizer, args, updates: int, progress):
    """Stepped once an epoch by validation SI-SDRi (plateau), or after each of the `updates` an epoch (cosine)."""
    if args.schedule == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=args.patience)
    over = lambda s: max(s / (args.epochs * updates), progress.seconds / 60 / (args.minutes or math.inf))  # noqa: E731
    cosine = lambda s: 0.01 + 0.495 * (1 + math.cos(math.pi * min(over(s), 1)))  # noqa: E731
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / args.warmup, 1) * cosine(s))


def total(run, *values: float) -> list[float]:
    """The sums of numbers over all processes."""
    tensor = torch.tensor(values, dtype=torch.float64, device=run.device)
    if run.world > 1:
        dist.all_reduce(tensor)
    return tensor.tolist()


def state(run) -> dict:
    """What a checkpoint holds of a run."""
    parts = {name: getattr(run, name).state_dict() for name in ("model", "optimizer", "scheduler", "scaler")}
    return {
        "separator": run.args.model, "config": asdict(run.model.config), "sample_rate": run.args.sample_rate,
        "codec": {"name": run.args.codec, "fingerprint": run.codec.fingerprint}, "quantize_before": run.rvq[0],
        "quantize_after": run.rvq[1], "args": vars(run.args), "git": git_revision(),
        "per_update": run.per_update, "end": run.end, "progress": vars(run.progress), **parts,
    }  # fmt: skip


def sync(run, folder: RunFolder) -> None:
    """What a signal, a broken recording or the clock on any rank means for all."""
    elapsed = time.time() - run.started if run.rank == 0 else 0
    n_stop, n_broken, run.progress.seconds = total(run, len(run.stop), len(run.reasons), elapsed)
    if run.args.minutes and run.progress.seconds > 60 * run.args.minutes:
        run.end = run.progress.done
    for reason in sorted(set(run.reasons) - run.named):
        tqdm.write(f"left out: {reason}", file=sys.stderr)
    run.named, run.reasons = run.named | {*run.reasons}, []
    run.progress.broken += int(n_broken)
    if run.progress.broken > 10 + 0.1 * run.progress.done * run.per_update:
        raise DataError(f"{run.progress.broken} mixtures couldn't be read, more than a tenth: see above for the files")
    if n_stop:
        folder.save_last(state(run))
        total(run, 0)  # where one process ends, torchrun ends the others: wait for rank 0
        raise KeyboardInterrupt(f"stopped by a signal and saved; go on with --resume --out {run.args.out}")


def update(run, batches) -> tuple[float, float, float]:
    """One update of the weights, from `accumulate` batches of every rank: its loss (dB), gradient norm and rate."""
    args, progress = run.args, run.progress
    torch.manual_seed(int(np.random.default_rng([args.seed, progress.done, run.rank]).integers(2**63)))  # dropout's
    summed = n_kept = 0
    for micro in range(args.accumulate):
        # DDP averages over ranks, so the sum is scaled to make it the mean over the mixtures of all ranks.
        with run.ddp.no_sync() if run.world > 1 and micro < args.accumulate - 1 else contextlib.nullcontext():
            batch = next(batches)
            kept = keep_hard(run.losses_of(batch), args.threshold)
            (n,) = total(run, len(kept))
            run.scaler.scale(kept.sum() * run.world / max(n, 1) / args.accumulate).backward()
        summed, n_kept = summed + kept.sum().item(), n_kept + n
        run.reasons += "\n".join(filter(None, batch["broken"])).splitlines()
    (summed,) = total(run, summed)
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), args.clip).item()
    lr, loss = run.optimizer.param_groups[0]["lr"], summed / n_kept if n_kept else math.nan
    if made := math.isfinite(loss + norm):  # the same on all ranks
        run.scaler.step(run.optimizer)
        progress.losses.append(loss)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if args.schedule == "cosine":
        run.scheduler.step()
    progress.done += 1
    progress.skipped, progress.in_a_row = progress.skipped + (not made), 0 if made else progress.in_a_row + 1
    if progress.in_a_row == 100:
        what = "no finite loss and gradient" if n_kept else f"every mixture beyond --threshold {args.threshold:g} dB"
        raise SettingsError(f"{what} from update {progress.done - 99} on: lower --lr, check the data and the threshold")
    return loss, norm, lr


@torch.no_grad()
def validate(run, folder: RunFolder) -> float:
    """Mean SI-SDR improvement in dB over the validation mixtures, shared out between the ranks."""
    run.model.eval()
    mine, improvement = [(0, index) for index in range(run.rank, len(run.valid), run.world)], 0.0
    items = iter(DataLoader(run.valid, None, sampler=mine, num_workers=run.args.workers, worker_init_fn=ignore_signals))
    for _ in range(0, len(run.valid), run.world):
        if item := next(items, None):
            run.reasons += item["broken"].splitlines()
            mixture, sources = item["mixture"][None].to(run.device), item["sources"][None].to(run.device)
            loss, _ = pit(pairwise_negative_si_sdr(separate(run.model, run.codec, mixture, *run.rvq), sources))
            improvement += -loss.item() - si_sdr(mixture[:, None], sources).mean().item()
        sync(run, folder)
    run.model.train()
    return total(run, improvement)[0] / len(run.valid)


def end_epoch(run, folder: RunFolder) -> None:
    """Validates, sets the rate, logs and saves; also before the first epoch and where --max_steps ends one."""
    progress = run.progress
    speed = (progress.done - run.began[1]) * run.per_update / (time.time() - run.began[0])
    improvement, epoch = validate(run, folder), progress.done // run.updates
    loss = float(np.mean(progress.losses)) if progress.losses else math.nan
    is_best = math.isfinite(improvement) and improvement > progress.best
    progress.best = improvement if is_best else progress.best
    progress.losses, progress.validated = [], progress.done
    if run.args.schedule == "plateau" and epoch >= run.args.plateau_start and progress.done % run.updates == 0:
        run.scheduler.step(improvement)
    lr, seconds = run.optimizer.param_groups[0]["lr"], round(time.time() - run.started)
    numbers = f"{loss:.4f}", f"{improvement:.4f}", lr, progress.skipped, seconds, progress.broken, f"{speed:.2f}"
    folder.log("log.csv", epoch, progress.done, *numbers)
    if run.rank == 0:
        made = f"loss {loss:.2f}, " if math.isfinite(loss) else "before training, "
        tqdm.write(f"epoch {epoch}: {made}validation SI-SDRi {improvement:.2f} dB, rate {lr:.1e}")
        draw({folder.path.name: folder.path}, folder.path / "curves.png")
    if is_best:
        folder.save_best(state(run))
    folder.save_last(state(run))


@contextlib.contextmanager
def no_workers_left():
    """Whatever ends a run ends its workers: they are deaf to signals, and the exit would wait for them."""
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()


@no_workers_left()
def train(args, given: dict) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("nccl" if choose_device().type == "cuda" else "gloo")
    folder, changes = RunFolder(args.out, rank == 0), []
    checkpoint = folder.load_last(args.resume) or (load_checkpoint(args.init) if args.init else None)
    if args.resume:
        args, changes = resumed_settings(given, checkpoint, world)
    run = open_run(args, checkpoint, rank, world)
    for number in (signal.SIGTERM, signal.SIGINT):  # obeyed after an update, so that none is lost half way
        signal.signal(number, lambda received, frame: run.stop.append(received))
    folder.open(vars(args), checkpoint["sizes"] if args.resume else None)
    if rank == 0:
        print(*run.found, *changes, sep="\n")
        parameters = sum(p.numel() for p in run.model.parameters())
        print(f"{parameters:,} parameters on {world} x {run.device.type}, codec {args.codec} with lag {run.codec.lag}")
    progress, batches = run.progress, None  # of the epoch under way
    bar = tqdm(total=run.end, initial=progress.done, unit="step", smoothing=0.05, disable=rank > 0)
    while progress.done < run.end or progress.validated != progress.done:
        if progress.validated != progress.done and (progress.done % run.updates == 0 or progress.done >= run.end):
            end_epoch(run, folder)
            batches = None
            continue
        if batches is None:
            run.batches.start, run.began = progress.done, (time.time(), progress.done)
            batches = iter(run.loader)
        folder.log("steps.csv", progress.done + 1, *update(run, batches))
        sync(run, folder)
        if progress.done % args.save_every == 0:
            folder.save_last(state(run))
        bar.update()
        bar.set_postfix(loss=np.mean(progress.losses[-50:] or math.nan), SI_SDRi=progress.best)
    bar.close()
    if rank == 0:
        print(f"left out: {progress.broken} mixtures, {progress.skipped} updates; best SI-SDRi {progress.best:.2f} dB")
    if world > 1:
        dist.destroy_process_group()


def main() -> None:
    train(*parse_args())


if __name__ == "__main__":
    run_program(main)
