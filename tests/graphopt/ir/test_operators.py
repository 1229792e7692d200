"""What operators are called, and who belongs to which family."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from graphopt import capture
from graphopt.ir import operators
from graphopt.ir.aliasing import shared_inputs
from graphopt.ir.graph import copy_graph_module
from graphopt.ir.operators import (
    CASTS,
    DIVISIONS,
    PRODUCTS,
    RESHAPES,
    SILENT_VIEWS,
    SUMS,
    VIEWS,
    Family,
    plain_name,
    schema_name,
    short_name,
    writes_in_place,
)

aten = torch.ops.aten


def called(target: Callable[..., object], *args: object) -> fx.Node:
    return fx.Graph().call_function(target, args)


@pytest.fixture
def foreign() -> Callable[..., object]:
    """Return another library's operator of the name of one of ATen's."""
    library = torch.library.Library("graphopt_test_operators", "FRAGMENT")
    library.define("linear(Tensor x) -> Tensor")
    yield torch.ops.graphopt_test_operators.linear.default
    library._destroy()


def test_names(foreign: Callable[..., object]) -> None:
    cases = [
        (aten.conv2d.default, "aten::conv2d", "conv2d", "conv2d"),
        (aten.relu_.default, "aten::relu_", "relu_", "relu_"),
        (aten.multiply.Tensor, "aten::multiply", "multiply", "mul"),
        (foreign, "graphopt_test_operators::linear", "linear", "graphopt_test_operators::linear"),
        (torch.ops.higher_order.cond, "cond", "cond", "cond"),
    ]
    for target, schema, short, plain in cases:
        assert schema_name(target) == schema
        assert (short_name(called(target)), plain_name(called(target))) == (short, plain)
    assert schema_name(aten.linear) == "aten::linear"
    held = fx.Graph().placeholder("linear")
    assert (short_name(held), plain_name(held)) == ("", "")


def test_twins_and_synonyms_belong_to_a_family(foreign: Callable[..., object]) -> None:
    assert all(
        target in SUMS
        for target in (aten.add.Tensor, aten.add_.Tensor, aten.subtract.Tensor, aten.sub.Scalar, aten.subtract_.Scalar)
    )
    assert aten.permute_copy.default in operators.REORDERS
    assert aten.swapdims.default in operators.REORDERS
    assert aten.linear.default in PRODUCTS
    assert aten.linear in PRODUCTS
    assert foreign not in PRODUCTS
    assert called(foreign) not in PRODUCTS
    assert fx.Graph().placeholder("linear") not in PRODUCTS
    assert aten.addmm.default not in Family("add")


def test_one_overload_alone() -> None:
    assert aten.div.Tensor in DIVISIONS
    assert aten.true_divide.Scalar in DIVISIONS
    assert aten.div.Tensor_mode not in DIVISIONS
    assert aten.view.default in RESHAPES
    assert aten.view.dtype not in RESHAPES


def test_in_place_calls() -> None:
    assert writes_in_place(called(aten.relu_.default))
    assert not writes_in_place(called(aten.relu.default))
    assert not writes_in_place(fx.Graph().placeholder("x"))


def families() -> dict[str, Family]:
    return {name: value for name, value in vars(operators).items() if isinstance(value, Family)}


@pytest.mark.parametrize("name", sorted(families()))
def test_every_member_is_an_operator(name: str) -> None:
    """A misspelt member would never be found."""
    known = {schema.name for schema in torch._C._jit_get_all_schemas()}
    known |= {f"{schema.name}.{schema.overload_name or 'default'}" for schema in torch._C._jit_get_all_schemas()}
    unknown = {
        member
        for member in families()[name].names
        if not known.intersection((member, f"aten::{member}")) and member not in ("getitem", "sym_size")
    }
    assert unknown <= {"sym_size", "sym_stride", "sym_numel"}
    assert all(hasattr(aten, member) for member in unknown)


def test_synonyms_are_operators_that_compute_the_same() -> None:
    for synonym, name in operators._SYNONYMS.items():
        ours = {overload: getattr(getattr(aten, name), overload) for overload in getattr(aten, name).overloads()}
        for overload in getattr(aten, synonym).overloads():
            if overload in ours and not overload.endswith("out"):
                theirs = getattr(getattr(aten, synonym), overload)._schema.arguments
                assert len(theirs) == len(ours[overload]._schema.arguments), synonym


CAST_TO = {
    "Byte": torch.uint8,
    "Char": torch.int8,
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Short": torch.int16,
}


def test_what_silently_returns_its_input_shares_its_memory() -> None:
    """Those that a plain call makes a view of; the schemas of all say nothing."""
    x = torch.rand(2, 3)
    calls = {
        "dropout": (x, 0.5, False),
        "alpha_dropout": (x, 0.5, False),
        "feature_dropout": (x, 0.5, False),
        "feature_alpha_dropout": (x, 0.5, False),
        "atleast_1d": (x,),
        "atleast_2d": (x,),
        "atleast_3d": (torch.rand(1, 2, 3),),
        "broadcast_tensors": ([x],),
        "cartesian_prod": ([x[0]],),
        "data": (x,),
        "einsum": ("ij->ij", [x]),
        "meshgrid": ([x[0]],),
        "sum_to_size": (x, [2, 3]),
        "to_dense": (x,),
        "type_as": (x, x),
        "unsafe_chunk": (x, 2),
        "unsafe_split": (x, 1),
        "unsafe_split_with_sizes": (x, [1, 1]),
        "_unsafe_view": (x, [3, 2]),
        "conj_physical": (x,),
        "dequantize": (x,),
        "lift": (x,),
        **{f"_cast_{kind}": (x.to(dtype),) for kind, dtype in CAST_TO.items()},
    }
    assert calls.keys() == SILENT_VIEWS.names
    for name, args in calls.items():
        packet = getattr(aten, name)
        target = getattr(packet, packet.overloads()[0])
        result = target(*args)
        first = result[0] if isinstance(result, list | tuple) else result
        given = args[1] if name == "einsum" else args[0]
        given = given[0] if isinstance(given, list) else given
        assert first.untyped_storage().data_ptr() == given.untyped_storage().data_ptr(), name
        assert not any(argument.alias_info for argument in target._schema.arguments), f"{name} says so"


def test_views_never_have_memory_of_their_own() -> None:
    for name in VIEWS.names:
        packet = getattr(aten, name.partition(".")[0])
        assert any(getattr(packet, overload).is_view for overload in packet.overloads()), name
    for name in CASTS.names:
        assert name not in VIEWS.names


class WritesBehindADropout(nn.Module):
    """In evaluation the dropout hands its input on, and what is added is added to both."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = x * 2
        seen = hidden.flatten()
        dropped = nn.functional.alpha_dropout(hidden, 0.5, training=False)
        dropped.add_(1)
        return seen * dropped.flatten()


def test_a_write_behind_a_dropout_is_seen_in_front_of_it() -> None:
    x = torch.rand(2, 3)
    program = capture(WritesBehindADropout(), x)
    torch.testing.assert_close(program(x), WritesBehindADropout()(x))
    dropout = next(node for node in copy_graph_module(program.graph_module).graph.nodes if "dropout" in node.name)
    assert shared_inputs(dropout) == [dropout.args[0]]
