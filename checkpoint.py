"""Checkpoints and the settings they were trained with: what train.py saves and all others load.

A checkpoint is a dictionary of plain tensors, numbers and strings: `separator` (a key of SEPARATORS), `config`, `model`
(its weights), `sample_rate`, `codec` (name and fingerprint), `quantize_before`, `quantize_after`, `args` (the flags it
was trained with), `git`, and where a run can go on from it, all that it needs for that. Paths are as they were given.
"""

import argparse
import functools
import io
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

import torch
from tqdm import tqdm

from codecformer import Codecformer, CodecformerConfig
from dac_wrapper import CODECS, Codec, CodecError, first_line
from data import MIX_FOLDERS, DataError, Parser
from losses import LOSSES
from recipes.sepformer import Sepformer, SepformerConfig

HERE = Path(__file__).resolve().parent

# What --model knows: a module that is built from its frozen config, and that config. The module's `on_latents` says
# what it works on: True, latents [B, D, F] of mixtures, for which it predicts masks [B, S, D, F]; False, mixtures
# [B, T], for which it predicts estimates [B, S, T]. One whose inference can be made cheaper has a method `fuse`.
SEPARATORS = {"codecformer": (Codecformer, CodecformerConfig), "sepformer": (Sepformer, SepformerConfig)}


class SettingsError(ValueError):
    """A setting, checkpoint or folder doesn't fit; the message is one line that says what to do."""


def run_program(main) -> None:
    """Calls a program's `main`; what its user can mend ends in one line and status 1."""
    try:
        main()
    except (DataError, CodecError, SettingsError, KeyboardInterrupt) as error:
        message = str(error).rpartition("data.DataError: ")[2]  # one from a worker arrives behind its traceback
        tqdm.write(f"error: {message.strip() or 'interrupted; what was finished is kept'}", file=sys.stderr)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)


def choose_device() -> torch.device:
    """This process's device; the one place that chooses."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def mixed_precision(device, switched_off: bool = False) -> torch.dtype | None:
    """What the trained network alone computes in on a GPU: bf16 where that is no emulation, else fp16, scaled."""
    if device.type != "cuda" or switched_off:
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@functools.cache
def git_revision() -> str:
    command = ["git", "-C", HERE, "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def make_folder(path: Path) -> None:
    """Makes a folder that can be written to, or raises SettingsError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise SettingsError(f"can't write to {path} ({error.strerror}): choose another --out") from None


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
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # a power cut must not undo the renaming
        os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SettingsError(f"can't write {path} ({error}): make room and --resume, or choose another --out") from None


def load_checkpoint(path) -> dict:
    """Reads a checkpoint as plain tensors, never as code. Raises SettingsError if it is missing or none of ours."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["separator"], checkpoint["config"], checkpoint["model"], checkpoint["codec"]["name"]
    except FileNotFoundError:
        raise SettingsError(f"no checkpoint {path}: train one with train.py or give another path") from None
    except Exception as error:  # torch.load raises half a dozen types on a file that is not one of ours
        reason = f"{path} is damaged or no checkpoint ({first_line(error)})"
        raise SettingsError(f"{reason}: give another, or for a last.pt its best.pt by --init") from None
    return checkpoint


def check_codec(checkpoint: dict, path, codec: Codec) -> None:
    """Raises SettingsError if `codec` is not the one that the checkpoint's separator was trained on."""
    trained_on = checkpoint["codec"]
    if codec.fingerprint != trained_on["fingerprint"]:
        other = f"another codec than {codec.name} ({trained_on['name']}, weights {trained_on['fingerprint']})"
        raise SettingsError(f"{path} was trained on {other}: give that with --codec, or checkpoints of one codec")


def build_model(settings: dict, latent_dim: int) -> torch.nn.Module:
    """The separator that a run's settings describe, untrained. Raises SettingsError if they don't fit together."""
    separator, config = SEPARATORS[settings["model"]]
    settings = {**settings, "latent_dim": latent_dim}
    try:
        return separator(config(**{setting.name: settings[setting.name] for setting in fields(config)}))
    except ValueError as error:
        raise SettingsError(str(error)) from None


def restore_model(checkpoint: dict, path, for_inference: bool = True) -> torch.nn.Module:
    """The separator of a checkpoint, as it was or made ready for inference.

    Raises SettingsError if it can't be built or doesn't fit.
    """
    if checkpoint["separator"] not in SEPARATORS:
        raise SettingsError(
            f"{path} holds a separator {checkpoint['separator']!r}, this checkout has {', '.join(SEPARATORS)}: "
            f"load it where it was trained, or add its class to SEPARATORS"
        )
    try:
        separator, config = SEPARATORS[checkpoint["separator"]]
        model = separator(config(**checkpoint["config"]))
        # Before the 1x1 convolutions became linear layers, weights had more dimensions, of the same values.
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        model.load_state_dict({name: tensor.reshape(shapes[name]) for name, tensor in checkpoint["model"].items()})
    except (KeyError, RuntimeError, TypeError, ValueError):
        raise SettingsError(f"the weights in {path} don't fit its config: damaged, or another version's") from None
    if for_inference and hasattr(model, "fuse"):
        model.fuse()
    return model.train(not for_inference)


def load_separator(path, device, codec_name: str | None = None):
    """The model of a checkpoint, made ready for inference, its codec, and the checkpoint itself.

    codec_name: where the codec lies now, if it has moved. Raises SettingsError if it is not the one that the separator
    was trained on, CodecError without one.
    """
    checkpoint = load_checkpoint(path)
    codec = Codec.load(codec_name or checkpoint["codec"]["name"], checkpoint["sample_rate"], device)
    check_codec(checkpoint, path, codec)
    return restore_model(checkpoint, path).to(device), codec, checkpoint


# The settings of a run ------------------------------------------------------------------------------------------------

# What a resumed run may be given anew; batch_size and accumulate too, as long as an update takes as many mixtures.
CHANGEABLE = "data valid noise codec out workers save_every max_steps minutes compile full_precision epochs".split()


def read_flags(argv, folder=Path()) -> list[str]:
    """Puts the flags of a file in the place of @FILE: lines of flags, comments, and @FILE beside it."""
    flags = []
    for flag in argv:
        path = folder / flag[1:]
        if not flag.startswith("@"):
            flags.append(flag)
            continue
        try:
            lines = path.read_text().splitlines()
        except (OSError, ValueError) as error:
            raise SettingsError(f"can't read {path} ({first_line(error)}): give a file of flags, as config/*") from None
        flags += read_flags([word for line in lines for word in line.split("#")[0].split()], path.parent)
    return flags


def at_least(least: float, kind=int, most: float = math.inf):
    """A type of flags: a finite number that is no smaller, nor greater than `most`."""

    def read(text: str):
        if not least <= (value := kind(text)) <= min(most, sys.float_info.max):
            raise argparse.ArgumentTypeError(f"{text} is out of range, it must lie in {least:g} to {most:g}")
        return value

    read.__name__ = kind.__name__  # for argparse's message on what is no number
    return read


def make_parser(model: str) -> Parser:
    """The flags of a run with that model: its own come from its config."""
    parser = Parser(
        description="Trains a separator. @FILE reads flags from a file; without one, config/bundled.txt is read.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    # data
    add("--data", help="folder of speakers, fixed set (mix, s1, s2) or set of latents")
    add("--valid", help="folder of speakers or fixed set, for validation")
    add("--sample_rate", type=int, default=8000, help="Hz, of the data and the estimates")
    add("--seconds", type=at_least(0.1, float), default=4.0, help="length of a training segment")
    add("--speeds", type=at_least(25, most=400), nargs="+", help="percent, drawn per source")
    add("--n_speakers", type=int, default=2, help="of a mixture")
    add("--mix_folder", choices=MIX_FOLDERS, help="of a fixed set, where it has several")
    add("--noise", help="folder of noise for mixtures drawn on the fly")
    add("--snr", type=float, nargs=2, metavar=("LOW", "HIGH"), help="dB of the speech over the noise")
    add("--epoch_size", type=at_least(1), help="mixtures an epoch; a fixed set's own size if not given")
    add("--valid_size", type=at_least(1), help="validation mixtures; of a fixed set all if not given")
    add("--workers", type=at_least(0), default=1, help="processes that make mixtures")
    # codec
    add("--codec", default="transform", help=f"{', '.join(CODECS)} or a weights file")
    add("--quantize_before", action="store_true", help="RVQ on the mixture's latents")
    add("--quantize_after", action="store_true", help="RVQ on the estimates' latents")
    # model
    add("--model", choices=list(SEPARATORS), default=model, help="separator")
    for setting in fields(SEPARATORS[model][1]):
        if setting.name not in ("latent_dim", "n_speakers"):
            add(f"--{setting.name}", type=setting.type, default=setting.default, help=f"of {model}")
    add("--init", help="checkpoint whose separator to start from")
    # loss and optimisation
    add("--loss", choices=list(LOSSES), default="si_sdr", help="what is minimised")
    add("--loss_seconds", type=at_least(0, float), default=0.0, help="of a crop that the loss is taken on; 0: all")
    add("--threshold", type=float, default=-30.0, help="dB; mixtures with a loss below it are left out of the step")
    add("--lr", type=at_least(1e-12, float), default=1.5e-4, help="rate of Adam")
    add("--schedule", choices=["plateau", "cosine"], default="plateau", help="plateau is the paper's")
    add("--patience", type=at_least(1), default=2, help="plateau: epochs without gain before the rate is halved")
    add("--plateau_start", type=int, default=5, help="plateau: first epoch after which it may be halved")
    add("--warmup", type=at_least(1), default=100, help="cosine: updates in which the rate rises")
    add("--batch_size", type=at_least(1), default=1, help="mixtures per process and forward pass")
    add("--accumulate", type=at_least(1), default=1, help="forward passes per update")
    add("--clip", type=at_least(1e-12, float), default=5.0, help="gradient norm")
    add("--epochs", type=at_least(1), default=200, help="until the run ends")
    add("--seed", type=at_least(0), default=0, help="of weights and mixtures")
    # run
    add("--out", default="runs/bundled", help="folder of the run")
    add("--resume", action="store_true", help="go on with the run in --out, with its settings")
    add("--max_steps", type=at_least(1), help="end after so many updates, with a validation")
    add("--minutes", type=at_least(0.01, float), help="end after so many, a cosine over by then, with a validation")
    add("--save_every", type=at_least(1), default=200, help="updates between checkpoints")
    add("--compile", action="store_true", help="torch.compile the separator")
    add("--full_precision", action="store_true", help="on a GPU: no mixed precision")
    return parser


def parse_args(argv=None):
    """The run's settings, and those of them that were given on the command line or in its files."""
    argv = sys.argv[1:] if argv is None else argv
    flags, whole = read_flags(argv), "--resume" in argv or any(flag.startswith("@") for flag in argv)
    bundled = [] if whole else read_flags([f"@{HERE / 'config' / 'bundled.txt'}"])
    named = Parser(add_help=False)
    named.add_argument("--model", choices=list(SEPARATORS), default="codecformer")
    parser = make_parser(named.parse_known_args(bundled + flags)[0].model)
    parser.set_defaults(**vars(parser.parse_args(bundled)))
    args, not_given = parser.parse_args(flags), object()
    for name in ("data", "valid"):
        if getattr(args, name) is None and not args.resume:
            parser.error(f"--{name} is missing: give a folder of speakers or a fixed set")
    given = parser.parse_args(flags, argparse.Namespace(**dict.fromkeys(vars(args), not_given)))
    return args, {name: value for name, value in vars(given).items() if value is not not_given}


def resumed_settings(given: dict, checkpoint: dict, world: int):
    """The settings of a checkpoint's run with those given anew, and the latter in lines. Raises SettingsError."""
    saved, changes = checkpoint["args"], []
    for name, value in given.items():
        if name == "resume" or (name in saved and value == saved[name]):
            continue
        if name not in (*CHANGEABLE, "batch_size", "accumulate"):
            raise SettingsError(f"--{name} of the run in --out, {saved.get(name)}, can't change: use another --out")
        cosine = name == "epochs" and saved["schedule"] == "cosine"
        changes.append(f"--{name} {value} in place of {saved[name]}" + ", over which the cosine now falls" * cosine)
    args = argparse.Namespace(**{**saved, **given})
    now, before = world * args.batch_size * args.accumulate, checkpoint["per_update"]
    if now != before:
        given = f"{world} process(es), --batch_size {args.batch_size} and --accumulate {args.accumulate}"
        raise SettingsError(f"{given} make {now} mixtures an update, the run has {before}: their product must stay")
    ended = checkpoint["progress"]["validated"] >= checkpoint["end"]
    limits = ("max_steps",) if saved["max_steps"] == checkpoint["end"] else ("epochs", "minutes")
    if ended and not given.keys() & set(limits):
        raise SettingsError(f"the run has ended after {checkpoint['end']} updates: raise --{' or --'.join(limits)}")
    return args, changes


class RunFolder:
    """What a run leaves in --out; only the first of its processes writes. Raises SettingsError where it can't."""

    LOGS = {
        "steps.csv": "step,loss,gradient_norm,lr",
        "log.csv": "epoch,step,loss,valid_si_sdr_i,lr,skipped,seconds,broken,mixtures_per_second",
    }

    def __init__(self, path, writes: bool):
        self.path, self.writes, self.last = Path(path), writes, Path(path) / "last.pt"

    def load_last(self, resume: bool) -> dict | None:
        """The checkpoint to go on from."""
        begun = self.last.exists() or (not resume and (self.path / "best.pt").exists())
        if resume != begun:
            why = "no last.pt, so nothing to resume: give" if resume else "a run already: go on by --resume, or choose"
            raise SettingsError(f"{self.path} holds {why} another --out")
        checkpoint = load_checkpoint(self.last) if resume else None
        if resume and "progress" not in checkpoint:
            raise SettingsError(f"{self.last} is no last.pt of this version: start from it by --init")
        return checkpoint

    def open(self, args: dict, sizes: dict | None) -> None:
        """Begins it or, with the sizes of the logs at a checkpoint, cuts off what was logged after that."""
        if not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "args.json").write_text(json.dumps(args, indent=1) + "\n")
            for name, columns in self.LOGS.items():
                if sizes:
                    os.truncate(self.path / name, sizes[name])
                else:
                    (self.path / name).write_text(columns + "\n")
        except OSError as error:
            raise SettingsError(f"can't write to {self.path} ({error}): mend that, or choose another --out") from None

    def log(self, name: str, *row) -> None:
        """Adds a row to a csv file, floats in full, and hands it to the system, so that no kill loses it."""
        if self.writes:
            try:
                with open(self.path / name, "a") as file:
                    print(*row, sep=",", file=file)
            except OSError as error:
                raise SettingsError(f"can't write to {self.path} ({error}): make room and --resume") from None

    def save_last(self, state: dict) -> None:
        if self.writes:
            save(self.last, {**state, "sizes": {name: (self.path / name).stat().st_size for name in self.LOGS}})

    def save_best(self, state: dict) -> None:
        """Without what only resuming needs, in half precision."""
        if self.writes:
            needed = {k: v for k, v in state.items() if k not in ("optimizer", "scheduler", "scaler")}
            save(self.path / "best.pt", {**needed, "model": {k: v.half().cpu() for k, v in state["model"].items()}})
