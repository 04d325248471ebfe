"""Writes a fixed set of mixtures from a folder of speakers.

    python -m recipes.mix --speech DIR --out set --n 3000 --n_speakers 3 --noise DIR
"""

import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile as sf
from tqdm import tqdm

from checkpoint import at_least, make_folder, run_program
from data import DataError, Parser, SpeakerMixtures


@contextmanager
def new_folder(out):
    """Context: a temporary folder beside `out` that takes its name only if all went well. Raises DataError."""
    out = Path(out)
    if out.exists():
        raise DataError(f"{out} exists already: remove it or choose another --out")
    try:
        make_folder(out.parent)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
            folder = Path(temporary) / out.name
            folder.mkdir()
            yield folder
            folder.rename(out)
    except (OSError, sf.LibsndfileError) as error:
        raise DataError(f"can't write {out} ({error}): make room, or choose another --out") from None


def write_fixed_set(mixtures, out) -> None:
    """Writes a dataset as a fixed set of 16-bit FLAC, the mixture exactly the sum of its rounded parts.

    Folders: mix_clean, s1, s2 ..., or with noise mix_both, s1, s2 ..., noise.
    Raises DataError if `out` exists already or can't be written; a half-written set never bears that name.
    """
    with new_folder(out) as folder:
        names = ["mix_both" if mixtures.noise else "mix_clean"] + [f"s{k + 1}" for k in range(mixtures.n_speakers)]
        names += ["noise"] if mixtures.noise else []
        for name in names:
            (folder / name).mkdir()
        for index in tqdm(range(len(mixtures)), desc=f"writing {out}", unit="mixture"):
            item = mixtures[index]
            parts = [*item["sources"], item["mixture"] - item["sources"].sum(0)][: len(names) - 1]
            parts = np.round(np.stack(parts) * 32768).astype(np.int16)  # peaks lie at 0.9
            for name, signal in zip(names, [parts.sum(0).astype(np.int16), *parts]):
                path = folder / name / f"{index:04d}_{item['name']}.flac"
                sf.write(path, signal, mixtures.sample_rate, subtype="PCM_16")


def main() -> None:
    parser = Parser(description="Writes a fixed set of mixtures.")
    parser.add_argument("--speech", required=True, help="folder with one folder per speaker")
    parser.add_argument("--out", required=True)
    parser.add_argument("--n", type=at_least(1), default=48, help="number of mixtures")
    parser.add_argument("--seconds", type=at_least(0.1, float), default=4.0)
    parser.add_argument("--n_speakers", type=int, default=2, help="2 to 5")
    parser.add_argument("--noise", help="folder of recordings to add as noise")
    parser.add_argument("--snr", type=float, nargs=2, metavar=("LOW", "HIGH"), help="range in dB, speech over noise")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--sample_rate", type=at_least(1000), default=8000)
    args = parser.parse_args()
    settings = (args.sample_rate, args.seconds, args.n, args.seed, args.n_speakers)
    mixtures = SpeakerMixtures(args.speech, *settings, noise=args.noise, snr=args.snr)
    write_fixed_set(mixtures, args.out)


if __name__ == "__main__":
    run_program(main)
