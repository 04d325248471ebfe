"""Draws a run's training loss and validation SI-SDRi: train.py after every epoch, or of several runs in one picture.

    python -m recipes.curves runs/a runs/b --out curves.png
"""

import warnings
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from checkpoint import SettingsError, run_program
from data import Parser


def draw(folders: dict, out) -> None:
    """Reads steps.csv and log.csv of folders by their labels. Raises SettingsError where that or drawing fails."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    trained = []  # validation after the first epoch and later
    try:
        warnings.filterwarnings("ignore", "genfromtxt: Empty input")  # before the first update
        for label, folder in folders.items():
            steps, epochs = (
                np.genfromtxt(Path(folder) / name, delimiter=",", names=True, ndmin=1)
                for name in ("steps.csv", "log.csv")
            )
            if steps.size:
                window = max(len(steps) // 100, 1)  # a mean over as many updates makes a curve of the scatter
                smooth = np.convolve(steps["loss"], np.ones(window) / window, "valid")
                left.plot(steps["step"][window - 1 :], smooth, linewidth=1)
            right.plot(epochs["seconds"] / 3600, epochs["valid_si_sdr_i"], "o-", label=label)
            trained += [value for value in epochs["valid_si_sdr_i"][1:] if np.isfinite(value)]
        left.set(xlabel="update", ylabel="training loss, each run's own, dB")
        right.set(xlabel="hours", ylabel="validation SI-SDRi, dB")
        right.legend()
        if trained:
            right.set_ylim(bottom=min(trained) - 0.5)  # an untrained separator's -15 dB would squeeze the rest
        figure.savefig(out, dpi=80)
    except (OSError, ValueError) as error:
        raise SettingsError(f"can't draw {out} of {folder} ({error}): give folders of train.py, a .png") from None


def main() -> None:
    parser = Parser(description="Draws the curves of runs.")
    parser.add_argument("runs", nargs="+", help="folders of train.py")
    parser.add_argument("--out", default="curves.png", help="picture to write")
    args = parser.parse_args()
    draw({run: run for run in args.runs}, args.out)


if __name__ == "__main__":
    run_program(main)
