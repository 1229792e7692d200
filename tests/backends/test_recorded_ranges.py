"""Which sizes a file says that its inputs may have: read as written, and nothing else believed."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from graphopt.backends.onnx_lowering.artifacts import specs
from graphopt.backends.onnx_lowering.ranges import ranges_of
from graphopt.errors import LoweringError
from graphopt.ir.sizes import ANY, SizeRange


def test_what_is_written_is_read() -> None:
    assert ranges_of({"graphopt.sizes": '{"x": [[4, 8], [0, null]]}'}) == {"x": (SizeRange(4, 8), ANY)}
    assert ranges_of({}) == {}


@pytest.mark.parametrize(
    "ends",
    [
        *("[Infinity, null]", "[1e400, null]", "[0, 1e400]", "[8, 4]", '["1", null]', "[true, null]", "[1.5, null]"),
        *("[-1, null]", "[0, 0]", "[1048577, null]", "[0, 9223372036854775808]", "[1]", "{}", "[" * 5000),
    ],
)
def test_what_else_a_file_says_is_damaged(ends: str) -> None:
    with pytest.raises(LoweringError, match=r"What the file says of sizes \(graphopt.sizes\) is damaged: "):
        ranges_of({"graphopt.sizes": f'{{"x": [{ends}]}}'})


def test_as_many_ranges_as_axes() -> None:
    value = ir.Value(name="x", shape=ir.Shape(("batch", 3)), type=ir.TensorType(ir.DataType.FLOAT))
    assert specs([value], Path("a.onnx"), {"graphopt.sizes": '{"x": [[4, 8], [0, null]]}'})[0].range_of(0).most == 8
    with pytest.raises(LoweringError, match=r"`x` of a\.onnx has 1 ranges of sizes for 2 axes"):
        specs([value], Path("a.onnx"), {"graphopt.sizes": '{"x": [[4, 8]]}'})
