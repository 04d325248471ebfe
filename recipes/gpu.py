"""Half an hour on one GPU: a small codec, a Codecformer on its latents, and their scores.

    python -m recipes.pack --speech speech/all --minutes 8 --loss 0.7 --out voices          37 MB, to take along
    python -m recipes.gpu --data voices --valid libri/valid --minutes 30 --out runs/gpu
    python -m recipes.gpu --data voices --valid libri/valid --minutes 20 --codec lyra --out runs/gpu_lyra

`out` gets codec/ (see recipes/train_codec.py), embedding/ and waveform/ (of train.py: first the loss between latents,
then SI-SDR through the decoder) and results/. Every part is a command that is printed, runs by itself and leaves
checkpoints: what a lease's end cuts off goes on by hand, with --resume. Without a GPU all of it runs too, slowly.
"""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

from checkpoint import SettingsError, at_least, run_program
from dac_wrapper import ASSETS, CODECS
from data import Parser

SHARES = {"codec": 0.4, "embedding": 0.35, "waveform": 0.25}  # of the time


def call(*command, log: Path | None = None) -> None:
    """Runs a program of this repository, from its top, with its words in a log. Raises SettingsError if it fails."""
    print(">", "python", *command, flush=True)
    with open(log, "a") if log else contextlib.nullcontext() as file:
        words = [sys.executable, *map(str, command)]
        if status := subprocess.run(words, stdout=file, stderr=file).returncode:
            said = log.read_text().strip() if log else "see above"
            why = (re.findall("error: (.*)", said) or [said])[-1].splitlines()[-1]  # a progress bar may come after it
            raise SettingsError(f"{' '.join(words[1:3])} ended with status {status}: {why}" + f" ({log})" * bool(log))


def run(data, valid, minutes: float, codec: str | None, score, out: Path) -> None:
    shares = {part: share for part, share in SHARES.items() if part != "codec" or not codec}
    minutes = {part: f"{minutes * share / sum(shares.values()):.2f}" for part, share in shares.items()}
    # Each process of each training would decode them anew.
    call("-m", "recipes.pack", "--speech", data, "--minutes", 1000, "--wav", "--out", out / "voices")
    voices = ["--data", out / "voices", "--valid", valid]
    if not codec:
        flags = ["--minutes", minutes["codec"], "--every", 2, "--batch_size", 64, "--workers", 6]
        call("-m", "recipes.train_codec", *voices, *flags, "--out", out / "codec")
        codec = out / "codec" / "codec.pth"
    common = ["train.py", "@config/gpu.txt", *voices, "--codec", codec, "--epochs", 10**4]
    call(*common, "--minutes", minutes["embedding"], "--out", out / "embedding")
    start, finish = ["--init", out / "embedding" / "best.pt"], ["--loss", "si_sdr", "--loss_seconds", 1, "--lr", 4e-4]
    call(*common, *start, *finish, "--minutes", minutes["waveform"], "--out", out / "waveform")
    call("evaluate.py", "--ckpt", out / "waveform" / "best.pt", "--data", score, "--out", out / "results")


def main() -> None:
    parser = Parser(description="Trains a small codec and a Codecformer on it, and scores them.")
    parser.add_argument("--data", required=True, help="folder with one folder per speaker, as recipes.pack writes it")
    parser.add_argument("--valid", required=True, help="folder of other speakers")
    parser.add_argument("--minutes", type=at_least(0.1, float), default=30.0, help="of training")
    parser.add_argument("--codec", help=f"train none, use this: {', '.join(CODECS)} or a weights file")
    parser.add_argument("--score", default=str(ASSETS / "test_mixtures"), help="fixed set to score it on")
    parser.add_argument("--out", type=Path, required=True)
    run(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_program(main)
