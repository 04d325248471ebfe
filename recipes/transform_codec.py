"""The codec `transform`: a windowed Fourier transform with an RVQ whose codebooks are fitted to speech by k-means.

    python -m recipes.transform_codec --speech speech/train --valid speech/valid --out transform_codebooks.pth

No gradients are involved, so this is no neural codec: it asks whether learned latents matter, since it keeps the
waveform exactly. 8 kHz, 40 ms sine windows every 20 ms (50 frames a second), 6 kbit/s. Each window goes to 160 cosines
and 160 sines, the MDCT and its sine twin (Princen and Bradley, 1986), which overlap and add to the waveform.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from checkpoint import make_folder, run_program
from dac_wrapper import ASSETS, LEVEL, Codec, CodecError, first_line, fold_weight_norm, import_dac
from data import DataError, Parser, SpeakerMixtures, list_speakers
from losses import si_sdr
from soundstream import nearest

HOP = 160
# One scale for all latents, so that distances between them are those between waveforms; loud ones come to about 1.
SCALE = 32.0


def lapped_transform(size: int) -> torch.Tensor:
    """Rows of `size` cosines, then `size` sines, under sine windows of two frames, in frames of `size` samples.

    [2 * size, 2 * size], an analysis whose transpose is the synthesis; sqrt(2) times either half, too.
    """
    time, band = torch.arange(2 * size, dtype=torch.float64) + 0.5, torch.arange(size, dtype=torch.float64)[:, None]
    phase = math.pi / size * (time + size / 2) * (band + 0.5)
    window = torch.sin(math.pi * time / (2 * size)) / math.sqrt(size)
    return (torch.cat([phase.cos(), phase.sin()]) * window).float()


def assign(points: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    return torch.cat([nearest(part, means) for part in points.split(4096)])


def k_means(points: torch.Tensor, n: int, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`n` means [n, D] of points [N, D], from random ones of these, and which of them is nearest to each point [N]."""
    means = points[torch.randperm(len(points), device=points.device)[:n]]
    for _ in range(iterations):
        chosen = assign(points, means)
        count = torch.bincount(chosen, minlength=n)[:, None]
        sums = torch.zeros_like(means).index_add_(0, chosen, points)
        means = torch.where(count > 0, sums / count.clamp(min=1), means)
    return means, assign(points, means)


class TransformCodec(nn.Module):
    """A bare network for `Codec`: its convolutions are the transform, its quantizer is DAC's."""

    sample_rate, hop_length, latent_dim, n_codebooks, codebook_size = 8000, HOP, 2 * HOP, 12, 1024

    def __init__(self):
        super().__init__()
        basis = lapped_transform(HOP)[:, None]
        self.encoder = nn.Conv1d(1, 2 * HOP, 2 * HOP, HOP, padding=HOP // 2, bias=False)
        self.encoder.weight = nn.Parameter(basis * SCALE)
        self.decoder = nn.ConvTranspose1d(2 * HOP, 1, 2 * HOP, HOP, padding=HOP // 2, bias=False)
        self.decoder.weight = nn.Parameter(basis / SCALE)
        rvq = import_dac().nn.quantize.ResidualVectorQuantize
        self.quantizer = fold_weight_norm(rvq(self.latent_dim, self.n_codebooks, self.codebook_size, codebook_dim=8))

    def quantize(self, latents: torch.Tensor, n_codebooks: int) -> torch.Tensor:
        return self.quantizer(latents, n_codebooks)[0]


def load_transform(path=ASSETS / "transform_codebooks.pth") -> tuple[TransformCodec, dict]:
    """The codec with the codebooks in a file, and these. Raises CodecError if it is missing or another's."""
    network = TransformCodec()
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        network.quantizer.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except Exception as error:  # torch.load raises half a dozen types on a file that is not one of ours
        raise CodecError(f"can't read the codebooks {path} ({first_line(error)}): restore or make them anew") from None
    return network, weights


@torch.no_grad()
def fit_quantizer(quantizer: nn.Module, latents: torch.Tensor, iterations: int = 10) -> None:
    """Fits the RVQ to latents [N, D], codebook after codebook, by k-means on 7 principal axes of what is left.

    DAC looks codes up by angle alone, which suits loud frames only. So the 8th dimension of each code is a
    constant of 4 standard deviations: seen from there, angles order the codes almost as distances do.
    """
    rest, height = latents, 4.0
    for stage in tqdm(quantizer.quantizers, desc="fitting codebooks"):
        axes = torch.linalg.eigh(rest.T @ rest)[1][:, -7:]  # [D, 7]
        points = rest @ axes
        scale = points.square().sum(1).mean().sqrt()
        points = points / scale
        codes, _ = k_means(points, len(stage.codebook.weight), iterations)
        stage.codebook.weight.copy_(F.pad(codes, (0, 1), value=height))
        stage.in_proj.weight.copy_(F.pad(axes / scale, (0, 1)).T[..., None])
        stage.in_proj.bias.copy_(F.pad(torch.zeros(7), (0, 1), value=height))
        stage.out_proj.weight.copy_(F.pad(axes * scale, (0, 1))[..., None])
        stage.out_proj.bias.zero_()
        rest = rest - stage(rest.T[None])[0][0].T


@torch.no_grad()
def fit_codec(speech, seconds: int = 400, seed: int = 0) -> TransformCodec:
    """The codec, its codebooks fitted to `seconds` of mixtures of a folder of speakers and of each of their voices.

    Raises DataError.
    """
    torch.manual_seed(seed)
    network, frames = TransformCodec(), []
    for item in tqdm(SpeakerMixtures(speech, 8000, 1.0, seconds, seed, speeds=(85, 100, 118)), desc="encoding speech"):
        wav = torch.from_numpy(np.concatenate([item["sources"], item["mixture"][None]]))  # [3, T]
        # Some way around the level that the codec is fed at.
        wav = wav * LEVEL / wav.std(-1, keepdim=True).clamp(min=1e-4) * 10 ** (torch.randn(len(wav), 1) * 3 / 20)
        frames.append(network.encoder(wav[:, None]).transpose(1, 2).flatten(0, 1))
    fit_quantizer(network.quantizer, torch.cat(frames))
    return network


def main() -> None:
    parser = Parser(description="Fits the codebooks of the codec that is a windowed Fourier transform.")
    parser.add_argument("--speech", default=str(ASSETS / "speech/train"), help="folder with one folder per speaker")
    parser.add_argument("--seconds", type=int, default=400, help="of mixtures that they are fitted to")
    parser.add_argument("--valid", default=str(ASSETS / "speech/valid"), help="folder of other speakers, to score it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="file to write")
    args = parser.parse_args()
    if args.seconds < 60 or args.seed < 0:
        parser.error("--seconds must be at least 60, to fill the codebooks, and --seed at least 0")
    if Path(args.out).exists():
        raise DataError(f"{args.out} exists already: remove it or choose another --out")
    make_folder(Path(args.out).parent)
    list_speakers(args.valid)  # raises at once where they are missing, not after the fit
    network = fit_codec(args.speech, args.seconds, args.seed)
    torch.save({name: tensor.half() for name, tensor in network.quantizer.state_dict().items()}, args.out)
    codec = Codec(load_transform(args.out)[0], 8000, "transform")
    for quantize in (False, True):
        scores = []
        for item in SpeakerMixtures(args.valid, 8000, 4.0, 40, seed=1):
            sources = torch.from_numpy(item["sources"])
            scores += si_sdr(codec.transmit(sources, quantize), sources).tolist()
        print(f"{np.mean(scores):.2f} dB SI-SDR" + f" at {codec.bitrate / 1000:g} kbit/s" * quantize)


if __name__ == "__main__":
    run_program(main)
