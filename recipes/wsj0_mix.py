"""Makes WSJ0-2mix and WSJ0-3mix from WSJ0 and the public lists, or a folder of training speakers.

    python -m recipes.wsj0_mix --wsj0 ROOT --lists DIR --out wsj0-mix --mode min max
    python -m recipes.wsj0_mix --wsj0 ROOT --speakers --out wsj0-speakers      to mix on the fly

ROOT holds WSJ0 at any depth, as it ships (NIST SPHERE, compressed by Shorten) or as WAV. The lists,
mix_2_spk_tr.txt and so on, give an utterance and its level in dB for each speaker. Out come
2speakers/wav8k/min/tr/{mix,s1,s2}/*.wav and the like: min is cut to the shortest utterance, max
padded to the longest. --speakers takes si_tr_s alone: the test mixtures are of other splits.

The mixtures follow create_wav_2speakers.m and create_wav_3speakers.m (Hershey et al., Deep
clustering, ICASSP 2016): the active level of VOICEBOX's activlev is that of the utterance at 8 kHz,
for 16 kHz too, above 200 Hz. Checked against published copies of the script and VOICEBOX of 2012;
not against the audio: Matlab resamples by a slightly different filter (pywsj0-mix, made like this,
agrees to 70 dB), and later VOICEBOX pads utterances.
"""

import io
import math
from pathlib import Path

import numpy as np
import soundfile as sf
from scipy.ndimage import maximum_filter1d
from scipy.signal import cheby2, lfilter, sosfilt
from tqdm import tqdm

from data import AUDIO_SUFFIXES, DataError, read_audio, resample
from program import Parser, new_folder, run_program

TRAINING = "si_tr_s"  # the split of the speakers to train on

# VOICEBOX's input filter: Chebyshev II, -0.25 dB at 200 Hz.
HIGH_PASS = cheby2(5, 50, 79.7, "highpass", output="sos", fs=8000)


# Mixtures -----------------------------------------------------------------------------------------


def make_wsj0_mix(wsj0, lists, out, sample_rates=(8000,), modes=("min",)) -> None:
    """Makes the mixtures of all lists, at each rate (8000, 16000 Hz), in each mode (min, max).

    Raises DataError for malformed lists and missing utterances, before anything is written, and for
    silent utterances.
    """
    paths = sorted(Path(lists).glob("mix_[23]_spk_[tc][rvt].txt"))
    tables = {path: read_mix_list(path) for path in paths}
    if not tables:
        raise DataError(f"{lists} holds no lists: give the folder with mix_2_spk_tr.txt and so on")
    found = {key_of(path): path for path in list_utterances(wsj0)}
    wanted = {name for table in tables.values() for names, _ in table for name in names}
    missing = sorted(name for name in wanted if key_of(name) not in found)
    if missing:
        counts = f"{len(missing)} of {len(wanted)} utterances in all"
        raise DataError(f"{missing[0]} is missing below {wsj0}, and {counts}")
    with new_folder(out) as root:
        for path, table in tables.items():
            n_speakers = n_speakers_of(path)
            split = path.stem[-2:]
            for names, levels in tqdm(table, desc=path.stem, unit="mixture"):
                utterances = []
                for name, level in zip(names, levels):
                    utterances.append(at_level(found[key_of(name)], level))
                file_name = mixture_name(names, levels)
                for rate in sample_rates:
                    for mode in modes:
                        signals = mix(utterances, rate, mode)
                        folder = (
                            root / f"{n_speakers}speakers" / f"wav{rate // 1000}k" / mode / split
                        )
                        write_mixture(folder, file_name, signals, rate)


def at_level(path: Path, level: float) -> tuple[np.ndarray, int]:
    """An utterance at an active level in dB: ([T], its rate). Raises DataError if silent."""
    audio, rate = read_utterance(path)
    filtered = sosfilt(HIGH_PASS, resample(audio, rate, 8000))
    active, _ = active_speech_level(filtered, 8000)
    if active == -math.inf:
        raise DataError(f"{path} is silent: replace it")
    return audio * 10 ** ((level - active) / 20), rate


def mix(utterances: list[tuple[np.ndarray, int]], rate: int, mode: str) -> np.ndarray:
    """The mixture and its sources [1 + S, T] as 16-bit integers, the loudest sample at 0.9."""
    signals = [resample(audio, from_rate, rate) for audio, from_rate in utterances]
    lengths = [len(signal) for signal in signals]
    length = min(lengths) if mode == "min" else max(lengths)
    sources = np.zeros((len(signals), length), np.float32)
    for source, signal in zip(sources, signals):
        part = signal[:length]
        source[: len(part)] = part
    parts = np.concatenate([sources.sum(0, keepdims=True), sources])
    return np.round(32768 * 0.9 * parts / np.abs(parts).max()).astype(np.int16)


def mixture_name(names: list[str], levels: list[float]) -> str:
    # Matlab's num2str, which gave the published files their names, shows five digits.
    parts = [f"{Path(name).stem}_{level:.5g}" for name, level in zip(names, levels)]
    return "_".join(parts) + ".wav"


def write_mixture(folder: Path, name: str, signals: np.ndarray, rate: int) -> None:
    for part, signal in zip(["mix", "s1", "s2", "s3"], signals):
        (folder / part).mkdir(parents=True, exist_ok=True)
        sf.write(folder / part / name, signal, rate, subtype="PCM_16")


def make_speaker_folders(wsj0, out) -> None:
    """Writes si_tr_s/40n/40na010x.wv1 as out/40n/40na010x.flac, unchanged.

    Other splits hold the speakers of validation and tests. Raises DataError for what can't be read.
    """
    paths = [p for p in list_utterances(wsj0) if key_of(p).startswith(f"{TRAINING}/")]
    if not paths:
        raise DataError(f"{wsj0} holds no recordings of {TRAINING}: give the folder with WSJ0")
    with new_folder(out) as root:
        for path in tqdm(paths, desc=f"writing {out}", unit="file"):
            audio, rate = read_utterance(path)
            speaker = path.parent.name.lower()
            target = root / speaker / f"{path.stem}.flac".lower()
            target.parent.mkdir(exist_ok=True)
            sf.write(target, audio, rate, subtype="PCM_16")


# The active level ---------------------------------------------------------------------------------


def active_speech_level(audio: np.ndarray, rate: int) -> tuple[float, float]:
    """Active speech level of [T] in dB and its activity factor, by ITU-T P.56, method B.

    0 dB is a mean square of 1. Time counts as active while an envelope (two exponential averages of
    30 ms in a row) is, or was less than 200 ms ago, above a threshold 15.9 dB below the very level
    of the active time. The factor, 0 to 1, is the mean power over that level. As in VOICEBOX's
    activlev, thresholds lie 3 dB apart, and what falls between them is interpolated linearly in dB.
    Nothing is filtered beforehand. Silence gives (-inf, 0).
    """
    audio = np.asarray(audio, np.float64)
    energy = np.sum(audio**2)
    if energy == 0:
        return -math.inf, 0.0
    pole = math.exp(-1 / (0.03 * rate))
    envelope = lfilter([(1 - pole) ** 2], [1, -2 * pole, pole**2], np.abs(audio))
    # The largest of now and of 200 ms before.
    window = math.ceil(0.2 * rate) + 1
    held = maximum_filter1d(envelope, window, mode="constant", origin=(window - 1) // 2)

    loudest = math.floor(2 * np.log2(held.max()))
    powers = 2.0 ** (loudest - np.arange(32))  # the thresholds, falling
    active = len(held) - np.searchsorted(np.sort(held), np.sqrt(powers))  # samples above each
    levels = 10 * np.log10(energy / active)
    margins = levels - 10 * np.log10(powers)  # of the level over the threshold, rising
    k = int(np.argmax(margins >= 15.9))
    around = slice(max(k - 1, 0), k + 1)  # a click may be that far above the first one already
    level = float(np.interp(15.9, margins[around], levels[around]))
    mean_power = energy / len(audio)
    return level, mean_power / 10 ** (level / 10)


# Files --------------------------------------------------------------------------------------------


def list_utterances(wsj0) -> list[Path]:
    if not Path(wsj0).is_dir():
        raise DataError(f"no folder {wsj0}: give the one with WSJ0")
    suffixes = AUDIO_SUFFIXES | {".wv1", ".sph"}
    return sorted(path for path in Path(wsj0).rglob("*") if path.suffix.lower() in suffixes)


def key_of(path) -> str:
    """What the lists and the discs agree on, as si_tr_s/40n/40na010x."""
    return "/".join(Path(path).with_suffix("").parts[-3:]).lower()


def n_speakers_of(path: Path) -> int:
    """Of a list called mix_2_spk_tr.txt."""
    return int(path.name[4])


def read_utterance(path: Path) -> tuple[np.ndarray, int]:
    """`read_audio`, also for NIST SPHERE files compressed by Shorten, which libsndfile can't read.

    Raises DataError.
    """
    import desphere  # here, since nothing but making WSJ0-2mix needs it

    try:
        content = path.read_bytes()
        compressed = content.startswith(b"NIST_1A") and b",embedded-" in content[:1024]
        if not compressed:
            return read_audio(path)
        wav = io.BytesIO(desphere.transcode_bytes(content))
        audio, rate = sf.read(wav, dtype="float32", always_2d=True)  # [T, channels]
    except (OSError, desphere.DesphereError) as error:
        raise DataError(f"can't read {path} as audio ({error}): check or remove it") from None
    return audio.mean(1), rate


def read_mix_list(path: Path) -> list[tuple[list[str], list[float]]]:
    """The lines of a list: (utterances, their levels in dB). Raises DataError."""
    n_speakers = n_speakers_of(path)
    table = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        words = line.split()
        try:
            levels = [float(word) for word in words[1::2]]
        except ValueError:
            levels = []
        if (
            len(words) != 2 * n_speakers
            or len(levels) != n_speakers
            or not np.isfinite(levels).all()
        ):
            expected = f"{n_speakers} times an utterance and its level in dB"
            raise DataError(f"{path}, line {number}, isn't {expected}: {line[:80]!r}")
        table.append((words[::2], levels))
    return table


def main() -> None:
    parser = Parser(description="Makes WSJ0-2mix and -3mix, or a folder of training speakers.")
    parser.add_argument(
        "--wsj0", required=True, help="folder with WSJ0, as wav or as on LDC's discs"
    )
    parser.add_argument("--lists", help="folder with the public lists, mix_2_spk_tr.txt and so on")
    parser.add_argument(
        "--speakers", action="store_true", help="write a folder per training speaker instead"
    )
    parser.add_argument("--out", required=True, help="new folder")
    parser.add_argument("--sample_rate", type=int, nargs="+", choices=(8000, 16000), default=[8000])
    parser.add_argument("--mode", nargs="+", choices=("min", "max"), default=["min"])
    args = parser.parse_args()
    if args.speakers == bool(args.lists):
        parser.error("give either --lists, to make their mixtures, or --speakers")
    if args.speakers:
        make_speaker_folders(args.wsj0, args.out)
    else:
        make_wsj0_mix(args.wsj0, args.lists, args.out, args.sample_rate, args.mode)


if __name__ == "__main__":
    run_program(main)
