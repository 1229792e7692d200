"""Whether samples fit a model's input: rank, sizes, dtype, finite values.

What cannot change the meaning is converted: between float types, between integer types that hold the values.
What can is refused: integers for a float input are usually images that someone still has to normalise.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from graphopt.data.input_spec import Spec
from graphopt.data.served import advice as served_advice
from graphopt.errors import DataError


def fit(tensor: torch.Tensor, spec: Spec, where: str, start: int) -> tuple[torch.Tensor, str | None]:
    """Return samples as an input takes them, and a note where they were converted.

    Args:
        tensor: Samples along the first axis, of a shape that fits.
        spec: What the model takes.
        where: The origin of the samples, for messages.
        start: The number of the first sample within `where`.

    Raises:
        DataError: The dtype does not fit, or a value is NaN or infinite.
    """
    converted, note = _convert(tensor, spec, where)
    if converted.is_floating_point() or converted.is_complex():
        _check_finite(tensor, converted, spec, where, start)
    return converted, note


def describe(spec: Spec) -> str:
    """Return an input's shape and dtype as messages show them: `Nx3x32x32 float32`."""
    sizes = ["N", *("?" if size is None else str(size) for size in spec.shape[1:])]
    return f"{'x'.join(sizes) if spec.shape else 'a single number'} {_name(spec.dtype)}"


def check_shape(
    found: tuple[int, ...],
    dtype_name: str,
    spec: Spec,
    where: str,
    *,
    is_batch: bool,
    beside: Iterable[tuple[tuple[int, ...], Spec]],
) -> None:
    """Compare the shape of data, known before any of it is read, with what an input takes.

    Args:
        found: The data's shape, samples along the first axis.
        dtype_name: Its element type, for messages.
        spec: What the model takes; its first axis counts samples and is not compared.
        where: The origin of the data, for messages.
        is_batch: Whether the data is one of the batches that are gone through.
        beside: The shapes of the data of all inputs, with what those take.

    Raises:
        DataError: Rank or a size does not fit.
    """
    expected = tuple(spec.shape)
    if len(found) != len(expected):
        if not expected:
            advice = "Give one value for all samples, without axes; where they differ, give batches with one value each"
        elif len(found) == len(expected) - 1 and is_batch:
            advice = "What is gone through gives batches, not samples: put samples together, as in `torch.stack(data)`"
        elif len(found) == len(expected) - 1:
            advice = "The first axis must count samples: add one, as in `x[None]`"
        else:
            advice = f"Reshape the data to {len(expected)} axes, the first counting samples"
    elif other := [n for n, want in enumerate(expected) if n and isinstance(want, int) and want != found[n]]:
        advice = "Resize or transpose the data"
        if len(other) == 1:
            axis = slice(other[0], other[0] + 1)
            change = expected[axis], found[axis]
            names = [one.name for had, one in beside if (tuple(one.shape)[axis], had[axis]) == change]
            options = " ".join(f"--dynamic {name}:{other[0]}" for name in names)
            shapes = ", ".join(f'"{name}": {{{other[0]}: "length"}}' for name in names)
            advice += f", or let that axis vary where the model is captured: {options}, or dynamic_shapes={{{shapes}}}"
        if len(found) == 4 and found[1:] == (*expected[2:], expected[1]):
            advice = "The channels come last; move them with `x.transpose(0, 3, 1, 2)`"
            if dtype_name == "uint8" and spec.dtype.is_floating_point:
                advice = f"The channels come last, of bytes: {served_advice(spec.name, torch.uint8, 'nhwc')}"
    else:
        return
    shape = "x".join(["N", *map(str, found[1:])]) if found else "a single number"
    raise DataError(f"Input `{spec.name}` takes {describe(spec)}, but {where} has {shape} {dtype_name}. {advice}.")


def _convert(tensor: torch.Tensor, spec: Spec, where: str) -> tuple[torch.Tensor, str | None]:
    found, wanted = tensor.dtype, spec.dtype
    if found == wanted:
        return tensor, None
    note = f"`{spec.name}` was converted from {_name(found)} to {_name(wanted)}"
    if found.is_floating_point and wanted.is_floating_point:
        return tensor.to(wanted), note
    if _is_integer(found) and _is_integer(wanted):
        converted = tensor.to(wanted)
        if torch.equal(converted.to(found), tensor):
            return converted, note
        reason = f"values up to {int(tensor.max())} do not fit"
    elif _is_integer(found) and wanted.is_floating_point:
        reason = (
            "whether they must be scaled (such as x / 255, or by mean and deviation) only you know; convert them to "
            f"{_name(wanted)} the way the model was trained, or {served_advice(spec.name, found)}"
        )
    else:
        reason = f"convert it to {_name(wanted)} first"
    raise DataError(f"Input `{spec.name}` takes {_name(wanted)}, but {where} has {_name(found)}: {reason}.")


def _check_finite(original: torch.Tensor, converted: torch.Tensor, spec: Spec, where: str, start: int) -> None:
    finite = torch.isfinite(converted)
    if bool(finite.all()):
        return
    bad = ~finite.flatten(1).all(1) if converted.dim() > 1 else ~finite.flatten()
    first = start + int(bad.nonzero()[0])
    what = "NaN" if bool(torch.isnan(original).any()) else "an infinite value"
    if bool(torch.isfinite(original).all()):
        what = f"a value too large for {_name(spec.dtype)}"
    raise DataError(
        f"Input `{spec.name}` has {what} in sample {first} of {where} ({int((~finite).sum())} such values in "
        f"{int(bad.sum())} samples looked at). Remove those samples, or repair the code that made them."
    )


def _is_integer(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
