"""Builds OUT/{train,valid,test}/<speaker>/*.flac from LibriSpeech, 20 speakers set apart for valid and test each.

    python -m recipes.librispeech --librispeech LibriSpeech/train-clean-100 --out libri

The folder is searched for SPEAKER-CHAPTER-UTTERANCE.flac at any depth, so that LibriSpeech as it is downloaded
(openslr.org/12, CC BY 4.0) and a flat folder of some of its utterances both do.
"""

import re

import soundfile as sf
from tqdm import tqdm

from checkpoint import at_least, run_program
from data import DataError, Parser, list_audio, read_audio, resample
from recipes.mix import new_folder

# Of train-clean-100, ten low and ten high voices each: drawn with numpy's default_rng(0) from those whose median
# pitch, by autocorrelation of one utterance, lies below 145 Hz or above 175 Hz (104 and 118 of 251 speakers).
VALID = "89 196 328 458 696 831 887 1363 1970 2384 2514 3374 3982 5789 6181 7067 7190 8238 8425 8580".split()
TEST = "254 307 311 332 412 1447 2182 2289 3983 4051 4267 4340 5104 5390 5393 5652 6818 7059 8468 8747".split()


def build(librispeech, out, sample_rate: int = 8000) -> dict[str, int]:
    """Converts every utterance to `sample_rate`; the number of speakers in each split. Raises DataError."""
    paths = [p for p in list_audio(librispeech) if re.fullmatch(r"\d+-\d+-\d+", p.stem)]
    missing = {*VALID, *TEST} - {p.stem.split("-")[0] for p in paths}
    if missing:
        raise DataError(
            f"{librispeech} lacks {len(missing)} of the 40 speakers set apart, {min(missing, key=int)} the first: "
            f"give LibriSpeech's train-clean-100"
        )
    with new_folder(out) as folder:
        for path in tqdm(paths, desc=f"converting to {sample_rate} Hz", unit="file"):
            speaker = path.stem.split("-")[0]
            split = "valid" if speaker in VALID else "test" if speaker in TEST else "train"
            audio, rate = read_audio(path)
            target = folder / split / speaker / f"{path.stem}.flac"
            target.parent.mkdir(parents=True, exist_ok=True)
            sf.write(target, resample(audio, rate, sample_rate).clip(-1, 1), sample_rate, subtype="PCM_16")
        return {split.name: len(list(split.iterdir())) for split in folder.iterdir()}


def main() -> None:
    parser = Parser(description="Builds folders of training, validation and test speakers from LibriSpeech.")
    parser.add_argument("--librispeech", required=True, help="train-clean-100, or a folder of some of its utterances")
    parser.add_argument("--out", required=True)
    parser.add_argument("--sample_rate", type=at_least(1000), default=8000, help="Hz")
    args = parser.parse_args()
    counts = build(args.librispeech, args.out, args.sample_rate)
    print(f"{args.out}: speakers", ", ".join(f"{name} {counts.get(name, 0)}" for name in ("train", "valid", "test")))


if __name__ == "__main__":
    run_program(main)
