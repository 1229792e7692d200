"""Find operators that a stranger's program may call and that trust their arguments: calls that end the process.

    python tools/fuzz_operators.py --recorded calls.pickle             # 60 calls of each overload
    python tools/fuzz_operators.py --only 'aten.*pool*' --calls 1000
    python tools/fuzz_operators.py --replay aten.lstm.input:17         # show and run one; with the same options

Every overload that `graphopt.loading.operators` lets pass is called with arguments that its kernel must refuse or
survive. Each call is a program of one node; graphopt does to it what it does to a stranger's program before that is
run, and what it refuses is not run. The memory of each tensor ends (with `--low`: starts) at a page that nobody may
touch, so that one byte read or written too far ends the process, which is forked from this one. The exit code is 1
where a call does that. Calls that take more than 8 seconds or 700 MB are reported, no more.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
if TYPE_CHECKING:
    from tools.fuzz_operator_runs import Finding

_LIBRARY = Path(__file__).with_name("guard_pages.c")
_SHOWN = 400  # characters of arguments


def main(
    only: Annotated[list[str] | None, typer.Option(help="overloads to call, as a glob; repeat for several")] = None,
    calls: Annotated[int, typer.Option(help="of each overload", min=1)] = 60,
    seed: Annotated[int, typer.Option(help="of the arguments")] = 0,
    recorded: Annotated[Path | None, typer.Option(help="file of calls to change; made if missing")] = None,
    low: Annotated[bool, typer.Option("--low", help="look before tensors, not behind them")] = False,
    unchecked: Annotated[bool, typer.Option("--unchecked", help="call what graphopt refuses, too")] = False,
    replay: Annotated[str | None, typer.Option(help="NAME:INDEX of a call to show and run")] = None,
) -> None:
    """Call operators, print which calls end their process, and a table of these."""
    if not hasattr(ctypes.CDLL(None), "guard_pages"):
        raise typer.Exit(_again_with_guard_pages())
    # torch takes seconds to import, once is enough
    from tools.fuzz_operator_calls import described, make_call
    from tools.fuzz_operator_runs import SAID, Examination, guard, operators, run_alone, run_as_loaded
    from tools.fuzz_operator_samples import recorded_calls

    warnings.simplefilter("ignore")
    name, _, index = (replay or "").rpartition(":")
    targets = operators([name] if replay else only or ["*"], allowed=not unchecked)
    if not targets:
        raise typer.BadParameter("No overload that may be called has such a name; names are like aten.add.Tensor.")
    known = recorded_calls(recorded, operators(["*"], allowed=False)) if recorded else {}
    make, run = functools.partial(make_call, seed=seed, recorded=known), run_alone if unchecked else run_as_loaded
    if replay:
        guard(low=low)
        arguments = make(targets[0], int(index))
        print(f"{targets[0]}({described(arguments)})", flush=True)
        try:
            print("refused" if run(targets[0], arguments) else "ran")
        except Exception as err:  # kernels raise anything
            print(f"raised {type(err).__name__}: {err}")
        return
    if not known:
        print("Calls are made of schemas alone; --recorded FILE changes calls of torch's tests, too.")
    examination = Examination(targets, calls, make, run, low=low)
    found = []
    for finding in examination.findings():
        found.append(finding)
        print(f"{finding.what} {finding.name}:{finding.index} {finding.arguments[:_SHOWN]}", flush=True)
    if found:
        Console(width=170).print(_table(found))
    print(f"{len(targets)} overloads:", ", ".join(f"{examination.said[at]} calls {word}" for word, at in SAID.items()))
    raise typer.Exit(int(any(finding.harmful for finding in found)))


def _table(found: list[Finding]) -> Table:
    table = Table("operator", "ends with", "calls", "the first", "its arguments")
    rows: dict[tuple[str, str], list[Finding]] = {}
    for finding in found:
        rows.setdefault((finding.name, finding.what), []).append(finding)
    for (name, what), findings in rows.items():
        first = findings[0]
        style = "red" if first.harmful else ""
        table.add_row(name, what, str(len(findings)), str(first.index), escape(first.arguments[:_SHOWN]), style=style)
    return table


def _again_with_guard_pages() -> int:
    """Run this command once more, with the library in front of torch's allocations; return its exit code."""
    compiler = shutil.which("cc") if sys.platform == "linux" else None
    if compiler is None:
        print("Memory is guarded on Linux alone, by a library that a C compiler called `cc` makes.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        library = f"{folder}/guard_pages.so"
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, str(_LIBRARY), "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": f"{library} {os.environ.get('LD_PRELOAD', '')}".strip()}
        environment["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork
        code = subprocess.run([sys.executable, *sys.argv], env=environment).returncode
    if code < 0:  # --replay
        print(signal.Signals(-code).name)
    return 1 if code < 0 else code


if __name__ == "__main__":
    typer.run(main)
