"""Makes WSJ0-2mix and WSJ0-3mix from WSJ0, as it ships (NIST SPHERE, Shorten) or as WAV, and the public lists.

    python -m recipes.wsj0_mix --wsj0 ROOT --lists DIR --out wsj0-mix --sample_rate 8000 16000 --mode min max
    python -m recipes.wsj0_mix --wsj0 ROOT --speakers --out wsj0-speakers      a folder per speaker, to mix on the fly

The lists, mix_2_spk_tr.txt and so on, give an utterance and its level in dB for each speaker.
"""

import io
import itertools
import math
from pathlib import Path

import numpy as np
import soundfile as sf
from scipy.ndimage import maximum_filter1d
from scipy.signal import cheby2, lfilter, sosfilt
from tqdm import tqdm

from checkpoint import run_program
from data import AUDIO_SUFFIXES, DataError, Parser, read_audio, resample
from recipes.mix import new_folder


def active_speech_level(audio: np.ndarray, rate: int) -> tuple[float, float]:
    """Active speech level of [T] in dB, 0 dB being a mean square of 1, and activity factor, by ITU-T P.56, method B.

    Time counts as active while an envelope (two exponential averages of 30 ms in a row) is, or was less than 200 ms
    ago, above a threshold 15.9 dB below the very level of the active time. The factor, 0..1, is the mean power over
    that level. As in VOICEBOX's activlev, thresholds lie 3 dB apart and what falls between
    them is interpolated linearly in dB. Nothing is filtered beforehand. Silence gives (-inf, 0).
    """
    audio = np.asarray(audio, np.float64)
    energy = np.sum(audio**2)
    if energy == 0:
        return -math.inf, 0.0
    pole = math.exp(-1 / (0.03 * rate))
    envelope = lfilter([(1 - pole) ** 2], [1, -2 * pole, pole**2], np.abs(audio))
    window = math.ceil(0.2 * rate) + 1
    held = maximum_filter1d(envelope, window, mode="constant", origin=(window - 1) // 2)  # of now and 200 ms before
    powers = 2.0 ** (math.floor(2 * np.log2(held.max())) - np.arange(32))
    active = len(held) - np.searchsorted(np.sort(held), np.sqrt(powers))
    levels = 10 * np.log10(energy / active)
    margins = levels - 10 * np.log10(powers)
    k = int(np.argmax(margins >= 15.9))
    around = slice(max(k - 1, 0), k + 1)  # a click may be that far above the first threshold already
    level = float(np.interp(15.9, margins[around], levels[around]))
    return level, energy / len(audio) / 10 ** (level / 10)


def read_utterance(path) -> tuple[np.ndarray, int]:
    """`read_audio`, also for NIST SPHERE files compressed by Shorten, which libsndfile can't read. Raises DataError."""
    import desphere  # here, since nothing but making WSJ0-2mix needs it

    try:
        blob = path.read_bytes()
        if not blob.startswith(b"NIST_1A") or b",embedded-" not in blob[:1024]:
            return read_audio(path)
        audio, rate = sf.read(io.BytesIO(desphere.transcode_bytes(blob)), dtype="float32", always_2d=True)
    except (OSError, desphere.DesphereError) as error:
        raise DataError(f"can't read {path} as audio ({error}): check or remove it") from None
    return audio.mean(1), rate


def list_utterances(wsj0) -> list[Path]:
    return sorted(p for p in Path(wsj0).rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES | {".wv1", ".sph"})


def read_mix_list(path) -> list[tuple[list[str], list[float]]]:
    """The lines of a mix_2_spk_tr.txt: (utterances, their levels in dB). Raises DataError naming a malformed line."""
    n, lines = int(path.name[4]), []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        fields = line.split()
        try:
            utterances, levels = fields[::2], [float(x) for x in fields[1::2]]
        except ValueError:
            levels = []
        if len(fields) != 2 * n or not np.isfinite(levels).all() or len(levels) != n:
            raise DataError(f"{path}, line {number}, isn't {n} times an utterance and its level in dB: {line[:80]!r}")
        lines.append((utterances, levels))
    return lines


def make_wsj0_mix(wsj0, lists, out, sample_rates=(8000,), modes=("min",)) -> None:
    """Makes WSJ0-2mix and -3mix as create_wav_{2,3}speakers.m do (Hershey et al., "Deep clustering", ICASSP 2016).

    wsj0: folder holding WSJ0 as wav or as on LDC's discs (wv1), at any depth; lists: folder with mix_2_spk_tr.txt etc.
    Writes out/2speakers/wav8k/min/tr/{mix,s1,s2}/*.wav for every list, rate (8000, 16000 Hz) and mode (min: cut to
    the shortest utterance, max: padded to the longest).

    The active level of the recipe's VOICEBOX function is that of the utterance at 8 kHz, for 16 kHz too, above 200 Hz.
    Checked against published copies of the script and VOICEBOX of 2012. Not against the audio: Matlab resamples by a
    slightly different filter (pywsj0-mix, made like this, agrees to 70 dB), and later VOICEBOX pads utterances.
    Raises DataError for malformed lists, missing utterances (before anything is written) and silent ones.
    """
    tables = {path: read_mix_list(path) for path in sorted(Path(lists).glob("mix_[23]_spk_[tc][rvt].txt"))}
    if not tables:
        raise DataError(f"{lists} holds no lists: give the folder with mix_2_spk_tr.txt and the others")
    paths = list_utterances(wsj0)

    def key(path) -> str:  # si_tr_s/40n/40na010x
        return "/".join(Path(path).with_suffix("").parts[-3:]).lower()

    found = {key(path): path for path in paths}
    wanted = {name for table in tables.values() for names, _ in table for name in names}
    if missing := sorted(name for name in wanted if key(name) not in found):
        raise DataError(f"{missing[0]} is missing below {wsj0}, and {len(missing)} of {len(wanted)} utterances in all")
    # VOICEBOX's input filter: Chebyshev II, -0.25 dB at 200 Hz.
    high_pass = cheby2(5, 50, 79.7, "highpass", output="sos", fs=8000)
    with new_folder(out) as folder:
        for path, table in tables.items():
            n, split = int(path.name[4]), path.stem[-2:]
            for names, levels in tqdm(table, desc=path.stem, unit="mixture"):
                sources = []
                for name, level in zip(names, levels):
                    audio, rate = read_utterance(found[key(name)])
                    active, _ = active_speech_level(sosfilt(high_pass, resample(audio, rate, 8000)), 8000)
                    if active == -math.inf:
                        raise DataError(f"{found[key(name)]} is silent: replace it")
                    sources.append((audio * 10 ** ((level - active) / 20), rate))
                # Matlab's num2str, which gave the published files their names, shows five digits.
                name = "_".join(f"{Path(name).stem}_{level:.5g}" for name, level in zip(names, levels)) + ".wav"
                for to_rate, mode in itertools.product(sample_rates, modes):
                    signals = [resample(audio, rate, to_rate) for audio, rate in sources]
                    length = {"min": min, "max": max}[mode](map(len, signals))
                    signals = np.stack([np.pad(s[:length], (0, max(length - len(s), 0))) for s in signals])
                    signals = np.concatenate([signals.sum(0, keepdims=True), signals])
                    signals = np.round(32768 * 0.9 * signals / np.abs(signals).max()).astype(np.int16)
                    base = folder / f"{n}speakers" / f"wav{to_rate // 1000}k" / mode / split
                    for part, signal in zip(["mix", "s1", "s2", "s3"], signals):
                        (base / part).mkdir(parents=True, exist_ok=True)
                        sf.write(base / part / name, signal, to_rate, subtype="PCM_16")


def make_speaker_folders(wsj0, out) -> None:
    """Writes si_tr_s/40n/40na010x.wv1 as out/40n/si_tr_s_40na010x.flac, unchanged. Raises DataError."""
    paths = list_utterances(wsj0)
    if not paths:
        raise DataError(f"{wsj0} holds no recordings: give the folder with WSJ0")
    with new_folder(out) as folder:
        for path in tqdm(paths, desc=f"writing {out}", unit="file"):
            audio, rate = read_utterance(path)
            target = folder / path.parent.name.lower() / f"{path.parent.parent.name}_{path.stem}.flac".lower()
            target.parent.mkdir(exist_ok=True)
            sf.write(target, audio, rate, subtype="PCM_16")


def main() -> None:
    parser = Parser(description="Makes WSJ0-2mix and -3mix, or a folder of WSJ0's speakers.")
    parser.add_argument("--wsj0", required=True, help="folder with WSJ0, as wav or as on LDC's discs")
    parser.add_argument("--lists", help="folder with the public lists, mix_2_spk_tr.txt and so on")
    parser.add_argument("--speakers", action="store_true", help="write a folder per speaker instead of mixtures")
    parser.add_argument("--out", required=True)
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
