"""Draws the README's picture: spectrograms of a mixture and of what the separator makes of it.

python -m recipes.picture --out assets/separation.jpg
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from checkpoint import load_separator
from codecformer import separate
from data import FixedMixtures
from program import (
    ASSETS,
    Parser,
    UserError,
    choose_device,
    first_line,
    locate,
    portable,
    run_program,
    whole,
    writing,
)


def draw(signals: dict[str, np.ndarray], rate: int, out) -> None:
    """Writes spectrograms of signals [T] side by side, by their titles. Raises UserError."""
    figure = Figure(figsize=(9, 2.2), layout="constrained")
    loudest = max(np.abs(signal).max() for signal in signals.values())
    for k, (title, signal) in enumerate(signals.items()):
        axes = figure.add_subplot(1, len(signals), k + 1)
        noise_floor = 1e-6 * np.random.default_rng(0).standard_normal(len(signal))
        axes.specgram(
            signal / loudest + noise_floor,
            NFFT=256,
            Fs=rate / 1000,
            noverlap=192,
            vmin=-95,
            vmax=-15,
            cmap="magma",
        )
        axes.set_title(title, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([0, rate / 2000])
        axes.tick_params(labelsize=7)
    figure.axes[0].set_ylabel("kHz", fontsize=8)
    try:
        with writing(out):
            figure.savefig(out, dpi=80)
    except ValueError as error:  # of its ending
        raise UserError(f"can't draw {out} ({first_line(error)}): give a .png") from None


def main() -> None:
    parser = Parser(description="Draws spectrograms of a mixture and its estimates.")
    parser.add_argument("--ckpt", default=portable(ASSETS / "separator.pt"), help="of train.py")
    parser.add_argument("--data", default="assets/test_mixtures", help="set with mix, s1, s2")
    parser.add_argument("--index", type=whole(0), default=0, help="which of its mixtures")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    args = parser.parse_args()
    model, codec, checkpoint = load_separator(locate(args.ckpt), choose_device())
    rvq = (checkpoint["quantize_before"], checkpoint["quantize_after"])
    n_speakers = model.config.n_speakers
    mixtures = FixedMixtures(locate(args.data), codec.sample_rate, n_speakers)
    if args.index >= len(mixtures):
        raise UserError(f"--index is 0 to {len(mixtures) - 1}, not {args.index}")
    item = mixtures[args.index]
    mixture = torch.from_numpy(item["mixture"])[None].to(codec.device)
    with torch.no_grad():
        estimates = separate(model, codec, mixture, *rvq)[0].cpu().numpy()
    signals = {f"{n_speakers} people at once": item["mixture"]}
    for k, estimate in enumerate(estimates, 1):
        signals[f"speaker {k}, as separated"] = estimate
    draw(signals, codec.sample_rate, args.out)


if __name__ == "__main__":
    run_program(main)
