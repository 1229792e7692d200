"""Weights stored as few bits: which, how exactly, why others are not, and that the runtime computes the same."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.backends.onnxruntime.description import DESCRIPTION as TARGET
from graphopt.backends.tensorrt.description import DESCRIPTION as TENSORRT
from graphopt.capturing.capture import capture
from graphopt.errors import DataError, UsageError
from graphopt.ir.operators import short_name
from graphopt.ir.program import Program
from graphopt.passes.int8 import Int8
from graphopt.passes.weight_only.plan import WeightsPlan
from graphopt.passes.weights import Weights, WeightsOptions
from graphopt.pipeline.context import Context
from graphopt.pipeline.options import build
from graphopt.targets.description import TargetDescription
from graphopt.testing import TensorSamples, check_pass

ROWS, WIDTH = 700, 64
IDS = torch.randint(0, ROWS, (4, 7), generator=torch.Generator().manual_seed(0))
X = torch.randn(16, 5, WIDTH, generator=torch.Generator().manual_seed(0))


class Calls(nn.Module):
    """A function of the model's layers."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Words(nn.Module):
    """A table that a layer is tied to, and layers in between."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.norm = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, 100), nn.LayerNorm(100)
        self.back = nn.Linear(100, WIDTH)
        self.head = nn.Linear(WIDTH, ROWS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.back(self.norm(self.inner(self.table(ids)).relu())))


@pytest.fixture(scope="module")
def words() -> Program:
    torch.manual_seed(0)
    return capture(Words().eval(), IDS, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


def made(function: Callable[[nn.Module, Tensor], Tensor], x: Tensor = X, **layers: nn.Module | nn.Parameter) -> Program:
    return capture(Calls(function, **layers).eval(), x)


def layer(inputs: int = WIDTH, outputs: int = 32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs)


def plan_of(
    program: Program, data: Tensor | None = None, target: TargetDescription = TARGET, **options: object
) -> WeightsPlan:
    samples = None if data is None else TensorSamples((data,))
    context = Context(program, target=target, samples=samples)
    return Weights(WeightsOptions(**options)).plan(program, context)  # type: ignore[arg-type]


def reasons(plan: WeightsPlan) -> dict[str, str]:
    return {refusal.site: refusal.reason for refusal in plan.refusals}


def test_a_layer_multiplies_what_it_unpacks() -> None:
    program = made(lambda m, x: m.fc(x), fc=layer())
    plan = plan_of(program)
    result = Weights().apply(program, plan)
    assert plan.sites == ("fc.weight",)
    assert [short_name(node) for node in result.graph.nodes if node.op == "call_function"] == [
        "unpack", "unpack", "dequantize", "linear",
    ]  # fmt: skip
    stored = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in result.state_dict().items()}
    assert stored == {
        "fc.bias": ((32,), torch.float32),
        "fc.weight_int4": ((32, 32), torch.uint8),
        "fc.weight_int4_scale": ((32, 2), torch.float32),
        "fc.weight_int4_zero_point": ((32, 1), torch.uint8),
    }
    assert plan.weights["fc.weight"]["bytes"] == [32 * 64 * 4, 32 * 32 + 32 * 2 * 4 + 32]


@pytest.mark.parametrize(
    "product",
    [
        lambda m, x: x @ m.w,
        lambda m, x: torch.mm(x[0], m.w),
        lambda m, x: torch.addmm(m.b, x[0], m.w),
        lambda m, x: x[0, 0] @ m.w,
        lambda m, x: torch.nn.functional.linear(x, m.v, m.b),
    ],
)
def test_products_in_either_layout(product: Callable[[nn.Module, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(WIDTH, 40)
    program = made(
        product, w=nn.Parameter(weight), v=nn.Parameter(weight.t().contiguous()), b=nn.Parameter(torch.randn(40))
    )
    result = Weights().apply(program, plan_of(program))
    assert "linear" in {short_name(node) for node in result.graph.nodes}
    assert not {"w", "v"}.intersection(result.state_dict())
    wanted, found = program(X).detach(), result(X).detach()
    assert found.shape == wanted.shape
    assert float((found - wanted).norm() / wanted.norm()) < 0.1


def test_a_table_and_the_layer_tied_to_it_are_stored_once(words: Program) -> None:
    checked = check_pass(Weights(), words, IDS, target=TARGET)
    plan = checked.plan
    assert isinstance(plan, WeightsPlan)
    assert plan.sites == ("head.weight", "inner.weight", "back.weight")
    assert len(plan.weights["head.weight"]["sites"]) == 2
    integers = [name for name, tensor in checked.after.state_dict().items() if tensor.dtype is torch.uint8]
    assert sum("weight_int4_zero_point" not in name for name in integers) == 3


@pytest.mark.parametrize(
    ("bits", "least"), [(8, 40.0), (4, 18.0), (3, 12.0), (2, 6.0)]
)  # dB; uniform weights have 6 a bit
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"block": 0}, {"method": "rtn"}, {"method": "hqq"}])
def test_each_bit_counts(words: Program, bits: int, least: float, options: dict[str, object]) -> None:
    plan = plan_of(words, bits=bits, tables=False, **options)
    slack = {"symmetric": 3.0, "block": 3.0, "method": 3.0}
    for name, record in plan.weights.items():
        assert record["sqnr"] is not None
        assert record["sqnr"] > least - sum(slack[key] for key in options) - (3.0 if bits == 2 else 0.0), name
        assert record["stored_bits"] == (4 if bits == 3 else bits)


def test_what_the_plan_says_is_what_the_program_computes() -> None:
    program = made(lambda m, x: m.fc(x), torch.eye(100), fc=layer(100))
    for options in ({"bits": 3}, {"bits": 2, "symmetric": True}, {"bits": 8, "block": 64}, {"bits": 4, "block": 0}):
        plan = plan_of(program, **options)
        bias = program.state_dict()["fc.bias"]
        wanted, found = (one(torch.eye(100)) - bias for one in (program, Weights().apply(program, plan)))
        noise = float(((found - wanted).double().square().sum() / wanted.double().square().sum()).detach())
        assert -10 * torch.log10(torch.tensor(noise)) == pytest.approx(plan.weights["fc.weight"]["sqnr"], abs=0.05)


def test_rows_of_zeros_and_denormals_become_zeros() -> None:
    fc = layer()
    with torch.no_grad():
        fc.weight[0], fc.weight[1], fc.weight[2, :32] = 0, 1e-40, 0
    program = made(lambda m, x: m.fc(x), fc=fc)
    for method in ("rtn", "mse", "hqq"):
        for symmetric in (True, False):
            plan = plan_of(program, method=method, symmetric=symmetric)
            result = Weights().apply(program, plan)
            found = result(X) - result.state_dict()["fc.bias"]
            assert bool((found[..., :2] == 0).all())
            assert bool(torch.isfinite(found).all())


def correlated() -> tuple[Program, Tensor]:
    """Layers of one input, whose features are alike and of unequal size."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(64, 12, generator=generator) @ torch.randn(12, WIDTH, generator=generator)
    data = data * torch.logspace(-2, 1, WIDTH)[torch.randperm(WIDTH, generator=generator)]
    return made(lambda m, x: m.a(x) + m.b(x), data[:2], a=layer(), b=layer()), data


@pytest.mark.parametrize(("method", "gain"), [("gptq", 6.0), ("awq", 1.0)])
def test_data_make_products_more_exact(method: str, gain: float) -> None:
    program, data = correlated()
    plain, better = (plan_of(program, data, method=name) for name in ("mse", method))
    wanted = program(data)
    errors = [float((Weights().apply(program, plan)(data) - wanted).detach().norm()) for plan in (plain, better)]
    assert errors[1] < errors[0] / 10 ** (gain / 20)
    assert {record["method"] for record in better.weights.values()} == {method}
    assert all(record["output_sqnr"] is not None for record in better.weights.values())


def test_a_table_is_not_rounded_for_a_product(words: Program) -> None:
    plan = plan_of(words, IDS, method="gptq")
    methods = {name: record["method"] for name, record in plan.weights.items()}
    assert methods == {"head.weight": "mse", "inner.weight": "gptq", "back.weight": "gptq"}
    assert reasons(plan) == {"head.weight": "rounded by mse: its rows are read as they are, too"}


def test_scales_of_inputs_go_into_the_norm_that_makes_them_or_a_multiplication() -> None:
    """With 8 bits next to nothing is rounded: what is scaled is given back."""
    torch.manual_seed(0)
    norm, data = nn.LayerNorm(WIDTH), torch.randn(64, WIDTH)
    with torch.no_grad():
        norm.weight.copy_(torch.logspace(-1, 1, WIDTH))
        norm.bias.copy_(torch.randn(WIDTH))

    def two_layers(m: nn.Module, x: Tensor) -> Tensor:
        x = m.norm(x)
        return m.a(x) + m.b(x)

    def a_layer_and_a_sum(m: nn.Module, x: Tensor) -> Tensor:
        x = m.norm(x)
        return m.a(x) + x.sum(-1, keepdim=True)

    alone, read_elsewhere = (
        made(each, data, norm=copy.deepcopy(norm), a=layer(), b=layer()) for each in (two_layers, a_layer_and_a_sum)
    )
    for program, multiplies in ((alone, False), (read_elsewhere, True)):
        plan = plan_of(program, data, method="awq", bits=8)
        result = Weights().apply(program, plan)
        assert bool(plan.inputs)
        assert any(short_name(node) == "mul" for node in result.graph.nodes) is multiplies
        wanted = program(data)
        assert float((result(data) - wanted).norm() / wanted.norm()) < 0.005


def test_data_are_needed_where_a_method_looks_at_them(words: Program) -> None:
    for method in ("gptq", "awq"):
        with pytest.raises(DataError, match="to see what weights are multiplied with"):
            plan_of(words, method=method)


def test_what_is_stored_as_integers_is_left(words: Program) -> None:
    table = made(lambda m, x: m.table(x), IDS, table=nn.Embedding(4200, WIDTH))
    for program, options in ((words, {}), (table, {"block": 16})):  # scales of 67 KB, which are read like a table
        result = Weights().apply(program, plan_of(program, **options))
        later = Int8().plan(result, Context(result, target=TARGET, samples=TensorSamples((IDS,))))
        assert later.sites == plan_of(result, bits=8, block=16).sites == ()
        assert set(reasons(later).values()) == {"it is quantized already"}  # type: ignore[arg-type]


def half(program_layer: nn.Linear) -> nn.Parameter:
    return nn.Parameter(program_layer.weight.detach().half())


def spoiled() -> nn.Linear:
    fc = layer()
    with torch.no_grad():
        fc.weight[3, 4] = torch.nan
    return fc


REFUSED: dict[str, tuple[Callable[[], Program], dict[str, object], str]] = {
    "computed": (lambda: made(lambda m, x: x @ (m.w * 2).t(), w=layer().weight), {}, "computed from stored tensors"),
    "float16 linear": (
        lambda: made(lambda m, x: torch.nn.functional.linear(x.half(), m.w), w=half(layer())),
        {},
        "it is float16, not float32",
    ),
    "nan": (lambda: made(lambda m, x: m.fc(x), fc=spoiled()), {}, "it holds NaN or infinite values"),
    "read by others": (
        lambda: made(lambda m, x: m.fc(x) + m.fc.weight.sum(), fc=layer()),
        {},
        "`sum_1` reads it too, in floating point",
    ),
    "both ways round": (
        lambda: made(lambda m, x: x @ m.w + torch.nn.functional.linear(x, m.w), w=nn.Parameter(torch.randn(64, 64))),
        {},
        "it is read both ways round",
    ),
    "convolution": (
        lambda: made(lambda m, x: m.conv(x), conv=nn.Conv1d(5, 8, 3)),
        {},
        "no kernel of `conv1d` reads stored integers and computes in floating point",
    ),
    "bag": (
        lambda: made(lambda m, x: m.bag(x), IDS, bag=nn.EmbeddingBag(ROWS, 64)), {}, "no kernel of `embedding_bag`"
    ),
    "skipped": (lambda: made(lambda m, x: m.fc(x), fc=layer()), {"skip": ("fc",)}, "left float as asked (skip=fc)"),
    "block": (
        lambda: made(lambda m, x: m.fc(x), fc=layer()),
        {"block": 24},
        "onnxruntime has products with weights in blocks of 16, 32, 64, 128, 256 or whole rows (block=0), not 24",
    ),
    "too narrow": (lambda: made(lambda m, x: m.fc(x[..., :1]), fc=layer(1)), {}, "it would take "),
    "factors": (
        lambda: made(lambda m, x: torch.addmm(m.b, x[0], m.w, alpha=2), w=nn.Parameter(torch.randn(64, 8)),
                     b=nn.Parameter(torch.randn(8))),
        {},
        "multiplied by a factor",
    ),
    "bias": (
        lambda: made(lambda m, x: torch.addmm(m.b, x[0], m.w), w=nn.Parameter(torch.randn(64, 8)),
                     b=nn.Parameter(torch.randn(5, 8))),
        {},
        "its bias is no plain vector",
    ),
    "small table": (
        lambda: made(lambda m, x: m.table(x), IDS % 9, table=nn.Embedding(9, 64)), {}, "a table of less than 64 KiB"
    ),
    "no tables": (
        lambda: made(lambda m, x: m.table(x), IDS, table=nn.Embedding(ROWS, 64)), {"tables": False}, "(tables=no)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_stays_float_and_why(case: str) -> None:
    build, options, reason = REFUSED[case]
    torch.manual_seed(0)
    plan = plan_of(build(), **options)
    assert plan.sites == ()
    assert any(reason in said for said in reasons(plan).values()), reasons(plan)


def test_what_the_target_lacks_is_said(words: Program) -> None:
    said = reasons(plan_of(words, target=TENSORRT))
    assert said["head.weight"] == "tensorrt reads no stored integers in embedding tables"
    assert said["back.weight"] == "tensorrt takes whole blocks only, and 100 inputs are no multiple of 32"
    assert plan_of(words, target=TENSORRT).weights["inner.weight"]["symmetric"]
    assert "with one zero point only" in reasons(plan_of(words, target=TENSORRT, symmetric=False))["inner.weight"]
    assert "of 4, 8 bits, not 2" in reasons(plan_of(words, target=TENSORRT, bits=2))["inner.weight"]
    assert plan_of(words, target=replace(TARGET, stored=())).sites == ()


def test_a_table_of_outliers_stays_float() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(ROWS, WIDTH)
    with torch.no_grad():
        table.weight[:, ::32] = 300.0
    plan = plan_of(made(lambda m, x: m.table(x), IDS, table=table))
    assert reasons(plan)["table.weight"].endswith("12 are wanted")


def test_a_glob_that_names_nothing_is_refused(words: Program) -> None:
    with pytest.raises(UsageError, match="Did you mean `inner`"):
        plan_of(words, skip=("iner",))


def test_other_bits_are_a_mistake() -> None:
    with pytest.raises(UsageError, match="bits must be 8, 4, 3 or 2"):
        build("weights", WeightsOptions, {"bits": "5"})


@pytest.mark.parametrize("given", [{"damping": "0.1"}, {"method": "awq", "damping": "0.1"}, {"samples": "9"}])
def test_options_that_nothing_reads_are_refused(given: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"reads no `(damping|samples)`; method=gptq"):
        build("weights", WeightsOptions, given)


def test_a_plan_out_of_a_file_whose_names_are_sorted_gives_the_same_graph(words: Program) -> None:
    plan = plan_of(words)
    for names in (sorted(plan.weights), sorted(plan.weights, reverse=True)):
        stored = dataclasses.replace(plan, weights={name: plan.weights[name] for name in names})
        found, wanted = (Weights().apply(words, one).graph_module.code for one in (stored, plan))
        assert found == wanted


def test_the_runtime_computes_the_same_on_its_own_kernels(words: Program, tmp_path: Path) -> None:
    result = Weights().apply(words, plan_of(words))
    backend = OnnxRuntimeBackend()
    artifact = backend.lower(result, tmp_path / "model.onnx")
    assert backend.verify(artifact, graphopt.load(result.save(tmp_path / "model.pt2"))) < 0.02
    assert artifact.facts["quantized"] == artifact.facts["integer"] == 4
    assert backend.check(artifact) == []
    floats = 4 * WIDTH * (ROWS + 200)
    assert artifact.size < 0.3 * floats
