"""The weights that a recurrent layer of certain options runs with; torch 2.13 reads beyond those that are smaller."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn


def recurrent_weights(mode: str, options: dict[str, Any], *, most: int) -> dict[str, tuple[int, ...]] | None:
    """Return shapes by names, in the order in which the operators take them.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        options: of the layer's constructor, by name; they may be a stranger's.
        most: how many layers there may be.

    Returns:
        None where no layer has such options.
    """
    if type(options["num_layers"]) is int and 0 < options["num_layers"] <= most:
        with torch.device("meta"), contextlib.suppress(TypeError, ValueError, RuntimeError):
            layer = nn.RNNBase(mode, **options)
            return {name: tuple(getattr(layer, name).shape) for name in layer._flat_weights_names}
    return None
