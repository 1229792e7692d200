"""What a pass raises or returns against its contract, as one sentence that names the pass, its file and the line."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from graphopt.errors import PassError, foreign_code, line_of
from graphopt.ir.program import Program
from graphopt.pipeline.plan import Plan, Refusal

PassLike = Any  # an instance or class of `Pass`, which imports the plan that this module checks
_BUILT_IN = "graphopt.passes."


def called(pass_: PassLike, deed: str, *, stored: bool = False) -> contextlib.AbstractContextManager[None]:
    """Turn what a method of a pass raises, unless it is one of our errors, into a `PassError`.

    What a pass of our own raises is a bug, which no user can repair, and stays as it is.

    Args:
        pass_: the pass, or its class where there is no instance yet.
        deed: what it was called for: "plan", "apply", ...
        stored: whether it was called with what a file holds, which may be anything: then that is at fault.
    """
    kind: Any = pass_ if isinstance(pass_, type) else type(pass_)
    if kind.__module__.startswith(_BUILT_IN) and not stored:
        return contextlib.nullcontext()

    def failed(said: str, err: BaseException) -> PassError:
        line = line_of(err, kind.__module__)
        where = f" ({line})" if line else ""
        return PassError(
            f"Pass `{kind.name}` from {_file(kind)} failed to {deed}: {said}{where}. Repair the pass, or leave it out."
        )

    return foreign_code(failed)


def checked_plan(pass_: PassLike, plan: object) -> Plan:
    """Return what `plan` returned.

    Raises:
        PassError: it is no plan of the type that the pass declares, or its fields are not what they must be.
    """
    if not isinstance(plan, Plan) or not isinstance(plan, pass_.plan_type):
        raise _returned(pass_, "plan", plan, pass_.plan_type)
    tensors = plan.tensors.values() if isinstance(plan.tensors, Mapping) else [plan.tensors]
    fields: tuple[tuple[str, Iterable[object], type], ...] = (
        ("sites", plan.sites, str),
        ("refusals", plan.refusals, Refusal),
        ("tensors", tensors, torch.Tensor),
    )
    for name, values, wanted in fields:
        odd = next((value for value in values if not isinstance(value, wanted)), None)
        if odd is not None:
            raise PassError(
                f"Pass `{pass_.name}` from {_file(type(pass_))} planned with a {type(odd).__name__} in `{name}`, "
                f"where each is a {wanted.__name__}. Repair the pass."
            )
    return plan


def checked_program(pass_: PassLike, program: object) -> Program:
    """Return what `apply` returned; raises `PassError` where it is no program."""
    if not isinstance(program, Program):
        raise _returned(pass_, "apply", program, Program)
    return program


def _returned(pass_: PassLike, method: str, value: object, wanted: type) -> PassError:
    code = getattr(inspect.unwrap(getattr(type(pass_), method)), "__code__", None)
    place = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
    return PassError(
        f"Pass `{pass_.name}` from {_file(type(pass_))} returned a {type(value).__name__} from `{method}`{place}, "
        f"not a {wanted.__name__}. Repair the pass, or leave it out."
    )


def _file(kind: type) -> str:
    """Return the file of a class; the name of its module where it has none, as in a notebook."""
    return str(getattr(sys.modules.get(kind.__module__), "__file__", None) or kind.__module__)
