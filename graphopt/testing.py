"""What a pass author tests with: structural equality of programs, and every promise of the pass contract.

def test_keeps_the_contract():
    check_pass(Fold(), Net(), torch.randn(2, 3, 8, 8))

def test_folds_the_norm():
    assert_same_program(run_pass(Fold(), Given(), inputs), capture(Expected(), inputs))
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import fx, nn

from graphopt.capturing.capture import capture
from graphopt.data.batches import Batch, batch_count, taken
from graphopt.errors import VerifyError
from graphopt.ir.canonical import canonical_form
from graphopt.ir.invariants import check_invariants
from graphopt.ir.program import Program
from graphopt.job.manifest import fingerprint as fingerprint
from graphopt.measure.equivalence import measure
from graphopt.pipeline.context import Context
from graphopt.pipeline.order import AnyPass
from graphopt.pipeline.plan import Plan
from graphopt.targets.description import TargetDescription

Inputs = torch.Tensor | Sequence[Any]


@dataclass(frozen=True)
class TensorSamples:
    """Calibration data held in memory: one tensor per program input, first axis samples; and labels, if there are."""

    tensors: tuple[torch.Tensor, ...]
    labels: torch.Tensor | None = None

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield batches of at most `batch_size` samples, `limit` samples in all."""
        count = batch_count(self.tensors)
        count = count if limit is None else min(limit, count)
        for start in range(0, count, batch_size):
            yield taken(self.tensors, slice(start, min(start + batch_size, count)))

    def labelled_batches(
        self, batch_size: int, limit: int | None = None
    ) -> Iterator[tuple[Batch, torch.Tensor | None]]:
        """Yield pairs of inputs and labels as `batches` does; labels are None where there are none."""
        start = 0
        for batch in self.batches(batch_size, limit):
            end = start + batch_count(batch)
            yield batch, None if self.labels is None else self.labels[start:end]
            start = end


@dataclass(frozen=True)
class CheckedPass:
    """What `check_pass` ran: the program before, the plan, and the program after."""

    before: Program
    plan: Plan
    after: Program


def check_pass(
    pass_: AnyPass,
    subject: nn.Module | Program,
    inputs: Inputs,
    *,
    data: Sequence[torch.Tensor] | None = None,
    target: TargetDescription | None = None,
    idempotent: bool = True,
    seed: int = 0,
) -> CheckedPass:
    """Run a pass and check every promise of the contract in `graphopt.pipeline.pass_base`.

    1. Neither `plan` nor `apply` changes the program it is given.
    2. The result lints, keeps the signature unless declared otherwise, has on every node a `meta["val"]` equal to
       what fake propagation gives, no dangling attribute and no NaN parameter (`invariants.check_invariants`).
    3. A plan without sites changes nothing, one with sites changes something; every refusal gives a reason.
    4. Planning again gives the same plan; a plan that went through its files gives the same bytes.
    5. An exact pass keeps the outputs within its tolerance.
    6. With `idempotent`, a second run finds nothing to do.

    Args:
        pass_: the pass with its options.
        subject: a module, which is captured first, or a program.
        inputs: example inputs, the only one or a sequence in order.
        data: calibration data, one tensor per input, first axis samples.
        target: the description the pass plans for.
        idempotent: whether the pass declares that a second run changes nothing.
        seed: of the context.

    Raises:
        VerifyError: a promise is broken; the message says which.
    """
    args = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    before = subject if isinstance(subject, Program) else capture(subject, args)

    def context() -> Context:
        targets = (target,) if target is not None else ()
        ctx = Context(original=before, targets=targets, target=target, seed=seed)
        return ctx if data is None else ctx.with_data(TensorSamples(tuple(data)))

    untouched = fingerprint(before)
    plan = pass_.plan(before, context())
    after = pass_.apply(before, plan)
    _demand(fingerprint(before) == untouched, pass_, "changed the program it was given. Work on `program.copy()`")
    exact = pass_.tolerance is not None
    check_invariants(before, after, pass_.name, changes_outputs=pass_.changes_outputs, exact=exact)
    _check_honesty(pass_, plan, before, after)
    _check_replay(pass_, plan, pass_.plan(before, context()), before, after)
    if pass_.tolerance is not None:
        examples = before.flat_examples()
        error = measure(before, after.call_flat, examples, declared=after.outputs, settled=True).relative
        _demand(error <= pass_.tolerance, pass_, f"claims {pass_.tolerance:g} and moved an output by {error:.3g}")
    if idempotent:
        again = pass_.plan(after, context())
        _demand(not again.sites, pass_, f"found {list(again.sites)} to rewrite in its own result")
    return CheckedPass(before, plan, after)


def run_pass(
    pass_: AnyPass, subject: nn.Module | Program, inputs: Inputs, *, data: Sequence[torch.Tensor] | None = None
) -> Program:
    """Capture if need be, plan and apply; return the new program."""
    args = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    program = subject if isinstance(subject, Program) else capture(subject, args)
    ctx = Context(original=program)
    return pass_.apply(program, pass_.plan(program, ctx if data is None else ctx.with_data(TensorSamples(tuple(data)))))


def assert_same_program(found: Program, expected: Program, *, compare_tensors: bool = True) -> None:
    """Assert that two programs are equal up to the names of nodes and attributes and the order of independent calls.

    Args:
        found: what a pass made.
        expected: what it should have made.
        compare_tensors: also compare the values the attributes hold, with the tolerance of their dtype
            (`torch.testing.assert_close`).

    Raises:
        AssertionError: with a unified diff of the canonical texts, or the name of the first tensor that differs.
    """
    one, other = canonical_form(found), canonical_form(expected)
    if one.text != other.text:
        diff = difflib.unified_diff(other.text.splitlines(), one.text.splitlines(), "expected", "found", lineterm="")
        raise AssertionError("The programs differ:\n" + "\n".join(diff))
    if compare_tensors:
        for name, have, want in zip(one.attributes, one.tensors, other.tensors, strict=True):
            torch.testing.assert_close(have, want, msg=lambda text, name=name: f"Tensor `{name}`: {text}")  # type: ignore[misc]


def _check_honesty(pass_: AnyPass, plan: Plan, before: Program, after: Program) -> None:
    changed = fingerprint(before) != fingerprint(after)
    _demand(changed or not plan.sites, pass_, f"lists {list(plan.sites)} as rewritten and changed nothing")
    _demand(not changed or bool(plan.sites), pass_, "changed the program and its plan lists no site")
    silent = [refusal.site for refusal in plan.refusals if not refusal.reason.strip()]
    _demand(not silent, pass_, f"left {silent} alone without a reason")


def _check_replay(pass_: AnyPass, plan: Plan, again: Plan, before: Program, after: Program) -> None:
    """Same input, same plan; same plan, same bytes, also through the plan's files."""
    _demand(again.to_json() == plan.to_json(), pass_, "planned differently the second time")
    same = again.tensors.keys() == plan.tensors.keys() and all(
        torch.equal(again.tensors[name], plan.tensors[name]) for name in plan.tensors
    )
    _demand(same, pass_, "computed other tensors for its plan the second time")
    data = json.loads(json.dumps(plan.to_json()))
    stored = pass_.plan_type.from_json(data, load(save({name: t.contiguous() for name, t in plan.tensors.items()})))
    wanted = fingerprint(after)
    _demand(fingerprint(pass_.apply(before, again)) == wanted, pass_, "made other bytes of the same plan")
    _demand(fingerprint(pass_.apply(before, stored)) == wanted, pass_, "made other bytes of the stored plan")


def _demand(holds: bool, pass_: AnyPass, failure: str) -> None:
    if not holds:
        raise VerifyError(f"Pass `{pass_.name}` {failure}. This is a bug in the pass.")


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return f"{value.dtype}{tuple(value.shape)}" if isinstance(value, torch.Tensor) else str(value)
