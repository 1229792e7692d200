"""What a call turns in place is turned for those who read it, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from graphopt.capturing.load import load
from graphopt.capturing.turned_in_place import return_what_is_turned
from graphopt.errors import CaptureError

aten = torch.ops.aten


class Turning(nn.Module):
    """Turns values in place, one that it has written to before and after."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = (x * 2).unsqueeze_(0)
        z = x + 1
        z.add_(1)
        z.t_()
        z.mul_(3)
        seen = z.reshape(-1)
        z.unsqueeze_(0).squeeze_(0)
        return y, z, seen, z.swapaxes_(0, 1) + 1


def test_values_are_what_they_were(tmp_path: object) -> None:
    x = torch.randn(3, 4)
    exported = torch.export.export(Turning(), (x,))
    torch.export.save(exported, f"{tmp_path}/turning.pt2")
    gm = exported.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    assert any(torch.Tag.inplace_view in getattr(node.target, "tags", ()) for node in gm.graph.nodes)
    return_what_is_turned(gm)
    assert not any(torch.Tag.inplace_view in getattr(node.target, "tags", ()) for node in gm.graph.nodes)
    for ours, loaded, theirs in zip(gm(x), load(f"{tmp_path}/turning.pt2")(x), Turning()(x), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(loaded, theirs)


def graph_module(build: Callable[[fx.Graph, fx.Node], fx.Node]) -> fx.GraphModule:
    root, graph = nn.Module(), fx.Graph()
    root.register_buffer("held", torch.ones(2, 3))
    graph.output(build(graph, graph.placeholder("x")))
    return fx.GraphModule(root, graph)


def by_keyword(graph: fx.Graph, x: fx.Node) -> fx.Node:
    y = graph.call_function(aten.relu.default, (x,))
    graph.call_function(aten.transpose_.default, (), {"dim1": 1, "self": y, "dim0": 0})
    return y


def another_name(graph: fx.Graph, x: fx.Node) -> fx.Node:
    same = graph.call_function(aten.lift.default, (x,))
    graph.call_function(aten.t_.default, (same,))
    return graph.call_function(aten.relu.default, (x,))


def a_weight(graph: fx.Graph, x: fx.Node) -> fx.Node:
    held = graph.get_attr("held")
    graph.call_function(aten.t_.default, (graph.call_function(aten.contiguous.default, (held,)),))
    return x


def no_tensor(graph: fx.Graph, x: fx.Node) -> fx.Node:
    return graph.call_function(aten.t_.default, (7,))


def test_arguments_by_keyword() -> None:
    gm = graph_module(by_keyword)
    return_what_is_turned(gm)
    assert gm(torch.ones(2, 3)).shape == (3, 2)


@pytest.mark.parametrize("build", [another_name, a_weight, no_tensor])
def test_what_would_be_turned_elsewhere_too_is_refused(build: Callable[[fx.Graph, fx.Node], fx.Node]) -> None:
    with pytest.raises(CaptureError, match=r"in place, by `t_`, that it may read|with no tensor that is turned"):
        return_what_is_turned(graph_module(build))


def test_an_input_of_a_body_is_not_turned() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = torch.cond(x.sum() > 0, lambda x: x.relu(), lambda x: -x, (x,))
            return result

    gm = torch.export.export(Branches(), (torch.ones(2, 2),)).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    body = gm.get_submodule("true_graph_0")
    assert isinstance(body, fx.GraphModule)
    (x,) = body.graph.find_nodes(op="placeholder")
    with body.graph.inserting_before(next(iter(x.users))):
        body.graph.call_function(aten.t_.default, (x,))
    with pytest.raises(CaptureError, match="turns a value in place, by `t_`"):
        return_what_is_turned(gm)
