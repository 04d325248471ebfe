"""Mixtures of two to five speakers: drawn on the fly from recordings, or read from a fixed set.

- `SpeakerMixtures`: of any folder laid out as <root>/<speaker>/**/*.{wav,flac,ogg,opus}, as
  LibriSpeech's train-clean-100 and VCTK are
- `FixedMixtures`: a set as WSJ0-2mix, LibriMix and WHAM! have it, whole or in random segments

Both are sequences of dictionaries

    mixture     [T] float32, within -1..1
    sources     [S, T] of the same
    name        unique in its dataset

What is unusual: an item is asked for by its index or by (epoch, index), and is a pure function of
these and the dataset's seed. So a run repeats exactly, can be resumed anywhere, and its workers
need no shared state.

The range of levels and the peak are WSJ0-2mix's (Hershey et al., 2016); the Codecformer paper's
speeds are 95, 100 and 105 percent. A dataset of your own is a class, and its name in DATASETS.
"""

import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile as sf
from scipy.signal import firwin, resample_poly
from tqdm import tqdm

from program import UserError, first_line

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".opus"}
MIX_FOLDERS = ("mix", "mix_clean", "mix_both")
SPLITS = {"train", "valid", "dev", "test", "tr", "cv", "tt"}  # names that no speaker has
WHAM_SNR = (-6.0, 3.0)  # dB; in WHAM! first speaker over noise, here all speech over noise


class DataError(UserError):
    """Something about recordings is wrong; the message is one line that says what to do."""


# Mixtures -----------------------------------------------------------------------------------------


class SpeakerMixtures:
    """Random mixtures of random segments of different speakers, `size` an epoch.

    root: folder with a folder per speaker.
    n_speakers: in a mixture, 2 to 5.
    seconds: of a mixture, 4 by default. Shorter recordings are joined with short pauses.
    size: 1,000 by default.
    speeds: percentages; each source is played at one of them (resampled: the pitch moves too).
    noise: folder; the mixture, but no source, also holds a random segment of its recordings, at an
        SNR (all speech over noise) drawn from the range `snr` in dB.
    Raises DataError for settings out of range and for folders that can't be mixed.
    """

    level_range = 5.0  # dB: the first two sources differ by 0 to this, others lie between them

    def __init__(
        self,
        root,
        sample_rate: int,
        n_speakers: int = 2,
        *,
        seconds: float | None = None,
        size: int | None = None,
        seed: int = 0,
        speeds=(100,),
        noise=None,
        snr=None,
        mix_folder=None,
    ):
        if mix_folder is not None:
            raise DataError(f"{root} is a folder of speakers: --mix_folder doesn't apply to it")
        if not 2 <= n_speakers <= 5:
            raise DataError(f"mixtures are of 2 to 5 speakers, not {n_speakers}")
        check_speeds(speeds)
        if snr is not None and noise is None:
            raise DataError("--snr needs --noise, a folder of recordings")
        low, high = WHAM_SNR if snr is None else snr
        if not -math.inf < low <= high < math.inf:
            raise DataError(
                f"--snr is a range in dB from low to high, not from {low:g} to {high:g}"
            )
        self.sample_rate = sample_rate
        self.n_speakers = n_speakers
        self.length = round((4.0 if seconds is None else seconds) * sample_rate)
        self.size = 1000 if size is None else size
        self.seed = seed
        self.speeds = list(speeds)
        self.snr = (low, high)
        self.recordings = Recordings()
        self.speakers = list_speakers(root, self.recordings)  # {name: files}
        self.names = list(self.speakers)
        self.noise = [] if noise is None else self.recordings.add(list_audio(noise), noise)
        if n_speakers > len(self.names):
            raise DataError(f"{root} holds {len(self.names)} speakers, --n_speakers {n_speakers}")
        n_files = sum(len(files) for files in self.speakers.values())
        # Said when it is opened.
        self.found = f"{root}: {len(self.names)} speakers, {n_files} files"

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key) -> dict:
        epoch, index = epoch_and_index(key)
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, epoch, index])
        drawn = rng.choice(len(self.names), self.n_speakers, replace=False)
        chosen = [self.names[i] for i in drawn]
        sources = np.stack([self._speech(rng, name) for name in chosen])  # [S, T], of equal level
        sources = (sources * self._levels(rng)).astype(np.float32)
        mixture = sources.sum(0)
        parts = [mixture, *sources]
        if self.noise:  # drawn last: the speech of a mixture is the same with noise and without
            noise = self._segment(rng, self.noise, "the noise", speeds=[100], pauses=False)
            snr = rng.uniform(*self.snr)
            noise *= np.linalg.norm(mixture) / np.linalg.norm(noise) * 10 ** (-snr / 20)
            mixture = mixture + noise
            parts = [mixture, *sources, noise]
        # As in WSJ0-2mix, the loudest of mixture and parts peaks at 0.9.
        peak = max(np.abs(part).max() for part in parts)
        gain = np.float32(0.9 / peak)
        name = f"{index:04d}_{'_'.join(chosen)}"
        return {"mixture": mixture * gain, "sources": sources * gain, "name": name}

    def _levels(self, rng) -> np.ndarray:
        """A factor for each source, [S, 1]."""
        half = rng.uniform(0, self.level_range) / 2
        between = rng.uniform(-half, half, self.n_speakers - 2)
        decibels = np.array([half, -half, *between])
        return 10 ** (decibels[:, None] / 20)

    def _speech(self, rng, name: str) -> np.ndarray:
        files = self.speakers[name]
        return self._segment(rng, files, f"speaker {name}", self.speeds, pauses=True)

    def _segment(self, rng, files: list, owner: str, speeds: list, pauses: bool) -> np.ndarray:
        """[T] with a standard deviation of 1. Raises DataError where `owner` is silent."""
        for _ in range(20):  # a long recording may pause for a whole segment
            speed = speeds[rng.integers(len(speeds))]
            segment = self._join(rng, files, speed, pauses)
            if segment.std() > 1e-4:
                return segment / segment.std()
        raise DataError(f"20 segments of {owner} in a row were silent: check the recordings")

    def _join(self, rng, files: list, speed: int, pauses: bool) -> np.ndarray:
        """[T] at one speed: part of a long recording, or short ones, with pauses or without."""
        pieces = []
        missing = self.length
        while missing > 0:
            path = files[rng.integers(len(files))]
            frames, rate = self.recordings.headers[path]
            # Played at `speed` percent, a recording looks like one of a higher or lower rate.
            from_rate = rate * speed
            to_rate = self.sample_rate * 100
            wanted = math.ceil(missing * from_rate / to_rate)
            start = int(rng.integers(max(frames - wanted, 0) + 1))
            piece = self.recordings.read(path, start, min(wanted, frames))
            pieces.append(resample(piece, from_rate, to_rate)[:missing])
            missing -= len(pieces[-1])
            if pauses:
                pause = int(rng.integers(0.05 * self.sample_rate, 0.3 * self.sample_rate))
                pieces.append(np.zeros(pause, np.float32))
                missing -= pause
        return np.concatenate(pieces)[: self.length]


class FixedMixtures:
    """A folder with `mix` (or `mix_clean`, `mix_both`), `s1`, `s2` ... of files of the same names.

    seconds: None for whole mixtures; else random segments of that length, for training, whose
        sources are played at one of the `speeds` (percent), and whose noise stays as it is.
    size: of whole mixtures, how many, evenly spaced; None for all.
    mix_folder: the first of MIX_FOLDERS that is there, if not given.
    Raises DataError where the layout, the number of speakers, a file, a rate or a length doesn't
    fit: of mixtures when the set is opened, of their sources when they are read.
    """

    def __init__(
        self,
        root,
        sample_rate: int,
        n_speakers: int = 2,
        *,
        seconds: float | None = None,
        size: int | None = None,
        seed: int = 0,
        speeds=(100,),
        noise=None,
        snr=None,
        mix_folder=None,
    ):
        if noise is not None or snr is not None:
            raise DataError(f"{root} is a fixed set: --noise and --snr don't apply to it")
        check_speeds(speeds)
        root = Path(root)
        mix_folder = mix_folder or find_mix_folder(root)
        if mix_folder is None or not (root / mix_folder).is_dir():
            raise DataError(f"{root} has no folder {mix_folder or 'mix'}: give a fixed set")
        self.sample_rate = sample_rate
        self.length = None if seconds is None else round(seconds * sample_rate)
        self.seed = seed
        self.speeds = list(speeds)
        source_folders = sorted(path for path in root.glob("s[1-9]") if path.is_dir())
        self.folders = [root / mix_folder, *source_folders]
        self.n_speakers = len(source_folders)
        if self.n_speakers != n_speakers:
            raise DataError(f"{root} has {self.n_speakers} speakers a mixture, not {n_speakers}")
        names = [folder.name for folder in source_folders]
        if names[-1] != f"s{n_speakers}":
            raise DataError(f"{root} has {', '.join(names)}: number its folders of sources from s1")
        self.recordings = Recordings()
        files = [path for path in list_audio(self.folders[0]) if path.parent == self.folders[0]]
        self.files = self.recordings.add(files, self.folders[0], tolerated=0.0)
        for folder in source_folders:
            missing = {path.name for path in self.files} - {path.name for path in folder.iterdir()}
            if missing:
                path = folder / min(missing)
                raise DataError(f"{path} is missing, which {self.folders[0]} needs as a reference")
        stems = set()
        for path in self.files:
            frames, rate = self.recordings.headers[path]
            self._check_rate(path, rate)
            if frames < 0.1 * rate:
                raise DataError(
                    f"{path} lasts {frames / rate:.3f} s: give mixtures of 0.1 s or more"
                )
            if path.stem in stems:
                raise DataError(f"{self.folders[0]} has two mixtures {path.stem}: rename one")
            stems.add(path.stem)
        self.found = f"{self.folders[0]}: {len(self.files)} mixtures of {n_speakers} speakers"
        if seconds is None and size is not None and size < len(self.files):
            chosen = np.linspace(0, len(self.files) - 1, size).round().astype(int)
            self.files = [self.files[k] for k in chosen]

    @staticmethod
    def fits(root) -> bool:
        return find_mix_folder(root) is not None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key) -> dict:
        epoch, index = epoch_and_index(key)
        path = self.files[index]
        mixture, *sources = self._read(path.name)
        sources = np.stack(sources)
        if self.length is not None:
            rng = np.random.default_rng([self.seed, epoch, index])
            mixture, sources = self._cut(rng, mixture, sources)
        return {"mixture": mixture, "sources": sources, "name": path.stem}

    def _read(self, name: str) -> list[np.ndarray]:
        """The mixture and its sources, each [T]."""
        signals = []
        for folder in self.folders:
            audio, rate = read_audio(folder / name)
            self._check_rate(folder / name, rate)
            if signals and len(audio) != len(signals[0]):
                lengths = f"{len(audio)} samples, its mixture {len(signals[0])}"
                raise DataError(f"{folder / name} has {lengths}: make the set anew")
            signals.append(audio)
        return signals

    def _check_rate(self, path, rate: int) -> None:
        if rate != self.sample_rate:
            here = f"the model works at {self.sample_rate} Hz"
            raise DataError(f"{path} is at {rate} Hz, {here}: resample the set")

    def _cut(self, rng, mixture: np.ndarray, sources: np.ndarray):
        """A random segment of both, its sources played at other speeds."""
        speeds = [self.speeds[rng.integers(len(self.speeds))] for _ in sources]
        start = int(rng.integers(max(len(mixture) - self.length, 0) + 1))
        noise = mixture - sources.sum(0)
        cuts = np.zeros((1 + len(sources), self.length), np.float32)  # the noise comes first
        for cut, signal, speed in zip(cuts, [noise, *sources], [100, *speeds]):
            wanted = math.ceil(self.length * speed / 100)
            part = resample(signal[start : start + wanted], speed, 100)[: self.length]
            cut[: len(part)] = part  # near the end, a faster source ends early, in silence
        return cuts.sum(0), cuts[1:]


def find_mix_folder(root) -> str | None:
    """The name of the folder of mixtures in a fixed set."""
    for name in MIX_FOLDERS:
        if (Path(root) / name).is_dir():
            return name
    return None


# Of which the first that fits a folder opens it; what fits none is a folder of speakers. Each is a
# class with `fits`, the arguments of the two above, and `n_speakers`, `sample_rate` and `found`, a
# line that says what it is of.
DATASETS = [FixedMixtures]


def open_mixtures(root, sample_rate: int, n_speakers: int = 2, **settings):
    """The dataset in DATASETS that fits a folder, or one of speakers. Raises DataError."""
    if not Path(root).is_dir():
        raise DataError(f"no folder {root}: give one with a folder per speaker, or a fixed set")
    for dataset in DATASETS:
        if dataset.fits(root):
            return dataset(root, sample_rate, n_speakers, **settings)
    return SpeakerMixtures(root, sample_rate, n_speakers, **settings)


def check_speeds(speeds) -> None:
    if not speeds or not all(25 <= speed <= 400 for speed in speeds):
        raise DataError(f"speeds are percentages from 25 to 400, not {list(speeds)}")


def epoch_and_index(key) -> tuple[int, int]:
    """An item's key is its index, or (epoch, index); the index alone is of epoch 0."""
    return key if isinstance(key, tuple) else (0, key)


class Replaced:
    """A dataset for training, in which the next mixture takes the place of one that can't be made.

    Its items have two entries more: `broken`, why mixtures were passed over, a line each, and
    `position`, a number in [0, 1) that says where train.py's crop for the loss begins. Raises
    DataError after 100 in a row.
    """

    def __init__(self, mixtures):
        self.mixtures = mixtures

    def __len__(self) -> int:
        return len(self.mixtures)

    def __getitem__(self, key) -> dict:
        epoch, index = epoch_and_index(key)
        position = np.random.default_rng([epoch, index, 1]).random(dtype=np.float32)
        reasons = []
        while len(reasons) < 100:
            try:
                item = self.mixtures[epoch, (index + len(reasons)) % len(self)]
                return {**item, "broken": "\n".join(reasons), "position": position}
            except DataError as error:
                reasons.append(str(error))
        raise DataError(f"100 mixtures in a row can't be made: {reasons[-1]}")


# Recordings ---------------------------------------------------------------------------------------


def list_audio(folder) -> list[Path]:
    """The recordings below a folder, hidden ones passed over. Raises DataError if it is none."""
    if not Path(folder).is_dir():
        raise DataError(f"no folder {folder}: check the path")
    found = []
    for path in sorted(Path(folder).rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        dead = path.is_symlink() and not path.exists()  # listed, so that opening it names it
        if path.suffix.lower() in AUDIO_SUFFIXES and not hidden and (path.is_file() or dead):
            found.append(path)
    return found


def list_speakers(root, recordings: "Recordings") -> dict[str, list[Path]]:
    """The recordings of each speaker's folder below `root`. Raises DataError if it is no such."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"no folder {root}: give one with a folder per speaker")
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    speakers = {folder.name: list_audio(folder) for folder in folders}
    speakers = {name: files for name, files in speakers.items() if files}
    wrong = sorted(name for name in speakers if name.split("-")[0] in SPLITS)
    if wrong or {"s1", "s2"} <= speakers.keys():
        name = wrong[0] if wrong else "s1"
        raise DataError(f"{root} holds {name}, which is no speaker: give a folder of speakers")
    if len(speakers) < 2:
        what = f"{root} holds {len(speakers)} folders with wav, flac, ogg or opus files"
        raise DataError(
            f"{what}, at least 2 are needed, one a speaker: recipes.librispeech makes them of "
            f"LibriSpeech's files"
        )
    readable = set(recordings.add([path for files in speakers.values() for path in files], root))
    speakers = {name: [f for f in files if f in readable] for name, files in speakers.items()}
    return {name: files for name, files in speakers.items() if files}


class Recordings:
    """Recordings whose lengths are known, and which are kept in memory if all of them fit.

    Decoding is most of the time of making a mixture.
    """

    MAX_KEPT = 10**8  # samples, 400 MB in each data worker

    def __init__(self):
        self.headers = {}  # {path: (samples, sample rate)}
        self.kept = {}  # {path: [T]}
        self.fit = True

    def add(self, paths: list[Path], where, tolerated: float = 0.1) -> list[Path]:
        """Reads the headers of recordings in parallel and returns those that can be read.

        Others are named and passed over. Raises DataError if they are more than the share
        `tolerated`, or if there are none at all.
        """
        with ThreadPoolExecutor() as pool:
            answers = pool.map(read_header, paths)
            bar = tqdm(answers, "opening", len(paths), unit="file", delay=1, leave=False)
            answers = dict(zip(paths, bar))
        broken = [path for path, answer in answers.items() if isinstance(answer, str)]
        for path in broken[:10]:
            tqdm.write(f"passed over: {path} ({answers[path]})", file=sys.stderr)
        if not paths:
            raise DataError(f"{where} holds no wav, flac, ogg or opus files: give another")
        if len(broken) > tolerated * len(paths):
            what = f"{len(broken)} of {len(paths)} recordings in {where} can't be read"
            raise DataError(f"{what}, {broken[0]} the first: check or remove them")
        for path in broken:
            del answers[path]
        self.headers.update(answers)
        self.fit = sum(frames for frames, _ in self.headers.values()) < self.MAX_KEPT
        return list(answers)

    def read(self, path, start: int, frames: int) -> np.ndarray:
        """Part of a recording, [frames]. Raises DataError if it can't be read after all."""
        if not self.fit:
            return read_audio(path, start, frames)[0]
        if path not in self.kept:
            self.kept[path], _ = read_audio(path)
        return self.kept[path][start : start + frames]


def read_header(path) -> tuple[int, int] | str:
    """(samples, sample rate) of a recording, or why it can't be read."""
    try:
        info = sf.info(path)
    except (OSError, RuntimeError, UnicodeError, TypeError) as error:  # of its name; of a .raw file
        return first_line(error)
    return (info.frames, info.samplerate) if info.frames else "no samples"


def read_audio(path, start: int = 0, frames: int = -1) -> tuple[np.ndarray, int]:
    """A recording, or `frames` of it from `start`, mixed down: ([T] float32, its sample rate).

    Raises DataError for anything that is not a whole, finite recording.
    """
    try:
        with sf.SoundFile(path) as file:
            rate = file.samplerate
            expected = file.frames - start if frames < 0 else frames
            if start:
                file.seek(start)  # not for 0, since GSM files can't seek at all
            audio = file.read(expected, dtype="float32", always_2d=True)  # [T, channels]
    except (OSError, RuntimeError, UnicodeError, TypeError) as error:  # as in `read_header`
        reason = first_line(error) if os.path.exists(path) else "no such file"
        raise DataError(f"can't read {path} as audio ({reason}): check or remove it") from None
    if len(audio) == 0 or len(audio) < expected:
        raise DataError(f"{path} is empty or truncated: replace or remove it")
    if not np.isfinite(audio).all():
        raise DataError(f"{path} holds NaN or infinite samples: replace or remove it")
    return audio.mean(1), rate


def resample(audio: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Band-limited rational resampling of [T] by SciPy's polyphase filter, rounded up."""
    if from_rate == to_rate:
        return audio
    divisor = math.gcd(from_rate, to_rate)
    up = to_rate // divisor
    down = from_rate // divisor
    return resample_poly(audio, up, down, window=resampling_filter(max(up, down))).astype(
        np.float32
    )


@lru_cache(maxsize=64)
def resampling_filter(factor: int) -> np.ndarray:
    """SciPy's own filter, which it designs anew in every call, a seventh of a mixture's time."""
    return firwin(20 * factor + 1, 1 / factor, window=("kaiser", 5.0)).astype(np.float32)
