"""Capture: dynamic batch by default, the model's own signature, translated errors, honest notes."""

from __future__ import annotations

import contextlib
import copy
import threading
from pathlib import Path
from typing import Self

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.capturing.capture import capture
from graphopt.errors import CaptureError, DataError, UsageError
from graphopt.ir.exporting import exported
from graphopt.ir.provenance import origin


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 8)
        self.drop = nn.Dropout(0.5)
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc2(self.drop(torch.relu(self.fc1(x))))
        return y


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batch_is_dynamic_whatever_the_example_holds(batch: int) -> None:
    model = Small().eval()
    program = capture(model, torch.randn(batch, 4))
    assert program.inputs[0].shape == ("batch", 4)
    assert program.outputs[0].shape == ("batch", 3)
    for size in (1, 3, 8):
        x = torch.randn(size, 4)
        torch.testing.assert_close(program(x), model(x))


def test_mode_of_the_model_is_restored() -> None:
    model = Small().train()
    model.fc1.eval()
    capture(model, torch.randn(2, 4))
    assert model.training
    assert not model.fc1.training


def test_training_the_model_leaves_the_program_alone() -> None:
    model = Small().eval()
    program = capture(model, torch.randn(2, 4))
    x = torch.randn(3, 4)
    before = program(x).clone()
    with torch.no_grad():
        model.fc1.weight.mul_(2)
    torch.testing.assert_close(program(x), before, rtol=0, atol=0)


def test_outputs_are_named_by_structure() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> dict[str, object]:
            return {"logits": x * scale, "hidden": (x, x + 1)}

    program = capture(Two(), torch.randn(2, 4), {"scale": torch.ones(2, 4)})
    assert [spec.name for spec in program.inputs] == ["x", "scale"]
    assert [spec.name for spec in program.outputs] == ["logits", "hidden_0", "hidden_1"]
    result = program(torch.ones(3, 4), scale=torch.full((3, 4), 2.0))
    assert set(result) == {"logits", "hidden"}
    assert result["logits"].eq(2).all()


def test_requested_axis_is_dynamic_and_named() -> None:
    class Sum(nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens.float().cumsum(1)

    time = torch.export.Dim("time", min=2, max=64)
    program = capture(Sum(), torch.ones(2, 7, dtype=torch.int64), dynamic_shapes={"tokens": {1: time}})
    assert program.inputs[0].shape == ("batch", "time")
    assert program(torch.ones(3, 11, dtype=torch.int64)).shape == (3, 11)


def test_a_fixed_batch_is_reported_with_the_line_that_fixed_it() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(2, 4, 1).sum(0)

    program = capture(Fixed(), torch.randn(2, 4))
    assert program.batch_size == 2
    (note,) = program.notes
    assert note.subject == "batch"
    assert "The batch size is fixed" in note.text
    assert "test_capturing.py" in note.text


def test_a_named_axis_that_was_fixed_is_reported_with_the_line_that_fixed_it() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(-1, 5 * 4)

    said = r"axis `steps`, dynamic as asked, was fixed to 5 at .*test_capturing.py:\d+\. Write sizes as"
    with pytest.raises(CaptureError, match=said):
        capture(Fixed(), torch.randn(2, 5, 4), dynamic_shapes={"x": {1: torch.export.Dim("steps")}})


@pytest.mark.parametrize(
    ("dim", "said"),
    [
        (torch.export.Dim("steps"), "axis `steps`, dynamic as asked, was fixed to 5"),
        (torch.export.Dim.DYNAMIC, "axis 1 of input `x` was fixed to one size"),
    ],
)
def test_the_steps_of_an_rnn_are_those_of_the_example(dim: object, said: str) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.RNN(4, 3, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)[0]

    said = rf"{said} at .*test_capturing.py:\d+: of an nn.RNN, torch.export traces as many steps"
    with pytest.raises(CaptureError, match=said):
        capture(Steps(), torch.randn(2, 5, 4), dynamic_shapes={"x": {1: dim}})


def test_data_dependent_branch_is_explained() -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 0:
                return x
            return -x

    with pytest.raises(
        CaptureError, match=r"branches on the values of a tensor at .*test_capturing.py:\d+.*torch.where"
    ):
        capture(Branch(), torch.randn(2, 4))


def test_a_failing_model_is_told_apart_from_a_failing_capture() -> None:
    with pytest.raises(CaptureError, match=r"The model itself fails on the example inputs \(shapes \[\(2, 5\)\]\)"):
        capture(Small(), torch.randn(2, 5))


def test_a_trace_that_computes_something_else_is_refused() -> None:
    class Counter(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Counter.calls += 1
            return x * Counter.calls

    with pytest.raises(CaptureError, match="does not compute what the model does"):
        capture(Counter(), torch.randn(2, 4))


class Otherwise(nn.Module):
    """Computes a little else while it is traced."""

    def __init__(self, inside: torch.dtype, outside: torch.dtype, by: float) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).to(inside)
        self.outside, self.by = outside, by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (2e4 * self.layer(x)).to(self.outside)
        return y + (y * self.by).to(self.outside) if torch.compiler.is_exporting() else y


DOUBLE, SINGLE, HALF, WHOLE = torch.float64, torch.float32, torch.float16, torch.int64


@pytest.mark.parametrize(
    ("inside", "outside", "by", "refused"),
    [
        (SINGLE, SINGLE, 1e-3, True),
        (SINGLE, SINGLE, 1e-5, False),
        (DOUBLE, DOUBLE, 5e-5, True),
        (DOUBLE, DOUBLE, 1e-12, True),
        (DOUBLE, DOUBLE, 1e-14, False),
        (SINGLE, DOUBLE, 1e-5, False),
        (HALF, HALF, 1e-2, True),
        (DOUBLE, WHOLE, 9e-5, True),
    ],
)
def test_how_far_a_trace_may_be_off(inside: torch.dtype, outside: torch.dtype, by: float, refused: bool) -> None:
    wrong = pytest.raises(CaptureError, match="does not compute what the model does")
    torch.manual_seed(0)
    with wrong if refused else contextlib.nullcontext():
        capture(Otherwise(inside, outside, by), torch.randn(2, 4, dtype=inside))


def test_unknown_name_in_dynamic_shapes() -> None:
    with pytest.raises(UsageError, match=r"names \['y'\], but the model's inputs are \['x'\]"):
        capture(Small(), torch.randn(2, 4), dynamic_shapes={"y": {1: torch.export.Dim("d")}})


def test_what_eval_loses_is_noted() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.attention(x, x, x)[0]
            return y

    program = capture(Attention(), torch.randn(2, 5, 8))
    assert [note.text for note in program.notes] == [
        "MultiheadAttention stays off when the program is trained: attention (0.1)"
    ]


def test_a_module_that_sets_its_mode_itself_is_noted() -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> Self:
            super().train(mode)
            self[1].eval()
            return self

    layers = nn.Linear(4, 4), nn.BatchNorm1d(4)
    program = capture(nn.Sequential(Frozen(*layers), nn.ReLU()), torch.randn(6, 4))
    assert [note.text for note in program.notes] == ["Frozen.train() is not asked when the program is trained: 0"]
    assert [note.text for note in capture(Frozen(*layers), torch.randn(6, 4)).notes] == [
        "Frozen.train() is not asked when the program is trained: the model itself"
    ]
    assert capture(nn.Sequential(*layers), torch.randn(6, 4)).notes == ()


def test_every_node_knows_its_origin_and_it_survives_export() -> None:
    program = capture(Small(), torch.randn(2, 4))
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert [origin(node).module for node in calls] == ["fc1", "", "drop", "fc2"]  # type: ignore[union-attr]
    again = exported(program).program
    kept = {origin(n).node for n in again.graph.nodes if n.op == "call_function"}  # type: ignore[union-attr]
    assert kept == {node.name for node in calls}


def test_in_place_operators_become_functional_where_nobody_sees_the_write() -> None:
    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + 1
            y.relu_()
            y += x
            return y

    program = capture(InPlace(), torch.randn(2, 4))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names == ["aten.add.Tensor", "aten.relu.default", "aten.add.Tensor"]


def test_a_write_through_a_view_that_is_read_later_stays() -> None:
    class Aliased(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + 1
            z = y.view(-1)
            z.mul_(2)
            return y

    model = Aliased()
    program = capture(model, torch.randn(2, 4))
    x = torch.randn(5, 4)
    torch.testing.assert_close(program(x), model(x))


def test_gradient_switches_are_inlined() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                y, z = torch.sin(x), torch.cos(x)
            out: torch.Tensor = self.fc(y + z)
            return out

    program = capture(Frozen(), torch.randn(2, 4))
    assert all("set_grad" not in str(node.target) for node in program.graph.nodes)


def test_inputs_behind_two_stars_are_dynamic() -> None:
    class Stars(nn.Module):
        def forward(self, x: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
            return x + more["a"] - more["b"]

    x = torch.randn(3, 4)
    program = capture(Stars(), (x,), {"b": x + 1, "a": x})
    assert [spec.shape for spec in program.inputs] == [("batch", 4)] * 3
    torch.testing.assert_close(program(x[:1], a=x[:1], b=x[:1]), x[:1])


def test_a_number_before_the_samples_leaves_the_batch_dynamic() -> None:
    class Scaled(nn.Module):
        def forward(self, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return x * scale

    program = capture(Scaled(), (torch.tensor(2.0), torch.randn(3, 4)))
    assert [spec.shape for spec in program.inputs] == [(), ("batch", 4)]


class Counting(nn.Module):
    def __init__(self, *, read: bool) -> None:
        super().__init__()
        self.read = read
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)  # type: ignore[operator]
        return x * self.calls if self.read else x * 2  # type: ignore[operator,no-any-return]


def test_a_model_that_remembers_earlier_calls_is_refused() -> None:
    model = Counting(read=True)
    with pytest.raises(CaptureError, match="remembers earlier calls: it writes to `calls`"):
        capture(model, torch.randn(3, 4))


def test_buffers_of_the_model_are_left_alone() -> None:
    model = Counting(read=False)
    capture(model, torch.randn(3, 4))
    assert float(model.calls) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("result", [None, 3])
def test_a_model_without_tensor_outputs_is_refused(result: object) -> None:
    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return result

    with pytest.raises(CaptureError, match="returns no tensor"):
        capture(Nothing(), torch.randn(3, 4))


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(CaptureError, match="no samples"):
        capture(nn.Linear(4, 3), torch.randn(0, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_compared_too(value: float) -> None:
    class Undefined(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, torch.full_like(x, value)], 1)

    program = capture(Undefined(), torch.randn(3, 4))
    assert program.inputs[0].shape == ("batch", 4)


class OneAtATime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(x.reshape(1, -1))
        return y


@pytest.mark.parametrize("batch", [1, 2])
def test_a_model_that_takes_one_sample_only_stays_at_one(batch: int) -> None:
    program = capture(OneAtATime(), torch.randn(batch, 16))
    assert program.inputs[0].shape == (1, 16)
    (note,) = program.notes
    assert note.text.startswith("The batch size is fixed to 1: with more samples the model raises RuntimeError")


@torch.library.custom_op("graphopt_test::four_rows", mutates_args=())
def four_rows(x: torch.Tensor) -> torch.Tensor:
    return x + torch.ones(4, x.shape[1])


@four_rows.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class FourRows(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = four_rows(x)
        return y


def test_a_batch_that_only_kernels_know_to_be_fixed_is_fixed() -> None:
    program = capture(FourRows(), torch.randn(4, 3))
    assert program.batch_size == 4
    (note,) = program.notes
    assert note.text.startswith("The batch size is fixed: at batch 3 the model fails (RuntimeError: The size of tensor")


class Attends(nn.Module):
    """Takes states whose second axis is the batch."""

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return x + state.sum(0)


def test_a_batch_that_is_the_axis_of_another_input_too_stays_dynamic() -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"x": {0: batch}, "state": {1: batch}}
    program = capture(Attends(), (torch.randn(4, 3), torch.randn(2, 4, 3)), dynamic_shapes=shapes)
    assert [spec.shape for spec in program.inputs] == [("batch", 3), (2, "batch", 3)]
    assert program(torch.randn(7, 3), torch.randn(2, 7, 3)).shape == (7, 3)


class Noisy(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mode == "noise":
            return x + torch.randn_like(x)
        return nn.functional.dropout(x, 0.5, training=self.mode == "dropout")


@pytest.mark.parametrize(("mode", "operator"), [("noise", "randn_like"), ("dropout", "dropout")])
def test_random_outputs_are_refused(mode: str, operator: str) -> None:
    with pytest.raises(CaptureError, match=rf"draws random numbers in eval mode, by `{operator}` at .*test_capturing"):
        capture(Noisy(mode), torch.randn(3, 4))


def test_dropout_that_is_off_is_not_random() -> None:
    capture(Noisy("eval"), torch.randn(3, 4))


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(UsageError, match=r"The model is a function, not an nn\.Module"):
        capture(lambda x: x, torch.randn(3, 4))  # type: ignore[arg-type]


def test_an_unknown_class_of_outputs_says_how_to_register_it() -> None:
    class Own:
        pass

    class Wrapping(nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return Own()

    with pytest.raises(CaptureError, match=r"no tensor, but a Own.*register_dataclass"):
        capture(Wrapping(), torch.randn(3, 4))


def test_compiled_modules_are_captured_as_they_are() -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the model was compiled")

    inner = nn.Sequential(torch.compile(nn.Linear(4, 3), backend=refuse), nn.ReLU())
    inner[1].compile(backend=refuse)
    program = capture(torch.compile(inner, backend=refuse), (torch.ones(2, 4),))
    assert [spec.name for spec in program.inputs] == ["input"]
    torch.testing.assert_close(program(torch.ones(5, 4)), inner[0]._orig_mod(torch.ones(5, 4)).relu())


def test_boolean_outputs() -> None:
    class Positive(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x > 0

    program = capture(Positive(), (torch.ones(2, 4),))
    assert program.batch_size is None
    assert program.outputs[0].dtype is torch.bool


@pytest.mark.parametrize("name", ["graph", "code", "meta"])
def test_a_part_named_like_one_of_a_captured_graph_is_refused(name: str) -> None:
    class Clashing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, name, nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = getattr(self, name)(x)
            return y

    with pytest.raises(CaptureError, match=f"attribute `{name}` bears a name"):
        capture(Clashing(), torch.randn(2, 4))


def test_what_vmap_leaves_in_a_trace_is_refused() -> None:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = torch.vmap(lambda weight: x @ weight)(self.weight)
            return y

    with pytest.raises(CaptureError, match=r"Write torch\.vmap out as a batched operator"):
        capture(Ensemble(), torch.randn(2, 4))


class Converting(nn.Module):
    """Converts its layer in forward, as some routers do: to what it is, or to something else."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.router, self.last = nn.Linear(8, 4), nn.Linear(4, 2)
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.router.to(self.dtype)(x.to(self.dtype))
        result: torch.Tensor = self.last(scores.to(x.dtype))
        return result


def test_a_layer_converted_to_what_it_is() -> None:
    model, x = Converting(torch.float32), torch.randn(3, 8)
    before = nn.Module.to
    assert torch.equal(capture(model, (x,))(x), model(x))
    assert nn.Module.to is before


def test_a_layer_converted_there_and_back_is_named() -> None:
    class Restless(Converting):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            self.router.to(x.dtype)
            return y

    with pytest.raises(CaptureError, match=r"converts its own layers in its forward at .*test_capturing.py:\d+"):
        capture(Restless(torch.float64), (torch.randn(3, 8),))


def test_a_dropout_that_is_off_is_not_blamed_for_what_another_draws() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.dropout = nn.Linear(8, 4), nn.Dropout(0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.dropout(self.first(x))
            return y + torch.randn(4)

    with pytest.raises(CaptureError, match="in eval mode, by `randn`"):
        capture(Noisy(), (torch.randn(3, 8),))


def test_autocast_around_a_branch_is_named() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                h = self.last(self.first(x).relu())
                h = torch.cond(h.sum() > 0, lambda h: h * 2, lambda h: h * 3, (h,))
            result: torch.Tensor = h.to(x.dtype)
            return result

    with pytest.raises(CaptureError, match="leaves an autocast block open"):
        capture(Around(), (torch.randn(3, 8),))


def test_a_graph_made_by_symbolic_tracing_is_captured_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(8, 4)
    program = capture(traced, x)
    torch.testing.assert_close(program(x), model.eval()(x))
    assert traced.training


def test_what_export_made_is_captured_with_its_guards() -> None:
    model = nn.Linear(4, 3)
    program = capture(torch.export.export(model, (torch.randn(8, 4),)).module(), torch.randn(8, 4))
    assert program.inputs[0].batched


class Full(Small):
    """Finds a device without memory, in eager mode at one size of the batch, or while it is traced."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.size == 0 if torch.compiler.is_exporting() else x.shape[0] == self.size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return super().forward(x)


@pytest.mark.parametrize("size", [0, 2, 3])
def test_a_lack_of_memory_is_no_other_model(size: int) -> None:
    with pytest.raises(CaptureError, match=r"ran out of memory: .*20.00 GiB. Capture the model on the CPU"):
        capture(Full(size), torch.randn(2, 4))


def test_captures_of_two_threads_do_not_mix() -> None:
    convert, entered, ended = nn.Module.to, threading.Event(), []

    class Second(Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            entered.set()
            return super().forward(x)

    def second() -> None:
        capture(Second(), torch.randn(2, 4))
        ended.append("second")

    other = threading.Thread(target=second)

    class First(Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.compiler.is_exporting() and other.ident is None:
                other.start()
                entered.wait(0.3)  # which it is not
            return super().forward(x)

    capture(First(), torch.randn(2, 4))
    assert not ended
    other.join()
    assert ended == ["second"]
    assert nn.Module.to is convert


class Difference(nn.Module):
    """Takes inputs by names that torch uses itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, input: Tensor, input_1: Tensor, input_2: Tensor | None = None) -> Tensor:
        y: Tensor = self.layer(input) * 2 - self.layer(input_1)
        return y if input_2 is None else y + 4 * self.layer(input_2)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("way", ["module", "file"])
def test_inputs_called_as_torch_calls_others(count: int, way: str, tmp_path: Path) -> None:
    model, inputs = Difference().eval(), tuple(torch.randn(count, 2, 4))
    if way == "file":
        torch.export.save(torch.export.export(model, inputs), tmp_path / "model.pt2")
        program = graphopt.load(tmp_path / "model.pt2")
    else:
        program = capture(model, inputs)
    assert [spec.name for spec in program.inputs] == ["input", "input_1", "input_2"][:count]
    result = graphopt.optimize(program, passes="fold", bench=False)
    assert result.artifact is not None
    for found in (program, result.program, graphopt.load(program.save(tmp_path / "again.pt2"))):
        assert torch.allclose(found(*inputs), model(*inputs), atol=1e-6)
    (found,) = result.artifact.session()(*(tensor.numpy() for tensor in inputs))
    assert torch.allclose(torch.from_numpy(found), model(*inputs), atol=1e-6)


class Named(nn.Module):
    """Takes an input whatever it is called."""

    def forward(self, **inputs: Tensor) -> Tensor:
        (x,) = inputs.values()
        return x.relu()


@pytest.mark.parametrize("name", ["lambda", "a b"])
def test_an_input_with_a_name_that_no_argument_can_have(name: str) -> None:
    with pytest.raises(UsageError, match=f"called '{name}', and no argument of a program can have that name"):
        capture(Named(), (), {name: torch.randn(2, 3)})


class Apart(nn.Module):
    """Tells its inputs apart, and from what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return one * 2 - other + self.weight * 4


def test_one_tensor_may_be_the_example_of_several_inputs_and_of_the_model() -> None:
    model, x, y = Apart().eval(), torch.zeros(2, 3), torch.arange(6.0).view(2, 3)
    for args in ((x, x), (model.weight, x), (model.weight, model.weight)):
        program = capture(model, args)
        assert torch.equal(program(x, y), model(x, y))
        assert torch.equal(program(y, x), model(y, x))


def test_what_lies_on_the_device_meta_has_no_values() -> None:
    model, x = nn.Linear(4, 2), torch.randn(2, 4)
    program = capture(model, (x,))
    for work in (
        lambda: capture(copy.deepcopy(model).to("meta"), (x,)),
        lambda: graphopt.optimize(program.to("meta"), x, passes="", bench=False),
    ):
        with pytest.raises(CaptureError, match="`weight` of the model lies on the device `meta` and has no values"):
            work()
    with pytest.raises(CaptureError, match="An example input lies on the device `meta`"):
        capture(model, (x.to("meta"),))
    with pytest.raises(DataError, match="The data lie on the device `meta`"):
        graphopt.optimize(program, x.to("meta"), passes="", bench=False)


class Scaled(nn.Module):
    """An embedding whose rows are scaled when they are read, and another that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.Embedding(20, 8, max_norm=1.0), nn.Linear(8, 4)
        nn.init.normal_(self.rows.weight, std=2.0)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rows(ids) + self.rows(ids.flip(1)))


class Shared(nn.Module):
    """A table that is scaled for one of two readers, or to another norm for each."""

    def __init__(self, other: float | None) -> None:
        super().__init__()
        self.one, self.other = nn.Embedding(20, 8, max_norm=1.0), nn.Embedding(20, 8, max_norm=other)
        nn.init.normal_(self.one.weight, std=2.0)
        self.other.weight = self.one.weight

    def forward(self, ids: Tensor, more: Tensor) -> Tensor:
        return self.other(more) - self.one(ids)


@pytest.mark.parametrize(("other", "stays"), [(None, True), (2.0, True), (1.0, False)])
def test_rows_that_are_read_in_two_ways_are_scaled_when_they_are_read(other: float | None, stays: bool) -> None:
    torch.manual_seed(0)
    model = Shared(other).eval()
    example = torch.arange(3).expand(2, 3)
    with torch.no_grad():
        model.one.weight[:3].mul_(0.01)
    fresh, (few, many) = copy.deepcopy(model), (example, torch.arange(17, 20).expand(2, 3))
    program = capture(model, (example, example))
    assert any("renorm" in str(node.target) for node in program.graph.nodes) == stays
    torch.testing.assert_close(program(few, many), fresh(few, many), rtol=1e-5, atol=1e-6)


def test_rows_that_are_scaled_when_they_are_read_are_stored_so() -> None:
    torch.manual_seed(0)
    model = Scaled().eval()
    fresh = copy.deepcopy(model)
    program = capture(model, (torch.arange(6).view(2, 3),))
    assert not [node for node in program.graph.nodes if "renorm" in str(node.target)]
    (note,) = program.notes
    said = "Embedding does not scale its rows when the program is trained: rows (max_norm=1)"
    assert (note.subject, note.text) == ("training", said)
    ids = torch.arange(20).view(-1, 4)[:, :3]
    torch.testing.assert_close(program(ids), fresh(ids), rtol=1e-5, atol=1e-6)
