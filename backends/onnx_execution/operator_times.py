"""What each operator of an artifact takes, as ONNX Runtime's own profiler says."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graphopt.backends.onnx_execution.session import OnnxSession, SessionSettings
from graphopt.files import ScratchDirectory
from graphopt.targets.backend import Array, OperatorTime, Values

_WARM_UP, _RUNS = 2, 8
_CUT_OFF = 0.5e-6  # seconds: the profiler writes whole microseconds, and leaves out what is beyond
_HOLDS_OTHERS = {"If", "Loop", "Scan"}  # their time is that of what they run
_CONVERSIONS = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
_FLOATS, _INTEGERS = {"float", "float16", "double", "bfloat16"}, {"int8", "uint8", "int4", "uint4"}


def operator_times(path: Path, settings: SessionSettings, inputs: Sequence[Array]) -> list[OperatorTime]:
    """Run an artifact a few times with one thread; return what its operators take, in the order they are first run.

    Raises:
        LoweringError: the runtime refuses the artifact or the inputs.
    """
    with ScratchDirectory() as folder:
        session = OnnxSession(path, dataclasses.replace(settings, threads=1), profile=Path(folder) / "times")
        for _ in range(_WARM_UP + _RUNS):
            session(*inputs)
        events = json.loads(session.end_profiling().read_bytes())
    warm = sorted(event["ts"] for event in events if event["name"] == "model_run")[_WARM_UP]
    seconds, told = Counter[tuple[str, str]](), dict[tuple[str, str], OperatorTime]()
    for event in events:
        if event["cat"] != "Node" or event["ts"] < warm or event["args"]["op_name"] in _HOLDS_OTHERS:
            continue
        node = event["args"]["node_index"], event["name"]  # indices alone are of one graph: branches have their own
        seconds[node] += event["dur"] * 1e-6 + _CUT_OFF
        name, operator = event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]
        told.setdefault(node, OperatorTime(name, operator, _values(operator, event["args"]), 0.0))
    return [dataclasses.replace(one, seconds=seconds[node] / _RUNS) for node, one in told.items()]


def _values(operator: str, args: dict[str, Any]) -> Values:
    types = {kind for side in ("input_type_shape", "output_type_shape") for value in args[side] for kind in value}
    if operator in _CONVERSIONS:
        return "turned"
    if types & _INTEGERS:
        return "integer"
    return "float" if types & _FLOATS else "other"
