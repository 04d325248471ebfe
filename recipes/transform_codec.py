"""Fits the codebooks of the codec `transform` (transform_codec.py at the top) to speech by k-means.

    python -m recipes.transform_codec --speech speech/train --valid speech/valid --out codebooks.pth

As assets/transform_codebooks.pth they are what `Codec.load("transform")` reads.

What is unusual: the RVQ is DAC's, which looks codes up by angle alone. That suits loud frames only.
So the last of a code's 8 dimensions is a constant of 4 standard deviations of the others: seen from
there, angles order the codes almost as distances do. The other 7 are principal axes.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from dac_wrapper import LEVEL, Codec, Transform, fold_weight_norm, import_dac
from data import SpeakerMixtures
from losses import si_sdr
from program import ASSETS, Parser, UserError, run_program, save_tensors, whole
from recipes.train_rvq import k_means

CODEBOOK_DIM = 8
HEIGHT = 4.0  # the constant


@torch.no_grad()
def fit_codec(speech, seconds: int = 400, seed: int = 0) -> Transform:
    """The network, its codebooks fitted to `seconds` of mixtures and of each of their two voices.

    speech: a folder of speakers. Raises DataError.
    """
    torch.manual_seed(seed)
    rvq = import_dac().nn.quantize.ResidualVectorQuantize
    sizes = (Transform.latent_dim, Transform.n_codebooks, Transform.codebook_size)
    network = Transform(fold_weight_norm(rvq(*sizes, codebook_dim=CODEBOOK_DIM)))
    mixtures = SpeakerMixtures(
        speech, network.sample_rate, seconds=1.0, size=seconds, seed=seed, speeds=(85, 100, 118)
    )
    frames = []
    for item in tqdm(mixtures, desc="encoding speech"):
        signals = np.concatenate([item["sources"], item["mixture"][None]])
        wav = torch.from_numpy(signals)  # [3, T]
        # Some way around the level that the codec is fed at: a standard deviation of 3 dB.
        gain = 10 ** (torch.randn(len(wav), 1) * 3 / 20)
        wav = wav * LEVEL / wav.std(-1, keepdim=True).clamp(min=1e-4) * gain
        latents = network.encoder(wav[:, None])  # [3, D, F]
        frames.append(latents.transpose(1, 2).flatten(0, 1))  # [3 * F, D]
    fit_quantizer(network.quantizer, torch.cat(frames))
    return network


@torch.no_grad()
def fit_quantizer(quantizer: nn.Module, latents: torch.Tensor, iterations: int = 10) -> None:
    """Fits DAC's RVQ to latents [N, D], codebook after codebook, each on what is left by then."""
    n_axes = CODEBOOK_DIM - 1
    rest = latents
    for stage in tqdm(quantizer.quantizers, desc="fitting codebooks"):
        _, axes = torch.linalg.eigh(rest.T @ rest)  # [D, D], by rising variance
        axes = axes[:, -n_axes:]
        points = rest @ axes  # [N, n_axes]
        scale = points.square().sum(1).mean().sqrt()
        points = points / scale
        codes, _ = k_means(points, len(stage.codebook.weight), iterations)
        # What is padded is the last dimension: of codes and points the constant, of axes nothing.
        stage.codebook.weight.copy_(F.pad(codes, (0, 1), value=HEIGHT))
        stage.in_proj.weight.copy_(F.pad(axes / scale, (0, 1)).T[..., None])
        stage.in_proj.bias.copy_(F.pad(torch.zeros(n_axes), (0, 1), value=HEIGHT))
        stage.out_proj.weight.copy_(F.pad(axes * scale, (0, 1))[..., None])
        stage.out_proj.bias.zero_()
        quantised = stage(rest.T[None])[0]  # [1, D, N]
        rest = rest - quantised[0].T


def print_scores(codec: Codec, mixtures: SpeakerMixtures) -> None:
    """The mean SI-SDR of single voices through the codec, unquantised and quantised."""
    for quantize in (False, True):
        scores = []
        for item in mixtures:
            sources = torch.from_numpy(item["sources"])  # [S, T]
            scores += si_sdr(codec.transmit(sources, quantize), sources).tolist()
        how = f"at {codec.bitrate / 1000:g} kbit/s" if quantize else "unquantised"
        print(f"{np.mean(scores):.2f} dB SI-SDR {how}")


def main() -> None:
    speech = ASSETS / "speech"
    parser = Parser(description="Fits the codebooks of the codec that is a Fourier transform.")
    parser.add_argument(
        "--speech", default=speech / "train", help="folder with a folder per speaker"
    )
    parser.add_argument("--valid", default=speech / "valid", help="of other speakers, to score it")
    parser.add_argument(
        "--seconds",
        type=whole(60),  # fewer don't fill the codebooks
        default=400,
        help="of mixtures that they are fitted to (default: %(default)s)",
    )
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    if args.out.exists():
        raise UserError(f"{args.out} is there already: remove it, or choose another --out")
    # Opened before the fit, so that what is wrong with it is said at once.
    valid_mixtures = SpeakerMixtures(
        args.valid, Transform.sample_rate, seconds=4.0, size=40, seed=1
    )

    network = fit_codec(args.speech, args.seconds, args.seed)
    weights = {name: tensor.half() for name, tensor in network.quantizer.state_dict().items()}
    save_tensors(weights, args.out)
    network.quantizer.load_state_dict(weights)  # scored as rounded as they were written
    print_scores(Codec(network, network.sample_rate, "transform"), valid_mixtures)


if __name__ == "__main__":
    run_program(main)
