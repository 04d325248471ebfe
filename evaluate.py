"""Scores checkpoints on a set of mixtures.

    python evaluate.py                           the bundled checkpoint on the bundled mixtures
    python evaluate.py --ckpt FILE --data DIR    another checkpoint, another set (mix, s1, s2)
    python evaluate.py --situations --ckpt A B   the paper's table: each wherever it could stand

Prints a table and leaves in --out: results.json (means), scores.jsonl (every score), the estimates
in audio/, and index.html, to listen. The table has a row for the mixture left alone, for the clean
source through the codec (with the RVQ, if the separator has one on either side; `ceiling` in
results.json: estimates like the latents of the encoder end there), and for the separator.

- SI-SDR is against the clean source, SI-SDRi is its gain over the mixture. SDR is BSS Eval's with
  512 taps. PESQ is narrow band at 8 kHz, wide band at 16 kHz.
- A c in front (cSI-SDR) means: against the *transmitted* source, which is clean, encoded, quantised
  and decoded. It comes from the paper, and compares within one codec only.
- Estimates are put in the order of the sources by the best mean SI-SDR, for each of the two
  references. A mixture's score is the mean over its sources, an interval is 1.96 standard errors
  over mixtures. A score that can't be had (PESQ without speech, anything against silence, a signal
  against itself) leaves its mixture out of that mean, and is counted.
- Where estimates lag behind their reference (the median over all sources, by cross-correlation),
  the row is marked: a shift that nobody hears ruins SI-SDR.
"""

import base64
import html
import io
import json
import math
import multiprocessing
import os
import signal
import string
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from tqdm import tqdm

from checkpoint import check_codec, load_checkpoint, load_codec, restore_model
from codecformer import separate
from dac_wrapper import Codec, measure_lag
from data import MIX_FOLDERS, open_mixtures, read_audio
from losses import pairwise_negative_si_sdr, pit, si_sdr
from program import (
    ASSETS,
    Parser,
    UserError,
    choose_device,
    choose_threads,
    locate,
    new_folder,
    portable,
    provenance,
    run_program,
    whole,
)

# Scores -------------------------------------------------------------------------------------------


def score_si_sdr(estimate: np.ndarray, reference: np.ndarray, rate: int) -> float:
    return float(si_sdr(torch.from_numpy(estimate), torch.from_numpy(reference)))


def score_sdr(estimate: np.ndarray, reference: np.ndarray, rate: int) -> float:
    from torchmetrics.functional.audio import signal_distortion_ratio

    estimate = torch.from_numpy(estimate).double()
    reference = torch.from_numpy(reference).double()
    return float(signal_distortion_ratio(estimate, reference, filter_length=512))


def score_pesq(estimate: np.ndarray, reference: np.ndarray, rate: int) -> float:
    from pesq import PesqError, pesq

    try:
        return float(pesq(rate, reference, estimate, {8000: "nb", 16000: "wb"}[rate]))
    except (PesqError, KeyError):  # no speech in it; another rate
        return math.nan


def score_stoi(estimate: np.ndarray, reference: np.ndarray, rate: int) -> float:
    from pystoi import stoi

    with warnings.catch_warnings():
        # With this warning it returns a number all the same.
        warnings.filterwarnings("error", "Not enough STFT frames")
        try:
            return float(stoi(reference, estimate, rate))
        except RuntimeWarning:
            return math.nan


METRICS = {"si_sdr": score_si_sdr, "sdr": score_sdr, "pesq": score_pesq, "stoi": score_stoi}


def score(metric: str, estimate: np.ndarray, reference: np.ndarray, rate: int) -> float:
    """One of METRICS of [T] against [T], in dB where it is a ratio; NaN where it can't be had."""
    if reference.std() <= 1e-6 or np.array_equal(estimate, reference):
        return math.nan
    try:
        value = METRICS[metric](estimate, reference, rate)
    except (ValueError, RuntimeError):  # too short for the metric, or a matrix without inverse
        return math.nan
    return value if math.isfinite(value) else math.nan


@dataclass(frozen=True)
class Column:
    """A column of the table."""

    name: str  # in results.json
    title: str
    metric: str
    reference: str = "clean"  # or "transmitted"
    gain: bool = False  # over the mixture

    @property
    def digits(self) -> int:
        return 2 if self.metric in ("pesq", "stoi") else 1


SI_SDR_I = Column("si_sdr_i", "SI-SDRi", "si_sdr", gain=True)
CSI_SDR_I = Column("csi_sdr_i", "cSI-SDRi", "si_sdr", "transmitted", gain=True)
SDR_I = Column("sdr_i", "SDRi", "sdr", gain=True)
PESQ = Column("pesq", "PESQ", "pesq")
STOI = Column("stoi", "STOI", "stoi")
COLUMNS = [Column("si_sdr", "SI-SDR", "si_sdr"), SI_SDR_I, CSI_SDR_I, SDR_I, PESQ, STOI]
SITUATION_COLUMNS = [
    SI_SDR_I,
    SDR_I,
    PESQ,
    STOI,
    CSI_SDR_I,
    Column("csdr_i", "cSDRi", "sdr", "transmitted", gain=True),
    Column("cpesq", "cPESQ", "pesq", "transmitted"),
    Column("cstoi", "cSTOI", "stoi", "transmitted"),
]


def in_order(estimates: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Estimates [S, T] in the order of the sources [S, T]."""
    pairwise = pairwise_negative_si_sdr(
        torch.from_numpy(estimates)[None], torch.from_numpy(sources)[None]
    )
    _, assignment = pit(pairwise)
    return estimates[assignment[0].numpy()]


def score_mixture(
    rows: dict[str, np.ndarray],
    mixture: np.ndarray,
    references: dict[str, np.ndarray],
    columns: list[Column],
    rate: int,
) -> dict[str, dict[str, list[float]]]:
    """The scores of one mixture [T], a list over its sources: {row: {column: [S]}}.

    rows: the estimates [S, T] of each row. references: the "clean" and "transmitted" sources, each
    [S, T]. Each row has one entry more, `lag`: samples within 20 ms by which estimates are late.
    """
    torch.set_num_threads(1)  # there is a process a core
    untouched = {}  # {column: [S]}, of the mixture itself
    for column in columns:
        if column.gain:
            sources = references[column.reference]
            values = [score(column.metric, mixture, source, rate) for source in sources]
            untouched[column.name] = values
    scores = {row: {} for row in rows}
    for row, estimates in rows.items():
        ordered = {name: in_order(estimates, sources) for name, sources in references.items()}
        for column in columns:
            pairs = zip(ordered[column.reference], references[column.reference])
            values = [score(column.metric, estimate, source, rate) for estimate, source in pairs]
            if column.gain:
                values = [value - base for value, base in zip(values, untouched[column.name])]
            scores[row][column.name] = values
        lags = []
        for estimate, source in zip(ordered["clean"], references["clean"]):
            lag, _ = measure_lag(torch.from_numpy(source), torch.from_numpy(estimate), rate // 50)
            known = estimate.std() > 1e-6 and source.std() > 1e-6
            lags.append(lag if known else math.nan)
        scores[row]["lag"] = lags
    return scores


# What is scored -----------------------------------------------------------------------------------

# Where the separator stands, and whether the RVQ lies before and after it.
SITUATIONS = [
    ("clean", False, False),
    ("transmitted", True, False),
    ("transmitted", True, True),
    ("latents", False, False),
    ("latents", False, True),
    ("latents", True, False),
    ("latents", True, True),
]


def separate_in(situation: str, model, codec: Codec, mixture, before: bool, after: bool):
    """Mixtures [B, T] -> estimates [B, S, T] in a call that travels as latents of a codec.

    situation: where the separator stands.
        clean         before the codec: it hears the mixture itself, and nothing is sent. For a
                      separator on latents that is the same as `latents` without RVQ
        transmitted   behind it: it hears the waveform that the receiver decoded. A separator on
                      latents encodes that again; the answers of one on waveforms are sent on only
                      where there is an RVQ after it
        latents       on the way, latents in and latents out. A separator on waveforms decodes them
                      first and encodes its estimates again
    before, after: whether latents are quantised before and after the separator.
    """
    if situation == "clean":
        return separate(model, codec, mixture, quantize_before=False, quantize_after=False)
    if not model.on_latents:
        heard = codec.transmit(mixture, quantize=before)
        estimates = separate(model, codec, heard)
        if situation == "latents" or after:
            estimates = codec.transmit(estimates, quantize=after)
        return estimates
    if situation == "transmitted":
        heard = codec.transmit(mixture, quantize=before)
        return separate(model, codec, heard, quantize_before=False, quantize_after=after)
    return separate(model, codec, mixture, quantize_before=before, quantize_after=after)


@torch.no_grad()
def make_rows(models: dict, codec: Codec, item: dict, situations: bool):
    """The signals of each row for one item of a dataset: {row: [S, T]}, and the references.

    models: {name: (model, RVQ before, RVQ after)}, the switches being those it was trained with,
    which is none for a separator on waveforms. With `situations` every model stands in all
    SITUATIONS instead.
    """
    mixture = torch.from_numpy(item["mixture"])[None].to(codec.device)  # [1, T]
    sources = torch.from_numpy(item["sources"]).to(codec.device)  # [S, T]
    audible = sources.std(-1, keepdim=True) > 1e-6  # [S, 1]; a codec makes noise of silence
    transmitted = codec.transmit(sources, quantize=True) * audible
    unquantised = codec.transmit(sources, quantize=False)
    rows = {"mixture": mixture.expand_as(sources)}
    if situations:
        rows["mixture/transmitted"] = codec.transmit(mixture).expand_as(sources)
        rows["ceiling"] = unquantised
        rows["ceiling/transmitted"] = transmitted
        for name, (model, *_) in models.items():
            for situation, before, after in SITUATIONS:
                sides = ["before"] * before + ["after"] * after
                row = f"{name}/{situation}/{'+'.join(sides) or 'none'}"
                rows[row] = separate_in(situation, model, codec, mixture, before, after)[0]
    else:
        for name, (model, before, after) in models.items():  # a single one
            rows["ceiling"] = transmitted if before or after else unquantised
            rows[name] = separate(model, codec, mixture, before, after)[0]
    references = {"clean": item["sources"], "transmitted": transmitted.cpu().numpy()}
    return {row: signals.cpu().numpy() for row, signals in rows.items()}, references


def score_dataset(dataset, models: dict, codec: Codec, situations: bool, out: Path) -> list[dict]:
    """The scores of every item, also written to scores.jsonl in `out`.

    Separates in this process and scores in one for each core. The last row's estimates go to
    `out`/audio.
    """
    columns = SITUATION_COLUMNS if situations else COLUMNS
    n_processes = len(os.sched_getaffinity(0))
    # Spawned, not forked: a fork of a process that runs torch's threads can hang. They leave Ctrl-C
    # to this one.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(n_processes, spawn, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    scores = []
    bar = tqdm(total=len(dataset), desc="scoring", unit="mixture")
    with open(out / "scores.jsonl", "w") as file:
        for start in range(0, len(dataset), 4 * n_processes):  # so that memory holds what waits
            tasks = []
            for index in range(start, min(start + 4 * n_processes, len(dataset))):
                item = dataset[index]
                rows, references = make_rows(models, codec, item, situations)
                arguments = (rows, item["mixture"], references, columns, codec.sample_rate)
                tasks.append((item["name"], pool.submit(score_mixture, *arguments)))
                if not situations:
                    last = list(rows.values())[-1]
                    write_estimates(out, item["name"], in_order(last, item["sources"]), codec)
            for name, task in tasks:
                try:
                    scored = {"mixture": name, "rows": task.result()}
                except BrokenProcessPool:
                    reason = "perhaps for want of memory"
                    raise UserError(
                        f"a process that scores was killed, {reason}: score again"
                    ) from None
                scores.append(scored)
                line = json.dumps(without_nan(scored))
                print(line, file=file)
                bar.update()
    bar.close()
    pool.shutdown()
    return scores


def without_nan(content):
    """The same with None in the place of NaN, which JSON doesn't have."""
    if isinstance(content, dict):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_nan(value) for value in content]
    if isinstance(content, float) and math.isnan(content):
        return None
    return content


def write_estimates(out: Path, name: str, estimates: np.ndarray, codec: Codec) -> None:
    for k, estimate in enumerate(estimates, 1):
        sf.write(out / "audio" / f"{name}_s{k}.wav", estimate, codec.sample_rate, "FLOAT")


# Tables -------------------------------------------------------------------------------------------

TITLES = {
    "mixture": "mixture, untouched",
    "ceiling": "clean source through the codec",
    "codecformer": "Codecformer",
    "sepformer": "Sepformer",
}


def summarise(scores: list[dict], columns: list[Column]) -> dict[str, dict]:
    """For each row: title, median lag, and for each column the mean over mixtures, half the width
    of its 95 % interval, and how many mixtures were left out for want of a score.
    """
    summary = {}
    for row in scores[0]["rows"]:
        lags = [lag for scored in scores for lag in scored["rows"][row]["lag"]]
        known = [lag for lag in lags if not math.isnan(lag)]
        lag = float(np.median(known)) if known else None
        summary[row] = {"title": TITLES.get(row, row), "lag": {"median_samples": lag}}
        for column in columns:
            means = [np.mean(scored["rows"][row][column.name]) for scored in scores]
            summary[row][column.name] = mean_and_interval(means)
    return summary


def mean_and_interval(values: list[float]) -> dict[str, float | int | None]:
    """The mean of the values that could be had, half the width of its 95 % interval, and how many
    couldn't.
    """
    known = np.array(values)[np.isfinite(values)]
    n = len(known)
    return {
        "mean": float(known.mean()) if n else None,
        "ci95": float(1.96 * known.std(ddof=1) / n**0.5) if n > 1 else None,
        "left_out": len(values) - n,
    }


def format_table(summary: dict[str, dict], columns: list[Column]) -> str:
    """The summary as text; with intervals where there is room for them."""
    with_interval = len(columns) < 8
    width = 11 if with_interval else 9
    indent = max(32, *(len(values["title"]) + 2 for values in summary.values()))
    lines = [" " * indent + "".join(column.title.rjust(width) for column in columns)]
    left_out = []
    for values in summary.values():
        line = values["title"].ljust(indent)
        for column in columns:
            value = values[column.name]
            if value["mean"] is None:
                line += "-".rjust(width)
                continue
            cell = f"{value['mean']:.{column.digits}f}"
            if with_interval and value["ci95"] is not None:
                cell += f" ±{value['ci95']:.{column.digits}f}"
            line += cell.rjust(width)
            if value["left_out"]:
                left_out.append(f"{column.title} of {values['title']}: {value['left_out']}")
        lag = values["lag"]["median_samples"]
        if lag is not None and abs(lag) >= 1:
            line += f"  shifted by {lag:+.0f} samples: SI-SDR and SDR are spoilt"
        lines.append(line)
    if left_out:
        lines.append("Mixtures left out, since there is no such score: " + "; ".join(left_out))
    return "\n".join(lines)


# The listening page -------------------------------------------------------------------------------

N_LISTEN = 8  # mixtures, evenly spaced through the set


def spectrogram_png(audio: np.ndarray, rate: int) -> bytes:
    """A picture of [T]: windows of 32 ms, time to the right, frequency upwards, 70 dB of range."""
    from matplotlib.image import imsave
    from scipy.signal import stft

    window = round(0.032 * rate)
    _, _, bins = stft(audio, rate, nperseg=window, noverlap=window * 3 // 4)
    decibels = 20 * np.log10(np.abs(bins) + 1e-7)
    loudest = decibels.max()
    picture = io.BytesIO()
    imsave(picture, decibels[::-1], vmin=loudest - 70, vmax=loudest, cmap="magma", format="png")
    return picture.getvalue()


def embedded(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def figure(name: str, audio: np.ndarray, rate: int) -> str:
    """A spectrogram and a player of [T], as HTML that needs no other file."""
    wav = io.BytesIO()
    sf.write(wav, np.clip(audio, -1, 1), rate, format="WAV", subtype="PCM_16")
    name = html.escape(name)
    picture = embedded("image/png", spectrogram_png(audio, rate))
    sound = embedded("audio/wav", wav.getvalue())
    return (
        f"<figure><figcaption>{name}</figcaption>"
        f'<img alt="spectrogram of {name}" src="{picture}">'
        f'<audio controls preload="metadata" src="{sound}"></audio></figure>'
    )


def write_page(out: Path, dataset, scores: list[dict], table: str, title: str, facts: str) -> None:
    """Writes `out`/index.html: some mixtures, their sources, and the estimates in `out`/audio."""
    rate = dataset.sample_rate
    examples = []
    for index in np.linspace(0, len(dataset) - 1, min(N_LISTEN, len(dataset))).astype(int):
        item = dataset[int(index)]
        figures = [figure("mixture", item["mixture"], rate)]
        for k, source in enumerate(item["sources"], 1):
            estimate, _ = read_audio(out / "audio" / f"{item['name']}_s{k}.wav")
            figures.append(figure(f"reference {k}", source, rate))
            figures.append(figure(f"estimate {k}", estimate, rate))
        separator = list(scores[index]["rows"].values())[-1]
        gain = np.mean(separator["si_sdr_i"])
        gain = "not defined" if math.isnan(gain) else f"{gain:+.1f} dB"
        heading = html.escape(f"{item['name']}: SI-SDRi {gain}")
        examples.append(f"<h2>{heading}</h2><section>{''.join(figures)}</section>")
    template = string.Template((ASSETS / "page.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=html.escape(title),
        facts=html.escape(facts),
        count=len(examples),
        top_khz=f"{rate / 2000:g}",
        table=html.escape(table),
        examples="".join(examples),
    )
    (out / "index.html").write_text(page, encoding="utf-8", errors="replace")


# The program --------------------------------------------------------------------------------------


def load_models(checkpoints: dict[str, dict], device) -> dict[str, tuple]:
    """{name: (model, RVQ before, RVQ after)}; a second one of a kind gets a number."""
    models = {}
    for path, checkpoint in checkpoints.items():
        name = checkpoint["separator"]
        if name in models:
            name += str(len(models) + 1)
        model = restore_model(checkpoint, path).to(device)
        models[name] = (model, checkpoint["quantize_before"], checkpoint["quantize_after"])
    return models


def choose_codec(checkpoints: dict[str, dict], models: dict, name: str | None, device) -> Codec:
    """The codec of the checkpoints on latents, which must all be of one.

    A separator on waveforms works behind any codec; if there are only such, the first one's.
    """
    on_latents = [
        path for path, (model, *_) in zip(checkpoints, models.values()) if model.on_latents
    ]
    first = (on_latents or list(checkpoints))[0]
    codec = load_codec(checkpoints[first], first, device, name)
    for path in on_latents:
        check_codec(checkpoints[path], path, codec)
    return codec


def default_out(label: str) -> Path:
    """A folder below results/ that isn't there yet."""
    out = Path(f"results/{label}")
    number = 2
    while out.exists():
        out = Path(f"results/{label}_{number}")
        number += 1
    return out


def evaluate(args) -> None:
    device = choose_device()
    choose_threads(workers=0)
    checkpoints = {path: load_checkpoint(path) for path in args.ckpt}
    models = load_models(checkpoints, device)
    codec = choose_codec(checkpoints, models, args.codec, device)
    if args.n_codebooks is not None:
        codec.use_codebooks(args.n_codebooks)
    n_speakers = checkpoints[args.ckpt[0]]["config"]["n_speakers"]
    for path, checkpoint in checkpoints.items():
        made_for = (checkpoint["config"]["n_speakers"], checkpoint["sample_rate"])
        if made_for != (n_speakers, codec.sample_rate):
            raise UserError(f"{path} separates {made_for[0]} speakers at {made_for[1]} Hz: drop it")
    dataset = open_mixtures(
        locate(args.data), codec.sample_rate, n_speakers, mix_folder=args.mix_folder
    )
    columns = SITUATION_COLUMNS if args.situations else COLUMNS
    label = "_".join([*models, codec.name.replace("/", "-"), Path(args.data).resolve().name])
    out = Path(args.out) if args.out else default_out(label)
    with new_folder(out) as folder:
        (folder / "audio").mkdir()
        scores = score_dataset(dataset, models, codec, args.situations, folder)
        summary = summarise(scores, columns)
        kept = (
            "separator", "config", "codec", "quantize_before", "quantize_after", "git", "settings",
        )  # fmt: skip
        results = {
            "rows": summary,
            "n_mixtures": len(scores),
            "n_speakers": n_speakers,
            "checkpoints": {
                portable(path): {key: checkpoint[key] for key in kept}
                for path, checkpoint in checkpoints.items()
            },
            "codec": {
                "name": codec.name,
                "fingerprint": codec.fingerprint,
                "sample_rate": codec.sample_rate,
                "codec_rate": codec.codec_rate,
                "frame_rate": codec.frame_rate,
                "bitrate": codec.bitrate,
                "lag": codec.lag,
            },
            "data": portable(args.data),
            "situations": args.situations,
            **provenance("evaluate.py"),
        }
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        table = format_table(summary, columns)
        paths = ", ".join(portable(path) for path in args.ckpt)
        facts = (
            f"{len(scores)} mixtures of {n_speakers} speakers from {portable(args.data)}; {paths}; "
            f"codec {codec.name}, {codec.bitrate / 1000:g} kbit/s where it is quantised, its lag "
            f"of {codec.lag} samples removed"
        )
        if not args.situations:
            title = f"{list(summary.values())[-1]['title']} on {Path(args.data).resolve().name}"
            write_page(folder, dataset, scores, table, title, facts)
    print(f"\n{facts}\n\n{table}\n")
    if args.situations:
        print(
            "Rows: separator / what it hears (the clean mixture, the mixture behind the codec, or"
        )
        print("its latents, to answer in latents) / where the RVQ is. Gains are over the clean")
        print("mixture; c: against the transmitted source.")
    else:
        print(f"listen: {(out / 'index.html').resolve().as_uri()}")
    print(f"results: {out / 'results.json'}")


def main() -> None:
    parser = Parser(description="Scores checkpoints on a set of mixtures.")
    default = portable(ASSETS / "separator.pt")
    parser.add_argument("--ckpt", nargs="+", default=[default], help="checkpoints of train.py")
    parser.add_argument("--codec", help="where the checkpoint's codec lies now, if it has moved")
    parser.add_argument("--n_codebooks", type=whole(1), help="use the RVQ's first ones only")
    parser.add_argument("--data", default="assets/test_mixtures", help="set with mix, s1, s2")
    parser.add_argument("--mix_folder", choices=MIX_FOLDERS, help="of a set that has several")
    parser.add_argument("--situations", action="store_true", help="the paper's table")
    parser.add_argument("--out", help="new folder for the results (default: one below results/)")
    args = parser.parse_args()
    args.ckpt = [str(locate(path)) for path in args.ckpt]
    if len(args.ckpt) > 1 and not args.situations:
        parser.error("several --ckpt are compared with --situations")
    evaluate(args)


if __name__ == "__main__":
    run_program(main)
