"""A copy of an artifact that ONNX Runtime's CPU can run, which has no bfloat16 kernels: float32 in its place.

    Cast(x, to=bfloat16) -> MatMul(.., w)      Cast(x, to=float32) -> MatMul(.., w as float32)
    Cast(w, to=bfloat16) -> Gather             w rounded, as float32 -> Gather

Weights keep the values they were rounded to, or are rounded to where they are read; what is computed is not rounded.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt.backends.onnx_lowering.artifacts import read_model
from graphopt.backends.onnx_lowering.saving import save
from graphopt.backends.onnx_lowering.values import store, value_names, values_of
from graphopt.files import ScratchDirectory
from graphopt.targets.backend import Artifact

_NARROW, _WIDE = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def stand_in(artifact: Artifact) -> Artifact:
    """Return a copy of an artifact in whose place of bfloat16 is float32; the artifact itself where it has none."""
    model = read_model(artifact.path)
    if all(value.dtype != _NARROW for value in values_of(model)):
        return artifact
    _round_weights(model)
    for value in values_of(model):
        if value.dtype == _NARROW:
            value.dtype = _WIDE
        if value.const_value is not None and value.const_value.dtype == _NARROW:
            value.const_value = _widened(value.const_value)
    for node in model.graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if name in ("to", "dtype") and attribute.type == ir.AttributeType.INT and attribute.as_int() == _NARROW:
                node.attributes[name] = ir.AttrInt64(name, int(_WIDE))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == _NARROW:
                node.attributes[name] = ir.AttrTensor(name, _widened(attribute.as_tensor()))
    home = ScratchDirectory()
    files = save(model, Path(home.name) / artifact.path.name)
    return dataclasses.replace(artifact, path=files[0], files=files, home=home)


def _round_weights(model: ir.Model) -> None:
    """Store what the model makes of its weights by casts."""
    names = value_names(model)
    for graph in model.graphs():
        for node in [node for node in graph if node.op_type == "Cast" and node.attributes.get_int("to") == _NARROW]:
            given, result = node.inputs[0], node.outputs[0]
            if given is None or given.const_value is None or result.is_graph_output():
                continue
            rounded = given.const_value.numpy().astype(_NARROW.numpy())
            result.replace_all_uses_with(store(graph, names.new(f"{given.name}_rounded"), rounded))
            graph.remove(node, safe=True)


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)
