"""What codecs make of speech: SI-SDR, PESQ and STOI at each rate, beside Opus where opus-tools are installed.

    python -m recipes.codec_scores --data libri/test --codecs transform lyra --out results/codecs
    python -m recipes.codec_scores --data set --codecs runs/codec/codec.pth --out results/codecs_mixtures

Of a folder of speakers one utterance each, of a fixed set the mixtures, the first 8 s at 8 kHz: a codec of another rate
is scored below 4 kHz. Of mixtures there are two rows more: `latents_added`, the sum of the sources' latents, decoded;
`ideal_mask`, the first source from the mixture's latents, masked by the power ratio of the sources' latents.
"""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from tqdm import tqdm

from checkpoint import choose_device, make_folder, run_program
from dac_wrapper import CODECS, Codec
from data import MIX_FOLDERS, DataError, FixedMixtures, Parser, list_speakers, read_audio, resample
from evaluate import score
from recipes.report import provenance

RATE = 8000
CODEBOOKS = {"lyra": (16, 30, 46)}  # of other codecs all
METRICS = ("si_sdr", "pesq", "stoi")


def opus(wav: np.ndarray, kbit: int) -> np.ndarray:
    """[T] through opusenc and opusdec at a constant rate. Raises DataError where they fail."""
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{folder}/{name}" for name in ("in.wav", "coded.opus", "out.wav")]
        sf.write(names[0], wav, RATE)
        encode = ["opusenc", "--quiet", "--speech", "--hard-cbr", "--framesize", "20", "--bitrate", str(kbit)]
        for command in ([*encode, *names[:2]], ["opusdec", "--quiet", "--rate", str(RATE), *names[1:]]):
            if (done := subprocess.run(command, capture_output=True, text=True)).returncode:
                raise DataError(f"{command[0]} failed: {done.stderr.strip()}")
        decoded, _ = read_audio(names[2])
    return np.pad(decoded, (0, max(len(wav) - len(decoded), 0)))[: len(wav)]


@torch.no_grad()
def transmitted(wav: np.ndarray, codec: Codec, n_codebooks: int) -> np.ndarray:
    """[T] through a codec; 0 codebooks: unquantised."""
    if n_codebooks:
        codec.use_codebooks(n_codebooks)
    return codec.transmit(torch.from_numpy(wav)[None].to(codec.device), n_codebooks > 0)[0].cpu().numpy()


@torch.no_grad()
def added(mixture: np.ndarray, sources: np.ndarray, codec: Codec, mask: bool) -> np.ndarray:
    """The sum of the latents of sources [S, T], each as loud as in the mixture [T], decoded; or its latents, masked."""
    mixture, sources = (torch.from_numpy(signal).to(codec.device) for signal in (mixture, sources))
    gain = codec.gain(mixture)
    latents = codec.encode(sources * gain)
    power = latents.square()
    masked = codec.encode(mixture[None] * gain)[0] * power[0] / (power.sum(0) + 1e-8)
    chosen = masked if mask else latents.sum(0)
    return (codec.decode(chosen[None], len(mixture)) / gain)[0].cpu().numpy()


def read_signals(data):
    """Signals [T] and their sources [S, T], if they are mixtures. Raises DataError."""
    if any((Path(data) / folder).is_dir() for folder in MIX_FOLDERS):
        mixtures = FixedMixtures(data, RATE)
        for item in (mixtures[index] for index in range(len(mixtures))):
            yield item["mixture"][: 8 * RATE], item["sources"][:, : 8 * RATE]
        return
    for files in list_speakers(data).values():
        audio, rate = read_audio(files[0])
        yield resample(audio, rate, RATE)[: 8 * RATE], None


def main() -> None:
    parser = Parser(description="Scores codecs on single voices or mixtures.")
    parser.add_argument("--data", required=True, help="folder with one folder per speaker, or a fixed set")
    parser.add_argument("--codecs", nargs="+", default=["transform"], help=f"of {', '.join(CODECS)}, or files")
    parser.add_argument("--out", default="results/codecs", help="folder for codec_scores.json")
    args = parser.parse_args()
    make_folder(Path(args.out))
    systems, signals = {}, list(read_signals(args.data))  # {codec/kbit/s: what it makes of a signal and its sources}
    for name in args.codecs:
        codec = Codec.load(name, RATE, choose_device())
        for n in (0, *CODEBOOKS.get(name, (codec.n_codebooks,))):
            row = f"{name}/unquantised"
            if n:
                codec.use_codebooks(n)
                row = f"{name}/{codec.bitrate / 1000:g}"
            systems[row] = lambda wav, sources, codec=codec, n=n: transmitted(wav, codec, n)
        if signals[0][1] is not None:
            for row, mask in (("latents_added", False), ("ideal_mask", True)):
                systems[f"{name}/{row}"] = lambda *signal, codec=codec, mask=mask: added(*signal, codec, mask)
    if shutil.which("opusenc"):
        systems |= {f"opus/{kbit}": lambda wav, sources, kbit=kbit: opus(wav, kbit) for kbit in (6, 9)}
    scores = {name: {metric: [] for metric in METRICS} for name in systems}
    for wav, sources in tqdm(signals, desc="scoring", unit="signal"):
        for name, system in systems.items():
            decoded, reference = system(wav, sources), sources[0] if name.endswith("ideal_mask") else wav
            for metric in METRICS:
                scores[name][metric].append(score(metric, decoded, reference, RATE))
    rows = {}
    print("codec, kbit/s".ljust(36) + "SI-SDR dB".rjust(14) + "PESQ".rjust(14) + "STOI".rjust(14))
    for name, columns in scores.items():
        known = {metric: np.array(values)[np.isfinite(values)] for metric, values in columns.items()}
        rows[name] = {m: {"mean": v.mean(), "ci95": 1.96 * v.std(ddof=1) / len(v) ** 0.5} for m, v in known.items()}
        print(name.ljust(36) + "".join(f"{c['mean']:.2f} ±{c['ci95']:.2f}".rjust(14) for c in rows[name].values()))
    results = {"rows": rows, "n_signals": len(signals), **provenance("-m", "recipes.codec_scores")}
    (Path(args.out) / "codec_scores.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_program(main)
