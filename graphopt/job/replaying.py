"""Replay: carry out the plans of a manifest again, byte for byte, without data, time or randomness."""

from __future__ import annotations

from pathlib import Path

from graphopt.errors import PassError
from graphopt.ir.program import Program
from graphopt.job import manifest
from graphopt.pipeline.options import build
from graphopt.pipeline.registry import PassRegistry
from graphopt.pipeline.runner import apply


def replay(program: Program, manifest_path: str | Path, registry: PassRegistry | None = None) -> dict[str, Program]:
    """Apply every plan of a manifest to the program they were made for.

    Args:
        program: the unoptimised program.
        manifest_path: a `manifest.json`, its `plans.safetensors` beside it.
        registry: where passes are found; plugins that made plans must be in it.

    Returns:
        The optimised program of each target, keyed by target name ("" without a target).

    Raises:
        UsageError: not a manifest, or a pass is not installed.
        PassError: the plans were made for another program.
    """
    from safetensors.torch import load_file

    path = Path(manifest_path)
    data = manifest.read(path)
    found = manifest.fingerprint(program)
    if found != data["original"]:
        raise PassError(
            f"The plans in {path} were made for another program: its fingerprint is {data['original'][:16]}..., this "
            f"one's is {found[:16]}.... Load the model the same way (same file, same torch version, same dynamic axes)."
        )
    registry = registry or PassRegistry()
    payload_path = path.with_name(manifest.PAYLOAD)
    payload = load_file(payload_path) if payload_path.exists() else {}
    programs = {"": program}
    for index, entry in enumerate(data["plans"]):
        kind = registry.pass_class(entry["pass_name"])
        instance = kind(build(kind.name, kind.options_type, entry["options"]))
        fields = {key: value for key, value in entry.items() if key != "target"}
        tensors = {key.partition("/")[2]: t for key, t in payload.items() if key.partition("/")[0] == str(index)}
        plan = kind.plan_type.from_json(fields, tensors)
        before = programs.get(entry["target"], programs[""])
        programs[entry["target"]] = apply(instance, before, plan)
    targets = list(data["artifacts"])
    return {target: programs.get(target, programs[""]) for target in targets} if targets else {"": programs[""]}
