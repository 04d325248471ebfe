"""The neural audio codec: a frozen network, such as the Descript Audio Codec (DAC), exact in time, length and level.

    codec = Codec.load("dac_16khz", sample_rate=8000)    # a name in CODECS, or the path of a DAC weights file
    latents = codec.encode(wav)                          # [..., T] -> [..., D, F]
    wav = codec.decode(codec.quantize(latents), length)  # [..., D, F] -> [..., length]

What is unusual:
- DAC returns fewer samples than it was given where a stride is odd, and trained weights can shift the signal (the
  16 kHz model by 8 samples, which alone turns a good SI-SDR into -20 dB; issues 37, 42, 72 and 118 of
  descript-audio-codec). `Codec` measures the shift of the weights on real speech as it loads, and undoes it.
- `encode` and `decode` leave the level alone. DAC was trained near one level, so callers multiply by `codec.gain(wav)`
  before encoding and divide after decoding; `transmit` does both.
- Weights are read as plain tensors, never as code, with weight norm folded away once.

A codec of your own is a bare network, at whatever rate, length, shift and level it was made, and a line in CODECS:
`Codec` wraps it, and nobody else looks at it. The network is a module with

    encoder         waveforms [B, 1, F * hop_length] -> latents [B, D, F], a module
    decoder         latents [B, D, F] -> waveforms [B, 1, about F * hop_length], a module
    quantize        (latents [B, D, F], n_codebooks) -> the same through the first of its codebooks, straight-through
    sample_rate, hop_length, latent_dim, n_codebooks, codebook_size

DAC is Kumar et al., 2023, https://arxiv.org/abs/2306.06546.
"""

import hashlib
import importlib
import math
import os
import shutil
import sys
import textwrap
import types
import urllib.request
import warnings
from pathlib import Path

import julius
import soundfile as sf
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from soundstream import SoundStream, SoundStreamConfig, load_lyra

ASSETS = Path(__file__).resolve().parent / "assets"
CACHE = Path.home() / ".cache" / "descript" / "dac"  # the dac package's own
RELEASES = "https://github.com/descriptinc/descript-audio-codec/releases/download/"
LEVEL = 10 ** (-25 / 20)  # RMS at which a codec is fed: loud enough for DAC, peaks far from its final tanh


class CodecError(ValueError):
    """The codec can't be had; the message is one line that says what to do."""


def first_line(error: Exception) -> str:
    return textwrap.shorten((str(error).strip().splitlines() or [type(error).__name__])[0], 120, placeholder=" ...")


def fold_weight_norm(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "weight_g"):
            nn.utils.remove_weight_norm(module)
    return model


def import_dac():
    """Imports the `dac` package also where torchaudio is broken, as PyPI's is beside a CPU build of torch.

    dac reaches torchaudio only through audiotools, which uses none of it for the model: an empty module will do.
    """
    warnings.filterwarnings("ignore", ".*weight_norm. is deprecated", FutureWarning)  # dac uses the old one
    if "dac" in sys.modules:
        return sys.modules["dac"]
    try:
        importlib.import_module("torchaudio")
        return importlib.import_module("dac")
    except (ImportError, OSError):
        for name in [n for n in sys.modules if n.split(".")[0] in ("torchaudio", "audiotools", "dac")]:
            del sys.modules[name]
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
        try:
            return importlib.import_module("dac")
        finally:
            del sys.modules["torchaudio"]  # other packages must not take the stand-in for the real one


def download(url: str, path: Path) -> None:
    """Fetches `url` to `path`, whole or not at all. Raises CodecError without a network."""
    partial = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as response, open(partial, "wb") as file:
            with tqdm.wrapattr(response, "read", total=response.length, desc=f"fetching {path.name}") as body:
                shutil.copyfileobj(body, file)
            if response.length:
                raise OSError(f"the connection ended {response.length} bytes too early")
        os.replace(partial, path)
    except OSError as error:
        raise CodecError(f"can't fetch {url} ({error}): fetch it elsewhere and put it at {path}") from None
    finally:
        partial.unlink(missing_ok=True)


class DAC(nn.Module):
    """A `dac.DAC` as the bare network that `Codec` takes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.encoder, self.decoder, self.quantizer = model.encoder, model.decoder, model.quantizer
        for fact in ("sample_rate", "hop_length", "latent_dim", "n_codebooks", "codebook_size"):
            setattr(self, fact, int(getattr(model, fact)))

    def quantize(self, latents, n_codebooks):
        return self.quantizer(latents, n_codebooks)[0]


def load_file(path) -> tuple[nn.Module, dict]:
    """The network, and the weights as they stand in a file: state_dict and metadata.kwargs, those of its class.

    That is the format of DAC's releases; `save_soundstream` writes the same. Raises CodecError for a file that is
    missing, broken, of another kind, or that would run code.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        weights, settings = checkpoint["state_dict"], checkpoint["metadata"]["kwargs"]
        is_dac = "encoder_dim" in settings
        model = import_dac().DAC(**settings) if is_dac else SoundStream(SoundStreamConfig(**settings))
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except FileNotFoundError:
        raise CodecError(f"no codec {path}: use {', '.join(CODECS)} or the path of a weights file") from None
    except ImportError:  # no fault of the file
        raise
    except Exception as error:  # torch.load raises half a dozen types on a file that is not one of ours
        raise CodecError(f"{path} is no codec's weights file ({first_line(error)}): fetch or make it anew") from None
    return DAC(fold_weight_norm(model)) if is_dac else model, weights


def load_official(release: str, name: str) -> tuple[nn.Module, dict]:
    """`load_file` of one of DAC's releases, fetched once. Raises CodecError without a network."""
    if not (CACHE / name).exists():
        download(RELEASES + release, CACHE / name)
    return load_file(CACHE / name)


def load_transform() -> tuple[nn.Module, dict]:
    return importlib.import_module("recipes.transform_codec").load_transform()  # which builds on this module


# What --codec knows: for each name a function that returns a bare network and its weights, the same every time, a dict
# of tensors whose fingerprint tells codecs apart whatever their files are called.
CODECS = {
    "bundled": lambda: load_file(ASSETS / "codec.pth"),  # a small SoundStream of recipes/train_codec.py
    "transform": load_transform,  # a Fourier transform, no neural codec
    "lyra": load_lyra,
    "dac_16khz": lambda: load_official("0.0.5/weights_16khz.pth", "weights_16khz_8kbps_0.0.5.pth"),
    "dac_24khz": lambda: load_official("0.0.4/weights_24khz.pth", "weights_24khz_8kbps_0.0.4.pth"),
    "dac_44khz": lambda: load_official("0.0.1/weights.pth", "weights_44khz_8kbps_0.0.1.pth"),
}


def fingerprint(weights: dict) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def measure_lag(reference: torch.Tensor, delayed: torch.Tensor, reach: int) -> tuple[int, float]:
    """The shift in samples, within +-`reach`, at which [T] `delayed` fits [T] `reference` best; positive if late.

    Returns it with the correlation coefficient found there.
    """
    n = 2 * max(len(reference), len(delayed))
    spectrum = torch.fft.rfft(delayed.double(), n) * torch.fft.rfft(reference.double(), n).conj()
    correlation = torch.fft.irfft(spectrum, n).roll(reach)[: 2 * reach + 1]
    best = int(correlation.argmax())
    return best - reach, float(correlation[best] / (reference.double().norm() * delayed.double().norm() + 1e-12))


class Codec:
    """A frozen bare network between waveforms [..., T] at `sample_rate` and latents [..., D, F], whatever is in front.

    Facts: sample_rate (of the data), codec_rate (the network's), frame_rate (latents per second), latent_dim (D),
    n_codebooks (in use: the RVQ's first), bitrate (theirs, bits per second), lag (samples at codec_rate by which
    the bare network is late; already removed), name and fingerprint (of the weights), device.
    """

    def __init__(self, network: nn.Module, sample_rate: int, name: str = "", fingerprint: str = "", device="cpu"):
        """Raises CodecError if `sample_rate` is out of range or the speech for measuring the lag is missing."""
        if not 1000 <= sample_rate <= 192000:
            raise CodecError(f"sample rate {sample_rate} Hz is out of range: 1000 to 192000")
        self.network = network.to(device).eval().requires_grad_(False)
        self.name, self.fingerprint, self.device = name, fingerprint, torch.device(device)
        self.sample_rate, self.codec_rate, self.hop = sample_rate, network.sample_rate, network.hop_length
        self.frame_rate = self.codec_rate / self.hop
        self.latent_dim, self.n_codebooks = network.latent_dim, network.n_codebooks
        self.lag = 0
        self.lag = self._measure_lag()

    def use_codebooks(self, n: int) -> None:
        """Sets the rate: `quantize` and `transmit` use the RVQ's first n codebooks from now on. Raises CodecError."""
        if not 1 <= n <= self.network.n_codebooks:
            raise CodecError(f"{n} codebooks asked for, {self.name} has 1 to {self.network.n_codebooks}")
        self.n_codebooks = n

    @property
    def bitrate(self) -> float:
        return self.n_codebooks * math.log2(self.network.codebook_size) * self.frame_rate

    @classmethod
    def load(cls, name: str = "transform", sample_rate: int = 8000, device="cpu") -> "Codec":
        """Loads one of CODECS (official ones are fetched once) or a weights file.

        Raises CodecError for an unknown name, a missing network and a broken file.
        """
        network, weights = CODECS[name]() if name in CODECS else load_file(name)
        return cls(network, sample_rate, name, fingerprint(weights), device)

    @torch.no_grad()
    def _measure_lag(self) -> int:
        speech = calibration_speech(self.sample_rate).to(self.device)
        # At the codec's own rate, so that whole samples are removed there and resampling stays out of it.
        wav = self._resample(speech * self.gain(speech), self.sample_rate, self.codec_rate)
        latents = self.quantize(self._encode(wav))
        lag, correlation = measure_lag(wav[0], self._decode(latents, wav.shape[-1])[0], reach=2 * self.hop)
        if correlation < 0.3:
            warnings.warn(
                f"codec {self.name or 'given'}: its output barely resembles its input (correlation "
                f"{correlation:.2f}), so no lag was measured or removed",
                stacklevel=2,
            )
            return 0
        return lag

    @property
    def samples_per_frame(self) -> int:
        """Samples of the data in a frame of latents. Raises CodecError where that is no whole number."""
        if self.hop * self.sample_rate % self.codec_rate:
            raise CodecError(f"a frame of {self.name} is no whole number of samples: train without --loss_seconds")
        return self.hop * self.sample_rate // self.codec_rate

    def margins(self) -> tuple[int, int]:
        """Frames before and after a moment that coding it depends on: they hold 99 % of its gradient's energy.

        Of the gradient of a latent by the waveform, and of a frame of waveform by the latents, one added to the other:
        a part of a signal that is coded by itself lacks that much at its ends.
        """
        speech = calibration_speech(self.codec_rate)[:, : 100 * self.hop].to(self.device)
        wav = (speech * self.gain(speech)).view(-1, self.hop).requires_grad_()
        latents = self._encode(wav.view(1, -1))[0].T  # [F, D]
        given, n, reach = latents.detach().requires_grad_(), len(wav), len(wav) // 4
        decoded = self._decode(given.T[None], wav.numel()).view(n, self.hop)
        margins = [0, 0]
        for outputs, inputs in ((latents, wav), (decoded, given)):
            (gradient,) = torch.autograd.grad(outputs[n // 2].square().sum(), inputs, retain_graph=True)
            energy = gradient.square().sum(1)[n // 2 - reach : n // 2 + reach + 1]
            for side, tail in enumerate((energy[:reach], energy[reach + 1 :].flip(0))):  # from the far end
                margins[side] += int((tail.cumsum(0) > 0.005 * energy.sum()).sum())
        return tuple(margins)

    def gain(self, wav: torch.Tensor) -> torch.Tensor:
        """The factor that brings each signal to the level that codecs are fed at; [..., T] -> [..., 1].

        Silence gets 1.
        """
        rms = wav.square().mean(-1, keepdim=True).sqrt()
        return torch.where(rms > 1e-8, LEVEL / rms.clamp(min=1e-8), torch.ones_like(rms))

    def encode(self, wav: torch.Tensor) -> torch.Tensor:
        """[..., T] at `sample_rate` -> continuous latents [..., D, F], F = ceil of (T + lag) in hops; T >= 1."""
        if wav.ndim < 2 or wav.shape[-1] < 1:
            raise ValueError(f"expected waveforms [batch, samples], got {list(wav.shape)}")
        latents = self._encode(self._resample(wav.flatten(0, -2), self.sample_rate, self.codec_rate))
        return latents.unflatten(0, wav.shape[:-1])

    def quantize(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [..., D, F] through the codebooks in use and back; gradients pass straight through."""
        return self.network.quantize(latents.flatten(0, -3), self.n_codebooks).view_as(latents)

    def decode(self, latents: torch.Tensor, length: int) -> torch.Tensor:
        """Latents [..., D, F] -> [..., length] at `sample_rate`, in time with what was encoded; differentiable."""
        wav = self._decode(latents.flatten(0, -3), math.ceil(length * self.codec_rate / self.sample_rate))
        wav = self._resample(wav, self.codec_rate, self.sample_rate)
        return F.pad(wav, (0, length - wav.shape[-1])).unflatten(0, latents.shape[:-2])

    def transmit(self, wav: torch.Tensor, quantize: bool = True) -> torch.Tensor:
        """What a receiver hears: brought to level, encoded, quantised, decoded, level undone; [..., T] -> [..., T]."""
        gain = self.gain(wav)
        latents = self.encode(wav * gain)
        if quantize:
            latents = self.quantize(latents)
        return self.decode(latents, wav.shape[-1]) / gain

    def _resample(self, wav: torch.Tensor, from_rate: int, to_rate: int) -> torch.Tensor:
        if from_rate == to_rate:
            return wav
        length = math.ceil(wav.shape[-1] * to_rate / from_rate)
        return julius.resample_frac(wav, from_rate, to_rate, output_length=length)

    def _in_parts(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        # On a CPU, more than a few signals fall out of the cache: 83 audio seconds a second on a core, in parts 134.
        return torch.cat([module(part) for part in x.split(4)]) if self.device.type == "cpu" else module(x)

    def _encode(self, wav: torch.Tensor) -> torch.Tensor:
        # A late codec needs the frames that hold the last `lag` samples.
        frames = math.ceil((wav.shape[-1] + max(self.lag, 0)) / self.hop)
        return self._in_parts(self.network.encoder, F.pad(wav, (0, frames * self.hop - wav.shape[-1]))[:, None])

    def _decode(self, latents: torch.Tensor, length: int) -> torch.Tensor:
        wav = self._in_parts(self.network.decoder, latents)[:, 0]
        wav = F.pad(wav, (-self.lag, 0))  # negative padding crops
        return F.pad(wav, (0, length - wav.shape[-1]))


def calibration_speech(sample_rate: int) -> torch.Tensor:
    """Four seconds of bundled speech [1, T] at `sample_rate`. Raises CodecError if it is missing."""
    path = ASSETS / "speech" / "train" / "carlo" / "00.ogg"
    try:
        speech, rate = sf.read(path, frames=32000, dtype="float32")
    except (sf.LibsndfileError, OSError):
        raise CodecError(f"{path} is missing, on which a codec's lag is measured: restore the assets folder") from None
    return julius.resample_frac(torch.from_numpy(speech)[None], rate, sample_rate)
