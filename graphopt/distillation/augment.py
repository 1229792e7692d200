"""Label-free augmentation: new views of the same inputs, shown to teacher and student alike.

The teacher says what a view means, so a view need not keep the label; it only has to look like an input. "Function
matching" on augmented views is what makes distillation on few samples work (Beyer et al. 2022).
"""

from __future__ import annotations

import torch

from graphopt.ir.program import Program

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
