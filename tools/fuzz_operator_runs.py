"""Calls of operators in processes that end where one uses memory that is not a tensor's, for `tools/fuzz_operators.py`.

These processes are forked from one into which `tools/guard_pages.c` is preloaded.
"""

from __future__ import annotations

import ctypes
import fnmatch
import operator
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import NoReturn

import torch
from torch import fx
from torch.utils import _pytree as pytree

import graphopt.quantization.ops  # noqa: F401  (registers the operators)
from graphopt.capturing.safe_graphs import evaluated
from graphopt.errors import GraphOptError
from graphopt.ir.torch_internals import OpOverload
from graphopt.loading.operators import NAMESPACES, check_operator
from graphopt.loading.refusal import HostileError
from tools.fuzz_operator_calls import Arguments, described

_SECONDS = 8
_MOST_GROWTH = 700 << 10  # KiB
_MOST_MEMORY = 4 << 30  # bytes of address space beyond what is taken at the start, so that the machine is left alone
_GREW = 77  # an exit code
_AT, _RUNNING = 0, 1  # what a process says of itself
SAID = {"ran": 2, "raised": 3, "refused": 4}  # how many calls did
_REPORTED = {-signal.SIGALRM: "time", -signal.SIGKILL: "memory", _GREW: "memory"}

Make = Callable[[OpOverload, int], Arguments]
Run = Callable[[OpOverload, Arguments], bool]  # says whether graphopt refuses


@dataclass(frozen=True)
class Finding:
    """A call that ended its process (`what` is a signal), or took too much ("time", "memory")."""

    name: str
    index: int
    what: str
    arguments: str

    @property
    def harmful(self) -> bool:
        """Whether it ended its process by itself."""
        return self.what not in _REPORTED.values()


class Examination:
    """Makes a number of calls of each operator, numbered from 0, one after the other."""

    def __init__(self, operators: Sequence[OpOverload], calls: int, make: Make, run: Run, *, low: bool) -> None:
        self._operators, self._calls, self._make, self._run, self._low = operators, calls, make, run, low
        self.said = RawArray("q", 5)  # shared with the processes

    def findings(self) -> Iterator[Finding]:
        """Make the calls; a process that ends early is replaced for those behind.

        Raises:
            RuntimeError: it was not a call that ended one.
        """
        while self.said[_AT] < len(self._operators) * self._calls:
            self.said[_RUNNING] = 0
            child = os.fork()
            if not child:
                self._work()
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code > 0 and code != _GREW:
                raise RuntimeError(f"a process ended with exit code {code}")
            if code:
                target, index = self._call()
                when = "" if self.said[_RUNNING] else " afterwards"
                what = _REPORTED.get(code) or f"{signal.Signals(-code).name}{when}"
                yield Finding(str(target), index, what, described(self._make(target, index)))
                self.said[_AT] += 1

    def _call(self) -> tuple[OpOverload, int]:
        number, index = divmod(self.said[_AT], self._calls)
        return self._operators[number], index

    def _work(self) -> NoReturn:
        code = 70
        try:
            _silence()
            guard(low=self._low)
            while self.said[_AT] < len(self._operators) * self._calls:
                target, index = self._call()
                self._one(target, self._make(target, index))
                self.said[_AT] += 1
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _one(self, target: OpOverload, arguments: Arguments) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.said[_RUNNING] = 1
        signal.alarm(_SECONDS)
        try:
            self.said[SAID["refused" if self._run(target, arguments) else "ran"]] += 1
        except Exception:  # kernels raise anything
            self.said[SAID["raised"]] += 1
        signal.alarm(0)
        self.said[_RUNNING] = 0
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > _MOST_GROWTH:
            os._exit(_GREW)


def _silence() -> None:
    """Leave nothing but tracebacks: kernels and MKL write what they like."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)


def guard(*, low: bool) -> None:
    """Let this process end where it goes beyond memory that is allocated from now on, or takes too much of it."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + _MOST_MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).guard_pages(int(low))


def operators(patterns: Sequence[str], *, allowed: bool) -> list[OpOverload]:
    """Return the overloads whose names match one of some globs.

    Args:
        patterns: of names like `aten.add.Tensor`.
        allowed: only those that a stranger's program may call.
    """
    found = []
    for name in sorted({schema.name for schema in torch._C._jit_get_all_schemas()}):
        namespace, _, packet_name = name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), packet_name) if namespace in NAMESPACES else None
        for target in [getattr(packet, overload) for overload in packet.overloads()] if packet else []:
            if any(fnmatch.fnmatchcase(str(target), pattern) for pattern in patterns):
                found += [target] if not allowed or _is_allowed(target) else []
    return found


def _is_allowed(target: OpOverload) -> bool:
    try:
        check_operator(f"torch.ops.{target}")
    except HostileError:
        return False
    return True


@torch.no_grad()
def run_alone(target: OpOverload, arguments: Arguments) -> bool:
    """Make a call, whatever it is."""
    target(*arguments[0], **arguments[1])
    return False


@torch.no_grad()
def run_as_loaded(target: OpOverload, arguments: Arguments) -> bool:
    """Make a call as graphopt does where it is a program of a stranger's; say whether that is refused."""
    root, graph = torch.nn.Module(), fx.Graph()

    def read(tensor: torch.Tensor) -> fx.Node:
        name = f"tensor{len(graph.nodes)}"
        root.register_buffer(name, tensor)
        return graph.get_attr(name)

    args, kwargs = pytree.tree_map_only(torch.Tensor, read, arguments)
    call = graph.call_function(target, args, kwargs)
    several = len(target._schema.returns) > 1
    graph.output(graph.call_function(operator.getitem, (call, 0)) if several else call)
    gm = fx.GraphModule(root, graph)
    try:
        gm, _ = evaluated(gm)
    except GraphOptError:
        return True
    gm()
    return False
