"""Example inputs that a module is captured with: of its data, or made up of shapes."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graphopt.capturing.model_calls import uncompiled
from graphopt.data import InputSpec, Samples
from graphopt.data.served import ServedInput
from graphopt.errors import CaptureError, UsageError
from graphopt.ir.devices import held_by
from graphopt.ir.examples import drawn


def random_examples(
    model: nn.Module, inputs: Sequence[InputSpec], *, seed: int, source: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make example inputs of the shapes the user gave.

    Raises:
        CaptureError: none are given, or too few; `source` is what the model is of.
        UsageError: some are for inputs that the model does not have.
    """
    parameters = _parameters(model)
    names = [name for name, _ in parameters]
    if not inputs:
        wanted = ", ".join(names) or "its inputs"
        raise CaptureError(
            f"`{source}` does not say what its inputs look like ({wanted}). Give samples "
            f"(--data samples.npz) or shapes (--input {names[0] if names else 'x'}=1x3x224x224:float32)."
        )
    generator = torch.Generator().manual_seed(seed)
    made = {spec.name: drawn(spec.shape, spec.dtype, generator) for spec in inputs}
    unnamed = len(made) == 1 and not set(made) & set(names)
    unknown = [name for name in made if name not in names]
    if unknown and not unnamed:
        raise UsageError(f"The model has no input {unknown}; its inputs are {names}. Use those names with --input.")
    required = [name for name, optional in parameters if not optional]
    missing = required[1:] if unnamed else [name for name in required if name not in made]
    if missing:
        raise CaptureError(
            f"The model takes {', '.join(f'`{name}`' for name in required)}; the shape of `{missing[0]}` is not given. "
            f"Add --input {missing[0]}=SHAPE, as for the others."
        )
    return (tuple(made.values()), {}) if unnamed else _arrange(made, model)


def open_for(model: nn.Module, data: Any) -> Samples:
    """Open data with the names of a module's inputs; samples that are open already stay as they are.

    Raises:
        DataError: the data cannot be read, or has other names than the module's inputs.
    """
    if isinstance(data, Samples):
        return data
    model = uncompiled(model)
    if _takes_any_number(model):
        return Samples.open(data)
    parameters = _parameters(model)
    required = sum(1 for _, optional in parameters if not optional)
    return Samples.open(data, [name for name, _ in parameters], required=required)


def example_inputs(
    model: nn.Module, data: Any, served: Sequence[ServedInput] = (), *, whole: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the first two samples of `data`, or its `whole` first batch, as the arguments of a module.

    What of it is as `served` becomes what the module takes.

    Raises:
        DataError: the data cannot be read, or has other names than the module's inputs.
    """
    samples = open_for(model, data)
    first = _first(samples, model, served, whole)
    if _takes_any_number(model) and samples.names[0].isdigit():  # arrays without names are numbered
        return tuple(first.values()), {}
    return _arrange(first, model)


def _first(samples: Samples, model: nn.Module, served: Sequence[ServedInput], whole: bool) -> dict[str, torch.Tensor]:
    """Return the first samples by name; numpy's double precision becomes single where the model knows no double."""
    found = samples.first_batch() if whole else samples.first(2)
    known = {tensor.dtype: None for tensor in held_by(model).values()}
    single = torch.float32 in known and torch.float64 not in known
    # copies: a program that keeps views of the first samples keeps all of them
    batch = (t.float() if single and t.dtype is torch.float64 else t.clone() for t in found)
    first = dict(zip(samples.names, batch, strict=True))
    floating = next((dtype for dtype in known if dtype.is_floating_point), torch.float32)
    for one in served:
        if one.name in first:  # others are refused when the model is captured
            first[one.name] = one.taken(first[one.name], floating)
    return first


def _arrange(values: Mapping[str, torch.Tensor], model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give inputs by position as far as no optional one is left out before them, the rest by keyword."""
    signature = inspect.signature(model.forward).parameters
    positional = list(
        itertools.takewhile(lambda name: name in values and signature[name].kind in _BY_POSITION, signature)
    )
    return tuple(values[name] for name in positional), {k: values[k] for k in values if k not in positional}


_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _parameters(model: nn.Module) -> list[tuple[str, bool]]:
    """List a module's inputs that have a name: (name, whether it may be left out)."""
    kinds = (*_BY_POSITION, inspect.Parameter.KEYWORD_ONLY)
    signature = inspect.signature(model.forward).parameters
    return [(name, p.default is not inspect.Parameter.empty) for name, p in signature.items() if p.kind in kinds]


def _takes_any_number(model: nn.Module) -> bool:
    """Tell whether inputs have no names of their own: `forward(*inputs)`."""
    signature = inspect.signature(model.forward).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in signature)
