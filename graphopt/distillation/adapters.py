"""Adapters: layers between a value of the student and its teacher's, which training needs and nothing else does.

    student (N, 32, 8, 8)  ->  pooled or interpolated (N, 32, 4, 4)  ->  1x1 convolution (N, 64, 4, 4)  =  teacher
    student (N, T, 312)    ->  Linear (N, T, 768)                                                       =  teacher

They are nodes and parameters of the student's training graph, sized from what its nodes and the teacher's hold, and
hang on its taps alone: stripping those strips them (the regressors of FitNets: Romero et al. 2015, section 2.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.distillation.channels import axis_of_channels
from graphopt.distillation.named_losses import Agreement
from graphopt.ir.editor import Editor

PREFIX = "distill_adapters"  # of the names of their parameters

_ATEN = torch.ops.aten
_CONVOLUTIONS = {3: _ATEN.conv1d.default, 4: _ATEN.conv2d.default, 5: _ATEN.conv3d.default}
_POOLS = {3: _ATEN.adaptive_avg_pool1d.default, 4: _ATEN.adaptive_avg_pool2d.default}


@dataclass(frozen=True)
class Shape:
    """Sizes of a value, and which of its axes holds the channels; a dynamic size is None."""

    sizes: tuple[int | None, ...]
    axis: int

    @classmethod
    def of(cls, node: fx.Node) -> Shape:
        """Return the shape of what a node computes."""
        sizes = tuple(size if isinstance(size, int) else None for size in node.meta["val"].shape)
        return cls(sizes, axis_of_channels(node))

    @property
    def channels(self) -> int | None:
        """How many channels there are."""
        return self.sizes[self.axis]

    @property
    def places(self) -> tuple[int | None, ...]:
        """Sizes of what is neither samples nor channels."""
        return tuple(size for axis, size in enumerate(self.sizes) if axis not in (0, self.axis))

    def __str__(self) -> str:
        return "x".join(["N", *("?" if size is None else str(size) for size in self.sizes[1:])])


@dataclass(frozen=True)
class Change:
    """What an adapter does to a value of the student, in the teacher's order of axes.

    Attributes:
        axis: where the teacher has its channels.
        order: the student's axes as the teacher has them; empty: they are the same.
        places: what its places are resized to; empty: nothing.
        channels: from how many to how many; None: it leaves them.
    """

    axis: int = 1
    order: tuple[int, ...] = ()
    places: tuple[int, ...] = ()
    channels: tuple[int, int] | None = None

    def __bool__(self) -> bool:
        return bool(self.order or self.places or self.channels)

    def __str__(self) -> str:
        parts = [f"axes {'x'.join(map(str, self.order))}"] if self.order else []
        parts += [f"resized to {'x'.join(map(str, self.places))}"] if self.places else []
        parts += [f"{self.channels[0]} to {self.channels[1]} channels"] if self.channels else []
        return ", ".join(parts) or "none"


@dataclass(frozen=True)
class Classifier:
    """A head on a value: the mean over its places, and a Linear.

    Attributes:
        axis: of the channels.
        channels: how many there are, and of how many classes the head is.
    """

    axis: int
    channels: tuple[int, int]


class MismatchError(Exception):
    """Two values that nothing makes comparable; the text says why."""


def change(student: Shape, teacher: Shape, agreement: Agreement) -> Change:
    """Say what makes a value of the student comparable with its teacher's, as far as a loss needs it.

    Raises:
        MismatchError: nothing does.
    """
    if not student.sizes or not teacher.sizes:
        raise MismatchError("one of the two has no axis of samples")
    if agreement == "samples":
        return Change(teacher.axis)
    both = f"the student's value is {student}, the teacher's {teacher}"
    if len(student.sizes) != len(teacher.sizes) or len(student.sizes) < 2:
        raise MismatchError(f"{both}: they have other axes")
    if agreement == "heads":
        if any(_differ(*pair) for pair in zip(student.sizes[:-1], teacher.sizes[:-1], strict=True)):
            raise MismatchError(f"{both}: heads and tokens must be as many")
        return Change(teacher.axis)
    order: tuple[int, ...] = ()
    if student.axis != teacher.axis:
        others = [axis for axis in range(len(student.sizes)) if axis != student.axis]
        order = (*others[: teacher.axis], student.axis, *others[teacher.axis :])
    places: tuple[int, ...] = ()
    if any(_differ(*pair) for pair in zip(student.places, teacher.places, strict=True)):
        known = [size for size in teacher.places if size is not None]
        if teacher.axis != 1 or len(teacher.sizes) not in _POOLS or len(known) < len(teacher.places):
            raise MismatchError(f"{both}: their places cannot be resized")
        places = tuple(known)
    channels = None
    if agreement == "sizes" and student.channels != teacher.channels:
        if student.channels is None or teacher.channels is None:
            raise MismatchError(f"{both}: a dynamic number of channels has no layer")
        channels = (student.channels, teacher.channels)
    return Change(teacher.axis, order, places, channels)


def insert_adapter(
    editor: Editor, node: fx.Node, wanted: Change | Classifier, number: int, generator: torch.Generator
) -> fx.Node:
    """Insert an adapter or a head on a value at the graph's insertion point; return what it gives."""
    site = f"{PREFIX}.{number}"
    found = node
    if isinstance(wanted, Classifier):
        places = [axis for axis in range(1, node.meta["val"].dim()) if axis != wanted.axis]
        found = editor.call(_ATEN.mean.dim, node, places, like=node, site=site) if places else node
        return _layer(editor, found, wanted.channels, site, generator, last=True)
    if wanted.order:
        found = editor.call(_ATEN.permute.default, found, list(wanted.order), like=node, site=site)
    grows = bool(wanted.places) and math.prod(wanted.places) > math.prod(found.meta["val"].shape[2:])
    if wanted.places and not grows:
        found = _resized(editor, found, wanted.places, site)
    if wanted.channels:
        found = _layer(editor, found, wanted.channels, site, generator, last=wanted.axis != 1)
    if grows:
        found = _resized(editor, found, wanted.places, site)
    return found


def _layer(
    editor: Editor, node: fx.Node, channels: tuple[int, int], site: str, generator: torch.Generator, *, last: bool
) -> fx.Node:
    """Insert a 1x1 convolution, or a Linear where channels come last, initialised as torch's own are."""
    value = node.meta["val"]
    convolves = not last and value.dim() in _CONVOLUTIONS
    kernel = (1,) * (value.dim() - 2) if convolves else ()
    bound = channels[0] ** -0.5
    parameters = []
    for name, shape in (("weight", (channels[1], channels[0], *kernel)), ("bias", (channels[1],))):
        drawn = (torch.rand(shape, generator=generator) * 2 - 1) * bound
        editor.put(f"{site}.{name}", drawn.to(value.dtype), trainable=True)
        parameters.append(editor.read(f"{site}.{name}", like=node, site=site))
    target = _CONVOLUTIONS[value.dim()] if convolves else _ATEN.linear.default
    return editor.call(target, node, *parameters, like=node, site=site)


def _resized(editor: Editor, node: fx.Node, places: tuple[int, ...], site: str) -> fx.Node:
    """Average over what is larger than wanted, interpolate what is smaller."""
    value = node.meta["val"]
    if all(isinstance(size, int) and size >= want for size, want in zip(value.shape[2:], places, strict=True)):
        return editor.call(_POOLS[value.dim()], node, list(places), like=node, site=site)
    if value.dim() == 3:
        return editor.call(_ATEN.upsample_linear1d.default, node, list(places), False, like=node, site=site)
    return editor.call(_ATEN.upsample_bilinear2d.default, node, list(places), False, like=node, site=site)


def _differ(one: int | None, other: int | None) -> bool:
    """Whether two sizes are known to differ; dynamic ones are compared when there are values."""
    return one is not None and other is not None and one != other
