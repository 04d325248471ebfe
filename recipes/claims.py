"""The paper's claims at small scale: trains a separator for each, scores all, and makes the table and the picture.

    python -m recipes.claims --codec lyra --data speech/all --valid libri/valid --score libri/test \
        --noise speech/noise --out runs/claims

A run differs from `base` in the flags below alone. Those of BY_TIME all end after the same minutes, for which they
should run side by side; all others after the same number of mixtures. A run that is there already is not made again,
one that was interrupted goes on. `out` gets a folder a run, sets/ (mixtures of the voices in --score), scores/,
situations/ (the paper's table, of the runs that were given the same time), claims.json, claims.md and claims.png.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from checkpoint import HERE, SettingsError, make_folder, run_program
from data import Parser
from recipes.curves import draw

BASE = (
    "@config/gpu.txt --d_model 128 --n_layers 4 --n_heads 4 --d_ffn 512 --dropout 0 --seconds 2 --batch_size 16 "
    "--epoch_size 16000 --epochs 3 --workers 1"
).split()
SEPFORMER = (
    "@config/sepformer_wsj0_2mix.txt --n_layers 2 --d_model 128 --n_heads 4 --d_ffn 512 --lr 1e-3 --schedule cosine "
    "--warmup 200 --seconds 2 --batch_size 16 --epoch_size 16000 --valid_size 48 --workers 1"
).split()
BY_TIME = {
    "time/embedding": BASE,
    "time/si_sdr": [*BASE, "--loss", "si_sdr"],
    "time/csi_sdr": [*BASE, "--loss", "csi_sdr"],
    "time/sepformer": SEPFORMER,
}
BY_MIXTURES = {
    "base": [],
    "activation/relu": ["--activation", "relu"],
    "activation/tanh": ["--activation", "tanh"],
    "activation/gelu": ["--activation", "gelu"],
    "rvq/before+after": ["--quantize_before", "--quantize_after"],
    "features/latents": ["--features", "latents"],
    "features/log_power": ["--features", "log_power"],
    "features/one_frame": ["--context", "1"],
    "size/smaller": ["--d_model", "64"],
    "size/larger": ["--d_model", "192", "--n_layers", "6", "--n_heads", "6", "--d_ffn", "768"],
    "harder/three_speakers": ["--n_speakers", "3"],
    "harder/noise": ["--noise", "NOISE"],
}
TWICE = ("base", "activation/relu")  # with two seeds
N_SCORED = 96  # mixtures
COLUMNS = {"si_sdr_i": "SI-SDRi", "csi_sdr_i": "cSI-SDRi", "pesq": "PESQ", "stoi": "STOI"}


def call(log: Path, *command) -> None:
    """Runs a program of this repository, what it says into a file. Raises SettingsError where it fails."""
    make_folder(log.parent)
    with open(log, "a") as file:
        words = [sys.executable, *map(str, command)]
        if status := subprocess.run(words, cwd=HERE, stdout=file, stderr=file).returncode:
            raise SettingsError(f"{' '.join(words[1:3])} ended with status {status}: see {log}")


def flags_of(args) -> dict[str, list]:
    """{run: the flags of its training}, of the runs asked for."""
    common = ["--data", args.data, "--valid", args.valid, "--codec", args.codec]
    runs = {f"{run}/0": [*flags, "--minutes", args.minutes, "--epochs", 10**4] for run, flags in BY_TIME.items()}
    for run, flags in BY_MIXTURES.items():
        runs |= {f"{run}/{seed}": [*BASE, *flags, "--seed", seed] for seed in range(1 + (run in TWICE))}
    if unknown := [name for name in args.only if not any(run.startswith(name) for run in runs)]:
        raise SettingsError(f"no run is called {unknown[0]}: choose of {', '.join(runs)}")
    chosen = {run: flags for run, flags in runs.items() if not args.only or run.startswith(tuple(args.only))}
    return {r: [args.noise if f == "NOISE" else f for f in flags] + common for r, flags in chosen.items()}


def main() -> None:
    parser = Parser(description="Trains and scores separators, one for each of the paper's claims.")
    parser.add_argument("--codec", default="transform", help="of all of them: a name or a weights file")
    parser.add_argument("--data", type=Path, required=True, help="folder of speakers to train on")
    parser.add_argument("--valid", type=Path, required=True, help="folder of other speakers, to choose epochs by")
    parser.add_argument("--score", type=Path, required=True, help="folder of yet others, to score on")
    parser.add_argument("--noise", type=Path, required=True, help="folder of noise")
    parser.add_argument("--only", nargs="*", default=[], help="runs whose names start so")
    parser.add_argument("--minutes", type=float, default=120.0, help="of the runs that are compared by time")
    parser.add_argument("--parallel", type=int, default=1, help="trainings at a time")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for name in ("data", "valid", "score", "noise", "out"):  # programs run at the repository's top
        setattr(args, name, getattr(args, name).resolve())
    out, runs = args.out, flags_of(args)

    def train(run: str) -> None:
        ended = (out / run / "ended").exists()
        resume = ["--resume"] if (out / run / "last.pt").exists() else runs[run]
        if not ended:
            call(out / f"{run}.log", "train.py", *resume, "--out", out / run)
            (out / run / "ended").touch()

    with ThreadPoolExecutor(args.parallel) as pool:
        list(pool.map(train, runs))
    kinds = {"two": [], "harder/three_speakers": ["--n_speakers", 3], "harder/noise": ["--noise", args.noise]}
    rows, sets = {}, {}
    for kind, flags in kinds.items():
        sets[kind] = out / "sets" / kind
        if kind == "two" or any(run.startswith(kind) for run in runs):
            made = ["-m", "recipes.mix", "--speech", args.score, "--n", N_SCORED, "--seed", 1, *flags]
            sets[kind].exists() or call(out / "sets.log", *made, "--out", sets[kind])
    for run in runs:
        scores, on = out / "scores" / run, sets.get(run.rpartition("/")[0], sets["two"])
        call(out / "scores.log", "evaluate.py", "--ckpt", out / run / "best.pt", "--data", on, "--out", scores)
        results = json.loads((scores / "results.json").read_text())
        settings = next(iter(results["checkpoints"].values()))["args"]
        steps = (out / run / "log.csv").read_text().splitlines()[-1].split(",")
        rows[run] = {
            **{column: list(results["rows"].values())[-1][column] for column in COLUMNS},
            "mixtures": int(steps[1]) * settings["batch_size"], "seconds": int(steps[6]), "machine": results["machine"],
        }  # fmt: skip
    by_time = [out / run / "best.pt" for run in ("time/si_sdr/0", "time/sepformer/0") if run in runs]
    if len(by_time) == 2:
        flags = ["--data", sets["two"], "--out", out / "situations"]
        call(out / "scores.log", "evaluate.py", "--situations", "--ckpt", *by_time, *flags)
    (out / "claims.json").write_text(json.dumps({"codec": args.codec, "rows": rows}, indent=1) + "\n")
    lines = [f"| run | mixtures | minutes | {' | '.join(COLUMNS.values())} |", "|---" * (3 + len(COLUMNS)) + "|"]
    for run, row in rows.items():
        cells = (f"{row[c]['mean']:.2f} ±{row[c]['ci95']:.2f}" for c in COLUMNS)
        lines.append(f"| {run} | {row['mixtures']:,} | {row['seconds'] / 60:.0f} | {' | '.join(cells)} |")
    (out / "claims.md").write_text("\n".join(lines) + "\n")
    sizes = [run for run in runs if run.startswith(("base/0", "size"))] or runs
    draw({run: out / run for run in sizes}, out / "claims.png")
    print(out / "claims.md")


if __name__ == "__main__":
    run_program(main)
