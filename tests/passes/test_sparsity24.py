"""2:4 sparsity: the pattern holds along the inputs, through int8 and lowering; what goes matters least."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.backends.tensorrt import TensorRTBackend, engine
from graphopt.capturing.capture import capture
from graphopt.errors import DataError, PassError, UsageError
from graphopt.ir.program import Program
from graphopt.ir.walker import Walker
from graphopt.passes.layers import input_moments as moments_module
from graphopt.passes.layers.sparse_weights import find_sites
from graphopt.passes.sparsity.selection import fit, sparsify
from graphopt.passes.sparsity24 import Sparsity24, Sparsity24Options, Sparsity24Plan
from graphopt.pipeline.context import Context
from graphopt.pipeline.options import build
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.runner import run
from graphopt.targets.description import SparseFormat, TargetDescription
from graphopt.testing import TensorSamples, check_pass

TENSORRT, ONNXRUNTIME = TensorRTBackend().description, OnnxRuntimeBackend().description
FORM = SparseFormat(2, 4)


class Network(nn.Module):
    """Convolutions (strided, grouped, depthwise), a linear layer and a product, ends included."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2, padding=1)
        self.grouped, self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=2), nn.Conv2d(32, 32, 3, groups=32)
        self.hidden, self.narrow, self.head = nn.Linear(32, 16), nn.Linear(16, 12), nn.Linear(12, 5)
        self.mixing = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.down(F.relu(self.stem(x))))))
        x = self.hidden(F.relu(self.depthwise(x)).mean((2, 3)))
        return self.head(F.relu(self.narrow(F.relu(x @ self.mixing))))


SPARSE = ("down.weight", "grouped.weight", "hidden.weight", "mixing")


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return capture(Network().eval(), torch.randn(2, 3, 16, 16))


@pytest.fixture(scope="module")
def data() -> Tensor:
    """Images whose neighbouring pixels are alike, as in photographs."""
    noise = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return F.interpolate(noise, size=16, mode="bilinear")


def plan_of(
    program: Program,
    data: Tensor | None = None,
    target: TargetDescription | None = TENSORRT,
    **options: object,
) -> Sparsity24Plan:
    samples = TensorSamples((data,)) if data is not None else None
    targets = (target,) if target is not None else ()
    ctx = Context(original=program, samples=samples, target=target, targets=targets)
    return Sparsity24(build("sparsity24", Sparsity24Options, options)).plan(program, ctx)


def reasons(plan: Sparsity24Plan) -> dict[str, str]:
    return {refusal.site: refusal.reason for refusal in plan.refusals}


def output_error(program: Program, plan: Sparsity24Plan, data: Tensor) -> float:
    with torch.no_grad():
        wanted, found = program(data), Sparsity24().apply(program, plan)(data)
    return float((wanted - found).square().mean() / wanted.square().mean())


# The choice


def moments(inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(500, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    return (x.T @ x / 500).double()


def error(weight: Tensor, sparse: Tensor, known: Tensor) -> float:
    difference = weight - sparse
    return float(((difference @ known) * difference).sum())


def test_by_magnitude_the_two_largest_of_four_stay() -> None:
    weight = torch.tensor([[1.2, -0.1, 0.3, -2.0, 0.0, 5.0, -6.0, 7.0]])
    expected = torch.tensor([[1.2, 0, 0, -2.0, 0, 0, -6.0, 7.0]]).double()
    assert torch.equal(sparsify(weight, None, FORM, by_moments=False, refit=False), expected.float().double())


def test_by_moments_the_pair_goes_that_the_outputs_miss_least() -> None:
    known, weight = moments(4), torch.randn(20, 4, generator=torch.Generator().manual_seed(3)).double()
    found = sparsify(weight, known, FORM, by_moments=True, refit=False)
    for row, sparse in zip(weight, found, strict=True):
        every = []
        for i in range(4):
            for j in range(i):
                kept = row.clone()
                kept[[i, j]] = 0
                every.append(error(row[None], kept[None], known))
        assert error(row[None], sparse[None], known) == pytest.approx(min(every))


def test_refitting_reaches_the_least_squares_of_its_mask() -> None:
    known, weight = moments(16), torch.randn(6, 16, generator=torch.Generator().manual_seed(4)).double()
    sparse = sparsify(weight, known, FORM, by_moments=True, refit=True)
    found = fit(weight, sparse, known)
    damped = known + 0.01 * known.diagonal().mean() * torch.eye(16).double()
    best = torch.zeros_like(weight)
    for row in range(6):
        kept = sparse[row].nonzero().flatten()
        best[row, kept] = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight[row])
    torch.testing.assert_close(found, best, atol=1e-6, rtol=1e-6)
    assert torch.equal(found == 0, sparse == 0)


def test_each_step_brings_the_outputs_nearer(program: Program, data: Tensor) -> None:
    errors = [
        output_error(program, plan_of(program, data, criterion=criterion, refit=refit), data)
        for criterion, refit in (("magnitude", False), ("sqnr", False), ("magnitude", True), ("sqnr", True))
    ]
    assert errors[1] < errors[0]
    assert errors[2] < errors[0]
    assert errors[3] < 0.7 * errors[1]


def test_inputs_that_are_never_seen_do_no_harm() -> None:
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))
    for known in (torch.zeros(8, 8), torch.diag(torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 2]))):
        sparse = sparsify(weight, known, FORM, by_moments=True, refit=True)
        found = fit(weight, sparse, known)
        assert bool(torch.isfinite(found).all())
        assert int((found.reshape(-1, 4) != 0).sum(-1).max()) <= 2


# The contract


@pytest.mark.parametrize("options", [{}, {"criterion": "magnitude", "refit": False}, {"nonzeros": 1, "force": True}])
def test_keeps_the_contract(program: Program, data: Tensor, options: dict[str, object]) -> None:
    pass_ = Sparsity24(build("sparsity24", Sparsity24Options, options))
    checked = check_pass(pass_, program, (), data=(data,), target=TENSORRT)
    assert checked.plan.sites == SPARSE
    assert all(entry["zeros"] >= 0.5 for entry in checked.plan.layers.values())  # type: ignore[attr-defined]


def test_the_pattern_runs_along_the_inputs(program: Program, data: Tensor) -> None:
    state = Sparsity24().apply(program, plan_of(program, data)).state_dict()
    for name in SPARSE:
        along = state[name].t() if name == "mixing" else state[name].movedim(1, -1)
        nonzeros = (along.reshape(-1, 4) != 0).sum(-1)
        assert int(nonzeros.max()) == 2
        assert float((along == 0).double().mean()) == 0.5


def test_without_data_by_magnitude(program: Program) -> None:
    plan = plan_of(program)
    assert {entry["criterion"] for entry in plan.layers.values()} == {"magnitude"}
    assert not any(entry["refit"] for entry in plan.layers.values())
    with pytest.raises(DataError, match="criterion=magnitude needs none"):
        plan_of(program, criterion="sqnr")


def test_too_few_samples_are_not_refitted_to(program: Program, data: Tensor) -> None:
    plan = plan_of(program, data[:16])
    assert not plan.layers["mixing"]["refit"]
    assert plan.layers["down.weight"]["refit"]
    assert reasons(plan)["mixing"] == (
        "made sparse, but not refitted: 16 samples (pixels, tokens) for 16 inputs, of 32 needed"
    )
    assert "mixing" not in reasons(plan_of(program, data[:16], refit=False))
    assert "mixing" not in reasons(plan_of(program, data))


def test_what_there_is_no_data_for_is_said(program: Program, data: Tensor) -> None:
    assert reasons(plan_of(program))["the program"] == "chosen by magnitude and not refitted: there is no data"
    assert reasons(plan_of(program, refit=False))["the program"] == "chosen by magnitude: there is no data"
    assert reasons(plan_of(program, criterion="magnitude"))["the program"] == "not refitted: there is no data"
    assert "the program" not in reasons(plan_of(program, criterion="magnitude", refit=False))
    assert "the program" not in reasons(plan_of(program, data))


def test_a_layer_too_wide_for_one_matrix_is_settled_in_blocks(
    program: Program, data: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = plan_of(program, data)
    monkeypatch.setattr(moments_module, "WIDEST", 64)
    monkeypatch.setattr(moments_module, "MEMORY", 2 * 8 * 144 * 50)  # 48 of the 144 inputs of two layers
    plan = plan_of(program, data)
    assert {name: entry["block"] for name, entry in whole.layers.items()} == {
        "down.weight": 144,
        "grouped.weight": 144,
        "hidden.weight": 32,
        "mixing": 16,
    }
    assert plan.layers["down.weight"]["block"] == plan.layers["grouped.weight"]["block"] == 48
    assert plan.sites == SPARSE
    magnitude = output_error(program, plan_of(program, data, criterion="magnitude", refit=False), data)
    assert output_error(program, whole, data) < output_error(program, plan, data) < 0.7 * magnitude


def test_the_program_is_walked_once_where_its_values_take_less_than_the_matrices(
    program: Program, data: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks: list[int] = []

    class Counting(Walker):
        def start(self, batches: Sequence[Sequence[Tensor]]) -> Self:
            walks.append(len(batches))
            return super().start(batches)

    by_batch = plan_of(program, data)
    monkeypatch.setattr(moments_module, "Walker", Counting)
    monkeypatch.setattr(moments_module, "peak_bytes_per_sample", lambda _: 0)
    once = plan_of(program, data)
    assert walks == [len(data) // 32]
    assert once.to_json() == by_batch.to_json()
    for name, tensor in once.tensors.items():
        torch.testing.assert_close(tensor, by_batch.tensors[name])


def test_blocks_are_the_diagonal_of_the_whole() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Conv1d(16, 16, 3, groups=2), nn.Linear(14, 16))
    program = capture(model, torch.randn(2, 16, 16))
    (site,) = [site for site in find_sites(program.graph_module)[0] if site.weight_name == "1.weight"]
    x = torch.randn(4, 16, 16)
    found = []
    for block in (24, 8):
        known = moments_module.InputMoments(block)
        known.update(site.calls[0], x, torch.zeros(4, 16, 14))
        found.append(known.matrices())
    (whole,), parts = found
    assert whole.shape == (2, 24, 24)
    for index, part in enumerate(parts):
        here = slice(8 * index, 8 * index + 8)
        torch.testing.assert_close(part, whole[:, here, here])


def test_a_weight_that_is_not_finite_is_left_dense() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    plan = plan_of(capture(model, torch.randn(2, 16)), torch.randn(64, 16))
    assert plan.sites == ()
    assert "its weight holds NaN or infinite values" in [refusal.reason for refusal in plan.refusals]


def test_a_shared_weight_gets_one_mask_for_all_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.shared(F.relu(self.shared(F.relu(self.first(x)))))))

    program = capture(Twice(), torch.randn(2, 16))
    checked = check_pass(Sparsity24(), program, (), data=(torch.randn(64, 16),), target=TENSORRT)
    assert checked.plan.sites == ("shared.weight",)


# Refused


def test_refusals_name_the_reason(program: Program) -> None:
    found = reasons(plan_of(program, skip="hidden*"))
    assert found["stem.weight"] == "3 inputs are no multiple of 16"
    assert found["depthwise.weight"] == "depthwise: one input channel for each output"
    assert found["narrow.weight"] == "12 outputs are no multiple of 8"
    assert found["hidden.weight"] == "named in skip"


def test_weights_without_elements(tmp_path: Path) -> None:
    program = capture(nn.Sequential(nn.Linear(16, 0), nn.Linear(0, 16), nn.Linear(16, 16)), torch.randn(2, 16))
    plan = plan_of(program, ends=True)
    assert plan.sites == ("2.weight",)
    assert [reasons(plan)[name] for name in ("0.weight", "1.weight")] == ["its weight has no elements"] * 2
    facts = TensorRTBackend().lower(Sparsity24().apply(program, plan), tmp_path / "model.onnx").facts
    assert (facts["sparse_layers"], facts["layers"]) == (1, 1)


def test_the_ends_stay_dense_unless_asked() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Softmax(-1))
    program = capture(model, torch.randn(2, 16))
    assert plan_of(program).sites == ("2.weight",)
    assert "it reads the program's input or makes its output" in reasons(plan_of(program))["4.weight"]
    assert plan_of(program, ends=True).sites == ("0.weight", "2.weight", "4.weight")


def test_weights_that_are_not_the_layers_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.body = nn.Embedding(16, 16), nn.Linear(16, 16)
            self.up = nn.ConvTranspose1d(16, 16, 2, 2)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.body(self.table(ids)).relu()
            return F.linear(self.up(x.transpose(1, 2)).transpose(1, 2).relu(), self.table.weight)

    found = reasons(plan_of(capture(Tied(), torch.randint(16, (2, 4)))))
    assert found["table.weight"] == "weight is shared with `embedding`"
    assert found["up.weight"] == "a transposed convolution has no sparse kernel"


def test_a_target_without_kernels_is_left_dense(program: Program) -> None:
    plan = plan_of(program, target=ONNXRUNTIME)
    assert plan.sites == ()
    assert set(reasons(plan).values()) == {
        "onnxruntime has no kernel for sparse weights (force=yes zeroes them all the same)"
    }
    assert set(plan_of(program, target=ONNXRUNTIME, force=True).sites) > set(SPARSE)  # no alignment to keep to
    assert set(reasons(plan_of(program, nonzeros=1)).values()) == {"tensorrt takes 2:4, not 1:4"}
    with pytest.raises(PassError, match="no target was given"):
        plan_of(program, target=None)


def test_bad_input_says_what_is_possible(program: Program) -> None:
    with pytest.raises(UsageError, match=r"`skip=layer9` matches no weight .* stem\.weight"):
        plan_of(program, skip="layer9")
    with pytest.raises(UsageError, match="nonzeros must be less than group"):
        build("sparsity24", Sparsity24Options, {"nonzeros": "4"})
    with pytest.raises(UsageError, match="`sparsity24` must come after `prune`"):
        Pipeline.parse("sparsity24,prune")
    other = capture(nn.Linear(4, 4), torch.randn(2, 4))
    with pytest.raises(PassError, match="Make the plan again"):
        Sparsity24().apply(other, plan_of(program))


def test_a_weight_that_is_transposed_first_is_named_and_sparse_once_folded(tmp_path: Path) -> None:
    """The other way round: stored (out, in), read as its transpose; in the file (in, out), sparse along the rows."""

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.w, self.last = nn.Linear(16, 32), nn.Parameter(torch.randn(16, 32)), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(F.relu(self.first(x)) @ (2 * self.w).T))

    program = capture(Transposed(), torch.randn(2, 5, 16))
    found = reasons(plan_of(program))
    assert (
        found["matmul"] == "its weight is computed from stored tensors by `numpy_t`: put fold before, which stores it"
    )
    ctx = Context(original=program, targets=(TENSORRT,), samples=TensorSamples((torch.randn(64, 5, 16),)))
    for passes in ("fold,sparsity24", "fold,sparsity24,int8"):
        result = run(Pipeline.parse(passes), program, ctx).programs["tensorrt"]
        artifact = TensorRTBackend().lower(result, tmp_path / "tensorrt.onnx")
        assert artifact.facts["sparse_layers"] == 1
        stored = [tensor.const_value.numpy() for tensor in ir.load(artifact.path).graph.initializers.values()]
        (weight,) = [array for array in stored if array.shape == (32, 16)]
        assert _sparse(weight.T)
        assert weight.dtype == (np.int8 if "int8" in passes else np.float32)


# Onwards


def test_zeros_stay_zeros_in_the_integers_of_the_file(program: Program, data: Tensor, tmp_path: Path) -> None:
    backend = TensorRTBackend()
    ctx = Context(original=program, targets=(TENSORRT,), samples=TensorSamples((data,)))
    result = run(Pipeline.parse("sparsity24,int8"), program, ctx).programs["tensorrt"]
    artifact = backend.lower(result, tmp_path / "tensorrt.onnx")
    assert backend.verify(artifact, result) < 0.1
    sparse = [w for w in _integer_weights(tmp_path / "tensorrt.onnx") if _sparse(w)]
    assert len(sparse) == len(SPARSE)
    assert artifact.facts["sparse_layers"] == len(SPARSE)
    assert artifact.facts["builder_flags"] == ["SPARSE_WEIGHTS"]
    if engine.available():
        assert artifact.facts["sparse_kernels_allowed"] is True
        assert f"{len(SPARSE)} of {artifact.facts['layers']} layers 2:4 sparse" in backend.summary(artifact)


def test_dense_programs_are_built_without_the_flag(program: Program, tmp_path: Path) -> None:
    artifact = TensorRTBackend().lower(program, tmp_path / "tensorrt.onnx")
    assert "builder_flags" not in artifact.facts
    assert "sparse" not in TensorRTBackend().summary(artifact)
    assert not artifact.facts.get("sparse_kernels_allowed")


def _integer_weights(path: Path) -> list[np.ndarray]:
    """Return the int8 weights of a file with their inputs along the last axis."""
    model = ir.load(path)
    found = []
    for node in model.graph:
        if node.op_type != "DequantizeLinear":
            continue
        tensor = ir.convenience.get_const_tensor(node.inputs[0])
        if tensor is None or tensor.numpy().dtype != np.int8 or tensor.numpy().ndim < 2:
            continue
        (user,) = [use.node for use in node.outputs[0].uses()]
        transposed = "transB" in user.attributes and user.attributes["transB"].as_int() == 1
        axis = 1 if user.op_type == "Conv" or transposed else 0
        found.append(np.moveaxis(tensor.numpy(), axis, -1))
    return found


def _sparse(weight: np.ndarray) -> bool:
    return weight.shape[-1] % 4 == 0 and int((weight.reshape(-1, 4) != 0).sum(-1).max()) <= 2
