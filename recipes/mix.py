"""Writes a fixed set of mixtures, drawn from a folder of speakers.

    python -m recipes.mix --speech DIR --out set --n 3000 --n_speakers 3 --noise DIR

Folders of 16-bit FLAC: mix_clean, s1, s2 ..., or with noise mix_both, s1, s2 ..., noise. The
mixture is the sum of its parts as they were rounded, so that it holds exactly.
"""

from pathlib import Path

import numpy as np
import soundfile as sf
from tqdm import tqdm

from data import SpeakerMixtures
from program import Parser, new_folder, number, run_program, whole


def write_fixed_set(mixtures: SpeakerMixtures, out) -> None:
    """Writes a dataset to a new folder, whole or not at all. Raises UserError."""
    folders = ["mix_both" if mixtures.noise else "mix_clean"]
    folders += [f"s{k + 1}" for k in range(mixtures.n_speakers)]
    if mixtures.noise:
        folders.append("noise")
    with new_folder(out) as root:
        for folder in folders:
            (root / folder).mkdir()
        for index in tqdm(range(len(mixtures)), desc=f"writing {out}", unit="mixture"):
            item = mixtures[index]
            parts = list(item["sources"])
            if mixtures.noise:
                parts.append(item["mixture"] - item["sources"].sum(0))
            # Peaks lie at 0.9, so that neither parts nor their sum leave 16 bits.
            parts = np.round(np.stack(parts) * 32768).astype(np.int16)
            mixture = parts.sum(0).astype(np.int16)
            for folder, signal in zip(folders, [mixture, *parts]):
                path = root / folder / f"{item['name']}.flac"
                sf.write(path, signal, mixtures.sample_rate, subtype="PCM_16")


def main() -> None:
    parser = Parser(description="Writes a fixed set of mixtures.")
    parser.add_argument("--speech", required=True, help="folder with a folder per speaker")
    parser.add_argument("--out", required=True, help="new folder")
    parser.add_argument("--n", type=whole(1), default=48, help="number of mixtures")
    parser.add_argument("--seconds", type=number(0.1, 600), default=4.0, help="of each")
    parser.add_argument("--n_speakers", type=whole(2, 5), default=2, help="2 to 5")
    parser.add_argument("--noise", help="folder of recordings to add as noise")
    parser.add_argument(
        "--snr",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="range in dB, all speech over noise",
    )
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    parser.add_argument("--sample_rate", type=whole(1000, 192000), default=8000, help="Hz")
    args = parser.parse_args()
    if Path(args.speech).resolve() in Path(args.out).resolve().parents:
        parser.error(f"--out {args.out} would become a speaker of --speech: choose another")
    mixtures = SpeakerMixtures(
        args.speech,
        args.sample_rate,
        args.n_speakers,
        seconds=args.seconds,
        size=args.n,
        seed=args.seed,
        noise=args.noise,
        snr=args.snr,
    )
    write_fixed_set(mixtures, args.out)


if __name__ == "__main__":
    run_program(main)
