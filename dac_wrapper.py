"""The neural audio codec: a frozen network such as the Descript Audio Codec (DAC), exact in time.

    codec = Codec.load("dac_16khz", sample_rate=8000)    # a name in CODECS, or a weights file
    latents = codec.encode(wav)                          # [..., T] -> [..., D, F]
    wav = codec.decode(codec.quantize(latents), length)  # [..., D, F] -> [..., length]
    codes = codec.to_codes(latents)                      # [..., N, F], what is sent
    latents = codec.from_codes(codes)                    # what a receiver makes of it

What is unusual:
- DAC returns fewer samples than it was given where a stride is odd, and trained weights can shift
  the signal (the 16 kHz model by 8 samples, which alone turns a good SI-SDR into -20 dB; issues 37,
  42, 72 and 118 of descript-audio-codec). `Codec` measures the shift of the weights on real speech
  as it loads, and undoes it.
- `encode` and `decode` leave the level alone. DAC was trained near one level, so callers multiply
  by `codec.gain(wav)` before encoding and divide after decoding; `transmit` does both.
- Weights are read as plain tensors, never as code, with weight norm folded away once.

A codec of your own is a bare network, at whatever rate, length, shift and level it was made, and a
line in CODECS: `Codec` wraps it, and nobody else looks at it. The network is a module with

    encoder         a module: waveforms [B, 1, F * hop_length] -> latents [B, D, F]
    decoder         a module: latents [B, D, F] -> waveforms [B, 1, about F * hop_length]
    quantize        latents [B, D, F], n -> the same through its first n codebooks, with gradients
                    that pass straight through, and codes [B, n, F]
    dequantize      codes [B, n, F] -> latents [B, D, F], to the last bit those of `quantize`
    sample_rate, hop_length, latent_dim, n_codebooks, codebook_size

DAC is Kumar et al., 2023, https://arxiv.org/abs/2306.06546.
"""

import hashlib
import importlib
import math
import sys
import types
import warnings
from pathlib import Path

import julius
import soundfile as sf
import torch
import torch.nn.functional as F
from torch import nn

from lyra import load_lyra
from program import ASSETS, UserError, download, first_line, load_tensors
from soundstream import restore_soundstream

# RMS at which a codec is fed: loud enough for DAC, and peaks are far from its final tanh.
LEVEL = 10 ** (-25 / 20)


class Codec:
    """A frozen bare network between waveforms [..., T] at `sample_rate` and latents [..., D, F].

    `...` is one dimension or more. Facts:
        sample_rate, codec_rate         Hz, of the data and of the network
        frame_rate                      latents per second
        latent_dim                      D
        n_codebooks, bitrate            in use: the RVQ's first N, and their bits per second
        lag                             samples at codec_rate by which the bare network is late;
                                        already removed
        name, fingerprint               of the weights
        device
    """

    def __init__(
        self,
        network: nn.Module,
        sample_rate: int,
        name: str = "",
        fingerprint: str = "",
        device="cpu",
    ):
        """Raises UserError if `sample_rate` is out of range, or the bundled speech is missing."""
        if not 1000 <= sample_rate <= 192000:
            raise UserError(f"sample rate {sample_rate} Hz is out of range: 1000 to 192000")
        self.network = network.to(device).eval().requires_grad_(False)
        self.name = name
        self.fingerprint = fingerprint
        self.device = torch.device(device)
        self.sample_rate = sample_rate
        self.codec_rate = network.sample_rate
        self.hop = network.hop_length
        self.frame_rate = self.codec_rate / self.hop
        self.latent_dim = network.latent_dim
        self.n_codebooks = network.n_codebooks
        self.lag = 0
        self.lag = self._measure_lag()

    @classmethod
    def load(cls, name: str, sample_rate: int = 8000, device="cpu") -> "Codec":
        """Loads one of CODECS (official ones are fetched once) or a weights file.

        Raises UserError for an unknown name, a missing network and a broken file.
        """
        network, weights = CODECS[name]() if name in CODECS else load_file(name)
        return cls(network, sample_rate, name, fingerprint(weights), device)

    # Level

    def gain(self, wav: torch.Tensor) -> torch.Tensor:
        """The factor that brings each signal to the codec's level; [..., T] -> [..., 1].

        Silence gets 1.
        """
        rms = wav.square().mean(-1, keepdim=True).sqrt()
        return torch.where(rms > 1e-8, LEVEL / rms.clamp(min=1e-8), torch.ones_like(rms))

    # Waveforms to latents and back

    def encode(self, wav: torch.Tensor) -> torch.Tensor:
        """[..., T] at `sample_rate` -> latents [..., D, F]; T >= 1.

        F = ceil((samples + max(lag, 0)) / hop), with samples counted at the codec's rate.
        """
        if wav.ndim < 2 or wav.shape[-1] < 1:
            raise ValueError(f"expected waveforms [batch, samples], got {list(wav.shape)}")
        flat = self._resample(wav.flatten(0, -2), self.sample_rate, self.codec_rate)
        return self._encode(flat).unflatten(0, wav.shape[:-1])

    def decode(self, latents: torch.Tensor, length: int) -> torch.Tensor:
        """Latents [..., D, F] -> [..., length] at `sample_rate`, in time with what was encoded.

        Gradients flow through it.
        """
        codec_length = math.ceil(length * self.codec_rate / self.sample_rate)
        wav = self._decode(latents.flatten(0, -3), codec_length)
        wav = self._resample(wav, self.codec_rate, self.sample_rate)
        wav = F.pad(wav, (0, length - wav.shape[-1]))
        return wav.unflatten(0, latents.shape[:-2])

    def transmit(self, wav: torch.Tensor, quantize: bool = True) -> torch.Tensor:
        """What a receiver hears: brought to level, encoded, quantised, decoded, the level undone.

        [..., T] -> [..., T]
        """
        gain = self.gain(wav)
        latents = self.encode(wav * gain)
        if quantize:
            latents = self.quantize(latents)
        return self.decode(latents, wav.shape[-1]) / gain

    # Latents to codes and back

    def use_codebooks(self, n: int) -> None:
        """Sets the bitrate: from now on the RVQ's first n codebooks are used. Raises UserError."""
        if not 1 <= n <= self.network.n_codebooks:
            have = self.network.n_codebooks
            raise UserError(f"{n} codebooks asked for, {self.name} has 1 to {have}")
        self.n_codebooks = n

    @property
    def bitrate(self) -> float:
        bits = math.log2(self.network.codebook_size)  # of a code
        return self.n_codebooks * bits * self.frame_rate

    def quantize(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [..., D, F] through the codebooks in use; gradients pass straight through."""
        quantised, _ = self.network.quantize(latents.flatten(0, -3), self.n_codebooks)
        return quantised.view_as(latents)

    @torch.no_grad()
    def to_codes(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [..., D, F] -> codes [..., N, F], integers below the size of a codebook."""
        _, codes = self.network.quantize(latents.flatten(0, -3), self.n_codebooks)
        return codes.unflatten(0, latents.shape[:-2])

    @torch.no_grad()
    def from_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [..., N, F] of the first N codebooks -> latents [..., D, F].

        Those of `to_codes(z)` give `quantize(z)` to the last bit. Raises UserError for codes that
        this codec can't have made.
        """
        size = self.network.codebook_size
        if not 1 <= codes.shape[-2] <= self.network.n_codebooks:
            have = self.network.n_codebooks
            raise UserError(f"codes of {codes.shape[-2]} codebooks, {self.name} has 1 to {have}")
        if codes.numel() and not 0 <= codes.min() <= codes.max() < size:
            found = f"{int(codes.min())} to {int(codes.max())}"
            raise UserError(f"codes from {found}, those of {self.name} are 0 to {size - 1}")
        latents = self.network.dequantize(codes.flatten(0, -3))
        return latents.unflatten(0, codes.shape[:-2])

    # Inside

    @property
    def samples_per_frame(self) -> int:
        """Samples of the data in a frame, by which waveforms are cropped along with latents.

        Raises UserError if that is no whole number.
        """
        samples = self.hop * self.sample_rate
        if samples % self.codec_rate:
            raise UserError(f"frames of {self.name} are no whole samples: leave out --loss_seconds")
        return samples // self.codec_rate

    @torch.no_grad()
    def _measure_lag(self) -> int:
        speech = calibration_speech(self.sample_rate).to(self.device)
        # At the codec's own rate, so that whole samples are removed and resampling stays out of it.
        wav = self._resample(speech * self.gain(speech), self.sample_rate, self.codec_rate)
        decoded = self._decode(self.quantize(self._encode(wav)), wav.shape[-1])
        lag, correlation = measure_lag(wav[0], decoded[0], reach=2 * self.hop)
        if correlation < 0.3:
            warnings.warn(
                f"codec {self.name or 'given'}: its output barely resembles its input (correlation "
                f"{correlation:.2f}), so no lag was measured or removed; is its RVQ trained?",
                stacklevel=2,
            )
            return 0
        return lag

    def _resample(self, wav: torch.Tensor, from_rate: int, to_rate: int) -> torch.Tensor:
        if from_rate == to_rate:
            return wav
        length = math.ceil(wav.shape[-1] * to_rate / from_rate)
        return julius.resample_frac(wav, from_rate, to_rate, output_length=length)

    def _encode(self, wav: torch.Tensor) -> torch.Tensor:
        # A codec that is late needs the frames that hold the last `lag` samples.
        frames = math.ceil((wav.shape[-1] + max(self.lag, 0)) / self.hop)
        wav = F.pad(wav, (0, frames * self.hop - wav.shape[-1]))
        return self._in_parts(self.network.encoder, wav.unsqueeze(1))

    def _decode(self, latents: torch.Tensor, length: int) -> torch.Tensor:
        wav = self._in_parts(self.network.decoder, latents).squeeze(1)
        wav = F.pad(wav, (-self.lag, 0))  # negative padding crops
        return F.pad(wav, (0, length - wav.shape[-1]))

    def _in_parts(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        # Full-rate activations of more than a few signals fall out of a CPU's cache: all at once
        # are 83 audio seconds a second on a core, in parts of 4 they are 134.
        if self.device.type != "cpu":
            return module(x)
        return torch.cat([module(part) for part in x.split(4)])


def measure_lag(reference: torch.Tensor, late: torch.Tensor, reach: int) -> tuple[int, float]:
    """The shift within +-`reach` samples at which [T] `late` fits [T] `reference` best.

    Positive if late. Returned with the correlation coefficient found there.
    """
    n = 2 * max(len(reference), len(late))
    spectrum = torch.fft.rfft(late.double(), n) * torch.fft.rfft(reference.double(), n).conj()
    correlation = torch.fft.irfft(spectrum, n).roll(reach)[: 2 * reach + 1]
    best = int(correlation.argmax())
    norms = reference.double().norm() * late.double().norm()
    return best - reach, float(correlation[best] / (norms + 1e-12))


def calibration_speech(sample_rate: int) -> torch.Tensor:
    """Four seconds of bundled speech [1, T] at `sample_rate`. Raises UserError if it is missing."""
    path = ASSETS / "speech" / "train" / "carlo" / "00.ogg"
    try:
        speech, rate = sf.read(path, frames=32000, dtype="float32")
    except (sf.LibsndfileError, OSError):
        raise UserError(f"{path} is missing, which codecs are measured on: restore it") from None
    return julius.resample_frac(torch.from_numpy(speech)[None], rate, sample_rate)


def fingerprint(weights: dict) -> str:
    """Tells weights apart, whatever their file is called."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(weights):
        content = weights[name].flatten().view(torch.uint8).numpy().tobytes()
        digest.update(name.encode() + content)
    return digest.hexdigest()


# The networks -------------------------------------------------------------------------------------

CACHE = Path.home() / ".cache" / "descript" / "dac"  # the dac package's own
RELEASES = "https://github.com/descriptinc/descript-audio-codec/releases/download/"


class DAC(nn.Module):
    """A `dac.DAC` as the bare network that `Codec` takes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.encoder = model.encoder
        self.decoder = model.decoder
        self.quantizer = model.quantizer
        self.sample_rate = int(model.sample_rate)
        self.hop_length = int(model.hop_length)
        self.latent_dim = int(model.latent_dim)
        self.n_codebooks = int(model.n_codebooks)
        self.codebook_size = int(model.codebook_size)

    def quantize(self, latents: torch.Tensor, n_codebooks: int):
        """The gradient is DAC's own: straight through each codebook, not around its projections."""
        quantised, codes, *_ = self.quantizer(latents, n_codebooks)
        # What a receiver makes of the codes; the RVQ's own sum is rounded differently in the last
        # bit.
        received = self.dequantize(codes)
        return received.detach() + (quantised - quantised.detach()), codes

    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        return self.quantizer.from_codes(codes)[0]


def load_file(path) -> tuple[nn.Module, dict]:
    """The network in a file in the format of DAC's releases, and its weights as they stand there.

    The format: `state_dict`, and `metadata` with `kwargs`, those of the network's class.
    `save_soundstream` writes the same. Raises UserError for a file that is missing, broken, of
    another kind, or that would run code.
    """
    if not Path(path).exists():
        names = ", ".join(CODECS)
        raise UserError(f"no codec {path}: give --codec one of {names}, or a weights file")
    content = load_tensors(path)
    if isinstance(content, dict) and "separator" in content:
        raise UserError(f"{path} holds a separator, no codec: give --codec weights of one")
    try:
        weights = content["state_dict"]
        kwargs = content["metadata"]["kwargs"]
        if "encoder_dim" not in kwargs:  # which all of DAC's have, and no SoundStream
            return restore_soundstream(content), weights
        model = import_dac().DAC(**kwargs)
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except ImportError:  # no fault of the file
        raise
    except Exception as error:  # whatever a network raises for settings that are not its own
        reason = first_line(error)
        raise UserError(f"{path} is no codec's weights file ({reason}): fetch it anew") from None
    return DAC(fold_weight_norm(model)), weights


def load_official(release: str, name: str) -> tuple[nn.Module, dict]:
    """`load_file` of one of DAC's releases, fetched once. Raises UserError without a network."""
    if not (CACHE / name).exists():
        download(RELEASES + release, CACHE / name)
    return load_file(CACHE / name)


def load_bundled() -> tuple[nn.Module, dict]:
    """The small SoundStream of recipes/train_codec.py."""
    return load_file(ASSETS / "codec.pth")


def load_dac_16khz() -> tuple[nn.Module, dict]:
    return load_official("0.0.5/weights_16khz.pth", "weights_16khz_8kbps_0.0.5.pth")


def load_dac_24khz() -> tuple[nn.Module, dict]:
    return load_official("0.0.4/weights_24khz.pth", "weights_24khz_8kbps_0.0.4.pth")


def load_dac_44khz() -> tuple[nn.Module, dict]:
    return load_official("0.0.1/weights.pth", "weights_44khz_8kbps_0.0.1.pth")


# What --codec knows: a function that returns a bare network and its weights, which are a dictionary
# of tensors, the same every time.
CODECS = {
    "bundled": load_bundled,
    "lyra": load_lyra,
    "dac_16khz": load_dac_16khz,
    "dac_24khz": load_dac_24khz,
    "dac_44khz": load_dac_44khz,
}


def fold_weight_norm(model: nn.Module) -> nn.Module:
    """Computes normed weights once, which else every forward pass does."""
    for module in model.modules():
        if hasattr(module, "weight_g"):
            nn.utils.remove_weight_norm(module)
    return model


def import_dac():
    """The `dac` package."""
    # dac uses the old weight norm.
    warnings.filterwarnings("ignore", ".*weight_norm. is deprecated", FutureWarning)
    return import_package("dac")


def import_package(name: str):
    """Imports a package that wants torchaudio, even where torchaudio is broken.

    PyPI's is, beside a CPU build of torch. Neither dac nor encodec needs it for the model: an empty
    module will do.
    """
    if name in sys.modules:
        return sys.modules[name]
    try:
        importlib.import_module("torchaudio")
        return importlib.import_module(name)
    except (ImportError, OSError):
        for loaded in list(sys.modules):
            if loaded.split(".")[0] in ("torchaudio", "audiotools", name):
                del sys.modules[loaded]
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
        try:
            return importlib.import_module(name)
        finally:
            del sys.modules["torchaudio"]  # others must not take the stand-in for the real one
