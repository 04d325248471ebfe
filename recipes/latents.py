"""Writes the latents of a fixed set, for training without a codec: train.py --data OUT --loss embedding --speeds 100.

    python -m recipes.latents --data set --codec dac_16khz --out set-latents

A file a mixture, [1 + S, D, F] in half precision: the mixture's latents and its sources'. An hour of mixtures of two
takes 1.1 GB with a codec of 1,024 dimensions.
"""

import json

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import choose_device, run_program
from dac_wrapper import Codec
from data import MIX_FOLDERS, FixedMixtures, Parser
from recipes.mix import new_folder


@torch.no_grad()
def write_latents(mixtures: FixedMixtures, codec: Codec, out) -> None:
    """Raises DataError if `out` exists already; a half-written folder never bears that name."""
    facts = {
        "codec": {"name": codec.name, "fingerprint": codec.fingerprint}, "sample_rate": codec.sample_rate,
        "frame_rate": codec.frame_rate, "n_speakers": mixtures.n_speakers,
    }  # fmt: skip
    with new_folder(out) as folder:
        (folder / "latents.json").write_text(json.dumps(facts, indent=1) + "\n")
        for index in tqdm(range(len(mixtures)), desc=f"writing {out}", unit="mixture"):
            item = mixtures[index]
            wav = torch.from_numpy(np.concatenate([item["mixture"][None], item["sources"]])).to(codec.device)
            latents = codec.encode(wav * codec.gain(wav[:1]))
            np.save(folder / f"{item['name']}.npy", latents.half().cpu().numpy())


def main() -> None:
    parser = Parser(description="Writes the latents of a fixed set.")
    parser.add_argument("--data", required=True, help="fixed set with mix, s1, s2")
    parser.add_argument("--mix_folder", choices=MIX_FOLDERS, help="of the set, where it has several")
    parser.add_argument("--sample_rate", type=int, default=8000)
    parser.add_argument("--codec", default="transform")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    mixtures = FixedMixtures(args.data, args.sample_rate, mix_folder=args.mix_folder)
    write_latents(mixtures, Codec.load(args.codec, args.sample_rate, choose_device()), args.out)


if __name__ == "__main__":
    run_program(main)
