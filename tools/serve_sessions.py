"""Serve ONNX Runtime sessions to `other_runtime`: questions come as lines of JSON, arrays as files.

Needs numpy and onnxruntime alone.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the import, or it reports that it was started
import numpy as np
import onnxruntime

_ERRORS_ONLY = 3
_sessions: list[onnxruntime.InferenceSession] = []


def main() -> None:
    """Answer until there are no more questions."""
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = _ANSWERS[question.pop("about")](**question)
        except Exception as err:  # onnxruntime's exceptions have no common base
            answer = {"error": f"{err}"}
        print(json.dumps(answer), flush=True)


def _machine() -> dict[str, Any]:
    return {"machine": f"{platform.machine()}, onnxruntime {onnxruntime.__version__}"}


def _load(model: str, options: dict[str, Any]) -> dict[str, Any]:
    native = onnxruntime.SessionOptions()
    native.log_severity_level = _ERRORS_ONLY
    native.intra_op_num_threads = options["threads"]
    level = "ORT_DISABLE_ALL" if options["optimization"] == "disabled" else f"ORT_ENABLE_{options['optimization']}"
    native.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level.upper())
    if not options["spinning"]:
        native.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for key, value in options["config"].items():
        native.add_session_config_entry(key, value)
    if options["optimized"]:
        native.optimized_model_filepath = options["optimized"]
    disabled = options["disabled_optimizers"]
    session = onnxruntime.InferenceSession(model, native, ["CPUExecutionProvider"], disabled_optimizers=disabled)
    _sessions.append(session)
    names = {kind: [value.name for value in getattr(session, f"get_{kind}")()] for kind in ("inputs", "outputs")}
    return {"session": len(_sessions) - 1, **names}


def _run(session: int, given: str, made: str, outputs: list[str] | None) -> dict[str, Any]:
    loaded = _sessions[session]
    with np.load(given) as arrays:
        feed = {value.name: arrays[str(place)] for place, value in enumerate(loaded.get_inputs())}
    results = loaded.run(outputs, feed)
    with open(made, "wb") as file:
        np.savez(file, **{f"{place}": np.asarray(array) for place, array in enumerate(results)})
    return {}


_ANSWERS = {"machine": _machine, "load": _load, "run": _run}


if __name__ == "__main__":
    main()
