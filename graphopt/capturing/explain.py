"""Why a capture failed, in the user's words: which axis of which input, which line fixed it, what to write.

torch.export says which axis it had to fix but not where. The line is found by tracing once more while listening
to its symbolic-shape logger, whose records are emitted with the user's code on the stack.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from graphopt.errors import first_line
from graphopt.ir.torch_internals import DECOMPOSITIONS, SHAPES_LOGGER

_AXIS = re.compile(r"L\['(?P<input>\w+)'\](?P<path>(\[[^\]]+\])*)\.size\(\)\[(?P<axis>\d+)\]")
_NAMED_AXIS = re.compile(
    r"You marked (?P<name>\w+) as dynamic but your code specialized it to be a constant \((?P<size>\d+)\)"
)
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_OWN = str(Path(__file__).parents[1])
_RECURRENT = nn.RNNBase.__init__.__code__.co_filename


def explain(err: BaseException, retrace: Callable[[], object] | None = None) -> str:
    """Translate an error of `torch.export`.

    Args:
        err: what it raised.
        retrace: does the same again, for finding the line that fixed an axis.
    """
    text = str(err)
    axis = _AXIS.search(text)
    if axis and "specialized" in text:
        fixed = f"axis {axis['axis']} of input `{axis['input']}{axis['path']}` was fixed to one size"
        static = f"declare the axis static: dynamic_shapes={{'{axis['input']}': {{{axis['axis']}: None}}}}"
        return _fixed(fixed, static, retrace)
    if named := _NAMED_AXIS.search(text):
        fixed = f"axis `{named['name']}`, dynamic as asked, was fixed to {named['size']}"
        return _fixed(fixed, "leave the axis static", retrace)
    where = _user_frame_in(text) or _raised_at(err)
    if "data-dependent" in text or "Could not guard" in text:
        return f"the model branches on the values of a tensor{where}. Replace the branch by torch.where or torch.cond."
    if "Couldn't swap" in text:
        return f"the model converts its own layers in its forward{where}. Convert them once, before, or the values."
    return f"torch.export could not trace the model{where}: {type(err).__name__}: {first_line(err)}."


def _fixed(said: str, static: str, retrace: Callable[[], object] | None) -> str:
    """Say where an axis was fixed, and what to do."""
    where, layer = _place_that_fixed(retrace) if retrace else ("", "")
    if layer:
        return (
            f"{said}{where}: of an nn.{layer}, torch.export traces as many steps as the example has. Fill sequences up "
            "to one length, or capture the model once for every length."
        )
    return f"{said}{where}. Write sizes as `x.shape[i]` or -1 instead of numbers there, or {static}."


def _place_that_fixed(retrace: Callable[[], object]) -> tuple[str, str]:
    """Return " at file:line" of the code that made a symbol constant or bounded it, and which recurrent layer it is."""
    with _listening() as heard, contextlib.suppress(Exception):  # it failed before and will fail again
        retrace()
    return (f" at {heard[0][0]}", heard[0][1]) if heard else ("", "")


@contextlib.contextmanager
def _listening() -> Iterator[list[tuple[str, str]]]:
    """Collect the user's line behind every guard that is added meanwhile, and the recurrent layer that is unrolled."""
    heard: list[tuple[str, str]] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if "[guard added]" in text and "suppressed" not in text:
                heard.extend(_user_line_on_stack())

    logger = logging.getLogger(SHAPES_LOGGER)
    handlers, level = logger.handlers, logger.level
    logger.handlers = [Listener()]
    logger.setLevel(logging.INFO)
    try:
        yield heard
    finally:
        logger.handlers = handlers
        logger.setLevel(level)


def _user_line_on_stack() -> list[tuple[str, str]]:
    frame = sys._getframe(1)
    unrolled, layer = False, ""
    while frame is not None:
        code = frame.f_code
        if _is_users(code.co_filename):
            return [(f"{code.co_filename}:{frame.f_lineno}", layer)]
        unrolled = unrolled or code.co_filename == DECOMPOSITIONS
        module = frame.f_locals.get("self") if unrolled and code.co_filename == _RECURRENT else None
        layer = layer or ("" if module is None else type(module).__name__)
        if frame.f_back is None:
            break
        frame = frame.f_back
    return []


def _is_users(file: str) -> bool:
    torch_home = str(Path(torch.__file__).parent)
    library = ("/contextlib.py", "/logging/__init__.py")
    return not file.startswith((torch_home, _OWN, "<")) and not file.endswith(library)


def _user_frame_in(text: str) -> str:
    frames = [match for match in _FRAME.finditer(text) if _is_users(match["file"])]
    return f" at {frames[-1]['file']}:{frames[-1]['line']}" if frames else ""


def _raised_at(err: BaseException) -> str:
    found = ""
    trace = err.__traceback__
    while trace is not None:
        if _is_users(trace.tb_frame.f_code.co_filename):
            found = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found
