"""The project's claims, one test each, against closed forms, other libraries and published constants.

python -m pytest -q test_all.py        about two minutes on 2 CPU cores
"""

import csv
import itertools
import json
import math
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

import dac_wrapper
import evaluate
import train
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from codecformer import (
    ACTIVATIONS,
    Codecformer,
    CodecformerConfig,
    Sepformer,
    SepformerConfig,
    Snake1d,
    estimate_latents,
    separate,
    sinusoidal_positions,
)
from dac_wrapper import ASSETS, Codec, CodecError, import_dac, load_dac, measure_lag
from data import DataError, FixedMixtures, SpeakerMixtures, read_audio, resample, write_fixed_set
from losses import LOSSES, ON_LATENTS, keep_hard, pairwise_negative_si_sdr, pit, reorder, si_sdr

HERE = Path(__file__).parent
SPEECH = ASSETS / "speech" / "train"
TINY = dict(d_model=16, n_layers=1, n_heads=2, d_ffn=32, dropout=0.0)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def codec():
    return Codec.load("bundled")


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


def load_quietly(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a random codec has no lag to measure and says so
        return Codec.load(*args, **kwargs)


# The separator -------------------------------------------------------------------------------------------------------


def gmac_per_second(model, seconds, *shape):
    """On the meta device, where nothing is computed; the plain attention kernel is the one that is counted whole."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.to("meta").eval()(torch.empty(*shape, device="meta"))
    return counter.get_total_flops() / 2e9 / seconds


def test_codecformer_has_the_published_size_and_cost():
    assert sum(p.numel() for p in Codecformer().parameters()) == 17_361_408
    for seconds, published in ((1, 0.99), (4, 1.05), (8, 1.13)):
        cost = gmac_per_second(Codecformer(), seconds, 1, 1024, 50 * seconds)
        assert cost == pytest.approx(published, abs=0.005)


def test_sepformer_has_the_published_size_and_cost():
    assert sum(p.numel() for p in Sepformer().parameters()) == 25_679_361
    for seconds, published in ((1, 69.0), (4, 59.2), (8, 58.0)):
        assert gmac_per_second(Sepformer(), seconds, 1, 8000 * seconds) == pytest.approx(published, rel=0.001)


def test_sepformer_takes_any_length_and_level_and_every_parameter_learns():
    model = Sepformer(SepformerConfig(n_speakers=3, chunk=6, **TINY))
    for length in (*range(1, 33), 399, 2001):
        assert model(torch.randn(2, length)).shape == (2, 3, length)
    model(torch.randn(2, 400)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    mixture = torch.randn(1, 800)
    assert torch.allclose(model(100 * mixture), 100 * model(mixture), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", [1, 5, 6, 7, 50])
def test_every_frame_lies_in_two_of_sepformers_chunks(length):
    """With nothing between cutting and joining, overlap-add returns twice the input."""
    model = Sepformer(SepformerConfig(chunk=6, **TINY)).eval()
    model.bottleneck = model.blocks = model.norm = model.expand = model.gate_value = torch.nn.Identity()
    model.split = torch.nn.Conv2d(16, 32, 1, bias=False)
    model.split.weight.data = torch.eye(16).repeat(2, 1)[:, :, None, None]
    model.gate = Constant(1.0)
    x = torch.rand(3, 16, length)
    assert torch.allclose(model._mask(x), 2 * x[:, None].expand(-1, 2, -1, -1))


def test_gradients_reach_the_separator_and_not_the_codec(codec, speech):
    args = train.parse_args(["--loss", "csi_sdr", "--quantize_before", "--quantize_after"])
    batch = {"mixture": speech.sum(0)[None, :4000], "sources": speech[None, :, :4000]}
    for kind, flags in (
        ("codecformer", args),
        ("sepformer", train.parse_args(["--loss", "si_sdr", "--model", "sepformer"])),
    ):
        flags.__dict__.update(TINY)
        model = train.build_model(flags, codec)
        train.separation_loss(model, codec, batch, flags, "cpu").mean().backward()
        assert type(model).__name__.lower() == kind
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert all(p.grad is None and not p.requires_grad for p in codec.dac.parameters())


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
            estimate_latents(model, codec, mixture * gain, False, True),
            codec.quantize(estimate_latents(model, codec, mixture * gain)),
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
    snake, x = Snake1d(2), torch.tensor([[[0.3, -2.0], [1.5, 0.0]]])
    snake.alpha.data = torch.tensor([[[0.5], [3.0]]])
    expected = [[x_ + math.sin(a * x_) ** 2 / a for x_ in row] for a, row in zip((0.5, 3.0), x[0].tolist())]
    assert torch.allclose(snake(x)[0], torch.tensor(expected), atol=1e-6)


def test_positions_are_those_of_attention_is_all_you_need():
    table = sinusoidal_positions(5000, 64)
    assert table[4321, 10].item() == pytest.approx(math.sin(4321 / 10000 ** (10 / 64)), abs=1e-3)
    assert table[4321, 11].item() == pytest.approx(math.cos(4321 / 10000 ** (10 / 64)), abs=1e-3)


@pytest.mark.parametrize(
    "wrong", [dict(n_heads=3), dict(n_speakers=1), dict(activation="swish"), dict(dropout=1.0), dict(n_layers=0)]
)
def test_a_config_that_cannot_be_built_is_refused(wrong):
    with pytest.raises(ValueError):
        CodecformerConfig(**wrong)
    if "activation" not in wrong:
        with pytest.raises(ValueError):
            SepformerConfig(**wrong)


# The codec is exact in time, length and level ------------------------------------------------------------------------


def test_every_length_from_one_sample_to_two_hops_comes_back(codec, official_file):
    other = load_quietly(str(official_file[0]), sample_rate=8000)  # resamples 8 -> 16 -> 8 kHz
    for c in (codec, other):
        for length in range(1, 2 * c.hop * c.sample_rate // c.codec_rate + 1):
            wav = torch.randn(1, length)
            latents = c.encode(wav)
            assert c.decode(latents, length).shape == (1, length)
            assert latents.shape[-1] >= length * c.frame_rate / c.sample_rate


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100])
def test_any_data_rate_is_resampled_to_the_codec_and_back_in_time(codec, speech, rate):
    wav = torch.from_numpy(np.stack([resample(s.numpy(), 8000, rate) for s in speech]))
    c = Codec(codec.dac, rate)
    gain = c.gain(wav)
    out = c.decode(c.encode(wav * gain), wav.shape[-1]) / gain
    assert measure_lag(wav[0], out[0], 50)[0] == 0
    assert si_sdr(out, wav).min() > 15


def test_bundled_codec_has_no_lag_and_the_documented_facts(codec, speech):
    assert codec.lag == 0
    assert (codec.sample_rate, codec.frame_rate, codec.latent_dim, codec.bitrate) == (8000, 50.0, 320, 6000.0)
    gain = codec.gain(speech)
    assert si_sdr(codec.decode(codec.encode(speech * gain), 16000), speech).min() > 25


@pytest.mark.parametrize("planted", [-31, -8, 1, 8, 57, 200])
def test_a_planted_lag_is_measured_and_removed(codec, speech, planted):
    class Late(torch.nn.Module):
        """A decoder whose output comes `planted` samples late, as trained weights can make it."""

        def forward(self, latents):
            wav = codec.dac.decoder(latents)
            return torch.nn.functional.pad(wav, (planted, 0))[..., : wav.shape[-1]]

    shifted, _ = load_dac(ASSETS / "codec.pth")
    shifted.decoder = Late()
    late = Codec(shifted, 8000)
    assert late.lag == planted
    gain = speech.new_full((2, 1), 1.0)
    there_and_back = late.decode(late.encode(speech * gain), 16000)
    straight = codec.decode(codec.encode(speech * gain), 16000)
    # An early codec has lost its first samples for good, a late one sees more frames at the end; all else is equal.
    lost = max(-planted, 0)
    assert torch.allclose(there_and_back[:, lost:-320], straight[:, lost:-320], atol=1e-4)


def test_an_unshifted_signal_scores_where_a_shifted_one_fails(speech):
    """Why the lag matters: 4 samples at 8 kHz turn a perfect estimate into one of about -10 dB or worse."""
    assert si_sdr(speech.roll(4, -1), speech).max() < 0
    assert measure_lag(speech[0], speech[0].roll(4), 10)[0] == 4


@pytest.mark.parametrize("factor", [1e-3, 0.05, 30.0])
def test_level_in_equals_level_out(codec, speech, factor):
    model = Codecformer(CodecformerConfig(latent_dim=codec.latent_dim, **TINY)).eval()
    for process in (codec.transmit, lambda wav: separate(model, codec, wav)):
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
        assert torch.allclose(codec.quantize(latents, 2), few, atol=1e-5)
        out = model.decode(reference)[:, 0]
    assert out.shape[-1] == 3192  # the 8 lost samples that the wrapper gives back
    codec.lag = 0
    assert torch.allclose(codec.decode(reference, 3200)[:, :3192], out, atol=1e-5)
    assert codec.bitrate == 3 * 5 * 50


def test_codec_is_frozen_but_differentiable_and_weight_norm_is_folded(codec, speech):
    assert not any(p.requires_grad for p in codec.dac.parameters())
    assert not any("weight_g" in name for name, _ in codec.dac.named_parameters())
    latents = codec.encode(speech).requires_grad_()
    for process in (lambda z: z, codec.quantize):
        (gradient,) = torch.autograd.grad(codec.decode(process(latents), 16000).square().sum(), latents)
        assert gradient.isfinite().all() and gradient.any()


def test_more_codebooks_transmit_better(codec, speech):
    quality = [si_sdr(codec.transmit(speech, n_codebooks=n), speech).mean().item() for n in (1, 4, 12)]
    assert quality[0] < quality[1] < quality[2]
    for n in (0, 13):
        with pytest.raises(ValueError, match="1 to 12"):
            codec.quantize(codec.encode(speech), n)


def test_making_the_small_codec_writes_an_official_file_that_transmits_speech(tmp_path, speech):
    path = tmp_path / "codec.pth"
    dac_wrapper.save_dac(dac_wrapper.fit_codec(SPEECH, seconds=12), path)
    codec = Codec.load(str(path))
    assert codec.lag == 0
    assert si_sdr(codec.transmit(speech), speech).mean() > 3
    assert set(torch.load(path, weights_only=True)) == {"state_dict", "metadata"}


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_bad_codecs_are_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps(Bomb()))
    torch.save({"state_dict": Bomb(), "metadata": {}}, tmp_path / "bomb2.pth")
    (tmp_path / "empty.pth").touch()
    truncated = (ASSETS / "codec.pth").read_bytes()[:100000]
    (tmp_path / "truncated.pth").write_bytes(truncated)
    torch.save({"state_dict": {}, "metadata": {"kwargs": {}}}, tmp_path / "other.pth")
    for name in ("bomb.pth", "bomb2.pth", "empty.pth", "truncated.pth", "other.pth", "dac_99khz"):
        with pytest.raises(CodecError) as caught:
            Codec.load(name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(CodecError, match="out of range"):
        Codec.load("bundled", sample_rate=100)


def test_official_weights_are_fetched_whole_or_not_at_all(tmp_path, monkeypatch, official_file):
    monkeypatch.setattr(dac_wrapper, "CACHE", tmp_path / "cache")
    cached = tmp_path / "cache" / dac_wrapper.OFFICIAL["dac_16khz"][1]
    monkeypatch.setattr(dac_wrapper, "RELEASES", "http://127.0.0.1:9/")  # nobody listens there
    with pytest.raises(CodecError, match="can't fetch"):
        Codec.load("dac_16khz")
    release = tmp_path / "0.0.5" / "weights_16khz.pth"
    release.parent.mkdir()
    release.write_bytes(official_file[0].read_bytes())
    monkeypatch.setattr(dac_wrapper, "RELEASES", tmp_path.as_uri() + "/")
    genuine = dac_wrapper.urllib.request.urlopen

    def cut_short(url, timeout):
        response = genuine(url, timeout=timeout)
        response.headers.replace_header("Content-Length", str(10**9))
        return response

    monkeypatch.setattr(dac_wrapper.urllib.request, "urlopen", cut_short)
    with pytest.raises(CodecError, match="the connection ended"):
        Codec.load("dac_16khz")
    assert list(cached.parent.iterdir()) == []
    monkeypatch.setattr(dac_wrapper.urllib.request, "urlopen", genuine)
    assert load_quietly("dac_16khz").codec_rate == 16000
    assert cached.read_bytes() == release.read_bytes()


# Losses --------------------------------------------------------------------------------------------------------------


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
    estimates = np.stack(
        [0.8 * np.roll(sources[0], 3) + 0.3 * sources[1] + 0.1 * rng.standard_normal(n), sources[1] + 0.05 * sources[0]]
    )
    # Printed by mir_eval 0.8.2's bss_eval_sources for these signals; the mixture's improvement over itself is 0.
    expected = np.mean([15.69859854, 19.35666372])
    scores = evaluate.score(estimates, sources, np.zeros(n) + 1e-3 * sources[0], sources, 8000)
    zero = evaluate.score(np.stack([1e-3 * sources[0]] * 2), sources, 1e-3 * sources[0], sources, 8000)
    sdr_of_mixture = zero["sdr"]
    assert scores["sdr_i"] + sdr_of_mixture == pytest.approx(expected, abs=1e-3)
    assert zero["sdr_i"] == pytest.approx(0, abs=1e-6)


def test_silent_and_constant_signals_give_finite_losses_and_gradients(codec):
    for source in (torch.zeros(1, 2, 800), torch.full((1, 2, 800), 0.3)):
        for estimate in (torch.zeros(1, 2, 800), torch.randn(1, 2, 800)):
            estimate.requires_grad_()
            loss, _ = pit(pairwise_negative_si_sdr(estimate, source))
            loss.sum().backward()
            assert loss.isfinite().all() and estimate.grad.isfinite().all()
        for loss in LOSSES.values():
            shape = (codec.latent_dim, 5) if loss is LOSSES["embedding"] else (800,)
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
        assert si_sdr(reorder(estimates, assignment), sources).min() > 10
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
        loss, assignment = pit(LOSSES[name](codec, perfect, sources))
        assert loss.item() < reached and assignment.tolist() == [[0, 1]]
        loss, assignment = pit(LOSSES[name](codec, perfect.flip(1), sources))
        assert loss.item() < reached and assignment.tolist() == [[1, 0]]
        # What either of the other two asks for is not perfect here.
        other = codec.transmit(sources) if name == "si_sdr" else sources
        other = codec.quantize(perfect) if name in ON_LATENTS else other
        assert reached / 2 < pit(LOSSES[name](codec, other, sources))[0].item() < 0
    assert (codec.decode(codec.encode(sources), 16000) - sources).square().mean() < 1e-2 * sources.square().mean()


def test_mixtures_beyond_the_threshold_leave_the_step():
    assert keep_hard(torch.tensor([-31.0, -29.0, -30.0, 3.0])).tolist() == [-29.0, 3.0]


# Data ----------------------------------------------------------------------------------------------------------------


def same(a, b) -> bool:
    return a["name"] == b["name"] and np.array_equal(a["mixture"], b["mixture"])


def test_mixtures_are_a_pure_function_of_seed_epoch_and_index():
    first, second = (SpeakerMixtures(SPEECH, 8000, 1.0, 50, seed=3, speeds=(90, 100, 110)) for _ in range(2))
    later = [second[i] for i in (7, 0, 31)]  # in another order
    assert all(same(first[i], item) for i, item in zip((7, 0, 31), later))
    assert not same(first[7], first[8])
    second.epoch = 1
    assert not same(first[7], second[7])
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
    class Of1000:
        def __len__(self):
            return 1000

    args = train.parse_args(["--batch_size", "6", "--accumulate", "2"])
    whole = train.epoch_batches(Of1000(), args, 5, 0, 1)
    args.batch_size = 3
    ranks = [train.epoch_batches(Of1000(), args, 5, rank, 2) for rank in range(2)]
    for k, batch in enumerate(whole):
        assert not set(ranks[0][k]) & set(ranks[1][k])
        assert sorted(ranks[0][k] + ranks[1][k]) == sorted(batch)
    assert len({i for batch in whole for i in batch}) == len(whole) * 6
    assert train.epoch_batches(Of1000(), args, 6, 0, 2) != ranks[0]


def test_a_fixed_set_reads_back_sample_exact(tmp_path):
    data = SpeakerMixtures(SPEECH, 8000, 1.0, 4, seed=1)
    write_fixed_set(data, tmp_path / "set")
    fixed = FixedMixtures(tmp_path / "set", 8000)
    assert len(fixed) == 4 and fixed.n_speakers == 2
    for index in range(4):
        item, original = fixed[index], data[index]
        assert np.array_equal(item["sources"].sum(0), item["mixture"])
        assert np.abs(item["sources"] - original["sources"]).max() <= 0.5001 / 32768
    cut = FixedMixtures(tmp_path / "set", 8000, seconds=0.5, speeds=(80, 100, 125))
    assert np.allclose(cut[2]["sources"].sum(0), cut[2]["mixture"], atol=1e-6)
    assert cut[2]["mixture"].shape == (4000,) and same(cut[2], cut[2])
    with pytest.raises(DataError, match="exists already"):
        write_fixed_set(data, tmp_path / "set")


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


def test_each_bad_recording_is_one_clear_line_that_names_it(tmp_path, codec):
    model = Codecformer(CodecformerConfig(latent_dim=codec.latent_dim, **TINY)).eval()
    checkpoint = {"quantize_before": False, "quantize_after": False}
    for path in bad_recordings(tmp_path):
        with pytest.raises(DataError) as caught:
            evaluate.separate_file(model, codec, checkpoint, path)
        assert path.name in str(caught.value) and "\n" not in str(caught.value)


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
    (tmp_path / "set" / "s2" / "x.wav").unlink()
    with pytest.raises(DataError, match="missing"):
        FixedMixtures(tmp_path / "set", 8000)


# The programs --------------------------------------------------------------------------------------------------------

SHORT = "--d_model 16 --n_layers 1 --n_heads 2 --d_ffn 32 --seconds 0.5 --valid_size 2 --workers 0".split()


def run(*command, cwd=HERE):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=cwd, timeout=240)


def run_train(*flags):
    train.train(train.parse_args([*SHORT, *map(str, flags)]))


def logged(folder, name="log.csv") -> list[dict]:
    with open(folder / name) as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A separator trained for two updates."""
    out = tmp_path_factory.mktemp("run") / "r"
    run_train("--out", out, "--epochs", 2, "--epoch_size", 4, "--batch_size", 4)
    return out


def test_a_run_repeats_and_resumes_to_the_same_weights(tmp_path):
    flags = ["--epoch_size", 8, "--batch_size", 4, "--epochs", 2]
    run_train("--out", tmp_path / "a", *flags)
    run_train("--out", tmp_path / "b", *flags)
    half = train.parse_args([*SHORT, *map(str, flags), "--out", str(tmp_path / "c"), "--save_every", "1"])
    genuine, calls = train.save, []

    def killed_after_three(path, checkpoint):
        genuine(path, checkpoint)
        calls.append(path.name)
        if calls.count("last.pt") == 5:  # in the middle of the second epoch
            raise KeyboardInterrupt

    train.save = killed_after_three
    with pytest.raises(KeyboardInterrupt):
        train.train(half)
    train.save = genuine
    stopped = torch.load(tmp_path / "c" / "last.pt", weights_only=True)
    assert (stopped["epoch"], stopped["step"]) == (1, 1)
    half.resume = True
    train.train(half)
    a, b, c = (torch.load(tmp_path / x / "last.pt", weights_only=True) for x in "abc")
    for other in (b, c):
        assert all(torch.equal(a["model"][k], other["model"][k]) for k in a["model"])
    assert logged(tmp_path / "a")[-1]["valid_si_sdr_i"] == logged(tmp_path / "c")[-1]["valid_si_sdr_i"]


def test_two_ranks_with_half_the_batch_compute_what_one_rank_does(tmp_path):
    flags = [*SHORT, "--epochs", "1", "--epoch_size", "8", "--loss", "csi_sdr"]
    run_train("--out", tmp_path / "one", "--epochs", 1, "--epoch_size", 8, "--loss", "csi_sdr", "--batch_size", 8)
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    result = run(*torchrun, "train.py", *flags, "--batch_size", 4, "--out", tmp_path / "two")
    assert result.returncode == 0, result.stderr[-2000:]
    one, two = logged(tmp_path / "one")[-1], logged(tmp_path / "two")[-1]
    assert float(one["loss"]) == pytest.approx(float(two["loss"]), abs=1e-4)
    assert float(one["valid_si_sdr_i"]) == pytest.approx(float(two["valid_si_sdr_i"]), abs=1e-3)


def child(output, flags, limit, poison, environment):
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    genuine, calls = train.separation_loss, itertools.count()
    train.separation_loss = lambda *a: genuine(*a) * (math.nan if next(calls) == poison else 1)
    train.main([*SHORT, "--seconds", "0.1", *map(str, flags)])


def launch(output, *flags, limit=resource.RLIM_INFINITY, poison=None, **environment):
    """train.py in a process of its own, forked from one that has imported torch, but never run it.

    limit: bytes that a file may have. poison: number of the batch whose loss is NaN.
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
            resumed.add((reached["epoch"], reached["step"]))
    assert finish(launch(tmp_path / "end.txt", *flags, "--out", out, "--resume")) == [0]
    assert len(resumed) >= 10 and torn >= 3
    assert (out / "steps.csv").read_bytes() == (tmp_path / "unbroken" / "steps.csv").read_bytes()
    assert len(logged(out, "steps.csv")) == 100
    for killed, unbroken in zip(logged(out), logged(tmp_path / "unbroken"), strict=True):
        assert all(killed[key] == unbroken[key] for key in killed if "second" not in key)
    a, b = (torch.load(folder / "last.pt", weights_only=True)["model"] for folder in (out, tmp_path / "unbroken"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_signals_save_first_in_training_and_in_validation(tmp_path):
    flags = ["--out", tmp_path / "r", "--workers", "1", "--epoch_size", 200, "--batch_size", 1]
    process = launch(tmp_path / "1.txt", *flags, "--valid_size", 500)
    wait_until((tmp_path / "r" / "log.csv").exists, process)
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == [130] and "stopped by signal" in (tmp_path / "1.txt").read_text()
    assert not logged(tmp_path / "r")
    process = launch(tmp_path / "2.txt", *flags, "--resume")
    wait_until(lambda: len(logged(tmp_path / "r", "steps.csv")) > 2, process)
    process.terminate()
    assert finish(process) == [130] and "Traceback" not in (tmp_path / "2.txt").read_text()
    stopped = torch.load(tmp_path / "r" / "last.pt", weights_only=True)
    assert (stopped["epoch"], stopped["step"]) == (0, len(logged(tmp_path / "r", "steps.csv")))
    # One of two ranks is told, both stop at the same step.
    processes = launch_two(tmp_path, "--out", tmp_path / "two", "--epoch_size", 200, "--batch_size", 1)
    wait_until(lambda: (tmp_path / "two" / "best.pt").exists(), processes[1])
    processes[1].terminate()
    assert finish(*processes) == [130, 130] and (tmp_path / "two" / "last.pt").exists()


@pytest.mark.parametrize("full", ["steps.csv", "last.pt"])
def test_a_full_disk_ends_in_one_line_and_leaves_the_last_checkpoint_whole(tmp_path, full):
    out = tmp_path / "r"
    flags = ["--out", out, "--epoch_size", 4, "--batch_size", 1, "--save_every", 2, "--resume"]
    run_train(*flags[:-1], "--epochs", 1)
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
    (index,) = [k for k in range(199) if skipping[k]["broken"]][:1]
    assert same(skipping[index], {**mixtures[index + 1], "broken": skipping[index]["broken"]})


def test_many_broken_files_stop_the_run(tmp_path, damaged):
    paths = sorted(damaged.rglob("*.flac"))
    for path in paths[::2]:
        path.write_bytes(b"")
    with pytest.raises(DataError, match="more than a tenth"):
        run_train("--data", damaged, "--epoch_size", 96, "--batch_size", 2, "--out", tmp_path / "half")
    for path in paths:
        path.write_bytes(b"")
    flags = ["--data", damaged, "--epoch_size", 96, "--workers", 1, "--out", tmp_path / "all"]
    assert finish(launch(tmp_path / "all.txt", *flags)) == [1]
    (error,) = [line for line in (tmp_path / "all.txt").read_text().splitlines() if line.startswith("error: ")]
    assert error.startswith("error: 100 mixtures in a row can't be made") and str(damaged) in error


def test_a_loss_that_is_not_finite_leaves_the_update_out_and_a_hundred_stop_the_run(tmp_path):
    flags = ["--epochs", 1, "--epoch_size", 8, "--batch_size", 1, "--out"]
    assert finish(launch(tmp_path / "one.txt", *flags, tmp_path / "one", poison=3)) == [0]
    # On one of two ranks: both leave it out, or their weights and losses would part.
    assert finish(*launch_two(tmp_path, *flags, tmp_path / "two", poison=1)) == [0, 0]
    for name, step, of in (("one", 4, 8), ("two", 2, 4)):
        losses = [float(row["loss"]) for row in logged(tmp_path / name, "steps.csv")]
        assert [k + 1 for k, loss in enumerate(losses) if not math.isfinite(loss)] == [step] and len(losses) == of
        weights = torch.load(tmp_path / name / "last.pt", weights_only=True)
        assert weights["skipped"] == 1 and all(w.isfinite().all() for w in weights["model"].values())
    out = tmp_path / "diverged"
    with pytest.raises(train.SettingsError, match="no finite loss"):
        run_train(
            "--lr", 1e36, "--epoch_size", 400, "--batch_size", 1, "--seconds", 0.1, "--save_every", 1, "--out", out
        )
    weights = torch.load(out / "last.pt", weights_only=True)
    assert weights["in_a_row"] == 99 and all(w.isfinite().all() for w in weights["model"].values())


@pytest.mark.parametrize("kind", ["speakers", "fixed"])
def test_each_loss_of_two_ranks_is_that_of_one(tmp_path, damaged, kind):
    data = damaged
    if kind == "fixed":
        data = tmp_path / "set"
        write_fixed_set(SpeakerMixtures(SPEECH, 8000, 0.2, 40), data)
        broken = sorted((data / "s1").iterdir())[7]
        broken.write_bytes(broken.read_bytes()[:500])
    flags = ["--data", data, "--epochs", 1, "--epoch_size", 40, "--out"]
    one = launch(tmp_path / "one.txt", *flags, tmp_path / "one", "--batch_size", 2)
    assert finish(one, *launch_two(tmp_path, *flags, tmp_path / "two", "--batch_size", 1)) == [0, 0, 0]
    one, two = ([float(row["loss"]) for row in logged(tmp_path / name, "steps.csv")] for name in ("one", "two"))
    assert len(one) == 20 and one == pytest.approx(two, abs=1e-4)
    one, two = logged(tmp_path / "one")[-1], logged(tmp_path / "two")[-1]
    assert one["broken"] == two["broken"] and int(one["broken"]) > 0


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPUs")
def test_the_compiled_separator_computes_the_same(tmp_path):
    flags = ["--epochs", 1, "--epoch_size", 4, "--batch_size", 2, "--valid_size", 1, "--out"]
    run_train(*flags, tmp_path / "plain")
    run_train(*flags, tmp_path / "compiled", "--compile")
    plain, compiled = (
        [float(row["loss"]) for row in logged(tmp_path / name, "steps.csv")] for name in ("plain", "compiled")
    )
    assert len(plain) == 2 and plain == pytest.approx(compiled, abs=1e-3)
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("plain", "compiled"))
    assert a.keys() == b.keys()


def test_training_learns_to_tell_two_tones_apart(tmp_path):
    for speaker, base in (("low", 200), ("high", 1500)):
        for k in range(4):
            write_tone(tmp_path / "tones" / speaker / f"{k}.wav", base * (1 + 0.1 * k))
    run_train(
        "--out", tmp_path / "r", "--data", tmp_path / "tones", "--valid", tmp_path / "tones", "--epochs", 2,
        "--epoch_size", 240, "--batch_size", 8, "--lr", "0.01", "--speeds", 100,
    )  # fmt: skip
    assert float(logged(tmp_path / "r")[-1]["valid_si_sdr_i"]) > 5


def test_evaluate_writes_all_it_promises(trained, tmp_path):
    data = SpeakerMixtures(SPEECH.parent / "valid", 8000, 2.0, 2)
    write_fixed_set(data, tmp_path / "set")
    result = run("evaluate.py", "--ckpt", trained / "best.pt", "--data", tmp_path / "set", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr[-2000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["n_mixtures"] == 2 and set(results["rows"]) == {"mixture", "ceiling", "codecformer"}
    for row in results["rows"].values():
        assert set(row) == set(evaluate.METRICS)
        assert all(math.isfinite(v["mean"]) and math.isfinite(v["ci95"]) for v in row.values())
    assert results["rows"]["mixture"]["si_sdr_i"]["mean"] == pytest.approx(0, abs=1e-5)
    assert results["rows"]["ceiling"]["si_sdr"]["mean"] > 20
    with open(tmp_path / "out" / "results.csv") as file:
        lines = list(csv.DictReader(file))
    scores = [float(line["codecformer_si_sdr"]) for line in lines]
    assert np.mean(scores) == pytest.approx(results["rows"]["codecformer"]["si_sdr"]["mean"], abs=1e-3)
    # The file on disk scores what the table says.
    reference = FixedMixtures(tmp_path / "set", 8000)
    for line, item in zip(lines, reference):
        estimates = [read_audio(tmp_path / "out" / "audio" / f"{line['mixture']}_s{k}.wav")[0] for k in (1, 2)]
        again = si_sdr(torch.from_numpy(np.stack(estimates)), torch.from_numpy(item["sources"])).mean().item()
        assert again == pytest.approx(float(line["codecformer_si_sdr"]), abs=1e-3)
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<audio") == page.count("<img") == 2 * 5
    assert 'src="http' not in page


def test_bundled_weights_beat_the_mixture_on_speakers_never_trained_on():
    model, codec, checkpoint = evaluate.load_separator(ASSETS / "separator.pt", "cpu")
    data = FixedMixtures(ASSETS / "test_mixtures", codec.sample_rate)
    gains = []
    for index in range(0, len(data), 2):
        signals, transmitted = evaluate.separate_mixture(model, codec, checkpoint, data[index])
        reached, before = (
            si_sdr(torch.from_numpy(signals[row]), torch.from_numpy(transmitted)) for row in ("codecformer", "mixture")
        )
        gains.append((reached - before).mean().item())
    assert len(data) >= 40 and np.mean(gains) > 0


@pytest.mark.parametrize(
    "rate, channels, samples, subtype",
    [(8000, 1, 800, "PCM_16"), (44100, 2, 30001, "PCM_24"), (22050, 6, 4444, "FLOAT"), (11025, 1, 20000, "PCM_U8")],
)
def test_separated_recordings_keep_rate_length_and_level(trained, codec, tmp_path, rate, channels, samples, subtype):
    model, codec, checkpoint = evaluate.load_separator(trained / "best.pt", "cpu")
    with torch.no_grad():  # masks of one half each, so that the level that must come back is known
        model.mask_activation = Constant(0.5)
    wav = 0.2 * np.sin(2 * np.pi * 300 * np.arange(samples) / rate)
    sf.write(tmp_path / "mix.wav", np.repeat(wav[:, None], channels, 1), rate, subtype=subtype)
    estimates, out_rate = evaluate.separate_file(model, codec, checkpoint, tmp_path / "mix.wav")
    assert out_rate == rate and estimates.shape == (2, samples)
    middle = slice(samples // 4, -samples // 4)
    assert estimates[:, middle].std() == pytest.approx(wav[middle].std() / 2, rel=0.1)


class Constant(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return torch.full_like(x, self.value)


def test_bad_checkpoints_are_refused(trained, tmp_path, official_file):
    good = torch.load(trained / "best.pt", weights_only=True)
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "empty.pt").touch()
    torch.save({**good, "config": {**good["config"], "d_model": 32}}, tmp_path / "other_config.pt")
    torch.save({**good, "codec": {**good["codec"], "fingerprint": "0"}}, tmp_path / "other_codec.pt")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    for name in ("bomb", "empty", "other_config", "other_codec", "other", "missing"):
        with pytest.raises(train.SettingsError) as caught:
            evaluate.load_separator(tmp_path / f"{name}.pt", "cpu")
        assert "\n" not in str(caught.value) and name in str(caught.value)
    with pytest.raises(train.SettingsError, match="another codec"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluate.load_separator(trained / "best.pt", "cpu", str(official_file[0]))


def test_mistakes_on_the_command_line_end_in_one_line_and_a_failure(trained, tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    sf.write(tmp_path / "short.wav", np.ones(80), 8000)
    cases = [
        (["train.py", "--resume", "--out", tmp_path / "new"], "nothing to resume"),
        (["train.py", "--out", trained], "holds a run already"),
        (["train.py", "--out", blocked / "run"], "can't write"),
        (["train.py", "--data", SPEECH / "carlo", "--out", tmp_path / "x"], "at least 2 are needed"),
        (["train.py", "--codec", "dac_7khz", "--out", tmp_path / "x"], "no codec dac_7khz"),
        (["train.py", "--lr", "-1", "--out", tmp_path / "x"], "--lr is -1.0, it must be positive"),
        (["train.py", "--n_heads", "5", "--out", tmp_path / "x"], "multiple of n_heads"),
        (["evaluate.py", "--ckpt", tmp_path / "none.pt"], "no checkpoint"),
        (["evaluate.py", "--ckpt", trained / "best.pt", "--out", blocked / "y"], "can't write"),
        (["evaluate.py", "--ckpt", trained / "best.pt", "--mix", tmp_path / "short.wav", "--out", tmp_path / "z"], "0.1 s"),
        (["data.py", "mix", "--speech", SPEECH / "carlo", "--out", tmp_path / "set"], "at least 2 are needed"),
        (["data.py", "mix", "--speech", SPEECH, "--out", blocked / "set", "--n", "1"], "can't write"),
    ]  # fmt: skip
    running = [
        (subprocess.Popen([sys.executable, *map(str, c)], stdout=-1, stderr=-1, text=True, cwd=HERE), message)
        for c, message in cases
    ]
    for process, message in running:
        _, stderr = process.communicate(timeout=240)
        assert process.returncode not in (0, None) and "Traceback" not in stderr, stderr
        assert message in (stderr.strip().splitlines() or [""])[-1], (message, process.returncode, stderr)
    assert not (tmp_path / "x").exists()  # nothing is left behind


@pytest.mark.parametrize("config", sorted(p.name for p in (HERE / "config").glob("*.txt")))
def test_every_config_is_understood(config):
    args = train.parse_args([f"@{HERE / 'config' / config}"])
    assert args.n_layers == 16 and args.d_model == 256 and args.lr == 1.5e-4 and args.batch_size == 1
