"""`graphopt.optimize`: a job with one pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphopt.capturing.model_calls import gradients_recorded
from graphopt.data.served import Served
from graphopt.ir.global_state import one_thread_at_a_time, random_state_kept
from graphopt.ir.program import Program
from graphopt.job.job import Job
from graphopt.job.result import Result
from graphopt.pipeline.context import Loss, Progress
from graphopt.pipeline.hooks import Hook
from graphopt.pipeline.pass_base import Pass
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.registry import DEFAULT_PASSES, DEFAULT_TARGET, PassRegistry, backends_named
from graphopt.targets.backend import Backend


@one_thread_at_a_time()
@random_state_kept()  # the pipeline imports plugins
@gradients_recorded()
def optimize(
    model: nn.Module | Program,
    data: Any = None,
    passes: str | Sequence[Any] | Pipeline = DEFAULT_PASSES,
    target: str | Backend | Sequence[str | Backend] | None = DEFAULT_TARGET,
    eval: Any = None,
    seed: int = 0,
    *,
    loss: Loss | None = None,
    dynamic_shapes: Any = None,
    plugins: Sequence[Path | str | type[Pass[Any, Any]]] = (),
    hooks: Sequence[Hook] = (),
    check: str = "fast",
    bench: bool = True,
    lower: bool = True,
    progress: Progress | None = None,
    name: str | None = None,
    device: str | torch.device | None = None,
    cache: bool = True,
    served: Served = (),
) -> Result:
    """Optimise a model for one or several runtimes.

    Calls of several threads wait for each other, as all of graphopt's work does; several processes work at once.

    Args:
        model: a module (captured on the first samples of `data`; its tensors are read where they lie, and not written
            to) or a program.
        data: calibration data: a tensor or array (first axis: samples), a tuple or dict of them, an iterable of
            batches, or a path. Passes that learn from data use it; without it they say so.
        passes: pipeline text, or a sequence of passes. "" only captures and lowers.
        target: a backend's name, a backend, several of them, or None for no lowering; passes that decide by their
            target then decide for ONNX Runtime.
        eval: a callable that takes anything callable like the model and returns a number, higher is better; or
            labelled data, `(data, metric)`.
        seed: every random draw descends from it.
        loss: what the model was trained for, called with its output and the labels of the same samples (None where
            `data` has none); returns a scalar. Criteria that follow gradients use it, and do without it.
        dynamic_shapes: further dynamic axes of a module, as `capture` takes them.
        plugins: files or classes of passes that the pipeline may name.
        hooks: called around every pass.
        check: "fast", or "full" to export again and run each pass's own proof after it.
        bench: whether to time the artifact against the unoptimised program in the same runtime, and compare the bytes.
        lower: False decides and rewrites for the targets, and stops before lowering.
        progress: shows long loops.
        name: what the report calls the model.
        device: where passes compute, such as "cuda:0"; "auto" takes the accelerator if there is one, None leaves the
            model where it is. Data follows in batches, and what comes back is where the model was; runtimes of the CPU
            get a copy there.
        cache: whether plans of passes are kept on disk (`graphopt cache` says where), and those that the same passes
            made of the same things before are used again.
        served: inputs that the result is to take as they are served, not as the model takes them:
            "x:uint8:nhwc:scale=1/255:mean=0.485,0.456,0.406:std=0.229,0.224,0.225" (see `ServedInput`). `data`, `eval`
            and the original that the result is compared with are served likewise.

    Returns:
        The programs, plans, artifacts and the report. Artifacts live in a temporary directory for as long as anybody
        holds one, or until `Result.save`.

    Raises:
        GraphOptError: see its subclasses; nothing is left behind.
    """
    pipeline = Pipeline.parse(passes, PassRegistry(plugins))
    backends = backends_named(target)
    pipeline.check_targets(item.description for item in backends)
    job = Job.open(
        model,
        data,
        target=backends,
        eval=eval,
        loss=loss,
        seed=seed,
        dynamic_shapes=dynamic_shapes,
        progress=progress,
        name=name,
        device=device,
        cache=cache,
        served=served,
    )
    if lower:
        job.check_targets()
    outcome = job.run(pipeline, hooks=hooks, check=check)
    return job.deliver(outcome, bench=bench) if lower else job.undelivered(outcome)
