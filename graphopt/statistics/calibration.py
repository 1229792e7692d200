"""Calibration: an analysis that runs typical data through a program and gathers statistics of chosen nodes.

Observers are nodes: a copy of the program gets one behind each value asked about, every batch walks once through it,
each observed value goes to its statistics and is forgotten, and the statistics are cached by node.
Nothing but the statistics outlives a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import fx

from graphopt.data.batches import Batch, SampleSource, whole_batches
from graphopt.errors import DataError, PassError
from graphopt.ir.editor import Editor
from graphopt.ir.graph import behind_inputs
from graphopt.ir.program import Program
from graphopt.ir.provenance import module_path
from graphopt.ir.walker import Walker
from graphopt.pipeline.context import Context, Progress
from graphopt.quantization.histogram import NotFiniteError, Statistic
from graphopt.quantization.ops import OBSERVE

StatisticT = TypeVar("StatisticT", bound=Statistic)


class Calibration:
    """Statistics of one program on one set of samples, each gathered once however many passes ask.

    Example:
        >>> calibration = Calibration.of(ctx, program, "int8", limit=512, batch_size=32)  # doctest: +SKIP
        >>> histogram, = calibration.gather([("conv2d", Histogram())])                    # doctest: +SKIP
    """

    def __init__(
        self, program: Program, samples: SampleSource, *, limit: int | None, batch_size: int, progress: Progress
    ) -> None:
        self._program = program
        self._samples = samples
        self._limit = limit
        self._batch_size = batch_size
        self._progress = progress
        self._known: dict[tuple[str, str], Statistic] = {}

    @classmethod
    def of(cls, ctx: Context, program: Program, pass_name: str, *, limit: int | None, batch_size: int) -> Calibration:
        """Return the calibration of `program` that all passes of a run share.

        Raises:
            DataError: the user gave no samples.
        """
        samples = ctx.need_samples(pass_name, "to measure the ranges of activations")
        return ctx.analysis(
            program,
            f"calibration/{limit}/{batch_size}",
            lambda: cls(program, samples, limit=limit, batch_size=batch_size, progress=ctx.progress),
        )

    def gather(self, requests: Iterable[tuple[str, StatisticT]]) -> list[StatisticT]:
        """Return the statistic of each request; those not known yet are gathered in one run over the samples.

        Args:
            requests: node names, each with an empty statistic of the kind wanted.

        Raises:
            DataError: the samples do not fit the program, or make a value NaN or infinite.
        """
        wanted = [(name, statistic, (name, statistic.key)) for name, statistic in requests]
        missing: dict[str, list[Statistic]] = {}
        statistic: Statistic
        for name, statistic, key in wanted:
            if key not in self._known:
                self._known[key] = statistic
                missing.setdefault(name, []).append(statistic)
        if missing:
            try:
                observe(self._program, missing, self._batches())
            except BaseException:
                for name, statistics in missing.items():  # half-filled statistics must not be found again
                    for statistic in statistics:
                        del self._known[name, statistic.key]
                raise
        return [self._known[key] for _, _, key in wanted]  # type: ignore[misc]

    def _batches(self) -> Iterator[Batch]:
        batches = whole_batches(self._samples, self._batch_size, self._limit, takes=self._program.takes)
        empty = True
        for batch in self._progress.track(batches, "calibrating"):
            empty = False
            yield batch
        if empty:
            raise no_batch(self._program)


def observe(program: Program, wanted: Mapping[str, Iterable[Statistic]], batches: Iterable[Batch]) -> None:
    """Run `batches` through `program` and update the statistics wanted of each named node.

    Raises:
        DataError: a batch does not fit the program's inputs, or makes an observed value NaN or infinite.
    """
    sinks = {name: list(statistics) for name, statistics in wanted.items()}
    collector = _Collector(insert_observers(program, sinks), sinks)
    for index, batch in enumerate(batches):
        check_batch(program, batch, index)
        collector.index = index
        collector.run(batch)


def read_batches(program: Program, samples: SampleSource, *, limit: int, batch_size: int) -> list[Batch]:
    """Read at most `limit` samples in batches of a size that the program takes.

    Raises:
        DataError: there are not enough of them for one batch.
    """
    batches = list(whole_batches(samples, batch_size, limit, takes=program.takes))
    if not batches:
        raise no_batch(program)
    return batches


def no_batch(program: Program, purpose: str = "") -> DataError:
    """Return the error of data that hold no batch that `program` takes.

    Args:
        program: what takes them.
        purpose: what for, with a space in front.
    """
    least = program.takes(1)
    need = "one sample" if least == 1 else f"{least} samples, the fewest that the program takes at once"
    return DataError(f"The calibration data holds no batch{purpose}. Give at least {need}.")


def insert_observers(program: Program, names: Iterable[str]) -> Program:
    """Return a copy of `program` with an observer behind each named value; observers are called by that name.

    Before: %conv -> %relu        After: %conv -> observe(%conv, "conv") -> %relu

    Raises:
        PassError: a name is not a node of the program.
    """
    program = program.copy()
    editor = Editor(program.graph_module, "calibration")
    nodes = {node.name: node for node in program.graph.nodes}
    for name in names:
        if name not in nodes:
            raise PassError(f"There is no node `{name}` to observe in the program. This is a bug in the pass.")
        node = nodes[name]
        with editor.graph.inserting_after(behind_inputs(node)):
            observer = editor.call(OBSERVE, node, name, like=node, site=name)
        node.replace_all_uses_with(observer, delete_user_cb=lambda user, own=observer: user is not own)
    return program.with_graph(editor.finish())


class _Collector(Walker):
    """Hands every observed value to its statistics."""

    def __init__(self, program: Program, sinks: Mapping[str, list[Statistic]]) -> None:
        super().__init__(program)
        self._sinks = sinks
        self.index = 0

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call; an observer passes its operand on as it is."""
        if node.target is not OBSERVE:
            return super().call(node, args, kwargs)
        value, name = args
        for statistic in self._sinks[name]:
            update(statistic, value, node, name, self.index)
        return value


def update(statistic: Statistic, value: torch.Tensor, node: fx.Node, name: str, index: int) -> None:
    """Show a statistic what a node called `name`, or its observer, gave in batch `index`.

    Raises:
        DataError: it is NaN or infinite.
    """
    try:
        statistic.update(value)
    except NotFiniteError as err:
        module = module_path(node)
        where = f"`{name}`" + (f" in module `{module}`" if module else "")
        raise DataError(
            f"Calibration batch {index} makes {where} NaN or infinite. Leave out the samples that do, or "
            "check that they are scaled as in training."
        ) from err


def check_batch(program: Program, batch: Batch, index: int) -> None:
    """Raise a DataError where batch `index` is none that the program takes, or holds NaN."""
    if len(batch) != len(program.inputs):
        raise DataError(
            f"Calibration batch {index} holds {len(batch)} tensors, the program takes {len(program.inputs)}."
        )
    for spec, tensor in zip(program.inputs, batch, strict=True):
        sizes = zip(spec.shape, tensor.shape, strict=False)
        fits = tensor.dim() == len(spec.shape) and all(isinstance(want, str) or want == got for want, got in sizes)
        if not fits or tensor.dtype != spec.dtype:
            found = f"{'x'.join(map(str, tensor.shape)) or 'scalar'} {str(tensor.dtype).removeprefix('torch.')}"
            raise DataError(f"Calibration batch {index} gives {found} for the input {spec}.")
        if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):  # -inf may be a mask
            raise DataError(f"Calibration batch {index} holds NaN in input `{spec.name}`. Leave out those samples.")
