"""What every program here shares: mistakes in one line, flags, the device, files that are whole.

Nothing in here is about speech; a first reading can leave it out.

- A user's mistake is a `UserError`, whose message is one line that says what is wrong and what to
  do. `run_program` prints it without a traceback and ends with status 1.
- The device, train.py's precision and the number of threads are chosen here.
- Files are written beside their place and renamed, so that what stops a program leaves no half of
  one. Weights are read as plain tensors, never as code.
"""

import argparse
import csv
import errno
import fcntl
import math
import multiprocessing
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import field, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

import soundfile as sf
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ASSETS = HERE / "assets"


class UserError(Exception):
    """Something that the user can mend; the message is one line that says how."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut to 120 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return textwrap.shorten(lines[0], 120, placeholder=" ...")


def run_program(main) -> None:
    """Calls a program's `main`. A UserError ends it in one line and status 1, Ctrl-C in status 130.

    SIGTERM and the end of a terminal are taken as Ctrl-C, so that files which are being written are
    cleared away.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # by nohup it is ignored
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a letter of a file's name
    try:
        main()
        sys.stdout.flush()
        return
    except UserError as error:
        status = 1
        message = str(error).strip()
        # One that was raised in a data worker arrives as that worker's traceback, its line last.
        if "Traceback" in message:
            message = message.splitlines()[-1].partition(": ")[2]
    except KeyboardInterrupt as interrupt:
        status = 130
        message = str(interrupt) or "stopped; what was finished is kept"
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC) or error.filename is not None:
            raise
        # What was printed can't be written: to a full disk, or to `| head`.
        status = 1
        message = f"can't go on printing ({first_line(error)}): what was finished is kept"
    except (MemoryError, RuntimeError) as error:
        if "allocate" not in str(error) and not isinstance(error, MemoryError):
            raise
        status = 1
        message = f"out of memory ({first_line(error)}): ask for less at a time"
    tqdm.write(f"error: {message}", file=sys.stderr)
    with suppress(OSError):
        sys.stdout.flush()
    sys.stderr.flush()
    # An ordinary exit would wait for other processes to finish what they are at, and a sudden one
    # would leave evaluate.py's waiting for ever: they are ended first.
    for process in multiprocessing.active_children():
        process.terminate()
    os._exit(status)


# Flags --------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Answers a mistake with one line, not with all flags, and takes no flag for another.

    @FILE on the command line stands for the flags in that file: words as in a shell, with comments
    after #.
    """

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, fromfile_prefix_chars="@", **settings)

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        return shlex.split(line, comments=True)

    def parse_known_args(self, *words):
        try:
            return super().parse_known_args(*words)
        except (ValueError, RecursionError) as error:
            self.error(f"a file of flags, given by @, can't be read ({first_line(error)})")

    def error(self, message: str):
        self.exit(2, f"error: {message} (see --help)\n")


def setting(default, help: str, read=None, choices=None):
    """A field of a dataclass of settings, from which `add_flags` makes a flag.

    read: what makes a value of a word; by default the field's type.
    """
    return field(default=default, metadata={"help": help, "read": read, "choices": choices})


def add_flags(parser: Parser, settings, defaults: dict, leave_out=()) -> None:
    """Adds a flag for each field of a dataclass; those not given leave no trace in the answer.

    Booleans become --flag and --no-flag, lists take several words. defaults: shown by --help in
    place of the dataclass's own.
    """
    for entry in fields(settings):
        if entry.name in leave_out:
            continue
        kind = entry.type
        if get_origin(kind) is UnionType:  # int | None
            kind = get_args(kind)[0]
        options = {"default": argparse.SUPPRESS}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is list:
            options["nargs"] = "+"
            kind = get_args(kind)[0]
        if kind is not bool:
            options["type"] = entry.metadata.get("read") or kind
            options["choices"] = entry.metadata.get("choices")
        text = entry.metadata.get("help", f"of {settings.__name__}")
        default = defaults.get(entry.name, entry.default)
        parser.add_argument(f"--{entry.name}", help=f"{text} (default: {default})", **options)


def number(least: float, most: float = math.inf, kind: type = float):
    """A type for flags: a finite number from `least` to `most`."""

    def read(text: str):
        value = kind(text)
        if not least <= value <= min(most, sys.float_info.max):
            raise argparse.ArgumentTypeError(f"{text} must lie in {least:g} to {most:g}")
        return value

    read.__name__ = kind.__name__  # argparse says it of a word that is no number at all
    return read


def whole(least: int, most: float = math.inf):
    """A type for flags: a whole number from `least` to `most`."""
    return number(least, most, int)


# The machine --------------------------------------------------------------------------------------


def choose_device() -> torch.device:
    """This process's device: its GPU if there is one, under torchrun that of its rank."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


def choose_precision(device: torch.device, asked: str) -> torch.dtype:
    """The type that a network computes in: the one asked for, or with "auto" what suits the device.

    That is float32 on a CPU, bfloat16 on a GPU that has it, and float16 on others, whose gradients
    then have to be scaled.
    """
    if asked != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[asked]
    if device.type != "cuda":
        return torch.float32
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


def choose_threads(workers: int, processes: int = 1) -> int:
    """Sets and returns torch's threads: the cores this process may use, less those of its workers.

    More threads than cores is several times slower than one. OMP_NUM_THREADS is obeyed. Sums of
    another number of threads are rounded otherwise: a run that is to repeat needs the same.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))  # what the scheduler allots, not what the machine has
        torch.set_num_threads(max(cores // processes - workers, 1))
    return torch.get_num_threads()


@cache
def git_revision() -> str:
    command = ["git", "-C", HERE, "describe", "--always", "--dirty"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # no git
        return "unknown"
    return answer.stdout.strip() or "unknown"


def locate(path) -> Path:
    """A path as given or, for what lies in the repository, from wherever a program is called."""
    path = Path(path)
    if not path.exists() and (HERE / path).exists():
        return HERE / path
    return path


def portable(path) -> str:
    """A path for results: relative to the repository if it lies in it, else as given."""
    full = Path(path).resolve()
    if full.is_relative_to(HERE) and full.exists():
        return full.relative_to(HERE).as_posix()
    return str(path)


def provenance(*program: str) -> dict[str, str]:
    """Command, machine and git revision of results. program: the words after `python`."""
    cores = len(os.sched_getaffinity(0))
    device = choose_device().type
    words = [portable(word) for word in sys.argv[1:]]
    # Of what lies elsewhere on the machine, the name alone.
    words = [Path(word).name if Path(word).is_absolute() else word for word in words]
    return {
        "command": shlex.join(["python", *program, *words]),
        "machine": f"{platform.machine()}, {cores} cores, {device}, torch {torch.__version__}",
        "git": git_revision(),
    }


# Files --------------------------------------------------------------------------------------------


@contextmanager
def writing(path):
    """Context: raises UserError if what is written to `path` in it can't be, as on a full disk."""
    try:
        yield
    except (OSError, sf.LibsndfileError) as error:
        reason = first_line(error)
        raise UserError(f"can't write {path} ({reason}): make room, or choose another") from None


@contextmanager
def whole_file(path):
    """Context: a path to write to, which is renamed to `path` when all went well."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path):
    """Context: a folder to fill, which is renamed to `path` when all went well.

    Raises UserError if `path` is there already or can't be written.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} is there already: remove it, or choose another --out")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as temporary:
            folder = Path(temporary) / path.name
            folder.mkdir()
            yield folder
            folder.rename(path)


def lock(path):
    """Opens a file to append to, and keeps it from other programs that lock it while it is open.

    Raises UserError if one of them has it open.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"a run is going on in {path.parent}: choose another --out"
            raise UserError(message) from None
        except OSError:  # a file system without locks
            pass
    return file


def lock_run(parser: Parser, out: Path, resume: bool):
    """The folder of a recipe's run, made and locked as long as what is returned is open.

    Ends the program if there is no run to resume in it, or one that was not to be resumed.
    """
    begun = (out / "last.pt").exists()
    if resume and not begun:
        parser.error(f"{out} holds no run to resume")
    if begun and not resume:
        parser.error(f"{out} holds a run: add --resume, or choose another --out")
    return lock(out / "log.csv")


def report(path: Path, row: dict) -> None:
    """Prints a row of numbers by name, and appends it to a table."""
    words = []
    for name, value in row.items():
        words.append(f"{name} {value}" if isinstance(value, int) else f"{name} {value:.4g}")
    tqdm.write(" ".join(words))
    sys.stdout.flush()
    with writing(path), open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def save_tensors(content: dict, path) -> None:
    """Writes a dictionary of tensors, numbers and strings, whole or not. Raises UserError."""
    try:
        with whole_file(path) as partial:
            torch.save(content, partial)
    except RuntimeError as error:  # torch's own word for a full disk
        raise UserError(f"can't write {path} ({first_line(error)}): make room") from None


def load_tensors(path, device="cpu") -> dict:
    """Reads what `save_tensors` or torch.save wrote: tensors, numbers and strings, never code.

    Raises UserError for a file that is missing, damaged, or that would run code.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no file {path}: check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: give a file in it, such as best.pt") from None
    except Exception:  # torch.load raises half a dozen types on what is no file of tensors
        what = "is damaged, or holds other things than weights"
        raise UserError(f"{path} {what}: fetch or make it anew") from None


def download(url: str, path: Path) -> None:
    """Fetches `url` to `path`, whole or not at all. Raises UserError without a network."""
    try:
        with (
            urllib.request.urlopen(url, timeout=30) as response,
            whole_file(path) as partial,
            open(partial, "wb") as file,
            tqdm.wrapattr(file, "write", total=response.length, desc=path.name) as progress,
        ):
            shutil.copyfileobj(response, progress)
            if response.length:  # it counts down as the response is read
                raise UserError(f"{url} ended {response.length} bytes too early: try again")
    except (OSError, UserError) as error:  # no network; no room, or half a file
        raise UserError(f"can't fetch {url} to {path}: {error}; or put it there by hand") from None
