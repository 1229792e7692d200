"""How much memory the values inside a program take."""

from __future__ import annotations

import torch

from graphopt.data.batches import batch_count
from graphopt.ir.program import Program
from graphopt.ir.torch_internals import pytree
from graphopt.ir.walker import Walker


def peak_bytes_per_sample(program: Program) -> int:
    """Return the most bytes of values that one sample keeps alive between two nodes, measured on the examples."""
    examples = program.flat_examples()
    walker = Walker(program).start([examples])
    peak = 0
    for _ in program.graph.nodes:
        walker.step()
        peak = max(peak, _live_bytes(walker))
    return peak // (program.batch_size or batch_count(examples))


def _live_bytes(walker: Walker) -> int:
    """Return the bytes of all values that are held, each storage once; parameters are not counted."""
    held = (entry for node, entries in walker.values.items() if node.op != "get_attr" for entry in entries)
    tensors = (leaf for entry in held for leaf in pytree.tree_leaves(entry) if isinstance(leaf, torch.Tensor))
    sizes: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        # An input may be a small part of a large tensor of the user's, an expanded value less than it looks.
        used = min(storage.nbytes(), tensor.numel() * tensor.element_size())
        sizes[storage.data_ptr()] = max(used, sizes.get(storage.data_ptr(), 0))
    return sum(sizes.values())
