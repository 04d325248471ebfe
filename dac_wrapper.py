"""The neural audio codec: a frozen Descript Audio Codec (DAC) that is exact in time, length and level.

    codec = Codec.load("bundled", sample_rate=8000)      # or dac_16khz, dac_24khz, dac_44khz, a path
    latents = codec.encode(wav)                          # [..., T] -> [..., D, F]
    wav = codec.decode(codec.quantize(latents), length)  # [..., D, F] -> [..., length]

What is unusual:
- DAC returns fewer samples than it was given where a stride is odd, and trained weights can shift the signal
  (the 16 kHz model by 8 samples, which alone turns a good SI-SDR into -20 dB; issues 37, 42, 72 and 118 of
  descript-audio-codec). The shift belongs to the weights, so `Codec` measures it on real speech when it loads
  and removes it.
- `encode` and `decode` leave the level alone. DAC was trained near one level, so callers multiply by
  `codec.gain(wav)` before encoding and divide after decoding; `transmit` does both.
- Weights are read as plain tensors, never as code, with weight norm folded away once.

`python dac_wrapper.py --out FILE` makes the small codec that comes with the repository: see `fit_codec`.
DAC is Kumar et al., 2023, https://arxiv.org/abs/2306.06546.
"""

import copy
import hashlib
import importlib
import math
import os
import sys
import types
import urllib.request
import warnings
from pathlib import Path

import julius
import numpy as np
import soundfile as sf
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

ASSETS = Path(__file__).resolve().parent / "assets"
CACHE = Path.home() / ".cache" / "descript" / "dac"  # the dac package's own
OFFICIAL = {
    "dac_16khz": ("0.0.5/weights_16khz.pth", "weights_16khz_8kbps_0.0.5.pth"),
    "dac_24khz": ("0.0.4/weights_24khz.pth", "weights_24khz_8kbps_0.0.4.pth"),
    "dac_44khz": ("0.0.1/weights.pth", "weights_44khz_8kbps_0.0.1.pth"),
}
RELEASES = "https://github.com/descriptinc/descript-audio-codec/releases/download/"
LEVEL = 10 ** (-25 / 20)  # RMS at which a codec is fed: loud enough for DAC, peaks far from its final tanh


class CodecError(ValueError):
    """The codec can't be had; the message is one line that says what to do."""


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def import_dac():
    """Imports the `dac` package also where torchaudio is missing or broken.

    dac reaches torchaudio only through audiotools, which uses none of it for the model. PyPI's torchaudio needs
    a CUDA build of torch and dies beside a CPU build, so there an empty module takes its place for the import.
    """
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
    """Fetches `url` to `path` with a progress bar; a broken transfer leaves nothing under that name."""
    partial = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as response, open(partial, "wb") as file:
            total = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=total, unit="B", unit_scale=True, desc=f"fetching {path.name}") as bar:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
            if total and bar.n != total:
                raise OSError(f"the connection ended after {bar.n} of {total} bytes")
        os.replace(partial, path)
    except OSError as error:
        raise CodecError(f"can't fetch {url} ({error}): fetch it elsewhere and put it at {path}") from None
    finally:
        partial.unlink(missing_ok=True)


def load_dac(path) -> tuple[nn.Module, str]:
    """Builds a `dac.DAC` from a weights file of the official format (a dict of state_dict and metadata.kwargs).

    Returns it frozen, with a fingerprint of the weights that tells codecs apart whatever their files are called.
    Raises CodecError for a file that is missing, broken, of another kind, or that would run code.
    """
    import_dac()  # a package that can't be imported is no fault of the file
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state = checkpoint["state_dict"]
        model = build_dac(checkpoint["metadata"]["kwargs"])
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    except FileNotFoundError:
        raise CodecError(
            f"no codec {path}: use bundled, {', '.join(OFFICIAL)} or the path of a DAC weights file"
        ) from None
    except Exception as error:  # torch.load raises half a dozen types on a file that is not one of ours
        raise CodecError(f"{path} is no DAC weights file ({first_line(error)}): fetch or make it anew") from None
    fold_weight_norm(model)
    drop_silent_units(model)
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(state):
        digest.update(name.encode() + state[name].contiguous().numpy().tobytes())
    return model.eval().requires_grad_(False), digest.hexdigest()


def build_dac(shape: dict) -> nn.Module:
    """An untrained `dac.DAC` of that shape."""
    dac = import_dac()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # dac uses the old weight_norm
        return dac.DAC(**shape)


def fold_weight_norm(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "weight_g"):
            nn.utils.remove_weight_norm(module)


def drop_silent_units(model: nn.Module) -> None:
    """Removes residual units whose last convolution is all zeros: they add nothing and cost most of the time."""
    for block in [*model.encoder.block, *model.decoder.model]:
        for name, unit in list(block.named_modules()):
            if type(unit).__name__ == "ResidualUnit" and not any(p.any() for p in unit.block[3].parameters()):
                block.set_submodule(name, nn.Identity())


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
    """A frozen DAC between waveforms [..., T] at `sample_rate` and latents [..., D, F], whatever is in front.

    Facts: sample_rate (of the data), codec_rate (its own), frame_rate (latents per second), latent_dim (D),
    n_codebooks, bitrate (bits per second, all codebooks), lag (samples at codec_rate by which the bare model is
    late; already removed), name and fingerprint (of the weights).
    """

    def __init__(self, dac: nn.Module, sample_rate: int, name: str = "", fingerprint: str = "", device="cpu"):
        """Raises CodecError if `sample_rate` is out of range or the speech for measuring the lag is missing."""
        if not 1000 <= sample_rate <= 192000:
            raise CodecError(f"sample rate {sample_rate} Hz is out of range: 1000 to 192000")
        self.dac = dac.to(device)
        self.name, self.fingerprint, self.device = name, fingerprint, torch.device(device)
        self.sample_rate, self.codec_rate = sample_rate, int(dac.sample_rate)
        self.hop = int(dac.hop_length)
        self.frame_rate = self.codec_rate / self.hop
        self.latent_dim, self.n_codebooks = int(dac.latent_dim), int(dac.n_codebooks)
        self.bitrate = self.n_codebooks * math.log2(dac.codebook_size) * self.frame_rate
        self.lag = 0
        self.lag = self._measure_lag()

    @classmethod
    def load(cls, name: str = "bundled", sample_rate: int = 8000, device="cpu") -> "Codec":
        """Loads `bundled`, `dac_16khz`, `dac_24khz`, `dac_44khz` (fetched once) or a DAC weights file.

        Raises CodecError for an unknown name, a missing network and a broken file.
        """
        path = Path(name)
        if name == "bundled":
            path = ASSETS / "codec.pth"
        elif name in OFFICIAL:
            remote, local = OFFICIAL[name]
            path = CACHE / local
            if not path.exists():
                download(RELEASES + remote, path)
        dac, fingerprint = load_dac(path)
        return cls(dac, sample_rate, name, fingerprint, device)

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

    def gain(self, wav: torch.Tensor) -> torch.Tensor:
        """The factor that brings each signal to the level that codecs are fed at; [..., T] -> [..., 1].

        Silence gets 1.
        """
        rms = wav.square().mean(-1, keepdim=True).sqrt()
        return torch.where(rms > 1e-8, LEVEL / rms.clamp(min=1e-8), torch.ones_like(rms))

    def encode(self, wav: torch.Tensor) -> torch.Tensor:
        """[..., T] at `sample_rate` -> continuous latents [..., D, F] with F = ceil of T in hops. Any T >= 1."""
        if wav.ndim < 2 or wav.shape[-1] < 1:
            raise ValueError(f"expected waveforms [batch, samples], got {list(wav.shape)}")
        latents = self._encode(self._resample(wav.flatten(0, -2), self.sample_rate, self.codec_rate))
        return latents.unflatten(0, wav.shape[:-1])

    def quantize(self, latents: torch.Tensor, n_codebooks: int | None = None) -> torch.Tensor:
        """Latents [..., D, F] through the RVQ and back, with its first `n_codebooks` (all by default).

        Gradients pass straight through. Raises ValueError for a number of codebooks the codec doesn't have.
        """
        n_codebooks = self.n_codebooks if n_codebooks is None else n_codebooks
        if not 1 <= n_codebooks <= self.n_codebooks:
            raise ValueError(f"{n_codebooks} codebooks asked for, the codec has 1 to {self.n_codebooks}")
        return self.dac.quantizer(latents.flatten(0, -3), n_codebooks)[0].view_as(latents)

    def decode(self, latents: torch.Tensor, length: int) -> torch.Tensor:
        """Latents [..., D, F] -> [..., length] at `sample_rate`, in time with what was encoded; differentiable."""
        wav = self._decode(latents.flatten(0, -3), math.ceil(length * self.codec_rate / self.sample_rate))
        wav = self._resample(wav, self.codec_rate, self.sample_rate)
        return F.pad(wav, (0, length - wav.shape[-1])).unflatten(0, latents.shape[:-2])

    def transmit(self, wav: torch.Tensor, quantize: bool = True, n_codebooks: int | None = None) -> torch.Tensor:
        """What a receiver hears: brought to level, encoded, quantised, decoded, level undone; [..., T] -> [..., T]."""
        gain = self.gain(wav)
        latents = self.encode(wav * gain)
        if quantize:
            latents = self.quantize(latents, n_codebooks)
        return self.decode(latents, wav.shape[-1]) / gain

    def _resample(self, wav: torch.Tensor, from_rate: int, to_rate: int) -> torch.Tensor:
        if from_rate == to_rate:
            return wav
        return julius.resample_frac(
            wav, from_rate, to_rate, output_length=math.ceil(wav.shape[-1] * to_rate / from_rate)
        )

    def _in_parts(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        # On a CPU, more than a few signals fall out of the cache: 83 audio seconds a second on a core, in parts 134.
        return torch.cat([module(part) for part in x.split(4)]) if self.device.type == "cpu" else module(x)

    def _encode(self, wav: torch.Tensor) -> torch.Tensor:
        # A late codec needs the frames that hold the last `lag` samples.
        frames = math.ceil((wav.shape[-1] + max(self.lag, 0)) / self.hop)
        return self._in_parts(self.dac.encoder, F.pad(wav, (0, frames * self.hop - wav.shape[-1]))[:, None])

    def _decode(self, latents: torch.Tensor, length: int) -> torch.Tensor:
        wav = self._in_parts(self.dac.decoder, latents)[:, 0]
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


# Making the small codec ----------------------------------------------------------------------------------------------

DAC_16KHZ = dict(
    encoder_dim=64, encoder_rates=[2, 4, 5, 8], latent_dim=1024, decoder_dim=1536, decoder_rates=[8, 5, 4, 2],
    n_codebooks=12, codebook_size=1024, codebook_dim=8, sample_rate=16000,
)  # fmt: skip
SMALL = dict(
    encoder_dim=16, encoder_rates=[5, 4, 4, 2], latent_dim=320, decoder_dim=256, decoder_rates=[2, 4, 4, 5],
    n_codebooks=12, codebook_size=1024, codebook_dim=8, sample_rate=8000,
)  # fmt: skip


def random_dac(shape: dict) -> nn.Module:
    """`build_dac` with the weight norm folded, in evaluation mode."""
    model = build_dac(shape)
    fold_weight_norm(model)
    return model.eval()


@torch.no_grad()
def start_as_lapped_transform(model: nn.Module) -> None:
    """Sets a DAC of the SMALL shape up so that its latents are a windowed Fourier transform and it is transparent.

    Random weights would first have to learn to pass a waveform through. But the strided convolutions can hold a
    transform exactly: each block passes the samples of its stride on as channels, the last convolution of the
    encoder sees three frames of 160 samples each and projects a 40 ms sine window of them on 160 cosines and 160
    sines (the MDCT and its sine twin, Princen and Bradley 1986), and the first of the decoder inverts that. Masks on
    such latents are what separators with a short-time Fourier transform learn. The Snakes on this path are nearly
    linear, and the residual units add nothing.
    """
    rates = model.encoder_rates
    hop = math.prod(rates)
    for module in model.modules():
        if type(module).__name__ == "ResidualUnit":
            module.block[3].weight.zero_()
        elif isinstance(module, nn.ConvTranspose1d):
            module.bias.zero_()
    encoder, decoder = model.encoder.block, model.decoder.model
    for block in encoder[1:-2]:
        block.block[3].alpha.fill_(0.01)
    encoder[-2].alpha.fill_(0.01)
    for block in decoder[1:-3]:
        block.block[0].alpha.fill_(0.01)
    decoder[-3].alpha.fill_(0.01)

    # Channel c of a block holds sample offsets[c] of each of its frames.
    encoder[0].weight[0], encoder[0].weight[0, 0, 3] = 0, 1
    offsets, length = [0], 1
    for stride, block in zip(rates, encoder[1:-2]):
        block.block[4].weight[: len(offsets) * stride] = 0
        pass_samples(block.block[4].weight, len(offsets), stride)
        offsets = [offset + k * length for offset in offsets for k in range(stride)]
        length *= stride

    time = torch.arange(2 * hop, dtype=torch.float64) + 0.5
    bins = torch.arange(hop, dtype=torch.float64)[:, None] + 0.5
    phase = math.pi / hop * (time + hop / 2) * bins
    basis = torch.cat([phase.cos(), phase.sin()]) * torch.sin(math.pi * time / (2 * hop)) / math.sqrt(hop)
    # One scale for all, so that distances between latents are distances between waveforms; loud latents come to about 1.
    scale = 32.0
    analysis, synthesis = encoder[-1].weight.zero_(), decoder[0].weight
    synthesis *= 0.01
    synthesis[:hop] = 0
    for channel, offset in enumerate(offsets):
        for tap in (-1, 0, 1):
            position = tap * hop + offset + hop // 2  # in the window
            if 0 <= position < 2 * hop:
                analysis[:, channel, 1 + tap] = (basis[:, position] * scale).float()
                synthesis[channel, :, 3 - tap] = (basis[:, position] / scale).float()

    for stride, block in zip(reversed(rates), decoder[1:-3]):
        offsets = offsets[::stride]
        block.block[1].weight[:, : len(offsets)] = 0
        pass_samples(block.block[1].weight, len(offsets), stride)
    decoder[-2].weight *= 0.01
    decoder[-2].weight[0], decoder[-2].weight[0, 0, 3] = 0, 1


def pass_samples(weight: torch.Tensor, channels: int, stride: int) -> None:
    """Sets the ones by which a strided convolution hands `stride` samples of each channel on as channels.

    The same places in a transposed convolution's weight make it hand them back.
    """
    for channel in range(channels):
        for k in range(stride):
            weight[channel * stride + k, channel, k + math.ceil(stride / 2)] = 1


@torch.no_grad()
def fit_quantizer(model: nn.Module, latents: torch.Tensor, iterations: int = 10) -> None:
    """Fits the RVQ to latents [N, D], codebook after codebook, by k-means on 7 principal axes of what is left.

    DAC looks codes up by angle alone, which suits loud frames only. So the 8th dimension of each code is a
    constant of 4 standard deviations: seen from there, angles order the codes almost as distances do.
    """
    rest = latents
    for quantizer in tqdm(model.quantizer.quantizers, desc="fitting codebooks"):
        axes = torch.linalg.eigh(rest.T @ rest)[1][:, -7:]  # [D, 7]
        points = rest @ axes
        scale = points.square().sum(1).mean().sqrt()
        points = points / scale
        codes = points[torch.randperm(len(points))[: len(quantizer.codebook.weight)]]
        for _ in range(iterations):
            nearest = torch.cat([torch.cdist(part, codes).argmin(1) for part in points.split(10000)])
            sums = torch.zeros_like(codes).index_add_(0, nearest, points)
            count = torch.bincount(nearest, minlength=len(codes))[:, None]
            codes = torch.where(count > 0, sums / count.clamp(min=1), codes)
        height = 4.0
        quantizer.codebook.weight.copy_(F.pad(codes, (0, 1), value=height))
        quantizer.in_proj.weight.copy_(F.pad(axes / scale, (0, 1)).T[..., None])
        quantizer.in_proj.bias.copy_(F.pad(torch.zeros(7), (0, 1), value=height))
        quantizer.out_proj.weight.copy_(F.pad(axes * scale, (0, 1))[..., None])
        quantizer.out_proj.bias.zero_()
        rest = rest - quantizer(rest.T[None])[0][0].T


def fit_codec(speech, seconds: int = 400, seed: int = 0, voices_only: bool = False) -> nn.Module:
    """A DAC of the SMALL shape whose encoder and decoder are a transform and whose codebooks are fitted to speech.

    speech: folder of speakers; seconds: of mixtures, and of each of their two voices; voices_only: the mixtures are
    replaced by as much of more voices. Raises DataError.
    """
    from data import SpeakerMixtures  # here, since loading a codec needs no data

    torch.manual_seed(seed)
    model = random_dac(SMALL)
    start_as_lapped_transform(model)
    fast = copy.deepcopy(model)
    drop_silent_units(fast)
    size = seconds * 3 // 2 if voices_only else seconds
    mixtures = SpeakerMixtures(speech, SMALL["sample_rate"], 1.0, size, seed, speeds=(85, 100, 118))
    frames = []
    for index in tqdm(range(size), desc="encoding speech", unit="mixture"):
        item = mixtures[index]
        signals = [item["sources"]] if voices_only else [item["sources"], item["mixture"][None]]
        wav = torch.from_numpy(np.concatenate(signals))  # [2 or 3, T]
        # Some way around the level that the codec is fed at.
        wav = wav * LEVEL / wav.std(-1, keepdim=True).clamp(min=1e-4) * 10 ** (torch.randn(len(wav), 1) * 3 / 20)
        with torch.no_grad():
            frames.append(fast.encoder(wav[:, None]).transpose(1, 2).flatten(0, 1))
    fit_quantizer(model, torch.cat(frames))
    return model


def score_codec(codec: Codec, speech, size: int = 100) -> dict[str, tuple[float, float]]:
    """The mean SI-SDR in dB, {"voices" or "mixtures": (continuous, quantised)}, on `size` mixtures of 4 s of `speech`.

    speech: folder of speakers, which should not be those that the codec was fitted to. Raises DataError.
    """
    from data import SpeakerMixtures
    from losses import si_sdr

    scores = {"voices": ([], []), "mixtures": ([], [])}
    mixtures = SpeakerMixtures(speech, codec.sample_rate, 4.0, size, seed=1)
    for index in tqdm(range(size), desc="scoring", unit="mixture"):
        item = mixtures[index]
        for kind, signals in (("voices", item["sources"]), ("mixtures", item["mixture"][None])):
            wav = torch.from_numpy(signals)
            for quantize, values in zip((False, True), scores[kind]):
                values += si_sdr(codec.transmit(wav, quantize), wav).tolist()
    return {kind: tuple(float(np.mean(values)) for values in both) for kind, both in scores.items()}


def save_dac(model: nn.Module, path) -> None:
    """Writes a folded DAC in the official format, in half precision."""
    state = {}
    for name, module in model.named_modules():
        for key, tensor in module.named_parameters(prefix=name, recurse=False):
            if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)) and key.endswith("weight"):
                norm = tensor.detach().flatten(1).norm(dim=1).view(-1, 1, 1)
                state[f"{key}_g"] = norm.half()
                # A direction of zeros has no norm to divide by; any other does for a gain of zero.
                state[f"{key}_v"] = torch.where(norm > 0, tensor.detach(), 1.0).half()
            else:
                state[key] = tensor.detach().half()
    torch.save({"state_dict": state, "metadata": {"kwargs": SMALL}}, path)


def main():
    from data import Parser, list_speakers

    parser = Parser(description="Makes the small codec that comes with the repository.")
    parser.add_argument("--speech", default=str(ASSETS / "speech/train"), help="folder with one folder per speaker")
    parser.add_argument("--seconds", type=int, default=400, help="of mixtures that the codebooks are fitted to")
    parser.add_argument("--voices_only", action="store_true", help="fit to single voices, without mixtures")
    parser.add_argument("--valid", default=str(ASSETS / "speech/valid"), help="folder of other speakers, to score it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="weights file to write")
    args = parser.parse_args()
    if args.seconds < 60 or args.seed < 0:
        parser.error("--seconds must be at least 60, to fill the codebooks, and --seed at least 0")
    if Path(args.out).exists():
        parser.error(f"{args.out} exists already: remove it or choose another --out")
    list_speakers(args.valid)  # raises at once where they are missing, not after the fit
    save_dac(fit_codec(args.speech, args.seconds, args.seed, args.voices_only), args.out)
    codec = Codec.load(args.out, SMALL["sample_rate"])
    for kind, (continuous, quantised) in score_codec(codec, args.valid).items():
        print(f"{kind:8} {continuous:.2f} dB SI-SDR, {quantised:.2f} at {codec.bitrate / 1000:g} kbit/s")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # DataError and CodecError
        sys.exit(f"error: {error}")
