"""Calls with arguments that torch trusts are refused before they run; honest ones are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

import graphopt.quantization.ops  # noqa: F401  (registers the operators)
from graphopt.capturing.argument_places import place_arguments
from graphopt.capturing.capture import capture
from graphopt.capturing.public_operators import use_public_operators
from graphopt.capturing.unchecked_arguments import check_arguments
from graphopt.errors import CaptureError

aten = torch.ops.aten


class Holder(nn.Module):
    """The tensors of a hand-made graph."""


def graph_module(target: Any, *args: Any, **kwargs: Any) -> fx.GraphModule:
    """Return a module of one call. Tensors among the arguments are its buffers, "x" and "y" its inputs."""
    root, graph = Holder(), fx.Graph()
    inputs = {name: graph.placeholder(name) for name in "xy"}

    def read(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = f"tensor{len(root._buffers)}"
            root.register_buffer(name, value)
            return graph.get_attr(name)
        if isinstance(value, list):
            return [read(item) for item in value]
        return inputs.get(value, value) if isinstance(value, str) else value

    call = graph.call_function(target, tuple(map(read, args)), {key: read(value) for key, value in kwargs.items()})
    graph.output(call)
    return fx.GraphModule(root, graph)


def lstm(*weights: Tensor | str, **options: Any) -> fx.GraphModule:
    chosen = {"has_biases": True, "num_layers": 1, "bidirectional": False} | options
    return graph_module(
        aten.lstm.input,
        *("x", [torch.zeros(1, 2, 3)] * 2, list(weights), chosen["has_biases"], chosen["num_layers"], 0.0, False),
        *(chosen["bidirectional"], False),
    )


LSTM_WEIGHTS = [torch.ones(12, 4), torch.ones(12, 3), torch.ones(12), torch.ones(12)]
FURTHER = [torch.ones(12, 3), torch.ones(12, 3), torch.ones(12), torch.ones(12)]
HOSTILE: dict[str, Callable[[], fx.GraphModule]] = {
    "a dtype that is a number": lambda: graph_module(aten.to.dtype, "x", -77),
    "a dtype that is computed": lambda: graph_module(aten.softmax.int, "x", 1, "y"),
    "a layout that is a number": lambda: graph_module(aten.zeros.default, [2], layout=99),
    "gains for fewer rows": lambda: graph_module(aten._weight_norm.default, torch.ones(9, 4), torch.ones(1), 0),
    "gains for fewer columns": lambda: graph_module(aten._weight_norm.default, torch.ones(4, 9), torch.ones(1, 1), 1),
    "gains for no rows": lambda: graph_module(aten._weight_norm.default, torch.ones(0, 4), torch.ones(0, 1), 0),
    "gains that stretch the weights": lambda: graph_module(
        aten._weight_norm.default, torch.ones(1, 4), torch.ones(0, 1), -1
    ),
    "gains that are an input": lambda: graph_module(aten._weight_norm.default, torch.ones(9, 4), "x", 0),
    "a dimension that is an input": lambda: graph_module(
        aten._weight_norm.default, torch.ones(9, 4), torch.ones(9, 1), "x"
    ),
    "a short bias": lambda: lstm(*LSTM_WEIGHTS[:3], torch.ones(1)),
    "a short weight": lambda: lstm(torch.ones(12, 4), torch.ones(12, 2), torch.ones(12), torch.ones(12)),
    "a weight that is an input": lambda: lstm("x", *LSTM_WEIGHTS[1:]),
    "weights of one layer for two": lambda: lstm(*LSTM_WEIGHTS, num_layers=2),
    "weights for no layer": lambda: lstm(*LSTM_WEIGHTS, num_layers=0),
    "a second layer of another width": lambda: lstm(*LSTM_WEIGHTS, torch.ones(12, 2), *FURTHER[1:], num_layers=2),
    "no weights": lambda: lstm(),
    "a state projected to its own size": lambda: lstm(*LSTM_WEIGHTS, torch.ones(3, 3)),
    "layers beyond counting": lambda: lstm(*LSTM_WEIGHTS, num_layers=2**62),
    "one direction for two": lambda: lstm(*LSTM_WEIGHTS, bidirectional=True),
    "a layout of a library": lambda: graph_module(aten.zeros.default, [2], layout=torch._mkldnn),
    "a batch axis that is an input": lambda: graph_module(
        aten.lstm.input, "x", [torch.zeros(1, 2, 3)] * 2, LSTM_WEIGHTS, True, 1, 0.0, False, False, "y"
    ),
    "an input that is a number": lambda: graph_module(
        aten.lstm.input, 5, [torch.zeros(1, 2, 3)] * 2, LSTM_WEIGHTS, True, 1, 0.0, False, False, False
    ),
    "a size whose products wrap": lambda: graph_module(aten.native_layer_norm.default, "x", [2**62], None, None, 1e-5),
    "a padding that wraps in 32 bits": lambda: graph_module(
        aten.col2im.default, "x", [4, 4], [2, 2], [1, 1], [2**30, 1], [1, 1]
    ),
    "a padding that is computed": lambda: graph_module(aten.im2col.default, "x", [2, 2], [1, 1], ["y", 1], [1, 1]),
    "a padding that may wrap in 64 bits": lambda: graph_module(aten.replication_pad2d.default, "x", ["y", 0, 0, 0]),
    "a padding of a mode that may": lambda: graph_module(aten.pad.default, "x", [0, "y"], "replicate"),
    "a divisor below 1": lambda: graph_module(aten.avg_pool2d.default, "x", [1, 1], [1, 1], [0, 0], False, True, -1),
    "a mode that is not there": lambda: graph_module(aten.grid_sampler.default, "x", "y", 77, 0, False),
}
HONEST: dict[str, Callable[[], fx.GraphModule]] = {
    "a dtype": lambda: graph_module(aten.to.dtype, "x", torch.float64),
    "no dtype": lambda: graph_module(aten.softmax.int, "x", 1),
    "gains of every row": lambda: graph_module(aten._weight_norm.default, torch.ones(9, 4), torch.ones(9, 1), 0),
    "one gain for all": lambda: graph_module(aten._weight_norm.default, torch.ones(9, 4), torch.tensor(1.0), -1),
    "a layer": lambda: lstm(*LSTM_WEIGHTS),
    "two layers": lambda: lstm(*LSTM_WEIGHTS, *FURTHER, num_layers=2),
    "two directions": lambda: lstm(*LSTM_WEIGHTS, *LSTM_WEIGHTS, bidirectional=True),
    "no biases": lambda: lstm(*LSTM_WEIGHTS[:2], has_biases=False),
    "a projected state": lambda: lstm(
        torch.ones(12, 4), torch.ones(12, 2), torch.ones(12), torch.ones(12), torch.ones(2, 3)
    ),
    "the end of a slice": lambda: graph_module(aten.slice.Tensor, "x", 0, 1, 2**63 - 1, 1),
    "a number that is a value": lambda: graph_module(aten.masked_fill.Scalar, "x", "y", 2**62),
    "a computed padding": lambda: graph_module(aten.pad.default, "x", [0, "y"], "reflect"),
    "a divisor": lambda: graph_module(aten.avg_pool2d.default, "x", [1, 1], [1, 1], [0, 0], False, True, 3),
    "windows": lambda: graph_module(aten.col2im.default, "x", [400, 400], [2, 2], [1, 1], [1, 1], [1, 1]),
    "modes": lambda: graph_module(aten.grid_sampler.default, "x", "y", 2, 1, False),
}


def test_the_argument_that_is_wrong_is_named() -> None:
    for case, said in (
        ("a dimension that is an input", "x as `dim`"),
        ("a batch axis that is an input", "y as `batch_first`"),
        ("weights of one layer for two", r"\(12,\)\] for 2 layers"),
        ("a weight that is an input", "weights whose shapes may change"),
    ):
        with pytest.raises(CaptureError, match=said):
            check_arguments(HOSTILE[case]())


@pytest.mark.parametrize("case", HOSTILE)
def test_what_would_use_memory_of_others_is_refused(case: str) -> None:
    with pytest.raises(CaptureError, match="torch does not check that and would use memory"):
        check_arguments(HOSTILE[case]())


@pytest.mark.parametrize(
    ("quantizer", "further", "said"),
    [
        ("quantize", (0, 255), "do not fit axis 0"),
        ("dequantize", (), "do not fit axis 0"),
        ("dequantize", (2,), "do not fit blocks of 2 along axis 0"),
        ("fake_quantize", (0, 255), "do not fit axis 0"),
    ],
)
def test_more_scales_than_there_are_rows(quantizer: str, further: tuple[int, ...], said: str) -> None:
    gm = graph_module(aten._weight_norm.default, torch.ones(1, 4), torch.ones(1, 1), 0)
    gm.register_buffer("scales", torch.ones(9))
    (norm,) = gm.graph.find_nodes(op="call_function", target=aten._weight_norm.default)
    with gm.graph.inserting_before(norm):
        scales = gm.graph.get_attr("scales")
        target = getattr(torch.ops.graphopt, quantizer).default
        norm.replace_input_with(
            norm.args[0], gm.graph.call_function(target, (norm.args[0], scales, scales, 0, *further))
        )
    with pytest.raises(CaptureError, match=f"calls `{quantizer}` on what it does not take .*{said}"):
        check_arguments(gm)


def test_more_integers_than_there_are_bytes() -> None:
    gm = graph_module(aten._weight_norm.default, torch.ones(1, 4), torch.ones(1, 1), 0)
    gm.register_buffer("packed", torch.ones(1, 2, dtype=torch.uint8))
    (norm,) = gm.graph.find_nodes(op="call_function", target=aten._weight_norm.default)
    with gm.graph.inserting_before(norm):
        packed = gm.graph.get_attr("packed")
        unpacked = gm.graph.call_function(torch.ops.graphopt.unpack.default, (packed, 1 << 40, 4, 0))
        norm.replace_input_with(norm.args[0], unpacked)
    with pytest.raises(CaptureError, match=r"calls `unpack` on what it does not take .*are not in 2 bytes"):
        check_arguments(gm)


@pytest.mark.parametrize("case", HONEST)
def test_what_models_call_is_not(case: str) -> None:
    check_arguments(HONEST[case]())


def test_a_body_is_checked_with_the_weights_that_it_is_handed() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v, self.g = nn.Parameter(torch.ones(9, 4)), nn.Parameter(torch.ones(9, 1))

        def forward(self, x: Tensor) -> Tensor:
            def one(x: Tensor) -> Tensor:
                return x @ torch._weight_norm(self.v, self.g, 0).T

            result: Tensor = torch.cond(x.sum() > 0, one, lambda x: -one(x), (x,))
            return result

    gm = torch.export.export(Branches(), (torch.randn(3, 4),)).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    check_arguments(gm)
    gm.g = nn.Parameter(torch.ones(1))
    with pytest.raises(CaptureError, match=r"calls `_weight_norm` with weights `v` and `g` of the shapes \(9, 4\)"):
        check_arguments(gm)


def test_weights_that_are_made_of_parameters_are_as_good() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.LSTM(4, 3), "weight_hh_l0").eval()
    gm = torch.export.export(layer, (torch.randn(3, 2, 4),)).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    check_arguments(gm)


@pytest.mark.parametrize("norm", ["backward", "ortho", "forward"])
def test_parts_of_transforms_become_the_transforms(norm: str) -> None:
    class Transforms(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            spectrum = torch.fft.rfft2(x, norm=norm)
            return (
                torch.fft.irfft2(spectrum, norm=norm),
                torch.fft.irfft(spectrum, n=5, norm=norm),
                torch.view_as_real(torch.fft.fftn(x, dim=(0, 2), norm=norm)),
                torch.view_as_real(torch.fft.ifft(spectrum, dim=1, norm=norm)),
                torch.fft.hfft(spectrum, norm=norm),
                torch.fft.ihfft(x, norm=norm).abs(),
                F.pdist(x[0]),
            )

    x = torch.randn(2, 3, 8, dtype=torch.float64)
    program = torch.export.export(Transforms(), (x,)).run_decompositions()
    gm = program.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    parts = {aten._fft_r2c.default, aten._fft_c2r.default, aten._fft_c2c.default, aten._pdist_forward.default}
    assert parts == parts & {node.target for node in gm.graph.nodes}
    use_public_operators(gm)
    assert not parts & {node.target for node in gm.graph.nodes}
    for ours, theirs in zip(gm(x), Transforms()(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    captured = capture(program.module(check_guards=False), (x,))
    for ours, theirs in zip(captured(x), Transforms()(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_transform_of_a_rule_that_there_is_not() -> None:
    with pytest.raises(CaptureError, match="scales a Fourier transform by rule 3"):
        use_public_operators(graph_module(aten._fft_r2c.default, "x", [0], 3, True))


def test_an_axis_that_is_not_there_is_found_by_the_public_operator() -> None:
    gm = graph_module(aten._fft_r2c.default, "x", [900], 0, True)
    use_public_operators(gm)
    with pytest.raises(IndexError):
        gm(torch.ones(3), None)


def made(*calls: tuple[Any, ...]) -> fx.GraphModule:
    """Return a module whose gains are ones, put through calls one after the other."""
    root, graph = Holder(), fx.Graph()
    root.register_buffer("v", torch.ones(9, 4))
    root.register_buffer("ones", torch.ones(9, 1))
    value = graph.get_attr("ones")
    for target, *args in calls:
        value = graph.call_function(target, (value, *args))
    graph.output(graph.call_function(aten._weight_norm.default, (graph.get_attr("v"), value, 0)))
    return fx.GraphModule(root, graph)


def test_shapes_follow_from_shapes_and_nothing_is_run() -> None:
    """What follows from elements is not fixed, and a part that trusts its arguments is not called to find out."""
    check_arguments(made((aten.mul.Tensor, 2.0), (aten.reshape.default, [3, 3]), (aten.detach.default,)))
    for calls in (
        [(aten.nonzero.default,)],
        [(aten.rand_like.default,), (aten.nonzero.default,)],
        [(aten._fft_r2c.default, [900], 0, True)],
        [(aten._upsample_nearest_exact3d.default, [8, 8, 8], 1e-30, None, None)],
    ):
        with pytest.raises(CaptureError, match="weights whose shapes may change"):
            check_arguments(made(*calls))
    with pytest.raises(CaptureError, match="`reshape` on what it does not take"):
        check_arguments(made((aten.reshape.default, [7])))


@pytest.mark.parametrize("path", ["", "elsewhere.deeper"])
def test_a_body_that_something_else_runs_too(path: str) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v, self.g = nn.Parameter(torch.ones(9, 4)), nn.Parameter(torch.ones(9, 1))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = torch.cond(
                x.sum() > 0, lambda x: x @ torch._weight_norm(self.v, self.g, 0).T, lambda x: x @ self.v.T, (x,)
            )
            return result

    gm = torch.export.export(Branches(), (torch.randn(3, 4),)).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    check_arguments(gm)
    read = next(node for node in gm.graph.nodes if node.op == "get_attr" and "true_graph" in str(node.target))
    if path:
        gm.add_submodule(path, gm.get_submodule(str(read.target)))
    with gm.graph.inserting_after(read):
        again = gm.graph.get_attr(path) if path else read
        with gm.graph.inserting_after(again):
            gm.graph.call_function(torch.ops.higher_order.invoke_subgraph, (again, "again"))
    with pytest.raises(CaptureError, match="weights whose shapes may change"):
        check_arguments(gm)


def test_what_is_not_whole_is_said_to_be_so() -> None:
    with pytest.raises(CaptureError, match=r"calls `aten.relu.default` without its `self`"):
        place_arguments(graph_module(aten.relu.default))
    for args in ((), ("x", "y"), ("x", "y", "y", ["x"])):
        with pytest.raises(CaptureError, match="holds a region that is not whole"):
            check_arguments(graph_module(torch.ops.higher_order.cond, *args))


def test_arguments_by_keyword_stand_in_their_places() -> None:
    x = torch.randn(2, 3)
    for target, kwargs, places in (
        (aten.transpose.int, {"dim1": 0, "self": "x", "dim0": 1}, 3),
        (aten.div.Tensor_mode, {"other": 2.0, "self": "x", "rounding_mode": "floor"}, 2),
        (aten.softmax.int, {"self": "x", "dim": 1, "dtype": torch.float64}, 3),
        (aten.sum.dim_IntList, {"self": "x", "dim": [1], "keepdim": True}, 3),
    ):
        gm = graph_module(target, **kwargs)
        expected = gm(x, None)
        place_arguments(gm)
        (call,) = (node for node in gm.graph.nodes if node.op == "call_function")
        assert len(call.args) == places
        gm.recompile()
        assert torch.equal(gm(x, None), expected)
