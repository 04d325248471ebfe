"""The paper's claims at small scale: trains a separator for each, scores all, makes a table.

    python -m recipes.claims --codec lyra --data DIR --valid DIR --score DIR --noise DIR --out DIR

Runs differ from `base` in the flags below alone; Sepformer has its own, and the same data. Those of
BY_MIXTURES are given the same number of mixtures. Those of BY_TIME are given the same minutes of
training on this machine: the speed of each is measured first, in a short run, and its epochs are as
long as that speed makes them, so that its learning rate falls just to the end. Their validations
come on top. They should be measured and run side by side, by --parallel (on a CPU with
OMP_NUM_THREADS=1, so that they leave each other room).

--out gets a folder a run, speed/ (the short runs), sets/ (mixtures of the voices in --score),
scores/, situations/ (the paper's table, of Codecformer and Sepformer, both trained by time with the
SI-SDR loss), claims.json, claims.md and claims.png. What is there already is not made again, a run
that was interrupted goes on.
"""

import csv
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from checkpoint import load_checkpoint
from program import HERE, Parser, UserError, number, run_program, whole, writing
from recipes.curves import draw
from train import read_flags

# Flags of train.py ------------------------------------------------------------------------------

# A Codecformer of 0.9 million parameters on Lyra's latents, with the loss between latents.
BASE = (
    "--model codecformer --features both --context 5 --d_model 128 --n_layers 4 --n_heads 4 "
    "--d_ffn 512 --dropout 0 --loss embedding --seconds 2 --batch_size 16 --lr 1e-3 "
    "--schedule cosine --warmup 200 --valid_size 48 --workers 1 --save_every 1000"
).split()
SPEEDS = ["--speeds", *range(80, 126, 2)]  # so that the voices sound like more
BASE += SPEEDS
# Twice the published kernel and a quarter of its chunk, in samples half of it: 1.6 s of a core for
# an update, not 5.4.
SEPFORMER = (
    "--n_layers 2 --d_model 128 --n_heads 4 --d_ffn 512 --kernel 32 --chunk 64 --lr 5e-4 "
    "--schedule cosine --warmup 200 --seconds 2 --batch_size 4 --valid_size 48 --workers 1"
).split()
SEPFORMER = [f"@{HERE}/config/sepformer_wsj0_2mix.txt", *SEPFORMER, *SPEEDS]
BY_TIME = {
    "time/embedding": BASE,
    "time/si_sdr": [*BASE, "--loss", "si_sdr"],
    "time/csi_sdr": [*BASE, "--loss", "csi_sdr"],
    "time/sepformer": SEPFORMER,
}
BY_MIXTURES = {  # beside BASE
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
    "harder/noise": ["--noise", "NOISE"],  # which stands for the folder
}
TWICE = ("base", "activation/relu")  # with two seeds
EPOCHS_BY_TIME = 8
EPOCHS_BY_MIXTURES = 3
MEASURED = 20  # updates by which the speed of a run is measured

# Scores -------------------------------------------------------------------------------------------

N_SCORED = 96  # mixtures
COLUMNS = {"si_sdr_i": "SI-SDRi", "csi_sdr_i": "cSI-SDRi", "pesq": "PESQ", "stoi": "STOI"}
PAIR = ("time/si_sdr/0", "time/sepformer/0")  # stand in the paper's table


def list_runs(mixtures: int, noise) -> dict[str, list]:
    """{run: its flags}, all but the folders; to those of BY_TIME their length is added later."""
    runs = {f"{run}/0": flags for run, flags in BY_TIME.items()}
    length = ["--epoch_size", mixtures // EPOCHS_BY_MIXTURES, "--epochs", EPOCHS_BY_MIXTURES]
    for run, flags in BY_MIXTURES.items():
        flags = [noise if flag == "NOISE" else flag for flag in flags]
        n_seeds = 2 if run in TWICE else 1
        for seed in range(n_seeds):
            runs[f"{run}/{seed}"] = [*BASE, *length, *flags, "--seed", seed]
    return runs


def choose_runs(runs: dict[str, list], only: list[str]) -> dict[str, list]:
    """The runs whose names start with one of `only`, or all. Raises UserError for unknown ones."""
    for start in only:
        if not any(run.startswith(start) for run in runs):
            raise UserError(f"no run is called {start}: choose of {', '.join(runs)}")
    if not only:
        return runs
    return {run: flags for run, flags in runs.items() if run.startswith(tuple(only))}


# Training -----------------------------------------------------------------------------------------


def train_runs(runs: dict[str, list], minutes: float, out: Path, parallel: int) -> None:
    """Trains what is missing, `parallel` runs at a time. Raises UserError."""
    missing = [run for run in runs if not is_finished(out / run)]
    new = [run for run in missing if not is_begun(out / run)]
    by_time = [run for run in new if run.startswith("time/")]

    def measure(run: str) -> list:
        return length_by_time(runs[run], minutes, out / "speed" / run)

    def train(run: str) -> None:
        flags = ["--resume"]
        if run in new:
            flags = [*runs[run], *lengths.get(run, [])]
        call("train.py", *flags, "--out", out / run, log=out / f"{run}.log")

    with ThreadPoolExecutor(parallel) as pool:
        lengths = dict(zip(by_time, pool.map(measure, by_time)))
        list(pool.map(train, missing))


def is_begun(folder: Path) -> bool:
    return (folder / "last.pt").exists()


def is_finished(folder: Path) -> bool:
    """Whether a run has made all its updates."""
    if not is_begun(folder):
        return False
    checkpoint = load_checkpoint(folder / "last.pt")
    settings = checkpoint["settings"]
    training = checkpoint["training"]
    updates = settings["epoch_size"] // training["per_update"]  # an epoch's
    return training["done"] >= settings["epochs"] * updates


def length_by_time(flags: list, minutes: float, folder: Path) -> list:
    """The flags that make a training last so many minutes here; `folder` gets the measurement."""
    given, _ = read_flags([str(flag) for flag in flags])
    batch_size = given["batch_size"]
    if not is_finished(folder):
        shutil.rmtree(folder, ignore_errors=True)
        short = ["--epoch_size", MEASURED * batch_size, "--epochs", 2, "--valid_size", 1]
        call("train.py", *flags, *short, "--out", folder, log=Path(f"{folder}.log"))
    ends = []  # of its two epochs, in seconds
    for row in read_log(folder):
        ends.append(int(row["step"]) * batch_size / float(row["mixtures_per_second"]))
    # In the first epoch the workers start, too.
    seconds_per_update = (ends[1] - ends[0]) / MEASURED
    updates = max(int(60 * minutes / seconds_per_update), 1)
    epochs = min(EPOCHS_BY_TIME, updates)
    return ["--epochs", epochs, "--epoch_size", updates // epochs * batch_size]


def read_log(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


# Scoring ------------------------------------------------------------------------------------------


def score_runs(runs: list[str], out: Path, speech, noise) -> dict[str, dict]:
    """{run: its scores, and what it cost}, on fixed sets of its kind made of `speech`."""
    kinds = {
        "two": [],
        "harder/three_speakers": ["--n_speakers", 3],
        "harder/noise": ["--noise", noise],
    }
    rows = {}
    for run in runs:
        kind = run.rpartition("/")[0]
        if kind not in kinds:
            kind = "two"
        mixtures = out / "sets" / kind
        if not mixtures.exists():
            flags = ["--speech", speech, "--n", N_SCORED, "--seed", 1, *kinds[kind]]
            call("-m", "recipes.mix", *flags, "--out", mixtures, log=out / "sets.log")
        results = evaluate([out / run / "best.pt"], mixtures, out / "scores" / run)
        separator = list(results["rows"].values())[-1]
        last = read_log(out / run)[-1]
        settings = list(results["checkpoints"].values())[0]["settings"]
        rows[run] = {column: separator[column] for column in COLUMNS}
        rows[run]["mixtures"] = int(last["step"]) * settings["batch_size"]
        rows[run]["seconds"] = int(last["seconds"])
        rows[run]["machine"] = results["machine"]
    if set(PAIR) <= set(runs):
        pair = [out / run / "best.pt" for run in PAIR]
        evaluate(pair, out / "sets" / "two", out / "situations", "--situations")
    return rows


def evaluate(checkpoints: list[Path], mixtures: Path, folder: Path, *flags) -> dict:
    """The results.json of checkpoints on a fixed set, made if it is missing. Raises UserError."""
    path = folder / "results.json"
    if not path.exists():
        shutil.rmtree(folder, ignore_errors=True)  # of an evaluation that was interrupted
        log = folder.with_name(f"{folder.name}.log")
        words = ["--ckpt", *checkpoints, "--data", mixtures, *flags, "--out", folder]
        call("evaluate.py", *words, log=log)
    return json.loads(path.read_text())


def call(*words, log: Path) -> None:
    """Runs a program of this repository, which speaks to `log`. Raises UserError if it fails."""
    words = [str(word) for word in words]
    print("> python", *words, flush=True)
    if words[0] != "-m":
        words[0] = str(HERE / words[0])
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            status = subprocess.run([sys.executable, *words], stdout=file, stderr=file).returncode
    if status:
        said = log.read_text().strip()
        errors = re.findall("error: (.*)", said) or [said]
        why = errors[-1].splitlines()[-1]  # a progress bar may come after it
        raise UserError(f"{words[0]} ended with status {status}: {why} ({log})")


# Tables -------------------------------------------------------------------------------------------


def format_table(rows: dict[str, dict]) -> str:
    """The rows of claims.json, in Markdown."""
    titles = ["run", "mixtures", "minutes", *COLUMNS.values()]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for run, row in rows.items():
        cells = [run, f"{row['mixtures']:,}", f"{row['seconds'] / 60:.0f}"]
        for column in COLUMNS:
            cells.append(format_score(row[column]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def format_score(score: dict) -> str:
    if score["mean"] is None:
        return "-"
    cell = f"{score['mean']:.2f}"
    if score["ci95"] is not None:
        cell += f" ±{score['ci95']:.2f}"
    return cell


def main() -> None:
    parser = Parser(description="Trains and scores separators, one for each of the paper's claims.")
    parser.add_argument("--codec", default="bundled", help="of all: a name or a weights file")
    parser.add_argument("--data", required=True, help="folder of speakers to train on")
    parser.add_argument("--valid", required=True, help="of other speakers, to choose epochs by")
    parser.add_argument("--score", required=True, help="of yet others, to score on")
    parser.add_argument("--noise", required=True, help="folder of noise")
    parser.add_argument("--only", nargs="*", default=[], help="runs whose names start so")
    parser.add_argument(
        "--mixtures", type=whole(3), default=48000, help="of runs that are compared by mixtures"
    )
    parser.add_argument(
        "--minutes", type=number(0.01), default=120.0, help="of runs that are compared by time"
    )
    parser.add_argument("--parallel", type=whole(1), default=1, help="trainings at a time")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    args = parser.parse_args()
    out = args.out
    folders = ["--data", args.data, "--valid", args.valid, "--codec", args.codec]
    runs = choose_runs(list_runs(args.mixtures, args.noise), args.only)
    runs = {run: [*flags, *folders] for run, flags in runs.items()}

    train_runs(runs, args.minutes, out, args.parallel)
    rows = score_runs(list(runs), out, args.score, args.noise)
    path = out / "claims.json"
    if path.exists():
        earlier = json.loads(path.read_text())["rows"]  # of runs that --only leaves out now, too
        rows = {**earlier, **rows}
    with writing(out):
        path.write_text(json.dumps({"codec": args.codec, "rows": rows}, indent=1) + "\n")
        (out / "claims.md").write_text(format_table(rows))
    sizes = [run for run in runs if run.startswith(("base/0", "size"))]
    draw({run: out / run for run in sizes or runs}, out / "claims.png")
    print(out / "claims.md")


if __name__ == "__main__":
    run_program(main)
