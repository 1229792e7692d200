"""The values of an ONNX model and their names. A graph must not shadow a name of the graphs around it (SSA)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from graphopt.ir.names import Names


def values_of(model: ir.Model) -> Iterator[ir.Value]:
    """Yield the inputs, stored values and results of every graph of a model."""
    for graph in model.graphs():
        yield from graph.initializers.values()
        yield from (value for value in graph.inputs if not value.is_initializer())
        for node in graph:
            yield from node.outputs


def value_names(model: ir.Model) -> Names:
    """Return a maker of names that no value of the model bears."""
    return Names(value.name for value in values_of(model) if value.name)


def store(graph: ir.Graph, name: str, values: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    """Store an array in a graph under a name that is free."""
    tensor = ir.tensor(np.asarray(values, order="C"), dtype=dtype, name=name)
    value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
