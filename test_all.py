"""The project's claims, one test each, against closed forms, other libraries and published constants.

    python -m pytest -q test_all.py        a minute and a half on 2 CPU cores; with SLOW=1 the slow ones too
"""

import contextlib
import csv
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
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
from dataclasses import dataclass, replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import soundfile as sf
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from sklearn.cluster import KMeans
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import dac_wrapper
import data
import evaluate
import separate as separate_program
import soundstream
import train
from checkpoint import (
    SEPARATORS, SettingsError, build_model, load_checkpoint, load_separator, parse_args, restore_model,
)  # fmt: skip
from codecformer import (
    ACTIVATIONS, Codecformer, CodecformerConfig, SeparatorConfig, Snake, estimate_latents, separate,
    sinusoidal_positions,
)  # fmt: skip
from dac_wrapper import ASSETS, CODECS, Codec, CodecError, import_dac, load_file, measure_lag
from data import (
    DATASETS, DataError, FixedMixtures, FixedSegments, SpeakerMixtures, open_mixtures, read_audio,
    resample,
)  # fmt: skip
from losses import LOSSES, crop, keep_hard, pairwise_negative_si_sdr, pit, si_sdr
from recipes import claims, cost, debian_speech, gpu, librispeech, report, train_codec, transform_codec, wsj0_mix
from recipes.latents import write_latents
from recipes.mix import write_fixed_set
from recipes.sepformer import Sepformer, SepformerConfig
from recipes.wsj0_mix import active_speech_level
from soundstream import SoundStream, SoundStreamConfig, load_lyra, save_soundstream

HERE = Path(__file__).parent
SPEECH = ASSETS / "speech" / "train"
TINY = dict(d_model=16, n_layers=1, n_heads=2, d_ffn=32, dropout=0.0)
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="takes long: SLOW=1 runs it")
torch.set_num_threads(1)  # the models here are too small for more


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def curves(monkeypatch):
    """Pictures take most of a short run's time; a test that looks at one gives this back to train.py."""
    draw = train.draw
    monkeypatch.setattr(train, "draw", lambda *_: None)
    return draw


@pytest.fixture(scope="session")
def codec():
    return Codec.load("transform")


@pytest.fixture(scope="session")
def speech():
    """Two seconds each of two bundled voices [2, 16000]."""
    return torch.stack([torch.from_numpy(read_audio(SPEECH / v / "01.ogg", 8000, 16000)[0]) for v in ("carlo", "june")])


@pytest.fixture(scope="session")
def official_file(tmp_path_factory):
    """A weights file as the dac package writes it: the 16 kHz model's strides, random weights, few channels."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = import_dac().DAC(
            encoder_dim=4, encoder_rates=[2, 4, 5, 8], latent_dim=24, decoder_dim=32, decoder_rates=[8, 5, 4, 2],
            n_codebooks=3, codebook_size=32, codebook_dim=4, sample_rate=16000,
        )  # fmt: skip
    path = tmp_path_factory.mktemp("codec") / "weights.pth"
    model.save(str(path), package=False)
    return path, model.eval()


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return torch.full_like(x, self.value)


def load_quietly(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a random codec has no lag to measure and says so
        return Codec.load(*args, **kwargs)


# The separator --------------------------------------------------------------------------------------------------------


def on_meta(model, *args):
    with torch.device("meta"):  # where weights have shapes and no values
        return model(*args)


def gmac_per_second(model, seconds, *shape):
    """On the meta device, where nothing is computed; the plain attention kernel is the one that is counted whole."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.to("meta").eval()(torch.empty(*shape, device="meta"))
    return counter.get_total_flops() / 2e9 / seconds


def test_codecformer_has_the_published_size_and_cost():
    assert sum(p.numel() for p in on_meta(Codecformer).parameters()) == 17_361_408
    for seconds, published in ((1, 0.99), (4, 1.05), (8, 1.13)):
        cost = gmac_per_second(on_meta(Codecformer), seconds, 1, 1024, 50 * seconds)
        assert cost == pytest.approx(published, abs=0.005)


def test_fused_for_inference_the_separator_computes_the_same_with_fewer_macs():
    model = Codecformer(CodecformerConfig(latent_dim=24, n_speakers=3, context=3, **TINY)).eval()
    latents = torch.randn(2, 24, 30)
    before = model(latents), gmac_per_second(on_meta(Codecformer), 4, 1, 1024, 200)
    assert torch.allclose(model.fuse()(latents), before[0], atol=1e-5)
    # Per frame, two products [256] -> [1024] -> [2048] become one, [256] -> [2048].
    saved = 50 * (256 * 1024 + 1024 * 2048 - 256 * 2048) / 1e9
    assert gmac_per_second(on_meta(Codecformer).fuse(), 4, 1, 1024, 200) == pytest.approx(before[1] - saved, abs=1e-4)


@pytest.mark.parametrize("context", [1, 5])
def test_linear_layers_compute_what_the_authors_convolutions_do(context):
    """And weights saved from convolutions, which have one dimension more, are read."""
    config = dict(latent_dim=12, context=context, **TINY)
    model, x = Codecformer(CodecformerConfig(**config)).eval(), torch.randn(2, 12, 9)
    nn.init.normal_(model.mask_activation.alpha)
    with torch.no_grad():
        y = F.conv1d(x, model.bottleneck.weight.view(16, 12, context), padding=context // 2).transpose(1, 2)
        y = model.norm(model.layers[0](y + sinusoidal_positions(9, 16))).transpose(1, 2)
        y = F.conv1d(F.conv1d(y, model.expand.weight[..., None]), model.split.weight[..., None]).view(4, 12, 9)
        value, gate = (F.conv1d(y, g[0].weight[..., None], g[0].bias) for g in (model.gate_value, model.gate))
        value = value + torch.sin(value) ** 2
        alpha = model.mask_activation.alpha[:, None]
        y = value * torch.sigmoid(gate)
        expected = (y + torch.sin(alpha * y) ** 2 / alpha).view(2, 2, 12, 9)
    assert torch.allclose(model(x), expected, atol=1e-5)
    as_convolutions = {name: p[..., None] if p.ndim == 2 else p for name, p in model.state_dict().items()}
    as_convolutions["bottleneck.weight"] = model.bottleneck.weight.view(16, 12, context)
    as_convolutions["mask_activation.alpha"] = model.mask_activation.alpha.view(1, 12, 1)
    saved = {"separator": "codecformer", "config": config, "model": as_convolutions}
    assert torch.allclose(restore_model(saved, "old.pt")(x), expected, atol=1e-5)


def test_sepformer_has_the_published_size_and_cost():
    assert sum(p.numel() for p in on_meta(Sepformer).parameters()) == 25_679_361
    for seconds, published in ((1, 69.0), (4, 59.2), (8, 58.0)):
        assert gmac_per_second(on_meta(Sepformer), seconds, 1, 8000 * seconds) == pytest.approx(published, rel=0.001)


def test_sepformer_takes_any_length_and_level_and_every_parameter_learns():
    model = Sepformer(SepformerConfig(n_speakers=3, chunk=6, **TINY))
    for length in (*range(1, 33), 399, 2001):
        assert model(torch.randn(2, length)).shape == (2, 3, length)
    model(torch.randn(2, 400)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    mixture = torch.randn(1, 800)
    assert torch.allclose(model(100 * mixture), 100 * model(mixture), rtol=1e-3, atol=1e-3)


def test_sepformer_computes_what_speechbrains_modules_do():
    model = Sepformer(SepformerConfig(d_model=32, n_layers=2, n_heads=4, d_ffn=48, chunk=50)).eval()
    for k, p in enumerate(model.parameters()):
        p.data = 0.2 * torch.sin(torch.arange(p.numel(), dtype=torch.float64) * 1.7 + k).float().view_as(p)
    mixture = torch.sin(torch.arange(1232, dtype=torch.float64) ** 1.3 * 0.05).float()[None]
    # Printed by the Encoder, Dual_Path_Model and Decoder of SpeechBrain 1.1.2 with these weights, at four samples.
    expected = [[0.0052855, 0.0274255, 0.0340922, -0.0096171], [-0.0052820, 0.0026972, -0.0005737, -0.0027396]]
    assert torch.allclose(model(mixture)[0, :, [0, 100, 617, 1200]], torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("length", [1, 5, 6, 7, 50])
def test_every_frame_lies_in_two_of_sepformers_chunks(length):
    """With nothing between cutting and joining, overlap-add returns twice the input."""
    model = Sepformer(SepformerConfig(chunk=6, **TINY)).eval()
    model.bottleneck = model.blocks = model.norm = model.expand = model.gate_value = nn.Identity()
    model.split = nn.Conv2d(16, 32, 1, bias=False)
    model.split.weight.data = torch.eye(16).repeat(2, 1)[:, :, None, None]
    model.gate = Constant(1.0)
    x = torch.rand(3, 16, length)
    assert torch.allclose(model._mask(x), 2 * x[:, None].expand(-1, 2, -1, -1))


def settings_of(*flags):
    return parse_args([*map(str, flags)])[0]


def tiny_model(name, codec, **changes):
    return build_model({**vars(settings_of(f"@config/{name}.txt")), **TINY, **changes}, codec.latent_dim)


def test_gradients_reach_the_separator_and_not_the_codec(codec, speech):
    batch = {"mixture": speech.sum(0)[None, :4000], "sources": speech[None, :, :4000]}
    for config, loss, rvq in (("bundled", "csi_sdr", (True, True)), ("sepformer_wsj0_2mix", "si_sdr", (False, False))):
        model = tiny_model(config, codec)
        train.mixture_losses(model, model.on_latents, codec, batch, loss, rvq).mean().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert all(p.grad is None and not p.requires_grad for p in codec.network.parameters())


def test_each_situation_and_switch_is_what_it_says(codec, speech):
    """The three places of a separator in a call, against the same chain of codec calls written out."""
    mixture = speech.sum(0)[None, :8000]
    gain = codec.gain(mixture)
    latents = codec.encode(mixture * gain)
    model = Codecformer(CodecformerConfig(latent_dim=codec.latent_dim, **TINY)).eval()

    def decoded(z, after):
        z = model(z) * z[:, None]
        return codec.decode(codec.quantize(z) if after else z, 8000) / gain[:, None]

    waves = Sepformer(SepformerConfig(**TINY)).eval()
    again = lambda wav, quantize: codec.transmit(wav, quantize)  # noqa: E731
    with torch.no_grad():
        for before, after in itertools.product((False, True), repeat=2):
            sent = codec.quantize(latents) if before else latents
            received = codec.decode(sent, 8000) / gain
            at_level = received * codec.gain(received)
            once_more = codec.encode(at_level)
            expected = {
                (model, "clean"): decoded(sent, after),
                (model, "latents"): decoded(sent, after),
                (model, "transmitted"): decoded(once_more, after) * gain[:, None] / codec.gain(received)[:, None],
                (waves, "clean"): again(waves(mixture), True) if after else waves(mixture),
                (waves, "transmitted"): again(waves(received), True) if after else waves(received),
                (waves, "latents"): again(waves(received), after),
            }
            for (separator, situation), wav in expected.items():
                result = separate(separator, codec, mixture, before, after, situation)
                assert torch.allclose(result, wav, atol=1e-4), (type(separator), situation, before, after)
        # And each switch changes something where it should.
        for separator in (model, waves):
            results = [
                separate(separator, codec, mixture, *switches, "latents")
                for switches in itertools.product((False, True), repeat=2)
            ]
            for a, b in itertools.combinations(results, 2):
                assert not torch.allclose(a, b, atol=1e-3)
        assert torch.equal(
            estimate_latents(model, codec, latents, False, True),
            codec.quantize(estimate_latents(model, codec, latents)),
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("n_speakers", [2, 3, 5])
def test_masks_have_the_documented_shape_and_a_gradient_everywhere(activation, n_speakers):
    model = Codecformer(CodecformerConfig(latent_dim=12, n_speakers=n_speakers, activation=activation, **TINY))
    masks = model(torch.randn(3, 12, 7))
    assert masks.shape == (3, n_speakers, 12, 7)
    masks.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_length_is_not_bounded_by_the_authors_2500_frames():
    model = Codecformer(CodecformerConfig(latent_dim=8, **TINY)).eval()
    assert model(torch.randn(1, 8, 3001)).isfinite().all()


def test_snake_is_x_plus_squared_sine_over_alpha():
    snake, x = Snake(2), torch.tensor([[[0.3, -2.0], [1.5, 0.0]]])
    snake.alpha.data = torch.tensor([0.5, 3.0])
    expected = [[x_ + math.sin(a * x_) ** 2 / a for a, x_ in zip((0.5, 3.0), row)] for row in x[0].tolist()]
    assert torch.allclose(snake(x)[0], torch.tensor(expected), atol=1e-6)


def test_positions_are_those_of_attention_is_all_you_need():
    table = sinusoidal_positions(5000, 64)
    assert table[4321, 10].item() == pytest.approx(math.sin(4321 / 10000 ** (10 / 64)), abs=1e-3)
    assert table[4321, 11].item() == pytest.approx(math.cos(4321 / 10000 ** (10 / 64)), abs=1e-3)


@pytest.mark.parametrize("wrong", [dict(n_heads=3), dict(n_speakers=1), dict(dropout=1.0), dict(n_layers=0)])
def test_a_config_that_cannot_be_built_is_refused(wrong):
    for config in (CodecformerConfig, SepformerConfig):
        with pytest.raises(ValueError, match=next(iter(wrong)) + " "):
            config(**wrong)


def test_a_config_that_one_separator_cannot_be_built_by_is_refused():
    for config, wrong, message in (
        (CodecformerConfig, dict(activation="swish"), "unknown activation"),
        (SepformerConfig, dict(kernel=15), "kernel 15 must be even"),
        (SepformerConfig, dict(chunk=0), "chunk is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**wrong)


# The codec is exact in time, length and level -------------------------------------------------------------------------


def test_every_length_from_one_sample_to_two_hops_comes_back(codec, official_file):
    other = load_quietly(str(official_file[0]), sample_rate=8000)  # resamples 8 -> 16 -> 8 kHz
    for c in (codec, other):
        for length in range(1, 2 * c.hop * c.sample_rate // c.codec_rate + 1, 1 if c is codec else 7):
            wav = torch.randn(1, length)
            latents = c.encode(wav)
            assert c.decode(latents, length).shape == (1, length)
            assert latents.shape[-1] >= length * c.frame_rate / c.sample_rate


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100])
def test_any_data_rate_is_resampled_to_the_codec_and_back_in_time(codec, speech, rate):
    wav = torch.from_numpy(np.stack([resample(s.numpy(), 8000, rate) for s in speech]))
    c = Codec(codec.network, rate)
    gain = c.gain(wav)
    out = c.decode(c.encode(wav * gain), wav.shape[-1]) / gain
    assert measure_lag(wav[0], out[0], 50)[0] == 0
    assert si_sdr(out, wav).min() > 15


def test_the_transform_has_no_lag_is_transparent_and_has_the_documented_facts(codec, speech):
    assert codec.lag == 0
    assert (codec.sample_rate, codec.frame_rate, codec.latent_dim, codec.bitrate) == (8000, 50.0, 320, 6000.0)
    gain = codec.gain(speech)
    # Exact but for the ends, where a window has no neighbour to overlap with.
    decoded = codec.decode(codec.encode(speech * gain), 16000) / gain
    assert si_sdr(decoded[:, 160:-160], speech[:, 160:-160]).min() > 90
    # Latents are the inner products with windowed cosines and sines: one bin's cosine comes out in its latent alone.
    time = torch.arange(320) + 0.5
    tone = torch.cos(math.pi / 160 * (time + 80) * 20.5) * torch.sin(math.pi * time / 320)
    latents = codec.encode(F.pad(tone, (880, 800))[None])[0]
    assert latents.abs().max(1).values.argmax() == 20 and latents[20].argmax() == 6


def test_the_bundled_codec_is_small_and_codes_strangers_better_than_the_transform(codec):
    """Issue 12's bars: size, rate, MACs; PESQ and STOI at 6 kbit/s; and the ceiling that it sets separation."""
    learned = Codec.load("bundled")
    network = learned.network
    assert (learned.sample_rate, learned.frame_rate, learned.lag) == (8000, 50, 0) and learned.bitrate <= 6000
    assert sum(p.numel() for p in network.parameters()) <= 5e6
    macs = cost.count_macs(network.encoder, 1, 1, 8000) + cost.count_macs(network.decoder, 1, network.latent_dim, 50)
    assert macs <= 0.6
    mixtures = FixedMixtures(ASSETS / "test_mixtures", 8000)
    wav = torch.from_numpy(np.stack([mixtures[index]["sources"][0] for index in range(0, 48, 6)]))
    scores = {}
    for name, c, quantize in (("learned", learned, True), ("transform", codec, True), ("ceiling", learned, False)):
        decoded = c.transmit(wav, quantize)
        for metric in ("si_sdr", "pesq", "stoi"):
            values = [evaluate.score(metric, d.numpy(), w.numpy(), 8000) for d, w in zip(decoded, wav)]
            scores[name, metric] = np.mean(values)
    assert scores["learned", "pesq"] > scores["transform", "pesq"] + 0.2
    assert scores["learned", "stoi"] > scores["transform", "stoi"] + 0.1
    assert scores["ceiling", "si_sdr"] > 12


def delayed(planted):
    """The transform with a decoder whose output comes `planted` samples late, as trained weights can make it."""
    network, _ = CODECS["transform"]()

    class Late(nn.Module):
        def __init__(self, decoder):
            super().__init__()
            self.decoder = decoder

        def forward(self, latents):
            wav = self.decoder(latents)
            return F.pad(wav, (planted, 0))[..., : wav.shape[-1]]

    network.decoder = Late(network.decoder)
    return network


@pytest.mark.parametrize("planted", [-31, -8, 1, 8, 57, 200])
def test_a_planted_lag_is_measured_and_removed(codec, speech, planted):
    late = Codec(delayed(planted), 8000)
    assert late.lag == planted
    there_and_back = late.decode(late.encode(speech), 16000)
    straight = codec.decode(codec.encode(speech), 16000)
    # An early codec has lost its first samples for good, a late one sees more frames at the end; all else is equal.
    lost = max(-planted, 0)
    assert torch.allclose(there_and_back[:, lost:-320], straight[:, lost:-320], atol=1e-4)


class Echo(nn.Module):
    """A bare network of known reach: a latent hears `early` frames ahead and `late` back, and so does the decoder."""

    sample_rate, hop_length, latent_dim, n_codebooks, codebook_size = 8000, 160, 160, 1, 2

    def __init__(self, late, early):
        super().__init__()
        self.late, self.early = late, early

    def spread(self, frames):  # [B, n, F]
        later, earlier = F.pad(frames, (self.late, 0)), F.pad(frames, (0, self.early))
        return frames + 0.5 * later[..., : frames.shape[-1]] + 0.5 * earlier[..., self.early :]

    def encoder(self, wav):
        return self.spread(wav.view(len(wav), -1, 160).transpose(1, 2))

    def decoder(self, latents):
        return self.spread(latents).transpose(1, 2).reshape(len(latents), 1, -1)

    def quantize(self, latents, n_codebooks):
        return latents


@pytest.mark.parametrize("late, early", [(3, 0), (0, 5), (4, 2)])
def test_margins_are_as_long_as_coding_reaches(late, early):
    network = Echo(late, early)
    assert load_network(network).margins() == (2 * late, 2 * early)


def load_network(network, rate=8000):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Codec(network, rate)


def test_an_unshifted_signal_scores_where_a_shifted_one_fails(speech):
    """Why the lag matters: 4 samples at 8 kHz turn a perfect estimate into one of about -10 dB or worse."""
    assert si_sdr(speech.roll(4, -1), speech).max() < 0
    assert measure_lag(speech[0], speech[0].roll(4), 10)[0] == 4


@pytest.mark.parametrize("factor", [1e-3, 0.05, 30.0])
def test_level_in_equals_level_out(codec, speech, factor):
    class Cubes(nn.Module):  # a separator on waveforms that depends on the level
        on_latents = False

        def forward(self, mixture):
            return torch.stack([mixture, mixture**3], 1)

    model = Codecformer(CodecformerConfig(latent_dim=codec.latent_dim, **TINY)).eval()
    for process in (codec.transmit, partial(separate, model, codec), partial(separate, Cubes(), codec)):
        reference, scaled = process(speech), process(speech * factor)
        assert torch.allclose(scaled / factor, reference, atol=2e-3 * reference.abs().max().item())
    transmitted = codec.transmit(speech)
    level = 20 * torch.log10(transmitted.std(-1) / speech.std(-1))
    assert level.abs().max() < 2


def test_silence_stays_silence_and_finite(codec):
    out = codec.transmit(torch.zeros(2, 1000))
    assert out.isfinite().all() and out.abs().max() < 0.1
    assert (codec.gain(torch.zeros(2, 1000)) == 1).all()


def test_wrapper_agrees_with_the_dac_package(official_file):
    path, model = official_file
    codec = load_quietly(str(path), sample_rate=16000)
    wav = 0.1 * torch.randn(2, 3200)
    with torch.no_grad():
        reference, codes, *_ = model.encode(wav[:, None])
        few, *_ = model.encode(wav[:, None], n_quantizers=2)
        latents = codec.encode(wav)
        assert torch.allclose(latents, model.encoder(wav[:, None]), atol=1e-5)
        assert torch.allclose(codec.quantize(latents), reference, atol=1e-5)
        out = model.decode(reference)[:, 0]
    assert out.shape[-1] == 3192  # the 8 lost samples that the wrapper gives back
    codec.lag = 0
    assert torch.allclose(codec.decode(reference, 3200)[:, :3192], out, atol=1e-5)
    assert codec.bitrate == 3 * 5 * 50
    codec.use_codebooks(2)
    assert codec.bitrate == 2 * 5 * 50 and torch.allclose(codec.quantize(latents), few, atol=1e-5)
    codec.use_codebooks(3)
    assert codec.bitrate == 3 * 5 * 50 and torch.allclose(codec.quantize(latents), reference, atol=1e-5)


def test_codec_is_frozen_but_differentiable_and_weight_norm_is_folded(codec, speech):
    assert not any(p.requires_grad for p in codec.network.parameters())
    assert not any("weight_g" in name for name, _ in codec.network.named_parameters())
    latents = codec.encode(speech).requires_grad_()
    for process in (lambda z: z, codec.quantize):
        (gradient,) = torch.autograd.grad(codec.decode(process(latents), 16000).square().sum(), latents)
        assert gradient.isfinite().all() and gradient.any()


def quality_at(codec, wav, rates):
    for n in rates:
        codec.use_codebooks(n)
        yield si_sdr(codec.transmit(wav), wav).mean().item()


def test_more_codebooks_transmit_better(speech):
    codec = Codec.load("transform")
    few, more, all_of_them = quality_at(codec, speech, (1, 4, 12))
    assert few < more < all_of_them
    for n in (0, 13):
        with pytest.raises(CodecError, match=f"{n} codebooks asked for, transform has 1 to 12"):
            codec.use_codebooks(n)
    assert codec.n_codebooks == 12


@slow
def test_fitted_codebooks_transmit_speech(tmp_path, speech, monkeypatch):
    path = tmp_path / "codebooks.pth"
    monkeypatch.setattr(transform_codec.TransformCodec, "n_codebooks", 3)
    program("recipes.transform_codec", monkeypatch, "--seconds", 60, "--out", path, "--valid", SPEECH.parent / "valid")
    network, weights = transform_codec.load_transform(path)
    fitted = Codec(network, 8000)
    assert fitted.lag == 0 and 1.5 < si_sdr(fitted.transmit(speech), speech).mean()
    assert "quantizers.2" in " ".join(weights)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_bad_codecs_are_one_clear_line(tmp_path, monkeypatch, official_file):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps(Bomb()))
    torch.save({"state_dict": Bomb(), "metadata": {}}, tmp_path / "bomb2.pth")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "truncated.pth").write_bytes(official_file[0].read_bytes()[:10000])
    torch.save({"state_dict": {}, "metadata": {"kwargs": {}}}, tmp_path / "other.pth")
    for name in ("bomb.pth", "bomb2.pth", "empty.pth", "truncated.pth", "other.pth", "dac_99khz"):
        with pytest.raises(CodecError) as caught:
            Codec.load(name)
        assert "\n" not in str(caught.value)
    for name in ("bomb.pth", "missing.pth"):
        with pytest.raises(CodecError, match="codebooks"):
            transform_codec.load_transform(tmp_path / name)
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(CodecError, match="out of range"):
        Codec.load("transform", sample_rate=100)


def test_official_weights_are_fetched_whole_or_not_at_all(tmp_path, monkeypatch, official_file):
    weights = official_file[0].read_bytes()

    class Release(SimpleHTTPRequestHandler):
        promised = len(weights) + 1000

        def do_GET(self):
            assert self.path == "/0.0.5/weights_16khz.pth"
            self.send_response(200)
            self.send_header("Content-Length", str(self.promised))
            self.end_headers()
            self.wfile.write(weights)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Release)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(dac_wrapper, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(dac_wrapper, "RELEASES", "http://127.0.0.1:9/")  # nobody listens there
    with pytest.raises(CodecError, match="can't fetch"):
        Codec.load("dac_16khz")
    monkeypatch.setattr(dac_wrapper, "RELEASES", f"http://127.0.0.1:{server.server_port}/")
    with pytest.raises(CodecError, match="too early"):
        Codec.load("dac_16khz")
    assert list((tmp_path / "cache").iterdir()) == []
    Release.promised = len(weights)
    assert load_quietly("dac_16khz").codec_rate == 16000
    server.shutdown()
    server.server_close()
    (cached,) = (tmp_path / "cache").iterdir()
    assert cached.read_bytes() == weights and load_quietly("dac_16khz").codec_rate == 16000  # without a server


# SoundStream; the original that Lyra is tested against is run by ai-edge-litert ---------------------------------------

SHARED = HERE.parent / "shared"
LYRA = SHARED / "lyra"
SMALL_SOUNDSTREAM = SoundStreamConfig(
    sample_rate=8000, kernel=32, stride=8, widths=(8, 16, 16, 32), latent_dim=12, n_codebooks=3, codebook_size=32
)  # fmt: skip
needs_lyra = pytest.mark.skipif(not LYRA.is_dir(), reason="Lyra's weights are not in ../shared/lyra")


def librispeech_speech(n_files=10, seconds=3):
    """[n_files, T] at 16 kHz, real recordings as loud as they are."""
    files = sorted((SHARED / "speech/librispeech_251").glob("*.flac"))[3::20]
    files = [file for file in files if sf.info(file).frames > 16000 * (seconds + 1)][:n_files]
    if len(files) < n_files:
        pytest.skip("the recordings are not in ../shared/speech/librispeech_251")
    frames = dict(start=16000, frames=16000 * seconds, dtype="float32")
    return torch.stack([torch.from_numpy(sf.read(file, **frames)[0]) for file in files])


def run_original(name, frames):
    """The outputs of Lyra's own streaming graph for a list of inputs, one call each, as one tensor."""
    interpreter = pytest.importorskip("ai_edge_litert.interpreter", reason="ai-edge-litert is not installed")
    graph = interpreter.Interpreter(str(LYRA / name), num_threads=1)
    graph.allocate_tensors()
    source, result = graph.get_input_details()[0]["index"], graph.get_output_details()[0]["index"]
    outputs = []
    for frame in frames:
        graph.set_tensor(source, frame.numpy())
        graph.invoke()
        outputs.append(torch.from_numpy(graph.get_tensor(result).copy()))
    return torch.stack(outputs)


def relative_errors(ours, reference):
    """Of each signal, relative to its standard deviation."""
    return (ours - reference).flatten(1).std(1) / reference.flatten(1).std(1)


@slow
@needs_lyra
def test_latents_and_waveforms_are_those_of_the_original_but_for_its_8_bit_activations():
    codec, _ = load_lyra(LYRA)
    wav = librispeech_speech()
    latents = torch.stack([run_original("soundstream_encoder.tflite", w.view(-1, 1, 320))[:, 0, 0].T for w in wav])
    decoded = torch.stack([run_original("lyragan.tflite", z.T[:, None, None]).flatten() for z in latents])
    with torch.no_grad():
        assert relative_errors(codec.encoder(wav[:, None]), latents).max() < 0.10
        # Loud frames exceed what 8 bits hold in the original, so the typical recording counts.
        assert relative_errors(codec.decoder(latents)[:, 0], decoded).median() < 0.07


@slow
@needs_lyra
def test_the_rvq_chooses_as_the_original_does():
    interpreter = pytest.importorskip("ai_edge_litert.interpreter", reason="ai-edge-litert is not installed")
    graph = interpreter.Interpreter(str(LYRA / "quantizer.tflite"), num_threads=1)
    encode, decode = graph.get_signature_runner("encode"), graph.get_signature_runner("decode")
    codec, _ = load_lyra(LYRA)
    frames = librispeech_speech(2, 2).reshape(-1, 1, 320)
    latents = run_original("soundstream_encoder.tflite", frames)[:, 0, 0]  # [F, 64]
    for n_codebooks in (1, 16, 30, 46):
        ours, codes = codec.quantizer(latents.T[None], n_codebooks)
        for i, frame in enumerate(latents):
            theirs = encode(input_frames=frame[None, None].numpy(), num_quantizers=np.int32(n_codebooks))["output_0"]
            assert codes[0, :, i].tolist() == theirs[:n_codebooks].flatten().tolist()
            assert (theirs[n_codebooks:] == -1).all()
            decoded = torch.from_numpy(decode(encoding_indices=theirs)["output_0"][0, 0])
            torch.testing.assert_close(ours[0, :, i].detach(), decoded)


@needs_lyra
def test_the_outermost_layers_are_the_strided_convolutions_of_the_file():
    codec, _ = load_lyra(LYRA)
    first, last = codec.encoder.layers[0], codec.decoder.layers[-1]
    wav, inner = torch.randn(2, 1, 640), torch.randn(2, 64, 40)
    with torch.no_grad():
        weight, bias = soundstream.read_tflite(LYRA / "soundstream_encoder.tflite")[1][0]
        expected = F.conv1d(F.pad(wav, (48, 0)), weight[:, :, 0], bias, stride=16)
        ours = first(wav.view(2, 40, 1, 16).transpose(1, 3))[:, :, 0]
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
        weight, bias = soundstream.read_tflite(LYRA / "lyragan.tflite")[1][-1]
        expected = F.conv_transpose1d(inner, weight[:, :, 0], bias, stride=16)[..., :640]
        ours = last(inner[:, :, None]).transpose(1, 3).reshape(2, 1, 640)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@needs_lyra
def test_lyra_has_the_size_and_the_cost_that_are_known_of_it():
    codec, _ = load_lyra(LYRA)
    assert sum(p.numel() for p in codec.encoder.parameters()) == pytest.approx(0.660e6, rel=0.01)
    assert sum(p.numel() for p in codec.decoder.parameters()) == pytest.approx(0.660e6, rel=0.01)
    for network, given in ((codec.encoder, torch.randn(1, 1, 16000)), (codec.decoder, torch.randn(1, 64, 50))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(given)
        assert counter.get_total_flops() / 2 == pytest.approx(0.0998e9, rel=0.01)


@pytest.mark.parametrize("causal", [True, False])
def test_a_codec_of_its_own_shape_returns_as_many_samples_as_it_was_given(causal):
    torch.manual_seed(0)
    codec = SoundStream(replace(SMALL_SOUNDSTREAM, causal=causal))
    wav = torch.randn(3, 1, 11 * 160)
    latents = codec.encoder(wav)
    assert codec.hop_length == 160 and latents.shape == (3, 12, 11)
    assert codec.quantize(latents, 2).shape == latents.shape
    assert codec.decoder(latents).shape == wav.shape
    torch.testing.assert_close(codec.encoder(wav[1:2]), latents[1:2], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="100 samples are no multiple of the codec's 160 a frame"):
        codec.encoder(wav[..., :100])


def test_a_causal_codec_waits_for_nothing_and_another_sees_both_sides():
    torch.manual_seed(0)
    wav = torch.randn(1, 1, 30 * 160)
    later = wav.clone()
    later[..., 15 * 160 :] += 1
    for causal in (True, False):
        codec = SoundStream(replace(SMALL_SOUNDSTREAM, causal=causal))
        with torch.no_grad():
            moved = (codec.encoder(wav) - codec.encoder(later)).abs().amax((0, 1))
            assert (moved[:15].max() == 0) == causal and moved[15:].min() > 0
            latents = torch.randn(1, 12, 30)
            after = latents.clone()
            after[..., 15:] += 1
            moved = (codec.decoder(latents) - codec.decoder(after)).abs()[0, 0]
            assert (moved[: 15 * 160].max() == 0) == causal and moved[15 * 160 :].max() > 0


def test_gradients_reach_every_weight_and_pass_straight_through_the_rvq():
    torch.manual_seed(0)
    codec = SoundStream(SMALL_SOUNDSTREAM)
    wav = torch.randn(2, 1, 1600, requires_grad=True)
    codec.decoder(codec.quantize(codec.encoder(wav), 3)).square().mean().backward()
    assert wav.grad.abs().min() > 0
    for name, parameter in [*codec.encoder.named_parameters(), *codec.decoder.named_parameters()]:
        assert parameter.grad.abs().sum() > 0, name
    latents = torch.randn(2, 12, 10, requires_grad=True)
    towards = torch.randn(2, 12, 10)
    (codec.quantize(latents, 3) * towards).sum().backward()
    torch.testing.assert_close(latents.grad, towards)


def test_the_rvq_finds_the_nearest_entries():
    torch.manual_seed(0)
    quantizer = SoundStream(SMALL_SOUNDSTREAM).quantizer
    latents = torch.randn(2, 12, 10)
    quantised, codes = quantizer(latents, 2)
    for b in range(2):
        for f in range(10):
            rest = latents[b, :, f]
            for codebook, code in zip(quantizer.codebooks, codes[b, :, f]):
                assert int((codebook - rest).norm(dim=1).argmin()) == int(code)
                rest = rest - codebook[code]
            torch.testing.assert_close(quantised[b, :, f], latents[b, :, f] - rest)


def test_what_is_saved_is_read_back_with_its_shape(tmp_path):
    codec = SoundStream(SMALL_SOUNDSTREAM)
    save_soundstream(codec, tmp_path / "codec.pth")
    again, weights = load_file(tmp_path / "codec.pth")
    assert again.config == SMALL_SOUNDSTREAM and list(tmp_path.iterdir()) == [tmp_path / "codec.pth"]
    wav = torch.randn(1, 1, 1600)
    torch.testing.assert_close(again.encoder(wav), codec.encoder(wav), atol=0, rtol=0)
    assert weights.keys() == codec.state_dict().keys()


@needs_lyra
def test_lyra_is_converted_once_and_read_as_plain_tensors_after_that(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(soundstream, "CACHE", tmp_path)

    def download(url, path):
        fetched.append(url)
        shutil.copy(LYRA / path.name, path)

    monkeypatch.setattr("dac_wrapper.download", download)
    codec, weights = load_lyra()
    assert fetched == [soundstream.LYRA_URL + name for name in soundstream.LYRA_FILES]
    for name in soundstream.LYRA_FILES:
        (tmp_path / name).unlink()
    again, _ = load_lyra()
    assert all(torch.equal(a, b) for a, b in zip(codec.state_dict().values(), again.state_dict().values()))


@needs_lyra
def test_a_wrong_file_is_refused(tmp_path):
    for name in soundstream.LYRA_FILES:
        (tmp_path / name).write_bytes((LYRA / name).read_bytes())
    (tmp_path / "lyragan.tflite").write_bytes(b"something else")
    with pytest.raises(CodecError, match="lyragan.tflite is not the file.*remove it"):
        load_lyra(tmp_path)
    (tmp_path / "lyragan.tflite").unlink()
    with pytest.raises(CodecError, match="no .*lyragan.tflite: fetch it from https"):
        load_lyra(tmp_path)


@needs_lyra
@pytest.mark.parametrize("rate", [8000, 16000])
def test_lyra_is_exact_in_time_length_and_level_like_any_codec(rate, tmp_path, monkeypatch):
    monkeypatch.setattr(soundstream, "CACHE", tmp_path)
    shutil.copytree(LYRA, tmp_path, dirs_exist_ok=True)
    lyra = Codec.load("lyra", rate)
    assert lyra.lag == 0 and (lyra.codec_rate, lyra.frame_rate, lyra.latent_dim) == (16000, 50.0, 64)
    assert [lyra.bitrate * n / 46 for n in (16, 30, 46)] == pytest.approx([3200, 6000, 9200])
    wav = torch.from_numpy(resample(librispeech_speech(1)[0].numpy(), 16000, rate))[None, :-7]
    sent = lyra.transmit(wav)
    assert sent.shape == wav.shape and measure_lag(wav[0], sent[0], 50)[0] == 0
    assert torch.allclose(lyra.transmit(30 * wav), 30 * sent, atol=1e-2 * 30 * sent.abs().max().item())
    low, middle, high = quality_at(lyra, wav, (16, 30, 46))
    assert low < middle < high
    before, after = lyra.margins()
    assert before > 3 and after <= 1  # causal


# Losses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [-20, 0, 13.7, 40])
def test_si_sdr_closed_form(level):
    """Noise orthogonal to the source: SI-SDR is the ratio of their energies, whatever the scale and offset."""
    time = torch.arange(8000, dtype=torch.float64) / 8000
    source, noise = torch.sin(2 * math.pi * 50 * time), torch.cos(2 * math.pi * 90 * time)
    estimate = 7.3 * (source + noise * 10 ** (-level / 20)) + 0.4
    assert si_sdr(estimate, source).item() == pytest.approx(level, abs=1e-6)


def test_si_sdr_and_sdr_agree_with_other_libraries(speech):
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

    estimates = speech + 0.03 * torch.randn_like(speech) + 0.2 * speech.flip(0)
    theirs = scale_invariant_signal_distortion_ratio(estimates, speech, zero_mean=True)
    assert torch.allclose(si_sdr(estimates, speech), theirs, atol=1e-4)

    rng, n = np.random.default_rng(0), 8000
    white = [rng.standard_normal(n + 63), rng.standard_normal(n + 15)]
    sources = np.stack([np.convolve(w, np.hanning(k), "valid")[:n] for w, k in zip(white, (64, 16))])
    estimates = [0.8 * np.roll(sources[0], 3) + 0.3 * sources[1] + 0.1 * rng.standard_normal(n)]
    estimates += [sources[1] + 0.05 * sources[0]]
    # Printed by mir_eval 0.8.2's bss_eval_sources for these signals.
    for estimate, source, expected in zip(estimates, sources, (15.69859854, 19.35666372)):
        assert evaluate.score("sdr", estimate, source, 8000) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("rate, mode", [(8000, "nb"), (16000, "wb")])
def test_scores_are_per_source_after_the_best_permutation(speech, rate, mode):
    """Every column against other libraries, called one source at a time in the right order."""
    from pesq import pesq
    from pystoi import stoi
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

    def theirs_si_sdr(estimate, source):
        pair = torch.from_numpy(estimate), torch.from_numpy(source)
        return scale_invariant_signal_distortion_ratio(*pair, zero_mean=True).item()

    sources = speech.numpy()
    mixture = sources.sum(0)
    estimates = sources + 0.1 * sources[::-1] + 0.01 * np.random.default_rng(0).standard_normal(sources.shape)
    estimates = np.roll(estimates, 3, -1).astype(np.float32)
    columns = ["si_sdr", "si_sdr_i", "csi_sdr_i", "sdr", "sdr_i", "pesq", "stoi"]
    transmitted = np.stack([sources[0] + 0.1 * sources[1], sources[1]])
    rows = evaluate.score_rows(
        {"a": estimates[::-1].copy(), "mixture": np.stack([mixture] * 2)}, mixture,
        {"": sources, "c": transmitted}, columns, rate,
    )  # fmt: skip
    for k in range(2):
        theirs = theirs_si_sdr(estimates[k], sources[k])
        assert rows["a"]["si_sdr"][k] == pytest.approx(theirs, abs=1e-4)
        assert rows["a"]["si_sdr_i"][k] == pytest.approx(theirs - theirs_si_sdr(mixture, sources[k]), abs=1e-3)
        gain = theirs_si_sdr(estimates[k], transmitted[k]) - theirs_si_sdr(mixture, transmitted[k])
        assert rows["a"]["csi_sdr_i"][k] == pytest.approx(gain, abs=1e-3)
        assert rows["a"]["pesq"][k] == pytest.approx(pesq(rate, sources[k], estimates[k], mode), abs=1e-3)
        assert rows["a"]["stoi"][k] == pytest.approx(stoi(sources[k], estimates[k], rate), abs=1e-5)
        assert rows["a"]["lag"][k] == 3
    assert not any(np.abs(rows["mixture"][c]).max() > 1e-4 for c in ("si_sdr_i", "csi_sdr_i", "sdr_i"))
    table = report.format_table(evaluate.summarise({"1": rows, "2": rows}, columns)).splitlines()
    assert "shifted by +3 samples" in table[1] and "shifted" not in table[2]


def test_a_codec_is_scored_on_one_utterance_of_each_speaker(tmp_path, monkeypatch):
    class Noisy:  # adds as much error as there is signal when quantised, a tenth of it when not
        bitrate, n_codebooks, device = 6000, 12, "cpu"

        def use_codebooks(self, n):
            assert n == 12

        def transmit(self, wav, quantize):
            error = wav.roll(4000, -1)
            error = error - (error * wav).sum() / wav.square().sum() * wav
            return wav + error * wav.norm() / error.norm() * (1 if quantize else 0.1**0.5)

    monkeypatch.setattr(shutil, "which", lambda name: None)  # no Opus here
    monkeypatch.setattr(Codec, "load", lambda *_: Noisy())
    program("recipes.codec_scores", monkeypatch, "--data", SPEECH.parent / "valid", "--out", tmp_path)
    results = json.loads((tmp_path / "codec_scores.json").read_text())
    rows = results["rows"]
    assert results["n_signals"] == 5 and list(rows) == ["transform/unquantised", "transform/6"]
    assert rows["transform/unquantised"]["si_sdr"]["mean"] == pytest.approx(10, abs=0.05)  # means are removed
    assert rows["transform/6"]["si_sdr"]["mean"] == pytest.approx(0, abs=0.05)
    assert rows["transform/6"]["pesq"]["mean"] < rows["transform/unquantised"]["pesq"]["mean"]


def test_how_well_latents_add_and_are_masked_is_scored_on_mixtures(tmp_path, monkeypatch):
    class Cubes:  # codes waveforms exactly, but the cubes of two don't add up to the cube of their sum
        bitrate, n_codebooks, device = 6000, 12, "cpu"
        gain = staticmethod(lambda wav: torch.full((1,), 30.0))
        encode = staticmethod(lambda wav: wav[:, None] ** 3)
        decode = staticmethod(lambda latents, length: latents[:, 0].sign() * latents[:, 0].abs() ** (1 / 3))
        use_codebooks = staticmethod(lambda n: None)
        transmit = staticmethod(lambda wav, quantize: wav)

    write_fixed_set(SpeakerMixtures(SPEECH, 8000, 1.0, 2), tmp_path / "set")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(Codec, "load", lambda *_: Cubes())
    program("recipes.codec_scores", monkeypatch, "--data", tmp_path / "set", "--out", tmp_path)
    rows = json.loads((tmp_path / "codec_scores.json").read_text())["rows"]
    expected = {"latents_added": [], "ideal_mask": []}
    for item in (FixedMixtures(tmp_path / "set", 8000)[index] for index in range(2)):
        mixture, (a, b) = item["mixture"], item["sources"].astype(float)
        masked = mixture * np.cbrt(a**6 / (a**6 + b**6 + 1e-30))
        for row, estimate, reference in (
            ("latents_added", np.cbrt(a**3 + b**3), mixture), ("ideal_mask", masked, a),
        ):  # fmt: skip
            expected[row].append(float(si_sdr(torch.from_numpy(estimate), torch.from_numpy(reference))))
    for row, values in expected.items():
        assert rows[f"transform/{row}"]["si_sdr"]["mean"] == pytest.approx(np.mean(values), abs=0.01)
    assert rows["transform/unquantised"]["si_sdr"]["mean"] > 60


def test_a_score_that_cannot_be_had_is_left_out_counted_and_told(speech):
    sources, rate = speech.numpy(), 8000
    silent = np.stack([sources[0], np.zeros_like(sources[0])])
    short, columns = sources[:, :1600], evaluate.COLUMNS  # 0.2 s
    scores = {}
    for name, reference in (("whole", sources), ("silent", silent), ("short", short)):
        mixture = reference.sum(0)
        signals = {"mixture": np.stack([mixture] * 2), "codecformer": reference + 0.1 * reference[::-1]}
        scores[name] = evaluate.score_rows(signals, mixture, {"": reference, "c": reference}, columns, rate)
    rows = evaluate.summarise(scores, columns)
    assert all(math.isfinite(rows[row][c]["mean"]) for row in rows for c in columns)
    counts = {c: rows["codecformer"][c]["left_out"] for c in columns}
    assert counts["si_sdr"] == counts["sdr_i"] == 1  # against silence
    assert counts["pesq"] == counts["stoi"] == 2  # and neither is defined on 0.2 s
    alone = evaluate.summarise({"whole": scores["whole"]}, columns)
    assert rows["codecformer"]["pesq"]["mean"] == alone["codecformer"]["pesq"]["mean"]
    *_, note = report.format_table(rows).splitlines()
    assert note.startswith("Mixtures left out") and "PESQ of Codecformer: 2" in note
    nothing = evaluate.summarise({"silent": scores["silent"]}, columns)
    assert nothing["codecformer"]["pesq"]["mean"] is None and " -" in report.format_table(nothing)


def test_silent_and_constant_signals_give_finite_losses_and_gradients(codec):
    for source in (torch.zeros(1, 2, 800), torch.full((1, 2, 800), 0.3)):
        for estimate in (torch.zeros(1, 2, 800), torch.randn(1, 2, 800)):
            estimate.requires_grad_()
            loss, _ = pit(pairwise_negative_si_sdr(estimate, source))
            loss.sum().backward()
            assert loss.isfinite().all() and estimate.grad.isfinite().all()
        for loss, between_latents in LOSSES.values():
            shape = (codec.latent_dim, 5) if between_latents else (800,)
            estimates = torch.zeros(1, 2, *shape, requires_grad=True)
            pairwise = loss(codec, estimates, source)
            pairwise.sum().backward()
            assert pairwise.isfinite().all() and estimates.grad.isfinite().all()


@pytest.mark.parametrize("n_speakers", [2, 3, 4, 5])
def test_pit_finds_every_permutation(n_speakers):
    sources = torch.randn(1, n_speakers, 400)
    for permutation in itertools.permutations(range(n_speakers)):
        estimates = sources[:, list(permutation)] + 0.1 * torch.randn_like(sources)
        pairwise = pairwise_negative_si_sdr(estimates, sources)
        loss, assignment = pit(pairwise)
        assert [permutation[a] for a in assignment[0]] == list(range(n_speakers))
        assert si_sdr(estimates[0, assignment[0]], sources[0]).min() > 10
        brute = min(
            np.mean([pairwise[0, p[j], j].item() for j in range(n_speakers)])
            for p in itertools.permutations(range(n_speakers))
        )
        assert loss.item() == pytest.approx(brute, abs=1e-5)


def test_each_loss_is_best_for_what_it_asks_for(codec, speech):
    sources = (speech * codec.gain(speech.sum(0)))[None]
    cases = (
        ("si_sdr", sources, -60),
        ("csi_sdr", codec.transmit(sources), -60),
        ("embedding", codec.encode(sources), -60),
    )
    for name, perfect, reached in cases:
        loss, assignment = pit(LOSSES[name][0](codec, perfect, sources))
        assert loss.item() < reached and assignment.tolist() == [[0, 1]]
        loss, assignment = pit(LOSSES[name][0](codec, perfect.flip(1), sources))
        assert loss.item() < reached and assignment.tolist() == [[1, 0]]
        # What either of the other two asks for is not perfect here.
        other = codec.transmit(sources) if name == "si_sdr" else sources
        other = codec.quantize(perfect) if LOSSES[name][1] else other
        assert reached / 2 < pit(LOSSES[name][0](codec, other, sources))[0].item() < 0
    assert (codec.decode(codec.encode(sources), 16000) - sources).square().mean() < 1e-2 * sources.square().mean()


@pytest.mark.parametrize("name, reached", [("si_sdr", -25), ("csi_sdr", -5), ("embedding", -60)])
def test_a_crop_of_perfect_latents_is_a_perfect_crop(codec, speech, name, reached):
    """The crop of the latents and that of the sources are of the same moment, and its edges are not scored."""
    sources = (speech * codec.gain(speech.sum(0)))[None].repeat(3, 1, 1)
    latents = codec.quantize(codec.encode(sources)) if name == "csi_sdr" else codec.encode(sources)
    margins, (loss, between_latents) = codec.margins(), LOSSES[name]
    frames = 25 + sum(margins)
    parts, targets = crop(codec, latents, sources, torch.tensor([0.0, 0.4, 0.999]), frames)
    assert parts.shape[-1] == frames and targets.shape[-1] == 160 * frames
    assert torch.equal(targets[0], sources[0, :, : 160 * frames])
    assert torch.equal(targets[2], sources[0, :, -160 * frames :])
    decoded = parts if between_latents else codec.decode(parts, targets.shape[-1])
    assert pit(loss(codec, decoded, targets, margins))[0].max() < reached
    moved = loss(codec, decoded, targets.roll(80, -1), margins)
    assert pit(moved)[0].min() > max(reached + 10, 0)
    whole, target = crop(codec, latents, sources, torch.rand(3), 1000)
    assert whole.shape == latents.shape and target.shape == sources.shape


@pytest.mark.parametrize("planted", [-57, 8, 200])
def test_a_late_codec_trains_on_crops_with_every_loss(planted, speech):
    """A codec that is late needs more frames of latents than of masks."""
    late = Codec(delayed(planted), 8000)
    assert late.lag == planted
    model = Codecformer(CodecformerConfig(latent_dim=320, **TINY))
    sources = speech.expand(3, 2, -1)
    batch = {"mixture": sources.sum(1), "sources": sources, "position": torch.tensor([0, 0.5, 0.999])}
    for loss in LOSSES:
        values = train.mixture_losses(model, True, late, batch, loss, seconds=0.5, margins=late.margins())
        assert values.isfinite().all() and values.shape == (3,)
    # Perfect latents stay perfect: the crop is in time.
    sources = (speech * late.gain(speech.sum(0)))[None]
    margins = late.margins()
    parts, targets = crop(late, late.encode(sources)[..., :100], sources, torch.tensor([0.5]), 25 + sum(margins))
    decoded = late.decode(parts, targets.shape[-1])
    assert pit(LOSSES["si_sdr"][0](late, decoded, targets, margins))[0].max() < -60


def test_a_frame_of_no_whole_number_of_samples_is_refused_for_crops():
    odd = Echo(0, 0)
    odd.sample_rate = 8100
    with pytest.raises(CodecError, match="--loss_seconds"):
        load_network(odd).samples_per_frame


def test_mixtures_beyond_the_threshold_leave_the_step():
    assert keep_hard(torch.tensor([-31.0, -29.0, -30.0, 3.0])).tolist() == [-29.0, 3.0]


# Data -----------------------------------------------------------------------------------------------------------------


def same(a, b) -> bool:
    return a["name"] == b["name"] and np.array_equal(a["mixture"], b["mixture"])


def test_mixtures_are_a_pure_function_of_seed_epoch_and_index():
    first, second = (SpeakerMixtures(SPEECH, 8000, 1.0, 50, seed=3, speeds=(90, 100, 110)) for _ in range(2))
    later = [second[i] for i in (7, 0, 31)]  # in another order
    assert all(same(first[i], item) for i, item in zip((7, 0, 31), later))
    assert not same(first[7], first[8])
    assert same(first[7], second[0, 7]) and not same(first[7], second[1, 7]) and same(first[1, 7], second[1, 7])
    assert not same(first[7], SpeakerMixtures(SPEECH, 8000, 1.0, 50, seed=4)[7])


def test_mixtures_are_the_sum_of_different_speakers_within_the_level_range():
    data = SpeakerMixtures(SPEECH, 8000, 1.0, 40, n_speakers=3)
    differences = []
    for index in range(40):
        item = data[index]
        assert item["mixture"].shape == (8000,) and item["sources"].shape == (3, 8000)
        assert len(set(item["name"].split("_"))) == 3
        assert np.allclose(item["sources"].sum(0), item["mixture"], atol=1e-6)
        assert np.abs(item["mixture"]).max() <= 0.9001
        levels = 20 * np.log10(item["sources"].std(-1))
        differences.append(levels.max() - levels.min())
    assert 0 <= min(differences) < 1 and 4 < max(differences) <= 5.001


def write_tone(path, hertz, rate=8000, seconds=3.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate), rate)


def test_speed_and_rate_change_pitch_as_they_should(tmp_path):
    write_tone(tmp_path / "a" / "x.wav", 400, rate=8000)
    write_tone(tmp_path / "b" / "y.wav", 400, rate=22050)
    item = SpeakerMixtures(tmp_path, 8000, 2.0, 1, speeds=(125,))[0]
    for source in item["sources"]:
        spectrum = np.abs(np.fft.rfft(source * np.hanning(16000)))
        assert spectrum.argmax() / 2 == pytest.approx(500, abs=1)


def test_ranks_share_out_each_update_without_overlap():
    def batches(rank, world, batch_size, start=15 * 8):  # 1000 // 66 updates an epoch: this is in the eighth
        sampler = train.Batches(1000, None, 0, rank, (2, world, batch_size))
        sampler.start = start
        return list(sampler)

    whole, ranks = batches(0, 1, 6), [batches(rank, 2, 3) for rank in range(2)]
    assert whole and {epoch for batch in whole for epoch, _ in batch} == {120 // 83}
    for k, batch in enumerate(whole):
        assert not set(ranks[0][k]) & set(ranks[1][k]) and sorted(ranks[0][k] + ranks[1][k]) == sorted(batch)
    assert len({i for batch in whole for i in batch}) == len(whole) * 6
    assert batches(0, 2, 3, start=83) != batches(0, 2, 3, start=166)
    assert batches(0, 2, 3, start=85) == batches(0, 2, 3, start=83)[4:]
    part = train.Batches(1000, 50, 0, 0, (1, 1, 10))  # another part of a fixed set in every epoch
    first = [index for batch in part for _, index in batch]
    assert len(set(first)) == 50 and max(first) > 500
    assert train.Batches(1000, 2000, 0, 0, (1, 1, 10)).updates == 100  # there are no more
    with pytest.raises(SettingsError, match="less than one update"):
        train.Batches(1000, 5, 0, 0, (1, 1, 10))


def test_a_fixed_set_reads_back_sample_exact(tmp_path):
    mixtures = SpeakerMixtures(SPEECH, 8000, 1.0, 4, seed=1)
    write_fixed_set(mixtures, tmp_path / "set")
    fixed = FixedMixtures(tmp_path / "set", 8000)
    assert len(fixed) == 4 and fixed.n_speakers == 2
    for index in range(4):
        item, original = fixed[index], mixtures[index]
        assert np.array_equal(item["sources"].sum(0), item["mixture"])
        assert np.abs(item["sources"] - original["sources"]).max() <= 0.5001 / 32768
    cut = FixedSegments(tmp_path / "set", 8000, 0.5, speeds=(80, 100, 125))
    assert np.allclose(cut[2]["sources"].sum(0), cut[2]["mixture"], atol=1e-6)
    assert cut[2]["mixture"].shape == (4000,) and same(cut[2], cut[0, 2]) and not same(cut[0, 2], cut[1, 2])
    assert [item.stem[:4] for item in FixedMixtures(tmp_path / "set", 8000, size=2).files] == ["0000", "0003"]
    with pytest.raises(DataError, match="exists already"):
        write_fixed_set(mixtures, tmp_path / "set")
    full = OSError(28, "No space left on device")
    with mock.patch.object(sf, "write", side_effect=full), pytest.raises(DataError, match="can't write .*No space"):
        write_fixed_set(mixtures, tmp_path / "more")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]  # not even a half of it


@pytest.mark.parametrize("mix_folder", ["mix", "mix_both"])
def test_noise_of_a_fixed_set_stays_whatever_the_speed(tmp_path, mix_folder):
    rng = np.random.default_rng(0)
    s1, s2, noise = rng.uniform(-0.2, 0.2, (3, 8000))
    for folder, signal in (("s1", s1), ("s2", s2), (mix_folder, s1 + s2 + noise)):
        (tmp_path / folder).mkdir()
        sf.write(tmp_path / folder / "a.wav", signal, 8000, subtype="FLOAT")
    for speed in (80, 100, 125):
        item = FixedSegments(tmp_path, 8000, 0.5, speeds=(speed,))[0]
        rest = item["mixture"] - item["sources"].sum(0)
        assert any(np.allclose(rest, noise[k : k + 4000], atol=1e-5) for k in range(4001))


def bad_recordings(folder: Path) -> list[Path]:
    tone = (0.1 * np.sin(np.arange(8000))).astype(np.float32)
    sf.write(folder / "whole.wav", tone, 8000)
    whole = (folder / "whole.wav").read_bytes()
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("no audio here")
    (folder / "truncated.flac").write_bytes(
        (SPEECH.parent.parent / "test_mixtures" / "s1").glob("*").__next__().read_bytes()[:9000]
    )
    (folder / "header_only.wav").write_bytes(whole[:44])
    for name, value in (("nan.wav", np.nan), ("inf.wav", np.inf)):
        broken = tone.copy()
        broken[100] = value
        sf.write(folder / name, broken, 8000, subtype="FLOAT")
    sf.write(folder / "short.wav", tone[:799], 8000)
    names = "empty.wav text.wav truncated.flac header_only.wav nan.wav inf.wav short.wav missing.wav".split()
    return [folder / name for name in names]


def test_bad_folders_are_refused(tmp_path):
    (tmp_path / "one" / "speaker").mkdir(parents=True)
    write_tone(tmp_path / "one" / "speaker" / "x.wav", 300)
    for folder in (tmp_path / "one", tmp_path / "nowhere"):
        with pytest.raises(DataError):
            SpeakerMixtures(folder, 8000, 1.0, 1)
    with pytest.raises(DataError, match="s1 and s2"):
        FixedMixtures(tmp_path / "one", 8000)
    for folder in ("mix", "s1", "s2"):
        write_tone(tmp_path / "set" / folder / "x.wav", 300, rate=8000 if folder != "s2" else 16000)
    with pytest.raises(DataError, match="16000 Hz"):
        FixedMixtures(tmp_path / "set", 8000)[0]
    with pytest.raises(DataError, match="8000 Hz, the model works at 16000"):
        FixedMixtures(tmp_path / "set", 16000)
    with pytest.raises(DataError, match="2 speakers a mixture, not 3"):
        FixedMixtures(tmp_path / "set", 8000, n_speakers=3)
    sf.write(tmp_path / "set" / "s2" / "x.wav", np.ones(6999), 8000)
    with pytest.raises(DataError, match="s2/x.wav has 6999 samples, its mixture 24000"):
        FixedMixtures(tmp_path / "set", 8000)[0]
    (tmp_path / "set" / "s2" / "x.wav").unlink()
    with pytest.raises(DataError, match="missing"):
        FixedMixtures(tmp_path / "set", 8000)


def test_what_is_no_folder_of_speakers_is_not_taken_for_one(tmp_path):
    for folder in ("mixtures", "s1", "s2"):
        write_tone(tmp_path / folder / "x.wav", 300)
    for _ in range(2):
        with pytest.raises(DataError, match="mix or mix_clean or mix_both"):
            open_mixtures(tmp_path, 8000, True, seconds=1.0)
        shutil.rmtree(tmp_path / "mixtures", ignore_errors=True)
    for root, split in ((SPEECH.parent, "train"), (tmp_path / "LibriSpeech", "dev-clean")):  # one level too high
        for folder in ("dev-clean", "train-clean-100"):
            write_tone(tmp_path / "LibriSpeech" / folder / "19" / "198" / "19-198-0000.flac", 300)
        with pytest.raises(DataError, match=f"holds {split}, which is no speaker"):
            open_mixtures(root, 8000, True, seconds=1.0)


def test_settings_that_do_not_apply_to_a_set_are_refused(tmp_path):
    write_fixed_set(SpeakerMixtures(SPEECH, 8000, 0.5, 2), tmp_path / "set")
    with pytest.raises(DataError, match="a fixed set, to which --noise doesn't apply"):
        open_mixtures(tmp_path / "set", 8000, True, seconds=0.5, noise=SPEECH)
    with pytest.raises(DataError, match="a folder of speakers, to which --mix_folder doesn't apply"):
        open_mixtures(SPEECH, 8000, True, seconds=0.5, mix_folder="mix")
    assert len(open_mixtures(tmp_path / "set", 8000, True, seconds=0.5, noise=None, size=1)) == 2
    assert len(open_mixtures(tmp_path / "set", 8000, False, noise=SPEECH, size=1)) == 1  # validation: of both kinds


def test_what_was_found_is_said(tmp_path):
    for name, seconds in (("a/x.wav", 1800), ("b/y.wav", 5400)):
        (tmp_path / name).parent.mkdir()
        sf.write(tmp_path / name, np.zeros(seconds * 100), 100)
    (tmp_path / "a" / "x.wv1").touch()
    (tmp_path / "README").touch()
    expected = f"{tmp_path}: 2 speakers, 2 files, 2.00 h; 2 file(s) of other kinds passed over"
    assert SpeakerMixtures(tmp_path, 8000).found == expected
    write_fixed_set(SpeakerMixtures(SPEECH, 8000, 36.0, 2), tmp_path / "set")
    assert FixedMixtures(tmp_path / "set", 8000).found == f"{tmp_path}/set/mix_clean: 2 mixtures of 2 speakers, 0.02 h"


def program(name, monkeypatch, *arguments):
    """Runs a program's or recipe's main in this process, as if started with those arguments."""
    module = sys.modules.get(name) or __import__(name, fromlist=["main"])
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    module.main()


def level_db(signal) -> float:
    return 10 * np.log10(np.mean(np.square(signal, dtype=np.float64)))


def p56_level(amplitude, on, pause) -> tuple[float, float]:
    """P.56 level and activity of a sine of `on` s and then silence of `pause` s, from the formula of its envelope."""

    level = 10 * np.log10(amplitude**2 / 2)
    for _ in range(20):  # the level depends on the active time, and that on the level
        share = 10 ** ((level - 15.9) / 20) / (2 * amplitude / np.pi)
        # The envelope, two 30 ms averages, goes as 1 - (1 + u) e^-u up and as (1 + u) e^-u down.
        rise = 0.03 * brentq(lambda u: 1 - (1 + u) * np.exp(-u) - share, 0, 50)
        fall = 0.03 * brentq(lambda u: (1 + u) * np.exp(-u) - share, 0, 50)
        active = on - rise + min(fall + 0.2, pause)
        level = 10 * np.log10(amplitude**2 / 2 * on / active)
    return level, active / (on + pause)


@pytest.mark.parametrize("rate", [8000, 16000])
@pytest.mark.parametrize("amplitude, on, pause", [(0.3, 2.0, 1.0), (0.001, 0.5, 0.6), (20.0, 1.0, 4.0)])
def test_active_speech_level_closed_form(rate, amplitude, on, pause):
    time = np.arange(round((on + pause) * rate)) / rate
    audio = np.tile(amplitude * np.sin(2 * np.pi * 997 * time) * (time < on), 6)
    level, activity = active_speech_level(audio, rate)
    expected = p56_level(amplitude, on, pause)
    assert level == pytest.approx(expected[0], abs=0.02) and activity == pytest.approx(expected[1], abs=0.002)
    assert level > level_db(audio) + 0.5  # the plain mean power wouldn't do


def test_active_speech_level_between_two_thresholds():
    """A sine that dies away by e every second: its envelope is the same line in dB all the way."""
    time = np.arange(48000) / 8000
    for amplitude in 10 ** (np.arange(0, 3.5, 0.5) / 20):  # thresholds lie 3 dB apart
        level = 10 * np.log10(amplitude**2 / 4)
        for _ in range(20):
            start = 2 * amplitude / np.pi / (1 - 0.03) ** 2  # of the envelope, by the gain of its two averages
            active = np.log(start / 10 ** ((level - 15.9) / 20)) + 0.2
            level = 10 * np.log10(amplitude**2 / 4 / active)
        audio = amplitude * np.exp(-time) * np.sin(2 * np.pi * 997 * time)
        assert active_speech_level(audio, 8000)[0] == pytest.approx(level, abs=0.1)  # 0.04 of it: the start


def test_active_speech_level_of_silence_and_of_a_click():
    assert active_speech_level(np.zeros(8000), 8000) == (-math.inf, 0.0)
    assert all(np.isfinite(active_speech_level(np.eye(1, 8000)[0], 8000)))


def shorten(samples) -> bytes:
    """A Shorten 2 stream (Robinson, CUED/F-INFENG/TR.156) of blocks without prediction."""

    def uvar(value, k):
        return "0" * (value >> k) + "1" + (format(value & ((1 << k) - 1), f"0{k}b") if k else "")

    def ulong(value):
        return uvar(value.bit_length(), 2) + uvar(value, value.bit_length())

    bits = [ulong(value) for value in (5, 1, 256, 0, 0, 0)]  # 16 bits low byte first, 1 channel, blocks of 256
    for start in range(0, len(samples), 256):
        block = [int(s) for s in samples[start : start + 256]]
        bits += [uvar(5, 2) + ulong(len(block))] if len(block) < 256 else []
        bits += [uvar(0, 2) + uvar(11, 3), *(uvar(2 * s if s >= 0 else -2 * s - 1, 12) for s in block)]
    bits = "".join([*bits, uvar(4, 2)])
    return b"ajkg\2" + int(bits.ljust(-len(bits) % 8 + len(bits), "0"), 2).to_bytes(-(-len(bits) // 8), "big")


def write_sphere(path, audio, compressed):
    samples = np.round(audio * 32767).astype(np.int16)
    head = f"NIST_1A\n   1024\nsample_count -i {len(samples)}\nsample_rate -i 16000\nchannel_count -i 1\n"
    head += f"sample_n_bytes -i 2\nsample_byte_format -s2 {'01' if compressed else '10'}\nsample_coding "
    head += "-s26 pcm,embedded-shorten-v2.00\nend_head\n" if compressed else "-s3 pcm\nend_head\n"
    path.write_bytes(head.encode().ljust(1024) + (shorten(samples) if compressed else samples.astype(">i2").tobytes()))


TONES = {"01aa010b": (440, 0.5, 2.0, 0.0), "209a010p": (700, 0.05, 1.0, 1.5), "053o020f": (440, -0.2, 2.5, 0.5)}


@pytest.fixture
def wsj0(tmp_path) -> Path:
    """Three tones as WSJ0 may lie on a disk, the first compressed by Shorten and with a louder hum of 50 Hz."""
    for (name, (hertz, amplitude, on, pause)), suffix in zip(TONES.items(), (".wv1", ".WV1", ".wav")):
        time = np.arange(round((on + pause) * 16000)) / 16000
        audio = amplitude * np.sin(2 * np.pi * hertz * time) * (time < on)
        path = tmp_path / "disc" / "wsj0" / "si_tr_s" / name[:3] / (name + suffix)
        path.parent.mkdir(parents=True)
        if suffix == ".wav":
            sf.write(path, audio, 16000)
        else:
            hum = 0.7 * np.sin(2 * np.pi * 50 * time) * (name == "01aa010b")
            write_sphere(path, 0.8 * (audio + hum), compressed=suffix == ".wv1")
    (tmp_path / "lists").mkdir()
    paths = [f"wsj0/si_tr_s/{name[:3]}/{name}.wav" for name in TONES]
    lines = [f"{paths[0]} 0.97482 {paths[1]} -0.97482", f"{paths[2]} 0.0597142 {paths[0]} -0.0597142"]
    (tmp_path / "lists" / "mix_2_spk_tr.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "lists" / "mix_3_spk_tt.txt").write_text(f"{paths[0]} 2.5 {paths[1]} 0 {paths[2]} -2.5\n")
    return tmp_path


def test_wsj0_mixtures_follow_the_published_recipe(wsj0, monkeypatch):
    rates_and_modes = "--sample_rate", 8000, 16000, "--mode", "min", "max"
    for root in ("disc", "disc/wsj0"):
        out = wsj0 / f"out of {root.replace('/', '_')}"
        folders = "--wsj0", wsj0 / root, "--lists", wsj0 / "lists", "--out", out
        program("recipes.wsj0_mix", monkeypatch, *folders, *rates_and_modes)
    expected = {  # names as published: five digits of the level
        "2speakers/{}/{}/tr": ["01aa010b_0.97482_209a010p_-0.97482", "053o020f_0.059714_01aa010b_-0.059714"],
        "3speakers/{}/{}/tt": ["01aa010b_2.5_209a010p_0_053o020f_-2.5"],
    }
    for rate, mode, (folder, names) in itertools.product((8000, 16000), ("min", "max"), expected.items()):
        folder = out / folder.format(f"wav{rate // 1000}k", mode)
        fixed = FixedMixtures(folder, rate)
        assert [item["name"] for item in fixed] == names and fixed.n_speakers == int(folder.parts[-4][0])
        assert {p.name for p in folder.iterdir()} == {"mix", *(f"s{k + 1}" for k in range(fixed.n_speakers))}
        for item in fixed:
            parts = item["name"].split("_")
            tones = [TONES[name] for name in parts[::2]]
            assert len(item["mixture"]) == {"min": min, "max": max}[mode](on + off for *_, on, off in tones) * rate
            assert np.abs(item["sources"].sum(0) - item["mixture"]).max() <= 2 / 32768
            assert max(np.abs(item["sources"]).max(), np.abs(item["mixture"]).max()) == round(0.9 * 32768) / 32768
            levels = []
            for source, (hertz, _, on, pause) in zip(item["sources"], tones):
                wave = np.exp(-2j * np.pi * hertz * np.arange(rate) / rate)
                amplitude = 2 * np.abs(np.mean(source[:rate] * wave))  # its hum has no part in this
                levels.append(p56_level(amplitude, on, pause)[0])
            wanted = [float(level) for level in parts[1::2]]
            assert np.subtract(levels, levels[0]) == pytest.approx(np.subtract(wanted, wanted[0]), abs=0.1)


@pytest.mark.parametrize(
    "line, message",
    [
        ("wsj0/si_tr_s/01a/01aa010b.wav 1.0 wsj0/si_tr_s/209/209a010z.wav -1.0", "209a010z.wav is missing below"),
        ("wsj0/si_tr_s/01a/01aa010b.wav 1.0 wsj0/si_tr_s/209/209a010p.wav", "line 3, isn't 2 times"),
        ("wsj0/si_tr_s/01a/01aa010b.wav loud wsj0/si_tr_s/209/209a010p.wav soft", "line 3, isn't 2 times"),
        ("wsj0/si_tr_s/01a/01aa010b.wav nan wsj0/si_tr_s/209/209a010p.wav 0", "line 3, isn't 2 times"),
        ("wsj0/si_tr_s/01a/01aa010b.wav 0 wsj0/si_tr_s/053/silent.wav 0", "silent.wav is silent"),
        ("wsj0/si_tr_s/01a/01aa010b.wav 0 wsj0/si_tr_s/053/broken.wav 0", "can't read .*broken.wv1"),
    ],
)
def test_wsj0_mistakes_are_named_and_leave_nothing_behind(wsj0, monkeypatch, line, message):
    folder = wsj0 / "disc" / "wsj0" / "si_tr_s" / "053"
    sf.write(folder / "silent.wav", np.zeros(16000), 16000)
    write_sphere(folder / "broken.wv1", np.ones(16000), compressed=True)
    (folder / "broken.wv1").write_bytes((folder / "broken.wv1").read_bytes()[:5000])
    with open(wsj0 / "lists" / "mix_2_spk_tr.txt", "a") as file:
        file.write(line + "\n")
    folders = "--wsj0", wsj0 / "disc", "--out", wsj0 / "out"
    with pytest.raises(DataError, match=message) as caught:
        program("recipes.wsj0_mix", monkeypatch, *folders, "--lists", wsj0 / "lists")
    assert "\n" not in str(caught.value) and sorted(p.name for p in wsj0.iterdir()) == ["disc", "lists"]
    with pytest.raises(DataError, match="holds no lists"):
        program("recipes.wsj0_mix", monkeypatch, *folders, "--lists", wsj0 / "disc")


def test_wsj0_as_it_ships_becomes_a_folder_of_speakers(wsj0, monkeypatch):
    with pytest.raises(DataError, match="1 speaker folder"):  # wv1 isn't read on the fly
        SpeakerMixtures(wsj0 / "disc", 8000)
    program("recipes.wsj0_mix", monkeypatch, "--wsj0", wsj0 / "disc", "--speakers", "--out", wsj0 / "speakers")
    speakers = data.list_speakers(wsj0 / "speakers")
    assert {name: [p.name for p in files] for name, files in speakers.items()} == {
        "01a": ["si_tr_s_01aa010b.flac"], "053": ["si_tr_s_053o020f.flac"], "209": ["si_tr_s_209a010p.flac"]
    }  # fmt: skip
    audio, rate = read_audio(speakers["209"][0])
    original, _ = wsj0_mix.read_utterance(wsj0 / "disc" / "wsj0" / "si_tr_s" / "209" / "209a010p.WV1")
    assert rate == 16000 and np.array_equal(audio, original)


def test_librimix_is_read_with_and_without_noise(tmp_path):
    """As create_librimix_from_metadata.py lays it out."""
    root = tmp_path / "Libri2Mix" / "wav8k" / "min" / "test"
    for k, length in enumerate((8000, 6000, 7000)):
        s1, s2, noise = np.random.default_rng(k).integers(-9000, 9000, (3, length)).astype(np.int16)
        signals = {"s1": s1, "s2": s2, "noise": noise, "mix_clean": s1 + s2, "mix_both": s1 + s2 + noise}
        for folder, signal in signals.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            sf.write(root / folder / f"{k}-a_{k}-b.wav", signal, 8000, subtype="PCM_16")
    read = lambda folder, name: read_audio(root / folder / f"{name}.wav")[0]  # noqa: E731
    clean, both = FixedMixtures(root, 8000), FixedMixtures(root, 8000, mix_folder="mix_both")
    assert [len(item["mixture"]) for item in clean] == [8000, 6000, 7000] and clean.n_speakers == 2
    for a, b in zip(clean, both):
        assert np.array_equal(a["mixture"], a["sources"].sum(0)) and np.array_equal(a["sources"], b["sources"])
        assert np.array_equal(b["mixture"], b["sources"].sum(0) + read("noise", b["name"]))
    (root / "s1" / "extra.wav").touch()  # nothing asks for it
    assert len(FixedMixtures(root, 8000)) == 3


def test_a_recording_that_cannot_be_searched_is_read_from_its_start(tmp_path):
    tone = 0.3 * np.sin(0.3 * np.arange(16000))
    sf.write(tmp_path / "tone.gsm", tone, 8000, format="RAW", subtype="GSM610")
    audio, rate = read_audio(tmp_path / "tone.gsm")
    assert rate == 8000 and len(audio) == 16000 and np.corrcoef(audio, tone)[0, 1] > 0.99


def test_voices_of_one_kind_never_come_in_two_splits():
    testing = {voice.split("_")[1] for voice in debian_speech.VOICES if voice.startswith("ktuberling")}
    readers = {voice.split("_")[1] for voice in debian_speech.MORE_VOICES if voice.startswith("klettres")}
    assert len(testing) == 13 and len(readers) == 9 and not testing & readers  # both are read by KDE's people
    assert not debian_speech.VOICES.keys() & debian_speech.MORE_VOICES.keys()
    assert debian_speech.VALID_VOICES < debian_speech.VOICES.keys()


def test_librispeech_speakers_set_apart_are_never_trained_on(tmp_path, monkeypatch):
    valid, test = set(librispeech.VALID), set(librispeech.TEST)
    assert len(valid) == len(test) == 20 and not valid & test
    for speaker in (*valid, *test, "19", "26"):
        write_tone(tmp_path / "in" / speaker / "1" / f"{speaker}-1-0000.flac", 300, rate=16000, seconds=0.1)
    (tmp_path / "in" / "SPEAKERS.TXT").touch()
    program("recipes.librispeech", monkeypatch, "--librispeech", tmp_path / "in", "--out", tmp_path / "out")
    found = {split: set(data.list_speakers(tmp_path / "out" / split)) for split in ("train", "valid", "test")}
    assert found == {"train": {"19", "26"}, "valid": valid, "test": test}
    assert sf.info(tmp_path / "out" / "train" / "19" / "19-1-0000.flac").samplerate == 8000
    shutil.rmtree(tmp_path / "in" / "254")
    with pytest.raises(DataError, match="lacks 1 of the 40 speakers set apart, 254"):
        librispeech.build(tmp_path / "in", tmp_path / "again")


def write_noise(folder, n=3, seconds=0.3):
    for k in range(n):  # short, stereo and in subfolders, like WHAM!'s
        path = folder / "tr" / f"{k}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, np.random.default_rng(k).normal(0, 0.1, (round(seconds * 16000), 2)), 16000)
    return folder


@pytest.mark.parametrize("rate", [8000, 16000])
def test_noise_is_mixed_at_the_chosen_snr_and_only_into_the_mixture(tmp_path, rate):
    noise = write_noise(tmp_path / "noise")

    def snr(item):
        speech = item["sources"].sum(0)
        return level_db(speech) - level_db(item["mixture"] - speech)

    for n_speakers in (2, 5):
        clean = SpeakerMixtures(SPEECH, rate, 0.5, 20, n_speakers=n_speakers)
        exact, spread = (
            SpeakerMixtures(SPEECH, rate, 0.5, 20, n_speakers=n_speakers, noise=noise, snr=snr)
            for snr in ((5, 5), (-6, 3))
        )
        assert all(snr(exact[k]) == pytest.approx(5, abs=1e-3) for k in range(5))
        spread_snr = [snr(spread[k]) for k in range(20)]
        assert -6.001 <= min(spread_snr) < -4 and 1 < max(spread_snr) <= 3.001
        a, b = clean[3], spread[3]
        gain = np.linalg.norm(b["sources"]) / np.linalg.norm(a["sources"])
        assert a["name"] == b["name"] and len(set(a["name"].split("_"))) == n_speakers == len(b["sources"])
        assert np.allclose(a["sources"] * gain, b["sources"], atol=1e-5) and same(b, spread[3])
        assert b["mixture"].shape == (rate // 2,) and np.abs(b["mixture"]).max() <= 0.9001


def test_a_noisy_fixed_set_reads_back_sample_exact(tmp_path, monkeypatch):
    noise = write_noise(tmp_path / "noise")
    settings = "--sample_rate 16000 --n 3 --seconds 0.5 --n_speakers 3 --snr -2 4".split()
    program("recipes.mix", monkeypatch, "--speech", SPEECH, "--noise", noise, "--out", tmp_path / "set", *settings)
    original = SpeakerMixtures(SPEECH, 16000, 0.5, 3, n_speakers=3, noise=noise, snr=(-2, 4))
    fixed = FixedMixtures(tmp_path / "set", 16000)
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == ["mix_both", "noise", "s1", "s2", "s3"]
    for item, wanted, path in zip(fixed, original, sorted((tmp_path / "set" / "noise").iterdir())):
        assert np.array_equal(item["mixture"], item["sources"].sum(0) + read_audio(path)[0])
        assert np.abs(item["sources"] - wanted["sources"]).max() <= 0.5001 / 32768
        assert np.abs(item["mixture"] - wanted["mixture"]).max() <= 2.001 / 32768
    assert len(fixed) == 3


def test_wrong_noise_and_numbers_of_speakers_are_refused(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    sf.write(tmp_path / "silent.wav", np.zeros(8000), 8000)
    for settings, message in (
        (dict(noise=tmp_path / "empty"), "empty holds no wav"),
        (dict(noise=tmp_path, snr=(3, -6)), "from low to high"),
        (dict(n_speakers=6), "2 to 5"),
        (dict(n_speakers=1), "2 to 5"),
    ):
        with pytest.raises(DataError, match=message):
            SpeakerMixtures(SPEECH, 8000, 0.5, 1, **settings)
    with pytest.raises(DataError, match="20 segments of the noise in a row were silent"):
        SpeakerMixtures(SPEECH, 8000, 0.5, 1, noise=tmp_path)[0]
    with pytest.raises(DataError, match="needs --noise"):
        program("recipes.mix", monkeypatch, "--speech", SPEECH, "--out", tmp_path / "set", "--snr", 0, 5)


def test_broken_headers_are_named_when_the_folder_is_opened(tmp_path):
    for voice in ("a", "b"):
        write_tone(tmp_path / voice / "x.wav", 300)
    (tmp_path / "a" / "broken.wav").write_text("no audio here")
    sf.write(tmp_path / "b" / "empty.wav", np.zeros(0), 8000)
    with pytest.raises(DataError, match=r"a/broken.wav as audio .*, nor 1 more: ") as caught:
        SpeakerMixtures(tmp_path, 8000, 1.0, 1)
    assert "\n" not in str(caught.value)


def test_latents_of_a_set_are_its_own_and_train_as_fresh_ones_do(tmp_path, codec):
    write_fixed_set(SpeakerMixtures(SPEECH, 8000, 0.5, 6), tmp_path / "set")
    write_latents(FixedMixtures(tmp_path / "set", 8000), codec, tmp_path / "latents")
    flags = ["--speeds", 100, "--epochs", 2, "--batch_size", 3, "--seconds", 0.5, "--valid", tmp_path / "set"]
    run_train("--out", tmp_path / "fresh", "--data", tmp_path / "set", *flags)
    run_train("--out", tmp_path / "written", "--data", tmp_path / "latents", *flags)
    fresh, written = ([float(r["loss"]) for r in logged(tmp_path / run, "steps.csv")] for run in ("fresh", "written"))
    assert len(fresh) == 4 and fresh == pytest.approx(written, abs=0.01)
    with pytest.raises(DataError, match="exists already"):  # another set's latents are never mixed with these
        write_latents(FixedMixtures(tmp_path / "set", 8000), codec, tmp_path / "latents")
    broken = sorted((tmp_path / "latents").glob("*.npy"))[2]
    broken.write_bytes(broken.read_bytes()[:500])  # left out like a broken recording
    sorted((tmp_path / "latents").glob("*.npy"))[4].write_bytes(b"")
    run_train("--out", tmp_path / "broken", "--data", tmp_path / "latents", *flags)
    assert int(logged(tmp_path / "broken")[-1]["broken"]) == 4
    for wrong, message in (
        (["--loss", "si_sdr"], "use --codec so and --loss embedding"),
        (["--speeds", 90, 100], "give --speeds 100"),
        (["--valid", tmp_path / "latents"], "can't be scored"),
        (["--n_speakers", 3], "is of 2 speakers at 8000 Hz"),
    ):
        with pytest.raises((SettingsError, DataError), match=message):
            run_train("--out", tmp_path / "wrong", "--data", tmp_path / "latents", *flags, *wrong)


# The programs ---------------------------------------------------------------------------------------------------------


SHORT = "--d_model 16 --n_layers 1 --n_heads 2 --d_ffn 32 --seconds 0.5 --valid_size 2 --workers 0".split()


def run(*command):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=HERE, timeout=240)


def run_train(*flags):
    train.train(*parse_args([*SHORT, *map(str, flags)]))


def logged(folder, name="log.csv") -> list[dict]:
    with open(folder / name) as file:
        return list(csv.DictReader(file))


def weights_of(folder) -> dict:
    return torch.load(folder / "last.pt", weights_only=True)["model"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A separator trained for two updates."""
    out = tmp_path_factory.mktemp("run") / "r"
    run_train("--out", out, "--epochs", 2, "--epoch_size", 4, "--batch_size", 4)
    return out


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    out = tmp_path_factory.mktemp("set") / "set"
    write_fixed_set(SpeakerMixtures(SPEECH.parent / "valid", 8000, 1.0, 3), out)
    return out


@pytest.fixture
def scored_here(monkeypatch):
    """Scores in this process, which spares the tests the start of others; holds how many were asked for."""
    asked = []
    monkeypatch.setattr(evaluate, "ProcessPoolExecutor", lambda n, *_: asked.append(n) or ThreadPoolExecutor(1))
    return asked


def test_a_run_repeats_and_resumes_to_the_same_weights(tmp_path, monkeypatch, curves):
    monkeypatch.setattr(train, "draw", curves)
    flags = ["--epoch_size", 8, "--batch_size", 4, "--epochs", 2]
    run_train("--out", tmp_path / "a", *flags)
    run_train("--out", tmp_path / "b", *flags)
    save_last, calls = checkpoint.RunFolder.save_last, []

    def killed_in_the_second_epoch(folder, state):
        save_last(folder, state)
        calls.append(state["progress"]["done"])
        if calls[-1] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint.RunFolder, "save_last", killed_in_the_second_epoch)
        run_train("--out", tmp_path / "c", *flags, "--save_every", 1)
    train.train(*parse_args(["--resume", "--out", str(tmp_path / "c")]))
    a, b, c = (weights_of(tmp_path / x) for x in "abc")
    for other in (b, c):
        assert all(torch.equal(a[k], other[k]) for k in a)
    for name in ("steps.csv", "log.csv"):
        one, other = logged(tmp_path / "a", name), logged(tmp_path / "c", name)
        for row in (*one, *other):
            row.pop("seconds", None), row.pop("mixtures_per_second", None)
        assert one == other
    assert (tmp_path / "a" / "curves.png").stat().st_size > 5000


def test_a_resumed_run_takes_every_setting_from_its_checkpoint(tmp_path, capsys, damaged):
    out = tmp_path / "r"
    flags = ["--loss", "si_sdr", "--lr", 3e-4, "--threshold", -20, "--data", damaged, "--epoch_size", 8]
    run_train("--out", out, *flags, "--batch_size", 2, "--accumulate", 2, "--epochs", 1)
    resume = lambda *more: train.train(*parse_args(["--resume", "--out", str(out), *map(str, more)]))  # noqa: E731
    for change, message in (
        (["--lr", 1e-3], "--lr of the run in --out, 0.0003, can't change"),
        (["--loss", "embedding"], "--loss of the run in --out, si_sdr"),
        (["--d_model", 32], "--d_model of the run in --out, 16"),
        (["--batch_size", 3], "--batch_size 3 and --accumulate 2 make 6 mixtures an update, the run has 4"),
    ):
        with pytest.raises(SettingsError, match=re.escape(message)):
            resume(*change)
    capsys.readouterr()
    resume("--batch_size", 4, "--accumulate", 1, "--epochs", 2, "--save_every", 7, "--lr", 3e-4)
    printed = capsys.readouterr().out
    assert "--epochs 2 in place of 1, over which the cosine now falls" in printed
    assert "--save_every 7 in place of 200" in printed and "--lr" not in printed and "--threshold" not in printed
    saved, written = load_checkpoint(out / "best.pt")["args"], json.loads((out / "args.json").read_text())
    for args in (saved, written):
        assert (args["loss"], args["lr"], args["data"], args["threshold"]) == ("si_sdr", 3e-4, str(damaged), -20)
        assert (args["batch_size"], args["epochs"]) == (4, 2)
    assert [int(row["step"]) for row in logged(out)] == [0, 2, 4]


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
def test_a_smoke_run_ends_where_it_is_told_and_goes_on_as_if_it_had_not(schedule, tmp_path, monkeypatch):
    flags = ["--epoch_size", 12, "--batch_size", 4, "--epochs", 2, "--warmup", 4, "--schedule", schedule]
    flags += ["--plateau_start", 0, "--patience", 1]
    if schedule == "plateau":  # no gain: the rate is halved after two epochs, wherever else it was validated
        monkeypatch.setattr(train, "validate", lambda run, folder: 5.0)
    run_train("--out", tmp_path / "whole", *flags)
    run_train("--out", tmp_path / "part", *flags, "--max_steps", 2)
    assert [(r["epoch"], r["step"]) for r in logged(tmp_path / "part")] == [("0", "0"), ("0", "2")]
    with pytest.raises(SettingsError, match="has ended after 2 updates"):
        train.train(*parse_args(["--resume", "--out", str(tmp_path / "part")]))
    with pytest.raises(SettingsError, match="raise --max_steps"):  # raising the epochs would change nothing
        train.train(*parse_args(["--resume", "--out", str(tmp_path / "part"), "--epochs", "3"]))
    train.train(*parse_args(["--resume", "--out", str(tmp_path / "part"), "--max_steps", "100"]))
    whole, part = (logged(tmp_path / name, "steps.csv") for name in ("whole", "part"))
    assert len(whole) == 6 and whole == part
    rates = [float(row["lr"]) for row in whole]
    expected = [1e-3 * (s + 1) / 4 * (0.01 + 0.495 * (1 + math.cos(math.pi * s / 6))) for s in range(3)]
    assert rates[:3] == pytest.approx(expected if schedule == "cosine" else [1e-3] * 3)


def test_a_run_without_mixed_precision_is_resumed_with_it(tmp_path, monkeypatch):
    """As where a run of a CPU goes on on a GPU that only has fp16, whose losses are scaled."""
    run_train("--out", tmp_path / "r", "--epoch_size", 4, "--batch_size", 4, "--epochs", 1)
    monkeypatch.setattr(train, "mixed_precision", lambda *_: torch.float16)
    for epochs in (2, 3):  # and then with a scaler's state
        train.train(*parse_args(["--resume", "--out", str(tmp_path / "r"), "--epochs", str(epochs)]))
    scaler = torch.load(tmp_path / "r" / "last.pt", weights_only=True)["scaler"]
    assert scaler["scale"] > 1 and scaler["_growth_tracker"] == 2


def test_workers_that_outlive_an_epoch_make_other_mixtures_in_the_next(tmp_path):
    flags = ["--epoch_size", 6, "--batch_size", 3, "--epochs", 2]
    run_train("--out", tmp_path / "0", *flags)
    run_train("--out", tmp_path / "2", *flags, "--workers", 2)
    here, there = (logged(tmp_path / name, "steps.csv") for name in "02")
    assert here == there
    dataset = train.SkipBroken(SpeakerMixtures(SPEECH, 8000, 0.5, 6))
    assert not same(dataset[0, 1], dataset[1, 1])


def test_an_error_that_nobody_foresaw_ends_the_run_and_its_workers(tmp_path, monkeypatch):
    """A forker's loss that fails: the error itself, and nothing left running."""

    def broken(*_):
        assert len(multiprocessing.active_children()) == 2
        raise RuntimeError("a mistake in my loss")

    monkeypatch.setitem(LOSSES, "embedding", (broken, True))
    with pytest.raises(RuntimeError, match="a mistake in my loss"):
        run_train("--out", tmp_path / "r", "--workers", 2, "--epoch_size", 8)
    for _ in range(100):
        time.sleep(0.05 * bool(multiprocessing.active_children()))
    assert not multiprocessing.active_children()  # deaf to signals, they would keep the process from ending


@slow
def test_under_torchrun_one_failing_rank_ends_both(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(HERE)!r}); import losses, train\n"
        "if os.environ['RANK'] == '1':\n    def broken(*_): raise RuntimeError('a mistake in my loss')\n"
        "    losses.LOSSES['embedding'] = (broken, True)\n"
        "train.main()\n"
    )
    flags = [*SHORT, "--workers", 1, "--epoch_size", 8, "--batch_size", 2, "--out", tmp_path / "r"]
    started = time.time()
    result = run("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", script, *flags)
    assert result.returncode != 0 and time.time() - started < 60 and "a mistake in my loss" in result.stderr
    time.sleep(1)
    assert str(tmp_path / "r") not in subprocess.run(["ps", "-ef"], capture_output=True, text=True).stdout


def write_to(output):
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def child(output, flags, limit, poison, environment):
    write_to(output)
    os.environ.update(environment)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    genuine, calls = train.mixture_losses, itertools.count()

    train.mixture_losses = lambda *args, **how: genuine(*args, **how) * (math.nan if next(calls) == poison else 1)
    sys.argv = ["train.py", *SHORT, "--seconds", "0.1", *map(str, flags)]
    checkpoint.run_program(train.main)


def launch(output, *flags, limit=resource.RLIM_INFINITY, poison=None, **environment):
    """train.py in a process of its own, forked from one that has imported torch, but never run it.

    limit: bytes that a file may have; poison: number of the batch to lose as NaN.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_all"])
    process = context.Process(target=child, args=(output, flags, limit, poison, environment))
    process.start()
    return process


def launch_two(tmp_path, *flags, **of_rank_0):
    """The same as two ranks; `of_rank_0` goes to one of them alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    network = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return [
        launch(tmp_path / f"rank{rank}.txt", *flags, RANK=str(rank), **network, **({} if rank else of_rank_0))
        for rank in range(2)
    ]


def finish(*processes):
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def wait_until(condition, process):
    while not condition():
        assert process.is_alive()
        time.sleep(0.001)


@slow
def test_killed_twenty_times_a_run_ends_as_if_it_had_not_been(tmp_path):
    flags = "--epochs 2 --epoch_size 50 --batch_size 1 --save_every 1 --dropout 0.2".split()
    assert finish(launch(tmp_path / "unbroken.txt", *flags, "--out", tmp_path / "unbroken")) == [0]
    update = 1 / float(logged(tmp_path / "unbroken")[-1]["mixtures_per_second"])  # seconds, with its checkpoint
    out, rng, resumed, torn = tmp_path / "killed", np.random.default_rng(0), set(), 0
    last, temporary = out / "last.pt", out / "last.tmp"
    for kill in range(20):
        before = last.stat().st_mtime_ns if last.exists() else None
        process = launch(tmp_path / f"{kill}.txt", *flags, "--out", out, *["--resume"] * last.exists())
        if kill % 5:  # else anywhere, mostly while it starts
            wait_until(lambda: last.exists() and last.stat().st_mtime_ns != before, process)
        time.sleep(rng.uniform(0, 2 * update))
        if kill % 5 > 2:
            wait_until(temporary.exists, process)
        process.kill()
        assert finish(process) == [-signal.SIGKILL], (tmp_path / f"{kill}.txt").read_text()
        torn += temporary.exists()
        if last.exists():
            reached = torch.load(last, weights_only=True)
            resumed.add(reached["progress"]["done"])
    assert finish(launch(tmp_path / "end.txt", *flags, "--out", out, "--resume")) == [0]
    assert len(resumed) >= 10 and torn >= 3
    assert (out / "steps.csv").read_bytes() == (tmp_path / "unbroken" / "steps.csv").read_bytes()
    assert len(logged(out, "steps.csv")) == 100
    for killed, unbroken in zip(logged(out), logged(tmp_path / "unbroken"), strict=True):
        assert all(killed[key] == unbroken[key] for key in killed if "second" not in key)
    a, b = weights_of(out), weights_of(tmp_path / "unbroken")
    assert all(torch.equal(a[key], b[key]) for key in a)


@slow
def test_signals_save_first_in_training_and_in_validation(tmp_path):
    flags = ["--out", tmp_path / "r", "--workers", "1", "--epoch_size", 200, "--batch_size", 1]
    process = launch(tmp_path / "1.txt", *flags, "--valid_size", 100)
    wait_until((tmp_path / "r" / "log.csv").exists, process)
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == [130] and "stopped by a signal" in (tmp_path / "1.txt").read_text()
    assert not logged(tmp_path / "r")
    process = launch(tmp_path / "2.txt", *flags, "--valid_size", 100, "--resume")
    wait_until(lambda: len(logged(tmp_path / "r", "steps.csv")) > 2, process)
    process.terminate()
    assert finish(process) == [130] and "Traceback" not in (tmp_path / "2.txt").read_text()
    stopped = torch.load(tmp_path / "r" / "last.pt", weights_only=True)
    assert stopped["progress"]["done"] == len(logged(tmp_path / "r", "steps.csv"))
    # One of two ranks is told, both stop at the same step.
    processes = launch_two(tmp_path, "--out", tmp_path / "two", "--epoch_size", 200, "--batch_size", 1)
    wait_until(lambda: (tmp_path / "two" / "best.pt").exists(), processes[1])
    processes[1].terminate()
    assert finish(*processes) == [130, 130] and (tmp_path / "two" / "last.pt").exists()


@slow
@pytest.mark.parametrize("full", ["steps.csv", "last.pt"])
def test_a_full_disk_ends_in_one_line_and_leaves_the_last_checkpoint_whole(tmp_path, full):
    out = tmp_path / "r"
    flags = ["--out", out, "--epoch_size", 4, "--batch_size", 1, "--save_every", 2, "--resume"]
    run_train(*flags[:-1], "--seconds", 0.1, "--epochs", 1)
    flags += ["--epochs", 2]
    limit = 500_000
    if full == "steps.csv":
        checkpoint = torch.load(out / "last.pt", weights_only=True)
        checkpoint["sizes"]["steps.csv"] += 4000
        torch.save(checkpoint, out / "last.pt")
        (out / "steps.csv").write_text((out / "steps.csv").read_text() + " " * 4000)
        limit = checkpoint["sizes"]["steps.csv"] + 20
    before = (out / "last.pt").read_bytes()
    assert finish(launch(tmp_path / "full.txt", *flags, limit=limit)) == [1]
    output = (tmp_path / "full.txt").read_text()
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "can't write" in error and "File too large" in error
    assert "Traceback" not in output and "ignored" not in output
    assert (out / "last.pt").read_bytes() == before and not list(out.glob("*.tmp"))


@slow
def test_a_full_disk_ends_all_ranks(tmp_path):
    processes = launch_two(tmp_path, "--out", tmp_path / "r", "--epoch_size", 4, "--batch_size", 1, limit=500_000)
    assert 0 not in finish(*processes) and all(p.exitcode is not None for p in processes)
    assert "error: can't write" in (tmp_path / "rank0.txt").read_text()


@pytest.fixture
def damaged(tmp_path):
    """A folder of speakers with one broken file among 24."""
    for voice in ("carlo", "june", "allison"):
        (tmp_path / "speech" / voice).mkdir(parents=True)
        for k in range(8):
            audio, _ = read_audio(SPEECH / voice / "01.ogg", 8000 * k, 8000)
            sf.write(tmp_path / "speech" / voice / f"{k}.flac", audio, 8000)
    broken = tmp_path / "speech" / "june" / "3.flac"
    broken.write_bytes(broken.read_bytes()[:3000])
    return tmp_path / "speech"


def test_a_broken_file_is_named_once_left_out_and_counted(tmp_path, damaged, capfd):
    flags = ["--data", damaged, "--epochs", 1, "--epoch_size", 48, "--batch_size", 4, "--seconds", 0.1]
    for workers in (0, 2):
        run_train(*flags, "--workers", workers, "--out", tmp_path / f"{workers}")
        _, stderr = capfd.readouterr()
        assert stderr.count("left out: ") == stderr.count("june/3.flac") == 1
        assert 0 < int(logged(tmp_path / f"{workers}")[-1]["broken"]) < 10
    assert (tmp_path / "0" / "steps.csv").read_bytes() == (tmp_path / "2" / "steps.csv").read_bytes()
    assert all(math.isfinite(float(row["loss"])) for row in logged(tmp_path / "0", "steps.csv"))
    # The mixture in its place is the next one that is whole.
    mixtures = SpeakerMixtures(damaged, 8000, 0.1, 200)
    skipping = train.SkipBroken(mixtures)
    (index,) = [k for k in range(199) if skipping[0, k]["broken"]][:1]
    assert same(skipping[0, index], mixtures[index + 1])


def test_many_broken_files_stop_the_run(tmp_path, damaged, capsys, monkeypatch):
    paths = sorted(damaged.rglob("*.flac"))
    for path in paths[::2]:
        path.write_bytes(path.read_bytes()[:200])  # a whole header, so that it breaks in mid-epoch
    with pytest.raises(DataError, match="more than a tenth"):
        run_train("--data", damaged, "--epoch_size", 96, "--batch_size", 2, "--out", tmp_path / "half")
    for path in paths:
        path.write_bytes(path.read_bytes()[:200])
    flags = ["--data", damaged, "--epoch_size", 96, "--workers", 1, "--out", tmp_path / "all"]
    error = mistake(monkeypatch, capsys, "train", *SHORT, *flags)
    assert error.startswith("error: 100 mixtures in a row can't be made") and str(damaged) in error


def mistake(monkeypatch, capsys, name, *arguments) -> str:
    """The one line in which a program ends that is started with those arguments."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        checkpoint.run_program(partial(program, name, monkeypatch, *arguments))
    printed = capsys.readouterr().err + (end.value.code if isinstance(end.value.code, str) else "")
    assert end.value.code not in (0, None) and "Traceback" not in printed, (name, arguments, printed)
    (error,) = [line for line in re.split("[\r\n]+", printed) if line.startswith("error: ")]
    return error


def test_a_loss_that_is_not_finite_leaves_the_update_out_and_a_hundred_stop_the_run(tmp_path, monkeypatch):
    genuine, calls, poison = train.mixture_losses, itertools.count(), [3]
    losses_of = lambda *args, **how: genuine(*args, **how) * (math.nan if next(calls) in poison else 1)  # noqa: E731
    monkeypatch.setattr(train, "mixture_losses", losses_of)
    run_train("--epochs", 1, "--epoch_size", 8, "--batch_size", 1, "--out", tmp_path / "one")
    losses_made = [float(row["loss"]) for row in logged(tmp_path / "one", "steps.csv")]
    assert [k for k, loss in enumerate(losses_made) if not math.isfinite(loss)] == [3] and len(losses_made) == 8
    state = torch.load(tmp_path / "one" / "last.pt", weights_only=True)
    assert state["progress"]["skipped"] == 1 and all(w.isfinite().all() for w in state["model"].values())
    poison[:] = range(9, 10**6)
    out = tmp_path / "diverged"
    with pytest.raises(SettingsError, match="no finite loss and gradient from update 2 on"):
        run_train("--epoch_size", 400, "--batch_size", 1, "--seconds", 0.1, "--save_every", 100, "--out", out)
    state = torch.load(out / "last.pt", weights_only=True)
    assert state["progress"]["in_a_row"] == 99 and all(w.isfinite().all() for w in state["model"].values())


def test_an_update_whose_mixtures_are_all_beyond_the_threshold_moves_nothing(tmp_path, monkeypatch):
    genuine, calls = train.keep_hard, itertools.count()
    keep = lambda loss, threshold: loss[:0] if next(calls) >= 4 else genuine(loss, threshold)  # noqa: E731
    monkeypatch.setattr(train, "keep_hard", keep)  # four updates fill Adam's momentum
    flags = ["--epochs", 1, "--epoch_size", 7, "--batch_size", 1, "--warmup", 1]
    run_train("--out", tmp_path / "after", *flags)
    calls = itertools.count()
    run_train("--out", tmp_path / "four", *flags, "--max_steps", 4)
    four, after = weights_of(tmp_path / "four"), weights_of(tmp_path / "after")
    assert all(torch.equal(four[name], after[name]) for name in four)
    assert logged(tmp_path / "after")[-1]["skipped"] == "3"
    with pytest.raises(SettingsError, match="every mixture beyond --threshold -30 dB from update 1 on"):
        calls = itertools.count(4)
        run_train("--epoch_size", 400, "--batch_size", 1, "--seconds", 0.1, "--out", tmp_path / "lasting")


def test_a_validation_that_is_not_a_number_does_not_end_the_choice_of_the_best(tmp_path, monkeypatch):
    values = iter([math.nan, 1.0, math.nan, 0.5, 2.0])
    monkeypatch.setattr(train, "validate", lambda *_: next(values))
    saved, genuine = [], checkpoint.RunFolder.save_best
    save_best = lambda self, state: saved.append(state["progress"]["best"]) or genuine(self, state)  # noqa: E731
    monkeypatch.setattr(checkpoint.RunFolder, "save_best", save_best)
    run_train("--out", tmp_path / "r", "--epochs", 4, "--epoch_size", 2, "--batch_size", 2)
    assert saved == [1.0, 2.0]


@slow
@pytest.mark.parametrize("kind", ["speakers", "fixed", "crops"])
def test_each_loss_of_two_ranks_is_that_of_one(tmp_path, damaged, kind):
    data, more = damaged, []
    if kind == "crops":
        more = ["--loss", "csi_sdr", "--loss_seconds", 0.1, "--seconds", 0.5]
    if kind == "fixed":
        data = tmp_path / "set"
        write_fixed_set(SpeakerMixtures(SPEECH, 8000, 0.2, 40), data)
        broken = sorted((data / "s1").iterdir())[7]
        broken.write_bytes(broken.read_bytes()[:500])
    flags = ["--data", data, "--epochs", 1, "--epoch_size", 40, *more, "--out"]
    one = launch(tmp_path / "one.txt", *flags, tmp_path / "one", "--batch_size", 2)
    assert finish(one, *launch_two(tmp_path, *flags, tmp_path / "two", "--batch_size", 1)) == [0, 0, 0]
    one, two = ([float(row["loss"]) for row in logged(tmp_path / name, "steps.csv")] for name in ("one", "two"))
    assert len(one) == 20 and one == pytest.approx(two, abs=1e-4)
    one, two = logged(tmp_path / "one")[-1], logged(tmp_path / "two")[-1]
    assert one["broken"] == two["broken"] and int(one["broken"]) > 0
    assert float(one["valid_si_sdr_i"]) == pytest.approx(float(two["valid_si_sdr_i"]), abs=1e-3)


@slow
def test_a_loss_that_is_not_finite_on_one_of_two_ranks_is_left_out_on_both(tmp_path):
    flags = ["--epochs", 1, "--epoch_size", 8, "--batch_size", 1, "--out", tmp_path / "two"]
    assert finish(*launch_two(tmp_path, *flags, poison=1)) == [0, 0]
    losses_made = [float(row["loss"]) for row in logged(tmp_path / "two", "steps.csv")]
    assert [k for k, loss in enumerate(losses_made) if not math.isfinite(loss)] == [1] and len(losses_made) == 4


def test_mixed_precision_is_bf16_only_where_a_gpu_has_it_and_can_be_switched_off(monkeypatch):
    gpu, cpu = SimpleNamespace(type="cuda"), SimpleNamespace(type="cpu")
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):
        # As torch answers on a V100: with emulation it could.
        supported = lambda including_emulation=True: native or including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert checkpoint.mixed_precision(gpu, False) is expected
        assert checkpoint.mixed_precision(gpu, True) is checkpoint.mixed_precision(cpu, False) is None


@slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPUs")
def test_the_compiled_separator_computes_the_same(tmp_path):
    flags = ["--epochs", 1, "--epoch_size", 4, "--batch_size", 2, "--valid_size", 1, "--out"]
    run_train(*flags, tmp_path / "plain")
    run_train(*flags, tmp_path / "compiled", "--compile")
    plain, compiled = (
        [float(row["loss"]) for row in logged(tmp_path / name, "steps.csv")] for name in ("plain", "compiled")
    )
    assert len(plain) == 2 and plain == pytest.approx(compiled, abs=1e-3)
    assert weights_of(tmp_path / "plain").keys() == weights_of(tmp_path / "compiled").keys()


def test_training_learns_to_tell_two_tones_apart(tmp_path):
    for speaker, base in (("low", 200), ("high", 1500)):
        for k in range(4):
            write_tone(tmp_path / "tones" / speaker / f"{k}.wav", base * (1 + 0.1 * k))
    run_train(
        "--out", tmp_path / "r", "--data", tmp_path / "tones", "--valid", tmp_path / "tones", "--epochs", 2,
        "--epoch_size", 240, "--batch_size", 8, "--lr", "0.01", "--speeds", 100,
    )  # fmt: skip
    assert float(logged(tmp_path / "r")[-1]["valid_si_sdr_i"]) > 5


class Mean(nn.Module):
    """Gives every speaker the mixture's share: the smallest separator on waveforms."""

    on_latents = False

    def __init__(self, config):
        super().__init__()
        self.config, self.share = config, nn.Parameter(torch.full((config.n_speakers, 1), 0.3))

    def forward(self, mixture):
        return mixture[:, None] * self.share


@dataclass(frozen=True, kw_only=True)
class MeanConfig(SeparatorConfig):
    n_layers: int = 1
    dropout: float = 0.0
    colour: str = "green"


class Clicks:
    """A dataset of a folder's own kind."""

    def __init__(self, root, sample_rate, seconds=1.0, n_speakers=2):
        self.found, self.length = f"{root}: clicks", round(seconds * sample_rate)

    def __len__(self):
        return 4

    def __getitem__(self, key):
        sources = np.random.default_rng(data.epoch_and_index(key)).standard_normal((2, self.length)).astype(np.float32)
        return {"mixture": sources.sum(0), "sources": sources, "name": str(key)}


def test_a_forkers_separator_codec_loss_and_dataset_are_one_line_each(tmp_path, monkeypatch):
    monkeypatch.setitem(SEPARATORS, "mean", (Mean, MeanConfig))
    monkeypatch.setitem(CODECS, "echo", lambda: (Echo(1, 0), {}))
    mean_square = lambda codec, e, s, margins=(0, 0): (e[:, :, None] - s[:, None]).square().mean(-1)  # noqa: E731
    monkeypatch.setitem(LOSSES, "mean_square", (mean_square, False))
    others = dict(DATASETS)
    DATASETS.clear()
    DATASETS.update({"clicks": (lambda root: Path(root).name == "clicks", Clicks, Clicks), **others})
    flags = ["--data", "clicks", "--valid", "clicks", "--epochs", "1", "--batch_size", "4", "--seconds", "0.5"]
    config = tmp_path / "mine.txt"
    config.write_text("--schedule cosine  # and nothing of the bundled model\n")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for model, codec, loss, more in (("mean", "transform", "si_sdr", ["--colour", "red"]),
                                             ("codecformer", "echo", "mean_square", SHORT[:8])):  # fmt: skip
                mine = ["--model", model, "--codec", codec, "--loss", loss, "--out", str(tmp_path / model)]
                train.train(*parse_args([f"@{config}", *flags, *mine, *more]))
    finally:
        DATASETS.clear()
        DATASETS.update(others)
    assert load_checkpoint(tmp_path / "mean" / "best.pt")["config"]["colour"] == "red"
    assert load_checkpoint(tmp_path / "codecformer" / "best.pt")["codec"]["name"] == "echo"
    assert [row["step"] for row in logged(tmp_path / "codecformer")] == ["0", "1"]


def test_flags_of_another_model_are_refused(capsys):
    for flags in (["--chunk", "100"], ["@config/sepformer_wsj0_2mix.txt", "--features", "latents"]):
        with pytest.raises(SystemExit):
            parse_args(flags)
        assert f"unrecognized arguments: {flags[-2]}" in capsys.readouterr().err


def test_help_shows_what_is_run_without_flags(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "(default: assets/speech/train)" in printed and "(default: 0.001)" in printed
    with pytest.raises(SystemExit):
        parse_args(["@config/wsj0_2mix.txt", "--help"])
    assert "(default: 0.00015)" in " ".join(capsys.readouterr().out.split())  # the paper's


def test_evaluate_writes_all_it_promises(trained, small_set, tmp_path, monkeypatch, capsys, scored_here):
    out = tmp_path / "out"
    flags = ["--ckpt", trained / "best.pt", "--data", small_set, "--out", out]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5})
    program("evaluate", monkeypatch, *flags)
    printed = capsys.readouterr().out
    assert scored_here == [1]  # as many processes as the scheduler allots
    results = json.loads((out / "results.json").read_text())
    assert results["n_mixtures"] == 3 and list(results["rows"]) == ["mixture", "ceiling", "codecformer"]
    for row in results["rows"].values():
        assert set(row) == {*evaluate.COLUMNS, "lag", "title"} and row["title"] in printed
        assert all(math.isfinite(row[c]["mean"]) and math.isfinite(row[c]["ci95"]) for c in evaluate.COLUMNS)
    assert results["rows"]["mixture"]["si_sdr_i"]["mean"] == pytest.approx(0, abs=1e-5)
    assert results["rows"]["ceiling"]["si_sdr"]["mean"] > 30
    (saved,) = results["checkpoints"].values()
    assert saved["separator"] == "codecformer" and saved["args"]["seconds"] == 0.5
    assert saved["config"]["d_model"] == 16 and saved["codec"]["name"] == "transform"
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    scores = [line["rows"]["codecformer"]["si_sdr"] for line in lines]
    assert np.mean(scores) == pytest.approx(results["rows"]["codecformer"]["si_sdr"]["mean"], abs=1e-6)
    # The file on disk scores what the table says.
    for score, item in zip(scores, FixedMixtures(small_set, 8000)):
        estimates = [read_audio(out / "audio" / f"{item['name']}_s{s}.wav")[0] for s in (1, 2)]
        again = si_sdr(torch.from_numpy(np.stack(estimates)), torch.from_numpy(item["sources"])).tolist()
        assert again == pytest.approx(score, abs=1e-3)
    page = (out / "index.html").read_text()
    assert page.count("<audio") == page.count("<img") == 3 * 5 and 'src="http' not in page

    # Interrupted in the middle of a line, it goes on where it was, to the same results.
    text = (out / "scores.jsonl").read_text()
    (out / "scores.jsonl").write_text(text.splitlines(keepends=True)[0] + text.splitlines()[1][:50])
    made, genuine = [], evaluate.make_rows
    monkeypatch.setattr(evaluate, "make_rows", lambda *a: made.append(a) or genuine(*a))
    program("evaluate", monkeypatch, *flags)
    assert len(made) == 2 and json.loads((out / "results.json").read_text())["rows"] == results["rows"]
    # Another set, or other flags, have a folder of their own.
    other = tmp_path / "other"
    write_fixed_set(SpeakerMixtures(SPEECH.parent / "valid", 8000, 1.0, 1), other)
    assert "scores of other checkpoints" in mistake(monkeypatch, capsys, "evaluate", *flags, "--data", other)
    (other / "notes.txt").touch()
    assert "has other files or scores" in mistake(monkeypatch, capsys, "evaluate", *flags[:-1], other)
    monkeypatch.chdir(tmp_path)
    program("evaluate", monkeypatch, "--ckpt", trained / "best.pt", "--data", other)
    program("evaluate", monkeypatch, "--ckpt", trained / "best.pt", "--data", small_set)
    assert len(list((tmp_path / "results").iterdir())) == 2
    (out / "index.html").unlink()
    program("recipes.report", monkeypatch, out)
    assert (out / "index.html").read_text() == page
    # So has a set whose files only look the same, and other code.
    source = min((other / "s1").iterdir())
    audio, rate = read_audio(source)
    sf.write(source, audio[::-1], rate)
    program("evaluate", monkeypatch, "--ckpt", trained / "best.pt", "--data", other)
    assert len(list((tmp_path / "results").iterdir())) == 3
    monkeypatch.setattr(evaluate, "HERE", tmp_path)
    assert "flags or code: change --out" in mistake(monkeypatch, capsys, "evaluate", *flags)


def test_short_and_silent_mixtures_do_not_end_the_scoring(trained, tmp_path, monkeypatch, capsys, scored_here):
    rng = np.random.default_rng(0)
    for name, s1, s2 in (("a", 16000, 16000), ("b", 1600, 1600), ("c", 16000, 0)):
        signals = [rng.standard_normal(n or 16000) / 8 * bool(n) for n in (s1, s2)]
        for folder, signal in zip(("mix", "s1", "s2"), (sum(signals), *signals)):
            (tmp_path / "set" / folder).mkdir(parents=True, exist_ok=True)
            sf.write(tmp_path / "set" / folder / f"{name}.wav", signal, 8000)
    flags = ["--ckpt", trained / "best.pt", "--data", tmp_path / "set", "--out", tmp_path / "out"]
    program("evaluate", monkeypatch, *flags)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert rows["codecformer"]["si_sdr"]["left_out"] == 1 and rows["codecformer"]["stoi"]["left_out"] == 2
    assert math.isfinite(rows["codecformer"]["si_sdr"]["mean"]) and "Mixtures left out" in capsys.readouterr().out


def test_another_sample_rate_works_throughout(tmp_path):
    write_fixed_set(SpeakerMixtures(SPEECH.parent / "valid", 16000, 1.0, 1), tmp_path / "set")
    flags = ["--sample_rate", 16000, "--epochs", 1, "--epoch_size", 4, "--batch_size", 4, "--loss", "csi_sdr"]
    run_train("--out", tmp_path / "r", *flags, "--valid", tmp_path / "set", "--loss_seconds", 0.2, "--valid_size", 1)
    assert math.isfinite(float(logged(tmp_path / "r")[-1]["loss"]))
    model, codec, _ = load_separator(tmp_path / "r" / "best.pt", "cpu")
    assert (codec.sample_rate, codec.codec_rate) == (16000, 8000)
    item = FixedMixtures(tmp_path / "set", 16000)[0]
    signals, transmitted = evaluate.make_rows({"codecformer": (model, False, False)}, codec, item, False)
    assert signals["codecformer"].shape == transmitted.shape == item["sources"].shape == (2, 16000)


def test_one_command_prints_the_papers_table(trained, small_set, tmp_path, monkeypatch, capsys, scored_here):
    tiny = [*SHORT, "--chunk", 50, "--epochs", 1, "--epoch_size", 2, "--batch_size", 2]
    sepformer = ["@config/sepformer_wsj0_2mix.txt", *tiny, "--valid_size", 1, "--data", small_set, "--valid", small_set]
    train.train(*parse_args([*map(str, sepformer), "--out", str(tmp_path / "sepformer")]))
    ckpts = [trained / "best.pt", tmp_path / "sepformer" / "best.pt"]
    capsys.readouterr()
    flags = ["--situations", "--ckpt", *ckpts, "--data", small_set, "--out", tmp_path / "out"]
    program("evaluate", monkeypatch, *flags)
    printed = capsys.readouterr().out.splitlines()
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert len(rows) == 4 + 2 * len(evaluate.SITUATIONS)
    for row, values in rows.items():
        assert set(values) == {*evaluate.SITUATION_COLUMNS, "lag", "title"}
        (line,) = [line for line in printed if line.startswith(values["title"] + " ")]
        for column, cell in zip(evaluate.SITUATION_COLUMNS, line[len(values["title"]) :].split()):
            mean = values[column]["mean"]  # none where PESQ finds no speech
            assert cell == "-" if mean is None else float(cell) == pytest.approx(mean, abs=0.051)
        assert ("shifted" in line) == (values["lag"]["median_samples"] != 0)
    # A codec on the way costs a transmitted source everything but itself.
    assert rows["ceiling/transmitted"]["csi_sdr_i"]["mean"] > 60
    assert rows["ceiling/transmitted"]["si_sdr_i"]["mean"] < rows["ceiling"]["si_sdr_i"]["mean"] - 10
    clean, latents = (rows[f"codecformer/{place}/none"]["si_sdr_i"]["mean"] for place in ("clean", "latents"))
    assert clean == pytest.approx(latents) and "sepformer/latents/before+after" in rows

    flags = ["--situations", "--ckpt", ckpts[0], "--data", small_set, "--out", tmp_path / "low", "--n_codebooks", 2]
    program("evaluate", monkeypatch, *flags)
    low = json.loads((tmp_path / "low" / "results.json").read_text())
    assert low["codec"]["bitrate"] == 1000  # of the transform's 12 codebooks at 6 kbit/s
    flags = ["--situations", "--ckpt", ckpts[1], "--data", small_set, "--out", tmp_path / "b", "--codec", "bundled"]
    program("evaluate", monkeypatch, *flags)  # a separator on waveforms stands behind any codec
    assert json.loads((tmp_path / "b" / "results.json").read_text())["codec"]["name"] == "bundled"
    transmitted = [r["ceiling/transmitted"]["si_sdr_i"]["mean"] for r in (low["rows"], rows)]
    unquantised = [r["codecformer/latents/none"]["si_sdr_i"]["mean"] for r in (low["rows"], rows)]
    assert transmitted[0] < transmitted[1] - 1 and unquantised[0] == pytest.approx(unquantised[1])


def test_costs_are_counted_and_timed_as_they_are():
    assert cost.count_macs(nn.Conv1d(3, 5, 7, bias=False), 1, 3, 106) == pytest.approx(3 * 5 * 7 * 100 / 1e9)
    calls = {"short": lambda: time.sleep(0.01), "long": lambda: time.sleep(0.05)}
    seconds = cost.median_seconds(calls, 3, torch.device("cpu"))
    assert 0.01 <= seconds["short"] < 0.05 <= seconds["long"]


@pytest.mark.parametrize(
    "name, results, least",
    [
        ("separator", "results", 2),
        ("separator_bundled", "bundled_results", 1),
        pytest.param("separator_lyra", "lyra_results", 1, marks=needs_lyra),
    ],
)
def test_bundled_weights_separate_speakers_never_trained_on(name, results, least, monkeypatch):
    """The table of the README, on every fourth mixture: as many decibels as it says, within its interval."""
    monkeypatch.setitem(CODECS, "lyra", lambda: load_lyra(LYRA))
    stated = json.loads((ASSETS / "results" / f"{results}.json").read_text())["rows"]["codecformer"]["si_sdr_i"]
    model, codec, _ = load_separator(ASSETS / f"{name}.pt", "cpu")
    mixtures, gains = FixedMixtures(ASSETS / "test_mixtures", codec.sample_rate), []
    for index in range(0, len(mixtures), 4):
        signals, _ = evaluate.make_rows({"codecformer": (model, False, False)}, codec, mixtures[index], False)
        reached, before = (si_sdr(*map(torch.from_numpy, (signals[row], mixtures[index]["sources"])))
                           for row in ("codecformer", "mixture"))  # fmt: skip
        gains.append((reached - before).mean().item())
    assert len(mixtures) == 48 and np.mean(gains) == pytest.approx(stated["mean"], abs=2 * stated["ci95"])
    assert np.mean(gains) > least


@pytest.mark.parametrize(
    "rate, channels, samples, subtype",
    [(8000, 1, 800, "PCM_16"), (44100, 2, 30001, "PCM_24"), (22050, 6, 4444, "FLOAT"), (11025, 1, 20000, "PCM_U8")],
)
def test_separated_recordings_keep_rate_length_and_level(trained, codec, tmp_path, rate, channels, samples, subtype):
    model, codec, _ = load_separator(trained / "best.pt", "cpu")
    with torch.no_grad():  # masks of one half each, so that the level that must come back is known
        model.mask_activation = Constant(0.5)
    wav = 0.2 * np.sin(2 * np.pi * 300 * np.arange(samples) / rate)
    sf.write(tmp_path / "mix.wav", np.repeat(wav[:, None], channels, 1), rate, subtype=subtype)
    estimates, out_rate = separate_wav(model, codec, tmp_path / "mix.wav")
    assert out_rate == rate and estimates.shape == (2, samples)
    middle = slice(samples // 4, -samples // 4)
    assert estimates[:, middle].std() == pytest.approx(wav[middle].std() / 2, rel=0.1)


def separate_wav(model, codec, path):
    """What `separate_file` writes: (estimates [S, T], rate). Nothing else may stay behind."""
    with tempfile.TemporaryDirectory() as folder:
        targets = [Path(folder) / f"s{k + 1}.wav" for k in range(model.config.n_speakers)]
        try:
            separate_program.separate_file(model, codec, path, targets)
        except BaseException:
            assert not any(Path(folder).iterdir())
            raise
        assert sorted(Path(folder).iterdir()) == targets
        estimates, rates = zip(*(sf.read(target, dtype="float32") for target in targets))
        return np.stack(estimates), rates[0]


class Bands(nn.Module):
    """Gives each of S speakers a band of the bundled codec's latents, in another order at each call."""

    def __init__(self, n_speakers, seed=0):
        super().__init__()
        self.on_latents, self.config = True, CodecformerConfig(n_speakers=n_speakers)
        self.generator = torch.Generator().manual_seed(seed)
        self.orders = []

    def forward(self, latents):
        s = self.config.n_speakers
        self.orders.append(torch.randperm(s, generator=self.generator))
        band = torch.arange(160).repeat(2) * s // 160  # 160 cosines and 160 sines, from 0 to 4 kHz
        masks = (band == torch.arange(s)[:, None])[self.orders[-1]].float()
        return masks[None, :, :, None].expand(len(latents), -1, -1, latents.shape[-1])


def talkers(n_speakers, seconds, rate):
    """Known sources [S, T]: a chirping tone in each one's band, at times silent for seconds."""
    rng, time = np.random.default_rng(n_speakers), np.arange(round(seconds * rate)) / rate
    sources = []
    for k in range(n_speakers):
        width = 4000 / n_speakers
        tone = np.sin(2 * np.pi * (k + 0.4) * width * time + 0.15 * width * np.sin(2 * np.pi * 0.7 * time))
        level = rng.choice([0, 0.01, 0.1, 0.3], math.ceil(seconds))
        level[[0, -2, -1]] = 0  # the codec has nothing to overlap with at either end
        level = np.repeat(level, rate)[: len(time)]
        sources.append(tone * np.convolve(level, np.hanning(rate // 4) / np.hanning(rate // 4).sum(), "same"))
    return np.stack(sources).astype(np.float32)


@pytest.mark.parametrize("n_speakers, rate, seconds", [(2, 8000, 32.77), (3, 44100, 14.3), (4, 11025, 23)])
def test_windows_join_to_the_whole_and_no_speaker_swaps(codec, tmp_path, monkeypatch, n_speakers, rate, seconds):
    """Masks that depend on the time at hand alone show what the joints do, and known sources who is who."""
    sources = talkers(n_speakers, seconds, rate)
    sf.write(tmp_path / "mix.wav", np.repeat(sources.sum(0)[:, None], 2, 1), rate, subtype="FLOAT")
    whole, _ = separate_wav(Bands(n_speakers), codec, tmp_path / "mix.wav")
    monkeypatch.setattr(separate_program, "WINDOW", 5)
    monkeypatch.setattr(separate_program, "OVERLAP", 2)
    model = Bands(n_speakers)
    windows, _ = separate_wav(model, codec, tmp_path / "mix.wav")
    assert len({tuple(order.tolist()) for order in model.orders}) > 1 and len(model.orders) > 4
    assert windows.shape == sources.shape
    # The first window decides the order; from there on every second of it belongs to one speaker.
    order = model.orders[0].numpy()
    for start in range(0, sources.shape[1], rate):
        part = slice(start, start + rate)
        for estimate, source in zip(windows[:, part], sources[order][:, part]):
            assert np.abs(estimate - source).max() < 0.1 * max(np.abs(source).max(), 0.05)
    assert si_sdr(torch.from_numpy(windows), torch.from_numpy(whole)).min() > 30


def test_a_recording_of_one_window_is_separated_as_a_whole(codec, speech, tmp_path):
    model = Codecformer(CodecformerConfig(latent_dim=codec.latent_dim, **TINY)).eval()
    sf.write(tmp_path / "mix.wav", speech.sum(0).numpy(), 8000, subtype="FLOAT")
    with torch.no_grad():
        whole = separate(model, codec, speech.sum(0, keepdim=True))[0]
    assert np.array_equal(separate_wav(model, codec, tmp_path / "mix.wav")[0], whole.numpy())


@pytest.mark.parametrize("length", [1, 8000, 8001, 79999, 80000, 80001, 80002, 120000, 120001, 1234567])
def test_windows_cover_every_length_and_overlap_enough(monkeypatch, length):
    monkeypatch.setattr(separate_program, "WINDOW", 10)
    monkeypatch.setattr(separate_program, "OVERLAP", 3)
    starts = separate_program.window_starts(length, 8000)
    ends = [min(start + 80000, length) for start in starts]
    assert starts[0] == 0 and ends[-1] == length and (len(starts) > 1) == (length > 80000)
    assert all(end - start > 72000 for start, end in zip(starts, ends)) or len(starts) == 1
    assert all(end - start >= 24000 for start, end in zip(starts[1:], ends))
    assert all(start % 8000 == 0 for start in starts) and starts == sorted(set(starts))


def test_bad_recordings_are_named_and_the_others_are_separated(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)  # no ffmpeg here
    bad = bad_recordings(tmp_path)
    for total in (0, 2**36 - 1):  # samples that a FLAC file says it has: unknown, and far more than are there
        path = tmp_path / f"says_{total}.flac"
        sf.write(path, np.zeros(8000), 8000)
        flac = bytearray(path.read_bytes())
        flac[21:26] = (int.from_bytes(flac[21:26], "big") >> 36 << 36 | total).to_bytes(5, "big")
        path.write_bytes(flac)
        bad.append(path)
    (tmp_path / "voice.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(1000))
    bad += [tmp_path / "voice.m4a", Path("/dev/stdin")]
    for name in "ab":
        write_tone(tmp_path / f"{name}.wav", 300)
    flags = ["--ckpt", trained / "best.pt", "--out", tmp_path / "out"]
    recordings = [bad[0], tmp_path / "a.wav", *bad[1:], tmp_path / "b.wav"]
    with pytest.raises(DataError) as caught:
        program("separate", monkeypatch, *recordings, *flags)
    errors = str(caught.value).split("\nerror: ")
    assert len(errors) == len(bad) and all(path.name in line for path, line in zip(bad, errors))
    assert "convert it: ffmpeg -i voice.m4a converted.wav" in errors[-2]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a_s1.wav", "a_s2.wav", "b_s1.wav", "b_s2.wav"]


def test_folders_are_walked_and_ffmpeg_decodes_what_libsndfile_cannot(trained, tmp_path, monkeypatch):
    write_tone(tmp_path / "in" / "day" / "a.wav", 300)
    write_tone(tmp_path / "in" / "night" / "a.wav", 300)
    (tmp_path / "in" / "call.m4a").write_bytes(bytes(100))
    (tmp_path / "in" / "notes.txt").touch()
    write_tone(tmp_path / "in" / ".venv" / "test.wav", 300)
    fake = tmp_path / "bin" / "ffmpeg"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\nfor last; do :; done\ncp '{tmp_path}/in/day/a.wav' \"$last\"\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    program("separate", monkeypatch, tmp_path / "in", "--ckpt", trained / "best.pt", "--out", tmp_path / "out")
    found = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.wav"))
    assert found == [f"{name}_s{k}.wav" for name in ("call", "day/a", "night/a") for k in (1, 2)]
    assert sf.info(tmp_path / "out" / "call_s1.wav").subtype == "FLOAT"
    (tmp_path / "empty").mkdir()
    for recordings, message in (
        ([tmp_path / "empty"], "holds no recordings"),
        ([tmp_path / "in" / "day" / "a.wav", tmp_path / "in" / "night" / "a.wav"], "a_s1.wav would be written over"),
        ([tmp_path / "in"], "call_s1.wav would be written over: move it away"),
    ):
        with pytest.raises((DataError, SettingsError), match=message):
            program("separate", monkeypatch, *recordings, "--ckpt", trained / "best.pt", "--out", tmp_path / "out")


@slow
def test_an_interrupted_separation_leaves_nothing_half_written(trained, tmp_path):
    sf.write(tmp_path / "long.wav", np.random.default_rng(0).standard_normal(8000 * 1200) / 8, 8000)
    flags = ["--ckpt", trained / "best.pt", "--out", tmp_path / "out", tmp_path / "long.wav"]
    process = subprocess.Popen([sys.executable, "separate.py", *flags], stderr=subprocess.PIPE, text=True, cwd=HERE)
    while not list(tmp_path.glob("out/*.part")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # Ctrl-C's SIGINT goes the same way
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and not any((tmp_path / "out").iterdir())
    assert "error: interrupted; what was finished is kept" in stderr and "Traceback" not in stderr


RATES = [1000, 1009, 7999, 8000, 11025, 44100, 48000, 96000, 192000]
FORMATS = [(8, 1), (16, 1), (24, 1), (32, 1), (32, 3), (64, 3)]  # bits, and 1 for integers or 3 for floats
FLAWS = {
    "rate": [0, 1, 2, 79, 999, 192001, 2**31 - 1, 2**32 - 1],
    "channels": [0],
    "format": [(12, 1), (64, 1), (16, 3), (0, 1), (16, 2), (16, 65534)],
    "seconds": [0, 0.001, 0.0999],
    "value": [np.nan, np.inf, -np.inf],
    "scale": [1e-30, 1e10, 1e18, 1e30, 3e38],
    "data": [0, 1, 0.5, 3, 1e6],  # the sizes that the header claims, in the true ones
    "riff": [0, 0.5, 1e6],
    "kept": [0, 11, 30, 43, 44, 45, 1001],  # bytes of the file
}


@st.composite
def recordings(draw):
    """A WAV file made by hand with at most one flaw, so that its header can say anything of its samples."""
    flaw = draw(st.sampled_from(["none", "none", "none", *FLAWS]))

    def pick(name, *usual):
        return draw(st.sampled_from(FLAWS[name] if name == flaw else usual))

    rate, channels = pick("rate", *RATES), pick("channels", *range(1, 9))
    bits, kind = pick("format", *(FORMATS[4:] if flaw in ("value", "scale") else FORMATS))
    rng, samples = np.random.default_rng(0), round(pick("seconds", 0.1, 0.11, 0.3) * min(rate, 192000))
    signal = {
        "noise": rng.uniform(-0.5, 0.5, (samples, channels)),
        "silence": np.zeros((samples, channels)),
        "square": np.sign(np.sin(np.arange(samples) / 9 + 0.1))[:, None].repeat(channels, 1),
    }[draw(st.sampled_from(["noise", "silence", "square"]))]
    if kind == 3 and bits > 16:
        signal *= pick("scale", 1)
        if flaw == "value":
            signal[samples // 2] = pick("value")
        data = signal.astype(f"<f{bits // 8}").tobytes()
    else:
        whole = np.round(signal * (2.0 ** (bits - 1) - 1)).clip(-(2.0**62), 2.0**62).astype("<i8") + 128 * (bits == 8)
        data = whole.reshape(-1, 1).view("u1")[:, : -(-bits // 8)].tobytes()
    frame = channels * bits // 8
    sizes = (min(round(pick(name, 1) * (len(data) + more)), 2**32 - 1) for name, more in (("riff", 36), ("data", 0)))
    wav = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", next(sizes), b"WAVE", b"fmt ", 16, kind, channels, rate,
                      rate * frame % 2**32, frame, bits) + struct.pack("<4sI", b"data", next(sizes)) + data  # fmt: skip
    return wav[: pick("kept", None)]


@given(recordings())
@settings(max_examples=150 if os.environ.get("SLOW") else 40, derandomize=True, deadline=None, database=None)
def test_any_input_gives_finite_audio_or_one_clear_line(codec, tmp_path_factory, wav):
    """What libsndfile reads of a file is separated at full length, the rest refused."""
    model = Codecformer(CodecformerConfig(latent_dim=codec.latent_dim, **TINY)).eval()
    path = tmp_path_factory.getbasetemp() / "fuzz.wav"
    path.write_bytes(wav)
    try:
        with mock.patch.object(shutil, "which", return_value=None):  # ffmpeg may read more than libsndfile
            estimates, rate = separate_wav(model, codec, path)
    except DataError as error:
        assert path.name in str(error) and "\n" not in str(error)
    else:
        info = sf.info(path)
        assert estimates.shape == (2, info.frames) and rate == info.samplerate and np.isfinite(estimates).all()


def test_bad_checkpoints_are_refused(trained, tmp_path, official_file):
    good = torch.load(trained / "best.pt", weights_only=True)
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "empty.pt").touch()
    torch.save({**good, "config": {**good["config"], "d_model": 32}}, tmp_path / "other_config.pt")
    torch.save({**good, "codec": {**good["codec"], "fingerprint": "0"}}, tmp_path / "other_codec.pt")
    torch.save({**good, "separator": "tasnet"}, tmp_path / "other_separator.pt")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    for name in ("bomb", "empty", "other_config", "other_codec", "other_separator", "other", "missing"):
        with pytest.raises(SettingsError) as caught:
            load_separator(tmp_path / f"{name}.pt", "cpu")
        assert "\n" not in str(caught.value) and name in str(caught.value)
        assert ("this checkout has codecformer, sepformer" in str(caught.value)) == (name == "other_separator")
    with pytest.raises(SettingsError, match="another codec"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_separator(trained / "best.pt", "cpu", str(official_file[0]))


def test_mistakes_on_the_command_line_end_in_one_line_and_a_failure(trained, tmp_path, monkeypatch, capsys):
    blocked, out = tmp_path / "file", ["--out", tmp_path / "x"]
    blocked.write_bytes(b"\xff")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "best.pt").touch()
    best = ["--ckpt", trained / "best.pt"]
    for name, arguments, message in [
        ("train", ["--resume", "--out", tmp_path / "new"], "nothing to resume"),
        ("train", ["--out", trained], "holds a run already"),
        ("train", ["--out", tmp_path / "kept"], "holds a run already"),
        ("train", ["--speeds", "0", "100", *out], "--speeds: 0 is out of range"),
        ("train", ["--snr", 0, 5, *out], "--snr needs --noise"),
        ("recipes.mix", ["--speech", SPEECH, "--snr", -6, 3, *out], "--snr needs --noise"),  # WHAM!'s own, too
        ("train", ["--codec", "bundled", "--loss_seconds", "0.1", "--seconds", "0.1", *out], "raise --seconds"),
        ("train", [f"@{blocked}", *out], "give a file of flags"),
        ("train", ["--out", blocked / "run"], "can't write"),
        ("train", ["--data", SPEECH / "carlo", *out], "at least 2 are needed"),
        ("train", ["--codec", "dac_7khz", *out], "no codec dac_7khz"),
        ("train", ["--lr", "-1", *out], "--lr: -1 is out of range"),
        ("train", ["--loss_seconds", "-1", *out], "--loss_seconds: -1 is out of range"),
        ("train", ["--max_steps", "0", *out], "--max_steps: 0 is out of range"),
        ("train", ["@config/sepformer_wsj0_2mix.txt", "--loss", "embedding", "--data", SPEECH, "--valid", SPEECH,
                   "--epoch_size", 4, *out], "sepformer has no latents"),
        ("train", ["@config/sepformer_wsj0_2mix.txt", "--loss_seconds", 1, "--data", SPEECH, "--valid", SPEECH,
                   "--epoch_size", 4, *out], "sepformer has no latents"),
        ("train", ["@config/none.txt", *out], "can't read config/none.txt"),
        ("train", ["@config/shared/codecformer.txt", *out], "--data is missing"),
        ("train", ["--n_heads", "7", *out], "multiple of n_heads"),
        ("train", ["--init", tmp_path / "none.pt", *out], "no checkpoint"),
        ("train", ["--epoch_size", "4", "--batch_size", "8", *out], "less than one update"),
        ("evaluate", ["--situations", "--ckpt", tmp_path / "none.pt"], "no checkpoint"),
        ("evaluate", ["--ckpt", "a", "b"], "compared with --situations"),
        ("evaluate", ["--n_codebooks", 13], "13 codebooks asked for, transform has 1 to 12"),
        ("evaluate", [*best, "--out", blocked / "y"], "can't write"),
        ("separate", [tmp_path / "none.wav", *best, "--out", tmp_path / "z"], "is no file"),
        ("recipes.mix", ["--speech", SPEECH / "carlo", *out], "at least 2 are needed"),
        ("recipes.mix", ["--speech", SPEECH, "--out", blocked / "set", "--n", "1"], "can't write"),
        ("recipes.report", [tmp_path], "holds no results"),
        ("recipes.curves", [tmp_path], "can't draw"),
        ("recipes.curves", [trained, "--out", tmp_path / "curves.xyz"], "can't draw"),
        ("recipes.mix", ["--speech", SPEECH, "--seconds", "nan", *out], "--seconds: nan is out of range"),
        ("recipes.librispeech", ["--librispeech", tmp_path / "none", *out], "lacks 40 of the 40"),
        ("recipes.train_codec", ["--data", SPEECH, "--valid", SPEECH, "--steps", 0, *out], "--steps: 0 is out of"),
        ("recipes.train_codec", ["--data", SPEECH, "--valid", SPEECH, "--sums", 2, *out], "must lie in 0 to 1"),
        ("recipes.pack", ["--speech", SPEECH, "--minutes", "two", *out], "--minutes: invalid float value: 'two'"),
        ("recipes.train_codec", ["--data", SPEECH, "--valid", SPEECH, "--resume", "--out", trained], "can't be resu"),
        ("recipes.wsj0_mix", ["--wsj0", tmp_path, *out], "either --lists"),
    ]:  # fmt: skip
        printed = mistake(monkeypatch, capsys, name, *arguments)
        assert message in printed, (name, arguments, printed)
    assert not (tmp_path / "x").exists()  # nothing is left behind


CONFIGS = sorted(p.name for p in (HERE / "config").glob("*.txt"))


@pytest.mark.parametrize("config", [c for c in CONFIGS if c not in ("bundled.txt", "gpu.txt")])
def test_every_config_holds_the_papers_settings(config):
    args = settings_of(f"@config/{config}")
    assert (args.lr, args.clip, args.batch_size, args.threshold, args.accumulate) == (1.5e-4, 5, 1, -30, 1)
    assert (args.schedule, args.patience, args.plateau_start) == ("plateau", 2, 5) and args.speeds == [95, 100, 105]
    assert (args.quantize_before, args.quantize_after) == ("rvq" in config,) * 2
    assert args.loss == ("csi_sdr" if "csi_sdr" in config else "si_sdr") and args.loss_seconds == 0
    codec = {"lyra.txt": "lyra", "sepformer_wsj0_2mix.txt": "transform"}.get(config, "dac_16khz")
    assert args.sample_rate == 8000 and args.codec == codec
    assert args.out == f"runs/{config.removesuffix('.txt')}" and args.epochs == (80 if "libri" in config else 200)
    with torch.device("meta"):
        model = build_model(vars(args), 1024)
    assert sum(p.numel() for p in model.parameters()) == (25_679_361 if "sepformer" in config else 17_361_408)


@slow
def test_the_papers_config_starts(tmp_path, official_file, monkeypatch):
    """Three steps of the full-size model, on a set of the same layout and a codec file of the official format."""
    monkeypatch.chdir(tmp_path)
    for split, n in (("tr", 3), ("cv", 1)):
        folder = Path("wsj0-mix/2speakers/wav8k/min") / split
        write_fixed_set(SpeakerMixtures(SPEECH, 8000, 0.4, n), folder)
        (folder / "mix_clean").rename(folder / "mix")
    flags = [f"@{HERE}/config/wsj0_2mix.txt", "--codec", official_file[0], "--epochs", 1, "--seconds", 0.3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train.train(*parse_args([*map(str, flags)]))
    _, row = logged(Path("runs/wsj0_2mix"))
    assert (row["epoch"], row["step"], row["skipped"]) == ("1", "3", "0") and math.isfinite(float(row["loss"]))


class Parsed(Exception):
    pass


def test_every_command_of_the_readme_is_understood(monkeypatch):
    """Each program's own parser takes it."""
    readmes = HERE / "README.md", ASSETS / "README.md", ASSETS / "results" / "README.md"
    text = "\n".join(path.read_text() for path in readmes)
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    genuine, seen = data.Parser.parse_args, set()

    def parse(self, *args, **kwargs):
        genuine(self, *args, **kwargs)
        raise Parsed

    for command in commands:
        numbers = lambda found: " ".join(map(str, range(int(found[1]), int(found[2]) + 1)))  # noqa: E731
        command = re.sub(r"\$\(seq (\d+) (\d+)\)", numbers, command)
        words = shlex.split(command.split("; ")[-1], comments=True)
        if "train.py" in words and words[0] in ("python", "torchrun", "OMP_NUM_THREADS=1"):
            parse_args([w for w in words[words.index("train.py") + 1 :] if w != "..."])
            seen.add("train.py")
        elif words[:1] == ["python"] and not words[1].endswith("pytest"):
            name = words[2] if words[1] == "-m" else words[1].removesuffix(".py")
            if name == "pytest":
                continue
            with monkeypatch.context() as patched, pytest.raises(Parsed):
                patched.setattr(data.Parser, "parse_args", parse)
                program(name, monkeypatch, *words[3 if words[1] == "-m" else 2 :])
            seen.add(name)
    recipes = {f"recipes.{p.stem}" for p in (HERE / "recipes").glob("*.py") if p.stem not in ("__init__", "sepformer")}
    assert seen >= {"train.py", "evaluate", "separate", *recipes}


@slow
def test_claims_are_trained_scored_and_tabled_and_not_made_twice(tmp_path, monkeypatch):
    """The real script with runs of two updates, called in this process."""
    calls = []

    def call(*command, log):
        words = [str(word) for word in command]
        calls.append(words)
        program(words[1] if words[0] == "-m" else words[0][:-3], monkeypatch, *words[1 + (words[0] == "-m") :])

    tiny = [f"--{name}={value}" for name, value in TINY.items()]
    tiny += "--seconds 0.5 --batch_size 2 --epoch_size 4 --epochs 1 --valid_size 1 --workers 0".split()
    base, valid = "--features both --context 3 --speeds 90 110".split() + tiny, ASSETS / "speech" / "valid"
    monkeypatch.setattr(claims, "call", call)
    serial = contextlib.nullcontext(SimpleNamespace(map=map))  # train.py wants the main thread, for its signals
    monkeypatch.setattr(claims, "ThreadPoolExecutor", lambda parallel: serial)
    monkeypatch.setattr(evaluate, "ProcessPoolExecutor", lambda n, *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(claims, "N_SCORED", 2)
    monkeypatch.setattr(claims, "BASE", ["@config/gpu.txt", *base])
    sepformer = ["@config/sepformer_wsj0_2mix.txt", *tiny, "--n_blocks=1", "--max_steps=2"]
    si_sdr_run = ["@config/gpu.txt", *base, "--loss", "si_sdr", "--max_steps=2"]
    monkeypatch.setattr(claims, "BY_TIME", {"time/si_sdr": si_sdr_run, "time/sepformer": sepformer})
    three = {"base": [], "harder/three_speakers": ["--n_speakers", "3"]}
    monkeypatch.setattr(claims, "BY_MIXTURES", three)
    monkeypatch.setattr(claims, "TWICE", ())
    arguments = ["--codec", "transform", "--data", SPEECH, "--valid", valid, "--score", valid, "--noise", SPEECH]
    arguments += ["--minutes", 60, "--mixtures", 12]
    fresh, pooled = ([*arguments, "--out", tmp_path / name] for name in ("claims", "pooled"))
    monkeypatch.chdir(HERE)
    program("recipes.claims", monkeypatch, *fresh)
    rows = json.loads((tmp_path / "claims" / "claims.json").read_text())["rows"]
    assert list(rows) == ["time/si_sdr/0", "time/sepformer/0", "base/0", "harder/three_speakers/0"]
    assert [row["mixtures"] for row in rows.values()] == [4, 4, 12, 12]
    for run, row in rows.items():
        scored = json.loads((tmp_path / "claims" / "scores" / run / "results.json").read_text())
        assert scored["n_speakers"] == 2 + ("three" in run) and scored["n_mixtures"] == 2
        assert row["si_sdr_i"] == scored["rows"]["sepformer" if "sepformer" in run else "codecformer"]["si_sdr_i"]
    situations = json.loads((tmp_path / "claims" / "situations" / "results.json").read_text())["rows"]
    assert {"codecformer/latents/none", "sepformer/latents/none"} <= situations.keys()
    assert len((tmp_path / "claims" / "claims.md").read_text().splitlines()) == 2 + len(rows)
    assert (tmp_path / "claims" / "claims.png").stat().st_size > 5000

    calls.clear()
    program("recipes.claims", monkeypatch, *fresh, "--only", "harder/three", "--pool", 4)  # which takes no pool
    assert not calls and json.loads((tmp_path / "claims" / "claims.json").read_text())["rows"] == rows

    program("recipes.claims", monkeypatch, *pooled, "--only", "base", "harder", "--pool", 4)
    trained = {}
    for name in ("base", "harder/three_speakers"):
        args = json.loads((tmp_path / "pooled" / name / "0" / "args.json").read_text())
        trained[name] = args["data"], args["speeds"]
    assert trained == {
        "base": (str(tmp_path / "pooled" / "pool-latents"), [100]), "harder/three_speakers": (str(SPEECH), [100])
    }  # fmt: skip
    with pytest.raises(SettingsError, match="no run is called activation/swish"):
        program("recipes.claims", monkeypatch, *fresh, "--only", "activation/swish")
    with pytest.raises(SystemExit):
        program("recipes.claims", monkeypatch, *fresh, "--mixtures", 2)


def test_what_claims_and_gpu_call_are_flags_that_train_takes(tmp_path, monkeypatch):
    commands, parsed = [], []
    monkeypatch.setattr(gpu, "call", lambda *words, log=None: commands.append([str(word) for word in words]))
    gpu.run("voices", "valid", 30, "lyra", "set", tmp_path)
    flags = dict(codec="lyra", data="voices", valid="valid", noise="noise", only=[], mixtures=48000, pool=4, minutes=1)
    runs = claims.flags_of(SimpleNamespace(**flags, out=tmp_path))
    trainings = [words[1:] for words in commands if words[0] == "train.py"] + list(runs.values())
    monkeypatch.chdir(HERE)
    for words in trainings:
        args, _ = parse_args([*map(str, words), "--out", str(tmp_path / "r")])
        parsed.append(build_model(vars(args), 64))
    assert len(parsed) == 2 + len(claims.BY_TIME) + len(claims.BY_MIXTURES) + len(claims.TWICE)


def test_no_committed_file_holds_a_path_of_the_machine_it_was_made_on():
    def strings(value):
        if isinstance(value, dict):
            for pair in value.items():
                yield from strings(pair)
        elif isinstance(value, (list, tuple)):
            for one in value:
                yield from strings(one)
        elif isinstance(value, str):
            yield value

    files = [*ASSETS.rglob("*.json"), *ASSETS.rglob("*.jsonl"), *ASSETS.rglob("*.csv"), *ASSETS.rglob("*.pt*")]
    weights = {"separator.pt", "separator_bundled.pt", "separator_lyra.pt", "codec.pth", "transform_codebooks.pth"}
    assert weights | {"results.json"} <= {path.name for path in files}
    for path in files:
        content = torch.load(path, weights_only=True) if ".pt" in path.suffix else path.read_text().splitlines()
        for text in strings(content):
            assert not re.search(r"(^|[\s\"'=:])(/[a-z]+/|~|[A-Z]:\\)", text), (path.name, text)
    assert ".hypothesis/" in (HERE / ".gitignore").read_text().splitlines()


# Training a codec -----------------------------------------------------------------------------------------------------


TINY_CODEC = replace(
    train_codec.SHAPE, widths=(32, 160, 320), strides=(5, 2), latent_dim=160, n_codebooks=2, codebook_size=16
)  # fmt: skip


@pytest.fixture
def chords(tmp_path):
    """A folder of three speakers, each a chord of its own with pauses."""
    rng = np.random.default_rng(0)
    for name in "abc":
        (tmp_path / "speech" / name).mkdir(parents=True)
        time = np.arange(3 * 8000) / 8000
        pitch = rng.uniform(80, 250)
        wav = sum(np.sin(2 * np.pi * pitch * k * time + rng.uniform(0, 6)) / k for k in range(1, 12))
        wav *= 0.1 * (np.sin(2 * np.pi * 2 * time) > -0.5)
        sf.write(tmp_path / "speech" / name / "0.wav", wav + 0.001 * rng.standard_normal(len(wav)), 8000)
    return tmp_path / "speech"


def test_the_network_starts_transparent():
    torch.manual_seed(0)
    codec = SoundStream(TINY_CODEC)
    train_codec.start_transparent(codec)
    wav = torch.randn(2, 1, 8000) * 0.05
    with torch.no_grad():
        assert si_sdr(codec.decoder(codec.encoder(wav))[..., 160:-160], wav[..., 160:-160]).min() > 15


def test_the_first_latents_are_narrow_bands_in_order():
    """A tone excites the latents whose bands it lies in: band k of 160 lies around 25 (k + 0.5) Hz."""
    torch.manual_seed(0)
    codec = SoundStream(TINY_CODEC)
    train_codec.start_transparent(codec)
    for band in (8, 40, 100):
        tone = torch.sin(2 * math.pi * 25 * (band + 0.5) * torch.arange(8000) / 8000)
        with torch.no_grad():
            energy = codec.encoder(0.05 * tone[None, None])[0, :, 3:-3].square().sum(1)
        assert abs(int(energy.argmax()) - band) <= 1 and energy[band - 2 : band + 3].sum() > 0.7 * energy.sum()


def test_k_means_comes_as_near_as_another_and_the_entries_then_follow_the_latents():
    torch.manual_seed(0)
    codec = SoundStream(replace(TINY_CODEC, n_codebooks=1))
    books = train_codec.Codebooks(codec)
    spread = torch.linspace(2, 0.1, 160)

    @torch.no_grad()
    def error(latents):
        return float((codec.quantizer(latents.T[None], 1)[0][0].T - latents).square().sum(1).mean())

    latents = torch.randn(4000, 160) * spread
    books.fit(latents, 320)
    reference = KMeans(16, n_init=1, init="random", random_state=0).fit(latents.numpy()).inertia_ / len(latents)
    assert error(latents) < 1.03 * reference

    assert error(latents + 2) > 2 * reference  # the latents move, and the entries with them
    for _ in range(600):
        moved = (torch.randn(320, 160) * spread + 2).T[None]
        books.follow(moved, codec.quantizer(moved, 1)[1])
    assert error(latents + 2) < 1.1 * reference


@slow
def test_a_resumed_codec_repeats_the_unbroken_one(chords, tmp_path, monkeypatch):
    monkeypatch.setattr(train_codec, "SHAPE", TINY_CODEC)
    monkeypatch.setattr(train_codec, "UNQUANTISED_STEPS", 2)
    validations = []

    def validate(codec, utterances):
        validations.append(len(utterances))
        if len(validations) == 6:  # of the broken run the fourth, after three steps and a checkpoint
            raise KeyboardInterrupt
        return {}

    monkeypatch.setattr(train_codec, "validate", validate)
    settings = dict(data=chords, valid=chords, init=None, minutes=math.inf, mixtures=0.5, sums=0.5, seed=0)
    settings |= dict(batch_size=2, workers=0, compile=False, steps=6)
    train_codec.train(out=tmp_path / "whole", resume=False, every=1e9, **settings)
    with pytest.raises(KeyboardInterrupt):
        train_codec.train(out=tmp_path / "broken", resume=False, every=0, **settings)
    assert torch.load(tmp_path / "broken" / "last.pt", weights_only=True)["step"] == 3
    train_codec.train(out=tmp_path / "broken", resume=True, every=0, **settings)
    whole, broken = (load_file(tmp_path / name / "codec.pth")[1] for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert {tensor.dtype for tensor in whole.values()} == {torch.float16}


def test_a_codec_goes_on_from_a_file_of_its_shape_only(chords, tmp_path, monkeypatch):
    monkeypatch.setattr(train_codec, "SHAPE", TINY_CODEC)
    monkeypatch.setattr(train_codec, "validate", lambda codec, utterances: {})
    torch.manual_seed(0)
    save_soundstream(SoundStream(TINY_CODEC).half(), tmp_path / "first.pth")
    save_soundstream(SoundStream(), tmp_path / "lyra.pth")
    settings = ["--data", chords, "--valid", chords, "--batch_size", 2, "--workers", 0]
    for steps, same in ((0, True), (1, False)):
        out = tmp_path / str(steps)
        limit = ["--steps", 1] if steps else ["--minutes", 1e-9]
        program("recipes.train_codec", monkeypatch, *settings, "--init", tmp_path / "first.pth", *limit, "--out", out)
        first, then = (load_file(path)[1] for path in (tmp_path / "first.pth", out / "codec.pth"))
        # With the RVQ in use from the first step on, its entries too follow what they are given.
        assert torch.equal(first["quantizer.codebooks"], then["quantizer.codebooks"]) == same
        assert all(torch.equal(first[name], then[name]) for name in first) == same
    with pytest.raises(CodecError, match="another shape"):
        train_codec.load_small(tmp_path / "lyra.pth")


def test_log_mel_is_zero_for_the_same_and_grows_with_level():
    log_mel = train_codec.LogMel()
    wav = torch.randn(3, 6400, generator=torch.Generator().manual_seed(0)) * 0.05
    assert log_mel(wav, wav).tolist() == [0, 0, 0]
    assert log_mel(wav * math.sqrt(10), wav) == pytest.approx(torch.ones(3), rel=0.02)  # 10 dB
