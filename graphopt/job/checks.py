"""What a job refuses: weights that mean nothing, a model or programs that were changed since."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graphopt.errors import CaptureError, UsageError
from graphopt.ir.buffers import names_written
from graphopt.ir.contents import content
from graphopt.ir.finite import all_finite, computable
from graphopt.ir.graph import constant
from graphopt.ir.program import Program
from graphopt.job.manifest import fingerprint

_NORMS = (torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default)
Described = tuple[torch.dtype, torch.device, tuple[int, ...], int]
State = Mapping[str, Described]


def check_weights(program: Program) -> None:
    """Refuse a model with a weight that is not finite, which later would look like a fault of the data.

    Infinity in what is not trained is how models mask what does not count.

    Raises:
        CaptureError: NaN anywhere, or infinity in a trained weight.
    """
    gm = program.graph_module
    for name, tensor in (*gm.named_parameters(), *gm.named_buffers()):
        if all_finite(tensor):
            continue
        values = computable(tensor)
        nan = bool(values.isnan().any())
        if not nan and not tensor.requires_grad:
            continue
        kind = "NaN" if nan else "infinite values"
        bad = int((~values.isfinite()).sum())
        raise CaptureError(
            f"`{name}` of the model holds {kind} ({bad} of {tensor.numel()} values), so what it computes means "
            "nothing. Load weights from before training diverged, or of a type that holds their values."
        )


def notes_on_types(program: Program) -> list[str]:
    """Say what a model of other floating types than float32 cannot have."""
    weights = [tensor.dtype for tensor in program.parameters() if tensor.is_floating_point()]
    others = [str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(weights) if dtype is not torch.float32]
    if not others:
        return []
    return [
        f"model: it has weights of {' and '.join(others)}, which passes that quantize leave alone, and few kernels of "
        "a CPU compute in; convert it with `model.float()`"
    ]


def state_of(program: Program) -> State:
    """Return what tells whether tensors were changed in place, or others put in their place, at little cost.

    Of running statistics it is what they hold: torch counts no change that a run in training mode makes (2.13). Tensors
    that the graph writes to are not among them: every run does.
    """
    gm = program.graph_module
    written = names_written(gm)
    norms = [node for node in program.graph.nodes if node.target in _NORMS]
    statistics = {str(node.target) for norm in norms for node in norm.args[3:5] if constant(node, gm) is not None}
    found = {}
    for name, one in (*gm.named_parameters(), *gm.named_buffers()):
        if name not in written:
            counted = 0 if one.is_inference() else one._version
            holds = hash(bytes(content(one))) if name in statistics else counted
            found[name] = (one.dtype, one.device, tuple(one.shape), holds)
    return found


def check_as_opened(program: Program, opened: State) -> None:
    """Refuse a model that was changed since a job was opened on it, which knows it as it was.

    Raises:
        UsageError: naming a tensor that was.
    """
    state = state_of(program)
    for name in {**opened, **state}:
        if opened.get(name) != state.get(name):
            raise UsageError(
                f"The model was changed after the job was opened on it: `{name}` "
                f"{_change(opened.get(name), state.get(name))}. Open a new job, on a copy if the model goes on being "
                "trained: graphopt.Job.open(copy.deepcopy(model))."
            )


def _change(old: Described | None, new: Described | None) -> str:
    if old is None or new is None:
        return "was added" if old is None else "was removed"
    pairs = zip(old[:3], new[:3], strict=True)
    changes = [f"was {_said(before)} and is {_said(now)}" for before, now in pairs if before != now]
    return (changes or ["was written to"])[0]


def _said(value: Any) -> str:
    return str(value).removeprefix("torch.")


def check_as_handed_out(programs: Mapping[str, Program], handed_out: Mapping[str, str]) -> None:
    """Refuse programs that a result holds, and that were changed there.

    Raises:
        UsageError: naming the target of one.
    """
    for target, before in handed_out.items():
        if fingerprint(programs[target].evaluated()) != before:
            raise UsageError(
                f"The program{f' for {target}' if target else ''} was changed after it was handed out in a result, "
                "trained perhaps, and is not what the plans make any more. Run the pipeline again: "
                "job.run(outcome.pipeline); what was trained is lowered by graphopt.optimize(result.program, "
                'passes="").'
            )
