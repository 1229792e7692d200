"""Calls without a tensor result: sizes, arithmetic on them, assertions. They state no equations."""

from __future__ import annotations

from graphopt.axes.call import Call
from graphopt.axes.edit import Edit
from graphopt.axes.registry import rule


def drop_shape(edit: Edit) -> None:
    """Forget the sizes and strides an assertion recorded; what it says about the dtype stays."""
    for name in ("size", "stride"):
        if edit.arg(name) is not None:
            edit.set(name, None)


@rule("aten::_assert_tensor_metadata", rewrite=drop_shape)
def assert_metadata(call: Call) -> None:
    return None


@rule(
    "aten::_assert_async",
    "aten::_assert_scalar",
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::numel",
    "aten::sym_constrain_range",
    "aten::sym_constrain_range_for_size",
    "aten::sym_numel",
    "aten::sym_size",
    "aten::sym_storage_offset",
    "aten::sym_stride",
    "_set_grad_enabled",
)
def scalar(call: Call) -> None:
    return None
