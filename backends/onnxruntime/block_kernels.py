"""Stored rows of integers to the kernels ONNX Runtime has for them.

MatMul(x, Transpose(rows)), Gemm(x, rows, transB) [+ b]     com.microsoft.MatMulNBits(x, rows, scales, zero points, b)
rows of chosen indices                                      com.microsoft.GatherBlockQuantized

Blocks hold 16, 32, .. 256 columns there; the scale of a whole row is repeated for them when the file is loaded.
Left alone: other sizes of blocks, integers of 1 bit, chosen rows that end within a byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.backends.onnx_lowering.stored_rows import StoredRows, array, stored_rows
from graphopt.backends.onnx_lowering.values import store, value_names
from graphopt.ir.names import Names

_DOMAIN = "com.microsoft"
_BITS = (2, 4, 8)
_SMALLEST, _LARGEST = 16, 256  # columns of a block
_OF_WHOLE_ROWS = 128  # with which a row of one scale is cut up; the activations have a scale for each block too
# Activations are rounded to int8, a scale per block. Of levels 0 and 1, which do not, 2 and 8 bits run at 0.03 to 0.3
# of the speed of a float product and 4 bits at 0.5 to 1.0; level 4 at 0.7 to 5 (x86 with AVX2, one thread, 1.31.1).
# It leaves 45 dB, integers of 4 bits 20.
ACCURACY_LEVEL = 4


class BlockKernelsPass(ir.passes.InPlacePass):
    """Let products and reads of stored rows call the runtime's own operators."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every graph."""
        modified = False
        names = value_names(model)
        for graph in model.graphs():
            writer = _Writer(graph, names)
            for node in list(graph):
                rows = stored_rows(node)
                if rows is not None and rows.bits in _BITS and _block(rows):
                    modified |= writer.write(node, rows)
        if modified:
            model.graph.opset_imports[_DOMAIN] = 1
        return ir.passes.PassResult(model, modified=modified)


def _block(rows: StoredRows) -> int:
    """Return the columns of a block that the kernels are told, 0 for none that they take."""
    if rows.block >= rows.columns:
        size = _SMALLEST
        while size < min(rows.columns, _OF_WHOLE_ROWS):
            size *= 2
        return size
    fits = _SMALLEST <= rows.block <= _LARGEST and rows.block & (rows.block - 1) == 0
    return rows.block if fits else 0


@dataclass(frozen=True, eq=False)
class _Product:
    """A product with stored rows: the node that multiplies, the one it ends in, its other operand and its bias."""

    node: ir.Node
    last: ir.Node
    x: ir.Value
    bias: ir.Value | None


def _products(node: ir.Node) -> Iterator[_Product]:
    """Yield the products whose weight a node dequantizes."""
    for use in list(node.outputs[0].uses()):
        reader = use.node
        if reader.op_type == "Gemm" and use.idx == 1 and _multiplies_plainly(reader):
            x, bias = reader.inputs[0], reader.inputs[2] if len(reader.inputs) > 2 else None
            if x is not None and (bias is None or _is_row(bias, node)):
                yield _Product(reader, reader, x, bias)
        elif reader.op_type == "Transpose" and list(reader.attributes["perm"].as_ints()) == [1, 0]:
            for inner in list(reader.outputs[0].uses()):
                x = inner.node.inputs[0]
                if inner.node.op_type == "MatMul" and inner.idx == 1 and x is not None:
                    yield _with_bias(inner.node, x, node)


def _multiplies_plainly(gemm: ir.Node) -> bool:
    wanted = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
    given = {name: attribute.value for name, attribute in gemm.attributes.items()}
    return {**wanted, "transB": 0, **given} == wanted


def _with_bias(matmul: ir.Node, x: ir.Value, rows: ir.Node) -> _Product:
    """Take in the bias that alone reads a product."""
    result = matmul.outputs[0]
    uses = list(result.uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add" and not result.is_graph_output():
        add = uses[0].node
        bias = add.inputs[1 - uses[0].idx]
        if bias is not None and _is_row(bias, rows):
            return _Product(matmul, add, x, bias)
    return _Product(matmul, matmul, x, None)


def _is_row(bias: ir.Value, rows: ir.Node) -> bool:
    """Whether a value is a stored vector of one number for each output."""
    shape = rows.outputs[0].shape
    return bias.is_initializer() and shape is not None and bias.shape == ir.Shape([shape[0]])


class _Writer:
    """Writes the operators of one graph; what they read is stored once."""

    def __init__(self, graph: ir.Graph, names: Names) -> None:
        self._graph = graph
        self._names = names
        self._known: dict[tuple[str, ir.Value, int], ir.Value] = {}

    def write(self, node: ir.Node, rows: StoredRows) -> bool:
        """Rewrite every reader of `rows`, which `node` dequantizes; return whether there was one."""
        if rows.indices is not None:
            whole = rows.columns * rows.bits % 8 == 0  # all that is in a byte is read
            if whole:
                self._replace(node, node, self._gather(node, rows))
            return whole
        found = list(_products(node))
        for product in found:
            self._replace(product.node, product.last, self._multiply(product, rows))
        return bool(found)

    def _gather(self, node: ir.Node, rows: StoredRows) -> ir.Node:
        inputs = [self._integers(rows), rows.indices, self._scales(rows), self._zero_points(rows)]
        attributes = {"bits": rows.bits, "block_size": _block(rows), "gather_axis": 0, "quantize_axis": 1}
        return _node("GatherBlockQuantized", inputs, attributes, node)

    def _multiply(self, product: _Product, rows: StoredRows) -> ir.Node:
        inputs = [product.x, self._blocks(rows), self._scales(rows), self._zero_points(rows), None, product.bias]
        attributes = {
            "K": rows.columns,
            "N": rows.rows,
            "bits": rows.bits,
            "block_size": _block(rows),
            "accuracy_level": ACCURACY_LEVEL,
        }
        return _node("MatMulNBits", inputs, attributes, product.node)

    def _replace(self, first: ir.Node, last: ir.Node, new: ir.Node) -> None:
        result = last.outputs[0]
        new.outputs[0].shape, new.outputs[0].type = result.shape, result.type
        old = [first] if first is last else [last, first]
        ir.convenience.replace_nodes_and_values(self._graph, last, old, [new], [result], [new.outputs[0]])

    def _integers(self, rows: StoredRows) -> ir.Value:
        return self._once("unsigned", rows.integers, 0, lambda: rows.unsigned(rows.integers))

    def _blocks(self, rows: StoredRows) -> ir.Value:
        """Return the integers as (rows, blocks, bytes of a block), the last block filled up.

        Where nothing is to be filled up, what is stored is read in this shape: an embedding may read it too.
        """
        block = _block(rows)
        sizes = np.array([rows.rows, -(-rows.columns // block), block * rows.bits // 8])
        integers = self._integers(rows)
        missing = int(sizes[1] * sizes[2]) - array(integers).shape[1]
        if missing == 0:
            return self._folded("Reshape", integers, sizes)
        filled = np.pad(array(integers), ((0, 0), (0, missing))).reshape(sizes)
        return self._once("blocks", rows.integers, block, lambda: filled)

    def _scales(self, rows: StoredRows) -> ir.Value:
        blocks = -(-rows.columns // _block(rows))
        if array(rows.scale).shape[1] == blocks:
            return rows.scale
        return self._folded("Expand", rows.scale, np.array([rows.rows, blocks]))

    def _zero_points(self, rows: StoredRows) -> ir.Value | None:
        """Return the zero points, packed, (rows, bytes): those of whole rows are repeated in every place of a byte."""
        zero_point = rows.zero_point
        if zero_point is None:
            return None
        if rows.block < rows.columns:
            return self._once("unsigned", zero_point, 0, lambda: rows.unsigned(zero_point))
        width = math.ceil(math.ceil(rows.columns / _block(rows)) * rows.bits / 8)
        everywhere = sum(1 << shift for shift in range(0, 8, rows.bits))
        codes = rows.unsigned(zero_point)[:, :1] * np.uint8(everywhere)
        return self._once("repeated", zero_point, width, lambda: np.repeat(codes, width, axis=1))

    def _folded(self, operator: str, value: ir.Value, sizes: np.ndarray) -> ir.Value:
        """Return a stored value in another shape, which the runtime gives it when it loads the file."""
        key = operator, value, int(sizes[-1])
        if key not in self._known:
            shape = store(self._graph, self._names.new(f"{value.name}_sizes"), sizes.astype(np.int64))
            node = ir.node(operator, [value, shape])
            node.outputs[0].name = self._names.new(f"{value.name}_blocks")
            self._graph.insert_before(self._graph[0], node)
            self._known[key] = node.outputs[0]
        return self._known[key]

    def _once(self, what: str, source: ir.Value, size: int, made: Callable[[], np.ndarray]) -> ir.Value:
        """Store what is made of a stored tensor once; nothing where it is the same."""
        key = what, source, size
        if key not in self._known:
            values = made()
            own = values is array(source) or (
                values.dtype == array(source).dtype and np.array_equal(values, array(source))
            )
            self._known[key] = source if own else store(self._graph, self._names.new(f"{source.name}_{what}"), values)
        return self._known[key]


def _node(operator: str, inputs: list[ir.Value | None], attributes: dict[str, int], old: ir.Node) -> ir.Node:
    while inputs[-1] is None:
        inputs.pop()
    return ir.node(operator, inputs, attributes, domain=_DOMAIN, name=old.name, metadata_props=dict(old.metadata_props))
