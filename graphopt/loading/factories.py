"""Models built by the user's own code, with only their weights taken from a file."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from graphopt.errors import LoadError, cut, foreign_code, printable
from graphopt.ir.ownership import memory_key
from graphopt.loading.contents import FileKind, identify
from graphopt.loading.functions import importable, resolve_function
from graphopt.loading.pickles import load_plain_pickle, load_trusted_pickle
from graphopt.loading.refusal import DamagedError

logger = logging.getLogger(__name__)

# Keys under which training scripts keep the state dict of a checkpoint.
_CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model", "net", "weights")
_SHOWN = 3
_MOST_PREFIXES = 4  # that wrap a model one inside the other; a stranger's names may have any number of dots


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


def read_weights(data: bytes, source: str, *, trust: bool = False) -> dict[str, torch.Tensor]:
    """Return the state dict in a safetensors or torch file.

    Args:
        data: the file's bytes.
        source: its path, for messages.
        trust: let a torch file run code: it may then hold objects of any class beside the weights, and modules.

    Raises:
        LoadError: it is another kind of file, damaged, or holds no state dict.
        HostileError: it holds more than tensors and plain data, and is not trusted.
    """
    try:
        kind, _ = identify(data)
        if kind is FileKind.SAFETENSORS:
            return safetensors.torch.load(data)
        if kind is FileKind.TORCH_PICKLE:
            if not trust:
                return _state_dict(load_plain_pickle(data), source)
            with importable(Path.cwd()):
                return _state_dict(load_trusted_pickle(data), source)
    except (DamagedError, SafetensorError) as err:
        raise LoadError(f"Cannot read the weights in `{source}`: {err}.") from err
    raise LoadError(
        f"`{source}` is {kind.value}; with `--factory` it must be weights alone, in a `.safetensors` file or a "
        "`.pt` file that `torch.save(model.state_dict(), ...)` wrote."
    )


def _state_dict(value: Any, source: str) -> dict[str, torch.Tensor]:
    nested = [value.get(key) for key in _CHECKPOINT_KEYS] if isinstance(value, Mapping) else []
    found = [_of_module(item) for item in ([value] if is_state_dict(value) else [value, *nested])]
    states = [item for item in found if is_state_dict(item)]
    if len(states) != 1:
        raise LoadError(f"`{source}` holds {describe(value)}, not a state dict (names and tensors).")
    return {name: tensor for name, tensor in states[0].items() if isinstance(tensor, torch.Tensor)}


def _of_module(value: Any) -> Any:
    """Return the state dict of a module, and anything else as it is; only a trusted file holds modules here."""
    if not isinstance(value, nn.Module):
        return value
    with foreign_code(lambda said, _: DamagedError(f"its module has no state dict ({said})")):
        return value.state_dict()


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
    second name of a shared tensor, which safetensors files leave out. What wraps a model while it trains puts a prefix
    before every name (`module.`, `_orig_mod.`): one is left out where the rest fits better.

    Raises:
        LoadError: Names are missing or left over, or shapes differ; the first few are named.
    """
    expected = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    tried = [(prefix, named, _misfits(expected, named)) for prefix, named in _without_prefixes(weights)]
    prefix, weights, misfits = min(tried, key=lambda attempt: sum(map(len, attempt[2].values())))
    if any(misfits.values()):
        said = "; ".join(f"{len(names)} {words} ({_some(names)})" for words, names in misfits.items() if names)
        left_out = f" The names in the file start with `{_some([prefix])}`, which was left out." if prefix else ""
        raise LoadError(
            f"The weights in `{source}` do not fit the model that the factory built: {said}.{left_out} "
            "Use the factory of the very model these weights were saved from, with the same sizes."
        )
    if prefix:
        logger.warning("The names in `%s` start with `%s`, which is left out.", source, _some([prefix]))
    model.load_state_dict(dict(weights), strict=False)


def _without_prefixes(weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
    """Yield weights as they are, then without each prefix that all of their names share, up to one of its dots."""
    yield "", weights
    named = {name: value for name, value in weights.items() if name != "n_averaged"}  # AveragedModel's own, beside it
    first = next(iter(named), "")
    for end in [position for position, char in enumerate(first, 1) if char == "."][:_MOST_PREFIXES]:
        if all(name.startswith(first[:end]) for name in named):
            yield first[:end], {name[end:]: value for name, value in named.items()}


def _misfits(expected: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """Return what does not fit, by what is the matter with it."""
    given = {memory_key(expected[name]) for name in weights if name in expected}
    return {
        "of the model's tensors are not in the file": [
            name
            for name, value in expected.items()
            if name not in weights and not name.endswith("num_batches_tracked") and memory_key(value) not in given
        ],
        "of the file's are not in the model": [name for name in weights if name not in expected],
        "differ in shape": [
            f"{name} is {_shape(weights[name])} in the file and {_shape(value)} in the model"
            for name, value in expected.items()
            if name in weights and weights[name].shape != value.shape
        ],
    }


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(cut(printable(name), 80) for name in names[:_SHOWN]) + more
