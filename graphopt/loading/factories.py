"""Models built by the user's own code, with only their weights taken from a file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphopt.errors import LoadError, cut, foreign_code, printable
from graphopt.ir.lazy_modules import check_initialized
from graphopt.ir.ownership import memory_key
from graphopt.loading.functions import importable, resolve_function
from graphopt.loading.state_dicts import StateDict, is_extra_state, some
from graphopt.loading.stored_values import has_room, loses, overwritten, same_kind, types_of

logger = logging.getLogger(__name__)


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


def apply_weights(model: nn.Module, weights: StateDict, source: str) -> None:
    """Load `weights` into `model`, all of them and nothing else, as its own `load_state_dict` does.

    Two things may be absent: `num_batches_tracked`, which does not change what a model computes, and the
    second name of a shared tensor, which safetensors files leave out. What wraps a model while it trains puts a prefix
    before every name (`module.`, `_orig_mod.`): one is left out where the rest fits better.

    Raises:
        LoadError: Names are missing or left over, shapes or types differ, or tensors that share memory are given other
            values; the first few are named. Or the model's own code does not take them.
        CaptureError: The model's tensors have no shapes yet.
    """
    check_initialized(model)
    _give_room(model)

    def failed(_: str, err: BaseException) -> LoadError:
        said = cut(printable(" ".join(str(err).split())), 400).rstrip(".")
        versions = ""
        if weights.versions is None and not isinstance(err, RuntimeError):  # torch's own, of shapes and memory
            versions = (
                " The file does not say of which versions its modules are, as one that `torch.save(model.state_dict(), "
                "...)` wrote does."
            )
        return LoadError(
            f"The weights in `{source}` cannot be put into the model that the factory built: {type(err).__name__}: "
            f"{said}.{versions}"
        )

    with foreign_code(failed):
        model.load_state_dict(_fitting(model, weights, source).as_torch(), strict=False)


def _give_room(model: nn.Module) -> None:
    """Put what a model stores and has on the device `meta` into memory, tied as it is there, to be loaded into."""
    made: dict[int, torch.Tensor] = {}

    def room(tensor: torch.Tensor) -> torch.Tensor:
        empty = torch.zeros_like(tensor, device="cpu")
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    for module in model.modules():
        for held, left in ((module._parameters, ()), (module._buffers, module._non_persistent_buffers_set)):
            for name, tensor in held.items():
                if tensor is not None and tensor.is_meta and name not in left:
                    held[name] = made.setdefault(id(tensor), room(tensor))  # type: ignore[assignment]


def _fitting(model: nn.Module, weights: StateDict, source: str) -> StateDict:
    """Return the weights under the names that the model has for them."""
    expected = {
        name: value
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor) or is_extra_state(name)
    }
    tried = [(prefix, named, _misfits(expected, named.values)) for prefix, named in weights.without_prefixes()]
    prefix, fitting, misfits = min(tried, key=lambda attempt: sum(map(len, attempt[2].values())))
    if any(misfits.values()):
        said = "; ".join(f"{len(names)} {words} ({some(names)})" for words, names in misfits.items() if names)
        left_out = f" The names in the file start with `{some([prefix])}`, which was left out." if prefix else ""
        raise LoadError(
            f"The weights in `{source}` do not fit the model that the factory built: {said}.{left_out} "
            "Use the factory of the very model these weights were saved from, with the same sizes and types."
        )
    if prefix:
        logger.warning("The names in `%s` start with `%s`, which is left out.", source, some([prefix]))
    rounded = [
        types_of(name, value, expected[name])
        for name, value in fitting.values.items()
        if not is_extra_state(name) and loses(expected[name].dtype, value)
    ]
    if rounded:
        text = "%d tensors of `%s` are rounded to the type that the model has for them (%s)."
        logger.warning(text, len(rounded), source, some(rounded))
    return fitting


def _misfits(expected: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return what does not fit, by what is the matter with it."""
    tensors = {name: value for name, value in expected.items() if not is_extra_state(name)}
    given = {memory_key(tensors[name]) for name in weights if name in tensors}
    fitting = {name: value for name, value in tensors.items() if name in weights and weights[name].shape == value.shape}
    alike = {name for name, value in fitting.items() if same_kind(value.dtype, weights[name].dtype)}
    roomy = {name: value for name, value in fitting.items() if name in alike and has_room(value.dtype, weights[name])}
    others = [name for name in fitting if name not in roomy and not name.endswith("num_batches_tracked")]
    return {
        "of the model's tensors are not in the file": [
            name
            for name in expected
            if name not in weights
            and not name.endswith("num_batches_tracked")
            and not (name in tensors and memory_key(tensors[name]) in given)
        ],
        "of the file's are not in the model": [name for name in weights if name not in expected],
        "differ in shape": [
            f"{name} is {_shape(weights[name])} in the file and {_shape(value)} in the model"
            for name, value in tensors.items()
            if name in weights and name not in fitting
        ],
        "differ in type": [types_of(name, weights[name], tensors[name]) for name in others if name not in alike],
        "have values beyond the range of the model's type": [
            types_of(name, weights[name], tensors[name]) for name in others if name in alike
        ],
        "lie in the memory of others, which have other values in the file": overwritten(roomy, weights),
    }


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
