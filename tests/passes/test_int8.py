"""int8: what it makes of a graph, what it leaves alone and why, and that the runtimes fuse the result."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from graphopt.backends.tensorrt.description import DESCRIPTION as TENSORRT
from graphopt.capturing.capture import capture
from graphopt.errors import DataError, PassError, UsageError
from graphopt.ir.operators import short_name
from graphopt.ir.program import Program
from graphopt.measure.equivalence import measure
from graphopt.passes.int8 import Int8, Int8Options
from graphopt.pipeline.context import Context
from graphopt.pipeline.options import build
from graphopt.pipeline.pipeline import Pipeline
from graphopt.targets.description import TargetDescription
from graphopt.testing import TensorSamples, assert_same_program, check_pass
from tests.models import OptionA, Residual
from tests.passes.int8_models import (
    EDGES,
    IDS,
    WITHOUT_COSTS,
    ConstantOperand,
    Gate,
    Head,
    Pools,
    SharedWeight,
    Shuffle,
    Signal,
    Tokens,
    TwoConvs,
    TwoReaders,
    edge,
    folded,
    images,
    kernels,
    noise,
    operators,
    quantized,
    reasons,
    seeded,
)

OPS = torch.ops.graphopt


# Given and expected


class Constants(nn.Module):
    """Scales and integers of a plan, under the names the pass gives them."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        for name, tensor in program.state_dict().items():
            trained = name.endswith(".bias") and tensor.is_floating_point()
            setattr(self, name.replace(".", "_"), nn.Parameter(tensor) if trained else nn.Buffer(tensor))

    def pair(self, x: Tensor, name: str) -> Tensor:
        return self.read(self.store(x, name), name)

    def store(self, x: Tensor, name: str) -> Tensor:
        return OPS.quantize(x, self.get(f"int8_{name}_scale"), self.get(f"int8_{name}_zero_point"), None, 0, 255)

    def read(self, q: Tensor, name: str) -> Tensor:
        return OPS.dequantize(q, self.get(f"int8_{name}_scale"), self.get(f"int8_{name}_zero_point"), None)

    def weight(self, name: str, axis: int = 0) -> Tensor:
        return OPS.dequantize(self.get(name), self.get(f"{name}_scale"), self.get(f"{name}_zero_point"), axis)

    def get(self, name: str) -> Tensor:
        tensor: Tensor = getattr(self, name)
        return tensor


def test_residual_block() -> None:
    """Conv -> relu -> conv -> add: relu goes, every value of the chain is stored once, the output is dequantized."""
    given, _ = quantized(TwoConvs(), images())

    class Expected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = Constants(given)

        def forward(self, x: Tensor) -> Tensor:
            c = self.c
            x = F.conv2d(c.pair(x, "x"), c.weight("a_weight_int8"), c.get("int8_conv2d_bias"))
            x = c.pair(x, "relu")
            y = F.conv2d(x, c.weight("b_weight_int8"), c.get("int8_conv2d_1_bias"), padding=1)
            return c.pair(c.pair(y, "conv2d_1") + x, "add")

    assert_same_program(given, capture(Expected(), (images(count=2),)))


def test_pooled_head() -> None:
    """The mean becomes a pooling, flatten runs on integers, the logits stay float and the bias is int32."""
    given, _ = quantized(Head(), images())

    class Expected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = Constants(given)

        def forward(self, x: Tensor) -> Tensor:
            c = self.c
            x = F.conv2d(c.pair(x, "x"), c.weight("conv_weight_int8"), c.get("int8_conv2d_bias"))
            x = F.adaptive_avg_pool2d(c.pair(x, "conv2d"), [1, 1])
            x = c.read(c.store(x, "adaptive_avg_pool2d_default").flatten(1), "adaptive_avg_pool2d_default")
            return F.linear(x, c.weight("linear_weight_int8"), c.weight("int8_linear_bias"))

    assert_same_program(given, capture(Expected(), (images(count=2),)))
    assert given.state_dict()["int8_linear.bias"].dtype is torch.int32


def test_symmetric_target() -> None:
    """For TensorRT: signed, zero point 0, nothing between convolution and add, relu stays in front of quantize."""
    given, plan = quantized(TwoConvs(), images(), target=TENSORRT)
    assert {record["zero_point"] for record in plan.values} == {0}
    assert plan.dropped == ()
    add = next(node for node in given.graph.nodes if short_name(node) == "add")
    assert [short_name(operand) for operand in add.all_input_nodes] == ["conv2d", "dequantize"]
    assert operators(given)["relu"] == 1


# Refusals


def test_says_what_has_no_integer_kernel() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.up = nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 3, 2, stride=2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.conv(x)
            return self.up(F.mish(x)), F.adaptive_max_pool2d(x, 1)  # which gives places, too

    _, plan = quantized(Up(), images())
    assert reasons(plan) == {
        "adaptive_max_pool2d": "`adaptive_max_pool2d` has no integer kernel on onnxruntime",
        "mish": "`mish` has no integer kernel on onnxruntime",
        "conv_transpose2d": "`conv_transpose2d` has no integer kernel on onnxruntime",
    }


def test_leaves_computed_weights() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maker = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.maker(x))

    _, plan = quantized(Computed(), noise(8, 8))
    assert reasons(plan) == {"linear_1": "its weight is computed at run time by `linear`"}


@pytest.mark.parametrize(
    ("transposed", "target", "kernel"), [(False, WITHOUT_COSTS, "conv2d"), (True, TENSORRT, "conv_transpose2d")]
)
def test_a_convolution_is_one_whatever_operator_calls_it(
    transposed: bool, target: TargetDescription, kernel: str, tmp_path: Path
) -> None:
    class Spelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(6, 6, 3, 3)), nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            rest = ([1, 1], [1, 1], [1, 1], transposed, [0, 0], 1)
            return torch.ops.aten.convolution.default(x, self.weight, self.bias, *rest)

    program, plan = quantized(Spelled(), images(6), target=target)
    assert [layer["kernel"] for layer in plan.layers] == [kernel]
    if not transposed:
        assert kernels(program, tmp_path, images(6))["QLinearConv"] == 1


def test_leaves_what_is_skipped() -> None:
    _, plan = quantized(Head(), images(), options=Int8Options(skip=("lin*",)))
    assert reasons(plan)["linear"] == "left float as asked (skip=lin*)"
    assert "linear" not in plan.sites


def test_leaves_what_is_written_in_place() -> None:
    class Written(nn.Module):
        """A view is taken first, so that the write cannot be made functional."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z = y.view(-1, 4 * 64)
            y[:, 0] += 1.0
            return z + self.conv(x).flatten(1)

    model = Written()
    program, plan = quantized(model, images())
    assert reasons(plan)["conv2d"] == "`conv2d` shares memory with what `add_` writes in place"
    assert plan.sites == ("conv2d_1", "flatten")
    assert measure(folded(model, images()), program.call_flat, (images(),)).sqnr > 30


def test_leaves_other_dtypes() -> None:
    _, plan = quantized(seeded(nn.Linear(8, 4)).double(), noise(8, 8).double())
    assert reasons(plan)["linear"].endswith("` is float64, not float32")


@pytest.mark.parametrize("target", [WITHOUT_COSTS, TENSORRT], ids=["onnxruntime", "tensorrt"])
def test_leaves_what_has_no_elements(target: TargetDescription) -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 0), nn.Linear(0, 4, bias=False), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([F.relu(self.b(F.relu(self.a(x)))), self.a(x)], 1))

    program, plan = quantized(capture(Empty().eval(), (noise(2, 4),)), noise(8, 4), target=target)
    assert plan.sites == ("linear_3",)
    assert {name: reason for name, reason in reasons(plan).items() if name.startswith("linear")} == {
        "linear": "`linear` has no elements",
        "linear_1": "`relu` has no elements",
        "linear_2": "`linear_2` has no elements",
    }
    assert program(noise(2, 4)).shape == (2, 4)


def test_leaves_a_join_that_floats_read() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.conv(x) + torch.tanh(x))

    _, plan = quantized(Mixed(), images())
    assert reasons(plan)["add"] == "some of its operands are float, and float operators read its result"


def test_quantizes_once() -> None:
    program, _ = quantized(Head(), images())
    _, plan = quantized(program, images())
    assert plan.sites == ()
    assert reasons(plan)["conv2d"] == "it is quantized already"


@pytest.mark.parametrize("name", ["percentile", "samples", "observer"])
def test_options_are_checked(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        build("int8", Int8Options, {name: "0"})


def test_asks_for_data_and_target() -> None:
    program = folded(Head(), images())
    with pytest.raises(DataError, match="--data"):
        Int8().plan(program, Context(original=program, target=WITHOUT_COSTS))
    with pytest.raises(PassError, match="--target"):
        Int8().plan(program, Context(original=program, samples=TensorSamples((images(),))))


def test_needs_fold() -> None:
    assert [step.name for step in Pipeline.parse("int8").steps] == ["fold", "int8"]


# At the edges


@pytest.mark.parametrize(("model", "data", "wanted"), EDGES, ids=[model.__name__ for model, _, _ in EDGES])
def test_reaches_integer_kernels(model: type[nn.Module], data: Tensor, wanted: dict[str, int], tmp_path: Path) -> None:
    program, _ = quantized(edge(model), data)
    found = kernels(program, tmp_path, data)
    assert {name: found[name] for name in wanted} == wanted, dict(found)


CONTRACTS = [
    (kind, data, WITHOUT_COSTS) for kind, data, _ in EDGES if kind not in (Head, Signal, Residual, SharedWeight)
]
CONTRACTS += [(kind, data, TENSORRT) for kind, data, _ in EDGES if kind in (TwoReaders, Pools, Tokens)]


@pytest.mark.parametrize(("model", "data", "target"), CONTRACTS, ids=lambda value: getattr(value, "__name__", ""))
def test_keeps_the_contract(model: type[nn.Module], data: Tensor, target: TargetDescription) -> None:
    program = edge(model)
    checked = check_pass(Int8(), program, data[:2], data=(data,), target=target)
    found = measure(program, checked.after.call_flat, (data,))
    assert found.sqnr > 20  # 8 bits over a range of a few sigma: about 30 dB a layer, a few layers deep


def test_two_readers_see_the_same_numbers() -> None:
    """Whoever reads the result of an integer kernel reads what was stored, the program's outputs included."""
    program, _ = quantized(TwoReaders(), images())
    y, _, z = program(images())
    torch.testing.assert_close(torch.tanh(y), z, rtol=0, atol=0)


def test_shared_weight_is_stored_once() -> None:
    program, plan = quantized(SharedWeight(), images(4))
    assert len({layer["weight"] for layer in plan.layers}) == 1
    stored = [tensor for tensor in program.state_dict().values() if tensor.dtype is torch.int8 and tensor.dim() > 1]
    assert len(stored) == 1


def test_a_shared_weight_leaves_room_for_every_bias() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model, data = seeded(Tied()), noise(16, 6)
    with torch.no_grad():
        model.get_parameter("second.bias").fill_(1e7)
    program, plan = quantized(capture(model, data), data)
    assert [layer["bias_dtype"] for layer in plan.layers] == ["int32", "int32"]
    with torch.no_grad():
        torch.testing.assert_close(program(data), model(data), rtol=1e-5, atol=0)


def test_weight_that_floats_read_too_stays() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embed(ids)))

    program, plan = quantized(Tied(), IDS)
    assert plan.sites == ("linear",)
    assert {tensor.dtype for tensor in program.state_dict().values()} == {torch.float32, torch.int8, torch.uint8}


def test_conditional_regions_are_left_alone(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y - 1, (y,))

    program, plan = quantized(Branches(), images())
    assert plan.sites == ("conv2d",)
    found = kernels(program, tmp_path, images())
    assert found["QLinearConv"] == 1


def test_fixed_batch(tmp_path: Path) -> None:
    """A program that takes one batch size: the incomplete last batch is left out, 3-D products still reach integers."""
    model = seeded(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))
    program = capture(model, (noise(2, 3, 8),), dynamic_shapes={"input": {0: None}})
    program, _ = quantized(program, noise(5, 3, 8))
    found = kernels(program, tmp_path, noise(2, 3, 8))
    assert found["QGemm"] + found["MatMulIntegerToFloat"] == 2, dict(found)


def test_silent_channels_and_zero_inputs(tmp_path: Path) -> None:
    """Ranges that are empty, of weights and of activations, still give positive finite scales."""
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    model[0].weight.data[1] = 0
    program, plan = quantized(capture(model, (images(count=2),)), torch.zeros(4, 3, 8, 8))
    scales = [tensor for name, tensor in plan.tensors.items() if name.endswith("_scale")]
    assert all(bool((scale > 0).all()) for scale in scales)
    assert all(record["scale"] > 0 for record in plan.values)
    assert bool(torch.isfinite(program(images())).all())


# Meaning


def test_stores_integers() -> None:
    """The weights of the program itself are int8: no float copy is left."""
    program, _ = quantized(TwoConvs(), images())
    floats = [name for name, t in program.state_dict().items() if t.is_floating_point() and t.dim() > 1]
    assert floats == []


def test_clamps_that_the_range_repeats_are_exact() -> None:
    """Leaving out relu6 changes no bit, since the largest integer stands for at most 6."""

    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu6(self.a(x) * 8))

    program, plan = quantized(Clipped(), images() * 4)
    assert plan.dropped == ("relu6",)
    record = next(record for record in plan.values if record["value"] == "relu6")
    assert record["zero_point"] == 0
    assert record["scale"] * 255 <= 6.0
    assert operators(program)["relu6"] == 0


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(64, 32), (64,)), (nn.ConvTranspose2d(32, 24, 1, groups=4), (32, 2, 2))],
    ids=["linear", "grouped transposed convolution"],
)
def test_bias_correction_keeps_the_mean(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Without it the mean of a layer's output moves by the rounding of its weights; with it, much less."""
    seeded(layer)
    data = noise(256, *shape) + 3.0
    errors = {}
    for corrected in (False, True):
        options = Int8Options(bias_correction=corrected, observer="minmax")
        program, _ = quantized(layer, data, options=options, target=TENSORRT)
        with torch.no_grad():
            change = program(data) - layer(data)
        errors[corrected] = float(change.transpose(0, 1).flatten(1).mean(1).abs().mean())
    assert errors[True] < 0.5 * errors[False]


@pytest.mark.parametrize("observer", ["minmax", "average", "percentile", "mse", "entropy"])
def test_observers(observer: str) -> None:
    options = build("int8", Int8Options, {"observer": observer})
    program, plan = quantized(TwoConvs(), images(), options=options)
    reference = folded(TwoConvs(), images())
    assert {record["observer"] for record in plan.values} == {observer}
    assert measure(reference, program.call_flat, (images(),)).sqnr > 25


def test_observers_by_kind_of_operator() -> None:
    """What products alone read keeps all its values; what a convolution reads, or both, has the least error."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.shared, self.last = nn.Conv1d(4, 8, 1), nn.Conv1d(8, 5, 1), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = torch.tanh(self.conv(x))
            return self.shared(y), self.last(y), self.last(torch.tanh(y))

    _, plan = quantized(Both(), noise(16, 4, 6))
    seen = {record["value"]: record["observer"] for record in plan.values if record["form"] == "quantize"}
    assert seen == {"x": "mse", "conv1d": "mse", "tanh": "mse", "conv1d_1": "mse", "tanh_1": "minmax"}


def test_one_scale_per_weight() -> None:
    _, plan = quantized(TwoConvs(), images(), options=Int8Options(weights="tensor"))
    assert {layer["axis"] for layer in plan.layers} == {None}


def test_batch_size_does_not_matter() -> None:
    _, one = quantized(edge(Head), images(), options=build("int8", Int8Options, {"batch_size": 1}))
    _, other = quantized(edge(Head), images(), options=build("int8", Int8Options, {}))
    for left, right in zip(one.values, other.values, strict=True):
        assert left["scale"] == pytest.approx(right["scale"], rel=1e-5)  # convolutions sum in another order
        assert left["zero_point"] == right["zero_point"]


def test_biases_are_corrected_by_data_alone() -> None:
    program, options = folded(nn.Linear(8, 4), noise(2, 8)), Int8Options(mode="dynamic", bias_correction=True)
    with pytest.raises(DataError, match="bias_correction=yes"):
        Int8(options).plan(program, Context(program, target=WITHOUT_COSTS))


def test_an_operator_of_another_library_is_not_the_one_of_its_name() -> None:
    with torch.library._scoped_library("another", "FRAGMENT") as library:
        library.define("silu(Tensor x) -> Tensor")
        library.impl("silu", lambda x: x * 3, "CompositeExplicitAutograd")
        library.impl("silu", lambda x: torch.empty_like(x), "Meta")

        class Own(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 8, 3)

            def forward(self, x: Tensor) -> Tensor:
                return torch.ops.another.silu(self.conv(x))  # type: ignore[no-any-return]

        program, _ = quantized(Own(), images())
        assert "another.silu" in program.graph_module.code
        assert not [node for node in program.graph.nodes if "sigmoid" in str(node.target)]


def test_training_data_is_not_needed_twice() -> None:
    """Two targets share one calibration: values both ask about are observed once."""
    program = folded(TwoConvs(), images())
    runs = []

    class Counting(TensorSamples):
        def batches(self, batch_size: int, limit: int | None = None):  # type: ignore[no-untyped-def]
            runs.append(batch_size)
            return super().batches(batch_size, limit)

    shared = Context(original=program, target=WITHOUT_COSTS, samples=Counting((images(),)))
    Int8().plan(program, shared)
    first = len(runs)
    shared.target = TENSORRT
    Int8().plan(program, shared)
    assert first == len(runs)


# For TensorRT

TENSORRT_EDGES = [TwoReaders, ConstantOperand, Gate, Shuffle, Tokens, OptionA]


@pytest.mark.parametrize("model", TENSORRT_EDGES, ids=lambda model: model.__name__)
def test_tensorrt_takes_it(model: type[nn.Module], tmp_path: Path) -> None:
    from graphopt.backends.tensorrt import TensorRTBackend

    data = next(data for kind, data, _ in EDGES if kind is model)
    program, _ = quantized(edge(model), data, target=TENSORRT)
    artifact = TensorRTBackend().lower(program, tmp_path / "model.onnx")  # parsed and built where it is installed
    assert [finding.text for finding in TensorRTBackend().check(artifact)] == []
    zero_points = {
        int(value)
        for tensor in onnx.load(artifact.path).graph.initializer
        if "zero" in tensor.name
        for value in onnx.numpy_helper.to_array(tensor).reshape(-1)
    }
    assert zero_points <= {0}


def test_values_called_like_methods_of_modules() -> None:
    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x.float())
            return y

    data = torch.randint(0, 255, (16, 8), dtype=torch.uint8)
    program, plan = quantized(Bytes(), data)
    (value,) = plan.values
    assert hasattr(nn.Module, value["value"])
    assert f"int8_{value['value']}.scale" in program.state_dict()


@pytest.mark.parametrize(
    "given",
    [
        {"percentile": "99"},
        {"percentile": "99", "observer": "mse"},
        {"mode": "dynamic", "observer": "mse"},
        {"weights": "float", "weight_bits": "4"},
        {"weights": "float", "mode": "dynamic"},
        {"weights": "float", "bias_correction": "yes"},
    ],
)
def test_options_that_nothing_reads_are_refused(given: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"reads no `percentile`|no `observer` either|rounds activations alone"):
        build("int8", Int8Options, given)


@pytest.mark.parametrize("target", [WITHOUT_COSTS, TENSORRT], ids=lambda target: target.name)
def test_activations_alone_are_rounded(target: TargetDescription) -> None:
    """Where they are with weights, too, by the same scales; weights and biases stay as they are."""
    program, data = folded(Residual(), images()), images()
    given, plan = quantized(program, data, target=target, options=Int8Options(weights="float"))
    _, whole = quantized(program, data, target=target)
    assert plan.values == whole.values
    assert (plan.layers, plan.tables, plan.dropped) == ((), (), whole.dropped)
    assert "slower than float32" in plan.notes[0]
    kept = given.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in program.state_dict().items())
    assert 25 < measure(program, given.call_flat, (data,)).sqnr < 60


def test_a_layer_that_takes_no_static_scales_rounds_no_activations() -> None:
    model = nn.LSTM(4, 8, batch_first=True)
    _, plan = quantized(model, noise(8, 5, 4), options=Int8Options(weights="float"))
    assert list(reasons(plan).values()) == ["no kernel of onnxruntime takes it with static scales"]


def test_weights_that_stay_float_stay_so_in_the_runtime(tmp_path: Path) -> None:
    data = images()
    given, _ = quantized(TwoConvs(), data, options=Int8Options(weights="float"))
    ran = kernels(given, tmp_path, data)
    assert ran["QLinearConv"] == 0
    assert ran["Conv"] + ran["FusedConv"] == 2
