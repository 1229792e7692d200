"""Replay: carry out the plans of a manifest again, byte for byte, without data, time or randomness."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import torch
from torch import fx

from graphopt.capturing.guards import insert_guards
from graphopt.capturing.model_calls import gradients_recorded
from graphopt.capturing.unchecked_arguments import check_arguments
from graphopt.distillation.paired import with_new_head
from graphopt.distillation.plan import DistillPlan
from graphopt.errors import CaptureError, PassError, printable
from graphopt.files import MANIFEST
from graphopt.ir.global_state import one_thread_at_a_time
from graphopt.ir.program import Program
from graphopt.job import manifest
from graphopt.pipeline.contract import called
from graphopt.pipeline.options import build
from graphopt.pipeline.plan import Plan
from graphopt.pipeline.registry import PassRegistry
from graphopt.pipeline.runner import apply

logger = logging.getLogger(__name__)


@one_thread_at_a_time()
def replay(program: Program, manifest_path: str | Path, registry: PassRegistry | None = None) -> dict[str, Program]:
    """Apply every plan of a manifest to the program they were made for.

    Args:
        program: the unoptimised program.
        manifest_path: a `manifest.json`, its `plans.safetensors` beside it.
        registry: where passes are found; plugins that made plans must be in it.

    Returns:
        The optimised program of each target, keyed by target name ("" where no pass asked for one).

    Raises:
        UsageError: not a manifest, or a pass is not installed.
        LoadError: the tensors beside it are not those it was written with.
        PassError: the plans were made for another program, or by another version of a pass.
    """
    path = Path(manifest_path)
    return carry_out(program, manifest.read(path), path.parent, registry or PassRegistry())[0]


@gradients_recorded()
def carry_out(
    program: Program, stored: manifest.Manifest, directory: Path, registry: PassRegistry
) -> tuple[dict[str, Program], list[tuple[str, Plan]]]:
    """Apply every plan of a manifest that was read from `directory`; return what `replay` does, and the plans."""
    program = _taught(program.evaluated(), stored, directory)
    found = manifest.fingerprint(program)
    if found != stored.original:
        raise PassError(
            f"The plans in {directory / MANIFEST} were made for another program: its fingerprint is "
            f"{stored.original[:16]}..., this one's is {found[:16]}.... "
            "Load the model the same way (same file, same torch version, same dynamic axes"
            f"{', ' + ', '.join(f'served={printable(one)!r}' for one in stored.served) if stored.served else ''})."
        )
    if stored.other_libraries():
        logger.warning("The plans were made with other versions: %s.", "; ".join(stored.other_libraries()))
    if elsewhere := stored.other_processor():
        logger.warning("The plans were made on %s, by what is fastest there.", elsewhere)
    programs, plans = {"": program}, read_plans(stored, directory, registry)
    bare = dict(programs)  # without guards, which the passes that made the plans have not seen
    for (target, plan), entry in zip(plans, stored.plans, strict=True):
        kind = registry.pass_class(entry.pass_name)
        with called(kind, "take its options", stored=True):
            instance = kind(build(kind.name, kind.options_type, entry.options))
        before, unguarded = bare.get(target, bare[""]), [bare.get(target, bare[""])]
        made = apply(instance, before, plan, stored=functools.partial(_made_safe, before, kind.name, unguarded))
        runs = called(instance, "apply its stored plan: the program it makes does not run", stored=True)
        with runs, torch.no_grad():
            made.call_flat(made.flat_examples())  # what is stored may be of any type and shape
        programs[target], bare[target] = made, unguarded[-1]
    return {target: programs.get(target, programs[""]) for target in stored.programs}, plans


def _taught(program: Program, stored: manifest.Manifest, directory: Path) -> Program:
    """Return a student with the head it was given and what it learned; a program of other tensors as it is."""
    tensors = stored.distilled(directory)
    if not tensors:
        return program
    plan = stored.distillation.get("plan")
    student = with_new_head(program, DistillPlan.of(plan if isinstance(plan, dict) else None), stored.seed)
    known = {name: (tensor.shape, tensor.dtype) for name, tensor in student.state_dict().items()}
    if known != {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}:
        return program
    taught = student.copy(share_tensors=False)
    with torch.no_grad():
        for name, tensor in taught.state_dict().items():
            tensor.copy_(tensors[name])
    return taught


def _made_safe(before: Program, pass_name: str, unguarded: list[Program], made: Program) -> Program:
    """Return what a stored plan made of a program, checked and guarded as what a stranger's file holds.

    What it was before goes to `unguarded`.

    Raises:
        PassError: torch would use memory with it that is not the model's, and would not with the program before.
    """
    unguarded.append(made)
    gm = made.copy().graph_module
    wrong = _unsafe(gm)
    if wrong is not None and _unsafe(before.graph_module) is None:  # a model in memory may compute what files must not
        raise PassError(f"The stored plan of `{pass_name}` does not fit the model. {wrong}") from wrong
    if wrong is None:
        insert_guards(gm)
    return made.with_graph(gm)


def _unsafe(gm: fx.GraphModule) -> CaptureError | None:
    try:
        check_arguments(gm)
    except CaptureError as err:
        return err
    return None


def read_plans(stored: manifest.Manifest, directory: Path, registry: PassRegistry) -> list[tuple[str, Plan]]:
    """Rebuild the plans of a manifest, each with the target it was made for.

    Raises:
        UsageError: a pass is not installed.
        LoadError: the tensors beside the manifest are not those it was written with.
        PassError: a plan was made by another version of its pass.
    """
    tensors = stored.tensors_of(directory)
    plans = []
    for index, entry in enumerate(stored.plans):
        kind = registry.pass_class(entry.pass_name)
        with called(kind, "read its stored plan", stored=True):
            plans.append((entry.target, kind.plan_type.from_json(entry.fields(), tensors[index])))
    return plans
