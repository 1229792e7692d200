"""Unique names: the wanted one, or the first free one that is numbered on."""

from __future__ import annotations

import torch
from torch import fx, nn

from graphopt.ir.editor import Editor
from graphopt.ir.names import Names, unused


def test_the_first_free_name() -> None:
    assert unused("w", {"v"}.__contains__) == "w"
    assert unused("w", {"w"}.__contains__) == "w_1"
    assert unused("w", {"w", "w_1", "w_3"}.__contains__) == "w_2"


def test_no_name_is_handed_out_twice() -> None:
    names = Names({"x_1"})
    assert [names.new("x") for _ in range(3)] == ["x", "x_2", "x_3"]
    assert names.new("x_2") == "x_2_1"
    assert names.new("y") == "y"


def test_what_people_read_counts_from_the_second_on() -> None:
    names = Names(mark="#")
    assert [names.new("conv1:channels") for _ in range(3)] == ["conv1:channels", "conv1:channels#2", "conv1:channels#3"]
    assert names.new("conv2:channels") == "conv2:channels"


def test_thousands_may_want_one_name() -> None:
    names = Names()
    assert len({names.new("Add") for _ in range(20_000)}) == 20_000


def test_an_attribute_that_no_node_reads_is_taken_too() -> None:
    """A module of that name, or what is to be stored later: either would be overwritten."""
    root = nn.Module()
    root.add_module("weight_1", nn.Linear(2, 2))
    root.register_buffer("weight", torch.ones(2))
    graph = fx.Graph()
    graph.output((graph.get_attr("weight"),))
    editor = Editor(fx.GraphModule(root, graph), "test")
    editor.gm.add_module("weight_1", nn.Linear(2, 2))
    assert editor.new_name("weight") == "weight_2"
    assert editor.new_name("weight", taken={"weight_2"}) == "weight_3"
    assert editor.new_name("weight_1.bias") == "weight_1.bias_1"
