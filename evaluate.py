"""Scores checkpoints on a set of mixtures, or separates the user's own recordings.

    python evaluate.py                           the bundled checkpoint on the bundled test mixtures
    python evaluate.py --ckpt FILE --data DIR    another checkpoint, another set (folders mix, s1, s2)
    python evaluate.py --situations --ckpt A B   the paper's table: A and B, each wherever it could be deployed
    python evaluate.py --cost                    parameters, MACs, seconds, memory of Codecformer and Sepformer
    python evaluate.py --mix FILE... --out DIR   two files FILE_s1.wav, FILE_s2.wav for each recording

Scoring prints a table with three rows - the mixture left alone, the clean source through the codec (the ceiling:
what this codec could reach at best) and the separator - and leaves in --out results.json, results.csv (a line per
row, mixture and source), the separated files in audio/ and index.html, a listening page that opens without a server.

- SI-SDR is against the clean source, SI-SDRi its gain over the mixture; SDR is BSS Eval's with 512 taps. PESQ is
  narrow band at 8 kHz, wide band at 16 kHz.
- A c in front (cSI-SDR) means: against the *transmitted* source, clean, encoded, quantised, decoded.
- Estimates are put in the order of the sources by the best mean SI-SDR, for each of the two references. A mixture's
  score is the mean over its sources; the interval is 1.96 standard errors over mixtures.
- Where estimates lag behind their reference (the median over all sources, by cross-correlation), the row is marked:
  a shift that nobody hears ruins SI-SDR.
"""

import base64
import collections
import copy
import csv
import ctypes
import functools
import html
import io
import json
import multiprocessing
import os
import platform
import re
import shlex
import signal
import string
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from codecformer import Codecformer, Sepformer, separate
from dac_wrapper import ASSETS, DAC_16KHZ, Codec, CodecError, measure_lag, random_dac
from data import MIX_FOLDERS, DataError, FixedMixtures, Parser, read_audio, resample
from losses import pairwise_negative_si_sdr, pit, reorder, si_sdr
from train import (
    SettingsError,
    build_model,
    check_codec,
    git_revision,
    load_checkpoint,
    open_mixtures,
    parse_args,
    restore_model,
    separation_loss,
    setup_process,
)

TITLES = {"si_sdr": "SI-SDR", "si_sdr_i": "SI-SDRi", "sdr": "SDR", "sdr_i": "SDRi", "pesq": "PESQ", "stoi": "STOI"}
COLUMNS = ["si_sdr", "si_sdr_i", "csi_sdr_i", "sdr_i", "pesq", "stoi"]
SITUATION_COLUMNS = [
    f"{reference}{metric}" for reference in ("", "c") for metric in ("si_sdr_i", "sdr_i", "pesq", "stoi")
]
# Where the separator stands (see `separate`), and whether the RVQ lies before and after it.
SITUATIONS = [("clean", 0, 0), ("transmitted", 1, 0), ("transmitted", 1, 1)] + [
    ("latents", before, after) for before in (0, 1) for after in (0, 1)
]
N_LISTEN = 8  # mixtures on the listening page, evenly spaced through the set

# Seconds of a long recording that are separated at a time, and of them shared with the next. What attention makes of a
# moment depends on all that it sees: on three mixtures of 200 s of validation voices, windows of 30, 60 and 90 s agree
# with the whole to 23, 26 and 30 dB SI-SDR, and each is as near to the sources as the whole (within 0.1 dB).
WINDOW, OVERLAP = 90, 10


def load_separator(ckpt, device, codec_name=None):
    """The model and codec of a checkpoint, and the checkpoint itself.

    Raises SettingsError if the codec is not the one that the separator was trained on, CodecError without one.
    """
    checkpoint = load_checkpoint(ckpt)
    codec = Codec.load(codec_name or checkpoint["codec"]["name"], checkpoint["sample_rate"], device)
    check_codec(checkpoint, ckpt, codec)
    return restore_model(checkpoint, ckpt).to(device).eval(), codec, checkpoint


def pesq_or_nan(source: np.ndarray, estimate: np.ndarray, rate: int) -> float:
    """PESQ of [T]; NaN at rates it isn't made for and where it finds no speech."""
    from pesq import NoUtterancesError, pesq

    try:
        return pesq(rate, source, estimate, "wb" if rate == 16000 else "nb") if rate in (8000, 16000) else np.nan
    except NoUtterancesError:
        return np.nan


def score(metric: str, estimates: np.ndarray, references: np.ndarray, rate: int) -> np.ndarray:
    """One of si_sdr, sdr (dB), pesq, stoi, lag (samples) of estimates [S, T] against references [S, T]; [S]."""
    from pystoi import stoi
    from torchmetrics.functional.audio import signal_distortion_ratio

    pair = torch.from_numpy(estimates), torch.from_numpy(references)
    if metric == "si_sdr":
        return si_sdr(*pair).numpy()
    if metric == "sdr":
        return signal_distortion_ratio(pair[0].double(), pair[1].double(), filter_length=512).numpy()
    if metric == "lag":  # within 20 ms
        return np.array([measure_lag(reference, estimate, rate // 50)[0] for estimate, reference in zip(*pair)])
    measure = {"pesq": pesq_or_nan, "stoi": stoi}[metric]
    return np.array([measure(reference, estimate, rate) for estimate, reference in zip(estimates, references)])


def score_rows(signals: dict, mixture, references: dict, columns: list[str], rate: int) -> dict:
    """The scores of every row's estimates [S, T]: {row: {column: [S]}}; runs in a process of its own.

    references: {"": clean sources [S, T], "c": transmitted ones}. The rows' lags are always among their scores.
    """
    torch.set_num_threads(1)
    rows = {row: {} for row in signals}
    for prefix, reference in references.items():
        mine = [c.removeprefix(prefix) for c in columns if (c[0] == "c") == bool(prefix)] + ["lag"] * (not prefix)
        before = {
            gain: score(gain.removesuffix("_i"), np.broadcast_to(mixture, reference.shape).copy(), reference, rate)
            for gain in mine
            if gain.endswith("_i")
        }
        for row, estimates in signals.items():
            pairwise = pairwise_negative_si_sdr(torch.from_numpy(estimates)[None], torch.from_numpy(reference)[None])
            ordered = estimates[pit(pairwise)[1][0].numpy()]
            for metric in mine:
                value = score(metric.removesuffix("_i"), ordered, reference, rate)
                rows[row][prefix + metric] = value - before.get(metric, 0)
    return rows


@torch.no_grad()
def separate_mixture(model, codec, checkpoint, item) -> tuple[dict, np.ndarray]:
    """The three rows' signals [S, T] for one item of a set, and the transmitted sources [S, T]."""
    mixture = torch.from_numpy(item["mixture"])[None].to(codec.device)
    sources = torch.from_numpy(item["sources"]).to(codec.device)
    before, after = checkpoint["quantize_before"], checkpoint["quantize_after"]
    estimates = separate(model, codec, mixture, before, after)
    _, assignment = pit(pairwise_negative_si_sdr(estimates, sources[None]))
    transmitted = codec.transmit(sources)
    signals = {
        "mixture, untouched": mixture.expand_as(sources),
        "clean source through the codec": transmitted if before or after else codec.transmit(sources, quantize=False),
        type(model).__name__: reorder(estimates, assignment)[0],
    }
    return {row: s.cpu().numpy() for row, s in signals.items()}, transmitted.cpu().numpy()


@torch.no_grad()
def separate_everywhere(models: dict, codec, item) -> tuple[dict, np.ndarray]:
    """As `separate_mixture`, with a row for every model in every one of the SITUATIONS."""
    mixture = torch.from_numpy(item["mixture"])[None].to(codec.device)
    sources = torch.from_numpy(item["sources"]).to(codec.device)
    transmitted = codec.transmit(sources)
    signals = {
        row_title("mixture", "clean", 0, 0): mixture.expand_as(sources),
        row_title("mixture", "transmitted", 1, 0): codec.transmit(mixture).expand_as(sources),
        row_title("source", "transmitted", 0, 0): codec.transmit(sources, quantize=False),
        row_title("source", "transmitted", 1, 0): transmitted,
    }
    for name, model in models.items():
        for situation, before, after in SITUATIONS:
            estimates = separate(model, codec, mixture, bool(before), bool(after), situation)
            signals[row_title(name, situation, before, after)] = estimates[0]
    return {row: s.cpu().numpy() for row, s in signals.items()}, transmitted.cpu().numpy()


def row_title(name: str, situation: str, before: int, after: int) -> str:
    rvq = " + ".join(["before"] * before + ["after"] * after) or "-"
    return f"{name:<28}{situation:<13}{rvq:<15}"


def score_set(dataset, separate_item, columns: list[str], rate: int, keep) -> list[dict]:
    """Separates every mixture here, scores it in other processes: a dictionary as `score_rows` returns for each.

    separate_item: item -> ({row: estimates [S, T]}, transmitted sources [S, T]); keep(index, item, signals) is
    called for each.
    """
    scores, pending = [], collections.deque()
    # Spawned, not forked: a fork of a process that runs torch's threads can hang.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for index in tqdm(range(len(dataset)), desc="scoring", unit="mixture"):
            item = dataset[index]
            signals, transmitted = separate_item(item)
            references = {"": item["sources"], "c": transmitted}
            pending.append(pool.submit(score_rows, signals, item["mixture"], references, columns, rate))
            keep(index, item, signals)
            if len(pending) > 4 * os.cpu_count():  # so that waiting signals don't fill the memory
                scores.append(pending.popleft().result())
        return scores + [future.result() for future in pending]


def summarise(scores: list[dict]) -> dict:
    """Per row and column mean and half-width of the 95 % interval over mixtures (those with a score), and the lag."""
    rows = {}
    for row in scores[0]:
        lag = np.median(np.concatenate([s[row]["lag"] for s in scores]))
        rows[row] = {"lag": {"median_samples": float(lag)}}
        for column in scores[0][row].keys() - {"lag"}:
            values = np.array([s[row][column].mean() for s in scores])
            values = values[np.isfinite(values)]
            mean = float(values.mean()) if len(values) else float("nan")
            ci95 = float(1.96 * values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
            rows[row][column] = {"mean": mean, "ci95": ci95}
    return rows


def format_table(rows: dict, columns: list[str], interval: bool = True) -> str:
    def cell(column, value):
        digits = 2 if column.endswith(("pesq", "stoi")) else 1
        text = f"{value['mean']:.{digits}f}" + f" ±{value['ci95']:.{digits}f}" * interval
        return text.rjust(13 if interval else 9)

    titles = [("c" if c[0] == "c" else "") + TITLES[c.removeprefix("c")] for c in columns]
    indent = max(32, *map(len, rows))
    lines = [" " * indent + "".join(title.rjust(13 if interval else 9) for title in titles)]
    for row, values in rows.items():
        lag = values["lag"]["median_samples"]
        mark = f"  shifted by {lag:+.0f} samples: SI-SDR and SDR are spoilt" if lag else ""
        lines.append(row.ljust(indent) + "".join(cell(c, values[c]) for c in columns) + mark)
    return "\n".join(lines)


def spectrogram_png(audio: np.ndarray, rate: int) -> bytes:
    """A picture of [T]: 32 ms windows, time to the right, frequency upwards, 70 dB of range."""
    from matplotlib.image import imsave
    from scipy.signal import stft

    window = round(0.032 * rate)
    power = 20 * np.log10(np.abs(stft(audio, rate, nperseg=window, noverlap=window * 3 // 4)[2]) + 1e-7)
    picture = io.BytesIO()
    imsave(picture, power[::-1], vmin=power.max() - 70, vmax=power.max(), cmap="magma", format="png")
    return picture.getvalue()


def listening_page(examples: list[dict], table: str, title: str) -> str:
    """One self-contained HTML page with a player and a spectrogram for every signal of the examples."""

    def embed(kind: str, content: bytes) -> str:
        return f"data:{kind};base64,{base64.b64encode(content).decode()}"

    def figure(name: str, audio: np.ndarray, rate: int) -> str:
        wav = io.BytesIO()
        sf.write(wav, np.clip(audio, -1, 1), rate, format="WAV", subtype="PCM_16")
        return (
            f"<figure><figcaption>{html.escape(name)}</figcaption>"
            f'<img alt="spectrogram of {html.escape(name)}" src="{embed("image/png", spectrogram_png(audio, rate))}">'
            f'<audio controls preload="metadata" src="{embed("audio/wav", wav.getvalue())}"></audio></figure>'
        )

    sections = []
    for example in examples:
        columns = [figure("mixture", example["mixture"], example["rate"])]
        for k, (source, estimate) in enumerate(zip(example["sources"], example["estimates"])):
            columns.append(figure(f"reference {k + 1}", source, example["rate"]))
            columns.append(figure(f"estimate {k + 1}", estimate, example["rate"]))
        gain = example["si_sdr_i"]
        sections.append(
            f"<h2>{html.escape(example['name'])}: SI-SDRi {gain:+.1f} dB</h2><section>{''.join(columns)}</section>"
        )
    page = string.Template((ASSETS / "page.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=html.escape(title), table=html.escape(table), examples="".join(sections),
        count=len(examples), khz=examples[0]["rate"] // 2000,
    )  # fmt: skip


def origin(path, checkpoint: dict) -> str:
    """What a checkpoint says of itself, in a line."""
    return (
        f"{path}: {checkpoint['separator']}, codec {checkpoint['codec']['name']} {checkpoint['codec']['fingerprint']}, "
        f"trained with {checkpoint['args']['loss']} on {checkpoint['args']['data']}, git {checkpoint['git']}"
    )


def open_set(args, codec, n_speakers: int) -> FixedMixtures:
    dataset = FixedMixtures(args.data, codec.sample_rate, mix=args.mix_folder)
    if dataset.n_speakers != n_speakers:
        raise SettingsError(f"{args.data} mixes {dataset.n_speakers} speakers, the separator has {n_speakers} outputs")
    return dataset


def machine(device) -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, {device.type}, torch {torch.__version__}"


def write_results(out: Path, rows: dict, dataset, scores: list[dict], codec, checkpoints: dict, command: str) -> None:
    """results.json: means and where they come from; results.csv: every score."""
    facts = ("separator", "config", "codec", "quantize_before", "quantize_after", "git", "args", "step")
    results = {
        "rows": {" ".join(row.split()): values for row, values in rows.items()},
        "n_mixtures": len(scores),
        "n_speakers": dataset.n_speakers,
        "command": command,
        "checkpoints": {os.path.relpath(path): {k: c[k] for k in facts} for path, c in checkpoints.items()},
        "codec": {k: getattr(codec, k) for k in ("name", "sample_rate", "codec_rate", "frame_rate", "bitrate", "lag")},
        "data": os.path.relpath(dataset.root),
        "machine": machine(codec.device),
        "git": git_revision(),
    }
    results = json.loads(json.dumps(results), parse_constant=lambda nan: None)  # JSON has no NaN
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    with open(out / "results.csv", "w", newline="") as file:
        writer = csv.writer(file)
        columns = list(next(iter(scores[0].values())))
        writer.writerow(["row", "mixture", "source", *columns])
        for path, mixture in zip(dataset.files, scores):
            for row, values in mixture.items():
                for source in range(dataset.n_speakers):
                    line = [f"{values[column][source]:.4f}" for column in columns]
                    writer.writerow([" ".join(row.split()), path.stem, source + 1, *line])


def evaluate(args, command: str) -> None:
    _, _, device = setup_process()
    ckpt = args.ckpt[0]
    model, codec, checkpoint = load_separator(ckpt, device, args.codec)
    if args.compile:
        model.compile()
    dataset = open_set(args, codec, model.config.n_speakers)
    out = Path(args.out or "results")
    make_folder(out / "audio")
    rate, examples = codec.sample_rate, {}
    listen = set(np.linspace(0, len(dataset) - 1, min(N_LISTEN, len(dataset))).astype(int).tolist())

    def keep(index, item, signals):
        *_, estimates = signals.values()
        for k, estimate in enumerate(estimates):
            write_audio(out / "audio" / f"{item['name']}_s{k + 1}.wav", estimate, rate)
        if index in listen:
            examples[index] = {**item, "rate": rate, "estimates": estimates}

    scores = score_set(dataset, lambda item: separate_mixture(model, codec, checkpoint, item), COLUMNS, rate, keep)
    rows = summarise(scores)
    *_, separator = rows
    for index, example in examples.items():
        example["si_sdr_i"] = scores[index][separator]["si_sdr_i"].mean()
    table = format_table(rows, COLUMNS)
    write_results(out, rows, dataset, scores, codec, {ckpt: checkpoint}, command)
    page = listening_page(list(examples.values()), table, f"{separator} on {Path(args.data).name}")
    (out / "index.html").write_text(page, encoding="utf-8")
    data, ckpt = os.path.relpath(args.data), os.path.relpath(ckpt)
    print(
        f"\n{len(scores)} mixtures of {dataset.n_speakers} speakers from {data}, {origin(ckpt, checkpoint)}\n\n{table}"
    )
    print(f"\nThe codec's lag of {codec.lag} samples at {codec.codec_rate} Hz is removed.")
    print(f"listen: {(out / 'index.html').resolve().as_uri()}")


def evaluate_situations(args, command: str) -> None:
    """The paper's table: every checkpoint in every situation, against clean and transmitted sources."""
    _, _, device = setup_process()
    checkpoints = {path: load_checkpoint(path) for path in args.ckpt}
    first = next(iter(checkpoints.values()))
    name = (
        args.codec or next((c for c in checkpoints.values() if c["separator"] == "codecformer"), first)["codec"]["name"]
    )
    codec = Codec.load(name, first["sample_rate"], device)
    models = {}
    for path, checkpoint in checkpoints.items():
        model = restore_model(checkpoint, path).to(device).eval()
        if not isinstance(model, Sepformer):  # that one works behind any codec
            check_codec(checkpoint, path, codec)
        if checkpoint["sample_rate"] != codec.sample_rate:
            raise SettingsError(
                f"{path} works at {checkpoint['sample_rate']} Hz, {args.ckpt[0]} at {codec.sample_rate}"
            )
        title = type(model).__name__
        models[title if title not in models else f"{title} {len(models) + 1}"] = model
    dataset = open_set(args, codec, model.config.n_speakers)
    if len({m.config.n_speakers for m in models.values()}) > 1:
        raise SettingsError("the checkpoints separate different numbers of speakers: give --ckpt those of one set")
    out = Path(args.out or "results_situations")
    make_folder(out)
    scores = score_set(
        dataset, lambda item: separate_everywhere(models, codec, item), SITUATION_COLUMNS, codec.sample_rate,
        lambda *_: None,
    )  # fmt: skip
    rows = summarise(scores)
    write_results(out, rows, dataset, scores, codec, checkpoints, command)
    for (title, path), checkpoint in zip(zip(models, checkpoints), checkpoints.values()):
        print(f"{title}: {origin(path, checkpoint)}")
    print(
        f"{len(scores)} mixtures from {os.path.relpath(args.data)}, codec {codec.name} ({codec.bitrate / 1000:.1f} "
        f"kbit/s quantised, lag of {codec.lag} samples removed).\n\n{row_title('separator', 'it hears', 0, 0)[:41]}RVQ"
    )
    print(format_table(rows, SITUATION_COLUMNS, interval=False))
    print(
        "\nit hears: clean = the mixture itself; transmitted = the mixture after the codec, as a waveform; latents ="
        "\nthe mixture's latents, and answers in latents (Sepformer decodes and encodes). Reference: the clean source;"
        "\nwith a c in front, the transmitted source. Improvements are over the clean mixture against that reference."
    )


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").touch()
        (path / ".writable").unlink()
    except OSError as error:
        raise SettingsError(f"can't write to {path} ({error.strerror}): choose another --out") from None


@contextmanager
def audio_writer(path: Path, rate: int, length: int):
    """Context: a mono file to `write` to, which appears under its name only when it is whole.

    32-bit float, so that nothing clips, as WAV, or RF64 where `length` samples are more than WAV can hold (4 GB).
    Raises SettingsError if it can't be written.
    """
    partial = path.with_suffix(".part")
    try:
        with sf.SoundFile(partial, "w", rate, 1, "FLOAT", format="WAV" if length < 1e9 else "RF64") as file:
            yield file
        os.replace(partial, path)
    except (OSError, sf.LibsndfileError) as error:
        raise SettingsError(f"can't write {path} ({error}): free space or choose another --out") from None
    finally:
        partial.unlink(missing_ok=True)


def write_audio(path: Path, audio: np.ndarray, rate: int) -> None:
    with audio_writer(path, rate, len(audio)) as file:
        file.write(audio)


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
def separate_window(model, codec, checkpoint, audio: np.ndarray, rate: int) -> np.ndarray:
    """[T] at any rate -> estimates [S, T], as loud as they are in it."""
    # Each window is brought to the codec's level by itself, as mixtures are in training: quiet parts of a recording
    # then reach the separator as loud as the others.
    mixture = torch.from_numpy(resample(audio, rate, codec.sample_rate))[None].to(codec.device)
    estimates = separate(model, codec, mixture, checkpoint["quantize_before"], checkpoint["quantize_after"])
    # Resampling there and back never loses a sample: it rounds up.
    return np.stack([resample(e, codec.sample_rate, rate)[: len(audio)] for e in estimates[0].cpu().numpy()])


def separate_file(model, codec, checkpoint, path: Path, targets: list[Path]) -> None:
    """Separates a recording of any length and channel count into one file per speaker.

    They have its rate and length and are as loud as in its mono mix. Windows overlap, and what is held at a time is
    one of them. Raises DataError for what is no recording, one shorter than 0.1 s and rates the codec can't take.
    """
    _, rate = read_audio(path, frames=1)
    length = sf.info(path).frames
    if not 1000 <= rate <= 192000:
        raise DataError(f"{path} has a sample rate of {rate} Hz, it must lie in 1000 to 192000: resample it")
    if length > 2**36:  # the most that FLAC can state; libsndfile gives more where nothing is stated
        raise DataError(f"{path} doesn't say how long it is: convert it to WAV")
    if length < 0.1 * rate:
        raise DataError(f"{path} lasts {length / rate:.3f} s, at least 0.1 s is needed")
    starts = window_starts(length, rate)
    with ExitStack() as stack:
        files = [stack.enter_context(audio_writer(target, rate, length)) for target in targets]
        tail = np.zeros((len(targets), 0), np.float32)
        for start, following in zip(tqdm(starts, desc=path.name, unit="window", leave=False), [*starts[1:], length]):
            audio, _ = read_audio(path, start, min(WINDOW * rate, length - start))
            if not np.abs(audio).max() < 1e15:  # its square must stay a number
                raise DataError(f"{path} peaks at {np.abs(audio).max():.0e}, full scale is 1: scale it down")
            estimates = join(tail, separate_window(model, codec, checkpoint, audio, rate))
            for file, estimate in zip(files, estimates):
                file.write(estimate[: following - start])
            tail = estimates[:, following - start :]


def separate_recordings(args) -> None:
    _, _, device = setup_process()
    model, codec, checkpoint = load_separator(args.ckpt[0], device, args.codec)
    if args.compile:
        model.compile()
    out = Path(args.out or "separated")
    targets = {}
    for path in map(Path, args.mix):
        for k in range(model.config.n_speakers):
            target = out / f"{path.stem}_s{k + 1}.wav"
            if target in targets or target.resolve() in {Path(p).resolve() for p in args.mix}:
                raise SettingsError(f"{path} would overwrite {target}: separate it into another --out")
            targets[target] = path
    make_folder(out)
    errors = []
    for path in tqdm([Path(p) for p in args.mix], desc="separating", unit="file"):
        try:
            separate_file(model, codec, checkpoint, path, [t for t, source in targets.items() if source == path])
        except DataError as error:
            errors.append(str(error))
    print(f"{len(args.mix) - len(errors)} recording(s) separated into {out}")
    if errors:
        raise DataError("\nerror: ".join(errors))


# What it costs -------------------------------------------------------------------------------------------------------


def count_macs(module: torch.nn.Module, *shape: int) -> float:
    """Multiply-accumulates of one call on an input of that shape, in units of 10^9.

    On the meta device, so that nothing is computed; with the plain attention kernel, the one that is counted whole.
    """
    module = copy.deepcopy(module).to("meta")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(torch.empty(*shape, device="meta"))
    return counter.get_total_flops() / 2e9


def median_seconds(calls: dict, repeats: int, device) -> dict:
    """Seconds of each call: the median over repeats, in turn, so that a machine's moods meet all of them alike."""
    seconds = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def peak_megabytes(call, device) -> float:
    """Memory that one call takes beside what was there before; on a CPU as Linux reports it, NaN elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier calls freed must not hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
        read = lambda key: int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # noqa: E731
        before = read("VmRSS")
        call()
        return (read("VmHWM") - before) * 1024 / 1e6
    except OSError:
        return float("nan")


def time_training_steps(dac_16khz, bundled: tuple, device) -> dict:
    """Seconds of one update at batch 1 and 4 s of 8 kHz, for Sepformer and each way to train the paper's Codecformer.

    "bundled": the defaults of train.py, in seconds per mixture.
    """
    paper = [f"@{Path(__file__).parent / 'config' / 'wsj0_2mix.txt'}", "--threshold=-1e9"]
    ways = {
        "sepformer": [*paper, "--model", "sepformer", "--n_layers", "8", "--dropout", "0"],
        "si_sdr_whole_segment": paper,
        "si_sdr": [*paper, "--loss_seconds", "0.5"],
        "csi_sdr": [*paper, "--loss_seconds", "0.5", "--loss", "csi_sdr"],
        "embedding_whole_segment": [*paper, "--loss", "embedding"],
        "embedding": [*paper, "--loss_seconds", "0.5", "--loss", "embedding"],
        "embedding_cached": [*paper, "--loss", "embedding"],
        "bundled": [],
    }

    def step(model, codec, optimizer, flags, batch):
        separation_loss(model, codec, batch, flags, device).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), flags.clip)
        optimizer.step()
        optimizer.zero_grad()

    calls, models = {}, {}
    for way, extra in ways.items():
        flags = parse_args(extra)
        codec = bundled[1] if way == "bundled" else dac_16khz
        key = way == "bundled", flags.model
        if key not in models:
            model = copy.deepcopy(bundled[0]).train() if way == "bundled" else build_model(flags, codec).to(device)
            models[key] = model, codec, torch.optim.Adam(model.parameters(), lr=1e-6)
        if way == "embedding_cached":
            batch = {"latents": torch.randn(1, 3, codec.latent_dim, 200)}
        else:
            sources = 0.1 * torch.randn(flags.batch_size, 2, round(flags.seconds * flags.sample_rate))
            batch = {"mixture": sources.sum(1), "sources": sources}
        calls[way] = functools.partial(step, *models[key], flags, batch)
    median_seconds(calls, 1, device)  # warms up
    seconds = median_seconds(calls, 3, device)
    return {**seconds, "bundled": seconds["bundled"] / parse_args([]).batch_size}


@torch.no_grad()
def time_inference(bundled: tuple, dac_16khz, compiled: bool, device) -> list[dict]:
    """A row for each system and length: parameters, GMAC, seconds, real-time factor, megabytes."""
    paper, sepformer = Codecformer().to(device).eval(), Sepformer().to(device).eval()
    rows = []
    for seconds in (1, 4, 8, 60):
        n = 8000 * seconds
        wav = 0.1 * torch.randn(1, n, device=device)
        systems = {}  # name: (modules, GMAC of encoder, separator and decoder, call)
        for kind, model, codec in (("paper", paper, dac_16khz), ("bundled", *bundled)):
            latents, dac = codec.encode(wav), codec.dac
            encoder = count_macs(dac.encoder, 1, 1, latents.shape[-1] * codec.hop)
            separator = count_macs(model, *latents.shape)
            decoder = count_macs(dac.decoder, *latents.shape)
            macs = 0, separator, 0
            systems[f"Codecformer {kind}, latents to latents"] = (
                [model], macs, lambda m=model, z=latents: m(z) * z[:, None]
            )  # fmt: skip
            if compiled:
                systems[f"Codecformer {kind} compiled, latents to latents"] = (
                    [model], macs, lambda m=torch.compile(model), z=latents: m(z) * z[:, None]
                )  # fmt: skip
            systems[f"Codecformer {kind}, wav to wav"] = (
                [model, dac], (encoder, separator, 2 * decoder), lambda m=model, c=codec: separate(m, c, wav)
            )  # fmt: skip
            if kind == "paper":
                macs = count_macs(sepformer, 1, n)
                systems["Sepformer, wav to wav"] = [sepformer], (0, macs, 0), lambda: sepformer(wav)
                systems["Sepformer behind the codec"] = (
                    [sepformer, dac], (2 * encoder, macs, decoder),
                    lambda z=latents, c=codec: c.encode(sepformer(c.decode(z, n))),
                )  # fmt: skip
        # A minute of Sepformer or of the 16 kHz DAC takes minutes on a CPU, so there it is only counted.
        calls = {k: call for k, (_, macs, call) in systems.items() if device.type == "cuda" or sum(macs) < 1000}
        megabytes = {name: peak_megabytes(call, device) for name, call in calls.items()}  # which also warms up
        times = median_seconds(calls, {1: 5, 4: 3, 8: 1, 60: 1}[seconds], device)
        for name, (modules, macs, _) in systems.items():
            rows.append({
                "system": name, "audio_seconds": seconds,
                "parameters": sum(p.numel() for m in modules for p in m.parameters()),
                **dict(zip(("gmac_encoder", "gmac_separator", "gmac_decoder"), macs)), "gmac": sum(macs),
                "seconds": times.get(name), "real_time_factor": times[name] / seconds if name in times else None,
                "megabytes": megabytes.get(name),
            })  # fmt: skip
    return rows


def mixtures_per_second(seconds: float = 5.0) -> float:
    """How many training mixtures one worker makes from the bundled speech, with the defaults of train.py."""
    flags = parse_args([])
    dataset = open_mixtures(flags.data, flags, flags.epoch_size, flags.seed, train=True)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        dataset[count % len(dataset)]
        count += 1
    return count / (time.perf_counter() - started)


RATIOS = {  # Sepformer's cost over Codecformer's
    "latents_to_latents": ("Sepformer, wav to wav", "Codecformer paper, latents to latents"),
    "behind_codec": ("Sepformer behind the codec", "Codecformer paper, latents to latents"),
    "wav_to_wav_bundled": ("Sepformer, wav to wav", "Codecformer bundled, wav to wav"),
    "wav_to_wav_dac_16khz": ("Sepformer, wav to wav", "Codecformer paper, wav to wav"),
}


def cost(args, command: str) -> None:
    """Prints what both separators cost, side by side, and writes cost.json."""
    _, _, device = setup_process()
    torch.manual_seed(0)
    out = Path(args.out or "results_cost")
    make_folder(out)
    bundled = load_separator(args.ckpt[0], device, args.codec)[:2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights have no lag to be measured
        dac_16khz = Codec(
            random_dac(DAC_16KHZ).requires_grad_(False), 8000, "random weights of dac_16khz's shape", device=device
        )
    rows = time_inference(bundled, dac_16khz, args.compile, device)
    at_4s = {row["system"]: row for row in rows if row["audio_seconds"] == 4}
    ratios = {}
    for name, (theirs, ours) in RATIOS.items():
        ratios[name] = {"macs": at_4s[theirs]["gmac"] / at_4s[ours]["gmac"]}
        ratios[name]["time"] = at_4s[theirs]["seconds"] / at_4s[ours]["seconds"]
    steps = time_training_steps(dac_16khz, bundled, device)
    ratios["train_step"] = {w: steps["sepformer"] / s for w, s in steps.items() if w not in ("sepformer", "bundled")}
    pipeline = {"mixtures_per_second_per_worker": mixtures_per_second(), "bundled_step_consumes": 1 / steps["bundled"]}
    results = {
        "ratios": ratios, "inference": rows, "train_step_seconds": steps, "pipeline": pipeline, "command": command,
        "machine": machine(device), "threads": torch.get_num_threads(), "git": git_revision(),
    }  # fmt: skip
    (out / "cost.json").write_text(json.dumps(results, indent=1) + "\n")

    def cell(value, digits):
        return ("-" if value is None else f"{value:.{digits}f}").rjust(10)

    print("8 kHz audio, two speakers, batch 1; GMAC split into codec encoder, separator, codec decoder\n")
    columns = ("audio s", "M param", "GMAC enc", "GMAC sep", "GMAC dec", "seconds", "RTF", "MB")
    print("".ljust(52) + "".join(title.rjust(10) for title in columns))
    for row in rows:
        values = [row["audio_seconds"], row["parameters"] / 1e6, *list(row.values())[3:6]]
        values += [row["seconds"], row["real_time_factor"], row["megabytes"]]
        print(row["system"].ljust(52) + "".join(map(cell, values, (0, 1, 2, 2, 2, 3, 4, 0))))
    print(
        "- : not timed here, it would take minutes\n\nSepformer over Codecformer, 4 s".ljust(46)
        + "MACs x".rjust(12)
        + "time x".rjust(10)
    )
    for name in RATIOS:
        print(name.ljust(46) + cell(ratios[name]["macs"], 1) + cell(ratios[name]["time"], 1))
    print("\none training step, batch 1, 4 s".ljust(47) + "seconds".rjust(10) + "faster x".rjust(10))
    for way, seconds in steps.items():
        if way != "bundled":
            print(way.ljust(46) + cell(seconds, 3) + cell(ratios["train_step"].get(way), 1))
    print(
        f"\nmixtures per second: one worker makes {pipeline['mixtures_per_second_per_worker']:.0f}, "
        f"the bundled training step takes {pipeline['bundled_step_consumes']:.0f}"
    )


def main():
    parser = Parser(description="Scores checkpoints, or separates recordings (--mix).")
    parser.add_argument("--ckpt", nargs="+", default=[str(ASSETS / "separator.pt")], help="checkpoint of train.py")
    parser.add_argument("--codec", help="where the checkpoint's codec lies now, if it has moved")
    parser.add_argument("--data", default=str(ASSETS / "test_mixtures"), help="folder with mix or mix_clean, s1, s2")
    parser.add_argument("--mix_folder", choices=MIX_FOLDERS, help="of the set, where it has several")
    parser.add_argument("--situations", action="store_true", help="the paper's table, for one or several --ckpt")
    parser.add_argument("--cost", action="store_true", help="what Codecformer and Sepformer cost, side by side")
    parser.add_argument("--compile", action="store_true", help="torch.compile the separator")
    parser.add_argument("--mix", nargs="+", metavar="FILE", help="recordings to separate instead")
    parser.add_argument("--out", help="output folder (default: results, results_situations, results_cost, separated)")
    args = parser.parse_args()
    if len(args.ckpt) > 1 and not args.situations:
        parser.error("several --ckpt are compared with --situations")
    command = shlex.join(["python", *sys.argv])
    try:
        if args.mix:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # which lets files be cleared away
            separate_recordings(args)
        elif args.situations:
            evaluate_situations(args, command)
        elif args.cost:
            cost(args, command)
        else:
            evaluate(args, command)
    except (DataError, CodecError, SettingsError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")


if __name__ == "__main__":
    main()
