"""Given / expected for each rewrite of an exported model, in ONNX text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from graphopt.backends.onnx_execution.session import OnnxSession, SessionSettings
from graphopt.backends.onnx_lowering.channel_rows import ChannelRowsPass
from graphopt.backends.onnx_lowering.duplicates import DuplicateInitializersPass
from graphopt.backends.onnx_lowering.global_pooling import GlobalPoolingPass
from graphopt.backends.onnx_lowering.integer_relu import IntegerReluPass
from graphopt.backends.onnx_lowering.own_weights import OwnWeightsPass
from graphopt.backends.onnx_lowering.own_zero_points import OwnZeroPointsPass
from graphopt.backends.onnx_lowering.saturation import SaturatedClampPass
from graphopt.backends.onnx_lowering.signature import apply_signature
from graphopt.backends.onnx_lowering.stored_weights import StoredWeightsPass
from graphopt.backends.onnx_lowering.values import values_of
from graphopt.backends.onnxruntime.breakers import keep_apart
from graphopt.backends.onnxruntime.grouped_half import widen_grouped_convolutions
from graphopt.backends.onnxruntime.prelu import take_prelu_apart
from graphopt.ir.signature import TensorSpec

HEADER = '<ir_version: 10, opset_import: ["" : 20]>'


def model(text: str, **initializers: np.ndarray) -> ir.Model:
    built = ir.from_onnx_text(f"{HEADER}\n{text}")
    for name, array in initializers.items():
        value = next((v for n in built.graph for v in n.inputs if v is not None and v.name == name), None)
        assert value is not None, name
        value.const_value = ir.tensor(array, name=name)
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
        if name not in built.graph.initializers:
            built.graph.register_initializer(value)
    return built


def operators(built: ir.Model) -> list[str]:
    return [node.op_type for node in built.graph]


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize(
    ("above", "expected"),
    [(0, ["DequantizeLinear", "DequantizeLinear", "Add"]), (1, ["DequantizeLinear", "LeakyRelu"])],
)
def test_relu_between_integers(kind: type[np.integer], above: int, expected: list[str]) -> None:
    """Where the quantization saturates at 0, nothing is left of it but to go from integers to integers."""
    low, name = np.iinfo(kind).min, np.dtype(kind).name
    built = model(
        f"g ({name}[8] x) => ({name}[8] y) {{ a = DequantizeLinear(x, s, z)"
        "b = Relu(a)  y = QuantizeLinear(b, t, w) }",
        s=np.float32(0.5), z=kind(low + 100), t=np.float32(0.25), w=kind(low + above),
    )  # fmt: skip
    given = (np.array([0, 99, 100, 101, 103, 150, 250, 255]) + low).astype(kind)
    settings = SessionSettings(optimization="disabled")
    wanted = OnnxSession(ir.to_proto(built).SerializeToString(), settings)(given)[0]
    assert IntegerReluPass()(built).modified
    assert operators(built) == [*expected, "QuantizeLinear"]
    reads = [node.inputs[2] for node in built.graph if node.op_type == "DequantizeLinear"]
    assert {value.dtype for value in reads} == {ir.DataType.from_numpy(np.dtype(kind))}
    for level in ("disabled", "all"):
        found = OnnxSession(ir.to_proto(built).SerializeToString(), SessionSettings(optimization=level))(given)[0]
        assert (found == wanted).all()


def test_relu_between_integers_without_kernels_is_left_alone() -> None:
    text = "g (int32[8] x) => (uint8[8] y) { a = DequantizeLinear(x, s)  b = Relu(a)  y = QuantizeLinear(b, t, w) }"
    built = model(text, s=np.float32(0.5), t=np.float32(0.25), w=np.uint8(0))
    assert not IntegerReluPass()(built).modified
    wide = text.replace("int32", "int16").replace("(x, s)", "(x, s, z)")
    assert not IntegerReluPass()(
        model(wide, s=np.float32(0.5), z=np.int16(3), t=np.float32(0.25), w=np.uint8(0))
    ).modified


class TestPRelu:
    @pytest.mark.parametrize(
        ("slopes", "wanted"),
        [
            (np.array([[0.25]], np.float32), ["LeakyRelu"]),
            (np.array([[0.25], [-0.5], [2], [0]], np.float32), ["Relu", "Mul", "Relu", "Mul", "Add"]),
            (np.array([[0.25], [-0.5], [2], [0]], np.float64), ["Relu", "Mul", "Relu", "Mul", "Add"]),
        ],
    )
    def test_is_the_same_number_in_every_digit(self, slopes: np.ndarray, wanted: list[str]) -> None:
        kind = "float" if slopes.dtype == np.float32 else "double"
        built = model(f"g ({kind}[n,4,9] x) => ({kind}[n,4,9] y) {{ y = PRelu(x, a) }}", a=slopes)
        x = np.random.default_rng(0).standard_normal((2, 4, 9)).astype(slopes.dtype)
        x[:, :, :4] = np.nan, np.inf, -np.inf, 0.0
        take_prelu_apart(built)
        assert sorted(operators(built)) == sorted(wanted)
        (found,) = OnnxSession(ir.to_proto(built).SerializeToString(), SessionSettings(threads=1))(x)
        wanted_numbers = torch.prelu(torch.from_numpy(x), torch.from_numpy(slopes.reshape(-1)))
        np.testing.assert_array_equal(found, wanted_numbers.numpy())

    def test_computed_slopes_are_left(self) -> None:
        built = model("g (float[n,4,9] x, float[4,1] a) => (float[n,4,9] y) { y = PRelu(x, a) }")
        take_prelu_apart(built)
        assert operators(built) == ["PRelu"]


class TestPoolsOfFloats:
    HEAD = "g (float[n,4,8,8] x) => (float[n,4,4,4] y) {"
    TAIL = "q = QuantizeLinear(p, s, z) y = DequantizeLinear(q, s, z) }"

    def _built(self, text: str) -> ir.Model:
        return model(f"{self.HEAD} {text} {self.TAIL}", s=np.float32(0.1), z=np.uint8(0))

    def test_are_not_quantized_before(self, tmp_path: Path) -> None:
        built = self._built("p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)")
        keep_apart(built)
        assert operators(built) == ["MaxPool", "Max", "QuantizeLinear", "DequantizeLinear"]
        target = tmp_path / "optimized.onnx"
        OnnxSession(ir.to_proto(built).SerializeToString(), SessionSettings(threads=1), optimized=target)
        run = [node.op_type for node in onnx.load(target).graph.node]
        assert run.index("MaxPool") < run.index("QuantizeLinear")

    def test_of_integers_are_left(self) -> None:
        pool = "MaxPool<kernel_shape = [2, 2], strides = [2, 2]>"
        built = self._built(f"i = QuantizeLinear(x, s, z) d = DequantizeLinear(i, s, z) r = Relu(d) p = {pool}(r)")
        before = operators(built)
        keep_apart(built)
        assert operators(built) == before


@pytest.mark.parametrize("before", ["Neg", "Relu"])
def test_zeros_around_a_pooling_may_be_the_largest(before: str) -> None:
    body = f"a = {before}(x) b = Pad(a, p) y = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(b)"
    built = model(f"g (float[n,1,4,4] x) => (float[n,1,3,3] y) {{ {body} }}", p=np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    keep_apart(built)
    assert operators(built) == [before, "Pad", *(["Max"] if before == "Neg" else []), "MaxPool"]
    session = OnnxSession(ir.to_proto(built).SerializeToString(), SessionSettings(threads=1))
    corner = session(np.ones((1, 1, 4, 4), np.float32))[0][0, 0, 0, 0]
    assert corner == (0 if before == "Neg" else 1)


@pytest.mark.parametrize("pool", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize(("around", "own"), [(2, 0), (1, 1)])
def test_no_pooling_takes_in_as_much_as_its_kernel(pool: str, around: int, own: int) -> None:
    """The file would not load."""
    body = f"a = Relu(x) b = Pad(a, p) y = {pool}<kernel_shape = [2, 2], strides = [2, 2], pads = {[own] * 4}>(b)"
    sides = np.array([0, 0, around, around, 0, 0, around, around])
    built = model(f"g (float[n,1,4,4] x) => (float[n,1,4,4] y) {{ {body} }}", p=sides)
    keep_apart(built)
    assert operators(built) == ["Relu", "Pad", "Max", pool]
    OnnxSession(ir.to_proto(built).SerializeToString(), SessionSettings(threads=1))(np.ones((1, 1, 4, 4), np.float32))


class TestProductsOfTurnedHalves:
    def _built(self, perm: str, kind: str = "float16") -> ir.Model:
        body = f"t = Transpose<perm = {perm}>(x) y = MatMul(t, w)"
        weight = np.linspace(-1, 1, 40, dtype=kind).reshape(8, 5)
        return model(f"g ({kind}[a,b,8] x) => ({kind}[c,d,5] y) {{ {body} }}", w=weight)

    def test_are_kept_apart(self) -> None:
        """Without the copy the process ends while it loads the file."""
        built = self._built("[1, 0, 2]")
        built.graph.node(0).outputs[0].dtype = ir.DataType.FLOAT16
        keep_apart(built)
        assert operators(built) == ["Transpose", "Max", "MatMul"]
        x = np.linspace(0, 2, 48, dtype=np.float16).reshape(2, 3, 8)
        session = OnnxSession(ir.to_proto(built).SerializeToString(), SessionSettings(threads=1))
        weight = np.linspace(-1, 1, 40, dtype=np.float16).reshape(8, 5)
        np.testing.assert_allclose(session(x)[0], x.transpose(1, 0, 2) @ weight, rtol=0.01, atol=0.01)

    def test_of_floats_and_of_samples_in_their_place_are_left(self) -> None:
        for built in (self._built("[1, 0, 2]", "float"), self._built("[0, 2, 1]")):
            built.graph.node(0).outputs[0].dtype = built.graph.inputs[0].dtype
            keep_apart(built)
            assert operators(built) == ["Transpose", "MatMul"]


class TestChannelRows:
    NUMBERS = np.array([1, 2, 4], np.float32)
    GIVEN = "g (float[n,5,6,3] x) => (float[n,3,5,6] y) { t = Transpose<perm = [0, 3, 1, 2]>(x)"

    @pytest.mark.parametrize("text", ["Sub(t, c)", "Sub(c, t)", "Mul(t, c)", "Div(c, t)"])
    @pytest.mark.parametrize("shape", [(3, 1, 1), (1, 3, 1, 1)])
    def test_computes_the_same_before(self, text: str, shape: tuple[int, ...]) -> None:
        built = model(f"{self.GIVEN} y = {text} }}", c=self.NUMBERS.reshape(shape))
        before = ir.to_proto(built).SerializeToString()
        assert ChannelRowsPass()(built).modified
        assert operators(built) == [text[:3], "Transpose"]
        assert built.graph.outputs[0].name == "y"
        x = np.random.default_rng(0).standard_normal((2, 5, 6, 3)).astype(np.float32)
        plain, rows = (
            OnnxSession(content, SessionSettings(threads=1))(x)
            for content in (before, ir.to_proto(built).SerializeToString())
        )
        np.testing.assert_array_equal(rows[0], plain[0])

    def test_one_behind_the_other(self) -> None:
        numbers = self.NUMBERS.reshape(3, 1, 1)
        built = model(f"{self.GIVEN} s = Sub(t, c) y = Mul(s, d) }}", c=numbers, d=numbers)
        ChannelRowsPass()(built)
        assert operators(built) == ["Sub", "Mul", "Transpose"]

    @pytest.mark.parametrize(
        ("text", "shape"),
        [
            (f"{GIVEN} y = Sub(t, c) }}", (3, 5, 1)),  # a number for each row, too
            (f"{GIVEN} y = Sub(t, c) }}", (1, 1, 6)),
            (f"{GIVEN} y = Sub(t, c) }}", (1,)),
            (f"{GIVEN} y = Sub(t, c) }}".replace("[n,5,6,3]", "[n,5,w,3]"), (3, 1, 1)),
            (f"{GIVEN} y = Sub(t, c) }}".replace("0, 3, 1, 2", "0, 3, 2, 1"), (3, 1, 1)),
            (f"{GIVEN} u = Relu(t) v = Sub(t, c) y = Add(u, v) }}", (3, 1, 1)),
        ],
    )
    def test_what_is_left(self, text: str, shape: tuple[int, ...]) -> None:
        assert not ChannelRowsPass()(model(text, c=np.ones(shape, np.float32))).modified


class TestBreakers:
    SUM = """g (float[2,3,8] x) => (float[2,3,4] y) <float s = {0.05}, uint8 z = {128}> {
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) m = MatMul(d, w) a = Add(m, b)
        r = QuantizeLinear(a, s, z) y = DequantizeLinear(r, s, z) }"""

    def test_a_float_product_of_integers_and_its_bias_stays_float(self) -> None:
        random = np.random.default_rng(0)
        x, weight = (random.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 8), (8, 4)))
        weight[:, 0] *= 100  # one scale for all of it leaves the others few bits
        built = model(self.SUM, w=weight, b=np.ones(4, np.float32))

        def errors() -> float:
            content = ir.to_proto(built).SerializeToString()
            plain, optimized = (
                OnnxSession(content, SessionSettings(threads=1, optimization=level))(x)[0]
                for level in ("disabled", "all")
            )
            return float(np.abs(plain - optimized).max()) / 0.05

        assert errors() > 1.5  # of what the runtime makes of it
        keep_apart(built)
        assert "Max" in operators(built)
        assert errors() < 1.5


class TestGroupedHalf:
    @pytest.mark.parametrize(("kernel", "axes"), [((3,), "9"), ((3, 3), "5,5"), ((3, 3, 3), "4,4,4")])
    def test_groups_are_computed_in_float32(self, kernel: tuple[int, ...], axes: str) -> None:
        text = f"g (float16[n,4,{axes}] x) => (float16[n,6,{axes}] y) {{ y = Conv<group=2,pads=PADS>(x, w, b) }}"
        random = np.random.default_rng(0)
        weight, bias = random.standard_normal((6, 2, *kernel)), random.standard_normal(6)
        pads = str([1] * 2 * len(kernel))
        built = model(text.replace("PADS", pads), w=weight.astype(np.float16), b=bias.astype(np.float16))
        x = random.standard_normal((2, 4, *map(int, axes.split(",")))).astype(np.float16)
        wanted = OnnxSession(ir.to_proto(built).SerializeToString(), SessionSettings(threads=1))(x)
        widen_grouped_convolutions(built)
        assert operators(built) == ["Cast", "Cast", "Cast", "Conv", "Cast"]
        assert {value.dtype for value in built.graph.node(3).inputs} == {ir.DataType.FLOAT}  # type: ignore[union-attr]
        found = OnnxSession(ir.to_proto(built).SerializeToString(), SessionSettings(threads=1))(x)
        np.testing.assert_array_equal(found, wanted)  # on x86 the runtime does the same

    @pytest.mark.parametrize(
        ("kind", "group", "shape"),
        [("float", 2, (6, 2, 3)), ("float16", 1, (6, 4, 3)), ("float16", 4, (4, 1, 3))],
    )
    def test_left_alone(self, kind: str, group: int, shape: tuple[int, ...]) -> None:
        weight = np.ones(shape, np.float16 if kind == "float16" else np.float32)
        built = model(
            f"g ({kind}[n,4,9] x) => ({kind}[n,{shape[0]},7] y) {{ y = Conv<group={group}>(x, w) }}", w=weight
        )
        widen_grouped_convolutions(built)
        assert operators(built) == ["Conv"]


class TestGlobalPooling:
    def test_keeping_dimensions(self) -> None:
        built = model("g (float[n,3,5,5] x) => (float[n,3,1,1] y) <int64[2] axes = {2, 3}> { y = ReduceMean(x, axes) }")
        assert GlobalPoolingPass()(built).modified
        assert operators(built) == ["GlobalAveragePool"]
        assert built.graph.outputs[0].name == "y"

    def test_dropping_dimensions(self) -> None:
        built = model(
            "g (float[n,3,5,5] x) => (float[n,3] z) <int64[2] axes = {-1, -2}>"
            "{ y = ReduceMean<keepdims=0>(x, axes) z = Relu(y) }"
        )
        assert GlobalPoolingPass()(built).modified
        assert operators(built) == ["GlobalAveragePool", "Constant", "Squeeze", "Relu"]

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("g (float[n,3,5,5] x) => (float y) <int64[1] axes = {2}> { y = ReduceMean(x, axes) }", "one axis"),
            ("g (float[n,3,5,5] x) => (float y) <int64[2] axes = {1, 2}> { y = ReduceMean(x, axes) }", "channels"),
            ("g (float[n,3,5] x, int64[1] axes) => (float y) { y = ReduceMean(x, axes) }", "computed axes"),
            ("g (float[n,3] x) => (float y) <int64[1] axes = {1}> { y = ReduceMean(x, axes) }", "no spatial axis"),
            ("g (int32[n,3,5] x) => (int32 y) <int64[1] axes = {2}> { y = ReduceMean(x, axes) }", "integers"),
            ("g (float[n,3,5] x) => (float y) <int64[1] axes = {2}> { y = ReduceMax(x, axes) }", "another reduction"),
        ],
    )
    def test_left_alone(self, text: str, why: str) -> None:
        built = model(text)
        assert not GlobalPoolingPass()(built).modified, why


class TestStoredWeights:
    TRANSPOSED = """g (float[n,3] x) => (float[n,2] y) {
        w = DequantizeLinear<axis=0>(q, scale)
        t = Transpose<perm=[1, 0]>(w)
        y = MatMul(x, t)
    }"""

    def test_transpose(self) -> None:
        stored = np.arange(6, dtype=np.int8).reshape(2, 3)
        built = model(self.TRANSPOSED, q=stored, scale=np.array([0.5, 0.25], np.float32))
        assert StoredWeightsPass()(built).modified
        dequantize = built.graph.outputs[0].producer().inputs[1].producer()
        assert dequantize.op_type == "DequantizeLinear"
        assert dequantize.attributes["axis"].as_int() == 1
        np.testing.assert_array_equal(dequantize.inputs[0].const_value.numpy(), stored.T)

    def test_reshape_keeps_the_axis_of_the_scales(self) -> None:
        built = model(
            """g (float[n,3] x) => (float[2,3] r) <int64[2] shape = {2, 3}> {
                w = DequantizeLinear<axis=0>(q, scale)
                r = Reshape(w, shape)
            }""",
            q=np.arange(6, dtype=np.int8).reshape(2, 3, 1, 1),
            scale=np.array([0.5, 0.25], np.float32),
        )
        assert StoredWeightsPass()(built).modified
        assert built.graph.outputs[0].producer().attributes["axis"].as_int() == 0

    def test_reshape_across_the_scales_is_left_alone(self) -> None:
        built = model(
            """g (float[n,3] x) => (float[3,2] r) <int64[2] shape = {3, 2}> {
                w = DequantizeLinear<axis=0>(q, scale)
                r = Reshape(w, shape)
            }""",
            q=np.arange(6, dtype=np.int8).reshape(2, 3),
            scale=np.array([0.5, 0.25], np.float32),
        )
        assert not StoredWeightsPass()(built).modified

    def test_computed_integers_are_left_alone(self) -> None:
        built = model(
            "g (int8[2,3] q) => (float[3,2] t) <float scale = {0.5}> "
            "{ w = DequantizeLinear(q, scale) t = Transpose<perm=[1, 0]>(w) }"
        )
        assert not StoredWeightsPass()(built).modified


class TestSaturation:
    def clamp(self, clamp: str, *, zero: int, dtype: str = "uint8", scale: float = 0.1) -> ir.Model:
        return model(
            f"g (float[n] x) => ({dtype}[n] q) <float low = {{0}}, float high = {{6}}, float s = {{{scale}}}, "
            f"{dtype} z = {{{zero}}}> {{ r = {clamp} q = QuantizeLinear(r, s, z) }}"
        )

    def test_relu_before_an_unsigned_range(self) -> None:
        built = self.clamp("Relu(x)", zero=0)
        assert SaturatedClampPass()(built).modified
        assert built.graph.outputs[0].producer().inputs[0].name == "x"

    def test_clip_that_ends_where_the_range_does(self) -> None:
        built = self.clamp("Clip(x, low, high)", zero=0, scale=0.023)
        assert SaturatedClampPass()(built).modified

    @pytest.mark.parametrize(
        ("clamp", "zero", "dtype", "scale"),
        [
            ("Relu(x)", 3, "uint8", 0.1),  # negative numbers have integers of their own
            ("Relu(x)", 0, "int8", 0.1),
            ("Clip(x, low, high)", 0, "uint8", 0.1),  # 25.5 would pass
            ("Sigmoid(x)", 0, "uint8", 0.1),
        ],
    )
    def test_left_alone(self, clamp: str, zero: int, dtype: str, scale: float) -> None:
        assert not SaturatedClampPass()(self.clamp(clamp, zero=zero, dtype=dtype, scale=scale)).modified

    def test_other_readers_keep_the_clamp(self) -> None:
        built = model(
            "g (float[n] x) => (uint8[n] q, float[n] r) <float s = {0.1}, uint8 z = {0}> "
            "{ r = Relu(x) q = QuantizeLinear(r, s, z) }"
        )
        assert SaturatedClampPass()(built).modified
        assert operators(built) == ["Relu", "QuantizeLinear"]


class TestDuplicates:
    def test_equal_tensors_are_stored_once(self) -> None:
        view = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
        built = model(
            "g (float[2,3] x) => (float[2,3] y) { a = Add(x, first) b = Add(a, second) y = Mul(b, other) }",
            first=view,
            second=np.ascontiguousarray(view),
            other=view + 1,
        )
        assert DuplicateInitializersPass()(built).modified
        assert list(built.graph.initializers) == ["first", "other"]
        assert not DuplicateInitializersPass()(built).modified

    def test_equal_bytes_of_another_type_or_shape_stay(self) -> None:
        built = model(
            "g (float[1] x) => (float y) { a = Add(x, first) b = Add(a, second) y = Reshape(b, third) }",
            first=np.zeros(1, np.float32),
            second=np.zeros((1, 1), np.float32),
            third=np.zeros(0, np.int64),
        )
        assert not DuplicateInitializersPass()(built).modified


class TestOwnWeights:
    TWICE = (
        "g (float[n,4] x) => (float[n,4] z) {"
        "d = DequantizeLinear<axis=0>(w, s, zero) y = MatMul(x, d) z = MatMul(y, d) }"
    )
    STORED = {  # noqa: RUF012
        "w": np.arange(16, dtype=np.int8).reshape(4, 4),
        "s": np.ones(4, dtype=np.float32),
        "zero": np.zeros(4, dtype=np.int8),
    }

    def test_readers_of_one_weight_share_the_file_and_nothing_else(self) -> None:
        built = model(self.TWICE, **self.STORED)
        assert OwnWeightsPass()(built).modified
        assert operators(built) == ["DequantizeLinear", "Reshape", "DequantizeLinear", "MatMul", "MatMul"]
        reads = [node.inputs for node in built.graph if node.op_type == "DequantizeLinear"]
        assert reads[0][0].name == "w"
        assert reads[1][0].producer().op_type == "Reshape"
        assert reads[0][2] is not reads[1][2]
        stored = [value for value in built.graph.initializers.values() if value.dtype == ir.DataType.INT8]
        assert sum(len(value.shape) == 2 for value in stored) == 1

    def test_a_zero_point_of_two_weights_becomes_two(self) -> None:
        text = (
            "g (float[n,4] x) => (float[n,4] z) { d = DequantizeLinear<axis=0>(w, s, zero)"
            "e = DequantizeLinear<axis=0>(v, s, zero) y = MatMul(x, d) z = MatMul(y, e) }"
        )
        built = model(text, **self.STORED, v=self.STORED["w"] + np.int8(1))
        assert OwnWeightsPass()(built).modified
        reads = [node.inputs for node in built.graph if node.op_type == "DequantizeLinear"]
        assert reads[0][1] is reads[1][1]
        assert reads[0][2] is not reads[1][2]
        np.testing.assert_array_equal(reads[0][2].const_value.numpy(), reads[1][2].const_value.numpy())

    def test_one_reader_is_left_alone(self) -> None:
        text = "g (float[n,4] x) => (float[n,4] y) { d = DequantizeLinear<axis=0>(w, s, zero) y = MatMul(x, d) }"
        built = model(text, **self.STORED)
        assert not OwnWeightsPass()(built).modified
        assert operators(built) == ["DequantizeLinear", "MatMul"]

    def test_new_names_are_free_in_the_whole_model(self) -> None:
        text = self.TWICE.replace(
            "z = MatMul(y, d)", "w_shape = Relu(y) w_again = MatMul(w_shape, d) z = Relu(w_again)"
        )
        built = model(text, **self.STORED)
        assert OwnWeightsPass()(built).modified
        names = [value.name for value in values_of(built)]
        assert sorted(names) == sorted(set(names))
        assert {"w_shape_1", "w_again_1", "w_zero_point"} <= set(names)
        onnx.checker.check_model(ir.to_proto(built))


class TestOwnZeroPoints:
    def test_a_value_is_no_zero_point(self) -> None:
        text = (
            "g (uint8[n,4] x) => (float[n,4] y) { d = DequantizeLinear(x, s, zero) e = DequantizeLinear(zero, s, zero)"
            "f = DequantizeLinear(zero, s, zero) g = Add(d, e) y = Add(g, f) }"
        )
        built = model(text, s=np.float32(1), zero=np.uint8(0))
        assert OwnZeroPointsPass()(built).modified
        first, *added = [node.inputs for node in built.graph if node.op_type == "DequantizeLinear"]
        assert {read[2].name for read in (first, *added)} == {"zero"}
        assert {read[0].name for read in added} == {"zero_value"}
        assert not OwnZeroPointsPass()(built).modified

    def test_the_zero_point_of_a_quantization_counts(self) -> None:
        text = (
            "g (float[n] x) => (float[n] y, uint8[n] q) { e = DequantizeLinear(zero, s) y = Add(x, e)"
            "q = QuantizeLinear(x, s, zero) }"
        )
        assert OwnZeroPointsPass()(model(text, s=np.float32(1), zero=np.uint8(0))).modified

    def test_a_weight_of_two_kinds_of_product_is_stored_once(self) -> None:
        text = (
            "g (float[n,4] x, uint8[n,4] q) => (float[n,4] y, int32[n,4] z) { d = DequantizeLinear(w, s, zero)"
            "y = MatMul(x, d) z = MatMulInteger(q, w) }"
        )
        built = model(text, w=np.ones((4, 4), np.int8), s=np.float32(1), zero=np.int8(0))
        assert not OwnZeroPointsPass()(built).modified


class TestSignature:
    def test_inputs_keep_their_names_where_a_loop_inside_uses_them(self) -> None:
        text = (
            "g (float[n] x, int64 trips, bool keep) => (float[n] y) { y = Loop(trips, keep, x) <body = "
            "b (int64 i, bool go, float[n] count) => (bool on, float[n] next) "
            "{ on = Identity(go) next = Relu(count) }> }"
        )
        built = model(text)
        sizes = {"count": ("batch",), "i": (), "go": ()}
        kinds = {"count": torch.float32, "i": torch.int64, "go": torch.bool}
        inputs = tuple(TensorSpec(name, size, kinds[name]) for name, size in sizes.items())
        apply_signature(built, inputs, (TensorSpec("next", ("batch",), torch.float32),))
        assert [value.name for value in built.graph.inputs] == ["count", "i", "go"]
        names = [value.name for value in values_of(built)]
        assert sorted(names) == sorted(set(names))
        assert all("n" not in str(value.shape) for value in values_of(built))
