"""What `tools/fuzz_runtime.py` runs: operators one behind the other, with and without integers around each.

    x -> [integers] -> first -> [integers] -> second -> [integers]         each pair of brackets there or not

Operators are those that ONNX Runtime's optimizer knows, and every one that torch's own tests describe. A case is made
of a number alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.backends.onnxruntime.description import DESCRIPTION
from graphopt.quantization.ops import DEQUANTIZE, QUANTIZE
from graphopt.quantization.qparams import from_range, quantize_weight, weight_scales
from tools.zoo_operators import described_by_torch

ROWS = 8  # of the data; the first two are the example
_SHAPES = ((ROWS,), (ROWS, 12), (ROWS, 6, 8), (ROWS, 4, 6, 6), (ROWS, 4, 3, 4, 4))
_MOST_ELEMENTS = 20_000

Call = Callable[[Tensor], Any]
Maker = Callable[["Draw", Tensor], Call | None]  # None: not for tensors like this one


@dataclass
class Draw:
    """Random choices, and the constants made by them, which belong to a module.

    Attributes:
        rng: where choices come from.
        home: the module.
        integers: whether weights and constants are read from integers.
    """

    rng: random.Random
    home: nn.Module
    integers: bool

    def any(self, *choices: Any) -> Any:
        """Return one of several."""
        return self.rng.choice(choices)

    def noise(self, *shape: int) -> Tensor:
        """Return normally distributed numbers."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.rng.getrandbits(32)))

    def held(self, value: Tensor) -> Callable[[], Tensor]:
        """Let the module hold a tensor; return a call that reads it."""
        name = f"held{len(self.home._buffers)}"
        self.home.register_buffer(name, value)
        return lambda: getattr(self.home, name)  # type: ignore[no-any-return]

    def constant(self, *shape: int) -> Callable[[], Tensor]:
        """Make an operand, one scale for all of it."""
        value = self.noise(*shape) * self.any(1e-3, 1.0, 30.0)
        return self.rounded(value) if self.integers else self.held(value)

    def weight(self, *shape: int, axis: int = 0) -> Callable[[], Tensor]:
        """Make a weight, a scale for each output channel."""
        value = self.noise(*shape) / math.sqrt(math.prod(shape) / shape[axis])
        if not self.integers:
            return self.held(value)
        scales = weight_scales(value, DESCRIPTION.weight, axis)
        stored = self.held(quantize_weight(value, scales, DESCRIPTION.weight, axis))
        scale, zero = self.held(scales), self.held(torch.zeros_like(scales, dtype=torch.int8))
        return lambda: DEQUANTIZE(stored(), scale(), zero(), axis)

    def rounded(self, value: Tensor) -> Callable[[], Tensor]:
        """Make an operand that is stored as integers."""
        chosen = from_range(float(value.min()), float(value.max()), DESCRIPTION.activation)
        scale = self.held(torch.tensor(chosen.scale))
        zero = self.held(torch.tensor(chosen.zero_point, dtype=torch.uint8))
        stored = self.held(QUANTIZE(value, scale(), zero(), None, chosen.low, chosen.high))
        return lambda: DEQUANTIZE(stored(), scale(), zero(), None)

    def pair(self, value: Tensor) -> Call:
        """Make a way through integers for values like these."""
        chosen = from_range(float(value.min()), float(value.max()), DESCRIPTION.activation)
        scale = self.held(torch.tensor(chosen.scale))
        zero = self.held(torch.tensor(chosen.zero_point, dtype=torch.uint8))
        bounds = chosen.low, chosen.high
        return lambda x: DEQUANTIZE(QUANTIZE(x, scale(), zero(), None, *bounds), scale(), zero(), None)


def _elementwise(function: Callable[[Tensor], Tensor]) -> Maker:
    return lambda draw, x: function


def _with_constant(function: Callable[[Tensor, Tensor], Tensor]) -> Maker:
    def make(draw: Draw, x: Tensor) -> Call:
        shape = list(x.shape)[1:]
        channel = [shape[0], *[1] * (len(shape) - 1)] if shape else []
        other = draw.constant(*draw.any([], shape[-1:], shape, channel))
        return (lambda x: function(x, other())) if draw.any(True, False) else (lambda x: function(other(), x))

    return make


def _convolution(rank: int, transposed: bool = False) -> Maker:
    function = getattr(F, f"conv{'_transpose' if transposed else ''}{rank}d")

    def make(draw: Draw, x: Tensor) -> Call | None:
        if x.dim() != rank + 2:
            return None
        channels = x.shape[1]
        groups = draw.any(1, channels)
        out = channels if groups > 1 else draw.any(3, 8)
        shape = (channels, out // groups) if transposed else (out, channels // groups)
        weight = draw.weight(*shape, *[draw.any(1, 3)] * rank, axis=1 if transposed and groups == 1 else 0)
        bias = draw.held(draw.noise(out)) if draw.any(True, False) else lambda: None
        padding = draw.any(0, 1)
        return lambda x: function(x, weight(), bias(), padding=padding, groups=groups)

    return make


def _linear(draw: Draw, x: Tensor) -> Call | None:
    if x.dim() < 2:
        return None
    weight = draw.weight(draw.any(4, x.shape[-1]), x.shape[-1])
    bias = draw.held(draw.noise(weight().shape[0])) if draw.any(True, False) else lambda: None
    return lambda x: F.linear(x, weight(), bias())


def _product(draw: Draw, x: Tensor) -> Call | None:
    if x.dim() < 2:
        return None
    weight = draw.weight(x.shape[-1], draw.any(5, x.shape[-1]), axis=1)
    return lambda x: x @ weight()


def _with_itself(draw: Draw, x: Tensor) -> Call | None:
    return None if x.dim() < 3 else lambda x: x @ x.transpose(-1, -2)


def _norm(function: Callable[..., Tensor], first: int) -> Maker:
    def make(draw: Draw, x: Tensor) -> Call | None:
        if x.dim() < 2:
            return None
        size = x.shape[1] if first == 1 else x.shape[-1]
        scale, shift = draw.held(draw.noise(size)), draw.held(draw.noise(size))
        return lambda x: function(x, scale(), shift())

    return make


def _batch_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.batch_norm(x, shift, scale * scale + 0.5, scale, shift)


def _layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, scale.shape, scale, shift)


def _from_rank(rank: int, call: Call, *, exactly: bool = False) -> Maker:
    return lambda draw, x: call if (x.dim() == rank if exactly else x.dim() >= rank) else None


def _gathered(draw: Draw, x: Tensor) -> Call | None:
    index = draw.held(torch.tensor([1, 0, 1]))
    return None if x.dim() < 2 else lambda x: x.index_select(1, index())


# Those that ONNX Runtime's optimizer moves, merges or turns to integers, and what is written out of such.
MAKERS: dict[str, Maker] = {
    **{f"conv{rank}d": _convolution(rank) for rank in (1, 2, 3)},
    **{f"conv_transpose{rank}d": _convolution(rank, transposed=True) for rank in (1, 2)},
    "linear": _linear, "matmul": _product, "matmul_itself": _with_itself,
    "batch_norm": _norm(_batch_norm, 1),
    "layer_norm": _norm(_layer_norm, -1),
    **{
        name: _with_constant(getattr(torch, name))
        for name in ("add", "mul", "sub", "maximum", "minimum")
    },
    "prelu": _norm(lambda x, slope, _: F.prelu(x, slope), 1),
    "add_itself": _elementwise(lambda x: x + x),
    "mul_itself": _elementwise(lambda x: x * x),
    "cat_itself": _from_rank(2, lambda x: torch.cat([x, x], 1)),
    **{name: _elementwise(getattr(F, name)) for name in ("relu", "relu6", "silu", "gelu", "hardswish", "hardsigmoid")},
    **{name: _elementwise(getattr(F, name)) for name in ("elu", "mish", "softplus", "leaky_relu", "logsigmoid")},
    **{name: _elementwise(getattr(torch, name)) for name in ("sigmoid", "tanh", "abs", "neg", "exp", "erf", "cos")},
    "gelu_tanh": _elementwise(lambda x: F.gelu(x, approximate="tanh")),
    "quick_gelu": _elementwise(lambda x: x * torch.sigmoid(1.702 * x)),
    "relu_as_leaky": _elementwise(lambda x: F.leaky_relu(x, 0.0)),
    "clamp": _elementwise(lambda x: x.clamp(-0.5, 3.0)),
    "clamp_min": _elementwise(lambda x: x.clamp_min(0.1)),
    "reciprocal": _elementwise(lambda x: 1 / (x.abs() + 1)),
    "square_root": _elementwise(lambda x: (x.abs() + 1e-3).sqrt()),
    "times_one": _elementwise(lambda x: x * 1),
    "softmax": _elementwise(lambda x: x.softmax(-1)),
    "log_softmax": _elementwise(lambda x: x.log_softmax(-1)),
    "softmax_channels": _from_rank(3, lambda x: x.softmax(1)),
    "mean": _from_rank(2, lambda x: x.mean(-1, keepdim=True)),
    "sum": _from_rank(2, lambda x: x.sum(1)),
    "amax": _from_rank(2, lambda x: x.amax(-1)),
    "global_pool": _from_rank(3, lambda x: x.mean(list(range(2, x.dim())), keepdim=True)),
    "max_pool1d": _from_rank(3, lambda x: F.max_pool1d(x, 2), exactly=True),
    "max_pool2d": _from_rank(4, lambda x: F.max_pool2d(x, 3, 1, 1), exactly=True),
    "avg_pool2d": _from_rank(4, lambda x: F.avg_pool2d(x, 3, 1, 1), exactly=True),
    "avg_pool2d_inside": _from_rank(4, lambda x: F.avg_pool2d(x, 2, count_include_pad=False), exactly=True),
    "upsample_nearest": _from_rank(4, lambda x: F.interpolate(x, scale_factor=2.0), exactly=True),
    "upsample_bilinear": _from_rank(
        4, lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), exactly=True
    ),
    "transpose": _from_rank(3, lambda x: x.transpose(-1, -2)),
    "permute": _from_rank(4, lambda x: x.permute(0, 2, 3, 1), exactly=True),
    "flatten": _from_rank(3, lambda x: x.flatten(1)),
    "unsqueeze": _elementwise(lambda x: x.unsqueeze(-1)),
    "unflatten": _from_rank(2, lambda x: x.unflatten(-1, (2, -1))),
    "slice": _from_rank(2, lambda x: x[:, 1:]),
    "strided_slice": _from_rank(2, lambda x: x[..., ::2]),
    "chunk": _from_rank(2, lambda x: x.chunk(2, 1)[0]),
    "pad": _from_rank(2, lambda x: F.pad(x, (1, 1))),
    "pad_reflect": _from_rank(4, lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), exactly=True),
    "expand": _elementwise(lambda x: x.unsqueeze(1).expand(-1, 3, *x.shape[1:])),
    "gather": _gathered,
    "flip": _from_rank(2, lambda x: x.flip(1)),
    "to_double_and_back": _elementwise(lambda x: x.double().float()),
    "where": _elementwise(lambda x: torch.where(x > 0, x, x * 0.5)),
    "pixel_shuffle": _from_rank(4, lambda x: F.pixel_shuffle(x, 2), exactly=True),
}  # fmt: skip

RANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "close together": lambda x: 0.01 * x,
    "close together, far from zero": lambda x: 3 + 0.01 * x,
    "large": lambda x: 1e3 * x,
    "negative": lambda x: -x.abs() - 0.1,
    "positive": lambda x: x.abs(),
    "mostly zero": lambda x: x * (x > 1),
    "zero": lambda x: 0 * x,
}


class Case(nn.Module):
    """One case: what is computed of `data`, (ROWS, ...) or, `fixed`, of the one shape it takes."""

    def __init__(self, name: str, data: Tensor, *, fixed: bool = False) -> None:
        super().__init__()
        self.name, self.data, self.fixed = name, data, fixed
        self.calls: list[Call] = []
        self._value: Any = data

    def follow(self, call: Call | None) -> bool:
        """Let a call follow; False where it is None, fails, or gives what is no finite tensor of floats."""
        try:
            value = call(self._value) if call is not None else None
        except Exception:  # operators raise anything
            return False
        if not _is_plain(value):
            return False
        self._value = value
        self.calls.append(call)  # type: ignore[arg-type]
        return True

    def round(self, draw: Draw) -> None:
        """Let the value go through integers."""
        self.follow(draw.pair(self._value))

    def forward(self, x: Tensor) -> Tensor:
        """Compute it."""
        for call in self.calls:
            x = call(x)
        return x

    @property
    def value(self) -> Tensor:
        """What is computed of the data."""
        assert isinstance(self._value, Tensor)
        return self._value


@torch.no_grad()
def pair(names: Sequence[str], seed: int) -> Case | None:
    """Make a case of operators one behind the other; None where they do not fit."""
    rng = random.Random(f"{seed} {' '.join(names)}")
    kind = rng.choice([*RANGES])
    start = torch.randn(rng.choice(_SHAPES), generator=torch.Generator().manual_seed(rng.getrandbits(32)))
    places = [rng.random() < 0.7 for _ in range(len(names) + 1)]  # where there are integers
    written = "".join(f"{'Q ' if there else ''}{name} " for there, name in zip(places, (*names, ""), strict=True))
    case = Case(f"{written.strip()}, {start.dim()}-D, {kind}", RANGES[kind](start))
    draw = Draw(rng, case, integers=False)
    for name, there in zip(names, places, strict=False):
        if there:
            case.round(draw)
        draw.integers = there and rng.random() < 0.7
        if not case.follow(MAKERS[name](draw, case.value)):
            return None
    if places[-1]:
        case.round(draw)
    return case


def described(seed: int) -> Iterator[Callable[[], Case | None]]:
    """Yield makers of cases of the operators that torch describes, four for each."""
    for info in described_by_torch():
        if torch.float32 in info.supported_dtypes("cpu"):
            for number in range(4):
                yield lambda info=info, number=number: _of_description(info, number, seed)


@torch.no_grad()
def _of_description(info: Any, number: int, seed: int) -> Case | None:
    torch.manual_seed(seed)
    name = f"{info.name}{'.' + info.variant_test_name if info.variant_test_name else ''}"
    rng = random.Random(f"{seed} {name} {number}")
    samples = [*info.sample_inputs("cpu", torch.float32)]  # all of them first: some write NaN to those before
    samples = [sample for sample in samples if _is_plain(sample.input) and sample.input.dim()][:24]
    if not samples:
        return None
    sample = rng.choice(samples)
    data = sample.input.detach().contiguous()
    others, structure = pytree.tree_flatten((sample.args, sample.kwargs))
    case = Case(f"{'Q ' if number & 1 else ''}{name}{' Q' if number & 2 else ''}", data, fixed=True)
    draw = Draw(rng, case, integers=False)
    held = [draw.held(v.detach()) if isinstance(v, Tensor) else (lambda v=v: v) for v in others]

    def call(x: Tensor) -> Any:
        args, kwargs = pytree.tree_unflatten([read() for read in held], structure)
        result = info.op(x, *args, **kwargs)
        return result[0] if isinstance(result, tuple | list) and result else result

    if number & 1:
        case.round(draw)
    if not case.follow(call) or not torch.equal(call(data), call(data)):
        return None
    if number & 2:
        case.round(draw)
    return case


def _is_plain(value: Any) -> bool:
    """Whether a value is a finite tensor of floats, neither empty nor large."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.dtype is not torch.float32:
        return False
    return 0 < value.numel() <= _MOST_ELEMENTS and bool(value.isfinite().all())
