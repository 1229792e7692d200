"""The proof that an artifact computes what its program does, and that it fails when it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from graphopt import capture
from graphopt.backends.onnx_execution import replay
from graphopt.backends.onnx_execution.agreement import Reference, disagreements, half_of_the_digits, relative_error
from graphopt.backends.onnx_execution.batches import batches
from graphopt.backends.onnx_execution.replay import Replay, quantize_nodes
from graphopt.backends.onnx_execution.session import PRECISE, SessionSettings
from graphopt.backends.onnx_execution.verification import verify
from graphopt.backends.onnx_lowering.lowering import Style, lower
from graphopt.backends.onnx_lowering.saving import save
from graphopt.errors import LoweringError
from graphopt.ir.program import Program
from graphopt.measure.cost import cost
from tests.backends.quantized import IntegerResNet
from tests.models import Residual

SETTINGS = SessionSettings(threads=1, config=PRECISE)


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Path]:
    torch.manual_seed(0)
    return lowered(capture(Residual().eval(), torch.randn(2, 3, 8, 8)), tmp_path_factory)


@pytest.fixture(scope="module")
def integers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Path]:
    torch.manual_seed(0)
    return lowered(capture(IntegerResNet().eval(), torch.randn(2, 3, 16, 16)), tmp_path_factory)


def lowered(program: Program, factory: pytest.TempPathFactory) -> tuple[Program, Path]:
    path = factory.mktemp("artifact") / "model.onnx"
    save(lower(program, Style(20, global_pooling=True, own_weights=True)), path)
    return program, path


def tampered(path: Path, home: Path, change: Callable[[ir.Model], None]) -> Path:
    model = ir.load(path)
    change(model)
    save(model, home / "model.onnx")
    return home / "model.onnx"


def stored(model: ir.Model, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    value = model.graph.initializers[name]
    value.const_value = ir.tensor(change(value.const_value.numpy().copy()), name=name)


def test_float_program_agrees(residual: tuple[Program, Path]) -> None:
    assert verify(residual[1], residual[0], None, SETTINGS) < 1e-5


def test_weights_that_are_not_kept_are_dequantized_again(
    integers: tuple[Program, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = integers[0]
    feed = tuple(torch.from_numpy(array) for array in next(batches(program, None))[1])
    kept = Replay(program)
    wanted = kept.outputs(feed)
    assert kept._weights
    monkeypatch.setattr(replay, "_MOST_KEPT", 0)
    again = Replay(program)
    for _ in range(2):
        assert all(map(torch.equal, wanted, again.outputs(feed)))
    assert not again._weights


def test_a_wrong_weight_is_found(residual: tuple[Program, Path], tmp_path: Path) -> None:
    program, path = residual
    wrong = tampered(path, tmp_path, lambda model: stored(model, "outer.weight", lambda array: array * 1.01))
    with pytest.raises(
        LoweringError, match=r"computes something else than the program: output `output` is off by 0\.0"
    ):
        verify(wrong, program, None, SETTINGS)


def test_a_file_of_another_program_is_found(residual: tuple[Program, Path], integers: tuple[Program, Path]) -> None:
    class Other(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return y + 1

    with pytest.raises(LoweringError, match="has the inputs x; the program has y"):
        verify(residual[1], capture(Other(), torch.randn(2, 3)), None, SETTINGS)


def test_integer_program_agrees_step_by_step(integers: tuple[Program, Path]) -> None:
    program, path = integers
    assert verify(path, program, None, SETTINGS) < 0.1  # end to end, rounding adds up; each step is within one
    rng = np.random.default_rng(1)
    assert verify(path, program, (rng.standard_normal((5, 3, 16, 16), dtype=np.float32),), SETTINGS) < 0.1


def test_one_weight_off_by_a_few_is_found(integers: tuple[Program, Path], tmp_path: Path) -> None:
    """End to end the difference drowns in rounding; between two quantizations it does not."""

    def change(array: np.ndarray) -> np.ndarray:
        array[0] += np.where(array[0] > 0, -40, 40).astype(np.int8)
        return array

    program, path = integers
    wrong = tampered(path, tmp_path, lambda model: stored(model, "blocks.0.first.stored.weight", change))
    with pytest.raises(LoweringError, match=r"for the result of `conv2d` of `blocks\.0\.first`: off by \d+"):
        verify(wrong, program, None, SETTINGS)


def test_a_shifted_zero_point_is_found(integers: tuple[Program, Path], tmp_path: Path) -> None:
    def change(model: ir.Model) -> None:
        quantize = next(node for node in model.graph if node.op_type == "QuantizeLinear")
        stored(model, str(quantize.inputs[2].name), lambda array: array + np.uint8(2))

    program, path = integers
    with pytest.raises(LoweringError, match="other integers than the program for input `x`: off by 2"):
        verify(tampered(path, tmp_path, change), program, None, SETTINGS)


def test_replay_starts_each_piece_from_the_runtimes_integers(integers: tuple[Program, Path]) -> None:
    program, _ = integers
    x = program.flat_examples()
    names = quantize_nodes(program)
    free = Replay(program)
    outputs = free.outputs(x)
    assert free.steps == []
    torch.testing.assert_close(outputs[0], program.call_flat(x)[0])
    first = program.graph.find_nodes(op="call_function", target=torch.ops.graphopt.quantize.default)[0]
    codes = torch.zeros(first.meta["val"].shape[1:], dtype=torch.uint8).expand(2, -1, -1, -1)
    replay = Replay(program)
    other = replay.outputs(x, {names[0]: (codes,)})
    assert [step.node for step in replay.steps] == names[:1]
    assert replay.steps[0].largest > 1
    assert not torch.equal(other[0], outputs[0])


class TestBatches:
    def test_sizes_and_distinct_rows(self) -> None:
        program = capture(Residual().eval(), torch.randn(2, 3, 8, 8))
        drawn = dict(batches(program, None))
        assert [arrays[0].shape[0] for arrays in drawn.values()] == [1, 3, 8]
        rows = drawn["at batch size 8"][0].reshape(8, -1)
        assert len({row.tobytes() for row in rows}) == 8
        assert sorted(rows[2]) == sorted(rows[0])  # shuffled, so that values stay valid
        np.testing.assert_array_equal(dict(batches(program, None))["at batch size 8"][0].reshape(8, -1), rows)

    def test_a_dear_program_is_run_at_fewer_sizes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        program = capture(Residual().eval(), torch.randn(2, 3, 8, 8))
        monkeypatch.setattr("graphopt.backends.onnx_execution.batches._MOST_FLOPS", 12 * cost(program).flops - 1)
        assert [*dict(batches(program, None))] == ["at batch size 1", "at batch size 3"]

    def test_given_samples_are_cycled_through(self) -> None:
        program = capture(Residual().eval(), torch.randn(2, 3, 8, 8))
        samples = np.random.default_rng(0).standard_normal((3, 3, 8, 8), dtype=np.float32)
        drawn = dict(batches(program, (samples,)))["at batch size 8"][0]
        np.testing.assert_array_equal(drawn, samples[[0, 1, 2, 0, 1, 2, 0, 1]])

    def test_a_program_that_does_not_run_at_a_size_is_no_bare_exception(
        self, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        program, path = lowered(capture(AtMostFour(), torch.randn(4, 3)), tmp_path_factory)
        with pytest.raises(LoweringError, match=r"does not run at batch size 8, .* --dynamic x:0:MIN-MAX"):
            verify(path, program, None, SETTINGS)


class AtMostFour(nn.Module):
    """Adds a row of four to each, and more are not there."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table.narrow(0, 0, x.shape[0])


def reference(
    *wanted: Tensor, exact: Tensor | None = None, perturbed: Tensor | None = None, shaken: Tensor | None = None
) -> Reference:
    def never(*_: object) -> tuple[Tensor, ...]:
        raise AssertionError("not needed")

    return Reference(
        wanted,
        (lambda: (exact,)) if exact is not None else never,
        (lambda seed: (perturbed,)) if perturbed is not None else never,
        (lambda seed: (shaken,)) if shaken is not None else never,
    )


class TestAgreement:
    def test_half_of_the_digits(self) -> None:
        assert half_of_the_digits(torch.float32) == pytest.approx(3.45e-4, rel=1e-2)

    def test_close_floats_need_no_second_run(self) -> None:
        want = torch.tensor([1.0, -2.0])
        assert disagreements(reference(want), (want * (1 + 1e-5),)) == []

    def test_what_torch_itself_loses_is_allowed_to_the_runtime(self) -> None:
        exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
        want, got = torch.tensor([1.0, 2.01]), torch.tensor([1.0, 1.98])
        assert disagreements(reference(want, exact=exact, shaken=torch.tensor([1.0, 2.005])), (got,)) == []
        (wrong,) = disagreements(reference(want, exact=exact), (torch.tensor([1.0, 1.5]),))
        assert wrong.text == "is off by 0.25 of its largest value, where float arithmetic explains 0.04"

    def test_what_another_type_computes_is_no_rounding_where_the_last_digits_change_nothing(self) -> None:
        want, got = torch.tensor([1.0, torch.inf]), torch.tensor([1.0, 1.5])
        exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
        (wrong,) = disagreements(reference(want, exact=exact, shaken=want), (got,))
        assert wrong.text.startswith("is off by 0.25 of its largest value, and the program itself by inf from what it")
        assert disagreements(reference(want, exact=exact, shaken=want), (exact.float(),)) == []
        places = torch.tensor([3, 1])
        unsure = reference(places, exact=torch.tensor([3, 2]), perturbed=places, shaken=places)
        assert [wrong.text for wrong in disagreements(unsure, (torch.tensor([3, 2]),))] == ["has 1 of 2 wrong entries"]

    def test_integers_must_be_equal(self) -> None:
        want = torch.tensor([3, 1])
        found = disagreements(reference(want, exact=want, perturbed=want), (torch.tensor([3, 2]),))
        assert [wrong.text for wrong in found] == ["has 1 of 2 wrong entries"]

    def test_an_argmax_that_rounding_decides_is_no_error(self) -> None:
        want = torch.tensor([3, 1])
        other = torch.tensor([3, 2])
        assert disagreements(reference(want, exact=other, perturbed=want, shaken=other), (other,)) == []
        assert disagreements(reference(want, exact=want, perturbed=other), (other,)) == []

    @pytest.mark.parametrize(
        ("want", "got", "error"),
        [
            ([1.0, 2.0], [1.0, 1.0], 0.5),
            ([-np.inf, 2.0], [-np.inf, 2.0], 0.0),
            ([-np.inf, 2.0], [0.0, 2.0], np.inf),
            ([1.0, 2.0], [np.nan, 2.0], np.inf),
            ([np.nan, 2.0], [np.nan, 2.0], 0.0),
            ([0.0], [0.0], 0.0),
            ([0.0], [1e-9], np.inf),
            ([], [], 0.0),
        ],
    )
    def test_relative_error(self, want: list[float], got: list[float], error: float) -> None:
        assert relative_error(torch.tensor(want), torch.tensor(got)) == error

    def test_another_shape_or_type(self) -> None:
        want = torch.zeros(2, 3)
        (wrong,) = disagreements(reference(want), (torch.zeros(2, 3, dtype=torch.float64),))
        assert wrong.text == "is float64 of shape 2x3, expected float32 of shape 2x3"


class Shifted(nn.Module):
    """Writes to memory that it reads, which torch does in another order in every type."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 2:] = x[:, :-2]
        return x


def test_a_program_that_is_another_in_another_type_is_not_believed(tmp_path_factory: pytest.TempPathFactory) -> None:
    program, path = lowered(capture(Shifted(), torch.randn(2, 64)), tmp_path_factory)
    with pytest.raises(LoweringError, match=r"neither of which rounding explains: .* write to memory that it reads"):
        verify(path, program, None, SETTINGS)


def test_all_that_is_computed_is_shaken() -> None:
    program = capture(nn.Sequential(nn.Embedding(8, 4), nn.LayerNorm(4)), torch.arange(6))
    shaken, wanted = (
        Replay(program, noise=torch.Generator().manual_seed(0), everywhere=everywhere).outputs(program.flat_examples())
        for everywhere in (True, False)
    )
    assert 1e-7 < relative_error(wanted[0], shaken[0]) < 1e-3
    assert torch.equal(wanted[0], program.call_flat(program.flat_examples())[0])


def test_an_exact_run_passes_assertions_of_the_traces_dtypes() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4).half()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.half()).float()

    program = capture(Halved().eval(), torch.randn(2, 4))
    (exact,) = Replay(program, exact=True).outputs(program.flat_examples())
    torch.testing.assert_close(exact.float(), program(*program.flat_examples()), rtol=1e-2, atol=1e-2)


class Normalised(nn.Module):
    """Divides by a norm and what keeps it from 0."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.norm(dim=-1, keepdim=True) + 1e-6)


def test_zeros_are_tried_though_no_sample_is_of_them(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    program, path = lowered(capture(Normalised(), torch.randn(2, 4)), tmp_path_factory)
    verify(path, program, None, SETTINGS)

    def forgotten(model: ir.Model) -> None:
        held = model.graph.initializers.values()
        (value,) = [one for one in held if one.const_value.numpy().dtype == np.float32]
        value.const_value = ir.tensor(np.float32(0), name=value.name)

    with pytest.raises(LoweringError, match="where inputs are zeros, output `output` is NaN or infinite"):
        verify(tampered(path, tmp_path, forgotten), program, None, SETTINGS)


class Positive(nn.Module):
    """Divides by a sum that it asserts to be positive."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.sum().item()
        torch._check(total > 0)
        return x / total


class Doubled(nn.Module):
    """Doubles until it is large, which zeros never are."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.while_loop(lambda x: x.sum() < 10, lambda x: (x * 2,), (x,))[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", [Positive, Doubled])
def test_zeros_are_not_tried_on_what_is_not_for_them(
    model: type[nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> None:
    program, path = lowered(capture(model(), torch.rand(2, 4) + 0.5), tmp_path_factory)
    verify(path, program, (np.full((8, 4), 0.7, np.float32),), SETTINGS)
