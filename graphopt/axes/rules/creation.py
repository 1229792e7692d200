"""Constants made in the graph: uniform ones take any size, those that count positions fix it."""

from __future__ import annotations

from graphopt.axes.call import Call
from graphopt.axes.edit import Edit
from graphopt.axes.layout import Dims
from graphopt.axes.registry import rule


def rewrite_size(edit: Edit) -> None:
    """Bring the sizes up to date."""
    edit.set("size", edit.sizes(edit.result(), edit.arg("size")))


@rule(
    "aten::empty",
    "aten::full",
    "aten::new_empty",
    "aten::new_full",
    "aten::new_ones",
    "aten::new_zeros",
    "aten::ones",
    "aten::zeros",
    rewrite=rewrite_size,
    resizes=True,
)
def uniform(call: Call) -> Dims:
    return call.axes(call.shape())


@rule("aten::scalar_tensor")
def scalar_tensor(call: Call) -> Dims:
    return ()


@rule(
    "aten::arange",
    "aten::eye",
    "aten::linspace",
    "aten::logspace",
    "aten::rand",
    "aten::randint",
    "aten::randn",
    "aten::randperm",
)
def positional(call: Call) -> Dims:
    return call.axes(call.shape(), call.because("values depend on the position"))
