"""Mixtures of two to five speakers: drawn on the fly from folders of speech, or read from a fixed set on disk.

- `SpeakerMixtures` mixes the speakers of any folder laid out as <root>/<speaker>/**/*.{wav,flac,ogg,opus}
  (LibriSpeech, VCTK and ours all fit), with noise if wanted. Every mixture is a pure function of (seed, epoch,
  index): a run repeats exactly, needs no shared state between workers, and ranks never share a mixture.
- `FixedMixtures` reads a folder with `mix`, `mix_clean` or `mix_both`, and `s1`, `s2` (`s3` ...), as it is in
  WSJ0-2mix and -3mix (wav8k/min/tr), LibriMix (wav8k/min/train-100) and WHAM!.
- Both give dictionaries: `mixture` [T], `sources` [S, T] (float32, within -1..1) and `name`.

Relative levels and the peak follow the WSJ0-2mix recipe, speed perturbation the Codecformer paper's.

    python data.py mix --speech DIR --out DIR             writes a fixed set
    python data.py wsj0 --wsj0 DIR --lists DIR --out DIR  makes WSJ0-2mix and -3mix
    python data.py debian --out speech                    builds 9 hours of real speech from Debian's packages
    python data.py bundle --speech speech --out DIR       packs the small folder that comes with this repository
"""

import argparse
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile as sf
from scipy.ndimage import maximum_filter1d
from scipy.signal import cheby2, firwin, lfilter, resample_poly, sosfilt
from tqdm import tqdm

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".opus"}
WHAM_SNR = (-6.0, 3.0)  # dB; there of the first speaker, here of all speech over noise


class DataError(ValueError):
    """Something about the user's files or settings is wrong; the message is one line that says what to do."""


class Parser(argparse.ArgumentParser):
    """Answers a mistake with one line, not with the usage of every flag."""

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def read_audio(path, start: int = 0, frames: int = -1) -> tuple[np.ndarray, int]:
    """Reads a file, or `frames` of it from `start`, mixed down to one channel: ([T] float32, its sample rate).

    Raises DataError for anything that is not a whole, finite recording.
    """
    try:
        with sf.SoundFile(path) as file:
            rate, expected = file.samplerate, file.frames - start if frames < 0 else frames
            if start:
                file.seek(start)  # a GSM file can't
            audio = file.read(expected, dtype="float32", always_2d=True)
    except (sf.LibsndfileError, OSError, RuntimeError) as error:
        reason = "no such file" if not Path(path).exists() else str(error).splitlines()[0]
        raise DataError(f"can't read {path} as audio ({reason}): check or remove it") from None
    if len(audio) == 0 or len(audio) < expected:
        raise DataError(f"{path} is empty or truncated ({len(audio)} of {expected} samples): replace or remove it")
    if not np.isfinite(audio).all():
        raise DataError(f"{path} holds NaN or infinite samples: replace or remove it")
    return audio.mean(1), rate


def resample(audio: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Band-limited rational resampling of [T] by SciPy's polyphase filter, ceil(T * to / from) samples."""
    if from_rate == to_rate:
        return audio
    divisor = math.gcd(from_rate, to_rate)
    up, down = to_rate // divisor, from_rate // divisor
    return resample_poly(audio, up, down, window=resampling_filter(max(up, down))).astype(np.float32)


@functools.lru_cache(maxsize=64)
def resampling_filter(factor: int) -> np.ndarray:
    """The filter that resample_poly designs anew in every call, a seventh of the time of making a mixture."""
    return firwin(20 * factor + 1, 1 / factor, window=("kaiser", 5.0)).astype(np.float32)


def read_headers(root, paths) -> dict[Path, tuple[int, int]]:
    """(frames, sample rate) of files below `root`, from one parallel pass over the headers of new or changed ones.

    All others are known from a file in the user's cache folder; where that can't be used, every header is read.
    Raises DataError that names the first of the broken files, if any.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "codecformer"
    cache = folder / f"{hashlib.sha256(bytes(Path(root).resolve())).hexdigest()[:16]}.json"
    try:
        rows = json.loads(cache.read_text()).items()
        known = {name: (int(mtime), int(size), int(frames), int(rate)) for name, (mtime, size, frames, rate) in rows}
    except (OSError, ValueError, TypeError, AttributeError):  # none yet, or not one of ours
        known = {}

    def read(path):
        name = path.relative_to(root).as_posix()
        try:
            stat = path.stat()
            row = known.get(name, ())
            if row[:2] != (stat.st_mtime_ns, stat.st_size):
                info = sf.info(path)
                row = stat.st_mtime_ns, stat.st_size, info.frames, info.samplerate
            return name, row, "" if row[2] else "no samples"
        except (OSError, RuntimeError) as error:
            return name, None, str(error).splitlines()[0]

    with ThreadPoolExecutor() as pool:
        rows = list(tqdm(pool.map(read, paths), f"opening {root}", len(paths), unit="file", delay=1, leave=False))
    found = {name: row for name, row, _ in rows if row}
    if not found.items() <= known.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Several processes may do this at once: each writes its own file, and the last to finish wins.
            with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
                json.dump(known | found, file)
            os.replace(file.name, cache)
        except OSError:
            pass  # the next opening reads the headers again
    broken = [(path, reason) for path, (_, _, reason) in zip(paths, rows) if reason]
    if broken:
        more = f", nor {len(broken) - 1} more" if len(broken) > 1 else ""
        raise DataError(f"can't read {broken[0][0]} as audio ({broken[0][1]}){more}: check or remove it")
    return {path: row[2:] for path, (_, row, _) in zip(paths, rows)}


def list_audio(folder) -> list[Path]:
    return sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)


def list_speakers(root) -> dict[str, list[Path]]:
    """The recordings of each speaker folder below `root`. Raises DataError for fewer than two speakers."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"no folder {root}: give a folder that holds one folder per speaker")
    speakers = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        if files := list_audio(folder):
            speakers[folder.name] = files
    if len(speakers) < 2:
        raise DataError(
            f"{root} holds {len(speakers)} speaker folder(s) with wav, flac, ogg or opus files, at least 2 are needed"
        )
    return speakers


class SpeakerMixtures:
    """`size` mixtures an epoch of random segments of `n_speakers` (2 to 5) different speakers.

    speeds: percentages; each source is played at one of them (resampled, so the pitch moves too).
    level_range: dB; the first two sources differ by a uniform draw from 0 to this, others lie between them.
    noise: folder; the mixture, but no source, also holds a random segment of its recordings, at an SNR (dB, sum of
        the speech over noise) drawn uniformly from the range `snr`, by default WHAM!'s.
    Raises DataError for settings out of range and for folders that can't be mixed.
    """

    def __init__(
        self, root, sample_rate, seconds, size, seed=0, n_speakers=2, speeds=(100,), level_range=5.0,
        noise=None, snr=WHAM_SNR,
    ):  # fmt: skip
        self.speakers = list_speakers(root)
        if not 2 <= n_speakers <= 5:
            raise DataError(f"mixtures are of 2 to 5 speakers, not {n_speakers}")
        if n_speakers > len(self.speakers):
            raise DataError(f"{root} holds {len(self.speakers)} speakers, mixtures of {n_speakers} need as many")
        if not all(25 <= s <= 400 for s in speeds):
            raise DataError(f"speeds are percentages from 25 to 400, not {list(speeds)}")
        if not -math.inf < snr[0] <= snr[1] < math.inf:
            raise DataError(f"snr is a range in dB from low to high, not from {snr[0]:g} to {snr[1]:g}")
        self.headers = read_headers(root, [path for files in self.speakers.values() for path in files])
        self.noisy, self.snr = noise is not None, snr
        if self.noisy:
            self.noise = list_audio(noise)
            if not self.noise:
                raise DataError(f"{noise} holds no wav, flac, ogg or opus files to use as noise")
            self.headers |= read_headers(noise, self.noise)
        # Decoding is most of the time of making a mixture: what fits into 400 MB is kept, in each worker.
        self.fits, self.decoded = sum(frames for frames, _ in self.headers.values()) < 1e8, {}
        self.sample_rate, self.length = sample_rate, round(seconds * sample_rate)
        self.size, self.seed, self.n_speakers = size, seed, n_speakers
        self.speeds, self.level_range = list(speeds), level_range
        self.epoch = 0

    def __len__(self) -> int:
        return self.size

    def _read(self, path, start: int, frames: int) -> np.ndarray:
        if not self.fits:
            return read_audio(path, start, frames)[0]
        if path not in self.decoded:
            self.decoded[path] = read_audio(path)[0]
        return self.decoded[path][start : start + frames]

    def _join(self, rng, files, speed: int, pauses: bool) -> np.ndarray:
        """[length] at one speed: part of a long recording, or short ones joined, with pauses or without."""
        pieces, missing = [], self.length
        while missing > 0:
            path = files[rng.integers(len(files))]
            frames, rate = self.headers[path]
            # Playing at `speed` percent makes a recording of this rate look like one of a higher or lower rate.
            rate = rate * speed
            wanted = math.ceil(missing * rate / (self.sample_rate * 100))
            start = int(rng.integers(max(frames - wanted, 0) + 1))
            piece = self._read(path, start, min(wanted, frames))
            pieces.append(resample(piece, rate, self.sample_rate * 100)[:missing])
            missing -= len(pieces[-1])
            if pauses:
                pieces.append(np.zeros(int(rng.integers(0.05 * self.sample_rate, 0.3 * self.sample_rate)), np.float32))
                missing -= len(pieces[-1])
        return np.concatenate(pieces)[: self.length]

    def _segment(self, rng, files, owner: str, speeds=(100,), pauses=False) -> np.ndarray:
        for _ in range(20):  # a long recording may pause for a whole segment
            segment = self._join(rng, files, speeds[rng.integers(len(speeds))], pauses)
            if segment.std() > 1e-4:
                return segment / segment.std()
        raise DataError(f"20 segments of {owner} in a row were silent: check the recordings")

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, self.epoch, index])
        names = list(self.speakers)
        chosen = [names[i] for i in rng.choice(len(names), self.n_speakers, replace=False)]
        sources = [self._segment(rng, self.speakers[n], f"speaker {n}", self.speeds, pauses=True) for n in chosen]
        spread = rng.uniform(0, self.level_range) / 2
        levels = [spread, -spread, *rng.uniform(-spread, spread, self.n_speakers - 2)]
        sources = np.stack([s * 10 ** (db / 20) for s, db in zip(sources, levels)]).astype(np.float32)
        mixture = sources.sum(0)
        peak = np.abs(sources).max()
        if self.noisy:  # drawn last: the speech of a mixture is the same with noise and without
            noise = self._segment(rng, self.noise, "the noise")
            noise *= np.linalg.norm(mixture) / np.linalg.norm(noise) * 10 ** (-rng.uniform(*self.snr) / 20)
            mixture, peak = mixture + noise, max(peak, np.abs(noise).max())
        # As in WSJ0-2mix, the loudest of mixture and sources peaks at 0.9.
        gain = np.float32(0.9 / max(np.abs(mixture).max(), peak))
        return {"mixture": mixture * gain, "sources": sources * gain, "name": "_".join(chosen)}


MIX_FOLDERS = ("mix", "mix_clean", "mix_both")


def is_fixed_set(root) -> bool:
    return any((Path(root) / name).is_dir() for name in MIX_FOLDERS)


class FixedMixtures:
    """A folder with `mix` (or `mix_clean`, `mix_both`), `s1`, `s2` ... holding files of the same names.

    Whole and as it is for scoring. For training, with `seconds`: a random cut, every source at one of the `speeds`
    (percent), mixed anew where that changes anything, together with the noise of `mix_both`.
    mix: which of the three is the mixture; the first that is there, in this order, if not given.
    LibriMix's tables (../metadata/mixture_<folder>_<mix>.csv) give the `lengths` (samples) where present, else the
    headers of all files do, so that a set which doesn't fit together is refused when it is opened.
    Raises DataError where the layout, a file, a rate or a length doesn't fit.
    """

    def __init__(self, root, sample_rate, seconds=None, seed=0, speeds=(100,), mix=None):
        self.root, self.sample_rate, self.seed, self.speeds = Path(root), sample_rate, seed, list(speeds)
        self.length = round(seconds * sample_rate) if seconds else None
        self.epoch = 0
        mix = mix or next((name for name in MIX_FOLDERS if (self.root / name).is_dir()), MIX_FOLDERS[0])
        self.noisy = mix == "mix_both"
        self.folders = [self.root / mix, *sorted(p for p in self.root.glob("s[1-9]") if p.is_dir())]
        self.n_speakers = len(self.folders) - 1
        if not self.folders[0].is_dir() or self.n_speakers < 2:
            raise DataError(f"{root} is no set of mixtures: it needs the folders {mix}, s1 and s2")
        self.files = sorted(p for p in self.folders[0].iterdir() if p.suffix.lower() in AUDIO_SUFFIXES)
        if not self.files:
            raise DataError(f"{self.folders[0]} holds no wav, flac, ogg or opus files")
        for folder in self.folders[1:]:
            if missing := {p.name for p in self.files} - {p.name for p in folder.iterdir()}:
                raise DataError(f"{folder / min(missing)} is missing, which {self.folders[0]} needs as a reference")
        table = self.root.resolve().parent / "metadata" / f"mixture_{self.root.resolve().name}_{mix}.csv"
        if table.is_file():
            self.lengths = self._read_table(table)
            headers = read_headers(root, self.files[:1])  # the table doesn't tell the rate
        else:
            headers = read_headers(root, [folder / p.name for p in self.files for folder in self.folders])
            self.lengths = [headers[path][0] for path in self.files]
        for k, (path, (frames, rate)) in enumerate(headers.items()):
            self._check(k // len(self.folders), path, frames, rate)

    def _read_table(self, table) -> list[int]:
        try:
            with open(table, newline="") as file:  # its paths are those of the machine that made the set
                lengths = {row["mixture_ID"]: int(row["length"]) for row in csv.DictReader(file)}
        except (OSError, ValueError, TypeError, KeyError):
            raise DataError(f"{table} is no table of mixture_ID and length: remove it") from None
        if odd := lengths.keys() ^ {p.stem for p in self.files}:
            raise DataError(f"{table} and {self.folders[0]} differ in {min(odd)}: complete the set or remove the table")
        return [lengths[p.stem] for p in self.files]

    def _check(self, index, path, frames, rate) -> None:
        if rate != self.sample_rate:
            raise DataError(f"{path} is at {rate} Hz, the model works at {self.sample_rate} Hz: resample the set")
        if frames != self.lengths[index]:
            raise DataError(f"{path} has {frames} samples, its mixture {self.lengths[index]}: make the set anew")

    def __len__(self) -> int:
        return len(self.files)

    def _cut(self, rng, mixture, sources) -> tuple[np.ndarray, np.ndarray]:
        speeds = [self.speeds[rng.integers(len(self.speeds))] for _ in sources]
        start = int(rng.integers(max(len(mixture) - self.length, 0) + 1))
        noise = mixture - sources.sum(0)
        cuts = []
        for signal, speed in zip([mixture, noise, *sources], [100, 100, *speeds]):
            cut = signal[start : start + math.ceil(self.length * speed / 100)]
            cut = resample(cut, speed, 100)[: self.length]
            cuts.append(np.pad(cut, (0, self.length - len(cut))))
        mixture, noise, *sources = cuts
        if any(speed != 100 for speed in speeds):
            mixture = sum(sources) + noise if self.noisy else sum(sources)
        return mixture, np.stack(sources)

    def __getitem__(self, index: int) -> dict:
        signals = []
        for path in [folder / self.files[index].name for folder in self.folders]:
            audio, rate = read_audio(path)
            self._check(index, path, len(audio), rate)
            signals.append(audio)
        mixture, sources = signals[0], np.stack(signals[1:])
        if self.length:
            mixture, sources = self._cut(np.random.default_rng([self.seed, self.epoch, index]), mixture, sources)
        return {"mixture": mixture, "sources": sources, "name": self.files[index].stem}


def write_fixed_set(mixtures, out) -> None:
    """Writes a dataset as a fixed set of 16-bit FLAC, the mixture exactly the sum of its rounded parts.

    Folders: mix_clean, s1, s2 ..., or with noise mix_both, s1, s2 ..., noise.
    Raises DataError if `out` exists already or can't be written; a half-written set never bears that name.
    """
    with new_folder(out) as folder:
        names = ["mix_both" if mixtures.noisy else "mix_clean"] + [f"s{k + 1}" for k in range(mixtures.n_speakers)]
        names += ["noise"] if mixtures.noisy else []
        for name in names:
            (folder / name).mkdir()
        for index in tqdm(range(len(mixtures)), desc=f"writing {out}", unit="mixture"):
            item = mixtures[index]
            parts = [*item["sources"], item["mixture"] - item["sources"].sum(0)][: len(names) - 1]
            parts = np.round(np.stack(parts) * 32768).astype(np.int16)  # peaks lie at 0.9
            for name, signal in zip(names, [parts.sum(0).astype(np.int16), *parts]):
                path = folder / name / f"{index:04d}_{item['name']}.flac"
                sf.write(path, signal, mixtures.sample_rate, subtype="PCM_16")


class new_folder:
    """Context: a temporary folder beside `out` that takes its name only if all went well."""

    def __init__(self, out):
        self.out = Path(out)

    def __enter__(self) -> Path:
        if self.out.exists():
            raise DataError(f"{self.out} exists already: remove it or choose another --out")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.temporary = Path(tempfile.mkdtemp(prefix=f".{self.out.name}-", dir=self.out.parent))
            self.temporary.chmod(0o755)
        except OSError as error:
            raise DataError(f"can't write to {self.out.parent}: {error.strerror}") from None
        return self.temporary

    def __exit__(self, error_type, *_):
        if error_type is None:
            self.temporary.rename(self.out)
        else:
            shutil.rmtree(self.temporary, ignore_errors=True)


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
    paths = [p for p in Path(wsj0).rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES | {".wv1", ".sph"}]

    def key(path) -> str:  # si_tr_s/40n/40na010x
        return "/".join(Path(path).with_suffix("").parts[-3:]).lower()

    found = {key(path): path for path in sorted(paths)}
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


# {speaker: (Debian packages, pattern below usr/share)}: voices recorded for telephone exchanges, two games and the
# talking stamps of a drawing program; every language of one program is another reader.
ASTERISK = {
    "allison": "core-sounds-en core-sounds-es",
    "june": "core-sounds-fr",
    "carlo": "core-sounds-it",
    "menardi": "prompt-it-menardi",
    "ivrvoice": "core-sounds-ru",
}
VOICES = {
    voice: ([f"asterisk-{p}-wav" for p in packages.split()], rf"(?i)asterisk/sounds/\w+_{voice}\w*/(?!silence/).*\.wav")
    for voice, packages in ASTERISK.items()
}
for lang, (size, mark) in itertools.product(["cs", "nl"], [("small", "m"), ("big", "v")]):
    pattern = rf"games/fillets-ng/sound/[^/]+/{lang}/.*-{mark}-.*\.ogg"
    VOICES[f"fish_{size}_{lang}"] = ([f"fillets-ng-data-{lang}"], pattern)
for lang in "ro es ru fr bg el be ca da".split():
    VOICES[f"stamps_{lang}"] = (["tuxpaint-stamps-default"], rf"tuxpaint/stamps/.*_desc_{lang}\.ogg")
for lang in "ca da de el en fr gl lt ru sl uk wa nn".split():
    VOICES[f"ktuberling_{lang}"] = (["ktuberling-data"], rf"ktuberling/sounds/{lang}/.*\.(wav|ogg|opus)")
# Three voices choose hyperparameters, thirteen are only ever scored, all others may be trained on.
VALID_VOICES = {"stamps_be", "stamps_ca", "stamps_da"}

# More voices to train on, a minute or so each but for the first three and the Malayalam reader: two more telephone
# exchanges, two readers of Chinese syllables, the readers of KDE's alphabets and a game's characters. KDE doesn't say
# who its readers are, so the languages of ktuberling's readers, and those spoken next door, stay out.
MORE_VOICES = {
    "armelle": (["asterisk-prompt-fr-armelle"], r"asterisk/sounds/fr/.*\.gsm"),
    "july": (["asterisk-prompt-es-co"], r"asterisk/sounds/es/.*\.gsm"),
    "gcin_3": (["gcin-voice"], r"gcin-voice/ogg/[^/]+/3\.ogg"),
    "gcin_5": (["gcin-voice"], r"gcin-voice/ogg/[^/]+/5\.ogg"),
}
for lang in "ar cs he hu it ml nl pt_BR tn".split():
    MORE_VOICES[f"klettres_{lang}"] = (["klettres-data"], rf"klettres/{lang}/.*\.(wav|ogg)")
for character in (
    "British Classic Default Default_es Default_pl Default_ru Default_uk "
    "HillBilly Mobster Pirate Russian Russian_pl Singer Surfer"
).split():
    pattern = rf"games/hedgewars/Data/Sounds/voices/{character}/.*\.ogg"
    MORE_VOICES[f"hedgewars_{character.lower()}"] = (["hedgewars-data"], pattern)


def trim_silence(audio: np.ndarray, rate: int) -> np.ndarray:
    """Cuts what lies more than 34 dB under the loudest 20 ms at both ends, but for 50 ms; [T] -> [<= T]."""
    window = max(rate // 50, 1)
    envelope = np.sqrt(np.convolve(audio.astype(np.float64) ** 2, np.ones(window) / window, "same"))
    loud = np.flatnonzero(envelope > 0.02 * envelope.max())
    return audio[max(loud[0] - rate // 20, 0) : loud[-1] + rate // 20] if len(loud) else audio[:0]


def build_debian_speech(out, sample_rate: int = 8000) -> None:
    """Builds `out`/{train,seen,valid,test,more}/<voice>/*.flac from Debian's packages (about 600 MB to fetch).

    Every 20th recording of a training voice goes to `seen`: known voices, unheard sentences. `more` holds further
    voices to train on, whole. Recordings shorter than 0.3 s are left out. Raises DataError where apt-get fails.
    """
    voices = {**VOICES, **MORE_VOICES}
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(f"{tool} not found: the speech comes from Debian's packages, run this on Debian or Ubuntu")
    with new_folder(out) as folder:
        unpacked = folder / ".packages"
        unpacked.mkdir()
        packages = sorted({package for packages, _ in voices.values() for package in packages})
        for package in tqdm(packages, desc="fetching packages"):
            try:
                subprocess.run(["apt-get", "download", package], cwd=unpacked, check=True, capture_output=True)
            except subprocess.CalledProcessError:
                raise DataError(f"apt-get download {package} failed: run `apt-get update` first") from None
            archive = next(unpacked.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg-deb", "-x", archive, unpacked / package], check=True)
        for voice, (packages, pattern) in tqdm(voices.items(), desc="converting voices"):
            paths = []
            for package in packages:
                base = unpacked / package / "usr" / "share"
                paths += sorted(p for p in base.rglob("*") if re.fullmatch(pattern, str(p.relative_to(base))))
            for index, path in enumerate(paths):
                if sf.info(path).duration < 0.3:
                    continue
                audio, rate = read_audio(path)
                audio = trim_silence(resample(audio - audio.mean(), rate, sample_rate), sample_rate)
                if len(audio) < 0.3 * sample_rate:
                    continue
                split = "more" if voice in MORE_VOICES else "train" if index % 20 else "seen"
                split = "test" if voice.startswith("ktuberling") else "valid" if voice in VALID_VOICES else split
                target = folder / split / voice / f"{index:04d}.flac"
                target.parent.mkdir(parents=True, exist_ok=True)
                sf.write(target, np.clip(audio, -1, 1), sample_rate, subtype="PCM_16")
        shutil.rmtree(unpacked)


def bundle_speech(speech, out) -> None:
    """Packs 8 minutes of each freely licensed voice into one-minute Ogg files at 8 kHz: `out`/{train,valid}/<voice>.

    `valid` holds a minute of the same voices' sentences in `seen`. Raises DataError if speech is missing.
    """
    minute, block = 60 * 8000, 4096  # libsndfile's Vorbis encoder overflows its stack on long blocks
    with new_folder(out) as folder:
        for split, source, minutes in (("train", "train", 8), ("valid", "seen", 1)):
            speakers = list_speakers(Path(speech) / source)
            for voice in ASTERISK:  # the voices under CC-BY and CC-BY-SA
                if voice not in speakers:
                    raise DataError(f"{speech}/{source}/{voice} is missing: build the folder with `data.py debian`")
                files = np.random.default_rng(0).permutation(speakers[voice])
                gap = np.zeros(1600, np.float32)
                audio = np.concatenate([part for path in files for part in (read_audio(path)[0], gap)])
                (folder / split / voice).mkdir(parents=True)
                for k, part in enumerate(np.split(audio, range(minute, len(audio), minute))[:minutes]):
                    path = folder / split / voice / f"{k:02d}.ogg"
                    with sf.SoundFile(path, "w", 8000, 1, "VORBIS", compression_level=0.0) as file:
                        for start in range(0, len(part), block):
                            file.write(part[start : start + block])


def main():
    parser = Parser(description="Makes sets of mixtures and folders of speech.")
    commands = parser.add_subparsers(dest="command", required=True)
    mix = commands.add_parser("mix", help="write a fixed set of mixtures")
    mix.add_argument("--speech", required=True, help="folder with one folder per speaker")
    mix.add_argument("--out", required=True)
    mix.add_argument("--n", type=int, default=48, help="number of mixtures")
    mix.add_argument("--seconds", type=float, default=4.0)
    mix.add_argument("--n_speakers", type=int, default=2, help="2 to 5")
    mix.add_argument("--noise", help="folder of recordings to add as noise")
    mix.add_argument("--snr", type=float, nargs=2, metavar=("LOW", "HIGH"), help="range in dB, speech over noise")
    mix.add_argument("--seed", type=int, default=0)
    mix.add_argument("--sample_rate", type=int, default=8000)
    wsj0 = commands.add_parser("wsj0", help="make WSJ0-2mix and -3mix")
    wsj0.add_argument("--wsj0", required=True, help="folder with WSJ0, as wav or as on LDC's discs")
    wsj0.add_argument("--lists", required=True, help="folder with the public lists, mix_2_spk_tr.txt and so on")
    wsj0.add_argument("--out", required=True)
    wsj0.add_argument("--sample_rate", type=int, nargs="+", choices=(8000, 16000), default=[8000])
    wsj0.add_argument("--mode", nargs="+", choices=("min", "max"), default=["min"])
    debian = commands.add_parser("debian", help="build a speech folder from Debian's packages")
    debian.add_argument("--out", required=True)
    bundle = commands.add_parser("bundle", help="pack the freely licensed voices of such a folder")
    bundle.add_argument("--speech", required=True)
    bundle.add_argument("--out", required=True)
    args = parser.parse_args()
    if args.command == "mix":
        if args.n < 1 or args.sample_rate < 1000 or args.seconds < 0.1:
            raise DataError("--n is at least 1, --sample_rate 1000, --seconds 0.1")
        if args.snr and not args.noise:
            raise DataError("--snr needs --noise, a folder of recordings")
        settings = (args.sample_rate, args.seconds, args.n, args.seed, args.n_speakers)
        mixtures = SpeakerMixtures(args.speech, *settings, noise=args.noise, snr=args.snr or WHAM_SNR)
        write_fixed_set(mixtures, args.out)
    elif args.command == "wsj0":
        make_wsj0_mix(args.wsj0, args.lists, args.out, args.sample_rate, args.mode)
    elif args.command == "debian":
        build_debian_speech(args.out)
    else:
        bundle_speech(args.speech, args.out)


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {error}")
