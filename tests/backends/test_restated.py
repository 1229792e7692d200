"""What the exporter leaves something of out is said in other words, or refused by its name."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import nn

from graphopt import capture
from graphopt.backends.onnx_lowering.lowering import Style, lower
from graphopt.backends.onnxruntime import OnnxRuntimeBackend
from graphopt.errors import LoweringError
from graphopt.ir.training import set_argument

STYLE = Style(opset=20)


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class BatchStatistics(nn.Module):
    """Has running statistics and does not use them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.norm.weight.data.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, var = self.norm.running_mean.clone(), self.norm.running_var.clone()
        return nn.functional.batch_norm(x, mean, var, self.norm.weight, self.norm.bias, training=True)


SERVED = {
    "2d": (
        nn.Sequential(
            nn.AvgPool2d(2, divisor_override=3),
            nn.RReLU(0.1, 0.5),
            nn.AvgPool2d((2, 3), 1, padding=1, count_include_pad=False, divisor_override=1),
            nn.Conv2d(3, 3, 1),
            nn.AvgPool2d(2, divisor_override=8),
        ),
        (2, 3, 9, 9),
    ),
    "3d": (nn.AvgPool3d(2, divisor_override=5), (2, 3, 4, 4, 5)),
    "log of small": (nn.Sequential(Scaled(200.0), nn.LogSigmoid()), (2, 3, 9)),
    "norms by the batch": (
        nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), Scaled(3.0), BatchStatistics(3)),
        (2, 3, 9),
    ),
}


@pytest.mark.parametrize("name", SERVED)
def test_what_the_exporter_gets_wrong_computes_what_torch_does(name: str, tmp_path: Path) -> None:
    model, shape = SERVED[name]
    backend = OnnxRuntimeBackend()
    program = capture(model, torch.randn(shape))
    assert backend.verify(backend.lower(program, tmp_path / "model.onnx"), program) < 1e-5


class Attention(nn.Module):
    """Attends without an axis of heads: of 2 and of 3 axes, masked and not, heads that share keys."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(2, 5, 8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        attend = nn.functional.scaled_dot_product_attention
        scores = x @ x.transpose(1, 2)
        queries = x.mean(0).expand(4, 5, 8) * torch.arange(1.0, 5.0).view(4, 1, 1)
        return (
            attend(x, x, x * 2),
            attend(x, x, x, attn_mask=scores, scale=0.3),
            attend(x, x, x, attn_mask=scores[0] > 0),
            attend(x, x, x, is_causal=True),
            attend(self.keys[0], self.keys[1], x[0]),
            attend(queries, self.keys, self.keys, enable_gqa=True),
        )


def test_attention_without_heads(tmp_path: Path) -> None:
    backend = OnnxRuntimeBackend()
    program = capture(Attention(), torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)))
    assert backend.verify(backend.lower(program, tmp_path / "model.onnx"), program) < 1e-5


class Padded(nn.Module):
    """Attention under masks that let some queries look at no key; the last lets none in any batch, and is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("causal", torch.ones(5, 5, dtype=torch.bool).tril(-1))

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        attend = nn.functional.scaled_dot_product_attention
        heads = x.unflatten(2, (2, 4)).transpose(1, 2)
        mask = keep[:, None, None, :] & self.causal
        scores = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        return (
            attend(heads, heads, heads, attn_mask=mask),
            attend(heads, heads, heads, attn_mask=scores),
            attend(x, x, x, attn_mask=mask[:, 0]),
            attend(heads, heads, heads, attn_mask=self.causal),
            attend(heads, heads, heads, attn_mask=self.causal | torch.eye(5, dtype=torch.bool)),
        )


def test_a_query_that_may_look_at_no_key_gets_nothing(tmp_path: Path) -> None:
    x, keep = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0)), torch.ones(4, 5, dtype=torch.bool)
    model = Padded().eval()
    artifact = OnnxRuntimeBackend().lower(capture(model, (x, keep)), tmp_path / "model.onnx")
    keep[1, :3] = keep[2] = False
    wanted = model(x, keep)
    assert all(float(one.abs().amax((-1, -2)).min()) == 0 for one in wanted[:1])
    for found, expected in zip(artifact.session()(x.numpy(), keep.numpy()), wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)


class Copies(nn.Module):
    """Copies a row, a number, another type and the whole into tensors of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("held", torch.zeros(4, 8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        row, exact = torch.zeros(4, 8), torch.zeros(4, 8, dtype=torch.float64)
        row.copy_(x[:1])
        exact.copy_(x[0])
        self.held.copy_(x.sum())
        whole = torch.zeros_like(x)
        whole.copy_(x)
        return row * 2, exact.float() * 2, self.held * 2, whole * 2


def test_what_is_copied_may_be_smaller(tmp_path: Path) -> None:
    backend = OnnxRuntimeBackend()
    program = capture(Copies(), torch.randn(3, 8, generator=torch.Generator().manual_seed(0)))
    assert backend.verify(backend.lower(program, tmp_path / "model.onnx"), program) < 1e-6


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (nn.LSTM(4, 6, proj_size=3), (5, 2, 4), r"The LSTM at .*\.py:\d+ projects its state \(proj_size\)"),
        (nn.LSTM(4, 6, 2, proj_size=3, bidirectional=True), (5, 2, 4), "projects its state"),
        (nn.AvgPool2d(2, ceil_mode=True, divisor_override=3), (2, 3, 5, 5), "divides by divisor_override in windows"),
    ],
)
def test_what_onnx_has_no_form_of_is_named(model: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(LoweringError, match=reason):
        lower(capture(model, torch.randn(shape)), STYLE)


class Divides(nn.Module):
    """Divides integers in every way."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        modes = (x.div(y, rounding_mode=mode) for mode in ("trunc", "floor"))
        return *modes, x // y, x % y, torch.fmod(x, y), x // -1, x % -1, x // 2, x % 3, x // (len(x) - 5), x % len(x)


def test_integers_divided_by_minus_one_end_no_process(tmp_path: Path) -> None:
    x, y = torch.tensor([-(2**63), -7, 7, 5]), torch.tensor([-1, 2, -2, -1])
    backend = OnnxRuntimeBackend()
    program = capture(Divides(), (x + 1, y))
    artifact = backend.lower(program, tmp_path / "model.onnx")
    assert backend.verify(artifact, program) == 0
    session = artifact.session()
    for ours, wanted in zip(session(x.numpy(), y.numpy()), program(x, y), strict=True):
        assert ours.tolist() == wanted.tolist()


def test_a_division_towards_zero_that_a_pass_writes(tmp_path: Path) -> None:
    """Capture writes none, so that here alone it would be taken for one that rounds down."""

    class Down(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.div(x.abs() + 1, rounding_mode="floor")

    backend = OnnxRuntimeBackend()
    program = capture(Down(), torch.arange(-8, 8)).copy()
    (divided,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.div.Tensor_mode)
    set_argument(divided, "rounding_mode", "trunc")
    program.graph_module.recompile()
    assert not program(torch.arange(-8, 8)).any()
    assert backend.verify(backend.lower(program, tmp_path / "model.onnx"), program) == 0


@pytest.mark.parametrize("divisor", [2, -1])
def test_numbers_of_the_data_are_not_divided_by_minus_one(divisor: int) -> None:
    class Item(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x.max().item() // divisor

    program = capture(Item(), torch.arange(6).view(2, 3))
    if divisor == 2:
        lower(program, STYLE)
    else:
        with pytest.raises(LoweringError, match=r"A number that depends on the data is divided at .*, by one that may"):
            lower(program, STYLE)


class Tiny(nn.Module):
    """Adds and multiplies by what is nearly nothing, and by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("epsilon", torch.tensor(1e-9))
        self.register_buffer("zero", torch.tensor(0.0))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            x / (x.norm(dim=-1, keepdim=True) + 1e-8),
            torch.log(x.abs() + self.epsilon),
            torch.rsqrt(1e-12 + x * x),
            torch.rsqrt(x * x - (-1e-10)),
            (x * 1.000009 - x) / 1.000009,
            (x * 1 + 0 - self.zero) / 1.0 + 0.0,
        )


def test_what_is_nearly_nothing_is_something(tmp_path: Path) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    model = Tiny().eval()
    artifact = OnnxRuntimeBackend().lower(capture(model, (x,)), tmp_path / "model.onnx")
    x[1] = 0
    for found, expected in zip(artifact.session()(x.numpy()), model(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-12)
    nodes = [node.op_type for node in ir.load(artifact.path).graph]
    assert (nodes.count("Add"), nodes.count("Div")) == (3, 2)  # those that change nothing are gone


class Counted(nn.Module):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(ids, 5).float().sum(1)


def test_one_hot(tmp_path: Path) -> None:
    program = capture(Counted(), torch.arange(10).view(2, 5) % 5)
    backend = OnnxRuntimeBackend()
    assert backend.verify(backend.lower(program, tmp_path / "model.onnx"), program) == 0


class Unlike(nn.Module):
    """Calls whose operands are of several types."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        low, high = x > 0, x < 1
        raised = x * 2
        raised[:, ids[0, :3]] += 1
        return (
            raised,
            x.clamp(0, 0.5),
            x.clamp(-0.5, 1),
            self.table[ids],
            self.table[ids, ids.remainder(3)],
            (low + high).float(),
            (low * high).float(),
            1.0 - ids,
            x.amax(),
            x.amin(),
            torch.relu(x.clamp(-3, -1)),
        )


def test_operands_of_several_types(tmp_path: Path) -> None:
    x, ids = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)), torch.arange(28).view(4, 7) % 7
    model = Unlike().eval()
    artifact = OnnxRuntimeBackend().lower(capture(model, (x, ids.int())), tmp_path / "model.onnx")
    for found, expected in zip(artifact.session()(x.numpy(), ids.int().numpy()), model(x, ids.int()), strict=True):
        assert torch.equal(torch.from_numpy(found), expected)


def test_a_logarithm_of_a_sigmoid_has_a_tail(tmp_path: Path) -> None:
    class Tail(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.log(torch.sigmoid(x))

    x = torch.linspace(-40, 40, 21).view(3, 7)
    artifact = OnnxRuntimeBackend().lower(capture(Tail().eval(), (x,)), tmp_path / "model.onnx")
    torch.testing.assert_close(torch.from_numpy(artifact.session()(x.numpy())[0]), Tail()(x), rtol=1e-4, atol=1e-6)
