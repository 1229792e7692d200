"""Propagation: equal calls of plain operators run once in a mode, all others every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from graphopt import Program, capture
from graphopt.ir import propagation
from graphopt.ir.editor import Editor
from graphopt.ir.graph import fake_mode_of
from graphopt.ir.invariants import check_invariants
from graphopt.ir.propagation import Propagation
from graphopt.ir.torch_internals import enable_python_dispatcher

aten = torch.ops.aten


class Calls(nn.Module):
    """Calls that are alike, and calls that nearly are."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first, same, other = x.relu(), (x + 1).relu(), x.double().relu()
        views = x.flatten(1), (x + 1).flatten(1)
        truths = torch.clamp(x, max=1), torch.clamp(x, max=1.0)
        counted = (x > 0).nonzero(), (x > 0).nonzero()
        return (first, same, other, *views, *truths, *counted)


@pytest.fixture(scope="module")
def program() -> Program:
    """Those calls."""
    return capture(Calls(), torch.randn(2, 3, 4))


def results(program: Program, target: Any, purpose: str = "a test") -> list[Any]:
    propagated = Propagation(fake_mode_of(program.graph_module), purpose)
    found = []
    for node in program.graph.find_nodes(op="call_function", target=target):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: used.meta["val"])
        found.append(propagated.call(node, args, kwargs))
    return found


def test_equal_calls_give_one_value(program: Program) -> None:
    one, same, other = results(program, aten.relu.default)
    assert one is same
    assert other.dtype is torch.float64
    assert [tuple(map(str, value.shape))[1:] for value in (one, other)] == [("3", "4")] * 2


def test_equal_numbers_of_another_type_are_another_call(program: Program) -> None:
    one, other = results(program, aten.clamp.default)
    assert one is not other


@pytest.mark.parametrize("target", [aten.flatten.using_ints, aten.nonzero.default])
def test_views_and_what_depends_on_data_run_every_time(program: Program, target: Any) -> None:
    one, other = results(program, target)
    assert one is not other


class Found(nn.Module):
    """Where two inputs of equal shapes are positive: as many numbers of one as of the other only by chance."""

    def forward(self, x: Tensor, y: Tensor, x_times: Tensor, y_times: Tensor) -> tuple[Tensor, ...]:
        (where_x,), (where_y,) = torch.where(x[0] > 0), torch.where(y[0] > 0)
        largest_x, largest_y = (one.sigmoid().topk(2).indices.unique() for one in (x[0], y[0]))
        repeated = x.repeat_interleave(x_times, 0), x.repeat_interleave(y_times, 0)
        return (where_x, where_y, largest_x, largest_y, *repeated)


@pytest.fixture(scope="module")
def found() -> Program:
    times = torch.tensor([1, 2])
    return capture(Found(), (torch.randn(2, 3), torch.randn(2, 3), times, times))


def test_sizes_that_depend_on_data_are_those_of_one_call(found: Program) -> None:
    values: dict[fx.Node, Any] = {}
    propagated = Propagation(fake_mode_of(found.graph_module), "data")
    for node in found.graph.nodes:
        if node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = propagated.call(node, args, kwargs)
        else:
            values[node] = node.meta.get("val")
    (results,) = found.graph.output_node().args
    assert len({str(values[node].shape[0]) for node in results}) == len(results)


def test_sizes_that_depend_on_data_stay_where_a_call_is_propagated_again(found: Program) -> None:
    gm = found.copy().graph_module
    before = [str(node.meta["val"]) for node in gm.graph.nodes if node.op == "call_function"]
    Editor(gm, "a test").propagate_from(gm.graph.nodes)
    assert [str(node.meta["val"]) for node in gm.graph.nodes if node.op == "call_function"] == before


def test_what_is_known_is_shared_by_those_who_run_calls_for_the_same(program: Program) -> None:
    one, other, checked = (results(program.copy(), aten.relu.default, what)[0] for what in ("a", "a", "check"))
    assert one is other
    assert one is not checked


def test_autocast_and_the_default_type_make_another_call(program: Program) -> None:
    plain = results(program, aten.add.Tensor)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert results(program, aten.add.Tensor)[0] is not plain
    torch.set_default_dtype(torch.float64)
    try:
        assert results(program, aten.add.Tensor)[0] is not plain
    finally:
        torch.set_default_dtype(torch.float32)
    assert results(program, aten.add.Tensor)[0] is plain


def test_no_more_is_known_than_so_much(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(propagation, "_MOST_KNOWN", 1)
    assert len({id(value) for value in results(program, aten.clamp.default, "bounded")}) == 2
    mode = fake_mode_of(program.graph_module)
    assert [len(known) for name, known in vars(mode).items() if name.endswith("bounded")] == [1]


def test_a_result_that_is_turned_in_place_is_no_other_calls() -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            turned = x.relu()
            turned.t_()
            return turned, x.relu()

    turning = capture(Turned(), torch.randn(2, 3))
    for _ in range(2):
        check_invariants(turning, turning.copy(), "a test")
    assert [one.shape[1] for one in results(turning, aten.relu.default)] == [3, 3]


class Normed(nn.Module):
    """Means and variances of six channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


@pytest.fixture(scope="module")
def normed() -> Program:
    return capture(Normed(), torch.randn(2, 6, 4, 5))


def normalised(program: Program, x: Tensor, purpose: str, **changed: Any) -> Tensor:
    """Propagate its BatchNorm with another input."""
    (node,) = program.graph.find_nodes(op="call_function", target=aten.batch_norm.default)
    args = [x, *(node.args[i].meta["val"] for i in range(1, 5)), *node.args[5:]]
    for position, value in changed.items():
        args[int(position[1:])] = value
    return Propagation(fake_mode_of(program.graph_module), purpose).call(node, tuple(args), {})


@pytest.mark.parametrize(
    "made",
    [
        lambda batch: torch.empty(batch, 6, 4, 5),
        lambda batch: torch.empty(batch, 4, 5, 6).permute(0, 3, 1, 2),
        lambda batch: torch.empty(6, batch, 4, 5).transpose(0, 1),
        lambda batch: torch.empty(batch, 6, 1, 1).expand(batch, 6, 4, 5),
        lambda batch: torch.empty(batch, 8, 4, 9)[:, 1:7, :, ::2],
        lambda batch: torch.empty(2, 6),
        lambda batch: torch.empty(0, 6, 2, 3, 4),
    ],
)
def test_what_normalisation_gives_is_what_torch_says(normed: Program, made: Any) -> None:
    mode = fake_mode_of(normed.graph_module)
    (node,) = normed.graph.find_nodes(op="call_function", target=aten.batch_norm.default)
    with mode, enable_python_dispatcher():
        x = made(normed.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0])
        wanted = node.target(x, *(node.args[i].meta["val"] for i in range(1, 5)), *node.args[5:])
    found = normalised(normed, x, "shapes")
    assert (found.shape, found.stride(), found.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)


def test_normalisation_of_what_does_not_fit_fails(normed: Program) -> None:
    with fake_mode_of(normed.graph_module):
        five, x, doubles = torch.empty(5), torch.empty(2, 6, 4, 5), torch.empty(2, 6, 4, 5, dtype=torch.float64)
    for position in ("_1", "_2", "_3", "_4"):
        with pytest.raises(RuntimeError, match=r"to match|must match|contain|broadcast|expand"):
            normalised(normed, x, "unlike", **{position: five})
    assert normalised(normed, doubles, "types").dtype is torch.float64


def test_of_training_and_autocast_torch_is_asked() -> None:
    vectors = [torch.empty(6)] * 4
    for device, training, known in (("cpu", False, True), ("cpu", True, False), ("meta", False, True)):
        x = torch.empty(2, 6, 4, 5, device=device)
        found = propagation._like_its_input(aten.batch_norm.default, (x, *vectors, training, 0.1, 1e-5, True))
        assert (found is x) == known
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.empty(2, 6, 4, 5)
        assert propagation._like_its_input(aten.batch_norm.default, (x, *vectors, False, 0.1, 1e-5, True)) is None
