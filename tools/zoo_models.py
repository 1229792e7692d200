"""The architectures that pruning is proved on: random weights, small sizes, nothing downloaded.

Each entry builds a model and the arguments of one call with a batch of 2.
"""

from __future__ import annotations

from collections.abc import Callable

import zoo_attention
import zoo_convolution
import zoo_features
import zoo_kernels
import zoo_own
import zoo_sequence
import zoo_timm
import zoo_torchvision
import zoo_transformers
import zoo_transformers_more
import zoo_transformers_tasks
import zoo_weights
from zoo_subject import Build

# Models written for one structure each: so small that what must stay may be most of them.
STRUCTURES = ("attention", "convolution", "features", "kernels", "sequence", "weights")


def families() -> dict[str, Callable[[], dict[str, Build]]]:
    """Return each family by name with the function that lists its members."""
    return {
        "torchvision": zoo_torchvision.subjects,
        "timm": zoo_timm.subjects,
        "transformers": lambda: zoo_transformers.subjects() | zoo_transformers_more.subjects(),
        "tasks": zoo_transformers_tasks.subjects,
        "own": zoo_own.subjects,
        "attention": lambda: zoo_attention.subjects,
        "convolution": lambda: zoo_convolution.subjects,
        "features": lambda: zoo_features.subjects,
        "kernels": lambda: zoo_kernels.subjects,
        "sequence": lambda: zoo_sequence.subjects,
        "weights": lambda: zoo_weights.subjects,
    }
