"""What the tensors in nested arguments and results are called: by the keys that lead to them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graphopt.ir.torch_internals import arguments_by_name, pytree


def input_names(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """Name the tensors among a model's arguments, in flat order: `batch_ids`, `hidden_0`."""
    paths = pytree.tree_flatten_with_path(arguments_by_name(model, args, dict(kwargs)))[0]
    return [_joined(path) for path, leaf in paths if isinstance(leaf, torch.Tensor)]


def output_name(path: tuple[Any, ...]) -> str:
    """Name a result by the keys that lead to it."""
    name = _joined(path)
    return name if name and not name[0].isdigit() else f"output_{name}" if name else "output"


def _joined(path: tuple[Any, ...]) -> str:
    keys = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
    return re.sub(r"\W+", "_", "_".join(keys)).strip("_")
