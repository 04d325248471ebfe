"""The project's promises, against closed forms, other libraries and published numbers.

    python -m pytest -q test_all.py        with SLOW=1 in front, the slow ones too

In the order of the reading path. A test skips what this machine lacks: SLOW=1, the original of Lyra
(ai-edge-litert and ../shared/lyra), encodec.
"""

import ast
import csv
import fcntl
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from graphlib import TopologicalSorter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.signal
import soundfile as sf
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy.optimize import brentq
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

import dac_wrapper
import data
import evaluate
import lyra
import program
import separate as separate_program
import train
from checkpoint import SEPARATORS, build_model, load_separator
from codecformer import (
    Codecformer,
    CodecformerConfig,
    SeparatorConfig,
    estimate_latents,
    log_power,
    separate,
    sinusoidal_positions,
)
from dac_file import CodeFile, read_codes, write_codes
from dac_wrapper import CODECS, DAC, Codec, import_dac, load_file, measure_lag
from data import (
    DataError,
    FixedMixtures,
    Recordings,
    Replaced,
    SpeakerMixtures,
    list_speakers,
    open_mixtures,
    read_audio,
    resample,
)
from evaluate import score
from losses import LOSSES, pairwise_negative_si_sdr, pit, si_sdr
from program import ASSETS, UserError
from recipes import codes as codes_recipe
from recipes import librispeech
from recipes.debian_speech import MORE_VOICES, VALID_VOICES, VOICES
from recipes.mix import write_fixed_set
from recipes.wsj0_mix import active_speech_level, make_speaker_folders, make_wsj0_mix
from sepformer import Sepformer, SepformerConfig
from soundstream import (
    Conv,
    Depthwise,
    SoundStream,
    SoundStreamConfig,
    on_frames,
    save_soundstream,
)
from train import MARGIN, crop, mixture_losses

HERE = Path(__file__).resolve().parent
SPEECH = ASSETS / "speech" / "train"
LYRA = Path(__file__).resolve().parent.parent / "shared" / "lyra"
TINY = dict(d_model=16, n_layers=1, n_heads=2, d_ffn=32, dropout=0.0)
SMALL_SOUNDSTREAM = SoundStreamConfig(
    sample_rate=8000,
    kernel=32,
    stride=8,
    widths=(8, 16, 16, 32),
    latent_dim=12,
    n_codebooks=3,
    codebook_size=32,
)
WITH_CODER = replace(SMALL_SOUNDSTREAM, code_dim=4, coder_rounds=1)
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="takes long: SLOW=1 runs it")
# The models here are too small for more threads, and sums of another number of threads are rounded
# otherwise, by which a resumed run would differ in its last bits.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def codec():
    return Codec.load("bundled")


class Exact(nn.Module):
    """A codec without a flaw: cosines and sines of windows that overlap add to the waveform.

    Each latent has a code of its own, its value in sixteenths.
    """

    sample_rate = 8000
    hop_length = 160
    latent_dim = 320
    n_codebooks = 320
    codebook_size = 256

    def __init__(self):
        super().__init__()
        basis = import_module("recipes.train_codec").lapped_transform(160)[:, None]
        self.encoder = nn.Conv1d(1, 320, 320, 160, padding=80, bias=False)
        self.decoder = nn.ConvTranspose1d(320, 1, 320, 160, padding=80, bias=False)
        # Loud latents come to about 1.
        self.encoder.weight = nn.Parameter(32 * basis)
        self.decoder.weight = nn.Parameter(basis / 32)

    def quantize(self, latents, n_codebooks):
        codes = (16 * latents[:, :n_codebooks] + 128).round().clamp(0, 255).long()
        return self.dequantize(codes) + (latents - latents.detach()), codes

    def dequantize(self, codes):
        return F.pad((codes - 128) / 16, (0, 0, 0, 320 - codes.shape[1]))


@pytest.fixture(scope="session")
def exact():
    return Codec(Exact(), 8000, "exact")


@pytest.fixture(scope="session")
def speech():
    """Two seconds each of two bundled voices, [2, 16000] at 8 kHz."""
    voices = [read_audio(SPEECH / name / "01.ogg", 8000, 16000)[0] for name in ("carlo", "june")]
    return torch.from_numpy(np.stack(voices))


def save_random_dac(folder, rates: list[int]):
    """A DAC of random weights and few channels with the encoder's `rates`, and its file."""
    torch.manual_seed(1)
    model = import_dac().DAC(
        encoder_dim=4,
        encoder_rates=rates,
        latent_dim=24,
        decoder_dim=32,
        decoder_rates=rates[::-1],
        n_codebooks=3,
        codebook_size=32,
        codebook_dim=4,
        sample_rate=16000,
    )
    path = folder / "weights.pth"
    model.save(str(path), package=False)
    return model.eval(), path


@pytest.fixture(scope="session")
def official(tmp_path_factory):
    """A small DAC with the strides of the 16 kHz model."""
    return save_random_dac(tmp_path_factory.mktemp("official"), [2, 4, 5, 8])


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """What would be fetched comes from ../shared/lyra, or the test is skipped. A list of it."""
    asked = []

    def fetch(url, path):
        asked.append(url)
        if not (LYRA / path.name).exists():
            pytest.skip(f"{path.name} is not on this machine")
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(LYRA / path.name, path)

    monkeypatch.setattr(lyra, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(lyra, "download", fetch)
    monkeypatch.setattr(dac_wrapper, "download", fetch)
    return asked


@contextmanager
def refused(message):
    """Context: what is done in it is refused in one line that matches `message`."""
    with pytest.raises(UserError, match=message) as caught:
        yield
    assert "\n" not in str(caught.value)


def quietly(make, *args):
    """A codec of random weights, which has no lag to measure and says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args)


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def count_gmacs(model, *shape):
    """Of a forward pass. Attention products are counted, as the plain kernel does them."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        # On the meta device tensors have shapes and no values, and nothing is computed.
        model.to("meta").eval()(torch.empty(*shape, device="meta"))
    return counter.get_total_flops() / 2e9


def every_parameter_learns(model, output):
    output.square().sum().backward()
    return all(p.grad is not None and p.grad.any() for p in model.parameters())


# The separators -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "separator, n_parameters, shape_of_a_second, gmacs",
    [
        (Codecformer, 17_361_408, (1, 1024, 50), {1: 0.99, 4: 1.05, 8: 1.13}),
        (Sepformer, 25_679_361, (1, 8000), {1: 69.0, 4: 59.2, 8: 58.0}),
    ],
)
def test_separators_have_the_published_sizes_and_costs(
    separator, n_parameters, shape_of_a_second, gmacs
):
    with torch.device("meta"):
        model = separator()
    assert count_parameters(model) == n_parameters
    *others, length = shape_of_a_second
    for seconds, published in gmacs.items():
        counted = count_gmacs(model, *others, seconds * length)
        assert counted / seconds == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize("features, context", [("latents", 1), ("log_power", 3), ("both", 5)])
def test_linear_layers_compute_what_the_authors_convolutions_do(features, context):
    model = Codecformer(
        CodecformerConfig(latent_dim=12, features=features, context=context, **TINY)
    )
    nn.init.normal_(model.mask_activation.alpha)
    latents = torch.randn(2, 12, 9)
    power = torch.log10(latents**2 + 1e-3) + 1
    seen = {"latents": latents, "log_power": power, "both": torch.cat([latents, power], 1)}
    kernel = model.bottleneck.weight.view(16, -1, context)
    x = F.conv1d(seen[features], kernel, padding=context // 2).transpose(1, 2)
    x = model.norm(model.layers[0](x + sinusoidal_positions(9, 16))).transpose(1, 2)
    x = F.conv1d(x, model.expand.weight[..., None])
    x = F.conv1d(x, model.split.weight[..., None]).view(4, 12, 9)
    value = F.conv1d(x, model.gate_value[0].weight[..., None], model.gate_value[0].bias)
    gate = F.conv1d(x, model.gate[0].weight[..., None], model.gate[0].bias)
    x = (value + torch.sin(value) ** 2) * torch.sigmoid(gate)
    alpha = model.mask_activation.alpha[:, None]
    masks = (x + torch.sin(alpha * x) ** 2 / alpha).view(2, 2, 12, 9)
    assert torch.allclose(model(latents), masks, atol=1e-5)
    # `fuse` makes one product of two, for inference.
    n_weights = count_parameters(model)
    assert torch.allclose(model.fuse()(latents), masks, atol=1e-5)
    assert count_parameters(model) == n_weights - (16 * 12 + 12 * 24 + 24) + 16 * 24


def test_sepformer_computes_what_speechbrains_modules_do():
    model = Sepformer(SepformerConfig(d_model=32, n_layers=2, n_heads=4, d_ffn=48, chunk=50)).eval()
    for k, parameter in enumerate(model.parameters()):
        number = torch.arange(parameter.numel(), dtype=torch.float64)
        parameter.data = 0.2 * torch.sin(1.7 * number + k).float().view_as(parameter)
    mixture = torch.sin(0.05 * torch.arange(1232, dtype=torch.float64) ** 1.3).float()[None]
    one, other = model(mixture)[0, :, [0, 100, 617, 1200]].tolist()
    # Printed by the Encoder, Dual_Path_Model and Decoder of SpeechBrain 1.1.2 with these weights.
    assert one == pytest.approx([0.0052855, 0.0274255, 0.0340922, -0.0096171], abs=1e-6)
    assert other == pytest.approx([-0.0052820, 0.0026972, -0.0005737, -0.0027396], abs=1e-6)


@pytest.mark.parametrize(
    "activation, n_speakers", [("snake", 2), ("relu", 3), ("tanh", 4), ("gelu", 5)]
)
def test_codecformer_masks_any_length_and_every_parameter_learns(activation, n_speakers):
    sizes = dict(latent_dim=12, n_speakers=n_speakers, activation=activation, **TINY)
    model = Codecformer(CodecformerConfig(**sizes))
    for frames in (2501, 7):  # the authors' positions end at 2,500
        masks = model(torch.randn(2, 12, frames))
        assert masks.shape == (2, n_speakers, 12, frames)
    assert every_parameter_learns(model, masks)


def test_sepformer_takes_any_length_and_level_and_every_parameter_learns():
    model = Sepformer(SepformerConfig(n_speakers=3, chunk=6, **TINY))
    for length in (*range(1, 33), 399, 2001):
        assert model(torch.randn(2, length)).shape == (2, 3, length)
    assert every_parameter_learns(model, model(torch.randn(2, 400)))
    mixture = torch.randn(1, 800)
    assert torch.allclose(model(100 * mixture), 100 * model(mixture), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", [1, 5, 6, 7, 50])
def test_every_frame_lies_in_two_of_sepformers_chunks(length):
    """With nothing between cutting and joining, overlap-add returns twice the input."""
    model = Sepformer(SepformerConfig(chunk=6, **TINY)).eval()
    for layer in ("bottleneck", "blocks", "norm", "expand", "gate_value"):
        setattr(model, layer, nn.Identity())
    model.gate = nn.Threshold(threshold=1e9, value=1.0)  # ones
    model.split = nn.Conv2d(16, 32, 1, bias=False)
    model.split.weight.data = torch.eye(16).repeat(2, 1)[:, :, None, None]
    x = torch.rand(3, 16, length)
    assert torch.allclose(model.predict_masks(x), 2 * x[:, None].expand(-1, 2, -1, -1))


def test_a_separator_that_cannot_be_built_is_refused():
    for config, name, value in (
        (CodecformerConfig, "n_heads", 3),
        (CodecformerConfig, "n_speakers", 1),
        (CodecformerConfig, "activation", "swish"),
        (CodecformerConfig, "features", "phase"),
        (SepformerConfig, "dropout", 1.0),
        (SepformerConfig, "kernel", 15),
    ):
        with pytest.raises(ValueError, match=f"{name}.* .*{value}"):
            config(**{name: value})


def test_gradients_reach_the_separator_and_not_the_codec(codec, speech):
    batch = {"mixture": speech.sum(0)[None, :4000], "sources": speech[None, :, :4000]}
    on_latents = Codecformer(CodecformerConfig(latent_dim=codec.latent_dim, **TINY))
    on_waveforms = Sepformer(SepformerConfig(chunk=50, **TINY))
    for model, options in ((on_latents, ("csi_sdr", True, True)), (on_waveforms, ("si_sdr",))):
        losses = mixture_losses(model, model.on_latents, codec, batch, *options)
        assert every_parameter_learns(model, losses)
    assert not any(p.requires_grad for p in codec.network.parameters())


# The codec is exact in time, length and level -----------------------------------------------------


def test_every_length_from_one_sample_to_two_hops_comes_back(codec, official):
    resampling = quietly(Codec, DAC(official[0]), 8000)  # from 8 to 16 kHz and back
    for c, step in ((codec, 1), (resampling, 7)):
        for length in range(1, 321, step):
            latents = c.encode(torch.randn(1, length))
            assert c.decode(latents, length).shape == (1, length)
            assert latents.shape[-1] >= length / 160


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100])
def test_any_data_rate_is_resampled_to_the_codec_and_back_in_time(codec, speech, rate):
    wav = torch.from_numpy(resample(speech[0].numpy(), 8000, rate))[None]
    sent = Codec(codec.network, rate).transmit(wav, quantize=False)
    assert measure_lag(wav[0], sent[0], 50)[0] == 0
    assert si_sdr(sent, wav) > 15


def test_more_codebooks_transmit_better(codec, speech):
    facts = (codec.lag, codec.sample_rate, codec.frame_rate, codec.latent_dim, codec.bitrate)
    assert facts == (0, 8000, 50.0, 320, 6000.0)
    quality = []
    for n in (1, 4, 12):
        codec.use_codebooks(n)
        quality.append(si_sdr(codec.transmit(speech), speech).mean())
    assert quality[0] < quality[1] < quality[2]


def test_the_bundled_codec_codes_strangers_as_its_table_says(codec):
    """At 6 kbit/s and without the RVQ, within what ten utterances can say."""
    mixtures = FixedMixtures(ASSETS / "test_mixtures", 8000, size=10)
    voices = np.stack([item["sources"][0] for item in mixtures])

    def mean_score(metric, quantize):
        sent = codec.transmit(torch.from_numpy(voices), quantize).numpy()
        return np.mean([score(metric, *pair, 8000) for pair in zip(sent, voices)])

    assert mean_score("pesq", True) > 2.1 and mean_score("stoi", True) > 0.8
    assert mean_score("pesq", False) > 4.2 and mean_score("si_sdr", False) > 30


def test_what_bundled_receives_are_latents_that_its_encoder_makes(codec, speech):
    """Of the 320 of 160 samples, those are few: a separator knows no others."""
    gain = codec.gain(speech)
    for n_codebooks in (3, 12):
        latents, _ = codec.network.quantize(codec.encode(speech * gain), n_codebooks)  # [2, D, F]
        encoded = codec.encode(codec.decode(latents, 16000))
        inner = slice(1, -1)  # the frames at the ends are cut off
        assert si_sdr(latents[..., inner].flatten(), encoded[..., inner].flatten()) > 15


def late_codec(planted):
    """An exact one but that its decoder's output comes late, as trained weights can make it."""
    network = Exact()

    def delay(decoder, latents, wav):
        return F.pad(wav, (planted, 0))[..., : wav.shape[-1]]

    network.decoder.register_forward_hook(delay)
    return Codec(network, 8000)


@pytest.mark.parametrize("planted", [-31, -8, 1, 57, 200])
def test_a_planted_lag_is_measured_and_removed(speech, planted):
    codec = late_codec(planted)
    assert codec.lag == planted
    assert si_sdr(speech.roll(planted, -1), speech).max() < 10  # why it matters
    there_and_back = codec.decode(codec.encode(speech), 16000)
    # Exact but for ends where a window has no neighbour, and what an early codec has lost for good.
    start = 160 + max(-planted, 0)
    end = 16000 if planted > 0 else 15840
    assert torch.allclose(there_and_back[:, start:end], speech[:, start:end], atol=1e-4)


@pytest.mark.parametrize("planted", [-31, 57])
def test_the_lag_is_removed_in_samples_of_the_codec_not_of_the_data(speech, planted):
    codec = Codec(late_codec(planted).network, 16000)
    wav = torch.from_numpy(np.stack([resample(voice, 8000, 16000) for voice in speech.numpy()]))
    sent = codec.decode(codec.encode(wav), 32000)
    assert codec.lag == planted
    assert si_sdr(sent[:, 1000:-1000], wav[:, 1000:-1000]).min() > 20


@pytest.mark.parametrize("factor", [1e-3, 30.0])
def test_level_in_is_level_out_and_silence_stays_silence(codec, speech, factor):
    masks = Codecformer(CodecformerConfig(latent_dim=codec.latent_dim, **TINY)).eval()
    clips = nn.Sequential(nn.Unflatten(1, (1, -1)), nn.Tanh())  # a separator on waveforms
    clips.on_latents = False
    for process in (
        codec.transmit,
        partial(separate, masks, codec),
        partial(separate, clips, codec),
    ):
        reference = process(speech)
        tolerance = 2e-3 * reference.abs().max().item()
        assert torch.allclose(process(speech * factor) / factor, reference, atol=tolerance)
        assert process(torch.zeros(2, 1000)).abs().max() < 0.1
    level = 20 * torch.log10(codec.transmit(speech).std(-1) / speech.std(-1))
    assert level.abs().max() < 2


def test_the_codec_agrees_with_the_dac_package(official):
    model, path = official
    codec = quietly(Codec.load, str(path), 16000)
    codec.lag = 0
    wav = 0.1 * torch.randn(2, 3200)
    latents = codec.encode(wav)
    with torch.no_grad():
        assert torch.allclose(latents, model.encoder(wav[:, None]), atol=1e-5)
        for n in (2, 3):
            codec.use_codebooks(n)
            quantised, codes, *_ = model.encode(wav[:, None], n_quantizers=n)
            assert torch.allclose(codec.quantize(latents), quantised, atol=1e-5)
            assert torch.equal(codec.to_codes(latents), codes)
            assert codec.bitrate == n * 5 * 50
        decoded = model.decode(quantised)[:, 0]
    assert decoded.shape[-1] == 3192  # the 8 lost samples that `Codec` gives back
    assert torch.allclose(codec.decode(quantised, 3200)[:, :3192], decoded, atol=1e-5)
    assert not any("weight_g" in name for name, _ in codec.network.named_parameters())


@pytest.mark.parametrize("kind", ["dac", "soundstream", "soundstream with a coder"])
def test_codes_carry_quantised_latents_to_the_last_bit(kind, official):
    network = {
        "dac": DAC(official[0]),
        "soundstream": SoundStream(SMALL_SOUNDSTREAM),
        "soundstream with a coder": SoundStream(WITH_CODER),
    }[kind]
    codec = quietly(Codec, network, network.sample_rate)
    latents = torch.randn(2, 3, codec.latent_dim, 7)
    for n in (1, network.n_codebooks):
        codec.use_codebooks(n)
        codes = codec.to_codes(latents)
        assert codes.shape == (2, 3, n, 7)
        assert torch.equal(codec.from_codes(codes), codec.quantize(latents))
    for wrong in (codes - network.codebook_size, codes + network.codebook_size):
        with refused(f"those of .* are 0 to {network.codebook_size - 1}"):
            codec.from_codes(wrong)
    with refused(f"codes of {2 * n} codebooks, .* has 1 to {n}"):
        codec.from_codes(torch.cat([codes, codes], dim=-2))
    for wrong in (0, n + 1):
        with refused(f"{wrong} codebooks asked for, .* has 1 to {n}"):
            codec.use_codebooks(wrong)


def energy_outside(gradient, frame):
    """Of a gradient [frames, n], the share beyond MARGIN frames of one of them."""
    energy = gradient.square().sum(1)
    near = energy[frame - MARGIN : frame + MARGIN + 1]
    return 1 - (near.sum() / energy.sum()).item()


@pytest.mark.parametrize("kind, most", [("dac", 1e-6), ("lyra's shape", 0.01)])
def test_what_a_frame_depends_on_lies_within_the_margin(kind, most, official):
    """DAC sees nothing beyond it; a causal SoundStream 15 frames, by 1 % of its gradient."""
    network = DAC(official[0]) if kind == "dac" else SoundStream()
    hop = network.hop_length
    wav = torch.randn(1, 1, 61 * hop, requires_grad=True)
    latent = network.encoder(wav)[0, :, 30]
    (gradient,) = torch.autograd.grad(latent @ torch.randn_like(latent), wav)
    assert energy_outside(gradient.view(61, hop), 30) < most
    latents = torch.randn(1, network.latent_dim, 61, requires_grad=True)
    frame = network.decoder(latents)[0, 0, 30 * hop : 31 * hop]
    (gradient,) = torch.autograd.grad(frame @ torch.randn(hop), latents)
    assert energy_outside(gradient[0].T, 30) < most


@pytest.mark.parametrize("name", CODECS)
def test_a_codecs_latents_lie_where_the_separator_sees_them(name, speech, offline):
    """Far above the floor of the logarithm at its entrance, which hides all that is below."""
    codec = quietly(Codec.load, name)
    latents = codec.encode(speech * codec.gain(speech))
    power = latents.square().mean((0, 2))  # of each channel
    floor = 10 ** (log_power(torch.zeros(1)) - 1)
    assert power.median() >= 10 * floor


class Bomb:
    """A pickle of it runs a command as it is read."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_bad_codecs_are_one_line_and_run_no_code(tmp_path, monkeypatch, official):
    monkeypatch.chdir(tmp_path)
    Path("bomb.pth").write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save({"state_dict": Bomb(), "metadata": {}}, "bomb2.pth")
    torch.save({"state_dict": {}, "metadata": {"kwargs": {}}}, "other.pth")
    Path("empty.pth").touch()
    Path("truncated.pth").write_bytes(official[1].read_bytes()[:10000])
    for name in ("bomb", "bomb2", "other", "empty", "truncated"):
        with refused(f"{name}.pth is .*: fetch"):
            Codec.load(f"{name}.pth")
    assert not Path("exploded").exists()
    with refused("no codec dac_99khz: give --codec one of bundled, lyra"):
        Codec.load("dac_99khz")
    with refused("out of range"):
        Codec.load("bundled", sample_rate=100)


class Release(BaseHTTPRequestHandler):
    """Serves one file, of which it promises more than there is."""

    content = b""
    missing = 1000

    def do_GET(self):
        assert self.path == "/0.0.5/weights_16khz.pth"
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content) + self.missing))
        self.end_headers()
        self.wfile.write(self.content)


def test_official_weights_are_fetched_whole_or_not_at_all(tmp_path, monkeypatch, official):
    monkeypatch.setattr(dac_wrapper, "CACHE", tmp_path)
    monkeypatch.setattr(dac_wrapper, "RELEASES", "http://127.0.0.1:9/")  # nobody listens there
    with refused("can't fetch http.* refused"):
        Codec.load("dac_16khz")
    monkeypatch.setattr(Release, "content", official[1].read_bytes())
    with ThreadingHTTPServer(("127.0.0.1", 0), Release) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setattr(dac_wrapper, "RELEASES", f"http://127.0.0.1:{server.server_port}/")
        with refused("can't fetch http.* 1000 bytes too early"):
            Codec.load("dac_16khz")
        assert list(tmp_path.iterdir()) == []
        monkeypatch.setattr(Release, "missing", 0)
        quietly(Codec.load, "dac_16khz")
        server.shutdown()
    (cached,) = tmp_path.iterdir()
    assert cached.read_bytes() == Release.content
    quietly(Codec.load, "dac_16khz")  # without a server


# SoundStream, and Lyra, whose original is run by ai-edge-litert -----------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_a_soundstream_returns_its_length_and_a_causal_one_waits_for_nothing(causal):
    network = SoundStream(replace(SMALL_SOUNDSTREAM, causal=causal))
    wav = torch.randn(1, 1, 30 * 160)
    later = wav.clone()
    later[..., 15 * 160 :] += 1
    latents = network.encoder(wav)
    assert latents.shape == (1, 12, 30)
    decoded = network.decoder(latents)
    assert decoded.shape == wav.shape
    moved = (network.encoder(later) - latents).abs().amax((0, 1))  # [F]
    assert (moved[:15].max() == 0) == causal
    assert moved[15:].min() > 0
    moved = (network.decoder(network.encoder(later)) - decoded).abs().amax((0, 1))  # [T]
    assert (moved[: 15 * 160].max() == 0) == causal
    with pytest.raises(ValueError, match="100 samples are no multiple of the codec's 160"):
        network.encoder(wav[..., :100])


def test_layers_laid_out_for_speed_compute_plain_convolutions():
    wide = Depthwise(8, 9, causal=True)
    x = torch.randn(2, 8, 40)
    expected = F.conv1d(F.pad(x, (18, 0)), wide.weight[:, :, 0], dilation=9, groups=8)
    assert torch.allclose(wide(x[:, :, None])[:, :, 0], expected, atol=1e-5)
    # Lyra's outermost kernels, that work on strides as they did on samples.
    weight = torch.randn(8, 1, 1, 64)
    bias = torch.randn(1)
    last = Conv(8, 16, 4)
    last.weight.data, last.bias.data = lyra.last_on_strides(weight, bias, 16)
    expected = F.conv_transpose1d(x, weight[:, :, 0], bias, stride=16)[..., :640]
    strides = last(x[:, :, None]).transpose(1, 3)
    assert torch.allclose(strides.reshape(2, 1, 640), expected, atol=1e-4)
    bias = torch.randn(8)
    first = Conv(16, 8, 4)
    first.weight.data, first.bias.data = lyra.first_on_strides(weight, bias, 16)
    wav = torch.randn(2, 1, 640)
    expected = F.conv1d(F.pad(wav, (48, 0)), weight[:, :, 0], bias, stride=16)
    strides = wav.view(2, 40, 1, 16).transpose(1, 3)
    assert torch.allclose(first(strides)[:, :, 0], expected, atol=1e-4)


@pytest.mark.parametrize("config", [SMALL_SOUNDSTREAM, WITH_CODER])
def test_gradients_reach_every_weight_and_pass_straight_through_the_rvq(config):
    network = SoundStream(config)
    latents = network.encoder(torch.randn(2, 1, 1600))
    latents.retain_grad()
    quantised, _ = network.quantize(latents, 3)
    quantised.retain_grad()
    network.decoder(quantised).square().sum().backward()
    # As if the RVQ added what it rounds by to the points.
    alike = latents.detach().requires_grad_()
    points = on_frames(network.analysis, alike)
    rounding = (network.quantizer(points, 3)[0] - points).detach()
    on_frames(network.synthesis, points + rounding).backward(quantised.grad)
    assert torch.allclose(latents.grad, alike.grad, rtol=1e-4, atol=1e-6)
    for part in (network.encoder, network.decoder):
        assert all(p.grad.any() for p in part.parameters())


def test_the_rvq_chooses_the_nearest_of_its_entries():
    quantizer = SoundStream(WITH_CODER).quantizer
    points = torch.randn(2, 4, 10)
    quantised, codes = quantizer(points, 3)
    rest = points.transpose(1, 2)  # [B, F, D]
    for k, entries in enumerate(quantizer.codebooks):  # [K, D]
        distances = (entries - rest[:, :, None]).norm(dim=-1)  # [B, F, K]
        assert torch.equal(distances.argmin(-1), codes[:, k])
        rest = rest - entries[codes[:, k]]
    assert torch.allclose(quantised, points - rest.transpose(1, 2), atol=1e-5)


def test_lyra_has_the_size_and_the_cost_that_are_known_of_it():
    network = SoundStream()
    for part, shape in ((network.encoder, (1, 1, 16000)), (network.decoder, (1, 64, 50))):
        assert count_parameters(part) == pytest.approx(0.660e6, rel=0.01)
        assert count_gmacs(part, *shape) == pytest.approx(0.0998, rel=0.01)


def test_lyra_is_fetched_once_and_a_wrong_file_is_refused(offline, speech):
    codec = Codec.load("lyra")
    assert offline == [lyra.URL + name for name in lyra.FILES]
    for name in lyra.FILES:
        (lyra.CACHE / name).unlink()
    assert Codec.load("lyra").fingerprint == codec.fingerprint
    assert len(offline) == 3
    facts = (codec.lag, codec.codec_rate, codec.frame_rate, codec.latent_dim, codec.bitrate)
    assert facts == (0, 16000, 50.0, 64, 9200.0)
    with refused("no .*soundstream_encoder.tflite: fetch it from https"):
        lyra.convert_lyra(lyra.CACHE)
    (lyra.CACHE / "soundstream_encoder.tflite").write_bytes(b"something else")
    with refused("soundstream_encoder.tflite is not the file .*: fetch it anew"):
        lyra.convert_lyra(lyra.CACHE)


def original(name):
    """One of Lyra's own graphs."""
    litert = pytest.importorskip("ai_edge_litert.interpreter", reason="no ai-edge-litert here")
    return litert.Interpreter(str(lyra.CACHE / name), num_threads=1)


def run_original(name, frames):
    """The outputs of one of Lyra's own streaming graphs for frames [F, n]: [F, m]."""
    graph = original(name)
    graph.allocate_tensors()
    given = graph.get_input_details()[0]
    outputs = []
    for frame in frames:
        graph.set_tensor(given["index"], frame.view(*given["shape"]).numpy())
        graph.invoke()
        outputs.append(graph.get_tensor(graph.get_output_details()[0]["index"]).flatten())
    return torch.from_numpy(np.stack(outputs))


@slow
def test_lyra_is_the_original_but_for_its_8_bit_activations(offline, speech):
    network, _ = lyra.load_lyra()
    wav = torch.from_numpy(resample(speech[0].numpy(), 8000, 16000))
    latents = run_original("soundstream_encoder.tflite", wav.view(-1, 320))  # [F, 64]
    decoded = run_original("lyragan.tflite", latents).flatten()
    with torch.no_grad():
        error = network.encoder(wav[None, None])[0].T - latents
        assert error.std() < 0.10 * latents.std()
        error = network.decoder(latents.T[None])[0, 0] - decoded
        assert error.std() < 0.07 * decoded.std()
    # The RVQ has 8 bits nowhere.
    graph = original("quantizer.tflite")
    encode = graph.get_signature_runner("encode")
    decode = graph.get_signature_runner("decode")
    for n in (1, 30, 46):
        quantised, codes = network.quantize(latents.T[None], n)
        for k, frame in enumerate(latents):
            given = frame[None, None].numpy()
            theirs = encode(input_frames=given, num_quantizers=np.int32(n))["output_0"]
            assert codes[0, :, k].tolist() == theirs[:n].flatten().tolist()
            decoded = torch.from_numpy(decode(encoding_indices=theirs)["output_0"][0, 0])
            assert torch.allclose(quantised[0, :, k], decoded, atol=1e-4)


# Losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [-20, 0, 13.7, 40])
def test_si_sdr_of_orthogonal_noise_is_the_ratio_of_energies(level):
    """Whatever the scale and the offset."""
    time = torch.arange(8000, dtype=torch.float64) / 8000
    source = torch.sin(2 * math.pi * 50 * time)
    noise = torch.cos(2 * math.pi * 90 * time) * 10 ** (-level / 20)
    estimate = 7.3 * (source + noise) + 0.4
    assert si_sdr(estimate, source).item() == pytest.approx(level, abs=1e-6)


def test_si_sdr_agrees_with_torchmetrics(speech):
    estimates = speech + 0.03 * torch.randn_like(speech) + 0.2 * speech.flip(0)
    theirs = scale_invariant_signal_distortion_ratio(estimates, speech, zero_mean=True)
    assert torch.allclose(si_sdr(estimates, speech), theirs, atol=1e-4)


@pytest.mark.parametrize("n_speakers", [2, 3, 4, 5])
def test_pit_finds_the_best_permutation_of_each_mixture(n_speakers):
    orders = torch.tensor(list(itertools.permutations(range(n_speakers))))  # [P, S]
    sources = torch.randn(1, n_speakers, 400)
    estimates = sources[0, orders] + 0.1 * torch.randn(len(orders), n_speakers, 400)
    pairwise = pairwise_negative_si_sdr(estimates, sources.expand(len(orders), -1, -1))
    loss, assignment = pit(pairwise)
    everyone = torch.arange(n_speakers)
    assert (orders.gather(1, assignment) == everyone).all()
    losses = torch.stack([pairwise[:, order, everyone].mean(-1) for order in orders])
    assert torch.allclose(loss, losses.min(0).values, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_silent_and_constant_signals_give_finite_losses_and_gradients(name, codec):
    loss, compared = LOSSES[name]
    shape = (1, 2, codec.latent_dim, 5) if compared == "latents" else (1, 2, 800)
    for level in (0.0, 0.3):
        for estimates in (torch.zeros(shape), torch.full(shape, 0.3), torch.randn(shape)):
            estimates.requires_grad_()
            pairwise = loss(codec, estimates, torch.full((1, 2, 800), level))
            pairwise.sum().backward()
            assert pairwise.isfinite().all()
            assert estimates.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_is_best_for_what_it_asks_for(name, codec, speech):
    loss, compared = LOSSES[name]
    sources = (speech * codec.gain(speech.sum(0)))[None]
    latents = codec.encode(sources)
    transmitted = codec.transmit(sources)
    perfect = {"si_sdr": sources, "csi_sdr": transmitted, "embedding": latents}[name]
    # What another asks for is good, not perfect.
    good = {"si_sdr": transmitted, "csi_sdr": sources, "embedding": codec.quantize(latents)}[name]
    given = transmitted if compared == "transmitted" else sources
    for order in ([0, 1], [1, 0]):
        best, assignment = pit(loss(codec, perfect[:, order], given))
        assert best < -60
        assert assignment.tolist() == [order]
        assert -30 < pit(loss(codec, good[:, order], given))[0] < 0
    if name == "embedding":  # relative to the clean latents, so that a tenth too much is -20 dB
        assert pit(loss(codec, 1.1 * latents, sources))[0].item() == pytest.approx(-20, abs=1e-3)


@pytest.mark.parametrize("planted", [0, 200])
@pytest.mark.parametrize("name, reached", [("si_sdr", -25), ("embedding", -60)])
def test_a_crop_of_perfect_latents_is_a_perfect_crop(name, reached, planted, speech):
    """Of the same moment as that of the sources, and its edges are not scored."""
    loss, compared = LOSSES[name]
    codec = late_codec(planted)
    sources = (speech * codec.gain(speech.sum(0)))[None].repeat(3, 1, 1)
    latents = codec.encode(sources)
    frames = 25 + 2 * MARGIN
    parts, targets = crop(codec, latents, sources, torch.tensor([0.0, 0.4, 0.999]), frames)
    assert parts.shape[-1] == frames
    assert torch.equal(targets[0], sources[0, :, : 160 * frames])
    assert torch.equal(targets[2], sources[0, :, -160 * frames :])
    estimates = parts if compared == "latents" else codec.decode(parts, targets.shape[-1])
    assert pit(loss(codec, estimates, targets, MARGIN))[0].max() < reached
    moved = loss(codec, estimates, targets.roll(80, -1), MARGIN)
    assert pit(moved)[0].min() > max(reached + 10, 0)
    with refused("no whole samples: leave out --loss_seconds"):
        Codec(codec.network, 11025).samples_per_frame


def test_a_crop_is_compared_with_that_part_of_the_whole_sources_as_transmitted(codec, speech):
    """The crop alone would be sent at another level, in other codes: 13 dB from these."""
    sources = speech[None].repeat(3, 1, 1) * torch.tensor([0.2, 1.0])[:, None]  # [3, 2, T]
    mixture = sources.sum(1)  # [3, T]
    position = torch.tensor([0.0, 0.4, 0.999])
    batch = {"mixture": mixture, "sources": sources, "position": position}
    transmitted = codec.transmit(sources)

    def masks(latents):
        """Those that make of the mixture the sources as transmitted."""
        gain = codec.gain(mixture)[:, None]
        return codec.encode(transmitted * gain) / latents.unsqueeze(1)

    loss = mixture_losses(masks, True, codec, batch, "csi_sdr", crop_seconds=0.5)
    assert loss.max() < -25  # as the codec is from being transparent
    assert mixture_losses(masks, True, codec, batch, "si_sdr", crop_seconds=0.5).min() > -20

    def late_masks(latents):
        return masks(latents) * (torch.arange(latents.shape[-1]) >= 60)

    loss = mixture_losses(late_masks, True, codec, batch, "csi_sdr", crop_seconds=0.5)
    assert loss[0] > -5 and loss[2] < -25  # the crops are of where `position` says


# Data ---------------------------------------------------------------------------------------------


def test_segments_begin_anywhere_and_are_the_same_when_read_in_parts(monkeypatch):
    noise = {name: np.random.default_rng(k).normal(0, 0.1, 32000) for k, name in enumerate("ab")}
    for name, wav in noise.items():
        Path(name).mkdir()
        sf.write(f"{name}/x.wav", wav, 8000, "FLOAT")
    kept = SpeakerMixtures(".", 8000, seconds=0.5, size=30)
    starts = []
    for item in kept:
        whole = noise[item["name"].split("_")[1]]
        starts.append(int(np.correlate(whole, item["sources"][0]).argmax()))
    assert min(starts) < 5000 and max(starts) > 23000
    monkeypatch.setattr(Recordings, "MAX_KEPT", 0)  # as for a corpus larger than memory
    read_in_parts = SpeakerMixtures(".", 8000, seconds=0.5, size=30)
    assert all(same(one, other) for one, other in zip(kept, read_in_parts))
    assert not read_in_parts.recordings.kept


def test_each_source_is_played_at_a_speed_of_its_own():
    for name, hertz in (("a", 400), ("b", 1000)):
        write_tone(Path("tones", name, "x.wav"), hertz)
    write_set("set", {"x": [read_audio(f"tones/{name}/x.wav")[0] for name in "ab"]})

    def played(item):
        peaks = np.abs(np.fft.rfft(item["sources"] * np.hanning(8000))).argmax(1)  # Hz
        return {round(100 * peak / hertz) for peak, hertz in zip(sorted(peaks), (400, 1000))}

    for root in ("tones", "set"):
        mixtures = open_mixtures(root, 8000, seconds=1.0, size=1, speeds=(90, 110))
        drawn = [played(mixtures[epoch, 0]) for epoch in range(30)]
        assert all(speeds in drawn for speeds in ({90}, {110}, {90, 110}))


def test_channels_are_mixed_to_their_mean():
    left, right = np.random.default_rng(0).normal(0, 0.1, (2, 8000)).astype(np.float32)
    sf.write("a.wav", np.stack([left, right], axis=1), 8000, "FLOAT")
    assert np.allclose(read_audio("a.wav")[0], (left + right) / 2, atol=1e-6)


def same(one, other):
    return one["name"] == other["name"] and np.array_equal(one["mixture"], other["mixture"])


def level_db(signal):
    return 10 * np.log10(np.mean(np.square(signal, dtype=np.float64)))


def write_tone(path, hertz=300, rate=8000, seconds=3.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate), rate)


def write_noise(folder):
    """Short, stereo and in a subfolder, like WHAM!'s."""
    (folder / "tr").mkdir(parents=True)
    for k in range(3):
        noise = np.random.default_rng(k).normal(0, 0.1, (4800, 2))
        sf.write(folder / "tr" / f"{k}.wav", noise, 16000)
    return folder


def test_mixtures_are_a_pure_function_of_seed_epoch_and_index():
    def mixtures(seed):
        return SpeakerMixtures(SPEECH, 8000, seconds=1.0, size=50, seed=seed, speeds=(90, 100, 110))

    first, second = mixtures(3), mixtures(3)
    later = {index: second[index] for index in (7, 0, 31)}  # in another order
    assert all(same(first[index], item) for index, item in later.items())
    assert same(first[7], second[0, 7])
    assert same(first[1, 7], second[1, 7])
    for other in (first[8], first[1, 7], mixtures(4)[7]):
        assert not same(first[7], other)


@pytest.mark.parametrize("n_speakers", [2, 3, 5])
def test_a_mixture_is_the_sum_of_different_speakers_within_the_level_range(n_speakers):
    differences = []
    for item in SpeakerMixtures(SPEECH, 8000, n_speakers, seconds=1.0, size=30):
        assert item["mixture"].shape == (8000,)
        assert item["sources"].shape == (n_speakers, 8000)
        assert len(set(item["name"].split("_")[1:])) == n_speakers
        assert np.allclose(item["sources"].sum(0), item["mixture"], atol=1e-6)
        loudest = max(np.abs(item["mixture"]).max(), np.abs(item["sources"]).max())
        assert loudest == pytest.approx(0.9, abs=1e-6)
        levels = 20 * np.log10(item["sources"].std(-1))
        differences.append(levels.max() - levels.min())
    assert min(differences) < 1
    assert 4 < max(differences) <= 5.001


def test_speed_and_rate_change_pitch_as_they_should(tmp_path):
    write_tone(tmp_path / "a" / "x.wav", 400, rate=8000)
    write_tone(tmp_path / "b" / "y.wav", 400, rate=22050)
    (item,) = SpeakerMixtures(tmp_path, 8000, seconds=2.0, size=1, speeds=(125,))
    for source in item["sources"]:
        spectrum = np.abs(np.fft.rfft(source * np.hanning(16000)))
        assert spectrum.argmax() / 2 == pytest.approx(500, abs=1)


def test_noise_is_mixed_at_the_chosen_snr_and_only_into_the_mixture(tmp_path):
    write_noise(tmp_path)

    def mixtures(**noise):
        return SpeakerMixtures(SPEECH, 8000, seconds=0.5, size=20, **noise)

    def snr(item):
        speech = item["sources"].sum(0)
        return level_db(speech) - level_db(item["mixture"] - speech)

    exact = mixtures(noise=tmp_path, snr=(5, 5))
    assert snr(exact[0]) == pytest.approx(5, abs=1e-3)
    spread = mixtures(noise=tmp_path)
    snrs = [snr(item) for item in spread]
    assert -6.001 <= min(snrs) < -4
    assert 1 < max(snrs) <= 3.001
    clean, noisy = mixtures()[3], spread[3]
    gain = np.linalg.norm(noisy["sources"]) / np.linalg.norm(clean["sources"])
    assert np.allclose(clean["sources"] * gain, noisy["sources"], atol=1e-5)
    assert np.abs(noisy["mixture"]).max() <= 0.9001


@pytest.mark.parametrize("noisy", [False, True])
def test_a_fixed_set_reads_back_sample_exact(tmp_path, noisy):
    noise = write_noise(tmp_path / "noise") if noisy else None
    mixtures = SpeakerMixtures(SPEECH, 16000, 3, seconds=0.5, size=4, noise=noise)
    root = tmp_path / "set"
    write_fixed_set(mixtures, root)
    folders = ["mix_both", "noise"] if noisy else ["mix_clean"]
    assert sorted(path.name for path in root.iterdir()) == [*folders, "s1", "s2", "s3"]
    fixed = FixedMixtures(root, 16000, 3)
    for item, drawn, path in zip(fixed, mixtures, fixed.files, strict=True):
        rest = read_audio(root / "noise" / path.name)[0] if noisy else 0
        assert np.array_equal(item["mixture"], item["sources"].sum(0) + rest)
        assert np.abs(item["sources"] - drawn["sources"]).max() <= 0.5001 / 32768
        assert np.abs(item["mixture"] - drawn["mixture"]).max() <= 2.001 / 32768
    some = FixedMixtures(root, 16000, 3, size=2)
    assert [path.name[:4] for path in some.files] == ["0000", "0003"]  # evenly spaced


@pytest.mark.parametrize("speed", [80, 100, 125])
def test_librimix_is_read_with_and_without_noise_and_only_speech_changes_speed(tmp_path, speed):
    """As create_librimix_from_metadata.py lays it out."""
    s1, s2, noise = np.random.default_rng(0).integers(-9000, 9000, (3, 8000)).astype("int16")
    signals = {"s1": s1, "s2": s2, "noise": noise, "mix_clean": s1 + s2}
    signals["mix_both"] = s1 + s2 + noise
    for folder, wav in signals.items():
        (tmp_path / folder).mkdir()
        sf.write(tmp_path / folder / "4-a_7-b.wav", wav, 8000, subtype="PCM_16")
        signals[folder] = wav / np.float32(32768)
    for folder, options in (("mix_clean", {}), ("mix_both", dict(mix_folder="mix_both"))):
        (item,) = FixedMixtures(tmp_path, 8000, **options)
        assert np.array_equal(item["mixture"], signals[folder])
        assert np.array_equal(item["sources"], [signals["s1"], signals["s2"]])
    segments = FixedMixtures(tmp_path, 8000, seconds=0.5, speeds=(speed,), mix_folder="mix_both")
    item = segments[1, 0]
    assert same(item, segments[1, 0])
    assert not same(item, segments[2, 0])
    rest = item["mixture"] - item["sources"].sum(0)
    windows = np.lib.stride_tricks.sliding_window_view(signals["noise"], 4000)
    (start,) = np.flatnonzero(np.abs(windows - rest).max(1) < 1e-5)
    played = resample(signals["s1"][start:], speed, 100)[:3000]
    assert np.allclose(item["sources"][0, :3000], played, atol=1e-5)


def test_what_is_no_data_or_does_not_fit_is_refused_in_one_line(tmp_path):
    write_tone(tmp_path / "alone" / "speaker" / "x.wav")
    write_tone(tmp_path / "LibriSpeech" / "dev-clean" / "19" / "19-198-0000.flac")
    for folder in ("mixtures", "s1", "s2"):
        write_tone(tmp_path / "misnamed" / folder / "x.wav")
    for name in ("good", "rate", "length", "missing", "broken", "gap", "twins", "click"):
        for folder in ("mix", "s1", "s2"):
            write_tone(tmp_path / name / folder / "x.wav")
    write_tone(tmp_path / "rate" / "s2" / "x.wav", rate=16000)
    write_tone(tmp_path / "length" / "s2" / "x.wav", seconds=2)
    (tmp_path / "gap" / "s2").rename(tmp_path / "gap" / "s4")
    write_tone(tmp_path / "twins" / "mix" / "x.flac")
    write_tone(tmp_path / "twins" / "s1" / "x.flac")
    write_tone(tmp_path / "twins" / "s2" / "x.flac")
    sf.write(tmp_path / "click" / "mix" / "x.wav", np.ones(1), 8000)
    (tmp_path / "missing" / "s2" / "x.wav").unlink()
    (tmp_path / "broken" / "mix" / "x.wav").write_text("no audio here")
    for root, options, message in (
        ("nowhere", {}, "no folder"),
        ("alone", {}, "holds 1 folders with wav"),
        ("LibriSpeech", {}, "holds dev-clean, which is no speaker"),
        ("misnamed", {}, "holds s1, which is no speaker"),
        ("good", dict(n_speakers=3), "2 speakers a mixture, not 3"),
        ("good", dict(sample_rate=16000), "x.wav is at 8000 Hz, the model works at 16000"),
        ("good", dict(noise=SPEECH), "a fixed set: --noise and --snr don't apply"),
        ("good", dict(mix_folder="mix_both"), "has no folder mix_both"),
        ("rate", {}, "s2/x.wav is at 16000 Hz"),
        ("length", {}, "s2/x.wav has 16000 samples, its mixture 24000"),
        ("missing", {}, "s2/x.wav is missing"),
        ("gap", {}, "has s1, s4: number its folders"),
        ("twins", {}, "has two mixtures x: rename one"),
        ("click", {}, "x.wav lasts 0.000 s: give mixtures of 0.1 s or more"),
        ("good", dict(seconds=1.0, speeds=(0, 100)), "percentages from 25 to 400"),
        ("broken", {}, "1 of 1 recordings in .*mix can't be read"),
        (SPEECH, dict(mix_folder="mix"), "a folder of speakers: --mix_folder doesn't apply"),
        (SPEECH, dict(noise=tmp_path / "missing" / "s2"), "holds no wav"),
        (SPEECH, dict(noise=SPEECH, snr=(3, -6)), "from low to high"),
        (SPEECH, dict(snr=(0, 5)), "needs --noise"),
        (SPEECH, dict(speeds=(10,)), "percentages from 25 to 400"),
        (SPEECH, dict(n_speakers=6), "2 to 5 speakers, not 6"),
        (SPEECH, dict(n_speakers=1), "2 to 5 speakers, not 1"),
    ):
        with refused(message):
            open_mixtures(tmp_path / root, **{"sample_rate": 8000, **options})[0]


def test_what_is_no_recording_is_passed_over_or_named(tmp_path, capsys):
    for k in range(20):
        write_tone(tmp_path / "ab"[k % 2] / f"{k}.wav")
    for path in (".hidden.wav", ".trash/x.wav", "folder.wav/inside.wav"):
        write_tone(tmp_path / "a" / path)
    os.mkfifo(tmp_path / "a" / "pipe.wav")  # whoever opens it waits for ever
    (tmp_path / "a" / "link.wav").symlink_to("nowhere.wav")
    files = SpeakerMixtures(tmp_path, 8000).speakers["a"]
    assert {path.name for path in files} == {*(f"{k}.wav" for k in range(0, 20, 2)), "inside.wav"}
    told = capsys.readouterr().err
    assert f"passed over: {tmp_path / 'a' / 'link.wav'} (" in told
    assert told.count("passed over") == 1
    (tmp_path / "a" / "text.wav").write_text("no audio here")
    sf.write(tmp_path / "a" / "empty.wav", np.zeros(0), 8000)
    with refused("3 of 24 recordings in .* can't be read, .*empty.wav the first"):
        SpeakerMixtures(tmp_path, 8000)


def test_a_recording_that_is_not_whole_and_finite_is_refused(tmp_path):
    tone = 0.1 * np.sin(np.arange(8000))
    sf.write(tmp_path / "truncated.flac", tone, 8000)
    whole = (tmp_path / "truncated.flac").read_bytes()
    (tmp_path / "truncated.flac").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.wav").write_text("no audio here")
    sf.write(tmp_path / "no_samples.wav", tone[:0], 8000)
    for name, value in (("nan.wav", np.nan), ("inf.wav", np.inf)):
        tone[100] = value
        sf.write(tmp_path / name, tone, 8000, subtype="FLOAT")
    for path in (*tmp_path.iterdir(), tmp_path / "missing.wav"):
        with refused(f"{path.name} .*: (check|replace) or remove it"):
            read_audio(path)


class Gaps(dict):
    """Mixtures by (epoch, index), of which some can't be made."""

    def __missing__(self, key):
        raise DataError(f"{key} is broken")


def test_in_training_the_next_mixture_takes_the_place_of_one_that_cannot_be_made():
    mixtures = Replaced(Gaps({(0, 0): {"name": "first"}, (0, 1): {"name": "second"}, (1, 9): {}}))
    item = mixtures[0, 2]  # the last of three
    assert (item["name"], item["broken"]) == ("first", "(0, 2) is broken")
    assert 0 <= item["position"] < 1
    assert item == mixtures[0, 2]
    assert mixtures[0, 1]["broken"] == ""
    with refused("100 mixtures in a row can't be made: .* is broken"):
        mixtures[2, 0]


# Recipes of data ----------------------------------------------------------------------------------


def p56_level(amplitude, on, pause):
    """Level in dB and activity by ITU-T P.56 of a sine of `on` s, then silence of `pause` s.

    From the closed form of its envelope, two averages of 30 ms of a rectified sine.
    """
    level = 10 * np.log10(amplitude**2 / 2)
    for _ in range(20):  # the level depends on the active time, and that on the level
        share = 10 ** ((level - 15.9) / 20) / (2 * amplitude / np.pi)
        rise = 0.03 * brentq(lambda u: 1 - (1 + u) * np.exp(-u) - share, 0, 50)
        fall = 0.03 * brentq(lambda u: (1 + u) * np.exp(-u) - share, 0, 50)
        active = on - rise + min(fall + 0.2, pause)
        level = 10 * np.log10(amplitude**2 / 2 * on / active)
    return level, active / (on + pause)


@pytest.mark.parametrize("rate", [8000, 16000])
@pytest.mark.parametrize("amplitude, on, pause", [(0.3, 2, 1), (0.001, 0.5, 0.6), (20, 1, 4)])
def test_active_speech_level_is_that_of_p56(rate, amplitude, on, pause):
    time = np.arange(round((on + pause) * rate)) / rate
    audio = np.tile(amplitude * np.sin(2 * np.pi * 997 * time) * (time < on), 6)
    level, activity = active_speech_level(audio, rate)
    expected_level, expected_activity = p56_level(amplitude, on, pause)
    assert level == pytest.approx(expected_level, abs=0.02)
    assert activity == pytest.approx(expected_activity, abs=0.002)
    assert level > level_db(audio) + 0.5  # the plain mean power wouldn't do
    assert active_speech_level(0 * audio, rate) == (-math.inf, 0.0)
    assert all(np.isfinite(active_speech_level(np.eye(1, rate)[0], rate)))  # a click


def shorten(samples):
    """A Shorten 2 stream (Robinson, CUED/F-INFENG/TR.156) of blocks of 256 without prediction."""

    def uvar(value, k):
        low_bits = format(value % 2**k, f"0{k}b") if k else ""
        return "0" * (value >> k) + "1" + low_bits

    def ulong(value):
        return uvar(value.bit_length(), 2) + uvar(value, value.bit_length())

    bits = "".join(ulong(value) for value in (5, 1, 256, 0, 0, 0))  # 16 bits, low byte first, mono
    for block in samples.reshape(-1, 256).tolist():
        bits += uvar(0, 2) + uvar(11, 3)
        bits += "".join(uvar(2 * s if s >= 0 else -2 * s - 1, 12) for s in block)
    bits += uvar(4, 2)
    bits += "0" * (-len(bits) % 8)
    return b"ajkg\2" + int(bits, 2).to_bytes(len(bits) // 8, "big")


def write_sphere(path, audio):
    """As WSJ0 ships, at 16 kHz."""
    samples = np.round(audio * 32767).astype(np.int16)
    head = (
        f"NIST_1A\n   1024\nsample_count -i {len(samples)}\nsample_rate -i 16000\n"
        "channel_count -i 1\nsample_n_bytes -i 2\nsample_byte_format -s2 01\n"
        "sample_coding -s26 pcm,embedded-shorten-v2.00\nend_head\n"
    )
    path.write_bytes(head.encode().ljust(1024) + shorten(samples))


# Utterances of WSJ0: a tone's pitch, its amplitude, its seconds, and those of silence after it.
TONES = {
    "01aa010b": (440, 0.5, 2.0, 0.0),
    "209a010p": (700, 0.05, 1.0, 1.5),
    "053o020f": (440, -0.2, 2.5, 0.5),
}


@pytest.fixture
def wsj0(tmp_path):
    """Three tones as WSJ0 may lie on a disk, the first compressed, and louder its hum of 50 Hz."""
    folder = tmp_path / "disc" / "wsj0" / "si_tr_s"
    for name, (hertz, amplitude, on, pause) in TONES.items():
        time = np.arange(round((on + pause) * 16000)) / 16000
        audio = 0.8 * amplitude * np.sin(2 * np.pi * hertz * time) * (time < on)
        (folder / name[:3]).mkdir(parents=True)
        if name == "01aa010b":
            hum = 0.56 * np.sin(2 * np.pi * 50 * time)
            write_sphere(folder / "01a" / "01aa010b.WV1", audio + hum)
        else:
            sf.write(folder / name[:3] / f"{name}.wav", audio, 16000)
    one, two, three = (f"wsj0/si_tr_s/{name[:3]}/{name}.wav" for name in TONES)
    (tmp_path / "lists").mkdir()
    lines = f"{one} 0.97482 {two} -0.97482\n{three} 0.0597142 {one} -0.0597142\n"
    (tmp_path / "lists" / "mix_2_spk_tr.txt").write_text(lines)
    (tmp_path / "lists" / "mix_3_spk_tt.txt").write_text(f"{one} 2.5 {two} 0 {three} -2.5\n")
    return tmp_path


def test_wsj0_mixtures_follow_the_published_recipe(wsj0):
    make_wsj0_mix(wsj0 / "disc", wsj0 / "lists", wsj0 / "out", (8000, 16000), ("min", "max"))
    # The published names show five digits of a level.
    two = ["01aa010b_0.97482_209a010p_-0.97482", "053o020f_0.059714_01aa010b_-0.059714"]
    three = ["01aa010b_2.5_209a010p_0_053o020f_-2.5"]
    for rate, mode in itertools.product((8000, 16000), (min, max)):
        for n, split, names in ((2, "tr", two), (3, "tt", three)):
            folder = f"{n}speakers/wav{rate // 1000}k/{mode.__name__}/{split}"
            fixed = FixedMixtures(wsj0 / "out" / folder, rate, n)
            assert [item["name"] for item in fixed] == names
            for item in fixed:
                check_wsj0_mixture(item, rate, mode)
    shutil.rmtree(wsj0 / "disc" / "wsj0" / "si_tr_s" / "209")
    with refused("209a010p.wav is missing below .*, and 1 of 3 utterances"):
        make_wsj0_mix(wsj0 / "disc", wsj0 / "lists", wsj0 / "more")
    assert not (wsj0 / "more").exists()


def check_wsj0_mixture(item, rate, mode):
    """mode: min, cut to the shortest of its utterances, or max."""
    parts = item["name"].split("_")
    tones = [TONES[name] for name in parts[::2]]
    assert len(item["mixture"]) == mode(on + pause for _, _, on, pause in tones) * rate
    assert np.abs(item["sources"].sum(0) - item["mixture"]).max() <= 2 / 32768
    loudest = max(np.abs(item["sources"]).max(), np.abs(item["mixture"]).max())
    assert loudest == round(0.9 * 32768) / 32768
    levels = []
    for source, (hertz, _, on, pause) in zip(item["sources"], tones):
        wave = np.exp(-2j * np.pi * hertz * np.arange(rate) / rate)
        amplitude = 2 * np.abs(np.mean(source[:rate] * wave))  # its hum has no part in this
        levels.append(p56_level(amplitude, on, pause)[0])
    wanted = [float(level) for level in parts[1::2]]
    assert np.diff(levels) == pytest.approx(np.diff(wanted), abs=0.1)


def test_wsj0_as_it_ships_becomes_a_folder_of_speakers(wsj0):
    disc = wsj0 / "disc" / "wsj0"
    shutil.copytree(disc / "si_tr_s" / "209", disc / "si_et_05" / "440")  # a test speaker
    make_speaker_folders(wsj0 / "disc", wsj0 / "speakers")
    speakers = list_speakers(wsj0 / "speakers", Recordings())
    names = {speaker: [path.name for path in files] for speaker, files in speakers.items()}
    assert names == {name[:3]: [f"{name}.flac"] for name in TONES}
    audio, rate = read_audio(speakers["209"][0])
    original, _ = read_audio(wsj0 / "disc" / "wsj0" / "si_tr_s" / "209" / "209a010p.wav")
    assert rate == 16000
    assert np.array_equal(audio, original)


def test_librispeech_speakers_set_apart_are_never_trained_on(tmp_path):
    splits = dict(train={"19", "26"}, valid=set(librispeech.VALID), test=set(librispeech.TEST))
    for speaker in set().union(*splits.values()):
        path = tmp_path / "in" / speaker / "1" / f"{speaker}-1-0000.flac"
        write_tone(path, rate=16000, seconds=0.1)
    counts = librispeech.build(tmp_path / "in", tmp_path / "out")
    assert counts == {"train": 2, "valid": 20, "test": 20}
    for split, speakers in splits.items():
        assert {path.name for path in (tmp_path / "out" / split).iterdir()} == speakers
    shutil.rmtree(tmp_path / "in" / "254")
    with refused("lacks 1 of the 40 speakers set apart, 254"):
        librispeech.build(tmp_path / "in", tmp_path / "again")


def test_common_voice_becomes_a_folder_of_speakers_without_its_noisy_clips(tmp_path, capsys):
    corpus = tmp_path / "corpus" / "ta"
    (corpus / "clips").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rate = 32000
    rows = ["path\tclient_id"]
    for name, speaker, floor, seconds in (
        ("a1", "a" * 128, 1e-4, 2),
        ("a2", "a" * 128, 1e-4, 2),
        ("a3", "a" * 128, 1e-4, 2),  # beyond the seconds asked for
        ("b1", "b" * 128, 0.2, 2),  # noisy, 17 dB below 4 kHz
        ("b2", "b" * 128, 1e-4, 2),
        ("c1", "c" * 128, 0.2, 2),
        ("d1", "d" * 128, 1e-4, 0.2),  # short
    ):
        time = np.arange(round(rate * seconds)) / rate
        voice = np.sin(2 * np.pi * 300 * time) * (time % 0.5 < 0.4)
        voice[rate:] *= time[rate:] < 1.5  # half a second of silence at the end
        noise = rng.normal(0, floor, len(time))
        sf.write(corpus / "clips" / f"{name}.mp3", 0.5 * (voice + noise), rate)
        rows.append(f"{name}.mp3\t{speaker}")
    (corpus / "validated.tsv").write_text("\n".join(rows))
    recipe = import_module("recipes.common_voice")
    assert recipe.build([corpus], tmp_path / "out", n_speakers=9, seconds=2.5) == 2
    speakers = list_speakers(tmp_path / "out", Recordings())
    names = {speaker: [path.name for path in files] for speaker, files in speakers.items()}
    assert names == {"ta_" + "a" * 12: ["a1.flac", "a2.flac"], "ta_" + "b" * 12: ["b2.flac"]}
    audio, rate = read_audio(speakers["ta_" + "b" * 12][0])
    assert rate == 8000 and len(audio) / rate == pytest.approx(1.45, abs=0.1)
    (corpus / "clips" / "a1.mp3").unlink()
    (corpus / "clips" / "a2.mp3").write_bytes(b"")
    assert recipe.build([corpus], tmp_path / "rest", n_speakers=9, seconds=2.5) == 2
    assert [path.name for path in (tmp_path / "rest").glob("ta_a*/*")] == ["a3.flac"]
    said = capsys.readouterr().err
    assert re.search("passed over: can't read .*a1.mp3 .*no such file", said) and "a2.mp3" in said
    (corpus / "validated.tsv").write_text("client_id\tpath\naaaa")
    with refused("no clip of these corpora"):
        recipe.build([corpus], tmp_path / "again", n_speakers=9, seconds=2.5)
    assert not (tmp_path / "again").exists()
    with refused("no file .*validated.tsv"):
        recipe.build([tmp_path], tmp_path / "again", n_speakers=9, seconds=2.5)


def test_debian_voices_of_one_kind_never_come_in_two_splits():
    testing = {voice.split("_")[1] for voice in VOICES if voice.startswith("ktuberling")}
    readers = {voice.split("_")[1] for voice in MORE_VOICES if voice.startswith("klettres")}
    assert (len(testing), len(readers)) == (13, 9)
    assert not testing & readers  # both are read by KDE's people
    assert not VOICES.keys() & MORE_VOICES.keys()
    assert VALID_VOICES < VOICES.keys()


TALKERS = tempfile.TemporaryDirectory()
SHORT = dict(**TINY, seconds=0.5, valid_size=2, workers=0, epoch_size=8, batch_size=4, epochs=2)
SHORT |= dict(data=TALKERS.name, valid=TALKERS.name)


@pytest.fixture(scope="session", autouse=True)
def voices():
    """Four seconds each of three bundled voices, quick to read."""
    for voice in ("carlo", "june", "allison"):
        audio, rate = read_audio(SPEECH / voice / "01.ogg", 8000, 32000)
        Path(TALKERS.name, voice).mkdir()
        sf.write(Path(TALKERS.name, voice, "a.wav"), audio, rate)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test runs in an empty folder, so that nothing depends on where a program is called."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a run of four updates."""
    out = tmp_path_factory.mktemp("trained") / "run"
    begin(out)
    return out


@pytest.fixture
def call(monkeypatch, capsys):
    """call("evaluate", flags ...) runs a program's main here, and returns what it printed."""

    def run_main(name, *line) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, line)])
        capsys.readouterr()
        import_module(name).main()
        return "".join(capsys.readouterr())

    return run_main


@pytest.fixture
def mistake(call, capsys):
    """mistake("evaluate", flags ...) is the one line in which that program ends."""

    def run_main(name, *line) -> str:
        with pytest.raises((UserError, SystemExit)) as caught:
            call(name, *line)
        message = str(caught.value)
        if isinstance(caught.value, SystemExit):
            assert caught.value.code == 2
            message = capsys.readouterr().err.strip()
        assert "\n" not in message, message
        return message

    return run_main


def words(**settings) -> list[str]:
    """Settings on a command line; True stands for a flag without a value, a list for several."""
    line = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        line += [f"--{name}", *(str(word) for word in values if word is not True)]
    return line


def flags(**changes) -> list[str]:
    """Of a short run."""
    return words(**{**SHORT, **changes})


def begin(out, **changes):
    train.train(*train.read_flags(flags(out=out, **changes)))


def go_on(out, **changes):
    train.train(*train.read_flags(words(resume=True, out=out, **changes)))


def table(folder, name="steps.csv") -> list[dict]:
    """The rows of a log, without what the clock says."""
    with open(Path(folder, name), newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def losses_of(folder) -> list[float]:
    return [float(row["loss"]) for row in table(folder)]


def saved(folder, name="last.pt") -> dict:
    return torch.load(Path(folder, name), weights_only=True)


def same_weights(one, other, name="last.pt") -> bool:
    one, other = (saved(folder, name)["model"] for folder in (one, other))
    return all(torch.equal(one[key], other[key]) for key in one)


def same_run(one, other) -> bool:
    """Whether two runs ended in the same weights, the best and the last, and the same logs."""
    weights = [same_weights(one, other, name) for name in ("best.pt", "last.pt")]
    return all(weights + [table(one, n) == table(other, n) for n in ("steps.csv", "log.csv")])


def write_set(folder, mixtures: dict, rate=8000):
    """A fixed set of {name: sources [2, T]}."""
    for name, sources in mixtures.items():
        for part, wav in zip(("mix", "s1", "s2"), (sum(sources), *sources)):
            Path(folder, part).mkdir(parents=True, exist_ok=True)
            sf.write(Path(folder, part, f"{name}.wav"), wav, rate, "FLOAT")


def break_off(path):
    path.write_bytes(path.read_bytes()[:1000])  # its header is whole


def their_si_sdr(estimate, source) -> float:
    """torchmetrics'."""
    pair = torch.as_tensor(estimate), torch.as_tensor(source)
    return float(scale_invariant_signal_distortion_ratio(*pair, zero_mean=True))


# Training -----------------------------------------------------------------------------------------


def stopping(function, at: int):
    """The function, whose call of that number ends like Ctrl-C once it has done its work."""
    calls = itertools.count(1)

    def stops(*args, **kwargs):
        answer = function(*args, **kwargs)
        if next(calls) == at:
            raise KeyboardInterrupt
        return answer

    return stops


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    begin(out, batch_size=2, dropout=0.2)
    return out


@pytest.mark.parametrize(
    "place, at", [("add_row", 3), ("add_row", 7), ("validate", 2), ("save_best", 1)]
)
def test_a_resumed_run_repeats_the_unbroken_one(unbroken, monkeypatch, place, at):
    """To the last bit, wherever it stopped, and however many processes make its mixtures."""
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train, place, stopping(getattr(train, place), at))
        begin("run", batch_size=2, dropout=0.2, save_every=2)
    go_on("run", workers=2)
    assert len(table(unbroken)) == 8 and same_run(unbroken, "run")


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
def test_a_run_that_ended_early_goes_on_as_if_it_had_not(schedule, monkeypatch):
    monkeypatch.setattr(train, "validate", lambda *_: 5.0)  # no gain
    run = dict(schedule=schedule, warmup=4, plateau_start=0, patience=0, batch_size=2, epochs=3)
    begin("whole", **run)
    begin("part", **run, max_steps=6)
    with refused("ended after 6 updates: raise --epochs or --max_steps"):
        go_on("part")
    go_on("part", max_steps=100)
    assert [row["step"] for row in table("part", "log.csv")] == ["4", "6", "8", "12"]
    assert table("whole") == table("part")
    # Up in four updates, down along a cosine to a hundredth; or halved where nothing was gained.
    expected = [1e-3] * 8 + [5e-4] * 4
    if schedule == "cosine":
        k = np.arange(12)
        fall = 0.01 + 0.99 * (1 + np.cos(np.pi * k / 12)) / 2
        expected = 1e-3 * np.minimum((k + 1) / 4, 1) * fall
    assert [float(row["lr"]) for row in table("whole")] == pytest.approx(list(expected))


def test_a_resumed_run_keeps_its_settings_but_those_that_may_change():
    begin("run", loss="si_sdr", lr=3e-4, epochs=1)
    for name, value in dict(lr=1e-3, loss="embedding", d_model=32, speeds=[100]).items():
        with refused(f"--{name} was .* in this run: .* --init"):
            go_on("run", **{name: value})
    go_on("run", epochs=2, save_every=7, lr=3e-4)
    for kept in (saved("run", "best.pt")["settings"], json.load(open("run/settings.json"))):
        assert (kept["loss"], kept["lr"], kept["d_model"]) == ("si_sdr", 3e-4, 16)
        assert (kept["epochs"], kept["save_every"]) == (2, 7)


def test_two_runs_never_write_to_one_folder():
    begin("run", epochs=1)
    Path("new").mkdir()
    for folder, again in (("run", go_on), ("new", begin)):
        with open(f"{folder}/settings.json", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # as a run that is going on does
            with refused(f"a run is going on in {folder}: choose another --out"):
                again(folder, epochs=2)
    os.remove("run/settings.json")
    with refused("holds a run: --resume it, or choose another --out"):
        begin("run")
    os.remove("run/last.pt")
    with refused("holds weights: start from them by --init"):
        begin("run")
    with refused("run/last.pt is gone: start from run/best.pt by --init"):
        go_on("run")


def test_a_run_does_not_go_on_with_fewer_mixtures(speech):
    parts = np.split(speech.numpy()[:, :16000], 4, axis=1)
    write_set("four", dict(zip("abcd", parts)))
    write_set("two", dict(zip("ab", parts)))
    begin("run", data="four", epochs=1, batch_size=1)
    with refused("an epoch has 2 updates now, it had 4: give the same --data"):
        go_on("run", data="two", epochs=2)


def test_validation_is_the_si_sdri_of_the_mixtures_without_a_silent_source(codec, speech):
    speech = speech.numpy()
    write_set("set", {"whole": speech, "silent": np.stack([speech[0], 0 * speech[0]])})
    model = Codecformer(CodecformerConfig(latent_dim=codec.latent_dim, **TINY))
    mixtures = FixedMixtures("set", 8000)
    scored = train.validate(model, codec, mixtures, (False, False), 0, 1, set())
    mixture = speech.sum(0)
    with torch.no_grad():
        estimates = separate(model.eval(), codec, torch.from_numpy(mixture)[None])[0].numpy()
    gains = []  # of the two orders
    for order in (estimates, estimates[::-1].copy()):
        of_each = [their_si_sdr(e, s) - their_si_sdr(mixture, s) for e, s in zip(order, speech)]
        gains.append(np.mean(of_each))
    assert scored == pytest.approx(max(gains), abs=1e-3)


def test_best_pt_holds_the_best_validation_of_all_also_after_resuming(monkeypatch):
    scores = iter([1.0, 3.0, 2.0, 2.5])
    monkeypatch.setattr(train, "validate", lambda *_: next(scores))
    begin("run", epochs=2)
    best = saved("run", "best.pt")["model"]
    second = saved("run")["model"]
    assert all(torch.equal(best[name], second[name].half()) for name in best)
    content = Path("run/best.pt").read_bytes()
    for epochs in (3, 4):
        go_on("run", epochs=epochs)
        assert Path("run/best.pt").read_bytes() == content


def test_a_run_starts_from_the_weights_that_init_names():
    begin("one", epochs=1)
    begin("two", init="one/best.pt", max_steps=1, lr=1e-12, seed=1)
    one, two = saved("one", "best.pt")["model"], saved("two")["model"]
    assert all(torch.allclose(one[name].float(), two[name], atol=1e-7) for name in one)


def test_the_plateaus_rate_is_halved_after_epochs_without_gain(monkeypatch):
    monkeypatch.setattr(train, "validate", lambda *_: 5.0)
    begin("run", schedule="plateau", plateau_start=3, patience=1, epochs=7)
    rates = [float(row["lr"]) for row in table("run")]
    # The third validation counts first, and is the best; the fifth is the second without gain.
    assert rates == pytest.approx([1e-3] * 10 + [5e-4] * 4)


def test_gradients_are_clipped():
    for name, more in (("start", dict(lr=1e-12)), ("clipped", dict(clip=1e-12)), ("free", {})):
        begin(name, max_steps=1, warmup=1, **more)
    start, clipped, free = (saved(name)["model"] for name in ("start", "clipped", "free"))
    assert all(torch.allclose(start[name], clipped[name], atol=1e-7) for name in start)
    assert not all(torch.allclose(start[name], free[name], atol=1e-4) for name in start)


def test_an_epoch_takes_each_mixture_once_in_an_order_of_its_own():
    def drawn(rank, first=0):
        return list(train.Batches(26, None, 2, 0, (3, 2, 4), rank, first))

    ranks = [drawn(0), drawn(1)]
    assert [len(batches) for batches in ranks] == [6, 6]
    assert drawn(1, first=1) == ranks[1][3:]  # of a run that goes on
    for epoch in (0, 1):
        batches = [batch for own in ranks for batch in own[3 * epoch : 3 * epoch + 3]]
        keys = [key for batch in batches for key in batch]
        assert len(set(keys)) == 24 and {key[0] for key in keys} == {epoch}
        assert keys != sorted(keys)
    few = [index for batch in train.Batches(26, 16, 1, 0, (1, 1, 4), 0) for _, index in batch]
    assert len(set(few)) == 16 and max(few) > 15


def test_the_rvqs_switches_reach_the_loss_the_validation_the_scores_and_the_answers(
    call, speech, scored_here
):
    write_set("set", {"a": speech.numpy()})
    sf.write("a.wav", speech.numpy().sum(0), 8000)
    seen = set()
    for before, after in itertools.product((False, True), repeat=2):
        out = f"{before}_{after}"
        rvq = dict(quantize_before=before, quantize_after=after)
        given = {name: True for name, on in rvq.items() if on}
        # At this rate the four runs have the same weights.
        run = dict(lr=1e-12, max_steps=1, valid="set", loss="si_sdr", loss_seconds=0.1)
        begin(out, **given, **run)
        call("evaluate", "--ckpt", f"{out}/best.pt", "--data", "set", "--out", f"{out}/scores")
        call("separate", "a.wav", "--ckpt", f"{out}/best.pt", "--out", out)
        rows = results_of(f"{out}/scores")["rows"]
        seen |= {
            ("loss", losses_of(out)[0]),
            ("validated", table(out, "log.csv")[0]["valid_si_sdr_i"]),
            ("scored", rows["codecformer"]["si_sdr"]["mean"]),
            ("separated", read_audio(f"{out}/a_s1.wav")[0].std()),
        }
        assert (rows["ceiling"]["si_sdr"]["mean"] < 20) == (before or after)
    assert len(seen) == 16


def test_a_resumed_log_holds_one_row_for_each_update_of_the_checkpoint():
    """However it was left: rows that are torn or come after it are left out, others kept."""
    begin("run", batch_size=2, epochs=1)
    header, first, *_, fourth = Path("run/steps.csv").read_text().splitlines()
    later = fourth.replace("4", "5", 1)
    junk = "\0\xff,,,"
    for lines, kept in (
        ([header, first, fourth, later, "1"], [first, fourth]),
        ([first, junk, fourth], [first, fourth]),  # its header is lost
        ([], []),
    ):
        folder = Path(f"{len(lines)}")
        shutil.copytree("run", folder)
        (folder / "steps.csv").write_text("\n".join(lines))
        go_on(folder, epochs=2)
        log = (folder / "steps.csv").read_text()
        assert log.splitlines()[: 1 + len(kept)] == [header, *kept] and "\0" not in log
        assert [row["step"] for row in table(folder)][len(kept) :] == ["5", "6", "7", "8"]


def test_mixed_precision_learns_what_full_precision_does():
    for precision in ("fp32", "bf16", "fp16"):
        begin(precision, precision=precision)
    assert len(set(map(tuple, map(losses_of, ("fp32", "bf16", "fp16"))))) == 3
    assert losses_of("fp32") == pytest.approx(losses_of("bf16"), abs=0.01)
    assert losses_of("fp32") == pytest.approx(losses_of("fp16"), abs=0.01)
    go_on("fp16", epochs=3)
    scaler = saved("fp16")["training"]["scaler"]  # of the gradients; its state goes on
    assert scaler["_growth_tracker"] == 6 and not saved("bf16")["training"]["scaler"]


def test_threads_are_the_cores_less_the_workers(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for workers, processes in ((0, 1), (3, 1), (1, 4), (9, 2)):
        program.choose_threads(workers, processes)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    program.choose_threads(0)
    assert asked == [12, 9, 2, 1]


def change_losses(monkeypatch, change):
    """change(k, losses [B]) -> the losses that a run sees in its k-th batch."""
    genuine, calls = train.mixture_losses, itertools.count()
    monkeypatch.setattr(train, "mixture_losses", lambda *a: change(next(calls), genuine(*a)))


def test_an_update_that_is_not_finite_is_left_out_and_a_hundred_stop_the_run(monkeypatch):
    begin("two", max_steps=2)
    with monkeypatch.context() as patched:
        change_losses(patched, lambda k, loss: loss * (math.nan if k == 2 else 1))
        begin("three", max_steps=3)
    assert same_weights("two", "three") and saved("three")["training"]["skipped"] == 1
    assert [math.isfinite(loss) for loss in losses_of("three")] == [True, True, False]
    # A loss that is finite, but whose gradient isn't, is no better.
    change_losses(monkeypatch, lambda k, loss: loss + (loss - loss.detach()).abs().sqrt())
    with refused("100 updates in a row moved nothing: lower --lr"):
        begin("never", epoch_size=400, batch_size=1, seconds=0.1, save_every=50)
    assert all(weight.isfinite().all() for weight in saved("never")["model"].values())


def test_a_mixture_beyond_the_threshold_weighs_nothing(monkeypatch):
    for name, change in (
        ("without", lambda k, loss: loss * torch.tensor([0.0, 1.0])),
        ("beyond", lambda k, loss: loss - torch.tensor([100.0, 0.0])),
        ("late", lambda k, loss: loss - 100 * (k > 1)),
    ):
        with monkeypatch.context() as patched:
            change_losses(patched, change)
            begin(name, batch_size=2, epochs=1)
    assert same_weights("without", "beyond")
    # An update of only such moves nothing, whatever Adam's momentum; a run of only such failed.
    begin("two", batch_size=2, epochs=1, max_steps=2)
    assert same_weights("two", "late")
    with refused("none of 4 updates moved anything"):
        begin("none", threshold=1000.0)


@pytest.fixture
def damaged():
    """A folder of speakers with one file of 24 that breaks off."""
    for voice in ("carlo", "june", "allison"):
        Path("damaged", voice).mkdir(parents=True)
        for k in range(8):
            audio, _ = read_audio(SPEECH / voice / "01.ogg", 8000 * k, 8000)
            sf.write(f"damaged/{voice}/{k}.flac", audio, 8000)
    break_off(Path("damaged/june/3.flac"))
    return Path("damaged").resolve()


def test_a_mixture_that_cannot_be_made_is_named_once_and_replaced(damaged, capfd):
    run = dict(data=damaged, epoch_size=48, seconds=0.1, speeds=[100])
    for workers in (0, 2):
        begin(f"{workers}", **run, workers=workers)
        stderr = capfd.readouterr().err
        assert stderr.count("passed over: ") == stderr.count("june/3.flac") == 1
    assert losses_of("0") == losses_of("2") and np.isfinite(losses_of("0")).all()
    for path in damaged.rglob("*.flac"):
        break_off(path)
    with refused("100 mixtures in a row can't be made: .*flac"):
        begin("all", **run)


def test_training_learns_to_tell_two_tones_apart():
    for speaker, base in (("low", 200), ("high", 1500)):
        for k in range(4):
            write_tone(Path("tones", speaker, f"{k}.wav"), base * (1 + 0.1 * k))
    run = dict(data="tones", valid="tones", epoch_size=120, batch_size=8, lr=0.003, speeds=[100])
    begin("run", **run)
    assert float(table("run", "log.csv")[-1]["valid_si_sdr_i"]) > 5


@slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPUs")
def test_the_compiled_separator_computes_the_same():
    begin("plain", epochs=1)
    begin("compiled", epochs=1, compile=True)
    assert losses_of("plain") == pytest.approx(losses_of("compiled"), abs=1e-3)
    assert saved("plain")["model"].keys() == saved("compiled")["model"].keys()


def test_another_sample_rate_works_throughout(speech):
    write_set("set", {"a": speech.numpy()}, 16000)
    run = dict(sample_rate=16000, loss="csi_sdr", loss_seconds=0.2, epochs=1, valid="set")
    begin("run", **run)
    assert np.isfinite(losses_of("run")).all()
    model, codec, _ = load_separator("run/best.pt", "cpu")
    assert (codec.sample_rate, codec.codec_rate) == (16000, 8000)
    (item,) = FixedMixtures("set", 16000)
    rows, _ = evaluate.make_rows({"codecformer": (model, False, False)}, codec, item, False)
    assert {signals.shape for signals in rows.values()} == {(2, 16000)}


# How runs end -------------------------------------------------------------------------------------


def start(name, *line, **environment):
    """A program in a process of its own, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, HERE / name, *line]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_until(condition, process):
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)


def the_error(printed: str) -> str:
    """The one line that says why a program ended; its progress bars may stand around it."""
    assert "Traceback" not in printed and "Exception" not in printed, printed
    (line,) = [line for line in re.split("[\r\n]+", printed) if line.startswith("error: ")]
    return line


def children_of(process) -> list[Path]:
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [Path("/proc", pid) for pid in listed]


def interrupt(process, number) -> str:
    """Ends a program by a signal. It finishes nothing before, and leaves no other process.

    Returns the line in which it ends.
    """
    others = children_of(process)
    process.send_signal(number)
    _, printed = process.communicate(timeout=60)
    for _ in range(100):
        time.sleep(0.02 * any(other.exists() for other in others))
    assert not any(other.exists() for other in others)
    assert process.returncode == 130
    return the_error(printed)


@pytest.mark.parametrize(
    "number, epoch_size, valid_size",
    [(signal.SIGINT, 4, 10_000), pytest.param(signal.SIGTERM, 1200, 1, marks=slow)],
)
def test_ctrl_c_ends_a_run_at_once_in_a_line_that_says_how_to_go_on(number, epoch_size, valid_size):
    """And so does SIGTERM, in training as in validation."""
    line = flags(out="run", workers=1, epoch_size=epoch_size, valid_size=valid_size)
    process = start("train.py", *line)
    wait_until(lambda: Path("run/last.pt").exists() and table("run"), process)
    expected = "error: stopped; go on with: python train.py --resume --out run"
    assert len(children_of(process)) == 1 and interrupt(process, number) == expected


@pytest.mark.parametrize("full", ["last.pt", "steps.csv"])
def test_a_full_disk_ends_in_one_line_and_leaves_the_last_checkpoint_whole(monkeypatch, full):
    names = {"last.pt": f".last.pt.{os.getpid()}.part", "steps.csv": "steps.csv"}

    def fill_disk(k, loss):
        if k == 2:
            path = Path("run", names[full])
            path.unlink(missing_ok=True)
            path.symlink_to("/dev/full")
        return loss

    change_losses(monkeypatch, fill_disk)
    with refused(f"can't write run/{full} .*: make room"):
        begin("run", batch_size=2, save_every=2)
    assert saved("run")["training"]["done"] == 2 and not list(Path("run").glob(".*"))


def test_a_killed_data_worker_is_one_line_that_says_how_to_go_on():
    process = start("train.py", *flags(out="run", workers=1, epoch_size=1200, valid_size=1))
    wait_until(lambda: Path("run/last.pt").exists() and table("run"), process)
    (worker,) = children_of(process)
    os.kill(int(worker.name), signal.SIGKILL)
    _, printed = process.communicate(timeout=60)
    message = the_error(printed)
    assert message.startswith("error: a data worker was killed")
    assert message.endswith("python train.py --resume --out run")
    assert process.returncode == 1


def test_a_program_ends_in_one_line():
    """The real one, where a data worker raised what ends it. The bundled speech is found."""
    for voice in "ab":
        write_tone(Path("voices", voice, "x.flac"))
        break_off(Path("voices", voice, "x.flac"))
    line = flags(out="run", data="voices", valid="assets/speech/valid", workers=1)
    process = start("train.py", *line)
    _, printed = process.communicate()
    assert the_error(printed).startswith("error: 100 mixtures in a row can't be made")
    assert process.returncode == 1


@pytest.mark.parametrize("encoding, target", [("ascii", None), ("utf-8", "/dev/full")])
def test_a_terminal_may_lack_letters_and_a_disk_may_lack_room(encoding, target):
    program = "from program import run_program; run_program(lambda: print('0.0 \\u00b10.1'))"
    output = open(target, "w") if target else subprocess.PIPE
    environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONIOENCODING": encoding}
    ended = subprocess.run(
        [sys.executable, "-c", program], stdout=output, stderr=subprocess.PIPE, env=environment
    )
    if target is None:
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"0.0 ?0.1\n", b"")
    else:
        assert ended.returncode == 1
        assert the_error(ended.stderr.decode()).startswith("error: can't go on printing")


@slow
def test_killed_again_and_again_a_run_ends_as_if_it_had_not_been():
    run = dict(epoch_size=40, batch_size=1, save_every=1, dropout=0.2)
    began = time.monotonic()
    begin("unbroken", **run)
    update = (time.monotonic() - began) / 80
    last = Path("killed/last.pt")
    rng, reached, torn = np.random.default_rng(0), set(), 0
    for kill in range(8):
        before = last.stat().st_mtime_ns if last.exists() else None
        line = words(resume=True, out="killed") if before else flags(out="killed", **run)
        process = start("train.py", *line)
        wait_until(lambda: last.exists() and last.stat().st_mtime_ns != before, process)
        time.sleep(rng.uniform(0, 8 * update))
        partial = Path(f"killed/.last.pt.{process.pid}.part")
        if kill % 2:
            wait_until(partial.exists, process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        torn += partial.exists()
        reached.add(saved("killed")["training"]["done"])
    go_on("killed")
    assert len(reached) >= 4 and torn >= 2 and same_run("killed", "unbroken")


@slow
def test_two_processes_compute_what_one_does(damaged):
    run = dict(data=damaged, epochs=1, epoch_size=40, lr=1e-4, loss="csi_sdr", loss_seconds=0.1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    network = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    line = flags(**run, out="two")
    ranks = [start("train.py", *line, RANK=str(rank), **network) for rank in range(2)]
    begin("one", **run, accumulate=2)
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert losses_of("one") == pytest.approx(losses_of("two"), abs=1e-3)
    one, two = (float(table(n, "log.csv")[-1]["valid_si_sdr_i"]) for n in ("one", "two"))
    assert one == pytest.approx(two, abs=0.01)
    with refused("1 process.* make 4 mixtures an update, not 8"):
        go_on("two", epochs=2)


@slow
def test_under_torchrun_one_failing_process_ends_all():
    Path("fails.py").write_text(
        f"import os, sys\nsys.path.insert(0, {str(HERE)!r})\nimport program, train\n"
        "if os.environ['RANK'] == '1':\n"
        "    def fail(*_): raise program.UserError('a mistake of rank 1')\n"
        "    train.mixture_losses = fail\n"
        "program.run_program(train.main)\n"
    )
    torchrun = "-m torch.distributed.run --nproc_per_node=2 --standalone fails.py".split()
    out = Path("run").resolve()
    command = [sys.executable, *torchrun, *flags(workers=1, out=out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 1 and "error: a mistake of rank 1" in result.stderr
    time.sleep(1)
    assert str(out) not in subprocess.run(["ps", "-ef"], capture_output=True, text=True).stdout


# Settings and checkpoints -------------------------------------------------------------------------


class Mean(nn.Module):
    """The smallest separator on waveforms: every speaker gets a share of the mixture."""

    on_latents = False

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.share = nn.Parameter(torch.full((config.n_speakers, 1), 0.3))

    def forward(self, mixture):
        return mixture[:, None] * self.share


@dataclass(frozen=True, kw_only=True)
class MeanConfig(SeparatorConfig):
    n_layers: int = 1
    dropout: float = 0.0
    loud: bool = True


class Frames(nn.Module):
    """The smallest codec: a latent is 20 ms of samples, and nothing is rounded."""

    sample_rate, hop_length, latent_dim, n_codebooks, codebook_size = 8000, 160, 160, 1, 2

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv1d(1, 160, 160, 160, bias=False)
        self.decoder = nn.ConvTranspose1d(160, 1, 160, 160, bias=False)
        for layer in (self.encoder, self.decoder):
            layer.weight = nn.Parameter(torch.eye(160)[:, None])

    def quantize(self, latents, n_codebooks):
        return latents, torch.zeros(len(latents), n_codebooks, latents.shape[-1], dtype=int)


def load_frames():
    network = Frames()
    return network, network.state_dict()


def mean_square(codec, estimates, sources, margin=0):
    return (estimates[:, :, None] - sources[:, None]).square().mean(-1)


class Clicks:
    """A dataset of a folder's own kind."""

    found, n_speakers = "clicks", 2

    def __init__(self, root, sample_rate, n_speakers, **settings):
        self.rate = sample_rate

    @staticmethod
    def fits(root):
        return Path(root).name == "clicks"

    def __len__(self):
        return 4

    def __getitem__(self, key):
        rng = np.random.default_rng(data.epoch_and_index(key))
        sources = rng.standard_normal((2, self.rate)).astype(np.float32)
        return {"mixture": sources.sum(0), "sources": sources, "name": str(key)}


def test_a_forkers_separator_codec_loss_and_dataset_are_one_class_and_one_line(monkeypatch):
    monkeypatch.setitem(SEPARATORS, "mean", (Mean, MeanConfig))
    monkeypatch.setitem(CODECS, "frames", load_frames)
    monkeypatch.setitem(LOSSES, "mean_square", (mean_square, "waveforms"))
    monkeypatch.setattr(data, "DATASETS", [*data.DATASETS, Clicks])
    forked = runpy.run_path(str(HERE / "train.py"))  # as a program that is started with these
    Path("clicks").mkdir()
    for out, mine, more in (
        ("mean", dict(model="mean", loss="si_sdr"), ["--no-loud"]),
        ("masks", dict(codec="frames", loss="mean_square"), []),
    ):
        line = flags(data="clicks", valid="clicks", batch_size=2, out=out, **mine) + more
        forked["train"](*forked["read_flags"](line))
        assert [row["step"] for row in table(out, "log.csv")] == ["2", "4"]
    assert load_separator("mean/best.pt", "cpu")[0].config.loud is False
    assert isinstance(load_separator("masks/best.pt", "cpu")[1].network, Frames)


def test_the_baseline_is_trained_by_its_name_and_resumed():
    begin("run", model="sepformer", n_blocks=1, chunk=50, max_steps=3, batch_size=2)
    go_on("run", max_steps=4)
    model, _, _ = load_separator("run/best.pt", "cpu")
    assert isinstance(model, Sepformer) and (model.config.chunk, model.config.d_model) == (50, 16)


def test_every_setting_is_a_flag_and_help_shows_what_is_run_without_it(capsys):
    for model, defaults in (("codecformer", {"160", "both"}), ("sepformer", {"256", "250"})):
        with pytest.raises(SystemExit):
            train.read_flags(["--model", model, "--help"])
        shown = capsys.readouterr().out
        settings = [*fields(train.Settings), *fields(SEPARATORS[model][1])]
        known = {setting.name for setting in settings} - {"latent_dim"}
        assert known <= set(re.findall(r"--(\w+)", shown))
        defaults |= {"0.001", "assets/speech/train"}
        assert defaults <= set(re.findall(r"\(default:\s+(\S+)\)", shown))


def test_flags_of_a_file_are_overridden_by_those_after_it():
    Path("run.txt").write_text("# A run.\n--lr 0.5 --no-compile  # fast\n\n--speeds 90 110\n")
    given, _ = train.read_flags(["@run.txt", "--lr", "0.25", "--quantize_after"])
    assert given == dict(lr=0.25, compile=False, speeds=[90, 110], quantize_after=True)
    # Beside a file, sizes are those of the separator's own config, not of `python train.py`.
    assert train.read_flags([])[0] == train.DEFAULT_SIZES["codecformer"]


def test_mistakes_are_one_line(trained, mistake, monkeypatch):
    Path("file").touch()
    Path("self.txt").write_text("@self.txt")
    Path("quote.txt").write_text("--data 'speech")
    Path("renamed").mkdir()
    best = trained / "best.pt"
    shutil.copy(best, "renamed/last.pt")
    for line, message in [
        ("train --resume --out new", "no run to resume"),
        ("train --resume --out renamed", "holds weights alone.* --init"),
        (f"train --out {trained}", "holds a run: --resume it, or choose another --out"),
        ("train --seconds 1e9", "--seconds: 1e9 must lie in 0.1 to 600"),
        ("train --lr nan", "--lr: nan must lie in"),
        ("train --lr 1e300", "--lr: 1e300 must lie in"),
        ("train --threshold nan", "--threshold: nan must lie in"),
        ("train --seed 99999999999", "--seed: 99999999999 must lie in"),
        ("train @self.txt", "a file of flags, given by @, can't be read"),
        ("train @quote.txt", "a file of flags, given by @, can't be read"),
        ("train --max_steps 0", "--max_steps: 0 must lie in 1 to"),
        ("train --speeds 0 100", "speeds are percentages from 25 to 400"),
        ("train --snr 0", "--snr takes two numbers"),
        ("train --chunk 100", "unrecognized arguments: --chunk 100"),
        ("train --batch 4", "unrecognized arguments: --batch 4"),  # nor is a flag abbreviated
        ("train --loss_seconds 0.1 --seconds 0.1", "raise --seconds"),
        ("train --out file/run --workers 0", "can't write"),
        ("train --codec dac_7khz", "no codec dac_7khz"),
        ("train --n_heads 7", "multiple of n_heads"),
        (f"train --init {best}", "the checkpoint's --.* is .*, not .*: give it so"),
        ("train --epoch_size 4", "4 mixtures an epoch make no update"),
        ("train --model sepformer --n_layers 1 --loss embedding", "sepformer has no latents"),
        ("evaluate --ckpt none.pt", "no file none.pt"),
        ("evaluate --ckpt renamed", "renamed is a folder: give a file in it, such as best.pt"),
        (f"evaluate --codec {best}", "holds a separator, no codec"),
        ("evaluate --ckpt a b", "compared with --situations"),
        ("evaluate --n_codebooks 13", "13 codebooks asked for, bundled has 1 to 12"),
        (f"evaluate --out {trained}", "is there already"),
        (f"evaluate --ckpt {best} --out file/y", "can't write"),
        (f"separate {trained}", "holds no recordings"),
        ("recipes.mix --speech voices --out voices/set", "would become a speaker"),
        ("recipes.picture --index 99 --out x.png", "--index is 0 to 47, not 99"),
        ("recipes.picture --out x.xyz", "can't draw x.xyz .*: give a .png"),
        ("recipes.codes encode .", "[.] is no file: give recordings"),
        ("recipes.librispeech --librispeech none --out x", "no folder none"),
        ("recipes.wsj0_mix --wsj0 none --speakers --out x", "no folder none"),
        ("recipes.train_codec --data a --valid b --out x --batch_size 1", "1 must lie in 2"),
    ]:
        assert re.search(message, mistake(*line.split())), line
    assert "one of the names is empty" in mistake("separate", "")
    monkeypatch.setenv("CXX", "no-compiler")
    assert "needs a C++ compiler" in mistake("train", "--compile", "--out", "compiled")
    left = ["file", "quote.txt", "renamed", "self.txt"]
    assert sorted(path.name for path in Path(".").iterdir()) == left


def test_bad_checkpoints_are_refused_in_one_line_and_run_no_code(trained):
    good = saved(trained, "best.pt")
    other_codec = {**good["codec"], "fingerprint": "0"}
    for name, content, message in (
        ("config", {**good, "config": {**good["config"], "d_model": 32}}, "don't fit its config"),
        ("codec", {**good, "codec": other_codec}, "other weights than the bundled that"),
        (
            "separator",
            {**good, "separator": "tasnet"},
            "'tasnet', known are codecformer, sepformer",
        ),
        ("weights", {"weights": 1}, "is no checkpoint of train.py"),
        ("bomb", {**good, "settings": Bomb()}, "damaged"),
        ("pickle", pickle.dumps(Bomb()), "damaged"),
        ("cut", (trained / "best.pt").read_bytes()[:10000], "damaged"),
    ):
        if isinstance(content, bytes):
            Path(f"{name}.pt").write_bytes(content)
        else:
            torch.save(content, f"{name}.pt")
        with refused(f"(?=.*{name}.pt).*{message}"):
            load_separator(f"{name}.pt", "cpu")
    assert not Path("exploded").exists()
    save_soundstream(SoundStream(SMALL_SOUNDSTREAM), "small.pth")
    with refused("codec small.pth has other weights than the bundled that"):
        quietly(load_separator, trained / "best.pt", "cpu", "small.pth")


# Scores -------------------------------------------------------------------------------------------


@pytest.fixture
def scored_here(monkeypatch):
    """Scores in this process, and lists how many others were asked for."""
    asked = []

    def in_a_thread(n_processes, *_):
        asked.append(n_processes)
        return ThreadPoolExecutor(1)

    monkeypatch.setattr(evaluate, "ProcessPoolExecutor", in_a_thread)
    return asked


def results_of(folder) -> dict:
    return json.loads(Path(folder, "results.json").read_text())


def test_sdr_is_bss_evals():
    rng, n = np.random.default_rng(0), 8000
    white = [rng.standard_normal(n + 63), rng.standard_normal(n + 15)]
    windows = [np.hanning(64), np.hanning(16)]
    a, b = (np.convolve(noise, window, "valid")[:n] for noise, window in zip(white, windows))
    estimate = 0.8 * np.roll(a, 3) + 0.3 * b + 0.1 * rng.standard_normal(n)
    # Printed by mir_eval 0.8.2's bss_eval_sources for these signals.
    assert evaluate.score("sdr", estimate, a, 8000) == pytest.approx(15.69859854, abs=1e-3)
    assert evaluate.score("sdr", b + 0.05 * a, b, 8000) == pytest.approx(19.35666372, abs=1e-3)


@pytest.mark.parametrize("rate, mode", [(8000, "nb"), (16000, "wb")])
def test_scores_are_per_source_after_the_best_permutation(speech, rate, mode):
    """Every column against other libraries, called for one source at a time in the right order."""
    from pesq import pesq
    from pystoi import stoi

    sources = speech.numpy()
    mixture = sources.sum(0)
    sent = sources + 0.1 * sources[::-1]
    noise = 0.01 * np.random.default_rng(0).standard_normal(sources.shape)
    estimates = np.roll(sent + noise, 3, -1).astype(np.float32)
    rows = {"separator": estimates[::-1].copy(), "mixture": np.stack([mixture] * 2)}
    references = {"clean": sources, "transmitted": sent}
    columns = [*evaluate.COLUMNS, *evaluate.SITUATION_COLUMNS]
    scores = evaluate.score_mixture(rows, mixture, references, columns, rate)
    for k in range(2):
        estimate = estimates[k]
        for c, reference in (("", sources[k]), ("c", sent[k])):
            gain = their_si_sdr(estimate, reference) - their_si_sdr(mixture, reference)
            for name, value in {
                "si_sdr_i": gain,
                "pesq": pesq(rate, reference, estimate, mode),
                "stoi": stoi(reference, estimate, rate),
            }.items():
                assert scores["separator"][c + name][k] == pytest.approx(value, abs=1e-3)
        theirs = their_si_sdr(estimate, sources[k])
        assert scores["separator"]["si_sdr"][k] == pytest.approx(theirs, abs=1e-4)
    for name in ("si_sdr_i", "csi_sdr_i", "sdr_i", "csdr_i"):
        assert scores["mixture"][name] == pytest.approx([0, 0], abs=1e-4)
    summary = evaluate.summarise([{"mixture": "a", "rows": scores}] * 2, evaluate.COLUMNS)
    _, shifted, in_time = evaluate.format_table(summary, evaluate.COLUMNS).splitlines()
    assert "shifted by +3 samples" in shifted and "shifted" not in in_time


def test_a_score_that_cannot_be_had_is_left_out_and_counted(trained, speech, call, scored_here):
    """PESQ and STOI of 0.2 s, anything against silence, a signal against itself."""
    speech = speech.numpy()
    silent = np.stack([speech[0], 0 * speech[0]])
    write_set("set", {"whole": speech, "short": speech[:, :1600], "silent": silent})
    printed = call("evaluate", "--ckpt", trained / "best.pt", "--data", "set", "--out", "out")
    row = results_of("out")["rows"]["codecformer"]
    names = ("si_sdr", "csi_sdr_i", "sdr_i", "pesq", "stoi")
    counts = [row[name]["left_out"] for name in names]
    assert counts == [1, 1, 1, 2, 2] and "PESQ of Codecformer: 2" in printed
    # What is left is the mean of the others.
    lines = Path("out/scores.jsonl").read_text().splitlines()
    (whole,) = [json.loads(line)["rows"] for line in lines if '"whole"' in line]
    assert row["pesq"]["mean"] == pytest.approx(np.mean(whole["codecformer"]["pesq"]))
    columns = evaluate.COLUMNS[:1]
    scores = evaluate.score_mixture({"a": speech}, speech[0], {"clean": speech}, columns, 8000)
    summary = evaluate.summarise([{"mixture": "itself", "rows": scores}], columns)
    assert evaluate.format_table(summary, columns).split()[-1] == "-"


def test_intervals_are_of_the_mean():
    assert evaluate.mean_and_interval([1.0, 2.0, math.nan, 3.0, 4.0]) == dict(
        mean=2.5, ci95=pytest.approx(1.96 * math.sqrt(5 / 3) / 2), left_out=1
    )


def test_evaluate_writes_all_it_promises(trained, speech, monkeypatch, call, mistake, scored_here):
    # More mixtures than are scored at a time.
    parts = [speech.numpy()[:, start : start + 5000] for start in range(1000, 11001, 2500)]
    write_set("set", dict(zip("abcde", parts)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    line = ["--ckpt", trained / "best.pt", "--data", "set"]
    printed = call("evaluate", *line, "--out", "out")
    assert scored_here == [1]  # as many processes as the scheduler allots
    results = results_of("out")
    rows = results["rows"]
    assert results["n_mixtures"] == 5 and list(rows) == ["mixture", "ceiling", "codecformer"]
    for row in rows.values():
        assert row["title"] in printed
        for column in evaluate.COLUMNS:
            assert math.isfinite(row[column.name]["mean"] + row[column.name]["ci95"])
    (made_from,) = results["checkpoints"].values()
    assert made_from["separator"] == "codecformer" and made_from["settings"]["seconds"] == 0.5
    # The files on disk score what the table says.
    gains = []
    for item in FixedMixtures("set", 8000):
        for k, source in enumerate(item["sources"], 1):
            gains.append(their_si_sdr(read_audio(f"out/audio/{item['name']}_s{k}.wav")[0], source))
    assert np.mean(gains) == pytest.approx(rows["codecformer"]["si_sdr"]["mean"], abs=1e-3)
    assert len(Path("out/scores.jsonl").read_text().splitlines()) == 5
    page = Path("out/index.html").read_text()
    assert page.count("<audio") == page.count("<img") == 5 * 5 and 'src="http' not in page
    for fact in ("codec bundled, 6 kbit/s", str(trained / "best.pt"), "SI-SDRi"):
        assert fact in page and fact in printed
    # Nothing that is there is written over; without --out each run has a folder of its own.
    assert "out is there already" in mistake("evaluate", *line, "--out", "out")
    for name in ("codecformer_bundled_set", "codecformer_bundled_set_2"):
        call("evaluate", *line)
        assert results_of(Path("results") / name)["rows"] == rows


def test_each_situation_and_switch_is_what_it_says(codec, speech):
    """Against the same chain of codec calls written out."""
    mixture = speech.sum(0)[None, :8000]
    on_latents = Codecformer(CodecformerConfig(latent_dim=codec.latent_dim, **TINY)).eval()
    on_waves = Sepformer(SepformerConfig(chunk=50, n_blocks=1, **TINY)).eval()

    def coded(wav, before, after=False, masks=None):
        gain = codec.gain(wav)
        latents = codec.encode(wav * gain)
        latents = codec.quantize(latents) if before else latents
        if masks is not None:
            latents, gain = masks(latents) * latents[:, None], gain[:, None]
        latents = codec.quantize(latents) if after else latents
        return codec.decode(latents, 8000) / gain

    def separated(wav):
        gain = codec.gain(wav)
        return on_waves(wav * gain) / gain[:, None]

    results = []
    with torch.no_grad():
        for situation, before, after in evaluate.SITUATIONS:
            heard = coded(mixture, before)
            answer = separated(heard)
            expected = {
                ("clean", on_latents): coded(mixture, False, masks=on_latents),
                ("clean", on_waves): separated(mixture),
                ("transmitted", on_latents): coded(heard, False, after, on_latents),
                ("transmitted", on_waves): coded(answer, True) if after else answer,
                ("latents", on_latents): coded(mixture, before, after, on_latents),
                ("latents", on_waves): coded(answer, after),
            }
            for model in (on_latents, on_waves):
                wav = evaluate.separate_in(situation, model, codec, mixture, before, after)
                error = (wav - expected[situation, model]).norm() / wav.norm()
                assert error < 1e-3, (situation, before, after, type(model))
                results.append(wav)
    # Each differs from all others, but for what comes to the same: a separator on latents hears the
    # clean mixture in its latents, one on waveforms answers in quantised latents in both places.
    pairs = itertools.combinations(results, 2)
    assert sum((one - other).norm() < 0.01 * one.norm() for one, other in pairs) == 2


def test_one_command_prints_the_papers_table(trained, speech, call, scored_here):
    begin("sepformer", model="sepformer", n_blocks=1, chunk=50, max_steps=1)
    write_set("set", {"a": speech.numpy()[:, 4000:12000]})
    line = ["--data", "set", "--ckpt", "sepformer/best.pt"]
    more = [trained / "best.pt", "--situations", "--n_codebooks", 2]
    printed = call("evaluate", *line, *more, "--out", "all").splitlines()
    rows = results_of("all")["rows"]
    assert results_of("all")["codec"]["bitrate"] == 1000  # of 12 codebooks at 6 kbit/s
    assert len(rows) == 4 + 2 * len(evaluate.SITUATIONS)
    for values in rows.values():
        (row,) = [row for row in printed if row.startswith(values["title"] + " ")]
        cells = row[len(values["title"]) :].split()
        for column, cell in zip(evaluate.SITUATION_COLUMNS, cells):
            mean = values[column.name]["mean"]
            assert cell == "-" if mean is None else float(cell) == pytest.approx(mean, abs=0.051)
        assert ("shifted" in row) == (abs(values["lag"]["median_samples"]) >= 1)
    # Against what was transmitted, a transmitted source is itself; against the clean one it is not.
    assert rows["ceiling/transmitted"]["csi_sdr_i"]["mean"] is None
    coded, unquantised = rows["ceiling/transmitted"], rows["ceiling"]
    assert unquantised["si_sdr_i"]["mean"] > coded["si_sdr_i"]["mean"] + 10
    # A separator on waveforms stands behind any codec.
    call("evaluate", *line, "--codec", "bundled", "--out", "one")
    assert results_of("one")["codec"]["name"] == "bundled"


@pytest.mark.parametrize(
    "name, results, least",
    [
        ("separator", "results", 2),
        ("separator_lyra", "lyra_results", 1),
    ],
)
def test_bundled_weights_separate_speakers_never_trained_on(offline, name, results, least):
    """On every fourth mixture as many decibels as the README's table says, within its interval."""
    stated = json.loads((ASSETS / "results" / f"{results}.json").read_text())
    stated = stated["rows"]["codecformer"]["si_sdr_i"]
    model, codec, _ = load_separator(ASSETS / f"{name}.pt", "cpu")
    mixtures = FixedMixtures(ASSETS / "test_mixtures", codec.sample_rate)
    gains = []
    for index in range(0, len(mixtures), 4):
        item = mixtures[index]
        with torch.no_grad():
            estimates = separate(model, codec, torch.from_numpy(item["mixture"])[None])[0]
        ordered = evaluate.in_order(estimates.numpy(), item["sources"])
        for estimate, source in zip(ordered, item["sources"]):
            gains.append(their_si_sdr(estimate, source) - their_si_sdr(item["mixture"], source))
    assert np.mean(gains) == pytest.approx(stated["mean"], abs=2 * stated["ci95"])
    assert np.mean(gains) > least


@slow
def test_an_interrupted_evaluation_leaves_no_process_behind(trained):
    process = start("evaluate.py", "--ckpt", trained / "best.pt", "--out", "out")
    wait_until(lambda: list(Path().glob(".out-*/out/audio/*")), process)
    assert len(children_of(process)) > 1
    assert interrupt(process, signal.SIGINT) == "error: stopped; what was finished is kept"
    assert not list(Path().glob(".out*"))


# Recordings ---------------------------------------------------------------------------------------


class Bands(nn.Module):
    """Gives each speaker a band of an exact codec's latents, in another order at each call."""

    on_latents = True

    def __init__(self, n_speakers=2):
        super().__init__()
        self.config = CodecformerConfig(n_speakers=n_speakers)
        self.generator = torch.Generator().manual_seed(0)
        self.orders = []

    def forward(self, latents):
        n_speakers = self.config.n_speakers
        self.orders.append(torch.randperm(n_speakers, generator=self.generator))
        band = torch.arange(160).repeat(2) * n_speakers // 160  # of cosines and sines, to 4 kHz
        masks = (band == torch.arange(n_speakers)[:, None])[self.orders[-1]].float()
        return masks[None, :, :, None].expand(len(latents), -1, -1, latents.shape[-1])


def talkers(n_speakers, seconds, rate):
    """Known sources [S, T]: a chirping tone in each one's band, at times silent for seconds."""
    rng = np.random.default_rng(n_speakers)
    phase = 2 * np.pi * np.arange(round(seconds * rate)) / rate
    fade = np.hanning(rate // 4) / np.hanning(rate // 4).sum()
    width = 4000 / n_speakers
    sources = []
    for k in range(n_speakers):
        tone = np.sin((k + 0.4) * width * phase + 0.15 * width * np.sin(0.7 * phase))
        level = rng.choice([0, 0.01, 0.1, 0.3], math.ceil(seconds))
        level[[0, -2, -1]] = 0  # the codec has nothing to overlap with at either end
        sources.append(tone * np.convolve(np.repeat(level, rate)[: len(phase)], fade, "same"))
    return np.stack(sources).astype(np.float32)


def separate_wav(model, codec, path):
    """What `separate_file` writes: (estimates [S, T], rate). Nothing else may stay behind."""
    with tempfile.TemporaryDirectory() as folder:
        targets = [Path(folder) / f"s{k + 1}.wav" for k in range(model.config.n_speakers)]
        try:
            separate_program.separate_file(model, codec, Path(path), targets)
        except BaseException:
            assert not any(Path(folder).iterdir())
            raise
        assert sorted(Path(folder).iterdir()) == targets
        estimates, rates = zip(*(sf.read(target, dtype="float32") for target in targets))
        return np.stack(estimates), rates[0]


@pytest.mark.parametrize(
    "rate, channels, samples, subtype",
    [(8000, 1, 800, "PCM_16"), (44100, 2, 30001, "PCM_24"), (11025, 6, 20000, "FLOAT")],
)
def test_estimates_keep_rate_length_and_level(exact, rate, channels, samples, subtype):
    """Nor does a constant offset of half of full scale cost anything."""
    wav = 0.2 * np.sin(2 * np.pi * 300 * np.arange(samples) / rate)  # in the lower band
    for offset in (0, 0.5):
        model = Bands()
        sf.write("a.wav", np.repeat(wav[:, None], channels, 1) + offset, rate, subtype)
        estimates, out_rate = separate_wav(model, exact, "a.wav")
        assert out_rate == rate and estimates.shape == (2, samples)
        low, high = estimates[np.argsort(model.orders[0])] - offset / 2  # they add up to it
        middle = slice(samples // 4, -samples // 4)
        assert np.abs(low - wav)[middle].max() < 0.02 and np.abs(high)[middle].max() < 0.02


@pytest.mark.parametrize("n_speakers, rate, seconds", [(2, 8000, 32.77), (3, 11025, 14.3)])
def test_windows_join_to_the_whole_and_no_speaker_swaps(
    exact, monkeypatch, n_speakers, rate, seconds
):
    """Masks that depend on the frame alone show what the joints do, known sources who is who."""
    sources = talkers(n_speakers, seconds, rate)
    sf.write("a.wav", sources.sum(0), rate, "FLOAT")
    whole, _ = separate_wav(Bands(n_speakers), exact, "a.wav")
    monkeypatch.setattr(separate_program, "WINDOW", 5)
    monkeypatch.setattr(separate_program, "OVERLAP", 2)
    model = Bands(n_speakers)
    windows, _ = separate_wav(model, exact, "a.wav")
    assert len(set(map(str, model.orders))) > 1 and len(model.orders) > 4
    assert windows.shape == sources.shape
    # The first window decides the order; from there on every second of it belongs to one speaker.
    sources = sources[model.orders[0].numpy()]
    for start in range(0, sources.shape[1], rate):
        error, source = (x[:, start : start + rate] for x in (np.abs(windows - sources), sources))
        assert (error.max(1) < 0.1 * np.maximum(np.abs(source).max(1), 0.05)).all()
    assert si_sdr(torch.from_numpy(windows), torch.from_numpy(whole)).min() > 30


def write_bad_recordings() -> list[str]:
    tone = 0.1 * np.sin(np.arange(8000))
    content = {"empty.wav": b"", "text.wav": b"no audio here", "voice.m4a": bytes(1000)}
    content["voice.raw"] = bytes(8000)
    sf.write("nan.wav", np.append(tone, np.nan), 8000, "FLOAT")
    sf.write("short.wav", tone[:799], 8000)
    sf.write("whole.flac", tone, 8000)
    flac = bytearray(Path("whole.flac").read_bytes())
    content["truncated.flac"] = bytes(flac[: len(flac) // 2])
    sf.write("stereo.flac", np.stack([tone, np.roll(tone, 9)], axis=1), 8000)
    stereo = Path("stereo.flac").read_bytes()
    content["broken_stereo.flac"] = stereo[: len(stereo) // 2]
    for total in (0, 2**36 - 1):  # samples that it says it has: unknown, and far more than it has
        flac[21:26] = (int.from_bytes(flac[21:26], "big") >> 36 << 36 | total).to_bytes(5, "big")
        content[f"says_{total}.flac"] = bytes(flac)
    for name, file in content.items():
        Path(name).write_bytes(file)
    Path("circle.wav").symlink_to("circle.wav")
    long = "long" * 62 + ".wav"  # its answers' names would be too long
    write_tone(Path(long))
    return ["nan.wav", "short.wav", "missing.wav", "/dev/stdin", "circle.wav", long, *content]


def test_bad_recordings_are_named_and_the_others_are_separated(
    trained, monkeypatch, mistake, capsys
):
    monkeypatch.setattr(shutil, "which", lambda name: None)  # no ffmpeg here
    bad = write_bad_recordings()
    write_tone(Path("a.wav"))
    message = mistake("separate", *bad, "a.wav", "--ckpt", trained / "best.pt")
    assert message.startswith(f"{len(bad)} of {len(bad) + 1} recording(s) were not separated")
    errors = re.findall(r"error: (.*)", capsys.readouterr().err)
    assert len(errors) == len(bad) and all(
        Path(name).stem in line for name, line in zip(bad, errors)
    )
    assert sorted(os.listdir("separated")) == ["a_s1.wav", "a_s2.wav"]


def test_names_are_kept_apart_and_nothing_is_written_over(trained, monkeypatch, call, mistake):
    for name in ("day/a.wav", "night/a.wav", ".venv/test.wav", "m.ogg"):
        write_tone(Path("in", name), seconds=0.2)
    Path("in/m.m4a").touch()
    Path("in/notes.txt").touch()
    # ffmpeg decodes what libsndfile can't.
    Path("ffmpeg").write_text("#!/bin/sh\nfor last; do :; done\ncp in/day/a.wav $last\n")
    Path("ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{os.getcwd()}:{os.environ['PATH']}")
    model = ["--ckpt", trained / "best.pt"]
    for recordings, names in (
        (["in"], ["day/a", "m_m4a", "m_ogg", "night/a"]),
        (["in/day/a.wav", "in/night/a.wav"], ["day/a_wav", "night/a_wav"]),
    ):
        shutil.rmtree("separated", ignore_errors=True)
        call("separate", *recordings, *model)
        made = sorted(path.as_posix() for path in Path("separated").rglob("*.wav"))
        assert made == [f"separated/{name}_s{k}.wav" for name in names for k in (1, 2)]
    again = ["separate", "in/day/a.wav", "in/night/a.wav", *model]
    mine = Path("separated/day/a_wav_s1.wav")
    before, _ = read_audio(mine)
    mine.write_bytes(b"mine")
    assert "is there already: give --overwrite" in mistake(*again)
    assert mine.read_bytes() == b"mine"
    call(*again, "--overwrite")
    assert np.array_equal(read_audio(mine)[0], before)
    # A folder that holds the answers: they aren't separated again.
    shutil.rmtree("separated")
    for _ in range(2):
        call("separate", ".", *model, "--overwrite", "--out", "in/answers")
        assert not list(Path("in/answers").rglob("*_s1_s1.wav"))
    write_tone(Path("in/day/a_s1.wav"))
    assert "over an input" in mistake("separate", "in/day", *model, "--out", "in/day")


def test_what_is_lost_of_a_recording_is_said(exact, capsys):
    write_tone(Path("cut.wav"))
    Path("cut.wav").write_bytes(Path("cut.wav").read_bytes()[:24044])
    tones = [0.3 * np.sin(2 * np.pi * hertz * np.arange(8000) / 8000) for hertz in (300, 500)]
    sf.write("stereo.wav", np.stack(tones, 1), 8000)
    sf.write("same.wav", np.stack(tones[:1] * 2, 1), 8000)
    for name, note in (
        ("cut", "note: cut.wav is cut off: it holds 1.50 s, less than its header says\n"),
        ("stereo", "note: the 2 channels of stereo.wav differ, and are mixed to one first\n"),
        ("same", ""),
    ):
        separate_wav(Bands(), exact, f"{name}.wav")
        assert capsys.readouterr().err == note


@slow
def test_an_interrupted_separation_leaves_nothing_half_written(trained):
    sf.write("long.wav", np.random.default_rng(0).standard_normal(8000 * 1200) / 8, 8000)
    process = start("separate.py", "long.wav", "--ckpt", trained / "best.pt")
    # Once a window is written: at the very start, tqdm would tell of its half-made bar.
    parts = Path("separated").glob
    wait_until(lambda: any(part.stat().st_size > 1000 for part in parts(".*.part")), process)
    assert interrupt(process, signal.SIGTERM) == "error: stopped; what was finished is kept"
    assert not os.listdir("separated")


@st.composite
def wav_files(draw):
    """A WAV file of any rate, shape, kind and level, and whether it may be refused: if broken.

    The header of a broken one is overwritten here and there, or the file cut off.
    """
    broken = draw(st.booleans())
    rate = draw(st.sampled_from([1000, 1009, 8000, 44100, 192000] + broken * [1, 999, 192001]))
    seconds = draw(st.sampled_from([0.1, 0.11, 0.3] + broken * [0, 0.0999]))
    level = draw(st.sampled_from([0.5, 0, 1e-30, 1e10] + broken * [1e18, 3e38, np.nan, np.inf]))
    kind = draw(st.sampled_from(["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"]))
    shape = (math.ceil(rate * seconds), draw(st.integers(1, 8)))
    file = io.BytesIO()
    audio = level * np.random.default_rng(0).uniform(-1, 1, shape)
    sf.write(file, audio, rate, kind, format="WAV")
    wav = bytearray(file.getvalue())
    if broken:
        edits = st.tuples(st.integers(0, 60), st.integers(0, 255))
        for place, byte in draw(st.lists(edits, max_size=2)):
            wav[place % len(wav)] = byte
        wav = wav[: draw(st.sampled_from([None, None, None, 0, 11, 43, 45, 1001]))]
    return bytes(wav), broken


@given(wav_files())
@settings(max_examples=150 if os.environ.get("SLOW") else 40, derandomize=True, deadline=None)
def test_any_input_gives_finite_audio_or_one_clear_line(exact, file):
    """What libsndfile reads of a file is separated at full length, the rest refused."""
    wav, broken = file
    Path("fuzz.wav").write_bytes(wav)
    try:
        with mock.patch.object(shutil, "which", return_value=None):  # ffmpeg may read more
            estimates, rate = separate_wav(Bands(), exact, "fuzz.wav")
    except DataError as error:
        assert broken and "fuzz.wav" in str(error) and "\n" not in str(error)
    else:
        info = sf.info("fuzz.wav")
        assert estimates.shape == (2, info.frames) and rate == info.samplerate
        assert np.isfinite(estimates).all()


# The repository -----------------------------------------------------------------------------------


def own_imports(path: Path) -> set[str]:
    """The modules of this repository that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if (HERE / f"{name.replace('.', '/')}.py").exists()}


def test_no_two_files_import_each_other_and_nothing_on_the_path_imports_a_recipe():
    path = {file.stem: own_imports(file) for file in HERE.glob("*.py") if "test" not in file.stem}
    recipes = {f"recipes.{file.stem}": own_imports(file) for file in HERE.glob("recipes/*.py")}
    assert "codecformer" in path["train"] and "recipes.curves" in recipes["recipes.claims"]
    assert not [name for names in path.values() for name in names if name.startswith("recipes")]
    TopologicalSorter({**path, **recipes}).prepare()  # raises CycleError where there is a circle


def test_no_committed_file_holds_a_path_of_the_machine_it_was_made_on():
    listed = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True).stdout
    for path in filter(Path.is_file, map(HERE.joinpath, listed.splitlines())):
        # Files of tensors too: their strings stand in them as they are.
        found = re.search(rb"[\s\"'=:(]/(home|root|work|Users|mnt|tmp)/", path.read_bytes())
        assert not found, (path, found)
    assert program.portable(ASSETS / "codec.pth") == "assets/codec.pth"


@pytest.mark.parametrize("config", sorted(path.name for path in (HERE / "config").iterdir()))
def test_every_config_holds_the_papers_settings(config):
    """What the paper, its authors' scripts and, for the baseline, SpeechBrain's recipe say."""
    run, sizes = import_module("recipes.cost").read_settings([f"@{HERE}/config/{config}"])
    assert (run.lr, run.clip, run.batch_size, run.accumulate) == (1.5e-4, 5, 1, 1)
    assert (run.schedule, run.patience, run.plateau_start) == ("plateau", 2, 5)
    assert (run.threshold, run.speeds, run.sample_rate) == (-30, [95, 100, 105], 8000)
    assert (run.quantize_before, run.quantize_after) == ("rvq" in config,) * 2
    assert run.loss == ("csi_sdr" if "csi" in config else "si_sdr") and run.loss_seconds == 0
    codecs = {"lyra.txt": "lyra", "sepformer_wsj0_2mix.txt": "bundled"}
    assert run.codec == codecs.get(config, "dac_16khz")
    assert run.out == f"runs/{config.removesuffix('.txt')}"
    # An epoch is all of the set: 20,000 mixtures of WSJ0-2mix, 50,800 of Libri2Mix.
    length = (80, 50800) if "libri" in config else (200, 20000)
    assert (run.epochs, run.epoch_size) == length
    with torch.device("meta"):
        latent_dim = 64 if run.codec == "lyra" else 1024
        model = build_model(run.model, sizes, run.n_speakers, latent_dim)
    published = {"lyra.txt": 12_686_208, "sepformer_wsj0_2mix.txt": 25_679_361}
    assert count_parameters(model) == published.get(config, 17_361_408)


@pytest.mark.parametrize("config", ["wsj0_2mix", "wsj0_2mix_rvq", "wsj0_2mix_csi_sdr"])
def test_the_papers_configs_start_on_a_codec_of_the_official_format(official, config):
    """Three updates, but for tiny sizes and a crop."""
    _, weights = official
    changes = dict(**SHORT, codec=weights, loss_seconds=0.02, max_steps=3, out="run")
    line = [f"@{HERE}/config/{config}.txt", *words(**changes)]
    quietly(train.train, *train.read_flags(line))
    assert len(table("run")) == 3
    assert all(math.isfinite(loss) for loss in losses_of("run"))
    assert saved("run", "best.pt")["quantize_before"] == (config == "wsj0_2mix_rvq")


class Parsed(Exception):
    pass


def documented_commands() -> list[str]:
    """Those in ```bash blocks of the README, and in the docstrings of programs and recipes.

    What made the files in assets/ is documented there as it was run, at the revision of its time.
    """
    found = []
    text = (HERE / "README.md").read_text().replace("\\\n", " ")
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        found += block.splitlines()
    for path in (*HERE.glob("*.py"), *HERE.glob("recipes/*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        lines = re.sub(r"\\\n\s*", "", docstring).splitlines()
        found += [line.strip() for line in lines if line.startswith("    ")]
    found = [re.split(r"\s{2,}|\s#", line)[0] for line in found]  # without remarks
    return [re.sub(r"\$\(seq (\d+) (\d+)\)", r"\1 \2", line) for line in found]


def test_every_documented_command_is_understood(monkeypatch, capsys):
    """By its program's own parser."""
    genuine = program.Parser.parse_args

    def parse(self, *args):
        genuine(self, *args)
        raise Parsed

    monkeypatch.setattr(program.Parser, "parse_args", parse)
    monkeypatch.chdir(HERE)
    seen, wrong = set(), []
    for command in documented_commands():
        form = r"(?:\w+=\S+ )*(?:python|torchrun --\S+) (?:-m (recipes\.\w+)|(\w+)\.py)(?: (.*))?"
        match = re.fullmatch(form, command)
        if match and "..." not in command:
            name = match[1] or match[2]
            monkeypatch.setattr(sys, "argv", [name, *shlex.split(match[3] or "")])
            seen.add(name)
            try:
                import_module(name).main()
            except Parsed:
                pass
            except (ImportError, SystemExit):
                wrong.append((command, capsys.readouterr().err))
    assert {"train", "evaluate", "separate", "recipes.mix", "recipes.codes"} <= seen
    assert not wrong


# Recipes ------------------------------------------------------------------------------------------


def test_codecs_are_scored_by_what_they_transmit_and_how_their_latents_add(
    speech, monkeypatch, call
):
    monkeypatch.setattr(shutil, "which", lambda name: None)  # no Opus here
    monkeypatch.setitem(CODECS, "frames", load_frames)  # whose latents are samples
    write_set("set", {"x": speech.numpy()})
    call("recipes.codec_scores", "--data", "set", "--codecs", "frames", "--out", ".")
    rows = json.loads(Path("codec_scores.json").read_text())["rows"]
    reached = {row.removeprefix("frames/"): x["si_sdr"]["mean"] for row, x in rows.items()}
    a, b = speech
    mask = a**2 / (a**2 + b**2 + 1e-12)
    of_both = [their_si_sdr(mask * (a + b), a), their_si_sdr((1 - mask) * (a + b), b)]
    assert reached.pop("ideal_mask") == pytest.approx(np.mean(of_both), abs=0.05)
    assert reached.keys() == {"unquantised", "0.05", "latents_added"}  # 0.05 kbit/s
    assert min(reached.values()) > 60
    # Of a folder of speakers, one utterance each.
    signals = list(import_module("recipes.codec_scores").read_signals(SPEECH))
    assert len(signals) == 5 and all(sources is None for _, sources in signals)


def test_costs_are_counted_and_timed_as_they_are(monkeypatch):
    cost = import_module("recipes.cost")
    gmac = cost.count_macs(nn.Conv1d(3, 5, 7, bias=False), 1, 3, 106)
    assert gmac == pytest.approx(3 * 5 * 7 * 100 / 1e9)
    clock = iter([0, 1, 1, 6, 6, 8, 8, 13, 13, 22, 22, 26])  # 1, 5; 2, 5; 9, 4
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    calls = dict.fromkeys(("one", "other"), lambda: None)
    assert cost.median_seconds(calls, 3, torch.device("cpu")) == {"one": 2, "other": 5}
    for line in (*cost.STEPS.values(), *cost.CODECFORMERS.values()):
        run, sizes = cost.read_settings(line)
        with torch.device("meta"):
            build_model(run.model, sizes, run.n_speakers, 64)


def test_curves_of_runs_are_drawn(trained, call, mistake):
    call("recipes.curves", trained, "--out", "curves.png")
    assert Path("curves.png").stat().st_size > 5000
    Path("latents").mkdir()
    rows = ["step,loss,valid_si_sdr_i,lr,seconds", "2,-1,0.5,1e-3,4", "4,-2,0.7,1e-4,8", "6,-"]
    Path("latents", "log.csv").write_text("\n".join(rows))  # as if recipes.train_on_latents goes on
    call("recipes.curves", "latents", trained, "--out", "both.png")
    with mock.patch.object(Figure, "savefig", autospec=True) as saved:
        import_module("recipes.curves").draw({"a run": "latents"}, "one.png")
    losses, gains = saved.call_args[0][0].axes
    assert losses.lines[0].get_xydata().tolist() == [[2, -1], [4, -2]]
    assert gains.lines[0].get_xydata() * [3600, 1] == pytest.approx(np.array([[4, 0.5], [8, 0.7]]))
    assert [text.get_text() for text in gains.get_legend().get_texts()] == ["a run"]
    assert "no file log.csv: give folders of runs" in mistake("recipes.curves", ".")
    Path("log.csv").write_text("step,minutes,pesq\n0,0,1\n")
    assert "can't draw" in mistake("recipes.curves", ".")
    assert "can't draw" in mistake("recipes.curves", trained, "--out", "curves.xyz")


def test_voices_are_packed_into_minutes(call, mistake):
    for path in ("low/a.wav", "high/a.wav", "high/b.wav"):
        write_tone(Path("speech", path), {"l": 200, "h": 500}[path[0]], 16000, seconds=40)
    line = ["recipes.pack", "--speech", "speech", "--minutes", 1.25, "--speakers"]
    call(*line, "high", "--out", "packed")
    minutes = [read_audio(f"packed/high/0{k}.ogg")[0] for k in (0, 1)]
    assert [len(minute) for minute in minutes] == [60 * 8000, 15 * 8000]
    # The first recording, a gap of 0.2 s, and as much of the other as there is room for.
    first, gap, second = np.split(np.concatenate(minutes), [320000, 321600])
    assert gap[100:-100].std() < 0.01
    for part in (first, second):
        tone = 0.5 * np.sin(2 * np.pi * 500 * np.arange(len(part)) / 8000)
        assert their_si_sdr(part.astype(float), tone) > 20
    assert "has no voice none: choose of high, low" in mistake(*line, "none", "--out", "x")


def test_what_claims_runs_are_flags_that_train_takes():
    claims = import_module("recipes.claims")
    runs = claims.list_runs(48000, "noise")
    assert len(runs) == len(claims.BY_TIME) + len(claims.BY_MIXTURES) + len(claims.TWICE)
    for run, line in runs.items():
        settings, sizes = import_module("recipes.cost").read_settings([*map(str, line)])
        with torch.device("meta"):
            build_model(settings.model, sizes, settings.n_speakers, 64)
        assert run.startswith("time") or settings.epoch_size * settings.epochs == 48000
    chosen = claims.choose_runs(runs, ["activation/relu"])
    assert list(chosen) == ["activation/relu/0", "activation/relu/1"]
    with refused("no run is called activation/swish"):
        claims.choose_runs(runs, ["activation/swish"])


@slow
def test_claims_are_trained_scored_and_tabled_and_not_made_twice(monkeypatch, call, scored_here):
    """The real recipe with runs of few updates, its programs called in threads of this process."""
    claims = import_module("recipes.claims")
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # for main threads only
    calls = []

    def call_here(*line, log):
        calls.append(line)
        log.parent.mkdir(parents=True, exist_ok=True)
        name, *more = line[1:] if line[0] == "-m" else line
        call(name.removesuffix(".py"), *more)

    tiny = words(**TINY, seconds=0.5, batch_size=2, valid_size=1, workers=0, speeds=[100])
    sepformer = ["--model", "sepformer", "--n_blocks", "1", *tiny]
    by_time = {"time/si_sdr": [*tiny, "--loss", "si_sdr"], "time/sepformer": sepformer}
    three = {"base": [], "harder/three_speakers": ["--n_speakers", "3"]}
    changes = dict(call=call_here, N_SCORED=2, MEASURED=2, BASE=tiny, BY_TIME=by_time, TWICE=())
    for name, value in {**changes, "BY_MIXTURES": three}.items():
        monkeypatch.setattr(claims, name, value)
    valid = ASSETS / "speech" / "valid"
    folders = words(data=SPEECH, valid=valid, score=valid, noise=SPEECH, out="claims")
    line = ["recipes.claims", *folders, *words(minutes=0.02, mixtures=12)]
    call(*line)
    rows = json.loads(Path("claims/claims.json").read_text())["rows"]
    assert list(rows) == ["time/si_sdr/0", "time/sepformer/0", "base/0", "harder/three_speakers/0"]
    assert rows["base/0"]["mixtures"] == rows["harder/three_speakers/0"]["mixtures"] == 12
    for run, row in rows.items():
        scored = results_of(f"claims/scores/{run}")
        assert scored["n_speakers"] == 2 + ("three" in run)
        assert row["si_sdr_i"] == list(scored["rows"].values())[-1]["si_sdr_i"]
    assert "sepformer/latents/none" in results_of("claims/situations")["rows"]
    assert len(Path("claims/claims.md").read_text().splitlines()) == 2 + len(rows)
    assert Path("claims/claims.png").stat().st_size > 5000
    calls.clear()
    call(*line, "--only", "harder/three")
    assert not calls and json.loads(Path("claims/claims.json").read_text())["rows"] == rows


@pytest.fixture
def train_codec(monkeypatch):
    """The recipe, with a small network."""
    recipe = import_module("recipes.train_codec")
    small = dict(widths=(32, 160, 320), strides=(5, 2), n_codebooks=2, codebook_size=16)
    shape = replace(recipe.SHAPE, **small, code_dim=16, coder_rounds=1)
    monkeypatch.setattr(recipe, "SHAPE", shape)
    monkeypatch.setattr(recipe, "N_REFERENCE", 4)
    return recipe


@torch.no_grad()
def test_a_codec_starts_transparent_and_its_latents_are_narrow_bands_in_order(train_codec):
    network = train_codec.start_transparent(train_codec.SoundStream(train_codec.SHAPE))
    wav = torch.randn(2, 1, 8000) * train_codec.LEVEL
    decoded = network.decoder(network.encoder(wav))
    assert si_sdr(decoded[..., 160:-160], wav[..., 160:-160]).min() > 15
    # Band k of 160 cosines, and of 160 sines, lies around 25 (k + 0.5) Hz.
    for band in (8, 40, 100):
        tone = torch.sin(2 * math.pi * 25 * (band + 0.5) * torch.arange(8000) / 8000)
        energy = network.encoder(0.05 * tone[None, None])[0, :, 3:-3].square().sum(1)
        energy = energy.view(2, 160).sum(0)
        assert abs(int(energy.argmax()) - band) <= 1
        assert energy[band - 2 : band + 3].sum() > 0.7 * energy.sum()
    # So two signals are as far apart in latents as in waveforms; a tenth as far is 2 bels off.
    latents = network.encoder(wav)
    frames = train_codec.lapped_transform(160)[:, None]
    wav = wav / train_codec.LEVEL
    assert train_codec.distance_loss(latents, wav, frames).max() < 0.05
    assert train_codec.distance_loss(latents / 10, wav, frames).mean() > 1
    # As it is saved, latents have a standard deviation of 1, and what it computes is the same.
    scaled = train_codec.at_unit_scale(network, [wav * train_codec.LEVEL])
    latents = scaled.encoder(wav * train_codec.LEVEL)
    assert latents.std().item() == pytest.approx(1, rel=1e-3)
    assert torch.allclose(scaled.decoder(latents), decoded, atol=1e-5)


@slow
def test_a_resumed_codec_repeats_the_unbroken_one(train_codec, monkeypatch):
    # Of the broken run the third, after two steps and a checkpoint, is the fifth.
    validate = stopping(lambda *_, **__: {}, 5)
    monkeypatch.setattr(train_codec, "validate", validate)
    run = dict(data=SPEECH, valid=SPEECH, steps=4, minutes=math.inf, mixtures=0.5, sums=0.5)
    run |= dict(batch_size=2, workers=0, bf16=False, seed=0)
    train_codec.train(out=Path("whole"), resume=False, every=1e9, **run)
    with pytest.raises(KeyboardInterrupt):
        train_codec.train(out=Path("broken"), resume=False, every=0, **run)
    assert saved("broken")["step"] == 2
    train_codec.train(out=Path("broken"), resume=True, every=1e9, **run)
    whole, broken = (saved(name, "latents.pth")["state_dict"] for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


@slow
def test_the_half_that_makes_codes_learns_beside_fixed_latents(train_codec, monkeypatch):
    recipe = import_module("recipes.train_rvq")
    for name, value in dict(RVQ_STARTS=3, BATCH_SIZE=8, N_REFERENCE=32).items():
        monkeypatch.setattr(recipe, name, value)
    monkeypatch.setattr(recipe, "validate", lambda *_, **__: {})
    network = train_codec.start_transparent(SoundStream(train_codec.SHAPE))
    train_codec.save_soundstream(network, "latents.pth", half=True)
    run = dict(data=SPEECH, valid=SPEECH, minutes=0.15, every=1e9, seed=0)
    recipe.train(latents="latents.pth", trained=False, out=Path("out"), **run)
    recipe.train(latents="out/codec.pth", trained=True, out=Path("more"), **run)
    before, after = (
        saved(*path)["state_dict"] for path in ((".", "latents.pth"), ("out", "codec.pth"))
    )
    same = {name.split(".")[0] for name in before if torch.equal(before[name], after[name])}
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert same == {"encoder", "decoder"} and changed == {"analysis", "synthesis", "quantizer"}
    wav = torch.from_numpy(read_audio(SPEECH / "june" / "01.ogg", 8000, 32000)[0])[None]
    untrained, trained, more = (
        si_sdr(quietly(Codec.load, path).transmit(wav), wav)
        for path in ("latents.pth", "out/codec.pth", "more/codec.pth")
    )
    assert min(trained, more) > untrained + 5
    trained = quietly(Codec.load, "more/codec.pth")
    latents = trained.quantize(trained.encode(wav))
    again = trained.encode(trained.decode(latents, 32000))
    assert si_sdr(latents[..., 1:-1].flatten(), again[..., 1:-1].flatten()) > 10


@slow
def test_a_separator_learns_from_latents_and_a_resumed_run_repeats(codec, monkeypatch):
    recipe = import_module("recipes.train_on_latents")
    monkeypatch.setattr(recipe.Codec, "load", lambda *_: codec)
    run = dict(data=[TALKERS.name], valid=TALKERS.name, codec_name="bundled", steps=6, every=2)
    run |= dict(batch_size=2, lr=1e-3, hours=0.01, mixtures=None, init=None, seed=0)
    run |= dict(sizes={**TINY, "dropout": 0.2})
    monkeypatch.setattr(recipe, "VALID_SIZE", 2)
    recipe.train(out=Path("whole"), resume=False, **run)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(recipe, "validate", stopping(recipe.validate, 2))
        recipe.train(out=Path("broken"), resume=False, **run)
    recipe.train(out=Path("broken"), resume=True, **run)
    assert same_weights("whole", "broken")
    speech = recipe.LatentSpeech([TALKERS.name], codec, 0.01, 0, set())
    mixture, sources = speech.draw(3, 4)
    assert sources.shape == (4, 2, 320, 150) and torch.equal(sources, speech.draw(3, 4)[1])
    assert torch.equal(mixture, sources.sum(1))
    # Of the level that the codec gives to mixtures.
    items = [open_mixtures(TALKERS.name, 8000, size=8)[k] for k in range(8)]
    wav = torch.from_numpy(np.stack([item["mixture"] for item in items]))
    level = codec.encode(wav * codec.gain(wav)).std((1, 2)).mean()
    assert (mixture.std((1, 2)) / level - 1).abs().max() < 0.15
    levels = 20 * sources.std((2, 3)).log10()
    assert levels.diff().abs().max() < 5.1


def test_latents_of_mixtures_are_sums_where_latents_add_alone(exact):
    recipe = import_module("recipes.train_on_latents")
    item = open_mixtures(TALKERS.name, 8000, size=1)[0]
    recipe.check_adding(exact, item)
    rectified = Exact()
    rectified.encoder = nn.Sequential(rectified.encoder, nn.ReLU())
    with refused("don't add .* give --mixtures"):
        recipe.check_adding(quietly(Codec, rectified, 8000, "rectified"), item)


@slow
def test_latents_of_whole_mixtures_are_those_that_train_py_sees(codec):
    recipe = import_module("recipes.train_on_latents")
    speech = recipe.LatentMixtures([TALKERS.name], codec, 3, 0, set())
    assert len(speech.latents) == 3
    mixture, sources = speech.draw(3, 4)
    assert mixture.shape == (4, 320, 150) and sources.shape == (4, 2, 320, 150)
    assert torch.equal(sources, speech.draw(3, 4)[1])
    dataset = open_mixtures(TALKERS.name, 8000, seconds=6, size=3, speeds=range(80, 125))
    wav = torch.from_numpy(np.stack([dataset[k]["mixture"] for k in range(3)]))  # [3, T]
    latents = codec.encode(wav * codec.gain(wav))  # [3, D, F]
    # Each part of one of them, but for bfloat16.
    windows = latents.unfold(2, 150, 1)  # [3, D, starts, 150]
    for part in mixture:
        errors = (windows - part[:, None]).pow(2).mean((1, 3))  # [3, starts]
        assert errors.min() < 1e-3 * part.pow(2).mean()


# Codes in files -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def even_dac(tmp_path_factory):
    """One of even strides: the official decoder fails on whole files of odd ones."""
    return save_random_dac(tmp_path_factory.mktemp("even"), [2, 4, 4, 10])


@pytest.fixture
def lfilter(monkeypatch):
    """audiotools measures loudness by torchaudio's lfilter, which a CPU-only environment lacks."""
    import sys
    import types

    def lfilter(x, a, b, clamp=True):
        y = scipy.signal.lfilter(b[0].numpy(), a[0].numpy(), x.numpy(), axis=-1)
        return torch.from_numpy(y).float()

    def stack(x, a, b, clamp=True):
        parts = [
            scipy.signal.lfilter(b[k].numpy(), a[k].numpy(), x[..., k, :].numpy())
            for k in range(len(a))
        ]
        return torch.from_numpy(np.stack(parts, -2)).float()

    functional = types.ModuleType("torchaudio.functional")
    functional.lfilter = lfilter
    torchaudio = types.ModuleType("torchaudio")
    torchaudio.functional = functional
    monkeypatch.setitem(sys.modules, "torchaudio", torchaudio)
    monkeypatch.setitem(sys.modules, "torchaudio.functional", functional)
    import audiotools.core.loudness

    monkeypatch.setattr(audiotools.core.loudness, "torchaudio", torchaudio, raising=False)


def carlo(seconds: float) -> tuple[np.ndarray, int]:
    path = ASSETS / "speech" / "train" / "carlo" / "00.ogg"
    return sf.read(path, frames=round(8000 * seconds), dtype="float32")


def compressed(model, seconds: float, window: float, path):
    """The official package's own codes of bundled speech, in `path`."""
    from audiotools import AudioSignal

    wav, rate = carlo(seconds)
    model.compress(AudioSignal(wav[None, None], rate), win_duration=window).save(path)
    return path


class Ones(torch.nn.Module):
    """A separator whose masks are all ones."""

    on_latents = True

    def forward(self, latents):
        return torch.ones_like(latents)[:, None].expand(-1, 2, -1, -1)


def wrapped(path) -> Codec:
    network, _ = load_file(path)
    with pytest.warns(UserWarning, match="barely resembles"):  # random weights
        return Codec(network, 8000, "random")


def random_separator(codec: Codec) -> Codecformer:
    torch.manual_seed(1)
    config = CodecformerConfig(
        latent_dim=codec.latent_dim, d_model=16, n_layers=1, n_heads=2, d_ffn=16, dropout=0.0
    )
    return Codecformer(config).eval()


def test_codes_of_the_official_package_are_separated_and_decoded_by_it(even_dac, lfilter, tmp_path):
    model, weights = even_dac
    codec = wrapped(weights)
    separator = random_separator(codec)
    call = compressed(model, 3.0, 5.0, tmp_path / "call.dac")
    targets = [tmp_path / "s1.dac", tmp_path / "s2.dac"]
    separate_program.separate_codes(separator, codec, call, targets)

    heard = codec.from_codes(read_codes(call).codes[None])
    with torch.no_grad():
        estimates = estimate_latents(separator, codec, heard)[0]
    for target, estimate in zip(targets, codec.decode(codec.quantize(estimates), 24000)):
        decoded = model.decompress(target)
        assert decoded.audio_data.shape == (1, 1, 24000)
        assert decoded.sample_rate == 8000
        # The official decoder sets the level.
        theirs = decoded.audio_data[0, 0, :23900].double()
        ours = estimate[:23900].double()
        scale = (theirs @ ours) / (ours @ ours)
        assert (theirs - scale * ours).norm() < 2e-2 * theirs.norm()


@pytest.mark.parametrize("window", [5.0, 1.0], ids=["whole", "in chunks"])
def test_masks_of_ones_give_the_quantised_latents_of_what_came_in(
    even_dac, lfilter, tmp_path, window
):
    model, weights = even_dac
    codec = wrapped(weights)
    call = compressed(model, 3.0, window, tmp_path / "call.dac")
    targets = [tmp_path / "s1.dac", tmp_path / "s2.dac"]
    separate_program.separate_codes(Ones(), codec, call, targets)
    came = read_codes(call)
    assert came.padding == (window > 3)
    expected = codec.to_codes(codec.from_codes(came.codes[None]))[0]
    for target in targets:
        answer = read_codes(target)
        assert torch.equal(answer.codes, expected)
        assert replace(answer, codes=None) == replace(came, codes=None)  # all else as it was
        assert model.decompress(target).signal_length == 24000


def test_voices_keep_their_order_in_windows_and_chunks_of_codes(exact, monkeypatch):
    """Of a separator whose order is another in each window."""
    mixture = torch.from_numpy(talkers(2, 32, 8000)).sum(0)[None]
    codes = exact.to_codes(exact.encode(mixture * exact.gain(mixture)))[0]
    low = torch.arange(160).repeat(2) < 80  # the latents of the first voice

    def check(model, answers):  # [2, N, F]
        for order, latents in zip(model.orders[0], exact.from_codes(answers)):
            others = latents[low == bool(order)]
            assert others.square().sum() < 1e-3 * latents.square().sum()
        assert len(set(map(str, model.orders))) > 1

    monkeypatch.setattr(separate_program, "WINDOW", 5)
    monkeypatch.setattr(separate_program, "OVERLAP", 2)
    model = Bands()
    check(model, separate_program.separate_whole_codes(model, exact, codes))
    chunks = torch.cat([codes[:, start : start + 250] for start in range(0, 1351, 150)], 1)
    model = Bands()
    check(model, separate_program.separate_chunks(model, exact, chunks, 250, 150))


def test_answers_have_as_many_codebooks_as_the_call_had(codec, tmp_path):
    codec.use_codebooks(3)
    codes = codec.to_codes(codec.encode(torch.from_numpy(carlo(1.0)[0])[None]))[0]
    codec.use_codebooks(12)
    write_codes(CodeFile(codes, 8000, 8000, -25.0, 50, True), tmp_path / "call.dac")
    targets = [tmp_path / "1.dac", tmp_path / "2.dac"]
    separate_program.separate_codes(Ones(), codec, tmp_path / "call.dac", targets)
    assert read_codes(targets[0]).codes.shape == (3, 50)
    assert codec.n_codebooks == 12


def test_long_codes_are_separated_in_windows_that_agree(monkeypatch):
    """Masks that depend on one frame alone make windows and the whole the same but for rounding."""
    separator, codec, _ = load_separator(ASSETS / "separator.pt", "cpu")

    class Framewise(torch.nn.Module):
        def forward(self, latents):
            mask = torch.sigmoid(latents)
            return torch.stack([mask, 1 - mask], dim=1)

    torch.manual_seed(0)
    codes = torch.randint(1024, (codec.n_codebooks, 60 * 50))
    whole = separate_program.separate_whole_codes(Framewise(), codec, codes)
    monkeypatch.setattr(separate_program, "WINDOW", 25)
    parts = separate_program.separate_whole_codes(Framewise(), codec, codes)
    assert (parts == whole).float().mean() > 0.999


def test_decoded_codes_are_what_the_codec_transmits_at_the_recordings_level(tmp_path):
    wav, rate = carlo(3.0)
    sf.write(tmp_path / "call.wav", 0.5 * wav, rate, "FLOAT")
    call = codes_recipe.encode(tmp_path / "call.wav", "bundled", None)
    file = read_codes(call)
    assert file.codec["name"] == "bundled"
    assert file.codes.shape == (12, 150)
    with pytest.raises(UserError, match="call.wav is there already"):
        codes_recipe.decode(call, None)
    (tmp_path / "call.wav").unlink()
    decoded, _ = sf.read(codes_recipe.decode(call, None), dtype="float32")
    # What the codec itself transmits, at the recording's level.
    codec = Codec.load("bundled")
    expected = codec.transmit(torch.from_numpy(0.5 * wav)[None])[0].numpy()
    assert np.abs(decoded - expected).max() < 1e-5


def damaged_files(good: bytes) -> dict[str, bytes]:
    """Files that are no .dac, by what is wrong with them."""
    header = good[: good.index(b"\n") + 1]
    content = pickle.loads(good[len(header) :]).item()

    def holding(what: dict) -> bytes:
        return header + pickle.dumps(np.array(what))

    def changed(**metadata) -> bytes:
        return holding({**content, "metadata": {**content["metadata"], **metadata}})

    return {
        "truncated": good[: len(good) // 2],
        "empty": b"",
        "no codes": holding({**content, "codes": content["codes"][..., :0]}),
        "version": changed(dac_version="2.0.0"),
        "channels": changed(channels=2),
        "length": changed(original_length=-5),
        "level": changed(input_db=np.array([np.nan])),
        "another length": changed(original_length=10**6),
        "runs code": holding({"codes": Bomb()}),
        "text": b"RIFF, not a .dac file",
        "header": b"\x93NUMPY\x01\x00" + struct.pack("<H", 60000) + b"x",
    }


def test_bad_files_of_codes_are_one_line_each_and_the_others_are_separated(
    tmp_path, monkeypatch, capsys
):
    codec = Codec.load("bundled")
    codes = codec.to_codes(codec.encode(torch.from_numpy(carlo(1.0)[0])[None]))[0]
    about = {"name": "bundled", "fingerprint": codec.fingerprint}
    good = CodeFile(codes, 8000, 8000, -25.0, 50, True, about)
    write_codes(good, tmp_path / "good.dac")
    for name, content in damaged_files((tmp_path / "good.dac").read_bytes()).items():
        (tmp_path / f"{name}.dac").write_bytes(content)
    write_codes(replace(good, codes=codes + 1000), tmp_path / "out of range.dac")
    other = {"name": "lyra", "fingerprint": "0"}
    write_codes(replace(good, codec=other), tmp_path / "another codec.dac")
    many = codes.repeat(2, 1)
    write_codes(replace(good, codes=many), tmp_path / "too many codebooks.dac")

    out = tmp_path / "out"
    checkpoint = str(ASSETS / "separator.pt")
    words = ["separate.py", str(tmp_path), "--ckpt", checkpoint, "--out", str(out)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(UserError, match="14 of 15 recording"):
        separate_program.main()
    assert sorted(path.name for path in out.iterdir()) == ["good_s1.dac", "good_s2.dac"]
    assert not Path("exploded").exists()
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 14
    assert all(".dac" in line for line in errors)


def readme_blocks(language: str) -> list[str]:
    readme = (HERE / "README.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", readme, re.DOTALL)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder that holds what the repository does, as links, and what is written there."""
    for path in HERE.iterdir():
        if path.name in ("assets", "recipes", "config") or path.suffix == ".py":
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_examples_of_the_readme_run_as_written(checkout):
    recording, encodec = readme_blocks("python")
    exec(recording, {})
    estimate, rate = sf.read("first.wav")
    assert rate == 8000 and np.isfinite(estimate).all()
    if importlib.util.find_spec("encodec") is None:
        pytest.skip("encodec is not installed, of which the second example is")
    names = {}
    exec(encodec, names)
    assert CODECS.pop("encodec_24khz") is names["load_encodec"]
    network, _ = names["load_encodec"](pretrained=False)
    with pytest.warns(UserWarning, match="barely resembles"):  # random weights
        codec = Codec(network, 24000, "encodec")
    latents = codec.encode(torch.randn(1, 24000))
    assert codec.bitrate == 24000
    assert torch.equal(codec.from_codes(codec.to_codes(latents)), codec.quantize(latents))


def test_a_call_is_separated_as_codes_by_the_lines_of_the_readme(checkout):
    (block,) = [block for block in readme_blocks("bash") if "recipes.codes" in block]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-e", "-c", block], env=environment, check=True)
    mixture, rate = sf.read("call.flac")
    for k in (1, 2):
        voice, its_rate = sf.read(f"separated/call_s{k}.wav")
        assert (len(voice), its_rate) == (len(mixture), rate)
