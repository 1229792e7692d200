"""What graphopt uses of torch's private modules is there, and means what it is used for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.onnx._internal.exporter._registration import ONNXRegistry

import graphopt.quantization.ops  # noqa: F401
from graphopt.ir import torch_internals
from graphopt.ir.torch_internals import (
    HigherOrderOperator,
    OperatorBase,
    OpOverload,
    OpOverloadPacket,
    arguments_by_name,
    compiled_module,
    compiler_settings,
    detect_fake_mode,
    enable_python_dispatcher,
    flat_arguments,
    free_symbols,
    is_compiled,
    is_composite,
    is_function_transform,
    kept_operators,
    kept_translations,
    make_fx,
    optimization_hint,
    output_structure,
    pytree,
    statically_known_true,
    target_of_conversion,
)

aten = torch.ops.aten


class Doubled(nn.Module):
    """Two inputs, results in a dictionary."""

    def forward(self, x: Tensor, *, y: Tensor) -> dict[str, Tensor]:
        """Return both, one of them doubled."""
        return {"sum": x + y, "twice": 2 * x}


@pytest.fixture(scope="module")
def exported() -> Any:
    x = torch.ones(3, 4)
    shapes = {"x": {0: Dim("rows")}, "y": {0: Dim("rows")}}
    return torch.export.export(Doubled(), (x,), {"y": x}, dynamic_shapes=shapes).module(check_guards=False)


def test_every_name_is_there() -> None:
    assert [name for name in torch_internals.__all__ if not hasattr(torch_internals, name)] == []


def test_kinds_of_operators() -> None:
    assert isinstance(aten.relu.default, OpOverload)
    assert isinstance(aten.relu, OpOverloadPacket)
    assert isinstance(torch.ops.higher_order.cond, HigherOrderOperator)
    assert all(isinstance(target, OperatorBase) for target in (aten.relu.default, torch.ops.higher_order.cond))
    assert is_composite(aten.batch_norm.default)
    assert not is_composite(aten.relu.default)
    assert is_function_transform(torch._functorch.predispatch._vmap_increment_nesting)
    assert not is_function_transform(torch.relu)


def test_sizes_of_recorded_values(exported: Any) -> None:
    values = [node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"]
    mode = detect_fake_mode(values)
    assert mode is not None
    assert mode.shape_env is not None
    rows = values[0].shape[0]
    assert optimization_hint(rows, fallback=7) == 3
    assert optimization_hint(rows * 2 + 1, fallback=7) == 7
    assert optimization_hint(5, fallback=7) == 5
    assert optimization_hint(mode.shape_env.create_unbacked_symint(), fallback=7) == 7
    assert len(free_symbols(rows)) == 1
    assert statically_known_true(rows == values[1].shape[0])
    assert not statically_known_true(rows == 3)
    with enable_python_dispatcher(), mode:
        assert aten.pad.default(values[0], [0, 0, 1, 1]).shape[0] == rows + 2


def test_the_hint_of_torch_2_11(monkeypatch: pytest.MonkeyPatch) -> None:
    """There it was called `size_hint`."""

    def hint(size: int, fallback: int | None = None) -> int:
        return 10 * size + (fallback or 0)

    monkeypatch.setattr(torch_internals, "symbolic_shapes", SimpleNamespace(size_hint=hint))
    assert optimization_hint(4, fallback=2) == 42


def test_arrangement_of_arguments_and_results(exported: Any) -> None:
    x, y = torch.ones(2, 4), torch.zeros(2, 4)
    assert list(arguments_by_name(Doubled(), (x,), {"y": y})) == ["x", "y"]
    leaves = flat_arguments(exported, (x,), {"y": y})
    assert [leaf is given for leaf, given in zip(leaves, (x, y), strict=True)] == [True, True]
    structure = output_structure(exported)
    assert structure.context == ["sum", "twice"]
    assert pytree.tree_unflatten([1, 2], structure) == {"sum": 1, "twice": 2}


def test_conversions() -> None:
    assert target_of_conversion(torch.float64)[:2] == (None, torch.float64)
    assert target_of_conversion("cpu", memory_format=torch.channels_last) == (
        torch.device("cpu"),
        None,
        torch.channels_last,
    )


def test_traces_take_an_operator_apart() -> None:
    traced = make_fx(lambda x: aten.batch_norm.default(x, None, None, None, None, True, 0.1, 1e-5, False))
    calls = [node.target for node in traced(torch.ones(2, 3, 4)).graph.nodes if node.op == "call_function"]
    assert aten.batch_norm.default not in calls
    assert calls


def test_settings_of_the_compiler_are_put_back() -> None:
    import torch._dynamo

    before = torch._dynamo.config.recompile_limit
    with compiler_settings(recompile_limit=before + 1, automatic_dynamic_shapes=False, accumulated_recompile_limit=9):
        assert torch._dynamo.config.recompile_limit == before + 1
    assert torch._dynamo.config.recompile_limit == before


def test_a_module_that_compiles_is_recognised() -> None:
    plain, told, wrapped = nn.Linear(2, 2), nn.Linear(2, 2), torch.compile(nn.Linear(2, 2))
    told.compile()
    assert [is_compiled(module) for module in (plain, told, wrapped)] == [False, True, True]
    assert compiled_module(wrapped) is not None
    assert compiled_module(told) is None


def test_translations_to_onnx_are_read_once_and_kept_as_they_were() -> None:
    def read() -> Any:
        return ONNXRegistry().from_torchlib(opset_version=20)

    def same(one: Any, other: Any) -> list[bool]:
        assert one.functions.keys() == other.functions.keys()
        return [
            a is b for name in one.functions for a, b in zip(one.functions[name], other.functions[name], strict=True)
        ]

    with kept_translations():
        before = read()
    library = torch.library.Library("quantized_once_more", "DEF")
    library.define("new(Tensor x) -> Tensor")  # whatever is imported may bring operators that it translates
    with kept_translations():
        assert not all(same(read(), before))
    alone = read()
    for _ in range(2):
        with kept_translations():
            kept, again = read(), read()
        assert all(same(kept, again))
        assert not all(same(kept, alone))
        for target in (aten.relu.default, torch.ops.graphopt.observe.default):
            kept.register_op(target, lambda x: x)
    assert not all(same(read(), again))


def test_operators_are_looked_for_once_and_all_found() -> None:
    from torch._export import utils

    found = utils._collect_all_valid_cia_ops()
    with mock.patch.object(utils, "_materialize_cpp_cia_ops") as look:
        with kept_operators():
            assert utils._collect_all_valid_cia_ops() == found
            utils._collect_all_valid_cia_ops()
        assert look.call_count == 1
        utils._collect_all_valid_cia_ops()
    assert look.call_count > 2
