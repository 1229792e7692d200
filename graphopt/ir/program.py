"""Program: the one source of truth about a captured model.

A program is a value. It is never changed in place: a pass works on `copy()`, which shares the tensors that
stay as they are and returns a new program. Shared tensors are frozen; whoever trains works on
`copy(share_tensors=False)`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import fx

from graphopt.errors import UsageError
from graphopt.files import ScratchDirectory, failing_late, replacing
from graphopt.ir.batch_sizes import BatchSizes
from graphopt.ir.buffers import call_undoing_writes
from graphopt.ir.devices import device_called, device_of, held_by
from graphopt.ir.examples import made_up_inputs
from graphopt.ir.global_state import one_thread_at_a_time
from graphopt.ir.graph import copy_graph_module
from graphopt.ir.ownership import own_tensors
from graphopt.ir.placing import place
from graphopt.ir.signature import Note, TensorSpec, batch_size, size_out_of_range
from graphopt.ir.torch_internals import flat_arguments, pytree, save_pt2
from graphopt.ir.training import is_training, set_training

if TYPE_CHECKING:
    from torch.export import ExportedProgram

SCHEMA = 1  # of the signature that is saved with a program


@dataclass(frozen=True, eq=False, repr=False)
class Program:
    """A `torch.fx` graph in the ATen dialect of `torch.export`, and what is needed to run and lower it.

    Attributes:
        graph_module: the graph with its parameters and buffers. Every node has `meta["val"]`.
        inputs: the tensor inputs in flat order; a dynamic axis is a name, equal names are equal sizes.
        outputs: the tensor outputs in flat order.
        example_args: positional inputs the program was captured with, batch of at least 2 when it is dynamic.
        example_kwargs: keyword inputs likewise.
        notes: what capture reports to the user.
    """

    graph_module: fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    example_args: tuple[Any, ...]
    example_kwargs: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program: same signature and output structure as the model it was captured from.

        What the model counts or remembers stays as it was captured, and none of the inputs stays in it.

        Raises:
            UsageError: an axis has a size that it was declared not to have.
        """
        if any(spec.ranges for spec in self.inputs):
            self._check_sizes(flat_arguments(self.graph_module, args, kwargs))
        return call_undoing_writes(self.graph_module, args, kwargs)

    def __repr__(self) -> str:
        inputs, outputs = (", ".join(map(str, specs)) for specs in (self.inputs, self.outputs))
        return f"<Program of {len(self.graph.nodes)} nodes: {inputs} -> {outputs}>"

    @property
    def graph(self) -> fx.Graph:
        """The graph, for reading."""
        return self.graph_module.graph

    @property
    def batch_size(self) -> int | None:
        """How many samples one call takes, None where any number fits."""
        return batch_size(self.inputs)

    def takes(self, samples: int) -> int:
        """Return how many samples one call takes: so many, or the nearest number below, else the smallest there is."""
        return self._batch_sizes.taken(samples)

    @functools.cached_property
    def _batch_sizes(self) -> BatchSizes:
        return BatchSizes(self.inputs)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Iterate over the trainable tensors, each once."""
        return self.graph_module.parameters()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return parameters and buffers by qualified name, tied ones under each of their names."""
        return dict(self.graph_module.state_dict())

    def train(self, mode: bool = True) -> Self:
        """Put BatchNorm and Dropout nodes in training (or evaluation) mode, in place; return the program.

        What eval capture dropped does not come back, and what is in a branch or loop stays as it is; `notes` say what
        was seen of that, which is not all: no attribute states what code does under `if self.training`.
        """
        set_training(self.graph_module, mode)
        return self

    def eval(self) -> Self:
        """Put BatchNorm and Dropout nodes in evaluation mode, in place; return the program."""
        return self.train(False)

    def evaluated(self) -> Program:
        """Return the program in evaluation mode: itself where it is in it, otherwise a copy that shares its tensors."""
        return self.copy().eval() if is_training(self.graph_module) else self

    def copy(self, *, share_tensors: bool = True) -> Program:
        """Return a program with its own graph; its tensors are shared unless asked otherwise.

        Args:
            share_tensors: whether the copy reads the very tensors of this program. They must not be written
                to: training a sharing copy would change this program too.
        """
        gm = copy_graph_module(self.graph_module)
        if not share_tensors:
            own_tensors([gm])
        return dataclasses.replace(self, graph_module=gm)

    @property
    def devices(self) -> set[torch.device]:
        """Where its tensors and its example inputs lie."""
        held = (*self.graph_module.parameters(), *self.graph_module.buffers())
        return {tensor.device for tensor in (*held, *self.flat_examples())}

    @property
    def device(self) -> torch.device:
        """Where it computes: its tensors and its example inputs lie there, and inputs have to.

        Raises:
            CaptureError: they lie on several devices.
        """
        examples = {spec.name: tensor for spec, tensor in zip(self.inputs, self.flat_examples(), strict=True)}
        return device_of({**held_by(self.graph_module), **examples})

    def to(self, device: str | torch.device) -> Program:
        """Return the program on a device: itself where all its tensors are there, otherwise a copy.

        Raises:
            UsageError: there is no such device.
        """
        try:
            wanted = torch.empty(0, device=device).device  # `cuda` is `cuda:0`
        except (AssertionError, ImportError, RuntimeError, TypeError):
            wanted = device_called(device)  # which says what there is
        if self.devices == {wanted}:
            return self
        moved = self.copy()
        place(moved.graph_module, wanted)
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, lambda tensor: tensor.to(wanted), (self.example_args, dict(self.example_kwargs))
        )
        return dataclasses.replace(moved, example_args=args, example_kwargs=kwargs)

    def with_graph(self, gm: fx.GraphModule, *, outputs: Sequence[TensorSpec] | None = None) -> Program:
        """Return this program with another graph of the same signature (or the given outputs)."""
        return dataclasses.replace(self, graph_module=gm, outputs=self.outputs if outputs is None else tuple(outputs))

    def flat_examples(self) -> tuple[torch.Tensor, ...]:
        """Return the example inputs in the order of `inputs`."""
        leaves = pytree.tree_leaves((self.example_args, dict(self.example_kwargs)))
        return tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))

    def made_up_examples(self) -> tuple[torch.Tensor, ...]:
        """Make up inputs that the program runs on, in the order of `inputs`: two rows where any number fits.

        Raises:
            CaptureError: it runs on nothing that was made up.
        """
        program = self.evaluated()

        def run(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            with torch.no_grad():
                return program.call_flat(tensors)

        return made_up_inputs(self.inputs, self.flat_examples(), run)

    def call_flat(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Run on flat inputs in the order of `inputs`; return the flat tensor outputs in order of `outputs`."""
        if len(tensors) != len(self.inputs):
            wanted = ", ".join(spec.name for spec in self.inputs)
            raise UsageError(f"The program takes {len(self.inputs)} inputs ({wanted}), {len(tensors)} were given.")
        args, kwargs = self.unflatten(tensors)
        leaves = pytree.tree_leaves(self(*args, **kwargs))
        return tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))

    def unflatten(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arrange flat inputs as the positional and keyword arguments of the model."""
        leaves, spec = pytree.tree_flatten((self.example_args, dict(self.example_kwargs)))
        remaining = iter(tensors)
        filled = [next(remaining) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return args, kwargs

    def flat_arguments(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """Return what each placeholder of the graph takes, for flat inputs in the order of `inputs`."""
        return flat_arguments(self.graph_module, *self.unflatten(tensors))

    @one_thread_at_a_time()
    def export(self) -> ExportedProgram:
        """Export the graph again with the same signature and dynamic axes."""
        from graphopt.ir.exporting import export_again

        return export_again(self).program

    def save(self, path: str | Path) -> Path:
        """Write the program as a `.pt2` file; `graphopt.load` gives it back. Written whole or not at all.

        What is written is in evaluation mode and on the CPU, and its example inputs are made up.

        Raises:
            CaptureError: the program cannot be exported, or runs on no inputs that are made up.
            UsageError: the file cannot be written.
        """
        with replacing(Path(path)) as temporary:
            self._write(temporary)
        return Path(path)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what `save` writes: what pickle makes of a graph by itself has no shapes and cannot be optimised."""
        with ScratchDirectory() as folder:
            self._write(Path(folder) / _PICKLED)
            return _unpickled, ((Path(folder) / _PICKLED).read_bytes(),)

    def __copy__(self) -> Program:
        """Copy the graph and share the tensors."""
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        """Copy graph and tensors."""
        return self.copy(share_tensors=False)

    def _check_sizes(self, given: Sequence[Any]) -> None:
        taken = zip(self.graph.find_nodes(op="placeholder"), given, strict=True)
        tensors = [value for node, value in taken if isinstance(node.meta.get("val"), torch.Tensor)]
        for spec, value in zip(self.inputs, tensors, strict=True):
            if isinstance(value, torch.Tensor) and (wrong := size_out_of_range(spec.name, spec.ranges, value.shape)):
                raise UsageError(f"{wrong} Give no others, or capture the model for them.")

    @one_thread_at_a_time()
    def _write(self, path: Path) -> None:
        from graphopt.ir.exporting import exported

        program = self.to("cpu")
        extra = {"graphopt.json": json.dumps(self._signature(), indent=1)}
        stored = copy.copy(exported(program).program)
        stored.example_inputs = program.unflatten(program.made_up_examples())
        with failing_late(path) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tensors that share memory, which load as they were saved
            save_pt2(stored, stream, extra)

    def _signature(self) -> dict[str, Any]:
        def plain(spec: TensorSpec) -> dict[str, Any]:
            ranges = {"ranges": [[sizes.least, sizes.most] for sizes in spec.ranges]} if spec.ranges else {}
            return {"name": spec.name, "shape": list(spec.shape), **ranges}

        return {
            "schema": SCHEMA,
            "inputs": [plain(spec) for spec in self.inputs],
            "outputs": [plain(spec) for spec in self.outputs],
            "notes": [dataclasses.asdict(note) for note in self.notes],
        }


_PICKLED = "program.pt2"


def _unpickled(content: bytes) -> Program:
    import graphopt  # reading files is a room above

    with ScratchDirectory() as folder:
        path = Path(folder) / _PICKLED
        path.write_bytes(content)
        return graphopt.load(path)
