"""Models built by the user's own code, with only their weights taken from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from graphopt.errors import LoadError, foreign_code
from graphopt.loading.contents import FileKind, identify
from graphopt.loading.functions import importable, resolve_function
from graphopt.loading.pickles import load_plain_pickle
from graphopt.loading.refusal import DamagedError

# Keys under which training scripts keep the state dict of a checkpoint.
_CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model", "net", "weights")
_SHOWN = 3


def build_model(factory: str) -> nn.Module:
    """Call the factory `package.module:function` without arguments and return its module.

    Raises:
        UsageError: There is no such function.
        LoadError: It raised, or returned something other than a module.
    """
    function = resolve_function(factory, "--factory")
    failed = foreign_code(
        lambda said, _: LoadError(
            f"The factory `{factory}` raised {said}. It is called without arguments and must return a torch.nn.Module."
        )
    )
    with importable(Path.cwd()), failed:
        model = function()
    if not isinstance(model, nn.Module):
        raise LoadError(f"The factory `{factory}` returned a {type(model).__name__}, not a torch.nn.Module.")
    return model


def read_weights(data: bytes, source: str) -> dict[str, torch.Tensor]:
    """Return the state dict in a safetensors or weights-only torch file; raises `LoadError` otherwise."""
    try:
        kind, _ = identify(data)
        if kind is FileKind.SAFETENSORS:
            return safetensors.torch.load(data)
        if kind is FileKind.TORCH_PICKLE:
            return _state_dict(load_plain_pickle(data), source)
    except (DamagedError, SafetensorError) as err:
        raise LoadError(f"Cannot read the weights in `{source}`: {err}.") from err
    raise LoadError(
        f"`{source}` is {kind.value}; with `--factory` it must be weights alone, in a `.safetensors` file or a "
        "`.pt` file that `torch.save(model.state_dict(), ...)` wrote."
    )


def _state_dict(value: Any, source: str) -> dict[str, torch.Tensor]:
    found = value
    if isinstance(value, Mapping) and not is_state_dict(value):
        nested = [value[key] for key in _CHECKPOINT_KEYS if is_state_dict(value.get(key))]
        found = nested[0] if len(nested) == 1 else value
    if not is_state_dict(found):
        raise LoadError(f"`{source}` holds {describe(value)}, not a state dict (names and tensors).")
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def is_state_dict(value: object) -> bool:
    """Tell whether `value` maps names to tensors (or to a module's `_extra_state`)."""
    return isinstance(value, Mapping) and any(isinstance(item, torch.Tensor) for item in value.values()) and all(
        isinstance(key, str) and (isinstance(item, torch.Tensor) or key.endswith("_extra_state"))
        for key, item in value.items()
    )  # fmt: skip


def describe(value: object) -> str:
    """Return what a loaded value is, in words."""
    if is_state_dict(value):
        return f"a state dict ({len(value)} tensors: {_some(list(value))})"  # type: ignore[call-overload,arg-type]
    if isinstance(value, Mapping):
        return f"a dictionary with the keys {_some([str(key) for key in value])}"
    return f"a {type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "")


def apply_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy `weights` into `model`, all of them and nothing else.

    Two things may be absent: `num_batches_tracked`, which does not change what a model computes, and the
    second name of a shared tensor, which safetensors files leave out.

    Raises:
        LoadError: Names are missing or left over, or shapes differ; the first few are named.
    """
    expected = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    given = {_storage(expected[name]) for name in weights if name in expected}
    missing = [
        name
        for name, value in expected.items()
        if name not in weights and not name.endswith("num_batches_tracked") and _storage(value) not in given
    ]
    unexpected = [name for name in weights if name not in expected]
    misshapen = [
        f"{name} is {_shape(weights[name])} in the file and {_shape(value)} in the model"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of the model's tensors are not in the file ({_some(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} of the file's are not in the model ({_some(unexpected)})")
    if misshapen:
        problems.append(f"{len(misshapen)} differ in shape ({_some(misshapen)})")
    if problems:
        raise LoadError(
            f"The weights in `{source}` do not fit the model that the factory built: {'; '.join(problems)}. "
            f"{_advice(missing, unexpected)}"
        )
    model.load_state_dict(dict(weights), strict=False)


def _advice(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    if unexpected and len(unexpected) == len(missing):
        prefixes = {
            extra.removesuffix(name)
            for extra, name in zip(sorted(unexpected), sorted(missing), strict=True)
            if extra.endswith(name)
        }
        if len(prefixes) == 1:
            (prefix,) = prefixes
            return f"Every name in the file starts with `{prefix}`: save the inner module's state dict instead."
    return "Use the factory of the very model these weights were saved from, with the same sizes."


def _storage(tensor: torch.Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Return what two names of one shared tensor have in common; empty tensors have no address to share."""
    address = tensor.data_ptr() or id(tensor)
    return address, tuple(tensor.shape), tensor.stride()


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
