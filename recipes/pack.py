"""Packs minutes of each of some voices into a small folder: one-minute files at 8 kHz, a folder a voice.

    python -m recipes.pack --speech speech/all --minutes 8 --loss 0.7 --out voices     37 MB of Vorbis, to take along
    python -m recipes.pack --speech voices --wav --out decoded                         there, for fast reading
"""

import numpy as np
import soundfile as sf
from tqdm import tqdm

from checkpoint import at_least, run_program
from data import DataError, Parser, list_speakers, read_audio, resample
from recipes.mix import new_folder

RATE = 8000  # Hz
GAP = 1600  # samples between two recordings
BLOCK = 4096  # libsndfile's Vorbis encoder overflows its stack on long ones


def pack(speech, speakers: list[str], minutes: float, loss: float, wav: bool, out) -> None:
    """Joins recordings of each voice, in a fixed random order, until it has so many minutes.

    loss: of the Vorbis encoder, from 0 (39 kbit/s) to 1. Raises DataError where a voice is missing.
    """
    voices, length = list_speakers(speech), round(minutes * 60 * RATE)
    if missing := set(speakers) - voices.keys():
        raise DataError(f"{speech} has no voice {min(missing)}: choose of {', '.join(voices)}")
    with new_folder(out) as folder:
        for voice in tqdm(speakers or list(voices), desc="packing", unit="voice"):
            parts, missing = [], length
            for index in np.random.default_rng(0).permutation(len(voices[voice])):
                audio, rate = read_audio(voices[voice][index])
                parts += [resample(audio, rate, RATE)[:missing], np.zeros(GAP, np.float32)]
                missing -= len(parts[-2]) + GAP
                if missing <= 0:
                    break
            (folder / voice).mkdir()
            audio = np.concatenate(parts[:-1]).clip(-1, 1)
            for k, part in enumerate(np.split(audio, range(60 * RATE, len(audio), 60 * RATE))):
                path = folder / voice / f"{k:02d}.{'wav' if wav else 'ogg'}"
                coding = {"subtype": "PCM_16"} if wav else {"subtype": "VORBIS", "compression_level": loss}
                with sf.SoundFile(path, "w", RATE, 1, **coding) as file:
                    for start in range(0, len(part), BLOCK):
                        file.write(part[start : start + BLOCK])


def main() -> None:
    parser = Parser(description="Packs voices into a small folder.")
    parser.add_argument("--speech", required=True, help="folder with one folder per speaker")
    parser.add_argument("--speakers", nargs="+", default=[], help="which of them; all by default")
    parser.add_argument("--minutes", type=at_least(0.01, float), default=8.0, help="of each at most")
    parser.add_argument("--loss", type=at_least(0, float, 1), default=0.0, help="0: 39 kbit/s, 29 dB SI-SDR; 1: worst")
    parser.add_argument("--wav", action="store_true", help="write 16-bit WAV")
    parser.add_argument("--out", required=True)
    pack(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_program(main)
