"""Draws the training loss and the validation SI-SDRi of runs in one picture.

    python -m recipes.curves runs/a runs/b --out curves.png

Runs are folders of train.py or recipes.train_on_latents. One may still be going on: its rows so far
are drawn. Losses are smoothed by a mean over a hundredth of the run, and compare only where they
are of one kind.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from program import Parser, UserError, run_program
from train import read_rows


def draw(folders: dict, out) -> None:
    """Draws the logs of runs into a picture.

    folders: {label: folder of a run}. Raises UserError where a run can't be read or drawn.
    """
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    later_gains = []  # validations after the first of each run
    try:
        for label, folder in folders.items():
            epochs = read_table(Path(folder, "log.csv"))
            steps = epochs  # where nothing is logged between validations
            path = Path(folder, "steps.csv")
            if path.exists():
                steps = read_table(path)
            n_steps = len(steps["step"])
            if n_steps:
                window = max(n_steps // 100, 1)
                smooth = np.convolve(steps["loss"], np.ones(window) / window, "valid")
                left.plot(steps["step"][window - 1 :], smooth, linewidth=1)
            gains = epochs["valid_si_sdr_i"]
            right.plot(epochs["seconds"] / 3600, gains, "o-", label=label)
            later_gains += [gain for gain in gains[1:] if np.isfinite(gain)]
        left.set(xlabel="update", ylabel="training loss, each run's own, dB")
        right.set(xlabel="hours", ylabel="validation SI-SDRi, dB")
        right.legend()
        if later_gains:
            # Where a run begins, at -15 dB perhaps, would squeeze all the rest.
            right.set_ylim(bottom=min(later_gains) - 0.5)
        figure.savefig(out, dpi=80)
    except (OSError, ValueError, KeyError) as error:
        runs = ", ".join(map(str, folders.values()))
        raise UserError(
            f"can't draw {out} of {runs} ({error}): give folders of runs, a .png"
        ) from None


def read_table(path: Path) -> dict[str, np.ndarray]:
    """The columns of a log. Raises UserError if the run has no such file."""
    if not path.exists():
        raise UserError(f"no file {path}: give folders of runs")
    with open(path, errors="replace") as file:
        header = file.readline().strip().split(",")
    values = np.array(read_rows(path, header), dtype=float).reshape(-1, len(header))
    return dict(zip(header, values.T))


def main() -> None:
    parser = Parser(description="Draws the curves of runs.")
    parser.add_argument("runs", nargs="+", help="their folders")
    parser.add_argument("--out", default="curves.png", help="picture to write")
    args = parser.parse_args()
    draw({run: run for run in args.runs}, args.out)


if __name__ == "__main__":
    run_program(main)
