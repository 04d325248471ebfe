"""Builds OUT/<language>_<speaker>/*.flac, voices to train on, from Mozilla Common Voice.

    python -m recipes.common_voice --corpus cv-corpus/de cv-corpus/ta --out voices

A corpus is the folder of a language as it is downloaded (commonvoice.mozilla.org, CC0): its
validated.tsv says who spoke which of its clips. Speakers are drawn at random, of each as many clips
as make --seconds. Silence at both ends of a clip is cut, and noisy ones are left out. Clips are
MP3: train with them, don't score on them. Clips that can't be read are named and passed over.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import soundfile as sf
from tqdm import tqdm

from data import DataError, read_audio, resample
from program import Parser, new_folder, number, run_program, whole
from recipes.debian_speech import SHORTEST, trim_silence

QUIETEST = 25.0  # dB between loud and quiet frames; in a clip with less of it there is noise
NAME_LENGTH = 12  # letters of a client_id that name its speaker


def build(
    corpora: list, out, n_speakers: int, seconds: float, sample_rate: int = 8000, seed: int = 0
) -> int:
    """Converts clips of at most `n_speakers` of each language. Returns how many speakers it wrote.

    seconds: of each speaker; the clip that reaches them is the last. Raises DataError where a
    corpus lacks its table or clips, or none of them will do.
    """
    tables = {Path(corpus): read_table(Path(corpus)) for corpus in corpora}
    rng = np.random.default_rng(seed)
    with new_folder(out) as folder:
        for corpus, speakers in tables.items():
            drawn = rng.permutation(sorted(speakers))[:n_speakers]
            for speaker in tqdm(drawn, desc=f"converting {corpus.name}", unit="speaker"):
                target = folder / f"{corpus.name}_{speaker[:NAME_LENGTH]}"
                write_clips(corpus, speakers[speaker], target, seconds, sample_rate)
        count = len(list(folder.iterdir()))
        if not count:
            raise DataError("no clip of these corpora is long and clean enough: give others")
        return count


def read_table(corpus: Path) -> dict[str, list[str]]:
    """{client_id: names of clips} of validated.tsv. Raises DataError."""
    path = corpus / "validated.tsv"
    if not path.is_file():
        raise DataError(f"no file {path}: give the folder of a language of Common Voice")
    speakers = {}
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        # A row that was cut off names no clip: what then can't be read is said.
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE, restval="")
        if not {"client_id", "path"} <= set(reader.fieldnames or ()):
            raise DataError(f"{path} has no columns client_id and path: it isn't Common Voice's")
        for row in reader:
            speakers.setdefault(row["client_id"], []).append(row["path"])
    return speakers


def write_clips(corpus: Path, names: list[str], target: Path, seconds: float, rate: int) -> None:
    """A speaker's clips into the folder `target`, which is made if any of them is fit."""
    written = 0  # samples
    for name in names:
        try:
            audio, clip_rate = read_audio(corpus / "clips" / name)
        except DataError as error:
            tqdm.write(f"passed over: {error}", file=sys.stderr)
            continue
        audio = trim_silence(resample(audio, clip_rate, rate), rate)
        if len(audio) < SHORTEST * rate or is_noisy(audio, rate):
            continue
        target.mkdir(exist_ok=True)
        path = target / f"{Path(name).stem}.flac"
        sf.write(path, audio.clip(-1, 1), rate, subtype="PCM_16")
        written += len(audio)
        if written >= seconds * rate:
            return


def is_noisy(audio: np.ndarray, rate: int) -> bool:
    """Whether quiet frames of 20 ms (10th percentile) are too close to loud ones (95th); [T]."""
    frame = rate // 50
    frames = audio[: len(audio) // frame * frame].reshape(-1, frame)
    levels = 10 * np.log10(np.square(frames).mean(1) + 1e-12)  # dB
    quiet, loud = np.percentile(levels, (10, 95))
    return loud - quiet < QUIETEST


def main() -> None:
    parser = Parser(description="Builds a folder of speakers from Common Voice.")
    parser.add_argument("--corpus", nargs="+", required=True, help="folders of languages")
    parser.add_argument("--speakers", type=whole(1), default=100, help="of a language, at most")
    parser.add_argument("--seconds", type=number(0.1), default=15.0, help="of each speaker")
    parser.add_argument("--out", required=True, help="new folder")
    parser.add_argument("--sample_rate", type=whole(1000, 192000), default=8000, help="Hz")
    args = parser.parse_args()
    count = build(args.corpus, args.out, args.speakers, args.seconds, args.sample_rate)
    print(f"{args.out}: {count} speakers")


if __name__ == "__main__":
    run_program(main)
