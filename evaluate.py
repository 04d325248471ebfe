"""Scores a checkpoint on a set of mixtures, or separates the user's own recordings.

    python evaluate.py                           the bundled checkpoint on the bundled test mixtures
    python evaluate.py --ckpt FILE --data DIR    another checkpoint, another set (folders mix, s1, s2)
    python evaluate.py --mix FILE... --out DIR   two files FILE_s1.wav, FILE_s2.wav for each recording

Scoring prints a table with three rows - the mixture left alone, the clean source through the codec (the ceiling:
what this codec could reach at best) and Codecformer - and leaves in --out results.json, results.csv (a line per
mixture), the separated files in audio/ and index.html, a listening page that opens without a server.

- SI-SDR is against the clean source, SI-SDRi its gain over the mixture; SDR is BSS Eval's with 512 taps.
- cSI-SDRi is the same gain against the *transmitted* source: clean, encoded, quantised, decoded.
- Estimates are put in the order of the sources by the best mean SI-SDR. A mixture's score is the mean over its
  sources; the interval is 1.96 standard errors over mixtures.
"""

import base64
import csv
import html
import io
import json
import multiprocessing
import os
import platform
import shlex
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from tqdm import tqdm

from codecformer import separate
from dac_wrapper import ASSETS, Codec, CodecError
from data import DataError, FixedMixtures, Parser, read_audio, resample
from losses import pairwise_negative_si_sdr, pit, reorder, si_sdr
from train import SettingsError, check_codec, git_revision, load_checkpoint, restore_model, setup_process

METRICS = {
    "si_sdr": "SI-SDR", "si_sdr_i": "SI-SDRi", "csi_sdr_i": "cSI-SDRi", "sdr_i": "SDRi", "pesq": "PESQ", "stoi": "STOI",
}  # fmt: skip
ROWS = {"mixture": "mixture, untouched", "ceiling": "clean source through the codec", "codecformer": "Codecformer"}
N_LISTEN = 8  # mixtures on the listening page, evenly spaced through the set

# Seconds of a long recording that are separated at a time, and of them shared with the next. What attention makes of a
# moment depends on all that it sees: on mixtures of assets/speech/valid, windows of 60, 90 and 120 s agree with the
# whole to 30, 31 and 32 dB SI-SDR, and memory grows with them.
WINDOW, OVERLAP = 90, 10


def load_separator(ckpt, device, codec_name=None):
    """The model and codec of a checkpoint, and the checkpoint itself.

    Raises SettingsError if the codec is not the one that the separator was trained on, CodecError without one.
    """
    checkpoint = load_checkpoint(ckpt)
    codec = Codec.load(codec_name or checkpoint["codec"]["name"], checkpoint["sample_rate"], device)
    check_codec(checkpoint, ckpt, codec)
    return restore_model(checkpoint, ckpt).to(device).eval(), codec, checkpoint


def score(estimates, sources, mixture, transmitted, rate: int) -> dict:
    """All metrics of one set of estimates [S, T], each the mean over the sources; [T] mixture, [S, T] the others.

    PESQ is narrow band at 8 kHz and wide band at 16 kHz; it is NaN at other rates and where it finds no speech.
    """
    from pesq import NoUtterancesError, pesq
    from pystoi import stoi
    from torchmetrics.functional.audio import signal_distortion_ratio

    estimates, sources, mixture, transmitted = map(torch.as_tensor, (estimates, sources, mixture, transmitted))
    mixtures = mixture.expand_as(sources)

    def sdr(signals):
        return signal_distortion_ratio(signals.double(), sources.double(), filter_length=512).mean().item()

    def perceptual(source, estimate):
        try:
            return pesq(rate, source, estimate, "wb" if rate == 16000 else "nb")
        except NoUtterancesError:
            return float("nan")

    pairs = [(s.numpy(), e.numpy()) for s, e in zip(sources, estimates)]
    reached, reached_sdr = si_sdr(estimates, sources).mean().item(), sdr(estimates)
    return {
        "si_sdr": reached,
        "si_sdr_i": reached - si_sdr(mixtures, sources).mean().item(),
        "csi_sdr_i": (si_sdr(estimates, transmitted) - si_sdr(mixtures, transmitted)).mean().item(),
        "sdr": reached_sdr,
        "sdr_i": reached_sdr - sdr(mixtures),
        "pesq": float(np.mean([perceptual(*p) for p in pairs])) if rate in (8000, 16000) else float("nan"),
        "stoi": float(np.mean([stoi(s, e, rate) for s, e in pairs])),
    }


def score_rows(signals: dict, sources, mixture, transmitted, rate: int) -> dict:
    """One `score` for each row of the table; runs in a process of its own."""
    torch.set_num_threads(1)
    return {row: score(estimates, sources, mixture, transmitted, rate) for row, estimates in signals.items()}


@torch.no_grad()
def separate_mixture(model, codec, checkpoint, item) -> tuple[dict, np.ndarray]:
    """The three rows' signals [S, T] for one item of a set, and the transmitted sources [S, T]."""
    mixture = torch.from_numpy(item["mixture"])[None].to(codec.device)
    sources = torch.from_numpy(item["sources"]).to(codec.device)
    before, after = checkpoint["quantize_before"], checkpoint["quantize_after"]
    estimates = separate(model, codec, mixture, before, after)
    _, assignment = pit(pairwise_negative_si_sdr(estimates, sources[None]))
    transmitted = codec.transmit(sources)
    ceiling = codec.transmit(sources, quantize=before or after)
    signals = {
        "mixture": mixture.expand_as(sources),
        "ceiling": ceiling,
        "codecformer": reorder(estimates, assignment)[0],
    }
    return {row: s.cpu().numpy() for row, s in signals.items()}, transmitted.cpu().numpy()


def summarise(scores: list[dict]) -> dict:
    """Mean and half-width of the 95 % interval over mixtures, per row and metric; unscored mixtures are left out."""
    rows = {}
    for row in ROWS:
        rows[row] = {}
        for metric in METRICS:
            values = np.array([s[row][metric] for s in scores])
            values = values[np.isfinite(values)]
            mean = float(values.mean()) if len(values) else float("nan")
            ci95 = float(1.96 * values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
            rows[row][metric] = {"mean": mean, "ci95": ci95}
    return rows


def format_table(rows: dict) -> str:
    def cell(metric, value):
        digits = 2 if metric in ("pesq", "stoi") else 1
        return f"{value['mean']:.{digits}f} ±{value['ci95']:.{digits}f}".rjust(13)

    lines = [" " * 32 + "".join(title.rjust(13) for title in METRICS.values())]
    for row, title in ROWS.items():
        lines.append(title.ljust(32) + "".join(cell(m, rows[row][m]) for m in METRICS))
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
        gain = example["scores"]["codecformer"]["si_sdr_i"]
        sections.append(
            f"<h2>{html.escape(example['name'])}: SI-SDRi {gain:+.1f} dB</h2><section>{''.join(columns)}</section>"
        )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 1300px; padding: 0 1rem; color: #222; }}
h2 {{ font-size: 1rem; margin: 2rem 0 .4rem; }}
section {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: .8rem; }}
figure {{ margin: 0; }} figcaption {{ font-size: .85rem; }}
img {{ width: 100%; height: 130px; display: block; image-rendering: auto; background: #000; }}
audio {{ width: 100%; height: 34px; margin-top: 4px; }}
pre {{ overflow-x: auto; background: #f4f4f4; padding: .8rem; font-size: 13px; }}
</style></head><body>
<h1>{html.escape(title)}</h1>
<p>{len(examples)} mixtures, evenly spaced through the set, not chosen by ear. Spectrograms: 0 to
{examples[0]["rate"] // 2000} kHz upwards, 70 dB of range. Values in the table: mean and 95 % interval over all
mixtures.</p>
<pre>{html.escape(table)}</pre>
{"".join(sections)}
</body></html>
"""


def evaluate(args, command: str) -> None:
    _, _, device = setup_process()
    model, codec, checkpoint = load_separator(args.ckpt, device, args.codec)
    dataset = FixedMixtures(args.data, codec.sample_rate)
    if dataset.n_speakers != model.config.n_speakers:
        raise SettingsError(
            f"{args.data} mixes {dataset.n_speakers} speakers, {args.ckpt} separates {model.config.n_speakers}"
        )
    out = Path(args.out or "results")
    make_folder(out / "audio")
    rate, names, scores, examples, transmission = codec.sample_rate, [], [], [], []
    listen = set(np.linspace(0, len(dataset) - 1, min(N_LISTEN, len(dataset))).astype(int).tolist())
    # Spawned, not forked: a fork of a process that runs torch's threads can hang.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        pending = []
        for index in tqdm(range(len(dataset)), desc="separating", unit="mixture"):
            item = dataset[index]
            signals, transmitted = separate_mixture(model, codec, checkpoint, item)
            pending.append(pool.submit(score_rows, signals, item["sources"], item["mixture"], transmitted, rate))
            names.append(item["name"])
            transmission.append(si_sdr(torch.from_numpy(transmitted), torch.from_numpy(item["sources"])).mean().item())
            for k, estimate in enumerate(signals["codecformer"]):
                write_audio(out / "audio" / f"{item['name']}_s{k + 1}.wav", estimate, rate)
            if index in listen:
                examples.append({**item, "index": index, "rate": rate, "estimates": signals["codecformer"]})
        for future in tqdm(pending, desc="scoring", unit="mixture"):
            scores.append(future.result())
    for example in examples:
        example["scores"] = scores[example["index"]]

    rows = summarise(scores)
    table = format_table(rows)
    results = {
        "rows": rows,
        "n_mixtures": len(scores),
        "n_speakers": dataset.n_speakers,
        "command": command,
        "checkpoint": {k: checkpoint[k] for k in ("config", "codec", "quantize_before", "quantize_after", "git")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "codec": {k: getattr(codec, k) for k in ("name", "sample_rate", "codec_rate", "frame_rate", "bitrate", "lag")},
        "transmitted_si_sdr": float(np.mean(transmission)),
        "data": os.path.relpath(args.data),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device.type}, torch {torch.__version__}",
        "git": git_revision(),
    }
    results = json.loads(json.dumps(results), parse_constant=lambda nan: None)  # JSON has no NaN
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    with open(out / "results.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mixture"] + [f"{row}_{metric}" for row in ROWS for metric in METRICS])
        for name, s in zip(names, scores):
            writer.writerow([name] + [f"{s[row][metric]:.4f}" for row in ROWS for metric in METRICS])
    title = f"Codecformer on {Path(args.data).name}"
    (out / "index.html").write_text(listening_page(examples, table, title), encoding="utf-8")
    data, ckpt = os.path.relpath(args.data), os.path.relpath(args.ckpt)
    print(f"\n{len(scores)} mixtures of {dataset.n_speakers} speakers from {data}, checkpoint {ckpt}\n")
    print(table)
    print(
        f"\nAt {codec.bitrate / 1000:.1f} kbit/s the codec transmits these sources with {np.mean(transmission):.1f} dB SI-SDR."
        f" Its lag of {codec.lag} samples at {codec.codec_rate} Hz is removed."
    )
    print(f"listen: {(out / 'index.html').resolve().as_uri()}")


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
    model, codec, checkpoint = load_separator(args.ckpt, device, args.codec)
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


def main():
    parser = Parser(description="Scores a checkpoint, or separates recordings (--mix).")
    parser.add_argument("--ckpt", default=str(ASSETS / "separator.pt"), help="checkpoint of train.py")
    parser.add_argument("--codec", help="where the checkpoint's codec lies now, if it has moved")
    parser.add_argument("--data", default=str(ASSETS / "test_mixtures"), help="folder with mix or mix_clean, s1, s2")
    parser.add_argument("--mix", nargs="+", metavar="FILE", help="recordings to separate instead")
    parser.add_argument("--out", help="output folder (default: results, or separated with --mix)")
    args = parser.parse_args()
    try:
        if args.mix:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # which lets files be cleared away
            separate_recordings(args)
        else:
            evaluate(args, shlex.join(["python", *sys.argv]))
    except (DataError, CodecError, SettingsError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")


if __name__ == "__main__":
    main()
