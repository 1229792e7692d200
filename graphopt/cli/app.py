"""The `graphopt` command: its sub-commands, and what its exit codes mean."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import logging
import os
import sys
import traceback

import typer
from typer.exceptions import TyperException

from graphopt.cli import bench, cache, distill, inspect, optimize, passes, presets, replay, verify
from graphopt.errors import GraphOptError, first_line, printable
from graphopt.versions import check_torch

EXIT_CODES = (
    "Exit codes: 0 done, 1 a gate failed, 2 usage, 3 capture, 4 pass or verification, 5 lowering or runtime, "
    "6 data, 130 interrupted."
)

_INTERRUPTED = 130

app = typer.Typer(
    name="graphopt",
    help="Make a trained PyTorch model small and fast enough to deploy.",
    epilog=EXIT_CODES,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("optimize", epilog=EXIT_CODES)(optimize.command)
app.command("distill", epilog=EXIT_CODES)(distill.command)
app.command("inspect")(inspect.command)
app.add_typer(passes.app, name="passes")
app.add_typer(presets.app, name="presets")
app.command("bench")(bench.command)
app.command("verify")(verify.command)
app.command("apply")(replay.command)
app.command("cache")(cache.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(importlib.metadata.version("graphopt"))
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Say more: one line per decision, and tracebacks."),
    version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True, callback=_print_version),
) -> None:
    """Make a trained PyTorch model small and fast enough to deploy."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.ERROR, format="%(levelname)s %(message)s", stream=sys.stderr
    )
    logging.getLogger("graphopt").setLevel(logging.DEBUG if verbose else logging.WARNING)
    if "--help" not in context.obj:  # the whole command line
        check_torch()


_command = functools.cache(typer.main.get_command)  # reads the annotations of every option


def main() -> None:
    """Run the command line and exit with the code of what happened."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that a terminal of another alphabet lacks is no failure
            stream.reconfigure(errors="backslashreplace")
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as err:  # Python would complain again while closing it, and end with 120
        _discard_output()
        code = code if isinstance(err, BrokenPipeError) else code or 2
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line; return its exit code. Errors are one sentence on stderr."""
    try:
        code = _command(app)(arguments, standalone_mode=False, obj=arguments)
        if code == _INTERRUPTED:  # typer turns ^C into a code
            _say("Interrupted. Nothing was left half-written.")
    except GraphOptError as err:
        if logging.getLogger("graphopt").isEnabledFor(logging.DEBUG):
            logging.getLogger(__name__).debug("traceback", exc_info=True)
        _say(str(err))
        return err.exit_code
    except TyperException as err:
        _say(err.format_message() if arguments else f"say what to do.\n\n{err}")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        _say("Interrupted. Nothing was left half-written.")
        return _INTERRUPTED
    except BrokenPipeError:
        _discard_output()  # whoever read it is done
        return 0
    except MemoryError:
        _say("Out of memory. Give fewer calibration samples, a smaller batch, or a machine with more memory.")
        return 4
    except OSError as err:
        _say(f"{err.strerror or err}{f': {err.filename}' if err.filename else ''}. Nothing was left half-written.")
        return 2
    except Exception as err:  # which would end with 1, as a gate that failed does
        logging.getLogger("graphopt").debug("traceback", exc_info=True)
        frame = traceback.extract_tb(err.__traceback__)[-1]
        _say(
            f"This is a bug in graphopt: {type(err).__name__}: {first_line(err)} ({frame.filename}:{frame.lineno}). "
            "Report it with what `graphopt --verbose` prints of the same command."
        )
        return 4
    return code if isinstance(code, int) else 0


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(message: str) -> None:
    text = "\n".join(printable(line) for line in message.split("\n"))
    with contextlib.suppress(OSError):  # of a full disk behind it: the exit code still tells
        print(f"graphopt: {text}", file=sys.stderr)
