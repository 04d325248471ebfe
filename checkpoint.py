"""Checkpoints: what train.py saves of a separator, and how all others load it.

    model, codec, checkpoint = load_separator("assets/separator.pt", "cpu")

A checkpoint is a dictionary of plain tensors, numbers and strings:

    separator           a key of SEPARATORS
    config, model       what the separator is built from, and its weights
    sample_rate         Hz, of the mixtures
    codec               name and fingerprint of the codec that it was trained on
    quantize_before, quantize_after     whether the RVQ was before and after the separator (for one
                        on waveforms never, and its codec only sets the level)
    settings            those of the run, for the record and to resume it
    git                 the revision of the code
    training            only in last.pt: the optimizer and all else that resuming needs
"""

from dataclasses import asdict

import torch

from codecformer import Codecformer, CodecformerConfig
from dac_wrapper import Codec
from program import UserError, git_revision, load_tensors
from sepformer import Sepformer, SepformerConfig

# What --model knows: a module, built from its frozen config, and that config. The module's
# `on_latents` says what it works on: True, latents [B, D, F] of mixtures, for which it predicts
# masks [B, S, D, F]; False, mixtures [B, T], for which it predicts estimates [B, S, T]. A module
# that can be made cheaper for inference has a method `fuse`.
SEPARATORS = {
    "codecformer": (Codecformer, CodecformerConfig),
    "sepformer": (Sepformer, SepformerConfig),
}


def build_model(name: str, sizes: dict, n_speakers: int, latent_dim: int) -> torch.nn.Module:
    """An untrained separator. sizes: fields of its config. Raises UserError if they don't fit."""
    separator, config = SEPARATORS[name]
    sizes = {**sizes, "n_speakers": n_speakers}
    if separator.on_latents:
        sizes["latent_dim"] = latent_dim
    try:
        return separator(config(**sizes))
    except ValueError as error:
        raise UserError(str(error)) from None


def make_checkpoint(
    name: str,
    model: torch.nn.Module,
    codec: Codec,
    settings: dict,
    quantize_before: bool = False,
    quantize_after: bool = False,
) -> dict:
    """A checkpoint of a separator that SEPARATORS knows by `name`, without `training`."""
    return {
        "separator": name,
        "config": asdict(model.config),
        "model": model.state_dict(),
        "sample_rate": codec.sample_rate,
        "codec": {"name": codec.name, "fingerprint": codec.fingerprint},
        "quantize_before": quantize_before,
        "quantize_after": quantize_after,
        "settings": settings,
        "git": git_revision(),
    }


def load_checkpoint(path) -> dict:
    """Reads a checkpoint as plain tensors, never as code. Raises UserError if it is none."""
    checkpoint = load_tensors(path)
    expected = {"separator", "config", "model", "sample_rate", "codec", "settings"}
    expected |= {"quantize_before", "quantize_after"}
    if not isinstance(checkpoint, dict) or not expected <= checkpoint.keys():
        raise UserError(f"{path} is no checkpoint of train.py: give another")
    return checkpoint


def restore_model(checkpoint: dict, path) -> torch.nn.Module:
    """The separator of a checkpoint, ready for inference.

    Raises UserError if it can't be built or its weights don't fit.
    """
    name = checkpoint["separator"]
    if name not in SEPARATORS:
        known = ", ".join(SEPARATORS)
        raise UserError(f"{path} holds a separator {name!r}, known are {known}: add its class")
    separator, config = SEPARATORS[name]
    try:
        model = separator(config(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError, ValueError):
        raise UserError(f"the weights in {path} don't fit its config: give another") from None
    if hasattr(model, "fuse"):
        model.fuse()
    return model.eval()


def check_codec(checkpoint: dict, path, codec: Codec) -> None:
    """Raises UserError if `codec` is not the one that the separator was trained on."""
    trained_on = checkpoint["codec"]
    if trained_on["fingerprint"] != codec.fingerprint:
        name = trained_on["name"]
        raise UserError(
            f"codec {codec.name} has other weights than the {name} that {path} was trained on: "
            f"give --codec its own, or another checkpoint"
        )


def load_codec(checkpoint: dict, path, device, name: str | None = None) -> Codec:
    """The codec that a checkpoint names, or the one called `name`. Raises UserError."""
    try:
        return Codec.load(name or checkpoint["codec"]["name"], checkpoint["sample_rate"], device)
    except UserError as error:
        raise UserError(f"the codec of {path}: {error}") from None


def load_separator(path, device, codec_name: str | None = None):
    """The model of a checkpoint, ready for inference, its codec, and the checkpoint itself.

    codec_name: where the codec lies now, if it has moved. Raises UserError without it, or if it is
    not the one that the separator was trained on.
    """
    checkpoint = load_checkpoint(path)
    codec = load_codec(checkpoint, path, device, codec_name)
    check_codec(checkpoint, path, codec)
    return restore_model(checkpoint, path).to(device), codec, checkpoint
