"""Each rule about TensorRT on a model that breaks it, and on one that keeps it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.backends.tensorrt import rules
from graphopt.backends.tensorrt.rules import check_model


def model(text: str, opset: int = 20, **initializers: np.ndarray) -> ir.Model:
    """Parse a graph; `initializers` are stored tensors it names."""
    imports = f'["" : {opset}, "com.microsoft" : 1]'
    built = ir.from_onnx_text(f"<ir_version: 10, opset_import: {imports}>\n{text}")
    for name, array in initializers.items():
        value = next(v for node in built.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(array, name=name)
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
        built.graph.register_initializer(value)
    return built


def pair(dtype: str = "int8", zero: int = 0, scale: float = 0.5) -> ir.Model:
    return model(
        f"g (float[n] x) => (float[n] y) <float s = {{{scale}}}, {dtype} z = {{{zero}}}> "
        "{ q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"
    )


def layer(
    operator: str, weight: np.ndarray, axis: int, *, scales: int = 2, activation: str = "float s = {0.5}"
) -> ir.Model:
    """A layer between dequantized operands."""
    return model(
        f"g (int8[n,4,8,8] q) => (float y) <{activation}> {{"
        f"  x = DequantizeLinear(q, s) w = DequantizeLinear<axis={axis}>(stored, scales) y = {operator}(x, w) }}",
        stored=weight,
        scales=np.ones(scales, np.float32) / 2,
    )


CONV = np.ones((2, 4, 3, 3), np.int8)
ONE = "float s = {0.5}"

BROKEN = [
    (rules.zero_point_is_zero, pair(zero=3), "error", "its zero point is not 0"),
    (
        rules.no_integer_bias,
        model(f"g (int32[4] b) => (float[4] y) <{ONE}> {{ y = DequantizeLinear(b, s) }}"),
        "error",
        "it dequantizes an int32 bias",
    ),
    (rules.at_most_eight_bits, pair("uint16"), "error", "it uses uint16, and TensorRT has no 16-bit integers"),
    (rules.at_most_eight_bits, pair("int16"), "error", "it uses int16, and TensorRT has no 16-bit integers"),
    (rules.positive_scales, pair(scale=0.0), "error", "a scale is zero, negative or not finite"),
    (rules.positive_scales, pair(scale=-1.0), "error", "a scale is zero, negative or not finite"),
    (
        rules.no_integer_operators,
        model("g (int8[n,4] a, int8[4,2] b) => (int32[n,2] y) { y = MatMulInteger(a, b) }"),
        "error",
        "TensorRT has no MatMulInteger",
    ),
    (
        rules.no_integer_operators,
        model("g (float[n] x) => (uint8[n] y, float s, uint8 z) { y, s, z = DynamicQuantizeLinear(x) }"),
        "error",
        "TensorRT has no DynamicQuantizeLinear",
    ),
    (
        rules.one_precision_per_operator,
        model("g (float[n,4] x, float16[4] h) => (float[n,4] y) { y = Add(x, h) }"),
        "error",
        "its operands are float and float16",
    ),
    (
        rules.no_fused_attention,
        model("g (float[n,4,8] x) => (float[n,4,8] y) { y = Attention<q_num_heads=2, kv_num_heads=2>(x, x, x) }", 23),
        "error",
        "refuses the operator Attention in float32",
    ),
    (
        rules.no_foreign_operators,
        model("g (float[n,4] x) => (float[n,4] y) { y = com.microsoft.SkipLayerNormalization(x, x, x) }"),
        "error",
        "SkipLayerNormalization exists in ONNX Runtime only",
    ),
    (
        rules.constant_reduction_axes,
        model("g (float[n,4] x, int64[1] axes) => (float y) { y = ReduceMean(x, axes) }"),
        "error",
        "its axes are computed",
    ),
    (
        rules.no_block_weights_with_integers,
        model(
            f"g (int8[n,4] q, int4[4,2] stored) => (float[n,2] y) <{ONE}> "
            "{ x = DequantizeLinear(q, s) w = DequantizeLinear(stored, s) y = MatMul(x, w) }"
        ),
        "error",
        "int4 weights meet int8 activations",
    ),
    (rules.known_opset, model("g (float[n] x) => (float[n] y) { y = Relu(x) }", 26), "error", "of opset 26"),
    (rules.no_unsigned_integers, pair("uint8"), "error", "it uses uint8, which TensorRT reads as int8"),
    (
        rules.one_scale_per_activation,
        model("g (float[n,2] x) => (int8[n,2] q) { q = QuantizeLinear<axis=1>(x, s, z) }",
              s=np.ones(2, np.float32), z=np.zeros(2, np.int8)),
        "error",
        "an activation has scales per channel",
    ),
    (
        rules.weight_scales_along_outputs,
        layer("Conv", CONV, axis=1, scales=4),
        "warning",
        "its weight has scales along axis 1 instead of 0",
    ),
    (
        rules.weight_scales_along_outputs,
        layer("MatMul", np.ones((8, 2), np.int8), axis=0, scales=8),
        "warning",
        "its weight has scales along axis 0 instead of 1",
    ),
    (
        rules.weight_scales_along_outputs,
        layer("ConvTranspose", np.ones((4, 2, 3, 3), np.int8), axis=0, scales=4),
        "warning",
        "its weight has scales along axis 0 instead of 1",
    ),
    (
        rules.both_sides_quantized,
        model(
            f"g (float[n,4,8,8] x, int8[2,4,3,3] q) => (float y) <{ONE}> "
            "{ w = DequantizeLinear(q, s) y = Conv(x, w) }"
        ),
        "warning",
        "only its weight is quantized",
    ),
    (
        rules.both_sides_quantized,
        model(
            f"g (int8[n,4,8,8] q, float[2,4,3,3] w) => (float y) <{ONE}> "
            "{ x = DequantizeLinear(q, s) y = Conv(x, w) }"
        ),
        "warning",
        "only its input is quantized",
    ),
    (
        rules.equal_scales_at_concat,
        model(
            f"g (int8[n] a, int8[n] b) => (float y) <{ONE}, float t = {{0.25}}> "
            "{ x = DequantizeLinear(a, s) w = DequantizeLinear(b, t) y = Concat<axis=0>(x, w) }"
        ),
        "warning",
        "it joins integers of different scales",
    ),
    (
        rules.quantize_after_activation,
        model(
            f"g (float[n,4,8,8] x, float[2,4,3,3] w) => (float y) <{ONE}, int8 z = {{0}}> "
            "{ c = Conv(x, w) q = QuantizeLinear(c, s, z) d = DequantizeLinear(q, s, z) y = Relu(d) }"
        ),
        "warning",
        "its result is quantized before its activation",
    ),
]  # fmt: skip

KEPT = [
    pair(),
    layer("Conv", CONV, axis=0),
    layer("MatMul", np.ones((8, 2), np.int8), axis=1),
    layer("ConvTranspose", np.ones((4, 2, 3, 3), np.int8), axis=1),
    model("g (float[n,4] x) => (float y) <int64[1] axes = {1}> { y = ReduceMean(x, axes) }"),
    model("g (float[n,4] x) => (float[n,4] y) { y = com.microsoft.Gelu(x) }"),
    model("g (float[n,4] x) => (float16[n,4] y) { h = Cast<to=10>(x) y = Add(h, h) }"),
    model(
        f"g (int8[n] a, int8[n] b) => (float y) <{ONE}> "
        "{ x = DequantizeLinear(a, s) w = DequantizeLinear(b, s) y = Concat<axis=0>(x, w) }"
    ),
    model(
        f"g (float[n,4,8,8] x, float[2,4,3,3] w) => (int8 q) <{ONE}, int8 z = {{0}}> "
        "{ c = Conv(x, w) r = Relu(c) q = QuantizeLinear(r, s, z) }"
    ),
]


@pytest.mark.parametrize(("rule", "broken", "severity", "text"), BROKEN)
def test_broken(rule: rules.Rule, broken: ir.Model, severity: str, text: str) -> None:
    (finding,) = list(rule(broken))[:1]
    assert finding.severity == severity
    assert text in finding.text
    assert finding in check_model(broken)


@pytest.mark.parametrize("kept", KEPT)
def test_kept(kept: ir.Model) -> None:
    assert check_model(kept) == []


def test_every_rule_is_applied_and_tested() -> None:
    own = (value for value in vars(rules).values() if getattr(value, "__module__", "") == rules.__name__)
    written = {value for value in own if not value.__name__.startswith("_") and value is not check_model}
    assert set(rules.RULES) == written == {rule for rule, *_ in BROKEN}
