"""Canonical text of a program: equal for programs that differ only in names and in the order of independent calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphopt.ir.aliasing import written_inputs
from graphopt.ir.graph import arguments, tensor_attribute
from graphopt.ir.program import Program
from graphopt.ir.torch_internals import OpOverload


@dataclass(frozen=True)
class CanonicalForm:
    """Text of a program with names made canonical, and the tensors it reads in the order of their first use."""

    text: str
    attributes: tuple[str, ...]  # names in the program at hand
    tensors: tuple[torch.Tensor, ...]


def canonical_form(program: Program) -> CanonicalForm:
    """Return the canonical form of `program`.

    Calls are ordered depth-first from the outputs, unless the graph writes in place: then the order means something
    and is kept. Default arguments are left out; attributes appear where they are used, shared ones under one name.
    """
    writer = _Writer(program)
    order = _calls(program.graph)
    inputs = [writer.name(node) for node in program.graph.nodes if node.op == "placeholder"]
    lines = [f"inputs {', '.join(inputs)}"]
    lines += [writer.line(node) for node in order]
    output = next(node for node in program.graph.nodes if node.op == "output")
    lines.append(f"return {writer.value(output.args[0])}")
    lines += [f"{writer.names[node]}: {_kind(program, node)}" for node in writer.attributes]
    names = tuple(str(node.target) for node in writer.attributes)
    tensors = tuple(tensor_attribute(program.graph_module, name).detach() for name in names)
    return CanonicalForm("\n".join(lines), names, tensors)


@dataclass
class _Writer:
    program: Program
    names: dict[fx.Node, str] = field(default_factory=dict)
    attributes: list[fx.Node] = field(default_factory=list)
    _by_tensor: dict[int, str] = field(default_factory=dict)

    def name(self, node: fx.Node) -> str:
        if node in self.names:
            return self.names[node]
        if node.op == "get_attr":
            self.names[node] = self._attribute_name(node)
        elif node.op == "placeholder":
            self.names[node] = f"input{sum(n.op == 'placeholder' for n in self.names)}"
        else:
            self.names[node] = f"%{sum(n.op == 'call_function' for n in self.names)}"
        return self.names[node]

    def _attribute_name(self, node: fx.Node) -> str:
        value: Any = self.program.graph_module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if not isinstance(value, torch.Tensor):
            return f"region {node.target}"
        if id(value) not in self._by_tensor:
            self._by_tensor[id(value)] = f"@{len(self.attributes)}"
            self.attributes.append(node)
        return self._by_tensor[id(value)]

    def value(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.name(value)
        if isinstance(value, list | tuple):
            return f"[{', '.join(self.value(item) for item in value)}]"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{key}: {self.value(item)}' for key, item in value.items())}}}"
        return repr(value)

    def line(self, node: fx.Node) -> str:
        if isinstance(node.target, OpOverload):
            defaults = {a.name: a.default_value for a in node.target._schema.arguments if a.has_default_value()}
            given = {
                name: value
                for name, value in arguments(node, ()).items()
                if name not in defaults or self.value(defaults[name]) != self.value(value)
            }
            shown = [f"{name}={self.value(value)}" for name, value in given.items()]
            shown += [f"{n}={self.value(v)}" for n, v in node.kwargs.items() if n not in given and n not in defaults]
        else:
            shown = [self.value(item) for item in (*node.args, *node.kwargs.values())]
        return f"{self.name(node)} = {node.target}({', '.join(shown)})"


def _calls(graph: fx.Graph) -> list[fx.Node]:
    """Order the calls that the outputs depend on."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    if any(written_inputs(node) for node in calls):
        return calls
    order: dict[fx.Node, None] = {}
    stack = [(next(node for node in graph.nodes if node.op == "output"), False)]
    while stack:
        node, inputs_done = stack.pop()
        if node in order:
            continue
        if inputs_done:
            order[node] = None
        else:
            stack.append((node, True))
            stack += [(source, False) for source in reversed(node.all_input_nodes)]
    return [node for node in order if node.op == "call_function"]


def _kind(program: Program, node: fx.Node) -> str:
    tensor = tensor_attribute(program.graph_module, str(node.target))
    kind = "parameter" if isinstance(tensor, torch.nn.Parameter) else "buffer"
    return f"{kind} {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
