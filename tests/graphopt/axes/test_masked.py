"""Masked equivalence: small networks pruned by hand, rightly and wrongly.

The pruned programs here are written down, not made by the inference (but for the last test): what is judged is the
oracle.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, fx, nn

from graphopt.axes.infer import infer
from graphopt.axes.proof.masked import TOLERANCE, check_masked_equivalence, check_slices, masked_outputs
from graphopt.axes.proof.randomise import randomise
from graphopt.axes.proof.run import doubled
from graphopt.axes.proof.step import MaskedStep, masked_rule, tensor_result
from graphopt.axes.proof.value import CannotProveError, Value, from_mask, to_mask
from graphopt.axes.rewrite import remove, slices
from graphopt.capturing.capture import capture
from graphopt.errors import VerifyError
from graphopt.ir.graph import tensor_attribute
from tests import models

_EXACT = 1e-12  # float64 rounding of a few operators; far under TOLERANCE
assert _EXACT < TOLERANCE

Tensors = dict[str, Tensor]
Kept = dict[str, dict[int, list[int]]]
Body = Callable[[Mapping[str, Tensor], Tensor], Tensor]


class Holder(nn.Module):
    """Runs `body` on its parameters by name and an input."""

    def __init__(self, body: Body, tensors: Tensors, buffers: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.body = body
        for name, tensor in tensors.items():
            if name in buffers:
                self.register_buffer(name, tensor.clone())
            else:
                self.register_parameter(name, nn.Parameter(tensor.clone()))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(dict([*self.named_parameters(), *self.named_buffers()]), x)


def graph_of(body: Body, tensors: Tensors, x: Tensor, buffers: tuple[str, ...] = ()) -> fx.GraphModule:
    exported = torch.export.export(Holder(body, tensors, buffers), (x,), strict=False)
    gm = exported.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    return gm


def cut(tensors: Tensors, kept: Kept) -> Tensors:
    result = {}
    for name, tensor in tensors.items():
        for dim, indices in kept.get(name, {}).items():
            tensor = tensor.index_select(dim, torch.tensor(indices))
        result[name] = tensor
    return result


def error_of(full: Body, small: Body, tensors: Tensors, kept: Kept, x: Tensor, buffers: tuple[str, ...] = ()) -> float:
    """Prove that `small` on the kept tensors is `full` with the others masked."""
    original = graph_of(full, tensors, x, buffers)
    pruned = graph_of(small, cut(tensors, kept), x, buffers)
    return check_masked_equivalence(original, pruned, kept, (x,))


def ones(*shapes: tuple[str, tuple[int, ...]]) -> Tensors:
    """Return parameters as a careless initialisation leaves them: all ones, which prove nothing by themselves."""
    return {name: torch.ones(shape) for name, shape in shapes}


HIDDEN = [1, 2, 6]  # of 8
IMAGE = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(2))


def between(middle: Callable[[Mapping[str, Tensor], Tensor], Tensor]) -> Body:
    """Put `middle` between a linear into 8 hidden features and one out of them."""
    return lambda p, x: F.linear(middle(p, F.linear(x, p["up"], p["up_bias"])), p["down"], p["down_bias"])


LINEARS = ones(
    ("up", (8, 6)),
    ("up_bias", (8,)),
    ("down", (5, 8)),
    ("down_bias", (5,)),
    ("gain", (8,)),
    ("shift", (8,)),
    ("mix", (4, 4, 1)),
)
LINEARS_KEPT: Kept = {name: {0: HIDDEN} for name in ("up", "up_bias", "gain", "shift")} | {"down": {1: HIDDEN}}


def by_hand(p: Mapping[str, Tensor], h: Tensor) -> Tensor:
    centred = h - h.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5) * p["gain"]


MIDDLES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor] | None]] = {
    "activation": (lambda p, h: F.gelu(h) * p["gain"], None),
    "softmax": (lambda p, h: h.softmax(-1), None),
    "log_softmax": (lambda p, h: h.log_softmax(-1), None),
    "cumulative sum": (lambda p, h: h.cumsum(-1), None),
    "minus mean": (lambda p, h: h - h.mean(-1, keepdim=True), None),
    "over largest": (lambda p, h: h / (1 + h.abs().amax(-1, keepdim=True)), None),
    "unit length": (lambda p, h: F.normalize(h, dim=-1), None),
    "standardised": (lambda p, h: (h - h.mean(-1, True)) / h.std(-1, keepdim=True), None),
    "log-sum": (lambda p, h: h - h.logsumexp(-1, keepdim=True), None),
    "layer norm by hand": (by_hand, None),
    "layer norm": (
        lambda p, h: F.layer_norm(h, (8,), p["gain"], p["shift"]),
        lambda p, h: F.layer_norm(h, (3,), p["gain"], p["shift"]),
    ),
    "rms norm": (lambda p, h: F.rms_norm(h, (8,), p["gain"]), lambda p, h: F.rms_norm(h, (3,), p["gain"])),
    "view and back": (
        lambda p, h: h.view(8, 8).t().reshape(8, 2, 4).permute(1, 2, 0),
        lambda p, h: h.view(8, 3).t().reshape(3, 2, 4).permute(1, 2, 0),
    ),
    "mixed rows": (lambda p, h: F.conv1d(h, p["mix"]), None),
    "padded rows": (lambda p, h: F.pad(h, (0, 0, 1, 2)).relu(), None),
    "zeros in front": (
        lambda p, h: torch.cat([torch.zeros(2, 1, 8), h], 1).tanh(),
        lambda p, h: torch.cat([torch.zeros(2, 1, 3), h], 1).tanh(),
    ),
    "written through a view": (
        lambda p, h: _written(h, 8),
        lambda p, h: _written(h, 3),
    ),
    "gram matrix": (lambda p, h: (h @ h.transpose(1, 2)).softmax(-1) @ h, None),
    "einsum": (lambda p, h: torch.einsum("bic,bjc->bij", h, h).softmax(-1) @ h, None),
    "attention": (
        lambda p, h: F.scaled_dot_product_attention(h, h, h),
        lambda p, h: F.scaled_dot_product_attention(h, h, h, scale=8**-0.5),
    ),
}


def _written(h: Tensor, width: int) -> Tensor:
    buffer = torch.zeros(2, 5, width)
    buffer[:, 1:] = h
    return buffer * 2


@pytest.mark.parametrize("name", MIDDLES)
def test_linear_pairs_are_equal_to_rounding(name: str) -> None:
    full, small = MIDDLES[name]
    assert error_of(between(full), between(small or full), LINEARS, LINEARS_KEPT, ROWS) < _EXACT


CONVOLUTIONS = ones(
    ("up", (8, 3, 3, 3)), ("up_bias", (8,)), ("mean", (8,)), ("var", (8,)), ("gain", (8,)),
    ("shift", (8,)), ("down", (4, 8, 1, 1)),
)  # fmt: skip
CONVOLUTIONS_KEPT: Kept = {n: {0: HIDDEN} for n in ("up", "up_bias", "mean", "var", "gain", "shift")} | {
    "down": {1: HIDDEN}
}


def around(middle: Callable[[Mapping[str, Tensor], Tensor], Tensor]) -> Body:
    """Put `middle` between a convolution into 8 channels and one out of them."""
    return lambda p, x: F.conv2d(middle(p, F.conv2d(x, p["up"], p["up_bias"], padding=1)), p["down"])


CHANNELS: dict[str, Callable[[Mapping[str, Tensor], Tensor], Tensor]] = {
    "batch norm": lambda p, h: F.batch_norm(h, p["mean"], p["var"], p["gain"], p["shift"]).relu(),
    "instance norm": lambda p, h: F.instance_norm(h, weight=p["gain"], bias=p["shift"]),
    "one group": lambda p, h: F.group_norm(h, 1, p["gain"], p["shift"]),
    "pooling": lambda p, h: F.max_pool2d(F.avg_pool2d(h, 3, 1, 1), 2),
    "resize": lambda p, h: F.interpolate(h, scale_factor=2.0, mode="bilinear"),
    "gate by channel mean": lambda p, h: h * h.mean((2, 3), keepdim=True).sigmoid(),
    "gate by all": lambda p, h: h * h.mean((1, 2, 3), keepdim=True).sigmoid(),
}


@pytest.mark.parametrize("name", CHANNELS)
def test_convolution_pairs_are_equal_to_rounding(name: str) -> None:
    body = around(CHANNELS[name])
    assert error_of(body, body, CONVOLUTIONS, CONVOLUTIONS_KEPT, IMAGE, buffers=("mean", "var")) < _EXACT


def test_statistics_over_all_channels_are_not_taken_for_those_over_survivors() -> None:
    """A pruned mean that still divides by the old width is found at the very node."""
    full = between(lambda p, h: h - h.mean(-1, keepdim=True))
    small = between(lambda p, h: h - h.mean(-1, keepdim=True) * 0.375)
    original = graph_of(full, LINEARS, ROWS)
    pruned = graph_of(small, cut(LINEARS, LINEARS_KEPT), ROWS)
    with pytest.raises(VerifyError, match="node `sub`"):
        check_masked_equivalence(original, pruned, LINEARS_KEPT, (ROWS,))


def test_group_norm_of_removed_groups_and_of_removed_channels_in_each() -> None:
    tensors = CONVOLUTIONS
    for positions, groups in (([0, 1, 4, 5], 2), ([0, 2, 4, 6], 4), ([2, 3], 1)):
        kept: Kept = {n: {0: positions} for n in ("up", "up_bias", "gain", "shift", "mean", "var")}
        kept["down"] = {1: positions}
        full = around(lambda p, h: F.group_norm(h, 4, p["gain"], p["shift"]))
        small = around(lambda p, h, g=groups: F.group_norm(h, g, p["gain"], p["shift"]))  # type: ignore[misc]
        assert error_of(full, small, tensors, kept, IMAGE) < _EXACT


def test_group_norm_with_unequal_groups_has_no_masked_meaning() -> None:
    kept: Kept = {n: {0: [0, 1, 2, 4]} for n in ("up", "up_bias", "gain", "shift")} | {"down": {1: [0, 1, 2, 4]}}
    body = around(lambda p, h: F.group_norm(h, 2, p["gain"], p["shift"]))
    with pytest.raises(CannotProveError, match=r"aten\.group_norm .*do not form a box"):
        error_of(body, body, CONVOLUTIONS, kept, IMAGE)


def test_grouped_and_depthwise_convolutions() -> None:
    tensors = ones(("up", (8, 3, 1, 1)), ("mid", (8, 1, 3, 3)), ("down", (6, 4, 1, 1)))
    keep = [1, 3, 5, 6]  # two of each half

    def body(groups: int) -> Body:
        return lambda p, x: F.conv2d(
            F.conv2d(F.conv2d(x, p["up"]), p["mid"], groups=groups, padding=1), p["down"], groups=2
        )

    # Each half of `down` reads the same positions, so both halves must keep the same ones.
    aligned = [1, 3, 5, 7]
    kept: Kept = {"up": {0: aligned}, "mid": {0: aligned}, "down": {1: [1, 3]}}
    assert error_of(body(8), body(4), tensors, kept, IMAGE) < _EXACT
    wrong: Kept = {"up": {0: keep}, "mid": {0: keep}, "down": {1: [1, 3]}}
    with pytest.raises(VerifyError, match="conv2d_2"):
        error_of(body(8), body(4), tensors, wrong, IMAGE)


def test_transposed_convolutions() -> None:
    tensors = ones(("up", (3, 8, 2, 2)), ("mid", (8, 2, 3, 3)), ("down", (4, 8, 1, 1)))
    kept: Kept = {"up": {1: [2, 3, 6, 7]}, "mid": {0: [2, 3, 6, 7]}, "down": {1: [2, 3, 6, 7]}}

    def body(groups: int) -> Body:
        return lambda p, x: F.conv2d(
            F.conv_transpose2d(F.conv_transpose2d(x, p["up"], stride=2), p["mid"], groups=groups), p["down"]
        )

    assert error_of(body(4), body(2), tensors, kept, IMAGE) < _EXACT


def test_standardised_convolution_weights() -> None:
    """Weights standardised over what is left of them: batch norm in training mode, one channel per filter."""
    tensors = ones(("up", (8, 3, 1, 1)), ("gain", (4,)), ("down", (4, 8, 3, 3)))

    def body(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        weight = F.batch_norm(p["down"].flatten(1).unsqueeze(0), None, None, p["gain"], training=True)
        return F.conv2d(F.conv2d(x, p["up"]), weight.view(4, -1, 3, 3), padding=1)

    assert error_of(body, body, tensors, {"up": {0: HIDDEN}, "down": {1: HIDDEN}}, IMAGE) < _EXACT


def test_split_concat_and_shuffle() -> None:
    tensors = ones(("up", (8, 3, 1, 1)), ("down", (4, 12, 1, 1)))

    def full(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        a, b = F.conv2d(x, p["up"]).chunk(2, 1)
        h = torch.cat([a, b.relu(), a * b], 1)
        return F.conv2d(h.view(2, 3, 4, 5, 5).transpose(1, 2).flatten(1, 2), p["down"])

    def small(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        a, b = F.conv2d(x, p["up"]).chunk(2, 1)
        h = torch.cat([a, b.relu(), a * b], 1)
        return F.conv2d(h.view(2, 3, 2, 5, 5).transpose(1, 2).flatten(1, 2), p["down"])

    kept: Kept = {"up": {0: [0, 3, 4, 7]}, "down": {1: [0, 1, 2, 9, 10, 11]}}
    assert error_of(full, small, tensors, kept, IMAGE) < _EXACT
    kept["up"][0] = [0, 3, 5, 7]  # the halves no longer pair up
    with pytest.raises(VerifyError):
        error_of(full, small, tensors, kept, IMAGE)


def test_grouped_query_attention_loses_heads_and_width() -> None:
    tensors = ones(("q", (24, 6)), ("k", (12, 6)), ("v", (12, 6)), ("out", (5, 24)))

    def body(heads: int, width: int) -> Body:
        def run(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
            q, k, v = (F.linear(x, p[n]).view(2, 4, -1, width).transpose(1, 2) for n in "qkv")
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=6**-0.5)
            return F.linear(h.transpose(1, 2).reshape(2, 4, heads * width), p["out"])

        return run

    # 4 query heads on 2 key heads, width 6 -> 2 on 1 (the second key head), positions 0, 3 and 4 of each.
    q = [6 * head + place for head in (2, 3) for place in (0, 3, 4)]
    kv = [6 + place for place in (0, 3, 4)]
    kept: Kept = {"q": {0: q}, "k": {0: kv}, "v": {0: kv}, "out": {1: q}}
    assert error_of(body(4, 6), body(2, 3), tensors, kept, ROWS) < _EXACT
    kept["k"][0] = [6, 9, 11]
    with pytest.raises(VerifyError, match="scaled_dot_product_attention"):
        error_of(body(4, 6), body(2, 3), tensors, kept, ROWS)


def test_default_attention_scale_of_the_smaller_width_is_found() -> None:
    full = between(lambda p, h: F.scaled_dot_product_attention(h, h, h))
    with pytest.raises(VerifyError, match="scaled_dot_product_attention"):
        error_of(full, full, LINEARS, LINEARS_KEPT, ROWS)


@pytest.mark.parametrize("name", ["up_bias", "gain", "shift", "mean", "var", "down"])
def test_every_misplaced_slice_is_found(name: str) -> None:
    """At initialisation none of these would show: all are ones."""
    body = around(CHANNELS["batch norm"])
    kept = {key: dict(value) for key, value in CONVOLUTIONS_KEPT.items()}
    kept[name] = {dim: [1, 2, 7] for dim in kept[name]}
    with pytest.raises(VerifyError):
        error_of(body, body, CONVOLUTIONS, kept, IMAGE, buffers=("mean", "var"))


def test_what_is_not_initialised_is_alike() -> None:
    def filled(p: Mapping[str, Tensor], h: Tensor) -> Tensor:
        return h + torch.empty_like(h).fill_(0.5)

    assert error_of(between(filled), between(filled), LINEARS, LINEARS_KEPT, ROWS) < _EXACT


def test_embedding_columns_go_and_rows_stay() -> None:
    words = torch.tensor([[1, 4, 2], [0, 3, 3]])
    tensors = ones(("table", (5, 8)), ("down", (4, 8)))

    def body(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return F.linear(F.embedding(x, p["table"]), p["down"])

    assert error_of(body, body, tensors, {"table": {1: HIDDEN}, "down": {1: HIDDEN}}, words) < _EXACT
    with pytest.raises(CannotProveError, match="rows of the table"):
        error_of(body, body, tensors, {"table": {0: [0, 1, 2, 3]}}, words.clamp(max=3))


def test_recurrent_units_go() -> None:
    class Recurrent(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.cell, self.head = nn.LSTM(6, width, 1, batch_first=True), nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.cell(x)[0])
            return result

    def capture(width: int) -> fx.GraphModule:
        gm = torch.export.export(Recurrent(width), (ROWS,), strict=False).module(check_guards=False)
        assert isinstance(gm, fx.GraphModule)
        return gm

    rows = [8 * gate + place for gate in range(4) for place in HIDDEN]
    kept: Kept = {f"cell.{name}_l0": {0: rows} for name in ("weight_ih", "bias_ih", "bias_hh")}
    kept |= {"cell.weight_hh_l0": {0: rows, 1: HIDDEN}, "head.weight": {1: HIDDEN}}
    assert check_masked_equivalence(capture(8), capture(3), kept, (ROWS,)) < _EXACT
    kept["head.weight"] = {1: [0, 2, 6]}
    with pytest.raises(VerifyError, match="linear"):
        check_masked_equivalence(capture(8), capture(3), kept, (ROWS,))


def test_unknown_operator_with_removed_positions_is_refused_by_name() -> None:
    body = between(lambda p, h: torch.linalg.qr(h.transpose(1, 2))[0].transpose(1, 2))
    with pytest.raises(CannotProveError, match=r"aten\.linalg_qr .*masked_rule"):
        error_of(body, body, LINEARS, LINEARS_KEPT, ROWS)


def test_unknown_operator_on_whole_tensors_is_run() -> None:
    body = between(lambda p, h: h * p["gain"])

    def with_qr(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return body(p, torch.linalg.qr(x)[0] @ x.mean(1, keepdim=True).expand(-1, 4, -1))

    assert error_of(with_qr, with_qr, LINEARS, LINEARS_KEPT, ROWS) < _EXACT


def test_ordering_a_removed_dimension_is_refused() -> None:
    body = between(lambda p, h: h.sort(-1)[0])
    with pytest.raises(CannotProveError, match="the dimension that is ordered"):
        error_of(body, body, LINEARS, LINEARS_KEPT, ROWS)


def test_an_output_must_not_lose_positions() -> None:
    def body(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return F.linear(x, p["up"])

    with pytest.raises(VerifyError, match=r"loses positions of its dimensions \[2\]"):
        error_of(body, body, {"up": LINEARS["up"]}, {"up": {0: HIDDEN}}, ROWS)


def test_masked_outputs_are_those_of_the_zeroed_consumer() -> None:
    body = between(lambda p, h: h.relu())
    tensors = {n: torch.randn(t.shape, generator=torch.Generator().manual_seed(3)) for n, t in LINEARS.items()}
    gm = randomise(graph_of(body, tensors, ROWS), torch.Generator().manual_seed(4))
    (found,) = masked_outputs(gm, LINEARS_KEPT, [ROWS])
    values = {name: getattr(gm, name).clone() for name in ("up", "up_bias", "down", "down_bias")}
    values["down"][:, [0, 3, 4, 5, 7]] = 0
    torch.testing.assert_close(found, body(values, ROWS.double()))


def test_node_order_is_part_of_the_contract() -> None:
    class Two(nn.Module):
        def __init__(self, swapped: bool) -> None:
            super().__init__()
            self.swapped = swapped

        def forward(self, x: Tensor) -> Tensor:
            if self.swapped:
                a, b = x.sin(), x.cos()
            else:
                b, a = x.cos(), x.sin()
            return a * b

    def capture(swapped: bool) -> fx.GraphModule:
        gm = torch.export.export(Two(swapped), (ROWS,), strict=False).module(check_guards=False)
        assert isinstance(gm, fx.GraphModule)
        return gm

    with pytest.raises(VerifyError, match="keeps names and order"):
        check_masked_equivalence(capture(False), capture(True), {}, (ROWS,))


def test_slices_are_checked_bit_for_bit() -> None:
    body = between(lambda p, h: h.relu())
    tensors = {n: torch.randn(t.shape, generator=torch.Generator().manual_seed(3)) for n, t in LINEARS.items()}
    original = graph_of(body, tensors, ROWS)
    small = cut(tensors, LINEARS_KEPT)
    check_slices(original, graph_of(body, small, ROWS), LINEARS_KEPT)
    small["down"][0, 0] = math.nextafter(float(small["down"][0, 0]), math.inf) + 1e-6
    with pytest.raises(VerifyError, match="`down`"):
        check_slices(original, graph_of(body, small, ROWS), LINEARS_KEPT)
    with pytest.raises(VerifyError, match=r"`down` is float32 \(5, 3\) .* float32 \(5, 8\) is \(5, 2\)"):
        check_slices(original, graph_of(body, small, ROWS), {**LINEARS_KEPT, "down": {1: [0, 1]}})


def test_a_tensor_of_another_shape_than_is_claimed_is_found_before_anything_runs() -> None:
    body = between(lambda p, h: h.relu())
    original, pruned = (graph_of(body, tensors, ROWS) for tensors in (LINEARS, cut(LINEARS, LINEARS_KEPT)))
    with pytest.raises(VerifyError, match=r"`down` is float32 \(5, 3\)"):
        check_masked_equivalence(original, pruned, {**LINEARS_KEPT, "down": {1: [1, 2]}}, (ROWS,))


def test_randomise_draws_everything_anew_and_leaves_the_program_alone() -> None:
    body = around(CHANNELS["batch norm"])
    gm = graph_of(body, CONVOLUTIONS, IMAGE, buffers=("mean", "var"))
    one, two = (randomise(gm, torch.Generator().manual_seed(5)) for _ in range(2))
    for name, tensor in CONVOLUTIONS.items():
        drawn = getattr(one, name)
        assert drawn.dtype is torch.float64
        assert drawn.unique().numel() == drawn.numel()
        assert drawn.equal(getattr(two, name))
        assert torch.equal(getattr(gm, name), tensor)
    assert bool((one.get_buffer("var") > 0).all())
    other = randomise(gm, torch.Generator().manual_seed(6))
    assert not one.get_buffer("up").equal(other.get_buffer("up"))


def test_randomise_keeps_tied_weights_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.table(x)) + F.embedding(x, self.head.weight).sum()
            return result

    exported = torch.export.export(Tied(), (torch.tensor([[1, 2]]),), strict=False).module(check_guards=False)
    assert isinstance(exported, fx.GraphModule)
    drawn = randomise(exported, torch.Generator().manual_seed(0))
    names = [str(node.target) for node in drawn.graph.nodes if node.op == "get_attr"]
    values = [drawn.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] for name in names]
    assert all(value is values[0] for value in values)


def test_half_precision_steps_are_computed_in_double() -> None:
    full = between(lambda p, h: by_hand(p, h.to(torch.float32)).to(torch.bfloat16).to(torch.float32))
    assert error_of(full, full, LINEARS, LINEARS_KEPT, ROWS) < _EXACT


def test_a_rule_for_a_custom_operator_is_a_few_lines() -> None:
    @torch.library.custom_op("masked_test::halve", mutates_args=())
    def halve(x: Tensor) -> Tensor:
        return x / 2

    halve.register_fake(torch.empty_like)
    body = between(lambda p, h: torch.ops.masked_test.halve(h))
    with pytest.raises(CannotProveError, match=r"masked_test\.halve"):
        error_of(body, body, LINEARS, LINEARS_KEPT, ROWS)

    @masked_rule("masked_test::halve")
    def rule(step: MaskedStep) -> Value:
        return Value(tensor_result(step.run()), step.first().dead)

    assert error_of(body, body, LINEARS, LINEARS_KEPT, ROWS) < _EXACT


def test_masks_are_boxes() -> None:
    flags = torch.tensor([True, False, True])
    mask = to_mask((2, 3, 4), (None, flags, None))
    assert mask.sum() == 16
    dead = from_mask(mask)
    assert dead[0] is None
    assert dead[2] is None
    assert dead[1] is not None
    assert dead[1].equal(flags)
    mask[0, 1, 0] = True
    with pytest.raises(CannotProveError, match="box"):
        from_mask(mask)


def test_outputs_that_are_not_numbers_prove_nothing() -> None:
    body = between(lambda p, h: (-1 - h.abs()).log())
    with pytest.raises(VerifyError, match="proves nothing"):
        error_of(body, body, LINEARS, LINEARS_KEPT, ROWS)


MASKED = torch.tensor([False, True, False, False])[:, None]  # one row of each sample, as padding is


def test_a_softmax_over_nothing_is_alike_in_both_and_the_other_rows_are_proved() -> None:
    body = between(lambda p, h: h.masked_fill(MASKED, -math.inf).softmax(-1))
    assert error_of(body, body, LINEARS, LINEARS_KEPT, ROWS) < _EXACT
    wrong = between(lambda p, h: (1.001 * h).masked_fill(MASKED, -math.inf).softmax(-1))
    with pytest.raises(VerifyError, match="differs from the masked original"):
        error_of(body, wrong, LINEARS, LINEARS_KEPT, ROWS)


@pytest.mark.parametrize("hidden", [torch.tensor([0.0, 0.0, math.nan, 0.0, 0.0]), torch.full((4, 1), math.nan)])
def test_values_among_others_that_are_no_numbers_prove_nothing(hidden: Tensor) -> None:
    plain = between(lambda p, h: h.tanh())
    with pytest.raises(VerifyError, match="a softmax over what is masked as a whole in every sample"):
        error_of(lambda p, x: plain(p, x) + hidden, lambda p, x: plain(p, x) + hidden, LINEARS, LINEARS_KEPT, ROWS)


def test_a_failing_rule_names_the_node() -> None:
    @torch.library.custom_op("masked_test::third", mutates_args=())
    def third(x: Tensor) -> Tensor:
        return x / 3

    third.register_fake(torch.empty_like)

    @masked_rule("masked_test::third")
    def rule(step: MaskedStep) -> Value:
        raise KeyError("no such thing")

    body = between(lambda p, h: torch.ops.masked_test.third(h))
    with pytest.raises(CannotProveError, match=r"masked_test\.third .*KeyError"):
        error_of(body, body, LINEARS, LINEARS_KEPT, ROWS)


def test_a_misplaced_channel_is_found_even_where_an_activation_hides_it() -> None:
    """Its weight and its bias keep different positions, and nothing gets through the activation."""
    body = between(lambda p, h: (h - 1e6).relu() + 1)
    kept = {**LINEARS_KEPT, "up": {0: [0, 2, 6]}}
    with pytest.raises(VerifyError, match=r"node `linear` .* is \(2, 4, 3\), the survivors .* are \(2, 4, 2\)"):
        error_of(body, body, LINEARS, kept, ROWS)


@pytest.mark.parametrize("kind", [models.Residual, models.FusedAttention, models.GroupedQuery, models.Recurrent])
def test_no_single_misplaced_index_goes_unseen(kind: type[nn.Module]) -> None:
    """The pruned program stays as it is; one index of one tensor is claimed to be another."""
    gm, x = models.captured(kind).graph_module, models.example(kind)
    axes = infer(gm)
    draw = random.Random(0)
    kept = {g.axis: sorted(draw.sample(range(g.size), max(1, g.size // 2))) for g in axes.groups()}
    pruned, right = remove(gm, axes, kept), slices(axes, kept)
    assert check_masked_equivalence(gm, pruned, right, (x,)) < _EXACT
    for name, dims in right.items():
        for dim, indices in dims.items():
            others = sorted(set(range(tensor_attribute(gm, name).size(dim))) - set(indices))
            wrong = sorted([*draw.sample(indices, len(indices) - 1), draw.choice(others)])
            claimed = {**right, name: {**dims, dim: wrong}}
            with pytest.raises(VerifyError):
                check_masked_equivalence(gm, pruned, claimed, (x,))


def test_memory_that_is_filled_by_index_is_alike_in_both_runs() -> None:
    class Filled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            sizes = torch.empty((2, 2), dtype=torch.long)
            for index, value in enumerate((4, 5, 6, 7)):
                sizes[index // 2, index % 2] = value
            return self.second(self.first(x).relu()) + sizes.prod(1).sum()

    program = capture(Filled(), (torch.randn(4, 8),))
    axes = infer(program.graph_module)
    kept = {group.axis: [0, 2, 3] for group in axes.groups()}
    pruned = remove(program.graph_module, axes, kept)
    for _ in range(3):  # what is in fresh memory differs from run to run
        torch.full((2, 2), 12345)
        check_masked_equivalence(
            program.graph_module, pruned, slices(axes, kept), program.example_args, program.example_kwargs
        )


class Padded(nn.Module):
    """Attention with a padding mask, which PyTorch expands over the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.o = nn.Linear(8, 32), nn.Linear(32, 4)
        self.a = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        h = self.i(x)
        return self.o(self.a(h, h, h, key_padding_mask=pad, need_weights=False)[0])


_ROWS = {
    "no padding": torch.zeros(6, 9, dtype=torch.bool),
    "the same": (torch.arange(9) >= 7).expand(6, 9).clone(),
    "two alike": torch.arange(9) >= torch.tensor([7, 7, 7, 5, 5, 5]).view(6, 1),
    "all differ": torch.arange(9) >= torch.arange(3, 9).view(6, 1),
}


def test_values_that_happen_to_be_equal_do_not_say_which_positions_go() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 9, 8)
    gm = capture(Padded().eval(), (x, _ROWS["all differ"])).graph_module
    axes = infer(gm)
    (heads,) = [group for group in axes.groups() if group.kind == "heads"]
    kept = {heads.axis: [0, 3]}
    pruned = remove(gm, axes, kept)
    for rows, mask in _ROWS.items():
        assert check_masked_equivalence(gm, pruned, slices(axes, kept), (x, mask)) < TOLERANCE, rows


def test_no_proof_depends_on_rounding() -> None:
    floats = {kind for kind in vars(torch).values() if isinstance(kind, torch.dtype) and kind.is_floating_point}
    for dtype in floats - {torch.float4_e2m1fn_x2}:  # nothing is converted to that
        value = torch.tensor([0.5, 2.0]).to(dtype)
        assert (doubled(value).dtype, doubled(dtype)) == (torch.float64, torch.float64)
        assert torch.equal(doubled(value), torch.tensor([0.5, 2.0], dtype=torch.float64))
