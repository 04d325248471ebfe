"""Encodes recordings to .dac files of codes, and decodes those: the two ends of a call.

    python -m recipes.codes encode call.wav --codec bundled     call.dac
    python separate.py call.dac                                 separated/call_s1.dac, call_s2.dac
    python -m recipes.codes decode separated/call_s1.dac        separated/call_s1.wav

Each output lies beside its input, and nothing that is there is written over. For the codecs of
`CODECS` and weights files; files of the official package are decoded by it: python -m dac decode.
"""

import math
from functools import cache
from pathlib import Path

import numpy as np
import soundfile as sf
import torch

from dac_file import CodeFile, check_codes, read_codes, write_codes
from dac_wrapper import CODECS, LEVEL, Codec
from data import read_audio
from program import Parser, UserError, choose_device, choose_threads, run_program, whole, whole_file

LEVEL_DB = 20 * math.log10(LEVEL)


@cache
def load_codec(name: str, sample_rate: int) -> Codec:
    """Once for all files of a rate: the lag is measured as a codec is loaded."""
    return Codec.load(name, sample_rate, choose_device())


def beside(path: Path, ending: str) -> Path:
    """Where the output goes. Raises UserError if something is there, or there is no input."""
    if not path.is_file():
        raise UserError(f"{path} is no file: give recordings to encode, .dac files to decode")
    if path.suffix == ending:
        raise UserError(f"{path} is a {ending} file already: give the other kind")
    target = path.with_suffix(ending)
    if target.exists():
        raise UserError(f"{target} is there already: move it away")
    return target


@torch.no_grad()
def encode(path: Path, name: str, n_codebooks: int | None) -> Path:
    """Writes the codes of a recording. Raises UserError if it can't be read."""
    target = beside(path, ".dac")
    audio, rate = read_audio(path)
    if not np.abs(audio).max() < 1e4:  # not a number either; the file states the level
        raise UserError(
            f"{path} peaks at {np.abs(audio).max():.0e}, full scale is 1: scale it down"
        )
    codec = load_codec(name, rate)
    codec.use_codebooks(codec.network.n_codebooks if n_codebooks is None else n_codebooks)
    wav = torch.from_numpy(audio)[None].to(codec.device)  # [1, T]
    gain = codec.gain(wav)
    codes = codec.to_codes(codec.encode(wav * gain))[0]  # [N, F]
    file = CodeFile(
        codes=codes,
        sample_rate=rate,
        original_length=len(audio),
        input_db=LEVEL_DB - 20 * math.log10(gain.item()),
        chunk_length=codes.shape[-1],
        padding=True,
        codec={"name": codec.name, "fingerprint": codec.fingerprint},
    )
    write_codes(file, target)
    bits = codes.numel() * math.log2(codec.network.codebook_size)
    print(f"{target}: {bits / len(audio) * rate / 1000:.1f} kbit/s")
    return target


@torch.no_grad()
def decode(path: Path, name: str | None) -> Path:
    """Writes the waveform of a file of codes, at the level of the recording that was encoded."""
    file = read_codes(path)
    target = beside(path, ".wav")
    if not file.codec:
        raise UserError(f"{path} is an official file: decode it by python -m dac decode")
    codec = load_codec(name or file.codec["name"], file.sample_rate)
    check_codes(file, path, codec)
    latents = codec.from_codes(file.codes[None].to(codec.device))  # [1, D, F]
    wav = codec.decode(latents, file.original_length)[0]  # [T]
    wav = wav * 10 ** ((file.input_db - LEVEL_DB) / 20)
    audio = wav.cpu().numpy()
    with whole_file(target) as partial:
        sf.write(partial, audio, file.sample_rate, "FLOAT", format="WAV")
    print(target)
    return target


def main() -> None:
    parser = Parser(description="Encodes recordings to files of codes, and decodes those.")
    parser.add_argument("direction", choices=["encode", "decode"])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument(
        "--codec",
        help=f"{', '.join(CODECS)} or a weights file (encode: bundled; decode: the file's)",
    )
    parser.add_argument("--n_codebooks", type=whole(1), help="encode with the first ones only")
    args = parser.parse_args()
    choose_threads(workers=0)
    for path in args.files:
        if args.direction == "encode":
            encode(path, args.codec or "bundled", args.n_codebooks)
        else:
            decode(path, args.codec)


if __name__ == "__main__":
    run_program(main)
