"""What graphopt uses of torch's private modules is there, and means what it is used for."""

from __future__ import annotations

import inspect
import io
import threading
import zipfile
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from onnxscript._internal import ast_utils
from onnxscript.function_libs.torch_lib import registration
from onnxscript.values import TracedOnnxFunction
from torch import Tensor, fx, nn
from torch._export import utils as export_utils
from torch._export.serde import serialize
from torch.export import Dim
from torch.onnx._internal.exporter import _schemas
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.exporter._torchlib import _torchlib_registry
from torch.onnx._internal.fx.passes import type_promotion

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
    make_fx,
    onnx_exporter,
    optimization_hint,
    output_structure,
    pytree,
    save_pt2,
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
    """There it was called `size_hint`, and took the fallback whatever was known of a size."""

    def hint(size: int | torch.SymInt, fallback: int) -> int:
        return fallback if isinstance(size, torch.SymInt) else 10 * size + fallback

    shapes = torch_internals.ShapeEnv()
    size = shapes.create_unbacked_symint()
    torch._check(size >= 5)
    torch._check(size <= 16)
    fallbacks = (1, 7, 20)
    assert [optimization_hint(size, fallback) for fallback in fallbacks] == [5, 7, 16]
    monkeypatch.setattr(torch_internals, "symbolic_shapes", SimpleNamespace(size_hint=hint))
    assert [optimization_hint(size, fallback) for fallback in fallbacks] == [5, 7, 16]
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


def library() -> Any:
    return ONNXRegistry.from_torchlib(opset_version=20)


def patched() -> list[Any]:
    """Return whatever is patched while a program is exported."""
    return [
        vars(TracedOnnxFunction)["function_ir"],
        _schemas.op_signature_from_function,
        export_utils._materialize_cpp_cia_ops,
        vars(ONNXRegistry)["from_torchlib"],
    ]


def test_the_exporter_reads_its_library_as_it_does_alone_and_faster() -> None:
    def contents(opset: int) -> list[Any]:
        read = ONNXRegistry.from_torchlib(opset_version=opset).functions.items()
        fields = ("onnx_function", "signature", "is_complex", "opset_introduced", "is_custom", "device")
        return [(target, [getattr(found, name) for name in fields]) for target, every in read for found in every]

    alone = {opset: contents(opset) for opset in (20, 23)}
    assert alone[20] != alone[23]  # attention has a translation of its own
    with onnx_exporter():
        assert ONNXRegistry.from_torchlib().functions
        assert alone == {opset: contents(opset) for opset in (20, 23)}
    with (
        mock.patch.object(ast_utils, "get_src_and_ast", side_effect=AssertionError),
        mock.patch.object(inspect, "signature", side_effect=AssertionError),
        onnx_exporter(),
    ):
        assert contents(20) == alone[20]


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test register translations."""
    monkeypatch.setattr(registration.default_registry, "_registry", dict(registration.default_registry._registry))
    monkeypatch.setattr(_torchlib_registry, "_registry", list(_torchlib_registry._registry))


def unchanged(x: Any) -> Any:
    return x


@pytest.mark.parametrize("way", ["onnxscript", "torch"])
@pytest.mark.usefixtures("registries")
def test_the_exporter_sees_what_is_registered_later(way: str) -> None:
    """For an operator that it has seen without."""
    name = f"later_{way}::op"
    torch.library.define(name, "(Tensor x) -> Tensor")
    with onnx_exporter():
        assert name not in library().functions
    if way == "onnxscript":
        registration.torch_op(name, trace_only=True)(unchanged)
    else:
        operator = getattr(torch.ops, f"later_{way}").op.default
        _torchlib_registry.onnx_impl(operator, trace_only=True)(unchanged)
    with onnx_exporter():
        (found,) = library().functions[name]
        assert found.onnx_function.func is unchanged
        library().register_op(aten.relu.default, unchanged)  # as an export with a table of its own does
        assert len(library().functions["aten::relu"]) == 1


@pytest.mark.usefixtures("registries")
def test_the_exporter_sees_an_operator_that_takes_the_place_of_another() -> None:
    """Their number says nothing."""
    first, second = (torch.library.Library(f"{which}_place", "DEF") for which in ("first", "second"))
    registration.torch_op(("first_place::op", "second_place::op"), trace_only=True)(unchanged)
    first.define("op(Tensor x) -> Tensor")
    with onnx_exporter():
        before = library().functions.keys()
    first._destroy()
    second.define("op(Tensor x) -> Tensor")
    with onnx_exporter():
        assert library().functions.keys() ^ before == {"first_place::op", "second_place::op"}


def test_a_program_is_written_as_torch_does_and_put_in_order_by_nobody() -> None:
    exported = torch.export.export(Doubled(), (torch.ones(3, 4),), {"y": torch.ones(3, 4)})
    ours, theirs, extra = io.BytesIO(), io.BytesIO(), {"note": "kept"}
    with mock.patch.object(serialize, "canonicalize", side_effect=serialize.canonicalize) as ordered:
        save_pt2(exported, ours, dict(extra))
        assert not ordered.called
        torch.export.save(exported, theirs, extra_files=dict(extra))
        assert ordered.called
    one, other = (zipfile.ZipFile(stream) for stream in (ours, theirs))
    assert one.namelist() == other.namelist()
    assert all(one.read(name) == other.read(name) for name in one.namelist() if not name.endswith("serialization_id"))


def test_nothing_of_torch_stays_patched() -> None:
    """Neither after an exception, nor in other threads' exports, which overlap and end in any order."""
    before, left = patched(), threading.Event()

    def second() -> None:
        with onnx_exporter():
            left.wait(10)

    with pytest.raises(KeyboardInterrupt), onnx_exporter(), onnx_exporter():
        raise KeyboardInterrupt
    assert patched() == before
    with onnx_exporter():
        assert patched() != before
        other = threading.Thread(target=second)
        other.start()
        other.join(0.2)
    left.set()
    other.join()
    assert patched() == before


def test_operators_are_looked_for_once_an_export_and_all_found() -> None:
    found = export_utils._collect_all_valid_cia_ops()
    with mock.patch.object(export_utils, "_materialize_cpp_cia_ops") as look:
        for times in (1, 2):
            with onnx_exporter():
                assert export_utils._collect_all_valid_cia_ops() == found
                export_utils._collect_all_valid_cia_ops()
            assert look.call_count == times
        export_utils._collect_all_valid_cia_ops()
    assert look.call_count > 3


def test_types_are_promoted_as_torch_does_and_calls_before_that_are_not_run() -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
            plain = (x.relu() + x).exp()
            return plain, (plain + i).relu() * 2, i.sigmoid(), i.sum(0)

    args = torch.randn(2, 3), torch.ones(2, 3, dtype=torch.int32)
    batch = ({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    exports = [torch.export.export(Mixed(), args, dynamic_shapes=batch).run_decompositions({}) for _ in range(2)]
    theirs, ours = (export.graph_module for export in exports)
    type_promotion.InsertTypePromotion(theirs).run()
    call = fx.Interpreter.call_function
    with onnx_exporter(), mock.patch.object(fx.Interpreter, "call_function", autospec=True, side_effect=call) as run:
        type_promotion.InsertTypePromotion(ours).run()
    targets = [given.args[1] for given in run.call_args_list]
    assert aten.exp.default not in targets
    assert targets.count(aten.relu.default) == 1  # the second
    assert str(ours.graph) == str(theirs.graph)
    assert [str(n.meta.get("val")) for n in ours.graph.nodes] == [str(n.meta.get("val")) for n in theirs.graph.nodes]
    assert torch.ops.prims.convert_element_type.default in {node.target for node in ours.graph.nodes}


def test_tensors_are_changed_in_one_call() -> None:
    tensors, others = ([torch.full((count,), value) for count in (1, 3)] for value in (2.0, 4.0))
    torch_internals.multiply_each(tensors, [3.0, 0.5])
    assert [tensor.tolist() for tensor in tensors] == [[6.0], [1.0] * 3]
    torch_internals.blend_each(tensors, others, 0.5)
    assert [tensor.tolist() for tensor in tensors] == [[5.0], [2.5] * 3]
    torch_internals.multiply_each([], [])
