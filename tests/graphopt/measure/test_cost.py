"""Cost: counts that can be checked by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

import graphopt
from graphopt.capturing.capture import capture
from graphopt.ir.operators import PRODUCTS
from graphopt.ir.torch_internals import FakeTensorMode
from graphopt.measure.cost import cost, node_flops
from graphopt.passes.fold import Fold
from graphopt.testing import run_pass


def test_a_convolution_and_a_linear() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 5))
    found = cost(capture(model, torch.randn(3, 3, 8, 8)))
    convolution, linear = 4 * 3 * 3 * 3, 256 * 5
    assert found.parameters == convolution + 8 + linear + 5
    assert found.flops == 2 * (convolution * 64 + linear)  # one sample, a multiply-add is two
    statistics = 2 * 4 * 4  # running mean and variance; the number of batches is read by nobody
    assert found.bytes == 4 * found.parameters + statistics


def test_tied_weights_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.embedding(ids))
            return logits

    found = cost(capture(Tied(), torch.ones(2, 3, dtype=torch.int64)))
    assert (found.parameters, found.bytes) == (40, 160)


class Kinds(nn.Module):
    """A weight of every kind, and what is none."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(torch.randn(8, 3, dtype=torch.complex64), requires_grad=False)
        self.narrow = nn.Parameter(torch.randn(3, 4, dtype=torch.float16))
        self.register_buffer("stored", torch.ones(4, 5, dtype=torch.int8))
        self.register_buffer("mask", torch.ones(4, dtype=torch.bool))
        self.register_buffer("old_mask", torch.tensor([0, 1, 1, 0], dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x.to(torch.complex64) @ self.spectrum).real.half() @ self.narrow
        return (y.float() * self.mask * self.old_mask) @ (self.stored * self.scale)


def test_every_kind_of_weight_counts_and_nothing_else() -> None:
    found = cost(capture(Kinds(), torch.randn(2, 8)))
    assert found.parameters == 8 * 3 + 3 * 4 + 4 * 5
    assert found.bytes == 8 * 8 * 3 + 2 * 3 * 4 + 4 * 5 + 4 + 4 + 4 * 5


def test_a_complex_weight_that_a_pass_stores_still_counts() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 3, dtype=torch.complex64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.to(torch.complex64) @ (self.w * 2)).abs()

    program = capture(Scaled(), torch.randn(2, 8))
    folded = run_pass(Fold(), program, torch.randn(2, 8))
    assert len(list(folded.parameters())) == 1
    assert cost(folded).parameters == cost(program).parameters == 24


def test_quantized_weights_and_biases_count_and_their_scales_do_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(256, 10)).eval()
    data = torch.randn(16, 3, 8, 8)
    for target in ("onnxruntime", "tensorrt"):
        result = graphopt.optimize(model, data, "int8", target, lower=False, bench=False)
        assert cost(result.program).parameters == cost(result.original).parameters


def test_a_view_counts_what_it_spans_of_its_storage() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.randn(8, 4)
            self.top, self.same = nn.Parameter(whole[:4]), nn.Parameter(whole[:4])
            self.few = nn.Parameter(torch.randn(1000)[:4])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.top @ self.same * self.few

    found = cost(capture(Views(), torch.randn(2, 4), share_tensors=True))
    assert (found.parameters, found.bytes) == (16 + 4, 4 * 2 * 16 + 4 * 4)


def test_a_static_program_counts_one_sample() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.fc(x.view(2, 4))
            return y

    assert cost(capture(Fixed(), torch.randn(2, 4))).flops == 2 * 12


def test_counting_leaves_the_batch_dynamic() -> None:
    program = capture(nn.Linear(4, 3), torch.randn(8, 4))
    cost(program)
    (placeholder,) = [node for node in program.graph.nodes if node.op == "placeholder"]
    assert isinstance(placeholder.meta["val"].shape[0], torch.SymInt)
    assert not placeholder.meta["val"].shape[0].node.expr.is_number


def test_branches_are_counted() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = torch.cond(x.sum() > 0, self.one, self.other, (x,))
            return y

    assert cost(capture(Branching(), torch.randn(2, 4))).flops == 2 * 12  # one of the two is taken


class Repeated(nn.Module):
    """A layer that runs for each of five rows, and one in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.of_rows, self.of_rounds = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def step(state: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            state = self.of_rows(state + row).tanh()
            return state, state.clone()

        last = scan(step, x[:, 0] * 0, x.transpose(0, 1))[0]

        def again(count: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return count + 1, self.of_rounds(h)

        found: torch.Tensor = while_loop(lambda count, h: count < 3, again, (torch.tensor(0), last))[1]
        return found


def test_each_step_of_a_scan_is_counted_and_one_round_of_a_loop() -> None:
    program = capture(Repeated(), torch.randn(3, 5, 8))
    assert cost(program).flops == 2 * 8 * 8 * (5 + 1)


def test_recurrent_layers_are_counted() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 16, num_layers=2, bidirectional=True, proj_size=4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.lstm(x)[0]
            return y

    first, second = 64 * 8 + 64 * 4 + 16 * 4, 64 * 8 + 64 * 4 + 16 * 4
    found = cost(capture(Last(), torch.randn(3, 5, 8)))
    assert found.flops == 2 * 5 * 2 * (first + second)  # a multiply-add is two, steps, directions


@pytest.mark.parametrize(
    "selected",
    [
        lambda x: x[x[:, 0] > 0],
        lambda x: x[torch.where(x[:, 0] > 0)[0]],
        lambda x: x[x[:, 0].nonzero(as_tuple=True)[0]],
        lambda x: x.repeat_interleave((x[:, 0] > 0).int(), 0),
    ],
)
def test_sizes_that_depend_on_data_count_as_one(selected: Callable[[torch.Tensor], torch.Tensor]) -> None:
    class Selecting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.fc(selected(x))
            return y

    assert cost(capture(Selecting(), torch.randn(1, 4), dynamic_shapes={"x": {0: None}})).flops == 2 * 12


def test_sizes_that_depend_on_data_fit_a_kernel() -> None:
    class Cropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 8, 3, bias=False)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            longest = lengths.sum().item()
            torch._check(longest >= 5)  # type: ignore[no-untyped-call]
            torch._check(longest <= 16)  # type: ignore[no-untyped-call]
            y: torch.Tensor = self.conv(x[:, :, :longest])
            return y.mean(2)

    program = capture(Cropping(), (torch.randn(4, 3, 16), torch.tensor([3, 4])))
    assert cost(program).flops == 2 * 3 * (8 * 3 * 3)  # of what is known to be at least 5 long


def test_an_argument_that_is_no_tensor_may_come_first() -> None:
    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4, bias=False)

        def forward(self, flag: bool, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.fc(x)
            return y.relu() if flag else y

    assert cost(capture(Switched(), (True, torch.randn(3, 8)))).flops == 2 * 32


def test_fused_attention_is_counted_whatever_kernel_runs_it() -> None:
    class Attention(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v)

    for width in (8, 6):  # the CPU's fused kernel wants query and value equally wide
        inputs = tuple(torch.zeros(2, 3, tokens, d) for tokens, d in ((5, 8), (7, 8), (7, width)))
        assert cost(capture(Attention(), inputs)).flops == 2 * 3 * 5 * 7 * (8 + width)


aten = torch.ops.aten
# Call, shapes of its tensors and other arguments, how many multiply-adds there are.
PRODUCTS_BY_HAND: dict[str, tuple[Any, tuple[Any, ...], int]] = {
    "mm": (aten.mm.default, ((8, 16), (16, 4)), 8 * 16 * 4),
    "bmm": (aten.bmm.default, ((3, 8, 16), (3, 16, 4)), 3 * 8 * 16 * 4),
    "addmm": (aten.addmm.default, ((4,), (8, 16), (16, 4)), 8 * 16 * 4),
    "baddbmm": (aten.baddbmm.default, ((4,), (3, 8, 16), (3, 16, 4)), 3 * 8 * 16 * 4),
    "addbmm": (aten.addbmm.default, ((8, 4), (3, 8, 16), (3, 16, 4)), 3 * 8 * 16 * 4),
    "linear": (aten.linear.default, ((8, 16), (4, 16)), 8 * 16 * 4),
    "linear of one output": (aten.linear.default, ((8, 16), (16,)), 8 * 16),
    "conv2d in groups": (
        aten.conv2d.default,
        ((2, 6, 9, 9), (4, 3, 3, 2), None, [2, 1], [1, 0], [1, 1], 2),
        2 * 4 * 40 * 18,
    ),
    "conv1d padded": (aten.conv1d.padding, ((2, 3, 10), (5, 3, 3), (5,), [1], "same"), 2 * 5 * 10 * 9),
    "conv3d of one sample": (aten.conv3d.default, ((3, 4, 4, 4), (5, 3, 2, 2, 2)), 5 * 27 * 24),
    "matmul": (aten.matmul.default, ((8, 16), (16,)), 8 * 16),
    "mv": (aten.mv.default, ((8, 16), (16,)), 8 * 16),
    "addmv": (aten.addmv.default, ((8,), (8, 16), (16,)), 8 * 16),
    "dot": (aten.dot.default, ((16,), (16,)), 16),
    "vdot": (aten.vdot.default, ((16,), (16,)), 16),
    "inner": (aten.inner.default, ((8, 16), (4, 16)), 8 * 16 * 4),
    "einsum": (aten.einsum.default, ("bi,bi->b", [(8, 16), (8, 16)]), 8 * 16),
    "tensordot": (aten.tensordot.default, ((8, 16), (16, 4), [1], [0]), 8 * 16 * 4),
    "bilinear": (aten.bilinear.default, ((8, 16), (8, 5), (3, 16, 5), (3,)), 8 * 3 * 16 * 5),
    "linalg_multi_dot": (aten.linalg_multi_dot.default, ([(8, 16), (16, 4), (4, 2)],), 2 * 16 * (4 + 8)),  # from behind
    "chain_matmul": (aten.chain_matmul.default, ([(8, 16), (16, 4)],), 8 * 16 * 4),
    "linalg_vecdot": (aten.linalg_vecdot.default, ((8, 1, 16), (3, 16)), 8 * 3 * 16),
    "linalg_vecdot of vectors": (aten.linalg_vecdot.default, ((16,), (16,)), 16),
    "cdist": (aten.cdist.default, ((2, 8, 16), (2, 4, 16), 2.0), 2 * 8 * 4 * 16),
    "cdist by other means": (aten.cdist.default, ((30, 16), (40, 16), 2.0, 1), 30 * 40 * 16),
    "cdist of one": (aten.cdist.default, ((8, 16), (4, 16), 1.0), 8 * 4 * 16),
    "lstm_cell": (aten.lstm_cell.default, ((8, 16), [(8, 4), (8, 4)], (16, 16), (16, 4)), 8 * 4 * 4 * (16 + 4)),
}


@pytest.mark.parametrize("name", PRODUCTS_BY_HAND)
def test_every_product_counts_twice_its_multiply_adds(name: str) -> None:
    target, arguments, multiply_adds = PRODUCTS_BY_HAND[name]
    graph = fx.Graph()

    def made(argument: Any, mode: FakeTensorMode) -> Any:
        if isinstance(argument, list) and argument and isinstance(argument[0], tuple):
            return [made(item, mode) for item in argument]
        if not isinstance(argument, tuple):
            return argument
        node = graph.placeholder(f"x{len(graph.nodes)}")
        node.meta["val"] = mode.from_tensor(torch.empty(argument))
        return node

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        args = tuple(made(argument, mode) for argument in arguments)
        call = graph.call_function(target, args)
        call.meta["val"] = target(*fx.map_arg(args, lambda node: node.meta["val"]))
    assert node_flops(call) == 2 * multiply_adds


def test_every_product_of_the_family_is_counted_by_hand() -> None:
    assert set(PRODUCTS_BY_HAND) >= PRODUCTS.names


def test_packed_zero_points_are_no_weights() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Buffer(torch.full((6, 4), 0x21, dtype=torch.uint8))
            self.zeros = nn.Buffer(torch.full((6, 1), 0x32, dtype=torch.uint8))
            self.scale = nn.Buffer(torch.ones(6, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            unpack = torch.ops.graphopt.unpack
            zeros = unpack(self.zeros, 2, 4, 0)
            return x @ torch.ops.graphopt.dequantize(unpack(self.rows, 8, 4, 0), self.scale, zeros, 1, 4).t()

    assert cost(capture(Packed(), (torch.ones(2, 8),))).parameters == 6 * 4
