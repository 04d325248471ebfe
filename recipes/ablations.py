"""The paper's ablations, small: the bundled model with one thing changed, each from scratch at the same budget.

    python -m recipes.ablations --data speech/train --valid seen_mixtures --out runs/ablations

A row a run in ablations.csv, a table of them in ablations.md, the curves in ablations.png.
A run that is there already is not made again; one that was interrupted goes on.
"""

import csv
import statistics
import subprocess
import sys
from pathlib import Path

from checkpoint import HERE, SettingsError, make_folder, run_program
from data import Parser
from recipes.curves import draw

RUNS = {
    "snake, embedding loss, no rvq": [],
    "relu": ["--activation", "relu"],
    "tanh": ["--activation", "tanh"],
    "gelu": ["--activation", "gelu"],
    "si_sdr loss": ["--loss", "si_sdr"],
    "csi_sdr loss": ["--loss", "csi_sdr"],
    "rvq before": ["--quantize_before"],
    "rvq after": ["--quantize_after"],
    "rvq before and after": ["--quantize_before", "--quantize_after"],
    "one frame": ["--context", "1"],
    "plain latents, one frame": ["--features", "latents", "--context", "1"],
}


def main() -> None:
    parser = Parser(description="Trains the bundled model with one thing changed at a time.")
    parser.add_argument("--data", required=True, help="folder of speakers to train on")
    parser.add_argument("--valid", required=True, help="fixed set or folder of speakers to score on")
    parser.add_argument("--mixtures", type=int, default=4800, help="that each run sees")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--codec", default="transform")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    out, rows = Path(args.out), []
    make_folder(out)
    common = ["--data", args.data, "--valid", args.valid, "--codec", args.codec, "--epoch_size", args.mixtures,
              "--epochs", 1, "--valid_size", 96, "--speeds", *range(80, 130, 5)]  # fmt: skip
    for name, change in RUNS.items():
        for seed in args.seeds:
            folder = out / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
            flags = [*common, *change, "--seed", seed, "--out", folder]
            log = folder / "log.csv"
            if not (log.exists() and len(log.read_text().splitlines()) == 3):  # the columns, before training, after it
                resume = ["--resume", "--out", folder] if (folder / "last.pt").exists() else flags
                command = [sys.executable, HERE / "train.py", *resume]
                if status := subprocess.run([str(word) for word in command]).returncode:
                    raise SettingsError(f"{name}, seed {seed} ended with status {status}: mend that and start again")
            with open(log) as file:
                *_, last = csv.DictReader(file)
            kept = {key: last[key] for key in ("valid_si_sdr_i", "loss", "seconds")}
            rows.append({"run": name, "flags": " ".join(change), "seed": seed, **kept})
    with open(out / "ablations.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    lines = ["| | `train.py` | SI-SDRi, dB, seeds | mean |", "|---|---|---|---|"]
    for name, change in RUNS.items():
        values = [float(row["valid_si_sdr_i"]) for row in rows if row["run"] == name]
        each = " ".join(f"{value:.1f}" for value in values)
        lines.append(f"| {name} | `{' '.join(change)}` | {each} | {statistics.mean(values):.1f} |")
    (out / "ablations.md").write_text("\n".join(lines) + "\n")
    draw(sorted(log.parent for log in out.glob("*/log.csv")), out / "ablations.png")
    print(out / "ablations.md")


if __name__ == "__main__":
    run_program(main)
