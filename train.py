"""Trains a separator: the explicit loop, on one process or several.

    python train.py                              the speech and the codec of this repository
    python train.py @config/wsj0_2mix.txt        the paper's run; flags after a file override it
    torchrun --nproc_per_node=4 train.py         four times the batch, on 4 GPUs (nccl) or CPU
                                                 processes (gloo)
    python train.py --resume                     goes on where the run in --out stopped

A run's folder holds
    settings.json    its settings
    steps.csv        a row an update
    log.csv          a row a validation: after each epoch, and at the run's end
    last.pt          everything, to resume
    best.pt          the weights with the best validation SI-SDRi, in half precision

What is unusual:
- Every mixture is a pure function of (seed, epoch, index), and an update's are the same however
  many processes share them. So the data of a resumed run follow from the number of updates made,
  and N processes with a batch of B compute what one does with N * B, but for dropout, which every
  process draws for itself.
- The codec is frozen, and stays outside DDP and mixed precision: only the separator learns.
- A mixture that is separated better than --threshold weighs nothing, as in Sepformer's recipe, so
  that easy mixtures don't drown the others.
"""

import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoint import (
    SEPARATORS,
    build_model,
    check_codec,
    load_checkpoint,
    make_checkpoint,
)
from codecformer import estimate_latents, separate
from dac_wrapper import CODECS, Codec
from data import MIX_FOLDERS, Replaced, open_mixtures
from losses import LOSSES, pairwise_negative_si_sdr, pit, si_sdr
from program import (
    Parser,
    UserError,
    add_flags,
    choose_device,
    choose_precision,
    choose_threads,
    locate,
    lock,
    number,
    run_program,
    save_tensors,
    setting,
    whole,
    whole_file,
    writing,
)


@dataclass
class Settings:
    """A run. Each field is a flag of its name; the defaults are what `python train.py` runs."""

    # data
    data: str = setting("assets/speech/train", "folder of speakers, or fixed set (mix, s1, s2)")
    valid: str = setting("assets/speech/valid", "the same, of other recordings")
    sample_rate: int = setting(8000, "Hz, of mixtures and estimates", whole(1000, 192000))
    seconds: float = setting(2.0, "length of a training segment", number(0.1, 600))
    speeds: list[int] = setting((90, 95, 100, 105, 110), "percent, one drawn for each source")
    n_speakers: int = setting(2, "in a mixture", whole(2, 5))
    mix_folder: str | None = setting(None, "of a fixed set that has several", choices=MIX_FOLDERS)
    noise: str | None = setting(None, "folder of noise for mixtures drawn on the fly")
    snr: list[float] | None = setting(None, "dB of the speech over the noise, low and high")
    epoch_size: int | None = setting(2400, "mixtures an epoch, at most a fixed set's", whole(1))
    valid_size: int | None = setting(40, "validation mixtures, at most a fixed set's", whole(1))
    workers: int = setting(1, "processes that make mixtures", whole(0, 64))
    # codec and separator; the separator's own sizes are flags too
    codec: str = setting("bundled", f"{', '.join(CODECS)}, or a weights file")
    quantize_before: bool = setting(False, "the separator sees quantised latents")
    quantize_after: bool = setting(False, "its estimates are quantised")
    model: str = setting("codecformer", "separator", choices=list(SEPARATORS))
    init: str | None = setting(None, "checkpoint whose separator to start from")
    # loss
    loss: str | None = setting(
        None,
        "si_sdr, csi_sdr (the paper's cSI-SDR) or embedding (between latents, nothing is decoded); "
        "without it embedding, of a separator on waveforms si_sdr",
        choices=list(LOSSES),
    )
    loss_seconds: float = setting(0.0, "the loss sees a crop of so many; 0: all", number(0, 600))
    threshold: float = setting(
        -30.0, "dB; a mixture with a loss below it weighs nothing", number(-1e3, 1e3)
    )
    # optimisation
    lr: float = setting(1e-3, "rate of Adam", number(1e-12, 10))
    schedule: str = setting("cosine", "of the rate", choices=["cosine", "plateau"])
    warmup: int = setting(100, "cosine: updates in which the rate rises", whole(1))
    patience: int = setting(2, "plateau: epochs without gain until it is halved", whole(0))
    plateau_start: int = setting(5, "plateau: the first epoch that counts", whole(0))
    batch_size: int = setting(8, "mixtures a process and forward pass", whole(1))
    accumulate: int = setting(1, "forward passes an update", whole(1))
    clip: float = setting(5.0, "largest norm of the gradient", number(1e-12))
    epochs: int = setting(6, "until the run ends", whole(1))
    precision: str = setting("auto", "of the separator", choices=["auto", "fp32", "bf16", "fp16"])
    seed: int = setting(0, "of weights and mixtures", whole(0, 2**32 - 1))
    # run
    out: str = setting("runs/first", "folder of the run")
    max_steps: int | None = setting(None, "end after so many updates", whole(1))
    save_every: int = setting(200, "updates between checkpoints", whole(1))
    compile: bool = setting(False, "compile the separator")

    def __post_init__(self):
        self.speeds = list(self.speeds)


# The separator of `python train.py`: 2.5 million parameters. Without a config file these are the
# defaults of its sizes; any other separator starts from the defaults of its own config.
DEFAULT_SIZES = {
    "codecformer": dict(
        features="both",
        context=5,
        d_model=160,
        n_layers=5,
        n_heads=5,
        d_ffn=640,
        dropout=0.0,
    )
}

# May be given anew on --resume; all else stays as the run began.
CHANGEABLE = {
    "epochs", "max_steps", "save_every", "workers", "data", "valid", "noise", "codec", "compile",
    "out",
}  # fmt: skip

# Frames on either side of a crop that the loss doesn't see. At the cut ends of a signal a codec
# lacks what it looks at: the 16 kHz DAC's encoder sees 7.8 frames to either side, its decoder 10.
MARGIN = 10


def train(given: dict, resume: bool) -> None:
    """A whole run. given: settings and sizes of the separator that differ from the defaults."""
    out = Path(given.get("out", Settings.out))
    checkpoint = load_last(out) if resume else None
    if resume:
        given = resumed(checkpoint["settings"], given)
    settings, sizes = split_settings(given)

    rank, world, device = join_processes()
    n_threads = choose_threads(settings.workers, world)
    codec = Codec.load(settings.codec, settings.sample_rate, device)
    torch.manual_seed(settings.seed)
    model = build_model(settings.model, sizes, settings.n_speakers, codec.latent_dim).to(device)
    settings.loss = settings.loss or ("embedding" if model.on_latents else "si_sdr")
    check_settings(settings, model, codec)
    start = checkpoint or (load_checkpoint(settings.init) if settings.init else None)
    if start:
        start_from(start, settings.model, model, codec)
    if settings.compile:
        if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            raise UserError("--compile needs a C++ compiler: install g++, or set CXX to another")
        model.compile()  # in place: the weights keep their names
    ddp = DistributedDataParallel(model) if world > 1 else model

    common = dict(mix_folder=settings.mix_folder, noise=settings.noise, snr=settings.snr)
    mixtures = open_mixtures(
        locate(settings.data),
        settings.sample_rate,
        settings.n_speakers,
        seconds=settings.seconds,
        size=settings.epoch_size,
        seed=settings.seed,
        speeds=settings.speeds,
        **common,
    )
    # The same mixtures whatever the run's seed, so that seeds can be compared.
    valid_mixtures = open_mixtures(
        locate(settings.valid),
        settings.sample_rate,
        settings.n_speakers,
        size=settings.valid_size,
        seed=1,
        **common,
    )
    if rank == 0 and Path(settings.data).resolve() == Path(settings.valid).resolve():
        tqdm.write("note: --valid is --data: scores are of what it was trained on", file=sys.stderr)
    for dataset in (mixtures, valid_mixtures):
        if dataset.n_speakers != settings.n_speakers:
            raise UserError(f"{dataset.found}, not {settings.n_speakers}: see --n_speakers")

    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "max", factor=0.5, patience=settings.patience
    )
    precision = choose_precision(device, settings.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    done = 0  # updates
    skipped = 0  # of them, those that moved nothing
    best = -math.inf  # validation SI-SDRi, dB
    losses = []  # of this epoch's updates, dB
    seconds_before = 0.0  # spent before the run was resumed
    if resume:
        training = checkpoint["training"]
        optimizer.load_state_dict(training["optimizer"])
        plateau.load_state_dict(training["plateau"])
        if training["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(training["scaler"])
        done = training["done"]
        skipped = training["skipped"]
        best = training["best"]
        losses = training["losses"]
        seconds_before = training["seconds"]

    # An update takes world * accumulate batches. Which mixtures they hold follows from (seed,
    # epoch, update) alone.
    shape = (settings.accumulate, world, settings.batch_size)
    batches = Batches(
        len(mixtures), settings.epoch_size, settings.epochs, settings.seed, shape, rank, done
    )
    updates = batches.updates  # an epoch's
    end = min(batches.end, settings.max_steps or math.inf)
    if resume and batches.per_update != training["per_update"]:
        had = training["per_update"]
        raise UserError(
            f"{world} process(es) make {batches.per_update} mixtures an update, not {had}"
        )
    if resume and updates != training["updates"]:
        had = training["updates"]
        raise UserError(f"an epoch has {updates} updates now, it had {had}: give the same --data")
    if resume and done >= end:
        raise UserError(f"the run ended after {done} updates: raise --epochs or --max_steps")
    loader = iter(
        DataLoader(
            Replaced(mixtures),
            batch_sampler=batches,
            num_workers=settings.workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=leave_signals_to_parent,
        )
    )
    # Where a data worker dies, torch would raise its error in whatever line is running. So it is
    # found where the next batch is taken.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    began = time.monotonic()
    first = done
    stuck = 0  # updates in a row that moved nothing
    told = set()  # why mixtures were passed over

    def predict(inputs: torch.Tensor) -> torch.Tensor:
        """The separator, in mixed precision where that is on."""
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            return ddp(inputs)

    def state() -> dict:
        """What a checkpoint holds of the run."""
        without_training = make_checkpoint(
            settings.model,
            model,
            codec,
            {**asdict(settings), **sizes},
            settings.quantize_before,
            settings.quantize_after,
        )
        return {
            **without_training,
            "training": {
                "optimizer": optimizer.state_dict(),
                "plateau": plateau.state_dict(),
                "scaler": scaler.state_dict(),
                "done": done,
                "skipped": skipped,
                "best": best,
                "losses": losses,
                "seconds": seconds_before + time.monotonic() - began,
                "per_update": batches.per_update,
                "updates": updates,
            },
        }

    if rank == 0:
        running = begin_folder(out, state(), resume)
        n_parameters = sum(p.numel() for p in model.parameters())
        print(mixtures.found, valid_mixtures.found, sep="\n")
        print(
            f"{n_parameters:,} parameters on {world} x {device.type} with {n_threads} thread(s), "
            f"codec {settings.codec} with lag {codec.lag}"
        )
    bar = tqdm(total=end, initial=done, unit="step", smoothing=0.05, disable=rank > 0)

    for epoch in range(done // updates, settings.epochs):
        for _ in range(done % updates, updates):
            if settings.schedule == "cosine":
                rate = cosine_rate(settings.lr, done, batches.end, settings.warmup)
                for group in optimizer.param_groups:
                    group["lr"] = rate
            rate = optimizer.param_groups[0]["lr"]
            torch.manual_seed(seed_of_update(settings.seed, done, rank))  # dropout's
            loss_of_update = 0.0
            for micro in range(settings.accumulate):
                # Gradients are averaged over the processes in the last backward pass alone. (One
                # process has no DDP, and doesn't look at this.)
                ddp.require_backward_grad_sync = micro == settings.accumulate - 1
                batch = next_batch(loader, out)
                report_broken(batch["broken"], told)
                loss = mixture_losses(
                    predict,
                    model.on_latents,
                    codec,
                    batch,
                    settings.loss,
                    settings.quantize_before,
                    settings.quantize_after,
                    settings.loss_seconds,
                )  # [B], dB
                weight = ~(loss <= settings.threshold)  # not a number weighs, to be seen below
                # Over all mixtures, also those without weight: so it is the same however many
                # processes share them.
                mean = torch.where(weight, loss, 0.0).mean() / settings.accumulate
                scaler.scale(mean).backward()
                loss_of_update += loss.detach().mean() / settings.accumulate
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            moves = 0 < norm.item() < math.inf  # the same on all processes
            if moves:
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            done += 1
            skipped += not moves
            stuck = 0 if moves else stuck + 1
            if stuck == 100:
                raise UserError(
                    "100 updates in a row moved nothing: lower --lr, check the data and --threshold"
                )
            loss_of_update = mean_of_processes(loss_of_update, world)
            losses.append(loss_of_update)
            if rank == 0:
                add_row(out / "steps.csv", done, loss_of_update, norm.item(), rate)
                bar.update()
                bar.set_postfix(loss=np.mean(losses[-50:]))  # dB
            if done == end:
                break
            # At the end of an epoch it is saved below, after the validation.
            if rank == 0 and done % settings.save_every == 0 and done % updates:
                save_tensors(state(), out / "last.pt")

        rvq = (settings.quantize_before, settings.quantize_after)
        si_sdr_i = validate(model, codec, valid_mixtures, rvq, rank, world, told)  # dB
        whole_epoch = done % updates == 0  # not cut short by --max_steps
        if settings.schedule == "plateau" and epoch + 1 >= settings.plateau_start and whole_epoch:
            plateau.step(si_sdr_i)
        if rank == 0:
            rate = optimizer.param_groups[0]["lr"]
            seconds = time.monotonic() - began
            speed = (done - first) * batches.per_update / seconds
            total = round(seconds_before + seconds)
            mean = np.mean(losses)
            add_row(out / "log.csv", epoch + 1, done, mean, si_sdr_i, rate, skipped, total, speed)
            tqdm.write(f"epoch {epoch + 1}: loss {mean:.2f}, validation SI-SDRi {si_sdr_i:.2f} dB")
        if whole_epoch:
            losses = []
        if si_sdr_i > best:
            best = si_sdr_i
            if rank == 0:
                save_best(state(), out / "best.pt")
        if rank == 0:
            save_tensors(state(), out / "last.pt")
        if done == end:
            break

    bar.close()
    if rank == 0:
        running.close()
    if world > 1:
        dist.destroy_process_group()
    if skipped == done:
        reason = "no loss was finite and above --threshold"
        raise UserError(f"none of {done} updates moved anything: {reason}, or no gradient finite")
    if rank == 0:
        print(
            f"{done} updates, {skipped} of them left out; best SI-SDRi {best:.2f} dB: {out}/best.pt"
        )


def mixture_losses(
    predict,
    on_latents: bool,
    codec: Codec,
    batch: dict,
    loss_name: str,
    quantize_before: bool = False,
    quantize_after: bool = False,
    crop_seconds: float = 0.0,
) -> torch.Tensor:
    """The loss of each mixture of a batch, [B], in dB.

    predict: the separator, on latents or on waveforms. crop_seconds: of the crop that the loss
    sees; 0: all.
    """
    loss, compared = LOSSES[loss_name]
    mixture = batch["mixture"].to(codec.device, non_blocking=True)  # [B, T]
    sources = batch["sources"].to(codec.device, non_blocking=True)  # [B, S, T]
    gain = codec.gain(mixture)  # [B, 1], to the level that codecs are fed at
    mixture = mixture * gain
    sources = sources * gain.unsqueeze(1)
    if compared == "transmitted":
        sources = codec.transmit(sources)  # whole ones, as a crop is not what would be sent
    if not on_latents:
        estimates = predict(mixture).float()
        return pit(loss(codec, estimates, sources))[0]

    latents = codec.encode(mixture)  # [B, D, F]
    # [B, S, D, F], float32 again
    estimates = estimate_latents(predict, codec, latents, quantize_before, quantize_after)
    margin = 0
    if crop_seconds:
        margin = MARGIN
        frames = round(crop_seconds * codec.frame_rate) + 2 * margin
        estimates, sources = crop(codec, estimates, sources, batch["position"], frames)
    if compared != "latents":
        estimates = codec.decode(estimates, sources.shape[-1])
    return pit(loss(codec, estimates, sources, margin))[0]


def crop(codec, latents, sources, position, frames: int):
    """The same `frames` of latents [B, S, D, F] and of sources [B, S, T].

    position: [B], in [0, 1), where they begin. Decoding is most of a step with the losses on
    waveforms, and a part of a segment tells how good its latents are.
    """
    samples = codec.samples_per_frame
    n_starts = max(sources.shape[-1] // samples - frames, 0) + 1
    starts = (position * n_starts).int().tolist()
    latents = [z[..., start : start + frames] for z, start in zip(latents, starts)]
    sources = [
        s[..., start * samples : (start + frames) * samples] for s, start in zip(sources, starts)
    ]
    return torch.stack(latents), torch.stack(sources)


@torch.no_grad()
def validate(model, codec, mixtures, rvq, rank: int, world: int, told: set) -> float:
    """Mean SI-SDR improvement in dB over the validation mixtures, shared out to the processes.

    rvq: whether it lies before and after the separator. told: see `report_broken`.
    """
    model.eval()
    mixtures = Replaced(mixtures)
    # Of the improvements, and how many they are.
    totals = torch.zeros(2, dtype=torch.float64, device=codec.device)
    for index in range(rank, len(mixtures), world):
        item = mixtures[index]
        report_broken([item["broken"]], told)
        mixture = torch.from_numpy(item["mixture"])[None].to(codec.device)  # [1, T]
        sources = torch.from_numpy(item["sources"])[None].to(codec.device)  # [1, S, T]
        if (sources.std(-1) <= 1e-6).any():  # of a silent source nothing can be said
            continue
        estimates = separate(model, codec, mixture, *rvq)
        loss, _ = pit(pairwise_negative_si_sdr(estimates, sources))
        untouched = si_sdr(mixture.unsqueeze(1), sources).mean()
        totals[0] += -loss.squeeze() - untouched
        totals[1] += 1
    if world > 1:
        dist.all_reduce(totals)
    model.train()
    improvement, n_scored = totals.tolist()
    if n_scored == 0:
        raise UserError("every validation mixture has a silent source: give another --valid")
    return improvement / n_scored


def cosine_rate(peak: float, done: int, end: int, warmup: int) -> float:
    """The rate of the next update: a linear rise, times a cosine that ends at a hundredth."""
    rise = min((done + 1) / warmup, 1)
    fall = 0.01 + 0.99 * (1 + math.cos(math.pi * min(done / end, 1))) / 2
    return peak * rise * fall


# Batches and processes ----------------------------------------------------------------------------


class Batches:
    """The keys (epoch, index) of this process's batches, from update `first` to the run's end.

    n: mixtures in the dataset, of which an epoch takes `size`. shape: of an update's mixtures,
    (accumulate, processes, batch_size). Raises UserError if an epoch makes no update.
    """

    def __init__(
        self,
        n: int,
        size: int | None,
        epochs: int,
        seed: int,
        shape: tuple[int, int, int],
        rank: int,
        first: int = 0,
    ):
        self.n = n
        self.seed = seed
        self.shape = shape
        self.rank = rank
        self.per_update = math.prod(shape)
        size = min(size or n, n)
        self.updates = size // self.per_update  # an epoch's
        if self.updates < 1:
            raise UserError(f"{size} mixtures an epoch make no update: lower --batch_size")
        self.first = first
        self.end = epochs * self.updates

    def __iter__(self):
        for update in range(self.first, self.end):
            epoch, k = divmod(update, self.updates)
            if k == 0 or update == self.first:
                order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
            indices = order[k * self.per_update : (k + 1) * self.per_update]
            for batch in indices.reshape(self.shape)[:, self.rank]:
                yield [(epoch, int(index)) for index in batch]


def next_batch(loader, out: Path) -> dict:
    """Raises UserError where a data worker was killed: torch then fails in one of these ways."""
    try:
        return next(loader)
    except (RuntimeError, OSError, EOFError) as error:
        message = str(error)
        if "Caught" in message or (isinstance(error, RuntimeError) and "worker" not in message):
            raise  # what a worker itself raised, or something else
        advice = f"go on with: python train.py --resume --out {out}"
        raise UserError(f"a data worker was killed, perhaps for want of memory; {advice}") from None


def join_processes() -> tuple[int, int, torch.device]:
    """This process's number, how many there are, and its device. torchrun sets what it reads."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device()
    if world > 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError("WORLD_SIZE is set, but not by torchrun: start by torchrun, or unset it")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def mean_of_processes(value: torch.Tensor, world: int) -> float:
    if world > 1:
        dist.all_reduce(value)
    return value.item() / world


def seed_of_update(seed: int, done: int, rank: int) -> int:
    return int(np.random.default_rng([seed, done, rank]).integers(2**63))


def leave_signals_to_parent(worker: int) -> None:
    """For data workers: Ctrl-C reaches them too, and they would answer with tracebacks.

    SIGTERM, by which they are ended, must end them at once.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Where the parent ends in the midst of taking a batch, a thread that hands it over says so.
    sys.excepthook = lambda *error: None


def report_broken(lines: list[str], told: set) -> None:
    """Says why mixtures were passed over, each reason once; `told` gets those that were said."""
    for line in "\n".join(lines).splitlines():
        if line and line not in told:
            told.add(line)
            tqdm.write(f"passed over: {line}", file=sys.stderr)


def check_settings(settings: Settings, model, codec) -> None:
    """Raises UserError for settings that can't be meant together."""
    if not model.on_latents:
        if LOSSES[settings.loss][1] == "latents" or settings.loss_seconds:
            raise UserError(
                f"{settings.model} has no latents: give --loss si_sdr, no --loss_seconds"
            )
        if settings.quantize_before or settings.quantize_after:
            raise UserError(f"{settings.model} has no latents: leave out --quantize_*")
    if settings.loss_seconds:
        least = 2 * MARGIN / codec.frame_rate
        codec.samples_per_frame  # raises where frames are no whole samples
        if settings.seconds <= least:
            raise UserError(f"a crop has {least:g} s around it: raise --seconds above that")


# The folder of a run ------------------------------------------------------------------------------

COLUMNS = {
    "steps.csv": ["step", "loss", "gradient_norm", "lr"],
    "log.csv": [
        "epoch", "step", "loss", "valid_si_sdr_i", "lr", "skipped", "seconds",
        "mixtures_per_second",
    ],
}  # fmt: skip


def begin_folder(out: Path, state: dict, resume: bool):
    """Makes the folder or, to go on, leaves out rows of updates that the checkpoint doesn't know.

    Returns a file that is locked as long as it is open. Raises UserError if a run is going on in
    the folder, or if a new one would write over another's weights.
    """
    if not resume and (out / "last.pt").exists():
        raise UserError(f"{out} holds a run: --resume it, or choose another --out")
    if not resume and (out / "best.pt").exists():
        raise UserError(f"{out} holds weights: start from them by --init, with another --out")
    file = lock(out / "settings.json")
    with writing(out):
        file.truncate(0)
        json.dump(state["settings"], file, indent=1)
        file.flush()
        for name, columns in COLUMNS.items():
            rows = read_rows(out / name, columns, state["training"]["done"]) if resume else []
            with whole_file(out / name) as partial, open(partial, "w") as log:
                for row in [columns, *rows]:
                    print(*row, sep=",", file=log)
    save_tensors(state, out / "last.pt")
    return file


def read_rows(path: Path, columns: list[str], done: float = math.inf) -> list[list[str]]:
    """The rows of a log up to update `done`; what a crash left of others is passed over."""
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").splitlines()
    rows = [line.split(",") for line in lines]
    step = columns.index("step")
    whole_rows = [row for row in rows if len(row) == len(columns) and row[step].isdecimal()]
    return [row for row in whole_rows if int(row[step]) <= done]


def add_row(path: Path, *values) -> None:
    with writing(path), open(path, "a") as file:
        print(*values, sep=",", file=file)


def save_best(state: dict, path: Path) -> None:
    """Without what only resuming needs, in half precision."""
    weights = {name: tensor.half().cpu() for name, tensor in state["model"].items()}
    best = {key: value for key, value in state.items() if key != "training"}
    save_tensors({**best, "model": weights}, path)


# The settings of a run ----------------------------------------------------------------------------


def read_flags(words: list[str]) -> tuple[dict, bool]:
    """The settings and sizes that were given on the command line, and whether to resume."""
    which = Parser(add_help=False)
    which.add_argument("--model", choices=list(SEPARATORS), default=Settings.model)
    which.add_argument("--resume", action="store_true")
    known = which.parse_known_args(words)[0]
    model = known.model
    resume = known.resume
    from_file = any(word.startswith("@") for word in words)
    sizes = {} if from_file or resume else DEFAULT_SIZES.get(model, {})

    parser = Parser(description="Trains a separator. @FILE stands for the flags in a file.")
    add_flags(parser, Settings, {})
    given_by_others = ("n_speakers", "latent_dim")
    add_flags(parser, SEPARATORS[model][1], sizes, leave_out=given_by_others)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    given = vars(parser.parse_args(words))
    given.pop("resume")
    if "snr" in given and len(given["snr"]) != 2:
        parser.error("--snr takes two numbers, low and high")
    return {**sizes, **given}, resume


def split_settings(given: dict) -> tuple[Settings, dict]:
    """The settings of a run among what was given, and what is left: the sizes of its separator."""
    known = Settings.__dataclass_fields__
    settings = Settings(**{name: value for name, value in given.items() if name in known})
    return settings, {name: value for name, value in given.items() if name not in known}


def load_last(out: Path) -> dict:
    """The checkpoint to go on from."""
    path = out / "last.pt"
    if not path.exists():
        if (out / "best.pt").exists():
            raise UserError(f"{path} is gone: start from {out}/best.pt by --init, as another --out")
        raise UserError(f"{out} holds no run to resume: check --out, or leave out --resume")
    checkpoint = load_checkpoint(path)
    if "training" not in checkpoint:
        raise UserError(f"{path} holds weights alone, as best.pt does: start from it by --init")
    return checkpoint


def resumed(saved: dict, given: dict) -> dict:
    """The settings of a run that goes on: those it had, and what may be given anew."""
    for name, value in given.items():
        if name not in CHANGEABLE and value != saved.get(name):
            had = saved.get(name)
            raise UserError(
                f"--{name} was {had} in this run: to change it, start from it by --init"
            )
        if name in ("data", "valid") and value != saved.get(name):
            tqdm.write(f"note: --{name} was {saved.get(name)} in this run", file=sys.stderr)
    return {**saved, **given}


def start_from(checkpoint: dict, name: str, model, codec: Codec) -> None:
    """Gives `model` the weights of a checkpoint, if they are of one like it. Raises UserError."""
    check_codec(checkpoint, "the checkpoint", codec)
    if checkpoint["separator"] != name:
        raise UserError(f"the checkpoint's --model is {checkpoint['separator']}, not {name}")
    config = asdict(model.config)
    trained = checkpoint["config"]
    differ = [name for name, value in config.items() if trained.get(name) != value]
    if differ:
        name = differ[0]
        value = trained.get(name)
        raise UserError(f"the checkpoint's --{name} is {value}, not {config[name]}: give it so")
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError:
        raise UserError("the checkpoint's weights don't fit its config: give another") from None


def main() -> None:
    given, resume = read_flags(sys.argv[1:])
    out = given.get("out", Settings.out)
    go_on = f"go on with: python train.py --resume --out {out}"
    try:
        train(given, resume)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {go_on}") from None


if __name__ == "__main__":
    run_program(main)
