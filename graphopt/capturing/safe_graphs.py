"""What torch.export made, in a form that is safe to run and in evaluation mode."""

from __future__ import annotations

from torch import fx

from graphopt.capturing.argument_places import place_arguments
from graphopt.capturing.guards import insert_guards
from graphopt.capturing.leaving_training import leave_training
from graphopt.capturing.public_operators import use_public_operators
from graphopt.capturing.turned_in_place import return_what_is_turned
from graphopt.capturing.unchecked_arguments import check_arguments
from graphopt.errors import CaptureError, foreign_code
from graphopt.ir.graph import copy_graph_module, name_inputs_apart
from graphopt.ir.signature import Note
from graphopt.ir.training import set_training


def evaluated(exported: fx.GraphModule) -> tuple[fx.GraphModule, list[Note]]:
    """Return a copy of a stranger's graph that was checked before anything of it ran, and what to tell.

    Raises:
        CaptureError: torch would use memory with it that is not the model's, or it has calls that evaluation mode, or
            the public operators, have nothing for.
    """
    gm = copy_graph_module(exported)
    name_inputs_apart(gm)
    with foreign_code(lambda said, _: CaptureError(f"The exported program is not whole ({said}). Export it again.")):
        place_arguments(gm)
        return_what_is_turned(gm)
        check_arguments(gm)
        set_training(gm, False)
        switched = leave_training(gm)
        use_public_operators(gm)  # which check their arguments
        insert_guards(gm)
    text = f"The model was exported in training mode; in evaluation mode are now: {', '.join(switched)}"
    return gm, [Note("training", text)] if switched else []
