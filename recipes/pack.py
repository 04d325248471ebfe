"""Packs minutes of each of some voices into a small folder: one-minute Ogg Vorbis at 8 kHz.

    python -m recipes.pack --speech speech/train --speakers june carlo --minutes 4 --out voices

Recordings of a voice are joined in a fixed random order, with short gaps. Vorbis is at its best, 39
kbit/s and 29 dB SI-SDR.
"""

from pathlib import Path

import numpy as np
import soundfile as sf
from tqdm import tqdm

from data import DataError, Recordings, list_speakers, read_audio, resample
from program import Parser, new_folder, number, run_program

RATE = 8000  # Hz
GAP = 1600  # samples between two recordings
BLOCK = 4096  # libsndfile's Vorbis encoder overflows its stack on long ones


def pack(speech, speakers: list[str], minutes: float, out) -> None:
    """Joins recordings of each voice until it has so many minutes.

    speakers: which voices; none: all. Raises DataError where a voice is missing.
    """
    voices = list_speakers(speech, Recordings())
    missing = set(speakers) - voices.keys()
    if missing:
        raise DataError(f"{speech} has no voice {min(missing)}: choose of {', '.join(voices)}")
    with new_folder(out) as folder:
        for voice in tqdm(speakers or list(voices), desc="packing", unit="voice"):
            (folder / voice).mkdir()
            audio = join_recordings(voices[voice], round(minutes * 60 * RATE))
            for k, start in enumerate(range(0, len(audio), 60 * RATE)):
                minute = audio[start : start + 60 * RATE]
                write_vorbis(folder / voice / f"{k:02d}.ogg", minute)


def join_recordings(paths: list[Path], length: int) -> np.ndarray:
    """[<= length]: recordings with short gaps between them, as many as there are and fit."""
    parts = []
    missing = length
    for index in np.random.default_rng(0).permutation(len(paths)):
        audio, rate = read_audio(paths[index])
        audio = resample(audio, rate, RATE)[:missing]
        parts += [audio, np.zeros(GAP, np.float32)]
        missing -= len(audio) + GAP
        if missing <= 0:
            break
    return np.concatenate(parts[:-1]).clip(-1, 1)


def write_vorbis(path: Path, audio: np.ndarray) -> None:
    with sf.SoundFile(path, "w", RATE, 1, subtype="VORBIS", compression_level=0.0) as file:
        for start in range(0, len(audio), BLOCK):
            file.write(audio[start : start + BLOCK])


def main() -> None:
    parser = Parser(description="Packs voices into a small folder.")
    parser.add_argument("--speech", required=True, help="folder with a folder per speaker")
    parser.add_argument("--speakers", nargs="+", default=[], help="which of them; all by default")
    parser.add_argument("--minutes", type=number(0.01), default=8.0, help="of each at most")
    parser.add_argument("--out", required=True, help="new folder")
    args = parser.parse_args()
    pack(args.speech, args.speakers, args.minutes, args.out)


if __name__ == "__main__":
    run_program(main)
