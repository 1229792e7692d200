"""What an LSTM is given in a program fits its weights in every call, or the call is refused."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from graphopt.capturing.capture import capture
from graphopt.capturing.guards import insert_guards
from graphopt.capturing.load import load
from graphopt.capturing.turned_in_place import return_what_is_turned
from graphopt.errors import CaptureError

aten = torch.ops.aten
LAYER = nn.LSTM(4, 3, 2).eval()


class Reader(nn.Module):
    """An LSTM behind an embedding, whose states are a parameter and zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first = nn.Embedding(9, 4), nn.Parameter(torch.randn(1, 1, 2))
        self.layer = nn.LSTM(4, 3, batch_first=True, proj_size=2)

    def forward(self, x: Tensor) -> Tensor:
        words, samples = self.words(x), x.shape[0]
        result: Tensor = self.layer(words, (self.first.expand(1, samples, 2), words.new_zeros(1, samples, 3)))[0]
        return result


def module(*states: Any) -> fx.GraphModule:
    """Return an LSTM of an input `x` of two layers; states are the sizes of zeros, or inputs by their name."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    given = []
    for state in states:
        if isinstance(state, str):
            given.append(graph.placeholder(state))
        elif state[0] == "expand":
            given.append(graph.call_function(aten.expand.default, (graph.placeholder("h"), list(state[1:]))))
        else:
            given.append(graph.call_function(aten.zeros.default, (list(state),)))
    weights = [graph.get_attr(name) for name in LAYER._flat_weights_names]
    call = graph.call_function(aten.lstm.input, (x, given, weights, True, 2, 0.0, False, False, False))
    graph.output(graph.call_function(operator.getitem, (call, 0)))
    gm = fx.GraphModule(LAYER, graph)
    insert_guards(gm)
    return gm


X = torch.randn(5, 2, 4)
MADE = ((2, 2, 3), (2, 2, 3))


def test_states_that_fit_are_taken() -> None:
    expected = LAYER(X)[0]
    assert torch.equal(module(*MADE)(X), expected)
    assert torch.equal(module("h", "c")(X, torch.zeros(2, 2, 3), torch.zeros(2, 2, 3)), expected)
    assert torch.equal(module(("expand", 2, 2, 3), (2, 2, 3))(X, torch.zeros(2, 1, 3)), expected)


REFUSED = r"expanded size|expand\("


@pytest.mark.parametrize("shape", [(5, 3, 4), (5, 2, 400), (5, 1, 2, 4), (5, 4)])
def test_an_input_of_another_size_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=REFUSED):
        module(*MADE)(torch.randn(shape))
    with pytest.raises((RuntimeError, IndexError)):
        module("h", "c")(torch.randn(shape), torch.zeros(2, 2, 3), torch.zeros(2, 7, 3))


@pytest.mark.parametrize("state", [(2, 7, 3), (2, 2, 400), (9, 2, 3), (2, 2, 1, 3)])
def test_states_of_other_sizes_are_refused(state: tuple[int, ...]) -> None:
    for states in ((state, MADE[0]), (MADE[0], state), (state, state)):
        with pytest.raises(RuntimeError, match=REFUSED):
            module(*states)(X)
        with pytest.raises(RuntimeError, match=REFUSED):
            module("h", "c")(X, *map(torch.zeros, states))


def test_an_expansion_to_any_size_says_nothing_of_it() -> None:
    anything = ("expand", 2, -1, 3)
    assert torch.equal(module(anything, "c")(X, torch.zeros(2, 2, 3), torch.zeros(2, 2, 3)), LAYER(X)[0])
    with pytest.raises(RuntimeError, match=REFUSED):
        module(anything, "c")(X, torch.zeros(2, 7, 3), torch.zeros(2, 7, 3))


@pytest.mark.parametrize("turned", ["state", "input"])
def test_what_is_turned_in_place_is_tied_again(turned: str) -> None:
    gm = module((2, 2, 3), (2, 2, 3))
    call = next(node for node in gm.graph.nodes if node.target is aten.lstm.input)
    value, axes = (call.args[1][0], (0, 2)) if turned == "state" else (call.args[0], (0, 1))
    with gm.graph.inserting_before(call):
        gm.graph.call_function(aten.transpose_.default, (value, *axes))
    return_what_is_turned(gm)
    insert_guards(gm)
    with pytest.raises(RuntimeError, match=REFUSED):
        gm(X)


def test_states_and_input_by_keyword() -> None:
    gm = module((2, 2, 3), (2, 2, 3))
    for node in gm.graph.nodes:
        if node.target in (aten.lstm.input, aten.zeros.default, aten.expand.default):
            names = [argument.name for argument in node.target._schema.arguments]
            node.kwargs, node.args = dict(zip(names, node.args, strict=False)), ()
    insert_guards(gm)
    assert torch.equal(gm(X), LAYER(X)[0])


def test_a_tied_program_stays_as_it_is_wherever_it_comes_from(tmp_path: Path) -> None:
    reader, ids = Reader().eval(), torch.ones(2, 5).long()
    program = capture(reader, ids)
    targets = [node.target for node in program.graph.nodes]
    program.save(tmp_path / "a.pt2")
    loaded = load(tmp_path / "a.pt2")
    assert [node.target for node in loaded.graph.nodes] == targets
    loaded.save(tmp_path / "b.pt2")  # traced again, as what comes out of a file is, which renames calls
    again = load(tmp_path / "b.pt2")
    assert [node.target for node in again.graph.nodes] == targets
    again.save(tmp_path / "c.pt2")
    assert (tmp_path / "b.pt2").read_bytes() == (tmp_path / "c.pt2").read_bytes()
    for samples in (1, 2, 7):
        ids = torch.ones(samples, 5).long()
        assert torch.equal(loaded(ids), reader(ids))


def test_a_file_whose_states_are_of_another_batch(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(4, 3)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            result: Tensor = self.layer(x, (h, h))[0]
            return result

    for name, axes in (("static", None), ("dynamic", {"x": {1: Dim.DYNAMIC}, "h": {1: Dim.DYNAMIC}})):
        exported = torch.export.export(Fixed().eval(), (X, torch.zeros(1, 2, 3)), dynamic_shapes=axes)
        exported.example_inputs = ((X[:, :1].repeat(1, 900, 1), torch.zeros(1, 2, 3)), {})
        torch.export.save(exported, tmp_path / f"{name}.pt2")
        with pytest.raises(CaptureError, match="expanded size of the tensor"):
            load(tmp_path / f"{name}.pt2")


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_entries_for_no_bag_are_refused(mode: int, last: bool) -> None:
    graph = fx.Graph()
    weight, indices, offsets = map(graph.placeholder, ("weight", "indices", "offsets"))
    call = graph.call_function(
        aten.embedding_bag.padding_idx, (weight, indices, offsets, False, mode, False, None, last, 0)
    )
    graph.output(graph.call_function(operator.getitem, (call, 0)))
    gm = fx.GraphModule(nn.Module(), graph)
    insert_guards(gm)
    code = gm.code
    insert_guards(gm)
    assert gm.code == code
    weights, entries = torch.randn(5, 3), torch.tensor([1, 2, 4])
    bags = torch.tensor([0, 1, 3][: 3 if last else 2])
    expected = aten.embedding_bag.padding_idx(weights, entries, bags, False, mode, False, None, last, 0)[0]
    assert torch.equal(gm(weights, entries, bags), expected)
    with pytest.raises(IndexError, match="out of range"):
        gm(weights, entries, bags[: 1 if last else 0])
    back = torch.tensor([0, -3, 2] if last else [0, -3])  # torch asks the first and the last alone
    assert torch.equal(gm(weights, entries, back), gm(weights, entries, back.clamp(min=0)))


@pytest.mark.parametrize("written", [False, True])
def test_a_guard_that_a_call_writes_to_is_none(written: bool) -> None:
    graph = fx.Graph()
    weight, indices, offsets = map(graph.placeholder, ("weight", "indices", "offsets"))
    rising = graph.call_function(operator.getitem, (graph.call_function(aten.cummax.default, (offsets, 0)), 0))
    first = graph.call_function(aten.select.int, (rising, 0, 0))
    asked = graph.call_function(aten.select_scatter.default, (rising, first, 0, 0))
    if written:
        graph.call_function(aten.fill_.Scalar, (graph.call_function(aten.select.int, (asked, 0, 1)), -300))
    call = graph.call_function(
        aten.embedding_bag.padding_idx, (weight, indices, asked, False, 0, False, None, False, 0)
    )
    graph.output(graph.call_function(operator.getitem, (call, 0)))
    gm = fx.GraphModule(nn.Module(), graph)
    insert_guards(gm)
    assert len(list(gm.graph.find_nodes(op="call_function", target=aten.cummax.default))) == 1 + written
    weights, entries, bags = torch.randn(5, 3), torch.tensor([1, 2, 4]), torch.tensor([0, 1])
    bounded = torch.tensor([0, 0]) if written else bags
    expected = aten.embedding_bag.padding_idx(weights, entries, bounded, False, 0, False, None, False, 0)[0]
    assert torch.equal(gm(weights, entries, bags), expected)


def division(target: Any, *args: Any, like: tuple[torch.Tensor, ...] = ()) -> fx.GraphModule:
    """Return a module of one division of "x" and "y" towards zero; `like`: what is recorded of x, y and the result."""
    graph = fx.Graph()
    inputs = {name: graph.placeholder(name) for name in "xy"}
    call = graph.call_function(target, tuple(inputs.get(arg, arg) for arg in args), {"rounding_mode": "trunc"})
    for node, value in zip((*inputs.values(), call), like or (X_INTEGERS, Y_INTEGERS, X_INTEGERS), strict=True):
        node.meta["val"] = value
    graph.output((call, inputs["x"]))
    gm = fx.GraphModule(nn.Module(), graph)
    insert_guards(gm)
    code = gm.code
    insert_guards(gm)
    assert gm.code == code
    return gm


X_INTEGERS = torch.tensor([-(2**63), -7, 7, 2**63 - 1, -(2**63)])
Y_INTEGERS = torch.tensor([-1, 2, -2, -1, 3])
EXPECTED = torch.tensor([-(2**63), -3, -3, -(2**63) + 1, -3074457345618258602])
FLOATS = (torch.ones(4),) * 3


@pytest.mark.parametrize("target", [aten.div.Tensor_mode, aten.div_.Tensor_mode, aten.divide.Tensor_mode])
def test_the_smallest_integer_is_not_divided_by_minus_one(target: Any) -> None:
    x = X_INTEGERS.clone()
    result, after = division(target, "x", "y")(x, Y_INTEGERS)
    assert torch.equal(result, EXPECTED)
    assert torch.equal(after, EXPECTED if target is aten.div_.Tensor_mode else X_INTEGERS)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_a_divisor_that_is_minus_one_in_the_dividends_type(dtype: torch.dtype) -> None:
    lowest, bits = torch.iinfo(dtype).min, torch.iinfo(dtype).bits
    x = torch.tensor([lowest, 5], dtype=dtype)
    for divisor in (torch.tensor(2**bits - 1), torch.tensor(-1)):
        result = division(aten.div.Tensor_mode, "x", "y", like=(x, divisor, x))(x, divisor)[0]
        assert result.dtype == dtype
        assert result[1] == -5


def test_what_a_file_calls_floats_is_divided_as_floats() -> None:
    result = division(aten.div.Tensor_mode, "x", "y", like=FLOATS)(X_INTEGERS, Y_INTEGERS)[0]
    assert result.dtype == torch.float32


def test_a_divisor_that_is_a_number_and_floats() -> None:
    assert torch.equal(division(aten.div.Scalar_mode, "x", -1)(X_INTEGERS, None)[0], -X_INTEGERS)
    x, y = torch.tensor([-7.5, 7.5, 0.0, torch.inf]), torch.tensor([-1.0, 2.5, 0.0, -1.0])
    expected = torch.div(x, y, rounding_mode="trunc")
    result, _ = division(aten.div.Tensor_mode, "x", "y", like=FLOATS)(x, y)
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    _, written = division(aten.div_.Tensor_mode, "x", "y", like=FLOATS)(x.clone(), y)
    torch.testing.assert_close(written, expected, rtol=0, atol=0, equal_nan=True)
