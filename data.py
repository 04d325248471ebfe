"""Mixtures of two to five speakers: drawn on the fly from folders of speech, or read from a fixed set on disk.

- `SpeakerMixtures`: of any folder laid out as <root>/<speaker>/**/*.{wav,flac,ogg,opus} (LibriSpeech, VCTK, ours)
- `FixedMixtures`: a set as WSJ0-2mix, LibriMix and WHAM! have it; `FixedSegments` cuts and perturbs it for training
- `LatentSegments`: the latents of such a set, as `python -m recipes.latents` writes them

All are sequences of dictionaries: `mixture` [T], `sources` [S, T] (float32, within -1..1) and `name`; latents come as
`latents` [1 + S, D, F], the mixture's first. `found` says in a line what they are of. An item is asked for by its index
or by (epoch, index): it is a pure function of these and the seed, so that a run repeats exactly, workers need no
shared state, and ranks never share a mixture.

Relative levels and the peak follow the WSJ0-2mix recipe, speed perturbation the Codecformer paper's.
A dataset of your own is a class and a line in DATASETS.
"""

import argparse
import functools
import inspect
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile as sf
from scipy.signal import firwin, resample_poly
from tqdm import tqdm

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".opus"}
MIX_FOLDERS = ("mix", "mix_clean", "mix_both")
WHAM_SNR = (-6.0, 3.0)  # dB; there of the first speaker, here of all speech over noise


class DataError(ValueError):
    """Something about the user's files is wrong; the message is one line that says what to do."""


class Parser(argparse.ArgumentParser):
    """Answers a mistake with one line, not with the usage of every flag, and takes no flag for another."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

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
    except (OSError, RuntimeError) as error:
        reason = "no such file" if not Path(path).exists() else str(error).splitlines()[0]
        raise DataError(f"can't read {path} as audio ({reason}): check or remove it") from None
    if len(audio) == 0 or len(audio) < expected:
        raise DataError(f"{path} is empty or truncated: replace or remove it")
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


def read_headers(paths) -> dict[Path, tuple[int, int]]:
    """(samples, sample rate) of recordings, read in parallel. Raises DataError that names the first broken one."""

    def read(path):
        try:
            info = sf.info(path)
            return (info.frames, info.samplerate), "" if info.frames else "no samples"
        except (OSError, RuntimeError) as error:
            return None, str(error).splitlines()[0]

    with ThreadPoolExecutor() as pool:
        rows = list(tqdm(pool.map(read, paths), "opening", len(paths), unit="file", delay=1, leave=False))
    if broken := [(path, reason) for path, (_, reason) in zip(paths, rows) if reason]:
        more = f", nor {len(broken) - 1} more" * (len(broken) > 1)
        raise DataError(f"can't read {broken[0][0]} as audio ({broken[0][1]}){more}: check or remove it")
    return {path: header for path, (header, _) in zip(paths, rows)}


def describe(root, headers: dict, what: str) -> str:
    """What was found below a folder, in a line that also counts the files that are no recordings."""
    hours = sum(samples / rate for samples, rate in headers.values()) / 3600
    others = sum(p.is_file() and p.suffix.lower() not in AUDIO_SUFFIXES for p in Path(root).rglob("*"))
    return f"{root}: {what}, {hours:.2f} h" + f"; {others} file(s) of other kinds passed over" * bool(others)


def list_audio(folder) -> list[Path]:
    return sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)


def list_speakers(root) -> dict[str, list[Path]]:
    """The recordings of each speaker folder below `root`. Raises DataError for fewer than two speakers."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"no folder {root}: give one with a folder per speaker, or a fixed set (recipes.wsj0_mix, mix)")
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    speakers = {folder.name: files for folder in folders if (files := list_audio(folder))}
    splits = {name for name in speakers if name.split("-")[0] in ("train", "valid", "dev", "test", "tr", "cv", "tt")}
    if splits or {"s1", "s2"} <= speakers.keys():
        what = f"{root} holds {min(splits or ['s1'])}, which is no speaker"
        raise DataError(f"{what}: give a folder of speakers, or {' or '.join(MIX_FOLDERS)} beside s1 and s2")
    if len(speakers) < 2:
        what = "speaker folder(s) with wav, flac, ogg or opus files"
        raise DataError(f"{root} holds {len(speakers)} {what}, at least 2 are needed")
    return speakers


def epoch_and_index(key) -> tuple[int, int]:
    return key if isinstance(key, tuple) else (0, key)


class SpeakerMixtures:
    """`size` mixtures an epoch of random segments of `n_speakers` (2 to 5) different speakers.

    speeds: percentages; each source is played at one of them (resampled, so the pitch moves too).
    level_range: dB; the first two sources differ by a uniform draw from 0 to this, others lie between them.
    noise: folder; the mixture, but no source, also holds a random segment of its recordings, at an SNR (dB, sum of
        the speech over noise) drawn uniformly from the range `snr`, by default WHAM!'s.
    Raises DataError for settings out of range and for folders that can't be mixed.
    """

    def __init__(
        self, root, sample_rate, seconds=4.0, size=1000, seed=0, n_speakers=2, speeds=(100,), level_range=5.0,
        noise=None, snr=None,
    ):  # fmt: skip
        self.speakers = list_speakers(root)
        if not 2 <= n_speakers <= 5:
            raise DataError(f"mixtures are of 2 to 5 speakers, not {n_speakers}")
        if n_speakers > len(self.speakers):
            raise DataError(f"{root} holds {len(self.speakers)} speakers, mixtures of {n_speakers} need as many")
        if not all(25 <= s <= 400 for s in speeds):
            raise DataError(f"speeds are percentages from 25 to 400, not {list(speeds)}")
        if snr and noise is None:
            raise DataError("--snr needs --noise, a folder of recordings")
        self.snr, self.noise = snr or WHAM_SNR, list_audio(noise) if noise is not None else []
        if not -math.inf < self.snr[0] <= self.snr[1] < math.inf:
            raise DataError("--snr is a range in dB from low to high, not from {:g} to {:g}".format(*self.snr))
        self.headers = read_headers([path for files in self.speakers.values() for path in files])
        self.found = describe(root, self.headers, f"{len(self.speakers)} speakers, {len(self.headers)} files")
        self.headers |= read_headers(self.noise)
        if noise is not None and not self.noise:
            raise DataError(f"{noise} holds no wav, flac, ogg or opus files to use as noise")
        # Decoding is most of the time of making a mixture: what fits into 400 MB is kept, in each worker.
        self.fits, self.decoded = sum(frames for frames, _ in self.headers.values()) < 1e8, {}
        self.sample_rate, self.length, self.size = sample_rate, round(seconds * sample_rate), size
        self.seed, self.n_speakers, self.speeds, self.level_range = seed, n_speakers, list(speeds), level_range

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

    def __getitem__(self, key) -> dict:
        epoch, index = epoch_and_index(key)
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, epoch, index])
        names = list(self.speakers)
        chosen = [names[i] for i in rng.choice(len(names), self.n_speakers, replace=False)]
        sources = [self._segment(rng, self.speakers[n], f"speaker {n}", self.speeds, pauses=True) for n in chosen]
        spread = rng.uniform(0, self.level_range) / 2
        levels = [spread, -spread, *rng.uniform(-spread, spread, self.n_speakers - 2)]
        sources = np.stack([s * 10 ** (db / 20) for s, db in zip(sources, levels)]).astype(np.float32)
        mixture = sources.sum(0)
        peak = np.abs(sources).max()
        if self.noise:  # drawn last: the speech of a mixture is the same with noise and without
            noise = self._segment(rng, self.noise, "the noise")
            noise *= np.linalg.norm(mixture) / np.linalg.norm(noise) * 10 ** (-rng.uniform(*self.snr) / 20)
            mixture, peak = mixture + noise, max(peak, np.abs(noise).max())
        # As in WSJ0-2mix, the loudest of mixture and sources peaks at 0.9.
        gain = np.float32(0.9 / max(np.abs(mixture).max(), peak))
        return {"mixture": mixture * gain, "sources": sources * gain, "name": "_".join(chosen)}


class FixedMixtures:
    """A folder with `mix` (or `mix_clean`, `mix_both`), `s1`, `s2` ... holding files of the same names, whole.

    size: how many of them, evenly spaced (all by default). mix_folder: the first that is there, if not given.
    Raises DataError where the layout, n_speakers, a file, a rate or a length doesn't fit: of mixtures when the set is
    opened, of their sources when they are read.
    """

    def __init__(self, root, sample_rate, size=None, n_speakers=None, mix_folder=None):
        self.root, self.sample_rate = Path(root), sample_rate
        mix_folder = mix_folder or next((name for name in MIX_FOLDERS if (self.root / name).is_dir()), MIX_FOLDERS[0])
        self.folders = [self.root / mix_folder, *sorted(p for p in self.root.glob("s[1-9]") if p.is_dir())]
        self.n_speakers = len(self.folders) - 1
        if not self.folders[0].is_dir() or self.n_speakers < 2:
            raise DataError(f"{root} is no set of mixtures: it needs the folders {mix_folder}, s1 and s2")
        if n_speakers not in (None, self.n_speakers):
            raise DataError(f"{root} has {self.n_speakers} speakers a mixture, not {n_speakers}: see --n_speakers")
        self.files = sorted(p for p in self.folders[0].iterdir() if p.suffix.lower() in AUDIO_SUFFIXES)
        if not self.files:
            raise DataError(f"{self.folders[0]} holds no wav, flac, ogg or opus files")
        for folder in self.folders[1:]:
            if missing := {p.name for p in self.files} - {p.name for p in folder.iterdir()}:
                raise DataError(f"{folder / min(missing)} is missing, which {self.folders[0]} needs as a reference")
        headers = read_headers(self.files)
        for path, (_, rate) in headers.items():
            self._check_rate(path, rate)
        self.found = describe(self.folders[0], headers, f"{len(self.files)} mixtures of {self.n_speakers} speakers")
        if size is not None and size < len(self.files):
            self.files = [self.files[k] for k in np.linspace(0, len(self.files) - 1, size).round().astype(int)]

    def _check_rate(self, path, rate) -> None:
        if rate != self.sample_rate:
            raise DataError(f"{path} is at {rate} Hz, the model works at {self.sample_rate} Hz: resample the set")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key) -> dict:
        (_, index), signals = epoch_and_index(key), []
        for path in [folder / self.files[index].name for folder in self.folders]:
            audio, rate = read_audio(path)
            self._check_rate(path, rate)
            if signals and len(audio) != len(signals[0]):
                raise DataError(f"{path} has {len(audio)} samples, its mixture {len(signals[0])}: make the set anew")
            signals.append(audio)
        return {"mixture": signals[0], "sources": np.stack(signals[1:]), "name": self.files[index].stem}


class FixedSegments(FixedMixtures):
    """A fixed set for training: random cuts of `seconds`, sources at one of the `speeds` (percent), noise as it is."""

    def __init__(self, root, sample_rate, seconds, seed=0, speeds=(100,), n_speakers=None, mix_folder=None):
        super().__init__(root, sample_rate, None, n_speakers, mix_folder)
        self.length, self.seed, self.speeds = round(seconds * sample_rate), seed, list(speeds)

    def __getitem__(self, key) -> dict:
        item, rng = super().__getitem__(key), np.random.default_rng([self.seed, *epoch_and_index(key)])
        speeds = [self.speeds[rng.integers(len(self.speeds))] for _ in item["sources"]]
        start = int(rng.integers(max(len(item["mixture"]) - self.length, 0) + 1))
        cuts = np.zeros((1 + len(speeds), self.length), np.float32)  # of the noise and the sources
        noise = item["mixture"] - item["sources"].sum(0)
        for cut, signal, speed in zip(cuts, [noise, *item["sources"]], [100, *speeds]):
            part = resample(signal[start : start + math.ceil(self.length * speed / 100)], speed, 100)[: self.length]
            cut[: len(part)] = part
        return {"mixture": cuts.sum(0), "sources": cuts[1:], "name": item["name"]}


class LatentSegments:
    """Random cuts of `seconds` of the latents of a fixed set, for the losses between latents; no codec runs.

    codec: its name and fingerprint. Raises DataError where `recipes.latents` didn't write the folder.
    """

    def __init__(self, root, sample_rate, seconds, seed=0, speeds=(100,), n_speakers=2):
        if list(speeds) != [100]:
            raise DataError(f"{root} holds latents, which can't be played at another speed: give --speeds 100")
        try:
            facts = json.loads((Path(root) / "latents.json").read_text())
            self.codec, self.frames = facts["codec"], round(facts["frame_rate"] * seconds)
        except (OSError, ValueError, TypeError, KeyError):
            raise DataError(f"{root}/latents.json can't be read: write the latents anew") from None
        if (sample_rate, n_speakers) != (facts["sample_rate"], facts["n_speakers"]):
            raise DataError(f"{root} is of {facts['n_speakers']} speakers at {facts['sample_rate']} Hz: set the flags")
        self.files, self.seed = sorted(Path(root).glob("*.npy")), seed
        self.found = f"{root}: latents of {len(self)} mixtures of {n_speakers} speakers"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key) -> dict:
        path, frames = self.files[epoch_and_index(key)[1]], self.frames
        try:
            latents = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"can't read {path} as latents ({error}): write them anew") from None
        rng = np.random.default_rng([self.seed, *epoch_and_index(key)])
        start = int(rng.integers(max(latents.shape[-1] - frames, 0) + 1))
        cut = np.zeros((*latents.shape[:-1], frames), np.float32)
        cut[..., : latents.shape[-1] - start] = latents[..., start : start + frames]
        return {"latents": cut, "name": path.stem}


# For each kind of folder: how it is recognised, the dataset for training and that for validation. The first fits.
DATASETS = {
    "a set of latents": (lambda root: (Path(root) / "latents.json").is_file(), LatentSegments, None),
    "a fixed set": (lambda root: any((Path(root) / m).is_dir() for m in MIX_FOLDERS), FixedSegments, FixedMixtures),
    "a folder of speakers": (lambda root: True, SpeakerMixtures, SpeakerMixtures),
}


def open_mixtures(root, sample_rate: int, training: bool, **settings):
    """The dataset in DATASETS that fits a folder, with those of the settings that it takes and that are not None.

    Raises DataError for noise and mix_folder, if a dataset for training doesn't take them.
    """
    kind, (_, for_training, for_validation) = next(row for row in DATASETS.items() if row[1][0](root))
    dataset = for_training if training else for_validation
    if dataset is None:
        raise DataError(f"{root} is {kind}, which can't be scored: give a fixed set or a folder of speakers")
    known = inspect.signature(dataset).parameters
    settings = {name: value for name, value in settings.items() if value is not None}
    if training and (unknown := {"noise", "snr", "mix_folder"} & settings.keys() - known.keys()):
        raise DataError(f"{root} is {kind}, to which --{min(unknown)} doesn't apply: leave it out")
    return dataset(root, sample_rate, **{name: settings[name] for name in settings.keys() & known.keys()})
