"""Separates recordings of any length into one file per speaker.

    python separate.py meeting.wav                separated/meeting_s1.wav, separated/meeting_s2.wav
    python separate.py folder --ckpt FILE         every recording below a folder, by another model and its codec

Sample rates from 1 to 192 kHz, any channel count (mixed down). What libsndfile can't read (m4a, mp4, webm ...) is
decoded by ffmpeg where that is installed. The outputs are mono, as long and as loud as the mono mix, at its rate: an
estimate can be louder than the mixture, so they are 32-bit float, in which nothing clips.

What is unusual: above 90 s a recording is separated in windows that overlap by 10 s. Which speaker comes first is
decided anew in each, so windows are put in the order that fits what they share, and faded over.
"""

import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from tqdm import tqdm

from checkpoint import SettingsError, choose_device, load_separator, make_folder, run_program
from codecformer import separate
from dac_wrapper import ASSETS
from data import DataError, Parser, read_audio, resample
from losses import pit

# Seconds of a long recording that are separated at a time, and of them shared with the next. What attention makes of a
# moment depends on all that it sees: on three mixtures of 200 s of validation voices, windows of 30, 60 and 90 s agree
# with the whole to 23, 26 and 30 dB SI-SDR, and each is as near to the sources as the whole (within 0.1 dB).
WINDOW, OVERLAP = 90, 10
READ_DIRECTLY = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64", ".rf64", ".caf"}
READ_BY_FFMPEG = {".m4a", ".aac", ".mp4", ".webm", ".mkv", ".mka", ".mov", ".wma", ".amr", ".3gp"}


@contextmanager
def readable(path: Path):
    """Context: the path of a recording that libsndfile reads, `path` itself or what ffmpeg makes of it.

    Raises DataError that says what is read and how to convert.
    """
    if not path.is_file():
        raise DataError(f"{path} is no file: give recordings, or folders of them")
    try:
        sf.info(path)
    except RuntimeError:
        with tempfile.TemporaryDirectory() as folder:
            converted = Path(folder) / "decoded.wav"
            options = "-vn -c:a pcm_f32le -rf64 auto".split()
            command = ["ffmpeg", "-nostdin", "-i", path.resolve(), *options, converted]
            if shutil.which("ffmpeg") is None or subprocess.run(command, capture_output=True).returncode:
                raise DataError(
                    f"can't read {path} as audio: wav, flac, ogg, opus, mp3 and aiff are read, anything else where "
                    f"ffmpeg is installed and decodes it; check or convert it: ffmpeg -i {path.name} converted.wav"
                ) from None
            yield converted
    else:
        yield path


@contextmanager
def audio_writer(path: Path, rate: int, length: int):
    """Context: a mono file to `write` to, which appears under its name only when it is whole.

    32-bit float, as WAV, or RF64 where `length` samples are more than WAV can hold (4 GB).
    Raises SettingsError if it can't be written.
    """
    partial = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with sf.SoundFile(partial, "w", rate, 1, "FLOAT", format="WAV" if length < 1e9 else "RF64") as file:
            yield file
        os.replace(partial, path)
    except (OSError, sf.LibsndfileError) as error:
        raise SettingsError(f"can't write {path} ({error}): free space or choose another --out") from None
    finally:
        partial.unlink(missing_ok=True)


def window_starts(length: int, rate: int) -> list[int]:
    """The samples at which windows begin; one window where `length` samples fit into it."""
    # In whole seconds, so that 50 frames a second fall where they do in the whole. The last window is as long as the
    # others but for less than a second, and shares more with the one before: a short one would hold little to go by.
    last = max(-(-length // rate) - WINDOW, 0)
    return [second * rate for second in (*range(0, last, WINDOW - OVERLAP), last)]


def join(tail: np.ndarray, estimates: np.ndarray) -> np.ndarray:
    """The estimates [S, T] of a window in the order of those before, [S, L], faded over from them in L samples."""
    overlap = tail.shape[1]
    # By squared error, not SI-SDR: where one speaker is silent, the others decide.
    error = np.square(estimates[:, None, :overlap] - tail).sum(-1, dtype=np.float64)
    _, assignment = pit(torch.from_numpy(error)[None])
    estimates = estimates[assignment[0].numpy()]
    fade = np.linspace(0, 1, overlap, dtype=np.float32)
    return np.concatenate([tail + fade * (estimates[:, :overlap] - tail), estimates[:, overlap:]], axis=1)


@torch.no_grad()
def separate_window(model, codec, audio: np.ndarray, rate: int, rvq=(False, False)) -> np.ndarray:
    """[T] at any rate -> estimates [S, T], as loud as they are in it. rvq: before and after the separator."""
    # Each window is brought to the codec's level by itself, as mixtures are in training: quiet parts of a recording
    # then reach the separator as loud as the others.
    mixture = torch.from_numpy(resample(audio, rate, codec.sample_rate))[None].to(codec.device)
    estimates = separate(model, codec, mixture, *rvq)[0].cpu().numpy()
    # Resampling there and back never loses a sample: it rounds up.
    return np.stack([resample(e, codec.sample_rate, rate)[: len(audio)] for e in estimates])


def separate_file(model, codec, path: Path, targets: list[Path], rvq=(False, False)) -> None:
    """Separates a recording into one file per speaker; what is held at a time is one window.

    Raises DataError for what is no recording, one shorter than 0.1 s and rates the codec can't take.
    """
    with readable(path) as source, ExitStack() as stack:
        length, rate = sf.info(source).frames, sf.info(source).samplerate
        if not 1000 <= rate <= 192000:
            raise DataError(f"{path} has a sample rate of {rate} Hz, it must lie in 1000 to 192000: resample it")
        if length > 2**36:  # the most that FLAC can state; libsndfile gives more where nothing is stated
            raise DataError(f"{path} doesn't say how long it is: convert it to WAV")
        if length < 0.1 * rate:
            raise DataError(f"{path} lasts {length / rate:.3f} s, at least 0.1 s is needed")
        starts = window_starts(length, rate)
        files = [stack.enter_context(audio_writer(target, rate, length)) for target in targets]
        tail = np.zeros((len(targets), 0), np.float32)
        for start, following in zip(tqdm(starts, desc=path.name, unit="window", leave=False), [*starts[1:], length]):
            audio, _ = read_audio(source, start, min(WINDOW * rate, length - start))
            if not np.abs(audio).max() < 1e15:  # its square must stay a number
                raise DataError(f"{path} peaks at {np.abs(audio).max():.0e}, full scale is 1: scale it down")
            estimates = join(tail, separate_window(model, codec, audio, rate, rvq))
            for file, estimate in zip(files, estimates):
                file.write(estimate[: following - start])
            tail = estimates[:, following - start :]


def find_recordings(paths) -> dict[Path, Path]:
    """{recording: its path in --out, without ending}, of files and of all recordings below folders, not hidden ones."""
    found = {}
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in READ_DIRECTLY | READ_BY_FFMPEG)
            files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)]
            if not files:
                raise DataError(f"{path} holds no recordings: give files or another folder")
            found |= {file: file.relative_to(path).with_suffix("") for file in files}
        else:
            found[path] = Path(path.stem)
    return found


def main() -> None:
    parser = Parser(description="Separates recordings into one file per speaker.")
    parser.add_argument("recordings", nargs="+", help="files, and folders that are searched for files")
    parser.add_argument("--ckpt", default=str(ASSETS / "separator.pt"), help="of train.py; it brings its codec")
    parser.add_argument("--codec", help="where the checkpoint's codec lies now, if it has moved")
    parser.add_argument("--out", default="separated", help="folder to write to")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which lets files be cleared away
    recordings = find_recordings(args.recordings)
    model, codec, checkpoint = load_separator(args.ckpt, choose_device(), args.codec)
    targets, taken, out = {}, {path.resolve() for path in recordings}, Path(args.out)
    for path, name in recordings.items():
        targets[path] = [out / name.parent / f"{name.name}_s{k + 1}.wav" for k in range(model.config.n_speakers)]
        for target in targets[path]:
            if target.exists() or target.resolve() in taken:
                raise SettingsError(f"{target} would be written over: move it away, or give another --out")
            taken.add(target.resolve())
    make_folder(out)
    errors, rvq = [], (checkpoint["quantize_before"], checkpoint["quantize_after"])
    for path in tqdm(recordings, desc="separating", unit="file"):
        try:
            separate_file(model, codec, path, targets[path], rvq)
        except DataError as error:
            errors.append(str(error))
    print(f"{len(recordings) - len(errors)} recording(s) separated into {out}")
    if errors:
        raise DataError("\nerror: ".join(errors))


if __name__ == "__main__":
    run_program(main)
