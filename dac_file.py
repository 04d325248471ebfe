"""Codes of a codec in files, as descript-audio-codec 1.0.0 writes and reads them: `.dac`.

    file = read_codes("call.dac")                       # file.codes: [N, F]
    write_codes(replace(file, codes=other), "other.dac")

A file is what np.save makes of one dictionary: a NumPy header and a pickle, with `codes`, uint16
[channels, N, F] for N codebooks and F frames, and `metadata`. Files of this repository's own
`recipes.codes`, which the official package can't decode, have one entry more in their metadata, the
codec's name and fingerprint, and their `input_db` is the recording's RMS in dB of full scale. In
official ones it is a loudness (LUFS), to which the official decoder brings whatever it decodes: so
both voices of a separated file are as loud there as their mixture was.

What is unusual: a pickle can run any code when it is read. Here only NumPy's arrays, dtypes and
scalars are made of one; all else is refused.
"""

import math
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dac_wrapper import Codec
from program import UserError, first_line, whole_file

VERSION = "1.0.0"  # of the format, and of the package


@dataclass(frozen=True)
class CodeFile:
    """What a .dac file holds, of one channel."""

    codes: torch.Tensor  # [N, F], integers
    sample_rate: int  # Hz, of the recording
    original_length: int  # its samples
    input_db: float  # its loudness
    chunk_length: int  # frames that the official decoder takes at a time
    padding: bool  # whether it was coded whole, not in overlapping chunks
    codec: dict = field(default_factory=dict)  # name and fingerprint; empty in official files


class NumpyUnpickler(pickle.Unpickler):
    """Makes NumPy's arrays, dtypes and scalars, and calls nothing else."""

    ALLOWED = {
        "_reconstruct": np.empty(0).__reduce__()[0],
        "scalar": np.float32(0).__reduce__()[0],
        "ndarray": np.ndarray,
        "dtype": np.dtype,
    }

    def find_class(self, module: str, name: str):
        if module.split(".")[0] != "numpy" or name not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it would call {module}.{name}")
        return self.ALLOWED[name]


def read_codes(path) -> CodeFile:
    """Reads a .dac file.

    Raises UserError for what is none, what is of several channels, and what would run code.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            content = NumpyUnpickler(file).load().item()
        codes = content["codes"]
        metadata = content["metadata"]
        if metadata["dac_version"] != VERSION:
            raise ValueError(f"only files of version {VERSION} are read")
        if codes.ndim != 3 or codes.dtype.kind not in "ui" or not codes.size:
            raise ValueError("it holds no codes")
        if int(metadata["channels"]) != 1 or codes.shape[0] != 1:
            raise ValueError("it has several channels: mix them down before encoding")
        codec = metadata.get("codec", {})
        if codec:
            codec = {"name": str(codec["name"]), "fingerprint": str(codec["fingerprint"])}
        found = CodeFile(
            codes=torch.from_numpy(codes[0].astype(np.int64)),
            sample_rate=int(metadata["sample_rate"]),
            original_length=int(metadata["original_length"]),
            input_db=float(np.asarray(metadata["input_db"]).reshape(())),
            chunk_length=int(metadata["chunk_length"]),
            padding=bool(metadata["padding"]),
            codec=codec,
        )
        if min(found.sample_rate, found.original_length, found.chunk_length) < 1:
            raise ValueError("its length or its rate is not positive")
        if not abs(found.input_db) < 200:
            raise ValueError(f"its level is {found.input_db} dB")
        return found
    except FileNotFoundError:
        raise UserError(f"no file {path}: check the path") from None
    except Exception as error:  # NumPy and pickle raise a dozen types on what is no such file
        reason = f"missing {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"can't read {path} as a .dac file ({reason}): encode it anew") from None


def write_codes(file: CodeFile, path) -> None:
    """Writes a .dac file, whole or not at all. Raises UserError if it can't be written."""
    metadata = {
        "input_db": np.array([file.input_db], np.float32),
        "original_length": file.original_length,
        "sample_rate": file.sample_rate,
        "chunk_length": file.chunk_length,
        "channels": 1,
        "padding": file.padding,
        "dac_version": VERSION,
    }
    if file.codec:
        metadata["codec"] = file.codec
    codes = file.codes.cpu().numpy().astype(np.uint16)[None]  # [1, N, F]
    with whole_file(path) as partial, open(partial, "wb") as target:
        np.save(target, {"codes": codes, "metadata": metadata})


def check_codes(file: CodeFile, path, codec: Codec) -> None:
    """Raises UserError if the codes can't be this codec's.

    Official files don't say whose they are: their number of codebooks and of frames a second do.
    """
    if file.codec and file.codec["fingerprint"] != codec.fingerprint:
        theirs = file.codec["name"]
        advice = f"give --ckpt of a separator on {theirs}, or to decode, their --codec"
        raise UserError(f"{path} holds codes of {theirs}, not of this {codec.name}: {advice}")
    largest = int(file.codes.max())
    if largest >= codec.network.codebook_size:
        raise UserError(
            f"{path} holds a code {largest}, too large for {codec.name}: give its codec"
        )
    n_codebooks, n_frames = file.codes.shape
    if n_codebooks > codec.network.n_codebooks:
        have = f"{codec.name} has {codec.network.n_codebooks}"
        raise UserError(f"{path} holds codes of {n_codebooks} codebooks, {have}: give its codec")
    seconds = file.original_length / file.sample_rate
    if file.padding:
        expected = math.ceil(seconds * codec.frame_rate)
    else:
        n_chunks = seconds * codec.codec_rate / chunk_stride(file, codec)
        expected = math.ceil(n_chunks) * file.chunk_length
    tolerance = 2 if file.padding else file.chunk_length
    broken = not file.padding and n_frames % file.chunk_length
    if broken or abs(n_frames - expected) > tolerance:
        what = f"{n_frames} frames for {seconds:.2f} s, {codec.name} makes {expected}"
        raise UserError(f"{path} holds {what}: it is of another codec")


def chunk_stride(file: CodeFile, codec: Codec) -> int:
    """Samples at the codec's rate from one chunk of an official file to the next.

    The official codec codes a long recording in chunks that overlap by what its convolutions see,
    and decodes each without padding: to just so many samples that they follow on each other. So
    this is the length to which a chunk is decoded, followed through the decoder layer by layer.
    """
    length = file.chunk_length
    for layer in codec.network.decoder.modules():
        if isinstance(layer, nn.Conv1d):  # of stride 1, and here without padding
            length -= layer.dilation[0] * (layer.kernel_size[0] - 1)
        if isinstance(layer, nn.ConvTranspose1d):
            length = (length - 1) * layer.stride[0] + layer.kernel_size[0]
    if length < 1:
        raise UserError(f"chunks of {file.chunk_length} frames are too short for {codec.name}")
    return length
