"""What torch.export made, in a form that is safe to run and in evaluation mode: the steps, in their order.

1. `make_safe`            arguments in their places, nothing turned in place, then checked
2. `put_in_evaluation`    evaluation mode, and public operators for parts that trust their arguments
3. `insert_guards`        what two operators take fits together in every call
"""

from __future__ import annotations

from torch import fx

from graphopt.capturing.argument_places import place_arguments
from graphopt.capturing.guards import insert_guards
from graphopt.capturing.leaving_training import leave_training
from graphopt.capturing.public_operators import use_public_operators
from graphopt.capturing.turned_in_place import return_what_is_turned
from graphopt.capturing.unchecked_arguments import check_arguments
from graphopt.errors import CaptureError, foreign_code
from graphopt.ir.graph import copy_graph_module
from graphopt.ir.signature import Note
from graphopt.ir.training import set_training


def evaluated(exported: fx.GraphModule) -> tuple[fx.GraphModule, list[Note]]:
    """Return a copy of what torch.export made that is safe to run, in evaluation mode; and what to tell."""
    gm = copy_graph_module(exported)
    with foreign_code(lambda said, _: CaptureError(f"The exported program is not whole ({said}). Export it again.")):
        make_safe(gm)
        set_training(gm, False)
        notes = put_in_evaluation(gm)
        insert_guards(gm)
    return gm, notes


def make_safe(gm: fx.GraphModule) -> None:
    """Bring the graph of a stranger to a form that can be checked, and check it, before anything of it runs.

    Raises:
        CaptureError: torch would use memory with it that is not the model's.
    """
    place_arguments(gm)
    return_what_is_turned(gm)
    check_arguments(gm)


def put_in_evaluation(gm: fx.GraphModule) -> list[Note]:
    """Put a graph in evaluation mode, in place, with public operators; return what to tell.

    Raises:
        CaptureError: it has calls that evaluation mode, or the public operators, have nothing for.
    """
    switched = leave_training(gm)
    use_public_operators(gm)
    text = f"The model was exported in training mode; in evaluation mode are now: {', '.join(switched)}"
    return [Note("training", text)] if switched else []
