"""graphopt: a compiler that makes trained PyTorch models small and fast enough to deploy.

    import graphopt

    result = graphopt.optimize(model, data=samples, passes="prune,svd,int8")
    result.save("build/")

Names are imported on first use, so that `import graphopt` costs no torch.
"""

from __future__ import annotations

import importlib
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.capturing.capture import capture
    from graphopt.capturing.load import load as load
    from graphopt.data.served import ServedInput
    from graphopt.distillation.paired import PairedModule, finish, pair_for_training
    from graphopt.distillation.plan import DistillPlan
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
    from graphopt.ir.editor import Editor
    from graphopt.ir.program import Program
    from graphopt.ir.signature import TensorSpec
    from graphopt.job.distilling import distill
    from graphopt.job.job import Job
    from graphopt.job.opening import open
    from graphopt.job.optimizing import optimize
    from graphopt.job.replaying import replay
    from graphopt.job.report import Report
    from graphopt.job.result import Result
    from graphopt.pipeline.context import Context
    from graphopt.pipeline.hooks import Hook
    from graphopt.pipeline.pass_base import NoOptions, Pass
    from graphopt.pipeline.pipeline import Pipeline
    from graphopt.pipeline.plan import Plan, Refusal
    from graphopt.pipeline.tensorboard import TensorBoard
    from graphopt.targets.backend import Artifact, Backend, Finding, Session
    from graphopt.targets.description import TargetDescription

IMPORTED = time.time()  # files that are older were not written since they were imported
_HOMES = {
    "graphopt.targets.backend": ("Artifact", "Backend", "Finding", "Session"),
    "graphopt.capturing.capture": ("capture",),
    "graphopt.pipeline.context": ("Context",),
    "graphopt.distillation.paired": ("PairedModule", "finish", "pair_for_training"),
    "graphopt.distillation.plan": ("DistillPlan",),
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
    "graphopt.ir.editor": ("Editor",),
    "graphopt.pipeline.hooks": ("Hook",),
    "graphopt.capturing.load": ("load",),
    "graphopt.job.distilling": ("distill",),
    "graphopt.job.job": ("Job",),
    "graphopt.data.served": ("ServedInput",),
    "graphopt.job.opening": ("open",),
    "graphopt.job.optimizing": ("optimize",),
    "graphopt.pipeline.pass_base": ("NoOptions", "Pass"),
    "graphopt.pipeline.pipeline": ("Pipeline",),
    "graphopt.pipeline.plan": ("Plan", "Refusal"),
    "graphopt.pipeline.tensorboard": ("TensorBoard",),
    "graphopt.ir.program": ("Program", "TensorSpec"),
    "graphopt.job.replaying": ("replay",),
    "graphopt.job.report": ("Report",),
    "graphopt.job.result": ("Result",),
    "graphopt.targets.description": ("TargetDescription",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    *("capture", "distill", "finish", "load", "open", "optimize", "pair_for_training", "replay"),
    *("Program", "TensorSpec", "Pipeline", "Pass", "NoOptions", "Plan", "Refusal", "Context", "Editor", "Hook"),
    *("Job", "Result", "Report", "Artifact", "Backend", "Finding", "Session", "TargetDescription"),
    *("DistillPlan", "PairedModule", "ServedInput", "TensorBoard"),
    *_HOMES["graphopt.errors"],
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
    home = _HOME_OF[name]
    if home != "graphopt.errors":  # the one that imports no torch
        importlib.import_module("graphopt.versions").check_torch()
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
