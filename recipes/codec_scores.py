"""What codecs make of speech: SI-SDR, PESQ and STOI at each rate, and Opus where it is installed.

    python -m recipes.codec_scores --data libri/test --codecs bundled lyra --out results/codecs
    python -m recipes.codec_scores --data set --codecs runs/codec/codec.pth --out results/mixtures

Of a folder of speakers one utterance each is coded, of a fixed set of two speakers the mixtures:
the first 8 s, at 8 kHz. A codec of another rate is scored below 4 kHz. Opus is opusenc's and
opusdec's, of the package opus-tools. Prints a table and leaves codec_scores.json in --out.

Of mixtures there are two rows more, which say how separable a codec's latents are:
    latents_added   the sum of the sources' latents, decoded, against the mixture
    ideal_mask      the sources, from the mixture's latents, masked by the power ratio of the
                    sources' latents
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from tqdm import tqdm

from dac_wrapper import CODECS, Codec
from data import FixedMixtures, Recordings, list_speakers, read_audio, resample
from evaluate import mean_and_interval, score
from program import (
    Parser,
    UserError,
    choose_device,
    choose_threads,
    provenance,
    run_program,
    whole_file,
)

RATE = 8000  # Hz
SECONDS = 8  # of a signal at most
CODEBOOKS = {"lyra": (16, 30, 46)}  # of other codecs all
OPUS = (6, 9)  # kbit/s
METRICS = ("si_sdr", "pesq", "stoi")


def read_signals(data) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Signals [T] and, if they are mixtures, their sources [S, T]. Raises DataError."""
    length = SECONDS * RATE
    if FixedMixtures.fits(data):
        mixtures = FixedMixtures(data, RATE)
        for index in range(len(mixtures)):
            item = mixtures[index]
            yield item["mixture"][:length], item["sources"][:, :length]
    else:
        for files in list_speakers(data, Recordings()).values():
            audio, rate = read_audio(files[0])
            yield resample(audio, rate, RATE)[:length], None


def code_signal(codecs: dict[str, Codec], wav: np.ndarray, sources: np.ndarray | None) -> dict:
    """{row: what it makes of a signal [T], and what that is compared with}, both [..., T]."""
    rows = {}
    for name, codec in codecs.items():
        rows[f"{name}/unquantised"] = transmit(codec, wav, quantize=False), wav
        for n in CODEBOOKS.get(name, (codec.n_codebooks,)):
            codec.use_codebooks(n)
            rows[f"{name}/{codec.bitrate / 1000:g}"] = transmit(codec, wav, quantize=True), wav
        if sources is not None:
            added, masked = add_and_mask(codec, wav, sources)
            rows[f"{name}/latents_added"] = added, wav
            rows[f"{name}/ideal_mask"] = masked, sources
    if shutil.which("opusenc"):
        for kbit in OPUS:
            rows[f"opus/{kbit}"] = opus(wav, kbit), wav
    return rows


@torch.no_grad()
def transmit(codec: Codec, wav: np.ndarray, quantize: bool) -> np.ndarray:
    """[T] through a codec."""
    received = codec.transmit(torch.from_numpy(wav)[None].to(codec.device), quantize)
    return received[0].cpu().numpy()


@torch.no_grad()
def add_and_mask(codec: Codec, mixture: np.ndarray, sources: np.ndarray):
    """The mixture [T] from its sources' latents, the sources [S, T] from its own, masked."""
    length = len(mixture)
    mixture = torch.from_numpy(mixture).to(codec.device)
    sources = torch.from_numpy(sources).to(codec.device)
    gain = codec.gain(mixture)  # sources stay as loud as they are in the mixture
    latents = codec.encode(sources * gain)  # [S, D, F]
    added = latents.sum(0, keepdim=True)
    power = latents.square()
    masks = power / (power.sum(0) + 1e-8)
    masked = codec.encode(mixture[None] * gain) * masks
    added, masked = (codec.decode(z, length) / gain for z in (added, masked))
    return added[0].cpu().numpy(), masked.cpu().numpy()


def opus(wav: np.ndarray, kbit: int) -> np.ndarray:
    """[T] through opusenc and opusdec at a constant rate. Raises UserError where they fail."""
    with tempfile.TemporaryDirectory() as folder:
        given, coded, decoded = (f"{folder}/{name}" for name in ("in.wav", "coded.opus", "out.wav"))
        sf.write(given, wav, RATE)
        encode = "opusenc --quiet --speech --hard-cbr --framesize 20 --bitrate".split()
        decode = "opusdec --quiet --rate".split()
        run_tool([*encode, str(kbit), given, coded])
        run_tool([*decode, str(RATE), coded, decoded])
        received, _ = read_audio(decoded)
    missing = max(len(wav) - len(received), 0)
    return np.pad(received, (0, missing))[: len(wav)]


def run_tool(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{command[0]} failed: {done.stderr.strip()}")


def format_table(rows: dict[str, dict]) -> str:
    lines = [
        "codec, kbit/s".ljust(36) + "".join(t.rjust(14) for t in ("SI-SDR dB", "PESQ", "STOI"))
    ]
    for row, scores in rows.items():
        line = row.ljust(36)
        for value in scores.values():
            cell = "-" if value["mean"] is None else f"{value['mean']:.2f}"
            if value["ci95"] is not None:
                cell += f" ±{value['ci95']:.2f}"
            line += cell.rjust(14)
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description="Scores codecs on single voices or mixtures.")
    parser.add_argument("--data", required=True, help="folder of speakers, or fixed set")
    known = ", ".join(CODECS)
    parser.add_argument("--codecs", nargs="+", default=["bundled"], help=f"{known}, or files")
    parser.add_argument("--out", type=Path, default=Path("results/codecs"), help="folder")
    args = parser.parse_args()
    if (args.out / "codec_scores.json").exists():
        parser.error(f"{args.out} holds scores: choose another --out")
    choose_threads(workers=0)
    device = choose_device()
    codecs = {name: Codec.load(name, RATE, device) for name in args.codecs}
    signals = list(read_signals(args.data))

    scores = {}  # {row: {metric: a score a signal}}
    for wav, sources in tqdm(signals, desc="scoring", unit="signal"):
        for row, (decoded, reference) in code_signal(codecs, wav, sources).items():
            scores.setdefault(row, {metric: [] for metric in METRICS})
            pairs = list(zip(np.atleast_2d(decoded), np.atleast_2d(reference)))
            for metric in METRICS:
                values = [score(metric, *pair, RATE) for pair in pairs]
                scores[row][metric].append(np.mean(values))
    rows = {
        row: {metric: mean_and_interval(values) for metric, values in columns.items()}
        for row, columns in scores.items()
    }
    print(format_table(rows))
    results = {
        "rows": rows,
        "n_signals": len(signals),
        **provenance("-m", "recipes.codec_scores"),
    }
    with whole_file(args.out / "codec_scores.json") as partial:
        partial.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_program(main)
