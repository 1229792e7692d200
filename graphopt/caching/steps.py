"""Steps of a run that were planned before: their plans, by the content of all that they were made of.

    key      the program before the step, the pass with its options and source, target, seed, libraries
    reads    what had been read of the data by the end of the step, and on which machine, if a time was measured

A plan is found where the key is the same, and what was read then reads the same now. The digest of a program that a
step made follows from that of the one before it, the plan, and the source of the pass, which determine it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from graphopt.caching import digests
from graphopt.caching.digests import digest_of
from graphopt.caching.reads import Reads
from graphopt.caching.store import CacheEntry, Store
from graphopt.errors import PassError
from graphopt.ir.memory import mapped
from graphopt.ir.plain_data import Json
from graphopt.ir.program import Program
from graphopt.pipeline.checkpoints import State
from graphopt.pipeline.context import Context
from graphopt.pipeline.order import Step
from graphopt.pipeline.plan import Plan

_Kept = tuple[CacheEntry, Mapping[str, torch.Tensor]]


@dataclass
class Memory:
    """Entries of one job that are not on disk, and digests of its programs.

    Attributes:
        most: bytes that the tensors of all entries may take; what was kept longest ago goes first.
        alone: whether a program was met that is known in this process alone, see `digests.asks_the_user`.
    """

    most: int = 1 << 30
    alone: bool = field(default=False, init=False)
    _entries: dict[str, list[_Kept]] = field(default_factory=dict)
    _digests: weakref.WeakKeyDictionary[Program, str] = field(default_factory=weakref.WeakKeyDictionary)

    def digest(self, program: Program) -> str:
        """Return the digest of a program, computed once."""
        if program not in self._digests:
            self.follows(program, digests.of_program(program))
        return self._digests[program]

    def follows(self, program: Program, digest: str) -> None:
        """Note the digest of a program that a plan made."""
        self._digests.setdefault(program, digest)
        self.alone |= digests.asks_the_user(program)

    def entries(self, key: str) -> Iterator[_Kept]:
        """Yield what is kept under a key."""
        yield from self._entries.get(key, ())

    def add(self, key: str, entry: CacheEntry, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep an entry."""
        self._entries.setdefault(key, []).append((entry, mapped(tensors)))
        while self._entries and self._bytes() > self.most:
            del self._entries[next(iter(self._entries))]

    def _bytes(self) -> int:
        kept = (tensors for found in self._entries.values() for _, tensors in found)
        return sum(tensor.nbytes for tensors in kept for tensor in tensors.values())


@dataclass
class StepCache:
    """The plans of one run that are found, and those that are kept.

    Attributes:
        memory: of the job.
        store: on disk, None for none.
        found: texts of the steps that were found.
        reads: what the run has read.
    """

    memory: Memory
    store: Store | None = None
    found: list[str] = field(default_factory=list)
    reads: Reads = field(default_factory=Reads)
    _kind: str | None = field(default=None, init=False)  # of the step that was last looked for
    _key: str | None = field(default=None, init=False)
    _stages: set[str] = field(default_factory=set, init=False)  # whose states are on disk

    def find(self, step: Step, program: Program, ctx: Context) -> Plan | None:
        """Return the plan that this step made of the same before, None if there is none."""
        self._kind = digests.of_pass(step.instance)
        self._key = self._key_of(step, program, ctx)
        for entry, tensors in self._kept(self._key):
            try:
                plan = step.instance.plan_type.from_json(entry.content, tensors)
            except PassError:  # of another time, in spite of its key: then it is made anew
                continue
            self.reads.timed |= entry.machine is not None
            self.found.append(step.text)
            return plan
        return None

    def part(self, name: str, compute: Callable[[], dict[str, Json]]) -> dict[str, Json]:
        """Return what the step that was last looked for computed under a name before, or compute and keep it."""
        if self._key is None:
            return compute()
        key = digest_of("part", self._key, name)
        for entry, _ in self._kept(key):
            self.reads.timed |= entry.machine is not None
            return dict(entry.content)
        content = compute()
        self._add(key, self._entry(content), {})
        return content

    def load(self, stage: str) -> State | None:
        """Return the state of a stage, if the step that was last looked for has come to it before."""
        if self._key is None:
            return None
        key = _of_stage(self._key, stage)
        self._stages.add(key)
        return next(((entry.content, tensors) for entry, tensors in self._kept(key)), None)

    def save(self, stage: str, content: Mapping[str, Json], tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep the state of a stage on disk, in place of the one before, until the plan of its step is kept."""
        store = self._disk()
        if self._key is not None and store is not None:
            self._stages.add(_of_stage(self._key, stage))
            store.add(_of_stage(self._key, stage), self._entry(dict(content)), tensors, instead=True)

    def keep(self, plan: Plan) -> None:
        """Keep the plan of the step that was last looked for, which has been carried out and checked."""
        if self._key is None:
            return
        while self._stages and self.store is not None:
            self.store.remove(self._stages.pop())
        content = plan.to_json()
        try:
            whole = type(plan).from_json(content, plan.tensors).to_json() == content
        except PassError:
            whole = False  # a number that is not finite, which JSON has none for
        if whole:
            self._add(self._key, self._entry(content), plan.tensors)

    def _entry(self, content: dict[str, Json]) -> CacheEntry:
        """Return content with what it may depend on."""
        reads = sorted(self.reads.seen.items(), key=repr)
        machine = digests.of_machine() if self.reads.timed else None
        return CacheEntry(reads=reads, machine=machine, content=content)  # type: ignore[arg-type]

    def follows(self, before: Program, after: Program, plan: Plan) -> None:
        """Note what the plan of the step that was last looked for made of a program."""
        if after is not before and self._kind is not None:
            by = digests.of_computing(), self._kind, digests.of_plan(plan)
            made = digest_of("applied", by, self.memory.digest(before))
            self.memory.follows(after, made)

    def measured(
        self,
        program: Program,
        by: str,
        measure: Callable[[], dict[str, Json]],
        check: Callable[[dict[str, Json]], object] = dict,
    ) -> dict[str, Json]:
        """Return what was measured of a program, or measure and keep it.

        Args:
            program: the program.
            by: digest of all that it is measured with.
            measure: measures it.
            check: raises a ValueError for what is of another form.
        """
        key = digest_of("measured", digests.of_computing(), self.memory.digest(program), by)
        for entry, _ in self._kept(key):
            found: dict[str, Json] = dict(entry.content)
            with contextlib.suppress(ValueError):  # of another form, in spite of its key: then it is measured anew
                check(found)
                return found
        content = measure()
        self._add(key, CacheEntry(content=content), {})  # type: ignore[arg-type] # its own word for JSON
        return content

    def _key_of(self, step: Step, program: Program, ctx: Context) -> str | None:
        if self._kind is None:
            return None
        programs = [self.memory.digest(program), self.memory.digest(ctx.original)]
        if step.instance.reads_floating and ctx.floating is not None:
            programs.append(self.memory.digest(ctx.floating))
        judge = digests.of_evaluation(ctx.metric) if step.instance.chooses_by_metric and ctx.metric is not None else ""
        if judge is None:
            return None
        given = ctx.targets, ctx.target, ctx.seed, ctx.loss is None, sorted(ctx.timers), bool(step.inserted_for), judge
        return digest_of("plan", digests.of_computing(), self._kind, programs, given, sorted(self.reads.sources))

    def _kept(self, key: str | None) -> Iterator[_Kept]:
        if key is None:
            return
        for place in (self.memory, None if self.memory.alone else self.store):
            for entry, tensors in place.entries(key) if place is not None else ():
                here = entry.machine is None or entry.machine == digests.of_machine()
                if here and all(self.reads.again(read) == digest for read, digest in entry.reads):
                    yield entry, tensors

    def _disk(self) -> Store | None:
        return None if self.reads.judged or self.memory.alone else self.store

    def _add(self, key: str, entry: CacheEntry, tensors: Mapping[str, torch.Tensor]) -> None:
        store = self._disk()
        if store is None or not store.add(key, entry, tensors):
            self.memory.add(key, entry, tensors)


def _of_stage(key: str, stage: str) -> str:
    return digest_of("stage", key, stage)
