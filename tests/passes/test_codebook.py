"""Weights as numbers of entries in tables: which, how exactly, why others are not, and what the runtime reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.backends.onnxruntime.description import DESCRIPTION as TARGET
from graphopt.backends.tensorrt.description import DESCRIPTION as TENSORRT
from graphopt.capturing.capture import capture
from graphopt.errors import UsageError
from graphopt.ir.program import Program
from graphopt.passes.codebook import Codebook, CodebookOptions
from graphopt.passes.codes.plan import CodebookPlan, CodesRecord
from graphopt.passes.codes.signs import SIGNS
from graphopt.passes.fold import Fold
from graphopt.passes.int8 import Int8
from graphopt.passes.weights import Weights
from graphopt.pipeline.context import Context
from graphopt.pipeline.options import build
from graphopt.testing import TensorSamples, check_pass

ROWS, WIDTH = 301, 33
IDS = torch.randint(0, ROWS, (2, 9), generator=torch.Generator().manual_seed(0))


class Layers(nn.Module):
    """A layer of every kind, a table and a head tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, WIDTH)
        self.line = nn.Conv1d(WIDTH, 48, 3, padding=1)
        self.turned = nn.ConvTranspose1d(48, 32, 3, padding=1, groups=2)
        self.plane = nn.Conv2d(32, 64, (1, 3), padding=(0, 1), groups=4)
        self.space = nn.Conv3d(64, 40, (1, 1, 3), padding=(0, 0, 1))
        self.linear = nn.Linear(40, 64)
        self.matrix = nn.Parameter(torch.randn(64, WIDTH) / 8)
        self.head = nn.Linear(WIDTH, ROWS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.turned(self.line(self.table(ids).mT))
        x = self.space(self.plane(x.unsqueeze(2)).unsqueeze(2))[:, :, 0, 0].mT
        return self.head(self.linear(x) @ self.matrix)


WEIGHTS = {"line.weight", "turned.weight", "plane.weight", "space.weight", "linear.weight", "matrix", "head.weight"}


@pytest.fixture(scope="module")
def layers() -> Program:
    torch.manual_seed(0)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = capture(Layers().eval(), IDS, dynamic_shapes=(dynamic,))
    return Fold().apply(program, Fold().plan(program, Context(program)))


def plan_of(program: Program, data: Tensor | None = None, **options: object) -> CodebookPlan:
    samples = None if data is None else TensorSamples((data,))
    return Codebook(CodebookOptions(**options)).plan(program, Context(program, samples=samples))  # type: ignore[arg-type]


def coded(program: Program, data: Tensor | None = None, **options: object) -> Program:
    return Codebook().apply(program, plan_of(program, data, **options))


def reasons(plan: CodebookPlan) -> dict[str, str]:
    return {refusal.site: refusal.reason for refusal in plan.refusals}


def layer(inputs: int = 128, outputs: int = 64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs)


def ratio(wanted: Tensor, found: Tensor) -> float:
    """Return decibels."""
    wanted, found = wanted.detach().double(), found.detach().double()
    return float(10 * torch.log10(wanted.square().sum() / (found - wanted).square().sum()))


def unpacked(plan: CodebookPlan, weight: str) -> Tensor:
    """Return (rows, columns) of a stored weight by arithmetic on its bytes."""
    record: CodesRecord = plan.weights[weight]
    stored = {name.rpartition(".")[2]: tensor for name, tensor in plan.tensors.items() if record["name"] in name}
    vectors = -(-record["columns"] // record["vector"])
    codes, place = torch.zeros(record["rows"] * vectors, dtype=torch.int64), 1
    for base in record["parts"]:
        packed = stored[f"codes{base}"].long()
        size = 1 if base == 256 else {2: 8, 3: 5, 4: 4, 16: 2}[base]
        digits = torch.stack([packed // base**index % base for index in range(size)], -1)
        codes += place * digits.flatten(1)[:, : len(codes) // len(packed)].flatten()
        place *= base
    first = torch.arange(record["rows"]) // record["group"] * record["entries"]
    values = stored["table"][codes.reshape(-1, vectors) + first.unsqueeze(1)].flatten(1)[:, : record["columns"]]
    return values * stored["scale"].reshape(-1, 1) if "scale" in stored else values


@pytest.mark.parametrize(
    ("options", "least"),  # dB of weights with a uniform or normal distribution
    [
        ({"bits": 8}, 42.0),
        ({}, 19.0),
        ({"bits": 3, "group": 7}, 14.0),
        ({"bits": 6, "vector": 2}, 15.5),
        ({"bits": 5, "vector": 2, "group": 20}, 12.5),
        ({"codes": "ternary"}, 7.0),
        ({"codes": "binary"}, 4.0),
    ],
    ids=str,
)
def test_layers_of_every_kind(layers: Program, options: dict[str, object], least: float) -> None:
    plan = plan_of(layers, **options)
    assert set(plan.sites) == WEIGHTS, reasons(plan)
    state = dict(layers.state_dict())
    result = Codebook().apply(layers, plan)
    for name, record in plan.weights.items():
        assert record["sqnr"] is not None
        assert record["sqnr"] > least, name
        stored = sum(tensor.nbytes for key, tensor in plan.tensors.items() if key.startswith(f"{record['name']}."))
        assert record["bytes"] == [state[name].nbytes, stored]
    rows = unpacked(plan, "head.weight")
    torch.testing.assert_close(result(IDS), with_weights(plan)(IDS))
    assert ratio(state["head.weight"], rows) == pytest.approx(plan.weights["head.weight"]["sqnr"], abs=1e-3)


def with_weights(plan: CodebookPlan) -> nn.Module:
    """Return the model with what the plan stores, laid out one number at a time."""
    torch.manual_seed(0)
    model = Layers().eval()
    for name in plan.sites:
        weight, rows = model.get_parameter(name).data, unpacked(plan, name)
        if name == "matrix":
            weight.copy_(rows.t())
        elif name == "turned.weight":  # (inputs, outputs of a group, taps), the inputs of both groups in a row
            for i, o in np.ndindex(48, 16):
                weight[i, o] = rows[i // 24 * 16 + o].reshape(24, 3)[i % 24]
        else:
            weight.copy_(rows.reshape(weight.shape))
    return model


def test_the_pass_keeps_its_promises(layers: Program) -> None:
    checked = check_pass(Codebook(CodebookOptions(bits=3)), layers, IDS, data=[IDS.repeat(8, 1)])
    plan = checked.plan
    assert isinstance(plan, CodebookPlan)
    weighted = {name: record["weighted"] for name, record in plan.weights.items()}
    assert weighted == {name: name != "head.weight" for name in plan.sites}
    targets = {node.target.namespace for node in checked.after.graph.nodes if hasattr(node.target, "namespace")}
    assert targets == {"aten"}  # it loads without graphopt


def test_what_targets_make_of_it_is_said() -> None:
    program = capture(layer().eval(), torch.randn(2, 128))
    pass_ = Codebook(CodebookOptions(codes="ternary"))
    assert pass_.plan(program, Context(program, targets=(TARGET, TENSORRT))).notes == (
        "1 weights take 0.002 MB instead of 0.033",
        "onnxruntime looks weights of layers up when it loads the file: it runs as fast as float32, in as much memory",
        "tensorrt looks weights of layers up in every run",
        "ternary codes are experimental: without training they cost much of the accuracy",
    )


def test_what_is_coded_is_left_by_who_comes_later(layers: Program) -> None:
    result = coded(layers)
    folded = Fold().plan(result, Context(result))
    assert folded.sites == ()
    assert set(reasons(folded).values()) == {"it is looked up by bytes, which are stored to be small"}  # type: ignore[arg-type]
    for later in (Codebook(), Weights(), Int8()):
        plan = later.plan(result, Context(result, target=TARGET, samples=TensorSamples((IDS,))))
        assert plan.sites == ()
        assert any("looked up by bytes" in refusal.reason for refusal in plan.refusals), later.name


def test_data_make_products_more_exact() -> None:
    """Where inputs are large, weights are small, as they are behind a norm."""
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-1, 1, 128)[torch.randperm(128, generator=generator)]
    data = torch.randn(256, 128, generator=generator) * size
    fc = layer()
    with torch.no_grad():
        fc.weight.div_(size)
    program = capture(fc.eval(), data[:2])
    for options, gain in (({"bits": 3}, 2.0), ({"bits": 6, "vector": 4}, 2.0), ({"codes": "ternary"}, 1.0)):
        plain, better = (coded(program, each, **options) for each in (None, data))
        assert ratio(program(data), better(data)) > ratio(program(data), plain(data)) + gain, options
    assert not plan_of(program, data, inputs=False).weights["weight"]["weighted"]
    huge = coded(program, data * 1e30, bits=3)
    assert ratio(program(data), huge(data)) > ratio(program(data), coded(program, None, bits=3)(data)) + 2.0


def test_inputs_of_convolutions_count_at_their_taps() -> None:
    """Every second input is next to nothing, and the last of three taps meets zeros alone."""
    torch.manual_seed(0)
    conv = nn.Conv1d(8, 64, 3, stride=3)
    data = torch.randn(64, 8, 30)
    data[:, ::2], data[:, :, 2::3] = data[:, ::2] * 1e-3, 0
    plan = plan_of(capture(conv.eval(), data[:2]), data, bits=4, vector=6)
    change = (unpacked(plan, "weight").reshape(64, 8, 3) - conv.weight.detach()).square().mean(0)  # (inputs, taps)
    assert float(change[1::2, :2].max()) < 0.5 * float(change[::2].min())
    assert float(change[1::2, :2].max()) < 0.5 * float(change[:, 2].min())


def test_rows_of_zeros_and_denormals_become_zeros() -> None:
    fc = layer()
    with torch.no_grad():
        fc.weight[0], fc.weight[1], fc.weight[2] = 0, 1e-40, fc.weight[2] * 1e20
    program = capture(fc.eval(), torch.randn(2, 128))
    for codes in SIGNS.keys() | {"kmeans"}:
        found = unpacked(plan_of(program, codes=codes), "weight")
        assert bool((found[:2] == 0).all())
        assert ratio(fc.weight[2], found[2]) > 3.0
        assert ratio(fc.weight[3:], found[3:]) > 3.0


def test_the_seed_decides_where_clusters_of_vectors_begin() -> None:
    program = capture(layer().eval(), torch.randn(2, 128))
    pass_ = Codebook(CodebookOptions(vector=2))
    tables = [pass_.plan(program, Context(program, seed=seed)).tensors["weight_codebook.table"] for seed in (0, 0, 1)]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


class Calls(nn.Module):
    """A function of the model's layers."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def spoiled() -> nn.Linear:
    fc = layer()
    with torch.no_grad():
        fc.weight[3, 4] = torch.nan
    return fc


def shared(groups: int) -> nn.Conv1d:
    return nn.Conv1d(64, 64, 1, groups=groups, bias=False)


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, object], str]] = {
    "small": (lambda: Calls(lambda m, x: m.fc(x), fc=layer(128, 2)), {}, "bytes instead of 1024"),
    "table as large": (lambda: Calls(lambda m, x: m.fc(x), fc=layer()), {"bits": 8, "vector": 32}, "instead of 32768"),
    "nan": (lambda: Calls(lambda m, x: m.fc(x), fc=spoiled()), {}, "it holds NaN or infinite values"),
    "float64": (lambda: Calls(lambda m, x: m.fc(x.double()), fc=layer().double()), {}, "it is float64, not float32"),
    "empty": (lambda: Calls(lambda m, x: m.fc(x[:, :0]), fc=nn.Linear(0, 8)), {}, "it has no elements"),
    "read by others": (
        lambda: Calls(lambda m, x: m.fc(x) + m.fc.weight.sum(), fc=layer()), {}, "reads it too, in floating point"
    ),
    "in other groups": (
        lambda: Calls(
            lambda m, x: torch.conv1d(x.reshape(-1, 64, 2), m.w) + torch.conv1d(x.reshape(-1, 64, 2), m.w, groups=1)
            + torch.conv1d(x.repeat(1, 2).reshape(-1, 128, 2), m.w, groups=2), w=nn.Parameter(torch.randn(64, 64, 1))
        ),
        {},
        "it is read in other groups, too",
    ),
    "computed": (
        lambda: Calls(lambda m, x: torch.conv1d(x.unsqueeze(1), m.w * x.mean()), w=nn.Parameter(torch.randn(64, 1, 9))),
        {},
        "its weight is computed at run time",
    ),
    "recurrent": (lambda: Calls(lambda m, x: m.r(x.unsqueeze(1))[0], r=nn.LSTM(128, 64)), {}, "are read as they are"),
    "skipped": (lambda: Calls(lambda m, x: m.fc(x), fc=layer()), {"skip": ("fc",)}, "left float as asked (skip=fc)"),
    "no tables": (
        lambda: Calls(lambda m, x: m.t(x.long().abs() % 200), t=nn.Embedding(200, 64)), {"tables": False}, "(tables=no)"
    ),
    "not together": (lambda: Calls(lambda m, x: m.fc(x), fc=layer(128, 4)), {"bits": 1}, "takes tables of 2048"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_stays_as_it_is_and_why(case: str) -> None:
    build_model, options, reason = REFUSED[case]
    torch.manual_seed(0)
    plan = plan_of(capture(build_model().eval(), torch.randn(4, 128)), **options)
    assert plan.sites == ()
    assert any(reason in said for said in reasons(plan).values()), reasons(plan)


@pytest.mark.parametrize("given", [{"bits": "2"}, {"vector": "4"}, {"group": "1"}])
def test_options_that_nothing_reads_are_refused(given: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"codes=binary reads no `\w+`; codes=kmeans does"):
        build("codebook", CodebookOptions, {"codes": "binary", **given})
    with pytest.raises(UsageError, match="inputs=no reads no `samples`"):
        build("codebook", CodebookOptions, {"inputs": "no", "samples": "9"})


def test_a_plan_out_of_a_file_whose_names_are_sorted_gives_the_same_graph(layers: Program) -> None:
    plan = plan_of(layers, bits=3)
    wanted = Codebook().apply(layers, plan).graph_module.code
    for turned in (False, True):
        stored = dataclasses.replace(
            plan,
            weights={name: plan.weights[name] for name in sorted(plan.weights, reverse=turned)},
            tensors={name: plan.tensors[name] for name in sorted(plan.tensors, reverse=turned)},
        )
        assert Codebook().apply(layers, stored).graph_module.code == wanted


@pytest.mark.parametrize("options", [{}, {"bits": 3, "vector": 2, "group": 30}], ids=str)
def test_the_file_holds_the_bytes_and_the_runtime_reads_them(
    layers: Program, options: dict[str, object], tmp_path: Path
) -> None:
    plan = plan_of(layers, **options)
    program = graphopt.load(Codebook().apply(layers, plan).save(tmp_path / "model.pt2"))
    backend = OnnxRuntimeBackend(simplify=bool(options))
    artifact = backend.lower(program, tmp_path / "model.onnx")
    content, held = artifact.path.read_bytes(), onnx.load(artifact.path).graph.initializer
    for name, tensor in plan.tensors.items():
        assert tensor.numpy().tobytes() in content, name
    largest_float = max(np.prod(one.dims) for one in held if one.data_type == onnx.TensorProto.FLOAT)
    assert largest_float <= max(ROWS, *(len(t) * t.shape[1] for n, t in plan.tensors.items() if n.endswith("table")))
    assert backend.verify(artifact, program) < 1e-5
    for shape in ((1, 1), (3, 20)):
        ids = torch.arange(shape[0] * shape[1]).reshape(shape)
        found = torch.from_numpy(artifact.session()(ids.numpy())[0])
        torch.testing.assert_close(found, program(ids).detach(), rtol=1e-4, atol=1e-5)
