"""graphopt: a compiler that makes trained PyTorch models small and fast enough to deploy.

    import graphopt

    result = graphopt.optimize(model, data=samples, passes="prune,svd,int8")
    result.save("build/")

Names are imported on first use, so that `import graphopt` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.backend import Artifact, Backend, Finding, Session
    from graphopt.capturing import capture
    from graphopt.context import Context
    from graphopt.errors import (
        CaptureError,
        DataError,
        GateError,
        GraphOptError,
        LoadError,
        LoweringError,
        PassError,
        UsageError,
        VerifyError,
    )
    from graphopt.graph import Editor
    from graphopt.hooks import Hook
    from graphopt.loading.program import load
    from graphopt.optimizing import optimize
    from graphopt.pass_base import NoOptions, Pass
    from graphopt.pipeline import Pipeline
    from graphopt.plan import Plan, Refusal
    from graphopt.program import Program, TensorSpec
    from graphopt.replaying import replay
    from graphopt.report import Report
    from graphopt.result import Result
    from graphopt.target import TargetDescription

_HOMES = {
    "graphopt.backend": ("Artifact", "Backend", "Finding", "Session"),
    "graphopt.capturing": ("capture",),
    "graphopt.context": ("Context",),
    "graphopt.errors": (
        "CaptureError",
        "DataError",
        "GateError",
        "GraphOptError",
        "LoadError",
        "LoweringError",
        "PassError",
        "UsageError",
        "VerifyError",
    ),
    "graphopt.graph": ("Editor",),
    "graphopt.hooks": ("Hook",),
    "graphopt.loading.program": ("load",),
    "graphopt.optimizing": ("optimize",),
    "graphopt.pass_base": ("NoOptions", "Pass"),
    "graphopt.pipeline": ("Pipeline",),
    "graphopt.plan": ("Plan", "Refusal"),
    "graphopt.program": ("Program", "TensorSpec"),
    "graphopt.replaying": ("replay",),
    "graphopt.report": ("Report",),
    "graphopt.result": ("Result",),
    "graphopt.target": ("TargetDescription",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    *("capture", "load", "optimize", "replay"),
    *("Program", "TensorSpec", "Pipeline", "Pass", "NoOptions", "Plan", "Refusal", "Context", "Editor", "Hook"),
    *("Result", "Report", "Artifact", "Backend", "Finding", "Session", "TargetDescription"),
    *_HOMES["graphopt.errors"],
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
