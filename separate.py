"""Separates recordings of any length into one file per speaker.

    python separate.py meeting.wav                separated/meeting_s1.wav, meeting_s2.wav
    python separate.py folder --ckpt FILE         every recording below a folder, by another model
    python separate.py call.dac                   separated/call_s1.dac, call_s2.dac: codes to codes

Sample rates from 1 to 192 kHz; several channels are mixed down. What libsndfile can't read (m4a,
mp4, webm ...) is decoded by ffmpeg where that is installed. The outputs are mono, at the rate and
length of the recording, each as loud as it is in the mix. An estimate can be louder than the
mixture, so they are 32-bit float, in which nothing clips.

What is unusual:
- Above 90 s a recording is separated in windows that overlap by 10 s. Which speaker comes first is
  decided anew in each, so windows are put in the order that fits what they share, and faded over.
- Files of codes (dac_file.py) are never decoded: codes to latents, masks, latents to codes.

What the model can't know: that only one speaker is there. It splits him in two.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from tqdm import tqdm

from checkpoint import load_separator
from codecformer import estimate_latents, separate
from dac_file import check_codes, chunk_stride, read_codes, write_codes
from data import DataError, read_audio, resample
from losses import pit
from program import (
    ASSETS,
    Parser,
    UserError,
    choose_device,
    choose_threads,
    locate,
    portable,
    run_program,
    whole_file,
)

# Seconds of a long recording that are separated at a time, and of them shared with the next. What
# attention makes of a moment depends on all that it sees: on three mixtures of 200 s of validation
# voices, windows of 30, 60 and 90 s agree with the whole to 23, 26 and 30 dB SI-SDR, and each is as
# near to the sources as the whole (within 0.1 dB).
WINDOW = 90
OVERLAP = 10

READ_DIRECTLY = {
    ".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64", ".rf64", ".caf",
}  # fmt: skip
READ_BY_FFMPEG = {
    ".m4a", ".aac", ".mp4", ".webm", ".mkv", ".mka", ".mov", ".wma", ".amr", ".3gp",
}  # fmt: skip
CODES = ".dac"


# One recording ------------------------------------------------------------------------------------


def separate_file(model, codec, path: Path, targets: list[Path], rvq=(False, False)) -> None:
    """Separates a recording into one file per speaker; what is held at a time is one window.

    rvq: whether it lies before and after the separator. Raises DataError for what is no recording,
    one shorter than 0.1 s, and rates that the codec can't take.
    """
    with readable(path) as source, ExitStack() as stack:
        info = sf.info(source, verbose=True)
        length = info.frames
        rate = info.samplerate
        if not 1000 <= rate <= 192000:
            raise DataError(f"{path} is at {rate} Hz, it must lie in 1000 to 192000: resample it")
        if length > 2**36:  # more than FLAC can state: libsndfile's word for an unknown length
            raise DataError(f"{path} doesn't say how long it is: convert it to WAV")
        if length == 0:
            raise DataError(f"{path} holds no sound, or is cut off: check or replace it")
        if length < 0.1 * rate:
            raise DataError(f"{path} lasts {length / rate:.3f} s, at least 0.1 s is needed")
        if "should be" in info.extra_info:  # libsndfile's remark on a length in the header
            warn(f"{path} is cut off: it holds {length / rate:.2f} s, less than its header says")
        if info.channels > 1 and channels_differ(source, length, rate):
            warn(f"the {info.channels} channels of {path} differ, and are mixed to one first")
        files = [stack.enter_context(audio_writer(t, rate, length)) for t in targets]
        starts = window_starts(length, rate)
        following = [*starts[1:], length]
        tail = np.zeros((len(targets), 0), np.float32)  # of the estimates so far, still to be faded
        bar = tqdm(starts, desc=path.name, unit="window", leave=False, disable=len(starts) < 2)
        for start, next_start in zip(bar, following):
            audio, _ = read_audio(source, start, min(WINDOW * rate, length - start))
            loudest = np.abs(audio).max()
            if not loudest < 1e15:  # not a number either; and its square must stay one
                raise DataError(f"{path} peaks at {loudest:.0e}, full scale is 1: scale it down")
            estimates = separate_window(model, codec, audio, rate, rvq)
            estimates = join(tail, estimates)
            n_final = next_start - start
            for file, estimate in zip(files, estimates):
                file.write(estimate[:n_final])
            tail = estimates[:, n_final:]


@torch.no_grad()
def separate_window(model, codec, audio: np.ndarray, rate: int, rvq=(False, False)) -> np.ndarray:
    """[T] at any rate -> estimates [S, T], as loud as they are in it."""
    # A constant offset would be most of the power, and what is left too quiet for the model.
    offset = audio.mean(dtype=np.float64).astype(np.float32)
    # `separate` brings each window to the codec's level by itself, as mixtures are in training:
    # quiet parts of a recording then reach the separator as loud as the others.
    mixture = torch.from_numpy(resample(audio - offset, rate, codec.sample_rate))
    estimates = separate(model, codec, mixture[None].to(codec.device), *rvq)[0].cpu().numpy()
    # Resampling there and back never loses a sample: it rounds up.
    estimates = [resample(e, codec.sample_rate, rate)[: len(audio)] for e in estimates]
    return np.stack(estimates) + offset / len(estimates)


@torch.no_grad()
def separate_codes(model, codec, path: Path, targets: list[Path]) -> None:
    """Separates a file of codes into one per speaker, never decoding.

    Raises UserError for what is no such file, or one of another codec than the separator's.
    """
    if not model.on_latents:
        raise UserError(f"{path} holds codes, this separator works on waveforms: change --ckpt")
    file = read_codes(path)
    check_codes(file, path, codec)
    codec.use_codebooks(len(file.codes))  # the answers are sent at the rate of what came
    if file.padding:
        codes = separate_whole_codes(model, codec, file.codes)
    else:
        stride = round(chunk_stride(file, codec) / codec.hop)
        codes = separate_chunks(model, codec, file.codes, file.chunk_length, stride)
    codec.use_codebooks(codec.network.n_codebooks)
    for target, of_speaker in zip(targets, codes):
        write_codes(replace(file, codes=of_speaker), target)


def separate_whole_codes(model, codec, codes: torch.Tensor) -> torch.Tensor:
    """Codes [N, F] -> those of each speaker [S, N, F], in windows as waveforms are."""
    length = codes.shape[-1]
    rate = round(codec.frame_rate)
    starts = window_starts(length, rate)
    following = [*starts[1:], length]
    tail = None  # of the estimated latents so far, still to be faded
    before = None  # the second before the window: what makes codes may look around
    pieces = []
    for start, next_start in zip(starts, following):
        window = codes[None, :, start : start + WINDOW * rate].to(codec.device)
        estimates = estimate_latents(model, codec, codec.from_codes(window))[0]  # [S, D, F]
        estimates = estimates.cpu().numpy()
        if tail is None:
            before = estimates[..., :0]
        else:
            estimates = join(tail, estimates)
        n_final = next_start - start
        n_before = before.shape[-1]
        around = np.concatenate([before, estimates[..., : n_final + rate]], axis=-1)
        sent = codec.to_codes(torch.from_numpy(around).to(codec.device))
        pieces.append(sent[..., n_before : n_before + n_final])
        before = estimates[..., max(n_final - rate, 0) : n_final]
        tail = estimates[..., n_final:]
    return torch.cat(pieces, dim=-1)


def separate_chunks(model, codec, codes: torch.Tensor, length: int, stride: int) -> torch.Tensor:
    """Codes [N, F] in chunks of `length` frames, about `stride` frames apart -> [S, N, F].

    Each is separated by itself. The frames of two chunks needn't lie on one grid, so what the two
    share is compared by its magnitude, as energies are, to find out who is who. (Not measured with
    DAC's own weights, which couldn't be had.)
    """
    pieces = []
    before = None
    for start in range(0, codes.shape[-1], length):
        chunk = codes[None, :, start : start + length].to(codec.device)
        estimates = estimate_latents(model, codec, codec.from_codes(chunk))[0]  # [S, D, F]
        if before is not None and stride < length:
            shared = before[..., stride:].abs().cpu().numpy()
            again = estimates[..., : length - stride].abs().cpu().numpy()
            estimates = estimates[best_order(shared, again)]
        pieces.append(codec.to_codes(estimates))
        before = estimates
    return torch.cat(pieces, dim=-1)


def window_starts(length: int, rate: int) -> list[int]:
    """The samples at which windows begin; one window where `length` samples fit into it."""
    # In whole seconds, so that 50 frames a second fall where they do in the whole. The last window
    # is as long as the others but for less than a second, and shares more with the one before: a
    # short one would hold little to go by.
    last = max(-(-length // rate) - WINDOW, 0)
    seconds = [*range(0, last, WINDOW - OVERLAP), last]
    return [second * rate for second in seconds]


def best_order(before: np.ndarray, again: np.ndarray) -> np.ndarray:
    """Which of the estimates `again` [S, ...] is each of those `before`, [S]."""
    # By squared error, not SI-SDR: where one speaker is silent, the others decide.
    difference = again[:, None] - before  # [S, S, ...]
    n_speakers = len(before)
    error = np.square(difference).reshape(n_speakers, n_speakers, -1).sum(-1, dtype=np.float64)
    _, assignment = pit(torch.from_numpy(error)[None])
    return assignment[0].numpy()


def join(tail: np.ndarray, estimates: np.ndarray) -> np.ndarray:
    """The estimates [S, ..., T] of a window in the order of those before, faded over from them.

    tail: [S, ..., L], what those before say of the window's first L steps.
    """
    overlap = tail.shape[-1]
    estimates = estimates[best_order(tail, estimates[..., :overlap])]
    fade = np.linspace(0, 1, overlap, dtype=np.float32)
    faded = tail + fade * (estimates[..., :overlap] - tail)
    return np.concatenate([faded, estimates[..., overlap:]], axis=-1)


def channels_differ(source: Path, length: int, rate: int) -> bool:
    """Whether the channels of a recording's first minute differ from their mean, above -40 dB."""
    try:
        audio, _ = sf.read(source, frames=min(length, 60 * rate), dtype="float32", always_2d=True)
    except (OSError, RuntimeError):
        return False  # damaged, which reading it will say
    mono = audio.mean(1, keepdims=True)
    return np.square(audio - mono).sum() > 1e-4 * np.square(audio).sum()


def warn(message: str) -> None:
    tqdm.write(f"note: {message}", file=sys.stderr)


# Files --------------------------------------------------------------------------------------------


@contextmanager
def readable(path: Path):
    """Context: the path of a recording that libsndfile reads, `path` or what ffmpeg makes of it.

    Raises DataError that says what is read and how to convert.
    """
    if not path.is_file():
        raise DataError(f"{path} is no file: give recordings, or folders of them")
    try:
        sf.info(path)
        known = True
    except (RuntimeError, UnicodeError, TypeError):  # of its name; of a .raw file
        known = False
    if known:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "decoded.wav"
        options = "-vn -c:a pcm_f32le -rf64 auto".split()
        command = ["ffmpeg", "-nostdin", "-i", path.resolve(), *options, converted]
        found = shutil.which("ffmpeg") is not None
        if not found or subprocess.run(command, capture_output=True).returncode:
            raise DataError(
                f"can't read {path} as audio: wav, flac, ogg, opus, mp3 and aiff are read, and "
                f"what ffmpeg decodes where it is installed; check it, or convert it to wav"
            )
        yield converted


@contextmanager
def audio_writer(path: Path, rate: int, length: int):
    """Context: a mono file to `write` to, which appears under its name only when it is whole.

    32-bit float, as WAV, or RF64 where `length` samples are more than WAV can hold (4 GB).
    Raises UserError if it can't be written.
    """
    kind = "WAV" if length < 1e9 else "RF64"
    with whole_file(path) as partial:
        with sf.SoundFile(partial, "w", rate, 1, "FLOAT", format=kind) as file:
            yield file


def find_recordings(paths: list[str], out: Path) -> dict[Path, Path]:
    """{recording: its path in `out`, without ending}, of files and of all below folders.

    Hidden files and those in `out` are passed over. Raises DataError for a folder without
    recordings.
    """
    found = {}
    for path in map(Path, paths):
        if not path.is_dir():
            found[path] = Path(path.stem)
            continue
        inside_it = {}
        out_is_below = path.absolute() in out.absolute().parents
        for file in sorted(path.rglob("*")):
            inside = file.relative_to(path)
            hidden = any(part.startswith(".") for part in inside.parts)
            known = READ_DIRECTLY | READ_BY_FFMPEG | {CODES}
            is_answer = out_is_below and out.absolute() in file.absolute().parents
            is_file = os.path.isfile(file) or os.path.islink(file)  # dead links are named later
            if file.suffix.lower() in known and is_file and not hidden and not is_answer:
                inside_it[file] = inside.with_suffix("")
        found.update(inside_it)
        if not inside_it:
            raise DataError(f"{path} holds no recordings: give files or another folder")
    return keep_apart(found)


def keep_apart(found: dict[Path, Path]) -> dict[Path, Path]:
    """Where outputs would share a name, adds the ending, the folder, or both."""
    for more in ("ending", "folder"):
        names = list(found.values())
        for file, name in found.items():
            if names.count(name) < 2:
                continue
            if more == "ending":
                found[file] = name.with_name(f"{name.name}_{file.suffix[1:]}")
            else:
                found[file] = Path(file.absolute().parent.name) / name
    return found


def name_targets(recordings: dict[Path, Path], out: Path, n_speakers: int, overwrite: bool) -> dict:
    """{recording: the file of each speaker}. Raises UserError where one would be written over."""
    targets = {}
    taken = {os.path.realpath(path) for path in recordings}
    for path, name in recordings.items():
        ending = CODES if path.suffix.lower() == CODES else ".wav"
        names = [f"{name.name}_s{k}{ending}" for k in range(1, n_speakers + 1)]
        targets[path] = [out / name.parent / target for target in names]
        for target in targets[path]:
            place = os.path.realpath(target)
            if place in taken:
                raise UserError(f"{target} would be written twice, or over an input: change --out")
            if os.path.exists(target) and not overwrite:
                raise UserError(f"{target} is there already: give --overwrite, or another --out")
            taken.add(place)
    return targets


def main() -> None:
    parser = Parser(description="Separates recordings into one file per speaker.")
    parser.add_argument("recordings", nargs="+", help="files, and folders that are searched")
    parser.add_argument(
        "--ckpt",
        default=portable(ASSETS / "separator.pt"),
        help="of train.py; it brings its codec (default: %(default)s)",
    )
    parser.add_argument("--codec", help="where the checkpoint's codec lies now, if it has moved")
    parser.add_argument("--out", default="separated", help="folder (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that are there")
    args = parser.parse_args()
    choose_threads(workers=0)
    if "" in [*args.recordings, args.out]:
        parser.error("one of the names is empty")
    out = Path(args.out)
    recordings = find_recordings(args.recordings, out)
    model, codec, checkpoint = load_separator(locate(args.ckpt), choose_device(), args.codec)
    targets = name_targets(recordings, out, model.config.n_speakers, args.overwrite)

    rvq = (checkpoint["quantize_before"], checkpoint["quantize_after"])
    failed = 0
    for path in tqdm(recordings, desc="separating", unit="file", disable=len(recordings) < 2):
        try:
            if path.suffix.lower() == CODES:
                separate_codes(model, codec, path, targets[path])
            else:
                separate_file(model, codec, path, targets[path], rvq)
        except UserError as error:
            failed += 1
            tqdm.write(f"error: {error}", file=sys.stderr)
    print(f"{len(recordings) - failed} recording(s) separated into {out}")
    if failed:
        raise UserError(f"{failed} of {len(recordings)} recording(s) were not separated, see above")


if __name__ == "__main__":
    run_program(main)
