"""The quantization operators: arithmetic, gradients, and what survives export, files and ONNX."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.quantization.ops import (
    dequantize,
    dynamic_quantize,
    fake_quantize,
    observe,
    pack,
    quantize,
    step_gain,
    unpack,
)

OPS = torch.ops.graphopt
SCALE, ZERO = torch.tensor(0.1), torch.tensor(3, dtype=torch.uint8)


def test_rounds_half_to_even_and_saturates() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, 300.0, -300.0, float("inf"), float("-inf")])
    one, zero = torch.tensor(1.0), torch.tensor(0, dtype=torch.int8)
    assert quantize(x, one, zero, None, -128, 127).tolist() == [0, 2, 2, 0, 127, -128, 127, -128]


def test_range_within_the_storage() -> None:
    x = torch.tensor([-9.0, 9.0])
    q = quantize(x, torch.tensor(1.0), torch.tensor(0, dtype=torch.int8), None, -8, 7)
    assert q.tolist() == [-8, 7]
    assert q.dtype is torch.int8


def test_per_channel_along_any_axis() -> None:
    x = torch.ones(2, 3, 4)
    scale, zero = torch.tensor([1.0, 0.5, 0.25]), torch.zeros(3, dtype=torch.int8)
    for axis in (1, -2):
        q = quantize(x, scale, zero, axis, -128, 127)
        assert q[0, :, 0].tolist() == [1, 2, 4]
        torch.testing.assert_close(dequantize(q, scale, zero, axis), x, rtol=0, atol=0)


def test_int32_is_exact_beyond_float_digits() -> None:
    q = torch.tensor([2**24 + 1, -(2**31)], dtype=torch.int32)
    real = dequantize(q, torch.tensor(1.0, dtype=torch.float64), torch.tensor(0, dtype=torch.int32), None)
    assert real.tolist() == [2**24 + 1, -(2**31)]


@pytest.mark.parametrize(("scale", "axis"), [((2,), None), ((2,), 1), ((3,), 5)])
def test_fake_tensors_refuse_misfits(scale: tuple[int, ...], axis: int | None) -> None:
    with torch._subclasses.FakeTensorMode(), pytest.raises(ValueError, match="do not fit"):
        quantize(torch.empty(4, 3), torch.empty(scale), torch.empty(scale, dtype=torch.int8), axis, -128, 127)


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20),
    st.floats(2**-10, 4.0, width=32),
    st.integers(0, 255),
)
def test_round_trip_is_within_half_a_step(values: list[float], scale: float, zero: int) -> None:
    x, s, z = torch.tensor(values), torch.tensor(scale), torch.tensor(zero, dtype=torch.uint8)
    back = dequantize(quantize(x, s, z, None, 0, 255), s, z, None)
    limited = x.clamp(float(s) * (0 - zero), float(s) * (255 - zero))
    step = float(s) / 2 * (1 + 1e-4) + 255 * float(s) * torch.finfo(torch.float32).eps
    assert float((back - limited).abs().max()) <= step


def test_scales_that_would_stretch_the_result_are_refused() -> None:
    few, many = torch.ones(1), torch.ones(9)
    x, q = torch.randn(1, 4), torch.ones(1, 4, dtype=torch.int32)
    for call in (
        lambda s, z: quantize(x, s, z, 0, 0, 255),
        lambda s, z: fake_quantize(x, s, z, 0, 0, 255),
        lambda s, z: dequantize(q, s, z, 0),
        lambda s, z: dequantize(q, s, z, None),
    ):
        call(few, few)
        for scale, zero in ((many, many), (few, many), (many, few)):
            with pytest.raises(ValueError, match="do not fit axis"):
                call(scale, zero)


def test_fake_quantize_is_quantize_then_dequantize() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    found = fake_quantize(x, SCALE, ZERO, None, 0, 255)
    torch.testing.assert_close(found, dequantize(quantize(x, SCALE, ZERO, None, 0, 255), SCALE, ZERO, None))


def test_gradients_of_fake_quantize() -> None:
    """Straight through inside the range, none outside; learned step sizes by their formula."""
    x = torch.tensor([0.24, 100.0, -100.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    zero = torch.tensor(0, dtype=torch.int8)
    fake_quantize(x, scale, zero, None, -8, 7).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.tolist() == [1.0, 0.0, 0.0]
    torch.testing.assert_close(scale.grad.item(), (2 - 2.4) + 7 - 8)


def test_a_learned_step_in_blocks_has_the_gradient_of_what_it_rounds() -> None:
    """What is rounded held fixed, integers times a step are linear in it: equation 3 says no more."""
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([[0.5, 1.0], [2.0, 0.25], [0.1, 0.3]], dtype=torch.float64, requires_grad=True)
    zero, blocks = torch.tensor(1, dtype=torch.int8), torch.tensor([0, 0, 0, 1, 1])
    found = fake_quantize(x, scale, zero, 1, -2, 3, 3, 0.5)
    spread = scale[:, blocks]
    steps = ((x / spread).round() + 1).clamp(-2, 3).detach() - 1
    torch.testing.assert_close(found, steps * spread, rtol=0, atol=0)
    inside = ((x / spread).round() + 1 >= -2) & ((x / spread).round() + 1 <= 3)
    wanted = (steps - torch.where(inside, x / spread, 0.0)).detach()
    found.sum().backward()  # type: ignore[no-untyped-call]
    expected = 0.5 * torch.stack([wanted[:, :3].sum(1), wanted[:, 3:].sum(1)], 1)
    torch.testing.assert_close(scale.grad, expected)
    assert not bool(inside.all())
    assert bool(inside.any())


def test_gradient_of_dequantize() -> None:
    q = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8)
    zero = torch.zeros(2, dtype=torch.int8)
    scale = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: dequantize(q, s, zero, 0), (scale,))


def test_gradient_of_dequantize_in_blocks() -> None:
    q = torch.tensor([[1, -2, 5], [3, 4, -6]], dtype=torch.int8)
    scale = torch.tensor([[0.5, 1.0], [2.0, 0.25]], dtype=torch.float64, requires_grad=True)
    for zero in (torch.tensor(1, dtype=torch.int8), torch.ones(2, 2, dtype=torch.int8)):
        assert torch.autograd.gradcheck(lambda s, zero=zero: dequantize(q, s, zero, 1, 2), (scale,))


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("block", [1, 2, 3, 4, 9])
def test_blocks_along_an_axis(axis: int, block: int) -> None:
    q = torch.arange(3 * 4 * 5, dtype=torch.uint8).reshape(3, 4, 5)
    shape = list(q.shape)
    shape[axis] = -(-shape[axis] // block)
    scale, zero = torch.rand(shape), torch.randint(0, 9, shape, dtype=torch.uint8)
    found = dequantize(q, scale, zero, axis, block)
    for place in range(q.shape[axis]):
        at, of_block = q.select(axis, place).float(), place // block
        wanted = (at - zero.select(axis, of_block).float()) * scale.select(axis, of_block)
        torch.testing.assert_close(found.select(axis, place), wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("scale", "zero", "axis", "block"),
    [((4, 1), (), 1, 2), ((4, 2), (4, 1), 1, 2), ((1, 2), (), 1, 2), ((4, 2), (1,), 1, 2), ((4, 3), (), 1, 0),
     ((4, 3), (), None, 1), ((4, 2), (), 2, 2)],
)  # fmt: skip
def test_scales_that_do_not_fit_blocks_are_refused(
    scale: tuple[int, ...], zero: tuple[int, ...], axis: int | None, block: int
) -> None:
    q = torch.ones(4, 3, dtype=torch.int8)
    with pytest.raises(ValueError, match="block"):
        dequantize(q, torch.ones(scale), torch.zeros(zero, dtype=torch.int8), axis, block)


@given(st.sampled_from([1, 2, 4]), st.integers(0, 17), st.booleans(), st.integers(0, 2**32 - 1))
def test_packed_integers_come_back(bits: int, size: int, signed: bool, seed: int) -> None:
    low = -(1 << bits - 1) if signed else 0
    made = torch.randint(low, low + (1 << bits), (2, 3, size), generator=torch.Generator().manual_seed(seed))
    integers = made.to(torch.int8 if signed else torch.uint8)
    packed = pack(integers, bits, low)
    assert packed.shape == (2, 3, -(-size * bits // 8))
    found = unpack(packed, size, bits, low)
    assert found.dtype is integers.dtype
    assert torch.equal(found, integers)


def test_the_first_integer_is_in_the_lowest_bits() -> None:
    assert pack(torch.tensor([1, 2, 3]), 4, 0).tolist() == [0x21, 0x03]
    assert pack(torch.tensor([-8, 7]), 4, -8).tolist() == [0xF0]


@pytest.mark.parametrize(("count", "size", "bits", "low"), [(2, 5, 4, 0), (2, 2, 4, 0), (2, 3, 3, 0), (2, 4, 4, 250)])
def test_packed_integers_that_do_not_fit_are_refused(count: int, size: int, bits: int, low: int) -> None:
    with pytest.raises(ValueError, match="bits"):
        unpack(torch.zeros(3, count, dtype=torch.uint8), size, bits, low)
    with torch._subclasses.FakeTensorMode(), pytest.raises(ValueError, match="bits"):
        unpack(torch.empty(3, count, dtype=torch.uint8), size, bits, low)


def test_operators_are_well_formed() -> None:
    """Schema, fake kernels, autograd registration and dynamic shapes, by torch's own checker."""
    x = torch.randn(3, 4, 5, requires_grad=True)
    scale, zero = torch.rand(4).add(0.1).requires_grad_(), torch.zeros(4, dtype=torch.int8)
    q = torch.randint(-9, 9, (3, 4, 5), dtype=torch.int8)
    torch.library.opcheck(quantize, (x.detach(), scale.detach(), zero, 1, -128, 127))
    torch.library.opcheck(fake_quantize, (x, scale, zero, 1, -8, 7))
    torch.library.opcheck(dequantize, (q, scale, zero, 1))
    torch.library.opcheck(dequantize, (q, torch.rand(3, 4, 3).requires_grad_(), zero[0], 2, 2))
    torch.library.opcheck(unpack, (torch.randint(0, 255, (3, 5), dtype=torch.uint8), 9, 4, -8))
    torch.library.opcheck(observe, (x, "name"))


def test_survive_export_and_files() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.zero = nn.Buffer(SCALE), nn.Buffer(ZERO)

        def forward(self, x: Tensor) -> Tensor:
            x = OPS.observe(x, "x")
            x = OPS.dequantize(OPS.quantize(x, self.scale, self.zero, None, 0, 255), self.scale, self.zero, None)
            return OPS.fake_quantize(x * 2, self.scale, self.zero, None, 0, 255)

    x = torch.randn(2, 3)
    exported = torch.export.export(Net(), (x,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
    stream = io.BytesIO()
    torch.export.save(exported, stream)
    stream.seek(0)
    loaded = torch.export.load(stream)
    torch.testing.assert_close(loaded.module()(torch.ones(5, 3)), Net()(torch.ones(5, 3)), rtol=0, atol=0)


@pytest.mark.parametrize(
    "values", [[-1.0, 0.0, 3.0], [2.0, 5.0], [-4.0, -1.0], [0.0, 0.0], [1e-30, -1e-30], [7.0]], ids=str
)
def test_dynamic_quantize_is_that_of_onnx(values: list[float]) -> None:
    from onnx.reference.ops.op_dynamic_quantize_linear import DynamicQuantizeLinear

    x = torch.tensor(values)
    found = dynamic_quantize(x)
    wanted = DynamicQuantizeLinear.eval(x.numpy())
    if x.any():  # ONNX leaves the scale of zeros open
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, torch.from_numpy(np.asarray(theirs)), rtol=1e-6, atol=0)
    step = float(found[1])
    torch.testing.assert_close(dequantize(*found, None), x, rtol=0, atol=step / 2 * 1.001)


def test_dynamic_quantize_of_nothing() -> None:
    integers, scale, zero_point = dynamic_quantize(torch.empty(0, 3))
    assert (tuple(integers.shape), float(scale), int(zero_point)) == ((0, 3), 1.0, 0)


def test_the_gain_of_a_step() -> None:
    """Esser et al. 2020, section 2.2."""
    assert step_gain(144, 7) == pytest.approx(1 / (144 * 7) ** 0.5)
    assert step_gain(0, 0) == 1.0


def test_what_is_too_large_for_int32_is_its_largest() -> None:
    one, zero = torch.ones(()), torch.zeros((), dtype=torch.int32)
    found = torch.ops.graphopt.quantize.default(torch.tensor([3e9, -3e9]), one, zero, None, -(2**31) + 1, 2**31 - 1)
    assert found[0] == 2**31 - 1
    assert found[1] <= -(2**31) + 1
