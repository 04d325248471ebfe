"""What Codecformer and Sepformer cost, in one run: parameters, MACs, seconds, and training steps.

    python -m recipes.cost --out results/cost          about ten minutes on 2 CPU cores; nothing else should run

8 kHz audio, two speakers, batch 1, plain fp32. MACs are counted on the meta device, where nothing is computed, with the
plain attention kernel, the one that is counted whole. Separators, the 16 kHz DAC and Lyra have random weights: they
cost the same.
"""

import copy
import itertools
import json
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from checkpoint import build_model, choose_device, make_folder, parse_args, run_program
from codecformer import separate
from dac_wrapper import ASSETS, CODECS, DAC, Codec, fold_weight_norm, import_dac
from data import Parser, open_mixtures
from recipes.report import provenance
from recipes.sepformer import Sepformer
from soundstream import SoundStream

DAC_16KHZ = dict(
    encoder_dim=64, encoder_rates=[2, 4, 5, 8], latent_dim=1024, decoder_dim=1536, decoder_rates=[8, 5, 4, 2],
    n_codebooks=12, codebook_size=1024, codebook_dim=8, sample_rate=16000,
)  # fmt: skip
PAPER = ["@config/wsj0_2mix.txt", "--codec", "random_dac_16khz"]
STEPS = {  # flags, on the bundled speech; one update at batch 1 and 4 s
    "sepformer": ["@config/sepformer_wsj0_2mix.txt"],
    "si_sdr_whole_segment": PAPER,
    "si_sdr": [*PAPER, "--loss_seconds", "0.5"],
    "csi_sdr": [*PAPER, "--loss_seconds", "0.5", "--loss", "csi_sdr"],
    "embedding_whole_segment": [*PAPER, "--loss", "embedding"],
    "embedding": [*PAPER, "--loss_seconds", "0.5", "--loss", "embedding"],
    "embedding_latents_on_disk": [*PAPER, "--loss", "embedding"],
    "bundled": ["@config/bundled.txt"],  # in seconds per mixture
}
SYSTEMS = {  # flags of the separator, and its codec
    "codecformer_dac_16khz": (PAPER, "random_dac_16khz"),
    "codecformer_lyra": (["@config/lyra.txt"], "random_lyra"),
    "codecformer_small_bundled": (["@config/bundled.txt"], "bundled"),
    "codecformer_small_transform": (["@config/bundled.txt"], "transform"),
}
RATIOS = {  # Sepformer's cost over Codecformer's
    "latents_to_latents": ("sepformer/wav_to_wav", "codecformer_dac_16khz/latents_to_latents"),
    "behind_codec": ("sepformer/behind_codec", "codecformer_dac_16khz/latents_to_latents"),
    "wav_to_wav_dac_16khz": ("sepformer/wav_to_wav", "codecformer_dac_16khz/wav_to_wav"),
    "wav_to_wav_lyra": ("sepformer/wav_to_wav", "codecformer_lyra/wav_to_wav"),
    "wav_to_wav_bundled": ("sepformer/wav_to_wav", "codecformer_small_bundled/wav_to_wav"),
    "wav_to_wav_transform": ("sepformer/wav_to_wav", "codecformer_small_transform/wav_to_wav"),
}


def random_dac_16khz():
    model = fold_weight_norm(import_dac().DAC(**DAC_16KHZ))
    return DAC(model), model.state_dict()


def load_system(flags: list[str], codec: str, device):
    """The separator that flags describe, random, ready for inference, and its codec."""
    codec = Codec.load(codec, 8000, device)
    return build_model(vars(parse_args(flags)[0]), codec.latent_dim).fuse().to(device).eval(), codec


def count_macs(module: torch.nn.Module, *shape: int) -> float:
    """Multiply-accumulates of one call on an input of that shape, in units of 10^9."""
    module = copy.deepcopy(module).to("meta")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(torch.empty(*shape, device="meta"))
    return counter.get_total_flops() / 2e9


def median_seconds(calls: dict, repeats: int, device) -> dict:
    """Seconds of each call: the median over repeats, one after the other in turn, so that a slow spell hits all."""
    seconds = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: float(np.median(values)) for name, values in seconds.items()}


@torch.no_grad()
def inference(codecs: dict, sepformer, seconds: int, device) -> dict[str, dict]:
    """{system: its cost} for a length of audio. codecs: {name: (separator, codec)}."""
    n = 8000 * seconds
    wav = 0.1 * torch.randn(1, n, device=device)
    systems = {"sepformer/wav_to_wav": ([sepformer], (0, count_macs(sepformer, 1, n), 0), lambda: sepformer(wav))}
    for name, (model, codec) in codecs.items():
        latents, network = codec.encode(wav), codec.network
        encoder = count_macs(network.encoder, 1, 1, latents.shape[-1] * codec.hop)
        separator, decoder = count_macs(model, *latents.shape), count_macs(network.decoder, *latents.shape)
        on_latents = lambda m=model, z=latents: m(z) * z[:, None]  # noqa: E731
        systems[f"{name}/latents_to_latents"] = [model], (0, separator, 0), on_latents
        whole = lambda m=model, c=codec: separate(m, c, wav)  # noqa: E731
        systems[f"{name}/wav_to_wav"] = [model, network], (encoder, separator, 2 * decoder), whole
        if name == "codecformer_dac_16khz":
            macs = 2 * encoder, systems["sepformer/wav_to_wav"][1][1], decoder
            behind = lambda z=latents, c=codec: c.encode(sepformer(c.decode(z, n)))  # noqa: E731
            systems["sepformer/behind_codec"] = [sepformer, network], macs, behind
    # A minute of Sepformer or of the 16 kHz DAC takes minutes on a CPU, so there it is only counted.
    calls = {k: call for k, (_, macs, call) in systems.items() if device.type == "cuda" or sum(macs) < 1000}
    median_seconds(calls, 1, device)  # warms up
    times, rows = median_seconds(calls, {1: 5, 4: 5, 8: 3, 60: 1}[seconds], device), {}
    for name, (modules, macs, _) in systems.items():
        rows[name] = {
            "parameters": sum(p.numel() for m in modules for p in m.parameters()),
            **dict(zip(("gmac_encoder", "gmac_separator", "gmac_decoder"), macs)), "gmac": sum(macs),
            "seconds": times.get(name), "gmac_per_second": sum(macs) / times[name] if name in times else None,
        }  # fmt: skip
    return rows


def train_steps(device) -> dict[str, float]:
    """Seconds of one update, by train.py's own, for Sepformer and each way to train the paper's Codecformer."""
    calls = {}
    speech = ["--data", ASSETS / "speech/train", "--valid", ASSETS / "speech/valid", "--epoch_size", "100"]
    for way, flags in STEPS.items():
        args, _ = parse_args([*flags, *map(str, speech), "--workers", "0", "--threshold=-1e9"])
        run = train.open_run(args, None, 0, 1)
        batch = next(iter(run.loader))
        if way == "embedding_latents_on_disk":
            batch = {"latents": torch.randn(1, 3, run.codec.latent_dim, 200), "broken": [""]}
        calls[way] = lambda run=run, batches=itertools.repeat(batch): train.update(run, batches)
    median_seconds(calls, 1, device)  # warms up
    seconds = median_seconds(calls, 3, device)
    return {**seconds, "bundled": seconds["bundled"] / args.batch_size}


def mixtures_per_second(seconds: float = 5.0) -> float:
    """How many training mixtures one worker makes from the bundled speech."""
    args, _ = parse_args(["@config/bundled.txt"])
    mixtures = open_mixtures(args.data, args.sample_rate, True, seconds=args.seconds, speeds=args.speeds)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        mixtures[count % len(mixtures)]
        count += 1
    return count / (time.perf_counter() - started)


def print_tables(results: dict) -> None:
    def cells(values, digits):
        return "".join(("-" if v is None else f"{v:.{d}f}").rjust(10) for v, d in zip(values, digits))

    print(f"GMAC split into codec encoder, separator, codec decoder; a plain matrix product: "
          f"{results['matrix_product_gmac_per_second']:.0f} GMAC/s\n")  # fmt: skip
    keys = ("gmac_encoder", "gmac_separator", "gmac_decoder", "seconds", "gmac_per_second")
    titles = ("M param", "enc", "sep", "dec", "s", "GMAC/s")
    print("audio s  system".ljust(57) + "".join(title.rjust(10) for title in titles))
    for seconds, rows in results["inference"].items():
        for name, row in rows.items():
            values = [row["parameters"] / 1e6, *(row[key] for key in keys)]
            print(f"{seconds:>7}  {name}".ljust(57) + cells(values, (1, 2, 2, 2, 3, 0)))
    print("\n- : not timed here, it would take minutes\n\nSepformer over Codecformer, 4 s        MACs x    time x")
    for name in RATIOS:
        print(name.ljust(36) + cells(results["ratios"][name].values(), (1, 1)))
    print("\none training step, batch 1, 4 s".ljust(37) + "seconds  faster x".rjust(20))
    for way, seconds in results["train_step_seconds"].items():
        print(way.ljust(36) + cells([seconds, results["ratios"]["train_step"].get(way)], (3, 1)))
    made, taken = results["pipeline"].values()
    print(f"\nmixtures per second: one worker makes {made:.0f}, the bundled training step takes {taken:.0f}")


def main() -> None:
    parser = Parser(description="What Codecformer and Sepformer cost, side by side.")
    parser.add_argument("--out", default="results/cost", help="folder for cost.json")
    args = parser.parse_args()
    device, out = choose_device(), Path(args.out)
    make_folder(out)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # random weights have no lag to be measured
    CODECS.update(random_dac_16khz=random_dac_16khz, random_lyra=lambda: ((n := SoundStream()), n.state_dict()))
    codecs = {name: load_system(*system, device) for name, system in SYSTEMS.items()}
    a, b = torch.randn(2, 2048, 2048, device=device)
    product = median_seconds({"product": lambda: a @ b}, 10, device)["product"]
    sepformer = Sepformer().to(device).eval()
    rows = {seconds: inference(codecs, sepformer, seconds, device) for seconds in (1, 4, 8, 60)}
    ratios = {}
    for name, (theirs, ours) in RATIOS.items():
        ratios[name] = {key: rows[4][theirs][key] / rows[4][ours][key] for key in ("gmac", "seconds")}
    steps = train_steps(device)
    ratios["train_step"] = {w: steps["sepformer"] / s for w, s in steps.items() if w not in ("sepformer", "bundled")}
    pipeline = {"mixtures_made_per_second": mixtures_per_second(), "mixtures_taken_per_second": 1 / steps["bundled"]}
    results = {
        "ratios": ratios, "inference": rows, "train_step_seconds": steps, "pipeline": pipeline,
        "matrix_product_gmac_per_second": 2048**3 / 1e9 / product, "threads": torch.get_num_threads(),
        **provenance("-m", "recipes.cost"),
    }  # fmt: skip
    (out / "cost.json").write_text(json.dumps(results, indent=1) + "\n")
    print_tables(results)


if __name__ == "__main__":
    run_program(main)
