"""The paper's claims at small scale: trains a separator for each, scores all, and makes the table and the picture.

    python -m recipes.claims --codec lyra --data speech/all --valid libri/valid --score libri/test \
        --noise speech/noise --out runs/claims

A run differs from `base` in the flags below alone. Those of BY_TIME all end after the same minutes, for which they
should run side by side; all others after the same number of mixtures. On a CPU encoding is two thirds of a step:
with --pool they take random cuts of the latents of so many mixtures, encoded once, at no other speed than 100 %. A run
that is there already is not made again, one that was interrupted goes on. `out` gets a folder a run, sets/ (mixtures of
the voices in --score), scores/, situations/ (the paper's table, of the runs that were given the same time),
claims.json, claims.md and claims.png.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from checkpoint import SettingsError, at_least, load_checkpoint, make_folder, run_program
from data import Parser
from recipes.curves import draw
from recipes.gpu import call

BASE = (
    "@config/gpu.txt --d_model 128 --n_layers 4 --n_heads 4 --d_ffn 512 --dropout 0 --seconds 2 --batch_size 16 "
    "--epoch_size 16000 --workers 1"
).split()
# Twice the published kernel and a quarter of its chunk, in samples half of it: 1.6 s of a core for an update, not 5.4.
SEPFORMER = (
    "@config/sepformer_wsj0_2mix.txt --n_layers 2 --d_model 128 --n_heads 4 --d_ffn 512 --kernel 32 --chunk 64 "
    "--lr 5e-4 --schedule cosine --warmup 200 --seconds 2 --batch_size 4 --epoch_size 3200 --valid_size 24 --workers 1"
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
LATENTS = "pool-latents"  # in --out
COLUMNS = {"si_sdr_i": "SI-SDRi", "csi_sdr_i": "cSI-SDRi", "pesq": "PESQ", "stoi": "STOI"}


def flags_of(args) -> dict[str, list]:
    """{run: the flags of its training}, of the runs asked for."""
    fresh = ["--data", args.data]
    by_time = [*fresh, "--minutes", args.minutes, "--epochs", 10**4]
    runs = {f"{run}/0": [*flags, *by_time] for run, flags in BY_TIME.items()}
    steps, pool = ["--epoch_size", args.mixtures // 3, "--epochs", 3], args.out / LATENTS
    for run, flags in BY_MIXTURES.items():
        # The pool is of two speakers without noise: other mixtures are made afresh, at the pool's one speed.
        data = ["--data", pool] if args.pool and not run.startswith("harder") else fresh
        made = [*steps, *data, *(["--speeds", 100] if args.pool else [])]
        runs |= {f"{run}/{seed}": [*BASE, *made, *flags, "--seed", seed] for seed in range(1 + (run in TWICE))}
    if unknown := [name for name in args.only if not any(run.startswith(name) for run in runs)]:
        raise SettingsError(f"no run is called {unknown[0]}: choose of {', '.join(runs)}")
    chosen = {run: flags for run, flags in runs.items() if not args.only or run.startswith(tuple(args.only))}
    common = ["--valid", args.valid, "--codec", args.codec]
    return {run: [*(args.noise if f == "NOISE" else f for f in flags), *common] for run, flags in chosen.items()}


def make(folder: Path, *command, log: Path, last: str = "") -> None:
    """Calls the module that writes `folder`, unless that is there, with what it writes `last`. Raises SettingsError."""
    if not (folder / last).exists():
        call("-m", *command, "--out", folder, log=log)


def train(runs: dict, out: Path, parallel: int) -> None:
    """Trains what is missing, `parallel` runs at a time. Raises SettingsError."""

    def one(run: str) -> None:
        folder = out / run
        last = load_checkpoint(folder / "last.pt") if (folder / "last.pt").exists() else None
        if not last or last["progress"]["validated"] < last["end"]:
            make_folder(folder.parent)
            call("train.py", *(["--resume"] if last else runs[run]), "--out", folder, log=out / f"{run}.log")

    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(one, runs))


def score(runs: dict, out: Path, speech: str, noise: str) -> dict[str, dict]:
    """{run: its scores and what it cost}, on fixed sets of its kind, made of `speech`. Raises SettingsError."""
    kinds = {"two": [], "harder/three_speakers": ["--n_speakers", 3], "harder/noise": ["--noise", noise]}
    sets, rows = {kind: out / "sets" / kind for kind in kinds}, {}
    for run in runs:
        kind, scores = run.rpartition("/")[0], out / "scores" / run
        kind = kind if kind in kinds else "two"
        flags = ["--speech", speech, "--n", N_SCORED, "--seed", 1, *kinds[kind]]
        make(sets[kind], "recipes.mix", *flags, log=out / "sets.log")
        flags = ["--ckpt", out / run / "best.pt", "--data", sets[kind]]
        make(scores, "evaluate", *flags, log=out / "scores.log", last="results.json")
        results = json.loads((scores / "results.json").read_text())
        settings = next(iter(results["checkpoints"].values()))["args"]
        last = (out / run / "log.csv").read_text().splitlines()[-1].split(",")
        rows[run] = {
            **{column: list(results["rows"].values())[-1][column] for column in COLUMNS},
            "mixtures": int(last[1]) * settings["batch_size"], "seconds": int(last[6]), "machine": results["machine"],
        }  # fmt: skip
    if {"time/si_sdr/0", "time/sepformer/0"} <= runs.keys():
        pair = [out / run / "best.pt" for run in ("time/si_sdr/0", "time/sepformer/0")]
        flags = ["--situations", "--ckpt", *pair, "--data", sets["two"]]
        make(out / "situations", "evaluate", *flags, log=out / "scores.log", last="results.json")
    return rows


def main() -> None:
    parser = Parser(description="Trains and scores separators, one for each of the paper's claims.")
    parser.add_argument("--codec", default="transform", help="of all of them: a name or a weights file")
    parser.add_argument("--data", required=True, help="folder of speakers to train on")
    parser.add_argument("--valid", required=True, help="folder of other speakers, to choose epochs by")
    parser.add_argument("--score", required=True, help="folder of yet others, to score on")
    parser.add_argument("--noise", required=True, help="folder of noise")
    parser.add_argument("--only", nargs="*", default=[], help="runs whose names start so")
    parser.add_argument("--mixtures", type=at_least(3), default=48000, help="of the runs that are compared by mixtures")
    parser.add_argument("--pool", type=at_least(0), default=0, help="mixtures of 4 s whose latents they share; 0: none")
    parser.add_argument("--minutes", type=at_least(0.01, float), default=120.0, help="of runs compared by time")
    parser.add_argument("--parallel", type=at_least(1), default=1, help="trainings at a time")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    out, runs = args.out, flags_of(args)
    make_folder(out)

    if any(out / LATENTS in flags for flags in runs.values()):
        pool, log = out / "pool", out / "pool.log"
        make(pool, "recipes.mix", "--speech", args.data, "--n", args.pool, "--seed", 2, log=log)
        make(out / LATENTS, "recipes.latents", "--data", pool, "--codec", args.codec, log=log)
    train(runs, out, args.parallel)
    path = out / "claims.json"
    earlier = json.loads(path.read_text())["rows"] if path.exists() else {}  # of runs that --only leaves out now
    rows = earlier | score(runs, out, args.score, args.noise)
    path.write_text(json.dumps({"codec": args.codec, "rows": rows}, indent=1) + "\n")
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
