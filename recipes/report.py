"""The table and the listening page of a folder of results, which evaluate.py makes and this makes anew.

    python -m recipes.report results/NAME

The page has players and spectrograms of a few mixtures, evenly spaced through the set, and opens without a server.
"""

import base64
import html
import io
import json
import os
import platform
import shlex
import string
import sys
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from matplotlib.image import imsave
from scipy.signal import stft

from checkpoint import HERE, choose_device, git_revision, run_program
from dac_wrapper import ASSETS
from data import DataError, FixedMixtures, Parser, read_audio

N_LISTEN = 8  # mixtures
ROWS = {"mixture": "mixture, untouched", "ceiling": "clean source through the codec", "codecformer": "Codecformer"}
TITLES = {"si_sdr": "SI-SDR", "si_sdr_i": "SI-SDRi", "sdr": "SDR", "sdr_i": "SDRi", "pesq": "PESQ", "stoi": "STOI"}


def format_table(rows: dict) -> str:
    """The rows of results.json as text; intervals only where there is room for them."""
    columns = [column for column in next(iter(rows.values())) if column not in ("title", "lag")]
    interval = len(columns) < 8
    width = 13 if interval else 9

    def cell(column, value):
        digits = 2 if column.endswith(("pesq", "stoi")) else 1
        mean, ci95 = ("-" if x is None else f"{x:.{digits}f}" for x in (value["mean"], value["ci95"]))
        return (mean + f" ±{ci95}" * interval).rjust(width)

    indent = max(32, *(len(values["title"]) + 2 for values in rows.values()))
    titles = [("c" if c[0] == "c" else "") + TITLES[c.removeprefix("c")] for c in columns]
    lines, left_out = [" " * indent + "".join(title.rjust(width) for title in titles)], []
    for values in rows.values():
        lag = values["lag"]["median_samples"]
        mark = f"  shifted by {lag:+.0f} samples: SI-SDR and SDR are spoilt" if lag else ""
        lines.append(values["title"].ljust(indent) + "".join(cell(c, values[c]) for c in columns) + mark)
        counts = [(title, values[column]["left_out"]) for title, column in zip(titles, columns)]
        left_out += [f"{title} of {values['title']}: {count}" for title, count in counts if count]
    lines += ["Mixtures left out, since there is no such score: " + "; ".join(left_out)] if left_out else []
    return "\n".join(lines)


def portable(path) -> str:
    """A path for checkpoints and results: relative to the repository where it lies in there, else as given."""
    full = Path(path).resolve()
    return full.relative_to(HERE).as_posix() if full.is_relative_to(HERE) and full.exists() else str(path)


def provenance(*program: str) -> dict[str, str]:
    """What results were made by: command, machine, git revision. program: the words after `python`."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {choose_device().type}, torch {torch.__version__}"
    command = shlex.join(["python", *program, *map(portable, sys.argv[1:])])
    return {"command": command, "machine": machine, "git": git_revision()}


def embed(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def spectrogram_png(audio: np.ndarray, rate: int) -> bytes:
    """A picture of [T]: 32 ms windows, time to the right, frequency upwards, 70 dB of range."""
    window = round(0.032 * rate)
    power = 20 * np.log10(np.abs(stft(audio, rate, nperseg=window, noverlap=window * 3 // 4)[2]) + 1e-7)
    picture = io.BytesIO()
    imsave(picture, power[::-1], vmin=power.max() - 70, vmax=power.max(), cmap="magma", format="png")
    return picture.getvalue()


def figure(name: str, audio: np.ndarray, rate: int) -> str:
    wav = io.BytesIO()
    sf.write(wav, np.clip(audio, -1, 1), rate, format="WAV", subtype="PCM_16")
    return (
        f"<figure><figcaption>{html.escape(name)}</figcaption>"
        f'<img alt="spectrogram of {html.escape(name)}" src="{embed("image/png", spectrogram_png(audio, rate))}">'
        f'<audio controls preload="metadata" src="{embed("audio/wav", wav.getvalue())}"></audio></figure>'
    )


def write_page(out: Path, data=None) -> Path:
    """Writes `out`/index.html from results.json, scores.jsonl and audio/ there, and the set that was scored.

    data: where that lies now. Raises DataError if they are missing.
    """
    try:
        results = json.loads((out / "results.json").read_text())
        scores = {line["mixture"]: line["rows"] for line in map(json.loads, open(out / "scores.jsonl"))}
    except OSError as error:
        raise DataError(f"{out} holds no results of evaluate.py ({error.strerror}): give a folder of its own") from None
    rows, rate, sections = results["rows"], results["codec"]["sample_rate"], []
    separator, mix_folder = list(rows)[-1], results.get("mix_folder")
    dataset = FixedMixtures(data or HERE / results["data"], rate, mix_folder=mix_folder)
    for index in np.linspace(0, len(dataset) - 1, min(N_LISTEN, len(dataset))).astype(int):
        item = dataset[index]
        columns = [figure("mixture", item["mixture"], rate)]
        for k, source in enumerate(item["sources"], 1):
            columns.append(figure(f"reference {k}", source, rate))
            columns.append(figure(f"estimate {k}", read_audio(out / "audio" / f"{item['name']}_s{k}.wav")[0], rate))
        gains = [gain for gain in scores[item["name"]][separator]["si_sdr_i"] if gain is not None]
        title = f"{item['name']}: SI-SDRi " + (f"{np.mean(gains):+.1f} dB" if gains else "not defined")
        sections.append(f"<h2>{html.escape(title)}</h2><section>{''.join(columns)}</section>")
    template = string.Template((ASSETS / "page.html").read_text(encoding="utf-8"))
    page = out / "index.html"
    page.write_text(template.substitute(
        title=html.escape(f"{rows[separator]['title']} on {dataset.root.name}"), count=len(sections), khz=rate // 2000,
        table=html.escape(format_table(rows)), examples="".join(sections),
    ), encoding="utf-8")  # fmt: skip
    return page


def main() -> None:
    parser = Parser(description="Prints the table and makes the listening page of a folder of results.")
    parser.add_argument("results", help="folder of evaluate.py")
    parser.add_argument("--data", help="the set that was scored, where it has moved")
    args = parser.parse_args()
    page = write_page(Path(args.results), args.data)
    print(format_table(json.loads((page.parent / "results.json").read_text())["rows"]))
    print(f"listen: {page.resolve().as_uri()}")


if __name__ == "__main__":
    run_program(main)
