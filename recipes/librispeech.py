"""Builds OUT/{train,valid,test}/<speaker>/*.flac from LibriSpeech.

    python -m recipes.librispeech --librispeech LibriSpeech/train-clean-100 --out libri

Twenty speakers each are set apart for validation and tests, all others are for training. The folder
is searched for SPEAKER-CHAPTER-UTTERANCE.flac at any depth, so that LibriSpeech as it is downloaded
(openslr.org/12, CC BY 4.0) and a flat folder of some of its utterances both do. Utterances that
can't be read are named and passed over.
"""

import re
import sys

import soundfile as sf
from tqdm import tqdm

from data import DataError, list_audio, read_audio, resample
from program import Parser, new_folder, run_program, whole

# Of train-clean-100, ten low and ten high voices each: drawn with numpy's default_rng(0) from those
# whose median pitch, by autocorrelation of one utterance, lies below 145 Hz or above 175 Hz (104
# and 118 of 251 speakers).
VALID = (
    "89 196 328 458 696 831 887 1363 1970 2384 2514 3374 3982 5789 6181 7067 7190 8238 8425 8580"
).split()
TEST = (
    "254 307 311 332 412 1447 2182 2289 3983 4051 4267 4340 5104 5390 5393 5652 6818 7059 8468 8747"
).split()


def build(librispeech, out, sample_rate: int = 8000) -> dict[str, int]:
    """Converts every utterance to `sample_rate`. Returns the number of speakers in each split.

    Raises DataError where a speaker that is set apart is missing.
    """
    paths = [p for p in list_audio(librispeech) if re.fullmatch(r"\d+-\d+-\d+", p.stem)]
    missing = {*VALID, *TEST} - {speaker_of(path) for path in paths}
    if missing:
        first = min(missing, key=int)
        raise DataError(
            f"{librispeech} lacks {len(missing)} of the 40 speakers set apart, {first} the first: "
            f"give LibriSpeech's train-clean-100"
        )
    with new_folder(out) as folder:
        for path in tqdm(paths, desc=f"converting to {sample_rate} Hz", unit="file"):
            speaker = speaker_of(path)
            try:
                audio, rate = read_audio(path)
            except DataError as error:
                tqdm.write(f"passed over: {error}", file=sys.stderr)
                continue
            audio = resample(audio, rate, sample_rate).clip(-1, 1)
            target = folder / split_of(speaker) / speaker / f"{path.stem}.flac"
            target.parent.mkdir(parents=True, exist_ok=True)
            sf.write(target, audio, sample_rate, subtype="PCM_16")
        return {split.name: len(list(split.iterdir())) for split in folder.iterdir()}


def speaker_of(path) -> str:
    return path.stem.split("-")[0]


def split_of(speaker: str) -> str:
    if speaker in VALID:
        return "valid"
    if speaker in TEST:
        return "test"
    return "train"


def main() -> None:
    parser = Parser(description="Builds folders of speakers from LibriSpeech.")
    parser.add_argument(
        "--librispeech",
        required=True,
        help="train-clean-100, or a folder of utterances of all its speakers",
    )
    parser.add_argument("--out", required=True, help="new folder")
    parser.add_argument("--sample_rate", type=whole(1000, 192000), default=8000, help="Hz")
    args = parser.parse_args()
    counts = build(args.librispeech, args.out, args.sample_rate)
    splits = [f"{split} {counts.get(split, 0)}" for split in ("train", "valid", "test")]
    print(f"{args.out}: speakers", ", ".join(splits))


if __name__ == "__main__":
    run_program(main)
