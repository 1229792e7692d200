"""Takes residual branches out of a program: each sum becomes what stays of it.

%f = linear(%h, ...)              (gone, with everything that was only for it)
%y = add(%x, %f)                  readers of %y read %x
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from graphopt.errors import PassError
from graphopt.ir.editor import Editor
from graphopt.ir.operators import SUMS
from graphopt.ir.program import Program
from graphopt.passes.residuals.branches import Branch, idle, only_for, same_form, same_layout


def without(program: Program, results: Iterable[str], made_by: str) -> Program:
    """Return a copy of `program` without some branches.

    Args:
        program: it is left as it is.
        results: names of the nodes that give the branches' results, in the order they go.
        made_by: the pass.

    Raises:
        PassError: a name is not the result of a branch of this program, or what reads the sum cannot read the
            shortcut.
    """
    program = program.copy()
    editor = Editor(program.graph_module, made_by)
    for name in results:
        result = next((node for node in program.graph.nodes if node.name == name), None)
        total = _sum_of(result)
        if result is None or total is None:
            raise PassError(
                f"Pass `{made_by}` planned to drop the branch that ends in `{name}`, which is no term of a sum in this "
                "program. The plan belongs to another program; make it again."
            )
        one, other = total.args[:2]
        stays = other if one is result else one
        assert isinstance(stays, fx.Node)  # `_sum_of` has looked
        idle_calls = idle(program.graph)
        gone = only_for(result, total, idle_calls)
        readers = list(total.users)
        moved = not same_layout(total, stays)
        editor.replace(total, stays)
        _erase(program.graph, gone, idle_calls)
        if moved:  # a view may not take the shortcut as it lies in memory
            editor.propagate_from(reader for reader in readers if reader.op == "call_function")
    return program.with_graph(editor.finish())


def _erase(graph: fx.Graph, gone: set[fx.Node], idle_calls: set[fx.Node]) -> None:
    """Erase calls and the assertions about them, which clearing away dead code would leave, as it would dropouts."""
    gone = set(gone)
    for node in graph.nodes:
        sources = node.all_input_nodes
        about_stored = bool(sources) and all(source.op == "get_attr" for source in sources)
        if node in idle_calls and (about_stored or not gone.isdisjoint(sources)):
            gone.add(node)
    for node in reversed(list(graph.nodes)):
        if node in gone:
            graph.erase_node(node)


def fits_without(program: Program, branch: Branch, made_by: str) -> bool:
    """Whether what reads the sum can read the shortcut, which may lie otherwise in memory."""
    if same_layout(branch.sum, branch.stays):
        return True
    try:
        without(program, [branch.result.name], made_by)
    except PassError:
        return False
    return True


def _sum_of(result: fx.Node | None) -> fx.Node | None:
    """Return the sum that alone reads `result` and may become its other operand."""
    if result is None:
        return None
    readers = [user for user in result.users if user not in idle(result.graph)]
    if len(readers) != 1:
        return None
    total = readers[0]
    if total not in SUMS or not all(isinstance(operand, fx.Node) for operand in total.args[:2]):
        return None
    one, other = total.args[:2]
    stays = other if one is result else one
    return total if isinstance(stays, fx.Node) and stays is not result and same_form(stays, total) else None
