"""What Codecformer and Sepformer cost, side by side: parameters, MACs, seconds, training steps.

    python -m recipes.cost --out results/cost      ten minutes on 2 CPU cores, all else at rest

8 kHz audio, two speakers, batch 1, plain float32. Prints tables and leaves cost.json in --out.
Separators, the 16 kHz DAC and Lyra have random weights: they cost the same.

Systems are compared by what comes in and what goes out:
    wav_to_wav             a waveform, and waveforms
    latents_to_latents     where audio travels as latents; Sepformer decodes and encodes
    codes_to_codes         where it travels as codes: these are looked up and, at the end, searched
                           for by the RVQ

MACs (multiply-accumulates, in 10^9) are counted on the meta device, where nothing is computed, with
the plain attention kernel, the one that is counted whole.
"""

import copy
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import build_model
from codecformer import estimate_latents, separate
from dac_wrapper import CODECS, DAC, Codec, fold_weight_norm, import_dac
from data import Replaced, open_mixtures
from program import HERE, Parser, choose_device, locate, provenance, run_program, whole_file
from sepformer import Sepformer
from soundstream import SoundStream
from train import Settings, mixture_losses, read_flags, split_settings

RATE = 8000  # Hz
REPEATS = {1: 5, 4: 5, 8: 3, 60: 1}  # seconds of audio: how often it is timed
# A minute of Sepformer or of the 16 kHz DAC takes minutes on a CPU: above so many GMAC a call is
# timed on GPUs only.
MOST_GMAC_ON_CPU = 1000

DAC_16KHZ = dict(  # of its official weights
    encoder_dim=64,
    encoder_rates=[2, 4, 5, 8],
    latent_dim=1024,
    decoder_dim=1536,
    decoder_rates=[8, 5, 4, 2],
    n_codebooks=12,
    codebook_size=1024,
    codebook_dim=8,
    sample_rate=16000,
)
PAPER = [f"@{HERE}/config/wsj0_2mix.txt", "--codec", "random_dac_16khz"]
LYRA = [f"@{HERE}/config/lyra.txt", "--codec", "random_lyra"]
SEPFORMER = [f"@{HERE}/config/sepformer_wsj0_2mix.txt"]
CODECFORMERS = {  # flags of train.py
    "codecformer_dac_16khz": PAPER,
    "codecformer_lyra": LYRA,
    "codecformer_small_bundled": ["--codec", "bundled"],
}
# Codecs behind whose latents and codes Sepformer is put, too.
BEHIND = ("codecformer_dac_16khz", "codecformer_small_bundled")
RATIOS = {  # Sepformer's cost over Codecformer's
    # What the paper's 52x counts: each on what it works on.
    "separators_alone": ("sepformer/wav_to_wav", "codecformer_dac_16khz/latents_to_latents"),
    "latents_to_latents_dac_16khz": (
        "sepformer_dac_16khz/latents_to_latents",
        "codecformer_dac_16khz/latents_to_latents",
    ),
    "codes_to_codes_dac_16khz": (
        "sepformer_dac_16khz/codes_to_codes",
        "codecformer_dac_16khz/codes_to_codes",
    ),
    "codes_to_codes_bundled": (
        "sepformer_bundled/codes_to_codes",
        "codecformer_small_bundled/codes_to_codes",
    ),
    "wav_to_wav_dac_16khz": ("sepformer/wav_to_wav", "codecformer_dac_16khz/wav_to_wav"),
    "wav_to_wav_lyra": ("sepformer/wav_to_wav", "codecformer_lyra/wav_to_wav"),
    "wav_to_wav_bundled": ("sepformer/wav_to_wav", "codecformer_small_bundled/wav_to_wav"),
}
STEPS = {  # ways to train: flags of train.py; an update at batch 1 and 4 s of the bundled speech
    "sepformer": SEPFORMER,
    "si_sdr_whole_segment": PAPER,
    "si_sdr": [*PAPER, "--loss_seconds", "0.5"],
    "csi_sdr": [*PAPER, "--loss_seconds", "0.5", "--loss", "csi_sdr"],
    "embedding_whole_segment": [*PAPER, "--loss", "embedding"],
    "embedding": [*PAPER, "--loss_seconds", "0.5", "--loss", "embedding"],
    "bundled": [],  # what `python train.py` runs; in seconds per mixture
}


# Counting and timing ------------------------------------------------------------------------------


@torch.no_grad()
def count_call(call: Callable, *inputs) -> float:
    """GMAC of a call on the meta device."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call(*inputs)
    return counter.get_total_flops() / 2e9


def count_macs(module: nn.Module, *shape: int) -> float:
    """GMAC of a module's call on an input of that shape."""
    module = copy.deepcopy(module).to("meta")
    return count_call(module, torch.empty(*shape, device="meta"))


def count_rvq(codec: Codec, frames: int, n_speakers: int) -> float:
    """GMAC of looking a mixture's codes up, and of finding those of its speakers.

    `quantize` finds codes, and looks them up again.
    """
    network = copy.deepcopy(codec.network).to("meta")
    n = codec.n_codebooks
    codes = torch.empty(1, n, frames, dtype=torch.int64, device="meta")
    latents = torch.empty(n_speakers, codec.latent_dim, frames, device="meta")
    looked_up = count_call(network.dequantize, codes)
    return looked_up + count_call(network.quantize, latents, n)


def median_seconds(calls: dict[str, Callable], repeats: int, device) -> dict[str, float]:
    """Seconds of each call: the median over repeats, in turn, so that a slow spell hits all."""
    seconds = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: float(np.median(values)) for name, values in seconds.items()}


# Inference ----------------------------------------------------------------------------------------


@dataclass
class System:
    """A way from input to estimates."""

    call: Callable  # does it once
    modules: list[nn.Module]  # whose parameters it has
    # GMAC of its parts
    encoder: float = 0.0
    separator: float = 0.0
    decoder: float = 0.0
    rvq: float = 0.0

    @property
    def gmac(self) -> float:
        return self.encoder + self.separator + self.decoder + self.rvq


def codes_to_codes(model, codec: Codec, codes: torch.Tensor) -> torch.Tensor:
    """Codes of mixtures [B, N, F] -> those of their speakers [B, S, N, F]."""
    return codec.to_codes(estimate_latents(model, codec, codec.from_codes(codes)))


def sepformer_on_latents(sepformer, codec: Codec, length: int, latents: torch.Tensor):
    """Latents of mixtures [B, D, F] -> those of their speakers [B, S, D, F]."""
    return codec.encode(sepformer(codec.decode(latents, length)))


def sepformer_on_codes(sepformer, codec: Codec, length: int, codes: torch.Tensor):
    """Codes of mixtures [B, N, F] -> those of their speakers [B, S, N, F]."""
    latents = sepformer_on_latents(sepformer, codec, length, codec.from_codes(codes))
    return codec.to_codes(latents)


@torch.no_grad()
def list_systems(codecformers: dict, sepformer, seconds: int, device) -> dict[str, System]:
    """{name: a way to separate so many seconds}. codecformers: {name: (model, codec)}."""
    length = RATE * seconds
    wav = 0.1 * torch.randn(1, length, device=device)
    sepformer_gmac = count_macs(sepformer, 1, length)
    systems = {
        "sepformer/wav_to_wav": System(
            partial(sepformer, wav), [sepformer], separator=sepformer_gmac
        )
    }
    for name, (model, codec) in codecformers.items():
        network = codec.network
        latents = codec.encode(wav)  # [1, D, F]
        codes = codec.to_codes(latents)  # [1, N, F]
        frames = latents.shape[-1]
        n_speakers = model.config.n_speakers
        encoder = count_macs(network.encoder, 1, 1, frames * codec.hop)
        decoder = count_macs(network.decoder, *latents.shape)
        separator = count_macs(model, *latents.shape)
        systems[f"{name}/latents_to_latents"] = System(
            partial(estimate_latents, model, codec, latents), [model], separator=separator
        )
        systems[f"{name}/wav_to_wav"] = System(
            partial(separate, model, codec, wav),
            [model, network],
            encoder=encoder,
            separator=separator,
            decoder=n_speakers * decoder,
        )
        if name not in BEHIND:
            continue
        rvq = count_rvq(codec, frames, n_speakers)
        outer = (network.encoder, network.decoder)
        around_rvq = [module for module in network.children() if module not in outer]
        systems[f"{name}/codes_to_codes"] = System(
            partial(codes_to_codes, model, codec, codes),
            [model, *around_rvq],
            separator=separator,
            rvq=rvq,
        )
        behind = name.replace("codecformer", "sepformer").replace("_small", "")
        parts = dict(encoder=n_speakers * encoder, separator=sepformer_gmac, decoder=decoder)
        systems[f"{behind}/latents_to_latents"] = System(
            partial(sepformer_on_latents, sepformer, codec, length, latents),
            [sepformer, network],
            **parts,
        )
        systems[f"{behind}/codes_to_codes"] = System(
            partial(sepformer_on_codes, sepformer, codec, length, codes),
            [sepformer, network],
            **parts,
            rvq=rvq,
        )
    return systems


@torch.no_grad()
def inference(codecformers: dict, sepformer, seconds: int, device) -> dict[str, dict]:
    """{system: its cost} for a length of audio."""
    systems = list_systems(codecformers, sepformer, seconds, device)
    calls = {}
    for name, system in systems.items():
        if device.type == "cuda" or system.gmac < MOST_GMAC_ON_CPU:
            calls[name] = system.call
    median_seconds(calls, 1, device)  # warms up
    times = median_seconds(calls, REPEATS[seconds], device)
    rows = {}
    for name, system in systems.items():
        rows[name] = {
            "parameters": sum(p.numel() for m in system.modules for p in m.parameters()),
            "gmac_encoder": system.encoder,
            "gmac_separator": system.separator,
            "gmac_decoder": system.decoder,
            "gmac_rvq": system.rvq,
            "gmac": system.gmac,
            "seconds": times.get(name),
            "gmac_per_second": system.gmac / times[name] if name in times else None,
        }
    return rows


# Training -----------------------------------------------------------------------------------------


def read_settings(flags: list[str]) -> tuple[Settings, dict]:
    """The settings and sizes of the separator that flags of train.py stand for."""
    given, _ = read_flags(flags)
    return split_settings(given)


def build(flags: list[str], device) -> tuple[nn.Module, Codec, Settings]:
    """The separator that flags stand for, random, its codec, and the settings."""
    settings, sizes = read_settings(flags)
    codec = Codec.load(settings.codec, settings.sample_rate, device)
    model = build_model(settings.model, sizes, settings.n_speakers, codec.latent_dim)
    return model.to(device), codec, settings


def open_training(settings: Settings) -> Replaced:
    mixtures = open_mixtures(
        locate(settings.data),
        settings.sample_rate,
        settings.n_speakers,
        seconds=settings.seconds,
        speeds=settings.speeds,
    )
    return Replaced(mixtures)


def make_step(flags: list[str], device) -> tuple[Callable, int]:
    """A call that makes one update of a training, always of the same batch, and its mixtures."""
    model, codec, settings = build([*flags, "--data", Settings.data], device)
    mixtures = open_training(settings)
    batch = default_collate([mixtures[index] for index in range(settings.batch_size)])
    optimizer = torch.optim.Adam(model.parameters(), settings.lr)
    loss = settings.loss or "embedding"

    def step() -> None:
        losses = mixture_losses(
            model,
            model.on_latents,
            codec,
            batch,
            loss,
            settings.quantize_before,
            settings.quantize_after,
            settings.loss_seconds,
        )
        losses.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step, settings.batch_size


def train_steps(device) -> dict[str, float]:
    """Seconds of an update for each mixture of it, of each of STEPS."""
    calls = {}
    batch_sizes = {}
    for way, flags in STEPS.items():
        calls[way], batch_sizes[way] = make_step(flags, device)
    median_seconds(calls, 1, device)  # warms up
    seconds = median_seconds(calls, 3, device)
    return {way: seconds[way] / batch_sizes[way] for way in calls}


def mixtures_per_second(seconds: float = 5.0) -> float:
    """How many training mixtures of `python train.py` one worker makes."""
    mixtures = open_training(Settings())
    started = time.perf_counter()
    count = 0
    while time.perf_counter() - started < seconds:
        mixtures[count % len(mixtures)]
        count += 1
    return count / (time.perf_counter() - started)


# The program --------------------------------------------------------------------------------------


def random_dac_16khz() -> tuple[nn.Module, dict]:
    model = fold_weight_norm(import_dac().DAC(**DAC_16KHZ))
    return DAC(model), model.state_dict()


def random_lyra() -> tuple[nn.Module, dict]:
    network = SoundStream()
    return network, network.state_dict()


def cells(values, digits) -> str:
    """Numbers in columns of ten, None as -."""
    line = ""
    for value, n in zip(values, digits):
        cell = "-" if value is None else f"{value:.{n}f}"
        line += cell.rjust(10)
    return line


def print_tables(results: dict) -> None:
    product = results["matrix_product_gmac_per_second"]
    print(f"GMAC by part; a plain matrix product: {product:.0f} GMAC/s\n")
    titles = ("M param", "enc", "sep", "dec", "rvq", "s", "GMAC/s")
    parts = ("gmac_encoder", "gmac_separator", "gmac_decoder", "gmac_rvq")
    print("audio s  system".ljust(57) + "".join(title.rjust(10) for title in titles))
    for seconds, rows in results["inference"].items():
        for name, row in rows.items():
            values = [row["parameters"] / 1e6, *(row[part] for part in parts)]
            values += [row["seconds"], row["gmac_per_second"]]
            print(f"{seconds:>7}  {name}".ljust(57) + cells(values, (1, 2, 2, 2, 3, 3, 0)))
    print("\n- : not timed here, it would take minutes")
    print("\nSepformer over Codecformer, 4 s".ljust(37) + "    MACs x    time x")
    for name in RATIOS:
        print(name.ljust(36) + cells(results["ratios"][name].values(), (1, 1)))
    print("\na training step, batch 1, 4 s".ljust(37) + "   seconds  faster x")
    for way, seconds in results["train_step_seconds"].items():
        faster = results["ratios"]["train_step"].get(way)
        print(way.ljust(36) + cells([seconds, faster], (3, 1)))
    made = results["pipeline"]["mixtures_made_per_second"]
    taken = results["pipeline"]["mixtures_taken_per_second"]
    print(f"\nmixtures a second: one worker makes {made:.0f}, a default training takes {taken:.0f}")


def main() -> None:
    parser = Parser(description="What Codecformer and Sepformer cost, side by side.")
    parser.add_argument("--out", type=Path, default=Path("results/cost"), help="folder")
    args = parser.parse_args()
    device = choose_device()
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", ".*barely resembles")  # random weights have no lag
    CODECS["random_dac_16khz"] = random_dac_16khz
    CODECS["random_lyra"] = random_lyra

    codecformers = {}
    for name, flags in CODECFORMERS.items():
        model, codec, _ = build(flags, device)
        codecformers[name] = (model.fuse().eval(), codec)
    sepformer = Sepformer().to(device).eval()
    a, b = torch.randn(2, 2048, 2048, device=device)
    product = median_seconds({"product": partial(torch.matmul, a, b)}, 10, device)["product"]
    rows = {}
    for seconds in REPEATS:
        rows[seconds] = inference(codecformers, sepformer, seconds, device)
    steps = train_steps(device)

    ratios = {}
    for name, (theirs, ours) in RATIOS.items():
        ratios[name] = {
            key: rows[4][theirs][key] / rows[4][ours][key] for key in ("gmac", "seconds")
        }
    ratios["train_step"] = {}
    for way, seconds in steps.items():
        if way not in ("sepformer", "bundled"):
            ratios["train_step"][way] = steps["sepformer"] / seconds
    results = {
        "ratios": ratios,
        "inference": rows,
        "train_step_seconds": steps,
        "pipeline": {
            "mixtures_made_per_second": mixtures_per_second(),
            "mixtures_taken_per_second": 1 / steps["bundled"],
        },
        "matrix_product_gmac_per_second": 2048**3 / 1e9 / product,
        "threads": torch.get_num_threads(),
        **provenance("-m", "recipes.cost"),
    }
    with whole_file(args.out / "cost.json") as partial_file:
        partial_file.write_text(json.dumps(results, indent=1) + "\n")
    print_tables(results)


if __name__ == "__main__":
    run_program(main)
