"""What was exported in training mode computes what evaluation mode does, whichever operators the exporter wrote."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from graphopt.capturing import leaving_training
from graphopt.capturing.leaving_training import leave_training
from graphopt.errors import CaptureError
from graphopt.ir.training import argument_called

aten = torch.ops.aten
DRAW = torch.Generator().manual_seed(0)
X = torch.randn(6, 4, 5, 5, generator=DRAW) * 2 + 1
STATE = {
    "weight": torch.rand(4, generator=DRAW) + 0.5,
    "bias": torch.rand(4, generator=DRAW),
    "running_mean": torch.rand(4, generator=DRAW),
    "running_var": torch.rand(4, generator=DRAW) + 0.5,
}
EVALUATED = F.batch_norm(X, STATE["running_mean"], STATE["running_var"], STATE["weight"], STATE["bias"])
LSTM, GRU = nn.LSTM(5, 3, 2, dropout=0.5, batch_first=True).eval(), nn.GRU(5, 3, 2, dropout=0.5).eval()
SEQUENCE, HIDDEN = X[:, 0], (torch.zeros(2, 6, 3), torch.zeros(2, 6, 3))


class Holder(nn.Module):
    """Buffers for a hand-made graph."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in STATE.items():
            self.register_buffer(name, value.clone())
        self.register_buffer("num_batches_tracked", torch.tensor(3))


def module(target: Any, *args: Any, picked: int | None = None, moved: tuple[int, int] | None = None) -> fx.GraphModule:
    """Return a module of one call: "x" among the arguments is the input, another string a buffer.

    Args:
        target: what is called.
        args: with what.
        picked: which of the results is returned; None: there is one.
        moved: which of them are written to the statistics.
    """
    graph = fx.Graph()
    x = graph.placeholder("x")
    read: dict[str, fx.Node] = {"x": x}
    for name in [*STATE, "num_batches_tracked"]:
        if name in args or moved:
            read[name] = graph.get_attr(name)
    call = graph.call_function(target, tuple(read[arg] if isinstance(arg, str) else arg for arg in args))
    result = call if picked is None else graph.call_function(operator.getitem, (call, picked))
    for name, index in zip(("running_mean", "running_var"), moved or (), strict=False):
        graph.call_function(aten.copy_.default, (read[name], graph.call_function(operator.getitem, (call, index))))
    if moved:
        counted = graph.call_function(aten.add.Tensor, (read["num_batches_tracked"], 1))
        graph.call_function(aten.copy_.default, (read["num_batches_tracked"], counted))
    graph.output(result)
    return fx.GraphModule(Holder(), graph)


NORM = ("x", "weight", "bias", "running_mean", "running_var")
GROUPED = ("x", "weight", "bias", 6, 4, 25, 2, 1e-5)
CASES: dict[str, tuple[fx.GraphModule, Tensor, str]] = {
    "batch_norm": (module(aten.batch_norm.default, *NORM, True, 0.1, 1e-5, True), EVALUATED, "batch_norm"),
    "functional": (
        module(aten._native_batch_norm_legit_functional.default, *NORM, True, 0.1, 1e-5, picked=0, moved=(3, 4)),
        EVALUATED,
        "batch_norm",
    ),
    "legit": (
        module(aten._native_batch_norm_legit.default, *NORM, True, 0.1, 1e-5, picked=0),
        EVALUATED,
        "batch_norm",
    ),
    "native": (module(aten.native_batch_norm.default, *NORM, True, 0.1, 1e-5, picked=0), EVALUATED, "batch_norm"),
    "with_update": (
        module(aten._batch_norm_with_update_functional.default, *NORM, 0.1, 1e-5, picked=0, moved=(4, 5)),
        EVALUATED,
        "batch_norm",
    ),
    "instance_norm": (
        module(aten.instance_norm.default, *NORM, True, 0.1, 1e-5, True),
        EVALUATED,
        "instance_norm",
    ),
    "dropout": (module(aten.native_dropout.default, "x", 0.5, True, picked=0), X, "dropout"),
    "dropout of no flag": (module(aten.native_dropout.default, "x", 0.5, None, picked=0), X, "dropout"),
    "rrelu": (
        module(aten.rrelu_with_noise_functional.default, "x", "x", 0.1, 0.3, True, picked=0),
        F.leaky_relu(X, 0.2),
        "rrelu",
    ),
    "attention": (
        module(aten.scaled_dot_product_attention.default, "x", "x", "x", None, 0.5),
        F.scaled_dot_product_attention(X, X, X),
        "scaled_dot_product_attention",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_call_of_training_becomes_the_one_of_evaluation(case: str) -> None:
    gm, wanted, name = CASES[case]
    assert leave_training(gm) == [name]
    torch.testing.assert_close(gm(X), wanted)
    for key, tensor in gm.named_buffers():
        if key in STATE:
            torch.testing.assert_close(tensor, STATE[key], rtol=0, atol=0)
    assert not [node for node in gm.graph.nodes if node.target is aten.copy_.default]
    assert leave_training(gm) == []


@pytest.mark.parametrize("layer", [LSTM, GRU])
def test_dropout_between_recurrent_layers_is_off(layer: Any) -> None:
    weights = list(layer._flat_weights)
    hidden = list(HIDDEN) if layer is LSTM else HIDDEN[0]
    target = aten.lstm.input if layer is LSTM else aten.gru.input
    x = SEQUENCE if layer is LSTM else SEQUENCE.transpose(0, 1)
    graph = fx.Graph()
    root = nn.Module()
    given = graph.placeholder("x")
    for index, tensor in enumerate(weights):
        root.register_buffer(f"w{index}", tensor.detach())
    read = [graph.get_attr(f"w{index}") for index in range(len(weights))]
    states = [graph.call_function(aten.zeros.default, ([2, 6, 3],)) for _ in range(2 if layer is LSTM else 1)]
    state = states if layer is LSTM else states[0]
    call = graph.call_function(target, (given, state, read, True, 2, 0.5, True, False, layer is LSTM))
    graph.output(graph.call_function(operator.getitem, (call, 0)))
    gm = fx.GraphModule(root, graph)
    assert leave_training(gm) == ["lstm" if layer is LSTM else "gru"]
    torch.testing.assert_close(gm(x), layer(x, tuple(hidden) if layer is LSTM else hidden)[0])


def test_statistics_of_the_batch_stay_where_there_are_no_others() -> None:
    gm = module(aten._native_batch_norm_legit.no_stats, "x", "weight", "bias", True, 0.1, 1e-5, picked=0)
    other = module(aten.instance_norm.default, "x", None, None, None, None, True, 0.1, 1e-5, True)
    assert leave_training(gm) == leave_training(other) == []


def test_core_aten_of_evaluation_is_written_as_modules_are_captured_and_no_news() -> None:
    gm = module(aten._native_batch_norm_legit_no_training.default, *NORM, 0.1, 1e-5, picked=0)
    assert leave_training(gm) == []
    assert [node.target for node in gm.graph.nodes if node.op == "call_function"] == [aten.batch_norm.default]
    torch.testing.assert_close(gm(X), EVALUATED)


def test_a_normalisation_of_groups_looks_at_its_sizes() -> None:
    gm = module(aten.native_group_norm.default, *GROUPED, picked=0)
    assert leave_training(gm) == []
    torch.testing.assert_close(gm(X), F.group_norm(X, 2, STATE["weight"], STATE["bias"]))
    with pytest.raises(CaptureError, match="uses what `native_group_norm` returns besides its result"):
        leave_training(module(aten.native_group_norm.default, *GROUPED, picked=1))


def test_what_says_nothing_of_evaluation_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"`_fused_dropout` does not say .* Export it after `model.eval\(\)`"):
        leave_training(module(aten._fused_dropout.default, "x", 0.5, picked=0))
    with pytest.raises(CaptureError, match="uses what `native_dropout` returns besides its result"):
        leave_training(module(aten.native_dropout.default, "x", 0.5, True, picked=1))


# normalisations by given statistics, which have no training
EVALUATION = {
    "_batch_norm_no_update",
    "_native_batch_norm_legit_no_training",
    "batch_norm_elemt",
    "quantized_batch_norm",
}


def _of_training(schema: Any) -> bool:
    """Whether an operator's name or arguments speak of training. Backward and `out` forms are in no forward graph."""
    name = schema.name.removeprefix("aten::")
    if not schema.name.startswith("aten::") or "backward" in name or any(arg.is_out for arg in schema.arguments):
        return False
    words = ("train", "drop", "use_input_stats")
    told = any(word in argument.name for argument in schema.arguments for word in words)
    return told or any(word in name for word in ("drop", "rrelu", "batch_norm", "instance_norm"))


def test_every_operator_that_speaks_of_training_is_decided() -> None:
    found = [schema for schema in torch._C._jit_get_all_schemas() if _of_training(schema)]
    undecided = []
    for schema in found:
        name = schema.name.removeprefix("aten::")
        packet = getattr(aten, name, None)
        target = getattr(packet, schema.overload_name or "default", None)
        known = leaving_training._TRAINING_ONLY | leaving_training._ALWAYS_TRAINING | EVALUATION
        if name not in known and target is not None:
            flag = argument_called(target, ("train", "training", "use_input_stats", "dropout_p"))
            undecided += [] if flag else [str(target)]
    assert len(found) > 50
    assert undecided == []
