"""Digests of everything that results hold, to tell whether a change of the code changed what it makes.

    python tools/result_digests.py before.json                          # in the checkout before the change
    python tools/result_digests.py after.json --against before.json     # after it; the exit code is 1 where they differ

Some twenty models (CNNs, attention, recurrent, tied, in-place, several inputs and outputs) go through pipelines that
hold every built-in pass, to every target. Recorded are each plan as JSON, each tensor of its payload, and the bytes of
each artifact and run script; not those of a `.pt2`, which holds the paths of the source it was captured from. What
decides the bytes must be the same in both runs: libraries, processor, threads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import graphopt
from graphopt.ir.contents import content

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.e2e.odd_cases import case
from tests.models import Dense, Depthwise, FusedAttention, GroupedQuery, GroupedShuffle, Residual, UNet, example

_SMALL = "prune:ratio=0.4:round_to=1,svd:energy=0.9,int8"
_ODD = (
    "several inputs, nested outputs",
    "tied head",
    "1-d convolutions",
    "transposed convolutions",
    "grouped and depthwise",
    "lstm",
    "weight norm",
    "other norms",
    "channels last",
    "any length",
    "integer outputs",
    "padding mask",
    "regions",
    "module used thrice",
    "fixed batch",
)
_MODELS = (Residual, Depthwise, Dense, GroupedShuffle, UNet, FusedAttention, GroupedQuery)
_FURTHER = {
    "residual, dropped": (Residual, "drop_blocks:blocks=1,int8"),
    "residual, sparse": (Residual, "sparsity24,int8"),
    "residual, recovered": (Residual, "prune:ratio=0.4:round_to=1,recover:epochs=2:samples=64,int8"),
    "attention, recovered": (FusedAttention, "svd:ratio=0.3,recover:epochs=1:samples=64"),
    "residual, tapped": (Residual, "distill_hooks:taps=auto"),
    "residual, zeros": (Residual, "sparsify:ratio=0.5"),
    "residual, coded": (Residual, "codebook:bits=4"),
    "residual, mixed": (Residual, "mixed:min_sqnr=25"),
    "residual, trained": (Residual, "int8,qat:epochs=1:samples=64"),
    "residual, halves": (Residual, "half"),
    "residual, other halves": (Residual, "bfloat16:compute=no"),
    "residual, equal": (Residual, "equalize:gain=0,int8"),
    "attention, of few bits": (FusedAttention, "weights:bits=4"),
    "depthwise, by gradients": (Depthwise, "prune:flops=0.6:criterion=taylor:round_to=1,fold"),
}


def main() -> None:
    """Run every case, write the digests, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("written", type=Path, help="JSON file for the digests")
    parser.add_argument("--against", type=Path, help="digests of an earlier run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found = {}
    for name, model, data, passes, dynamic in cases():
        found[name] = _digests(model, data, passes, dynamic)
        print(f"{name}: {len(found[name])} digests", file=sys.stderr, flush=True)
    options.written.write_text(json.dumps(found, indent=1) + "\n")
    if options.against:
        different = list(_differences(json.loads(options.against.read_text()), found))
        print("\n".join(different) or f"{len(found)} results are the same, byte for byte")
        sys.exit(bool(different))


def cases() -> Iterator[tuple[str, Any, Any, str, Any]]:
    """Yield names, models, their data, pipelines and dynamic axes."""
    for kind in _MODELS:
        yield kind.__name__, *model_of(kind), _SMALL, None
    for name, (kind, passes) in _FURTHER.items():
        yield name, *model_of(kind), passes, None
    for name in _ODD:
        made = case(name)
        yield name, made.model, dict(made.data), _SMALL, made.dynamic_shapes


def model_of(kind: Any) -> tuple[Any, Any]:
    """Make a small model and 64 samples for it, the same each time."""
    torch.manual_seed(0)
    data = example(kind, 64)
    return kind().eval(), data.float() if data.is_floating_point() else data


def _digests(model: Any, data: Any, passes: str, dynamic: Any) -> dict[str, Any]:
    """Return what one run made: plans as they are, so that a difference can be read, all else as SHA-256."""
    targets = ["onnxruntime", "tensorrt"]
    try:
        result = graphopt.optimize(model, data, passes, targets, dynamic_shapes=dynamic, bench=False, cache=False)
    except graphopt.GraphOptError as err:
        return {"refused": str(err)}
    found: dict[str, Any] = {"pipeline": str(result.pipeline)}
    for index, plan in enumerate(result.plans):
        found[f"plan {index}"] = plan.to_json()
        for name, tensor in plan.tensors.items():
            found[f"plan {index} {name}"] = hashlib.sha256(content(tensor)).hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        result.save(folder)
        for file in sorted(Path(folder).iterdir()):
            if file.suffix in (".onnx", ".py"):
                found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def _differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    for name in sorted({*before, *after}):
        one, other = before.get(name, {}), after.get(name, {})
        for item in sorted({*one, *other}):
            if one.get(item) != other.get(item):
                shown = [json.dumps(side.get(item))[:400] for side in (one, other)]
                yield f"{name}, {item}:\n  before {shown[0]}\n  after  {shown[1]}"


if __name__ == "__main__":
    main()
