"""Scores checkpoints on a set of mixtures.

    python evaluate.py                           the bundled checkpoint on the bundled test mixtures
    python evaluate.py --ckpt FILE --data DIR    another checkpoint, another set (folders mix, s1, s2)
    python evaluate.py --situations --ckpt A B   the paper's table: A and B, each wherever it could be deployed

Prints a table with a row for the mixture left alone, the ceiling (the clean source through the codec: what this codec
could reach at best) and the separator, and leaves in --out results.json (means), scores.jsonl (every score, written as
it is made: the same command goes on where it was interrupted), the estimates in audio/ and index.html, to listen.

- SI-SDR is against the clean source, SI-SDRi its gain over the mixture; SDR is BSS Eval's with 512 taps. PESQ is
  narrow band at 8 kHz, wide band at 16 kHz.
- A c in front (cSI-SDR) means: against the *transmitted* source, clean, encoded, quantised, decoded.
- Estimates are put in the order of the sources by the best mean SI-SDR, for each of the two references. A mixture's
  score is the mean over its sources; the interval is 1.96 standard errors over mixtures. A score that can't be had
  (PESQ without speech, anything against silence) leaves its mixture out of that mean, and is counted.
- Where estimates lag behind their reference (the median over all sources, by cross-correlation), the row is marked:
  a shift that nobody hears ruins SI-SDR.
"""

import collections
import hashlib
import json
import math
import multiprocessing
import os
import signal
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from tqdm import tqdm

from checkpoint import (
    HERE, SettingsError, check_codec, choose_device, load_checkpoint, make_folder, restore_model, run_program,
)  # fmt: skip
from codecformer import separate
from dac_wrapper import ASSETS, Codec, measure_lag
from data import MIX_FOLDERS, FixedMixtures, Parser
from losses import pairwise_negative_si_sdr, pit, si_sdr
from recipes.report import ROWS, format_table, portable, provenance, write_page

COLUMNS = ["si_sdr", "si_sdr_i", "csi_sdr_i", "sdr_i", "pesq", "stoi"]
SITUATION_COLUMNS = [f"{c}{metric}" for c in ("", "c") for metric in ("si_sdr_i", "sdr_i", "pesq", "stoi")]
# Where the separator stands (see `separate`), and whether the RVQ lies before and after it.
SITUATIONS = [("clean", 0, 0), ("transmitted", 1, 0), ("transmitted", 1, 1)] + [
    ("latents", before, after) for before in (0, 1) for after in (0, 1)
]


def score(metric: str, estimate: np.ndarray, reference: np.ndarray, rate: int) -> float:
    """si_sdr, sdr (dB), pesq, stoi or lag (samples, within 20 ms) of [T] against [T]; NaN where it can't be had."""
    from pesq import PesqError, pesq
    from pystoi import stoi
    from torchmetrics.functional.audio import signal_distortion_ratio

    if not reference.std() > 1e-6:  # silence
        return math.nan
    pair = torch.from_numpy(estimate), torch.from_numpy(reference)
    measures = {
        "si_sdr": lambda: si_sdr(*pair),
        "sdr": lambda: signal_distortion_ratio(pair[0].double(), pair[1].double(), filter_length=512),
        "pesq": lambda: pesq(rate, reference, estimate, {8000: "nb", 16000: "wb"}[rate]),
        "stoi": lambda: stoi(reference, estimate, rate),
        "lag": lambda: measure_lag(pair[1], pair[0], rate // 50)[0],
    }
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Not enough STFT frames")  # with which STOI returns a number all the same
            value = float(measures[metric]())
            return value if math.isfinite(value) else math.nan
    except (PesqError, ValueError, RuntimeError, RuntimeWarning, KeyError):
        return math.nan


def score_rows(signals: dict, mixture, references: dict, columns: list[str], rate: int) -> dict:
    """The scores of every row's estimates [S, T]: {row: {column: [S]}}; runs in a process of its own.

    references: {"": clean sources [S, T], "c": transmitted ones}. The rows' lags are always among their scores.
    """
    torch.set_num_threads(1)
    rows = {row: {} for row in signals}
    for prefix, reference in references.items():
        mine = [c.removeprefix(prefix) for c in columns if (c[0] == "c") == bool(prefix)] + ["lag"] * (not prefix)
        every = lambda metric, estimates: np.array(  # noqa: E731
            [score(metric.removesuffix("_i"), e, r, rate) for e, r in zip(estimates, reference)]
        )
        before = {gain: every(gain, [mixture] * len(reference)) for gain in mine if gain.endswith("_i")}
        for row, estimates in signals.items():
            pairwise = pairwise_negative_si_sdr(torch.from_numpy(estimates)[None], torch.from_numpy(reference)[None])
            ordered = estimates[pit(pairwise)[1][0].numpy()]
            for metric in mine:
                rows[row][prefix + metric] = (every(metric, ordered) - before.get(metric, 0)).tolist()
    return rows


@torch.no_grad()
def make_rows(models: dict, codec, item, situations: bool) -> tuple[dict, np.ndarray]:
    """The signals [S, T] of each row for one item of a set, and the transmitted sources [S, T].

    models: {name: (model, RVQ before, RVQ after)}; the switches are those it was trained with, and with `situations`
    every model stands in all SITUATIONS instead.
    """
    mixture = torch.from_numpy(item["mixture"])[None].to(codec.device)
    sources = torch.from_numpy(item["sources"]).to(codec.device)
    transmitted, unquantised = codec.transmit(sources), codec.transmit(sources, quantize=False)
    signals = {"mixture": mixture.expand_as(sources)}
    if situations:
        signals["mixture/transmitted"] = codec.transmit(mixture).expand_as(sources)
        signals |= {"ceiling": unquantised, "ceiling/transmitted": transmitted}
    for name, (model, *rvq) in models.items():
        if not situations:
            estimates = separate(model, codec, mixture, *rvq)
            _, assignment = pit(pairwise_negative_si_sdr(estimates, sources[None]))
            signals |= {"ceiling": transmitted if any(rvq) else unquantised, name: estimates[0, assignment[0]]}
            continue
        for situation, before, after in SITUATIONS:
            which = "+".join(["before"] * before + ["after"] * after) or "none"
            signals[f"{name}/{situation}/{which}"] = separate(model, codec, mixture, before, after, situation)[0]
    return {row: s.cpu().numpy() for row, s in signals.items()}, transmitted.cpu().numpy()


def score_set(dataset, rows_of, columns: list[str], out: Path, keep_audio: bool) -> dict[str, dict]:
    """{mixture: scores as of `score_rows`}, separated here, scored in other processes.

    rows_of: item -> its rows' signals and transmitted sources. What scores.jsonl in `out` holds already is not made
    again; the last row's signals go to `out`/audio.
    """
    path, pending = out / "scores.jsonl", collections.deque()
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # without one that an interruption cut
    path.write_text("".join(f"{line}\n" for line in lines))
    scores = {line["mixture"]: line["rows"] for line in map(json.loads, lines)}
    processes = len(os.sched_getaffinity(0))  # what the scheduler allots, not what the machine has
    # Spawned, not forked: a fork of a process that runs torch's threads can hang.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, spawn, signal.signal, (signal.SIGINT, signal.SIG_IGN))  # Ctrl-C is for us
    with pool, open(path, "a") as file:

        def collect(most: int) -> None:
            while len(pending) > most:
                name, future = pending.popleft()
                scores[name] = json.loads(json.dumps(future.result()), parse_constant=lambda nan: None)
                print(json.dumps({"mixture": name, "rows": scores[name]}), file=file, flush=True)

        for index in tqdm(range(len(dataset)), desc="scoring", unit="mixture"):
            if dataset.files[index].stem in scores:
                continue
            item = dataset[index]
            signals, transmitted = rows_of(item)
            references = {"": item["sources"], "c": transmitted}
            task = pool.submit(score_rows, signals, item["mixture"], references, columns, dataset.sample_rate)
            pending.append((item["name"], task))
            for k, estimate in enumerate([*signals.values()][-1] if keep_audio else [], 1):
                sf.write(out / "audio" / f"{item['name']}_s{k}.wav", estimate, dataset.sample_rate, "FLOAT")
            collect(4 * processes)  # so that waiting signals don't fill the memory
        collect(0)
    return {path.stem: scores[path.stem] for path in dataset.files}


def summarise(scores: dict, columns: list[str]) -> dict:
    """For each row its title, lag, and per column mean, half-width of the 95 % interval and mixtures left out."""
    rows = {}
    for row in next(iter(scores.values())):
        mixtures = [{c: np.array(v, float) for c, v in s[row].items()} for s in scores.values()]  # None becomes NaN
        lag = np.nanmedian(np.concatenate([[math.nan, *m.pop("lag")] for m in mixtures]))
        title = ROWS.get(row, row)
        rows[row] = {"title": title, "lag": {"median_samples": None if math.isnan(lag) else float(lag)}}
        for column in columns:
            values = np.array([m[column].mean() for m in mixtures])
            known = values[np.isfinite(values)]
            mean = float(known.mean()) if len(known) else None
            ci95 = float(1.96 * known.std(ddof=1) / len(known) ** 0.5) if len(known) > 1 else None
            rows[row][column] = {"mean": mean, "ci95": ci95, "left_out": len(values) - len(known)}
    return rows


def evaluate(args) -> None:
    device = choose_device()
    checkpoints = {path: load_checkpoint(path) for path in args.ckpt}
    models = {}
    for path, c in checkpoints.items():
        name = c["separator"] if c["separator"] not in models else f"{c['separator']}{len(models) + 1}"
        models[name] = restore_model(c, path).to(device), c["quantize_before"], c["quantize_after"]
    # One on waveforms works behind any codec.
    on_latents = [path for path, (model, *_) in zip(checkpoints, models.values()) if model.on_latents]
    first = checkpoints[(on_latents or args.ckpt)[0]]
    codec = Codec.load(args.codec or first["codec"]["name"], first["sample_rate"], device)
    codec.use_codebooks(codec.n_codebooks if args.n_codebooks is None else args.n_codebooks)
    for path in on_latents:
        check_codec(checkpoints[path], path, codec)
    dataset = FixedMixtures(args.data, codec.sample_rate, mix_folder=args.mix_folder)
    for path, c in checkpoints.items():
        made_for = c["config"]["n_speakers"], c["sample_rate"]
        if made_for != (dataset.n_speakers, codec.sample_rate):
            here = f"{args.data} mixes {dataset.n_speakers} at {codec.sample_rate} Hz"
            raise SettingsError(f"{path} separates {made_for[0]} speakers at {made_for[1]} Hz, {here}: give a pair")

    # The same checkpoints, set, flags and code share a folder; anything else has another.
    files = [folder / path.name for path in dataset.files for folder in dataset.folders]
    code = sorted([*HERE.glob("[!t]*.py"), *HERE.glob("recipes/*.py")])  # all but train.py and test_all.py
    identity = [args.situations, codec.fingerprint, codec.bitrate, *files]
    digest = hashlib.blake2b(json.dumps(identity, default=str).encode())
    for path in [*args.ckpt, *files, *code]:
        digest.update(Path(path).read_bytes())
    digest = digest.hexdigest()[:12]
    label = "_".join([*models, dataset.root.resolve().name, *["situations"] * args.situations, digest[:6]])
    out = Path(args.out or Path("results") / label)
    mark, made_from = out / "made_from.json", json.dumps({"digest": digest}) + "\n"
    same = mark.exists() and mark.read_text() == made_from
    if not same and out.is_dir() and any(path.is_file() for path in out.iterdir()):
        raise SettingsError(f"{out} has other files or scores of other checkpoints, sets, flags or code: change --out")
    make_folder(out / "audio")
    mark.write_text(made_from)

    columns = SITUATION_COLUMNS if args.situations else COLUMNS
    rows_of = lambda item: make_rows(models, codec, item, args.situations)  # noqa: E731
    scores = score_set(dataset, rows_of, columns, out, keep_audio=not args.situations)
    rows = summarise(scores, columns)
    facts = ("separator", "config", "codec", "quantize_before", "quantize_after", "git", "args")
    results = {
        "rows": rows, "n_mixtures": len(scores), "n_speakers": dataset.n_speakers,
        "checkpoints": {portable(path): {k: c[k] for k in facts} for path, c in checkpoints.items()},
        "codec": {k: getattr(codec, k) for k in ("name", "sample_rate", "codec_rate", "frame_rate", "bitrate", "lag")},
        "data": portable(args.data), "mix_folder": dataset.folders[0].name, **provenance("evaluate.py"),
    }  # fmt: skip
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{len(scores)} mixtures of {dataset.n_speakers} speakers from {portable(args.data)}")
    for path, c in checkpoints.items():
        trained = f"trained with {c['args']['loss']} on {c['args']['data']}, git {c['git']}"
        print(f"{portable(path)}: {c['separator']}, codec {c['codec']['name']}, {trained}")
    print(f"\n{format_table(rows)}\n\nThe codec's lag of {codec.lag} samples at {codec.codec_rate} Hz is removed.")
    if args.situations:
        print("Rows: separator / what it hears (the clean mixture, the mixture behind the codec, or its latents, to")
        print("answer in latents) / where the RVQ is. Gains are over the clean mixture; c: the transmitted source.")
    else:
        print(f"listen: {write_page(out, args.data).resolve().as_uri()}")
    print(f"results: {out / 'results.json'}")


def main() -> None:
    parser = Parser(description="Scores checkpoints on a set of mixtures.")
    parser.add_argument("--ckpt", nargs="+", default=[str(ASSETS / "separator.pt")], help="of train.py")
    parser.add_argument("--codec", help="where the checkpoint's codec lies now, if it has moved")
    parser.add_argument("--n_codebooks", type=int, help="transmit with the RVQ's first ones only, at a lower rate")
    parser.add_argument("--data", default=str(ASSETS / "test_mixtures"), help="folder with mix or mix_clean, s1, s2")
    parser.add_argument("--mix_folder", choices=MIX_FOLDERS, help="of the set, where it has several")
    parser.add_argument("--situations", action="store_true", help="the paper's table, for one or several --ckpt")
    parser.add_argument("--out", help="folder of the results (default: one below results/)")
    args = parser.parse_args()
    if len(args.ckpt) > 1 and not args.situations:
        parser.error("several --ckpt are compared with --situations")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which ends the other processes too
    evaluate(args)


if __name__ == "__main__":
    run_program(main)
