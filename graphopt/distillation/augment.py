"""Augmentation: new views of the same inputs, shown to teacher and student alike.

The teacher says what a view means, so a view need not keep the label; it only has to look like an input. "Function
matching" on augmented views is what makes distillation on few samples work (Beyer et al. 2022). Labels of mixed images
are mixed likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from graphopt.data.batches import Batch
from graphopt.distillation.label_losses import shares_of
from graphopt.ir.program import Program

View: TypeAlias = Callable[[Batch, torch.Generator], Batch]  # a new view of the same samples

_CHANNELS = (1, 3, 4)  # grey, colour, colour with alpha
_SMALLEST = 16  # pixels a side; below it a shifted crop loses too much
_REACH = 8  # an image is shifted by at most this fraction of its side


def channel_axis(program: Program) -> int | None:
    """Return the axis of the channels of images, 1 or 3; None where the inputs of `program` look like no images.

    Images are one input of floats or bytes: (batch, 1 | 3 | 4, at least 16, at least 16), or channels last.
    """
    spec = program.inputs[0]
    if len(program.inputs) != 1 or len(spec.shape) != 4:
        return None
    if not spec.dtype.is_floating_point and spec.dtype is not torch.uint8:
        return None
    for axis, sides in ((1, spec.shape[2:]), (3, spec.shape[1:3])):
        large = all(isinstance(size, str) or size >= _SMALLEST for size in sides)
        if spec.shape[axis] in _CHANNELS and large:
            return axis
    return None


def flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror about half of the images left to right."""
    chosen = torch.rand(images.shape[0], generator=generator) < 0.5
    return torch.where(chosen.to(images.device).view(-1, 1, 1, 1), images.flip(3), images)


def shift(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Move every image by up to an eighth of its size either way; the border is repeated, whatever its value."""
    count, channels, height, width = images.shape
    rows, columns = _moved(height, count, generator), _moved(width, count, generator)
    samples = torch.arange(count).view(-1, 1, 1, 1)
    planes = torch.arange(channels).view(1, -1, 1, 1)
    index = (samples, planes, rows.view(count, 1, height, 1), columns.view(count, 1, 1, width))
    return images[tuple(part.to(images.device) for part in index)]


def _moved(size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Return, for each image, the source index of every row (or column): (count, size)."""
    reach = size // _REACH
    offset = torch.randint(-reach, reach + 1, (count, 1), generator=generator)
    return (torch.arange(size) + offset).clamp(0, size - 1)


@dataclass(frozen=True)
class LabelColumn:
    """Which column of a batch holds labels.

    Attributes:
        index: of the column.
        classes: of how many classes class numbers are; None: of no classes.
        axis: of the classes in the output that they are for.
        axes: how many a batch of labels has: with one each is of a whole sample.
    """

    index: int
    classes: int | None = None
    axis: int = 1
    axes: int = 1


def view_of(names: Sequence[str], program: Program, labels: LabelColumn | None = None) -> View:
    """Return a function that makes new views of the first input, an image, and mixes labels where it mixes images.

    Args:
        names: "flip", "shift", "mixup" and "cutmix", carried out in this order.
        program: what the images are for.
        labels: where the labels are; None: other columns are handed on.
    """
    if not names:
        return lambda batch, generator: batch
    channels = channel_axis(program) or 1

    def view(batch: Batch, generator: torch.Generator) -> Batch:
        images, *others = batch
        images = images.movedim(channels, 1)
        for name in names:
            if name in _MIXING:
                images, share, order = _MIXING[name](images, generator)
                if labels is not None:
                    others[labels.index - 1] = _mixed(others[labels.index - 1], labels, share, order)
            else:
                images = _MOVING[name](images, generator)
        return (images.movedim(1, channels), *others)

    return view


def mixup(images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Return every image blended with another of the batch, its share, and which the others are.

    Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization", with alpha 1.
    """
    share, order = float(torch.rand((), generator=generator)), _other(images, generator)
    mixed = share * images + (1 - share) * images[order]
    return (mixed if images.is_floating_point() else mixed.round()).to(images.dtype), share, order


def cutmix(images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Return every image with a rectangle of another of the batch, its share, and which the others are.

    Yun et al. 2019, "CutMix", equations 1 and 2.
    """
    order = _other(images, generator)
    height, width = images.shape[2:]
    side = (1 - float(torch.rand((), generator=generator))) ** 0.5
    row, column = (int(torch.randint(size, (), generator=generator)) for size in (height, width))
    tall, wide = int(side * height) // 2, int(side * width) // 2
    rows, columns = slice(max(row - tall, 0), row + tall), slice(max(column - wide, 0), column + wide)
    mixed = images.clone()
    mixed[:, :, rows, columns] = images[order][:, :, rows, columns]
    cut_out = len(range(height)[rows]) * len(range(width)[columns])
    return mixed, 1 - cut_out / (height * width), order


def _other(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(len(images), generator=generator).to(images.device)


def _mixed(labels: torch.Tensor, column: LabelColumn, share: float, order: torch.Tensor) -> torch.Tensor:
    """Return labels as shares: of classes, where they are class numbers."""
    if not labels.is_floating_point() and column.classes is not None:
        labels = shares_of(labels, column.classes, column.axis)
    return share * labels + (1 - share) * labels[order]


_MOVING = {"flip": flip, "shift": shift}
_MIXING = {"mixup": mixup, "cutmix": cutmix}
