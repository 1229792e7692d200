"""LSTMs and GRUs take any number of steps where that axis is dynamic: captured, lowered, saved, and in plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import graphopt
from graphopt.ir.torch_internals import optimization_hint, pytree, recurrent_results, steps_stay_dynamic


class Tagger(nn.Module):
    """A recurrent layer, and more calls that are taken apart for ONNX than are traced one by one."""

    def __init__(self, kind: type[nn.Module], *, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = kind(4, 6, 2, batch_first=batch_first, bidirectional=True)  # type: ignore[call-arg]
        self.head = nn.Parameter(torch.randn(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)[0]
        for _ in range(17):
            y = y.unflatten(2, (3, 4)).flatten(2)
        return y @ self.head


@pytest.mark.parametrize(("kind", "batch_first"), [(nn.LSTM, False), (nn.GRU, True)])
def test_any_number_of_steps(kind: type[nn.Module], batch_first: bool, tmp_path: Path) -> None:
    model = Tagger(kind, batch_first=batch_first).eval()
    steps = int(batch_first)
    shapes = {"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC, steps: Dim("steps", min=3, max=40)}}
    program = graphopt.capture(model, torch.randn(4, 9, 4), dynamic_shapes=shapes)
    assert program.inputs[0].shape[steps] == "steps"
    result = graphopt.optimize(program, passes="fold", bench=False, check="full")
    assert result.artifact is not None
    session = result.artifact.session()
    plain = torch.export.load(result.program.save(tmp_path / "a.pt2")).module()
    for sizes in ((3, 5), (20, 7)):
        x = torch.randn(*sizes, 4)
        want = model(x)
        torch.testing.assert_close(torch.tensor(session(x.numpy())[0]), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(plain(x), want)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_results_lie_in_memory_as_kernels_leave_them(kind: type[nn.Module], batch_first: bool) -> None:
    layer = kind(4, 6, 2, batch_first=batch_first, bidirectional=True).eval()  # type: ignore[call-arg]
    x = torch.randn(4, 9, 4)
    with steps_stay_dynamic():
        exported = torch.export.export(layer, (x,), dynamic_shapes=({int(batch_first): Dim.DYNAMIC},))
    results = exported.graph.output_node().args[0]
    assert isinstance(results, tuple)
    strides = [[optimization_hint(one, 0) for one in node.meta["val"].stride()] for node in results]  # type: ignore[union-attr]
    assert strides == [[*tensor.stride()] for tensor in pytree.tree_leaves(layer(x))]


def test_torch_is_as_it_was_afterwards() -> None:
    operators = (torch.ops.aten.lstm.input, torch.ops.aten.gru.input)
    before = [dict(operator.py_kernels) for operator in operators]
    with steps_stay_dynamic(), steps_stay_dynamic():
        assert [operator.py_kernels for operator in operators] != before
    assert [operator.py_kernels for operator in operators] == before


def test_a_number_of_steps_that_is_known_is_computed_with() -> None:
    x, state, weights = torch.randn(3, 2, 4), torch.zeros(1, 2, 6), [torch.randn(18, 4), torch.randn(18, 6)]
    args = (x, state, weights, False, 1, 0.0, False, False, False)
    assert recurrent_results(torch.ops.aten.gru.input, args) is None
    with steps_stay_dynamic():
        found = torch.gru(*args)
    torch.testing.assert_close(found, torch.gru(*args))
