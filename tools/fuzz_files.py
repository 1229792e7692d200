"""Damaged files of every kind that graphopt reads: each is read, or refused in one sentence.

    python tools/fuzz_files.py                                    # 2,000 mutations of each kind
    python tools/fuzz_files.py --kind manifest --seed 17 --count 1

A mutation is a function of its kind and seed alone. It is read in a process of its own kind, which must not raise what
is no error of ours, nor crash, take longer than `--seconds`, grow by more than a gigabyte, start a program, or touch a
file outside its folder. The exit code is 1 where one does; what did it is printed with its seed.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from graphopt.errors import GraphOptError
from tools.fuzz_kinds import NAMES, Kind, kinds
from tools.process_memory import memory

MOST_GROWTH = 1 << 30  # bytes
_MOST_MEMORY = 12 << 30  # of address space, so that a mutation that explodes leaves the machine alone
_LONGEST = 1000  # characters of a message
_START = 300  # seconds that a process may take to import everything
_RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect", "pty.spawn")
_CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_GOOD = ("read", "refused")
_BAD = ("traceback", "long", "ran", "outside", "growth", "hang", "crash")

Outcome = tuple[str, str]  # one of the words above, and what was said


def examine(name: str, subject: Kind, seed: int) -> Outcome:
    """Damage the file of a kind, read it, and put it back."""
    subject.path.write_bytes(subject.mutate(subject.content, random.Random(f"{name}/{seed}")))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            subject.read(subject.path)
    except GraphOptError as err:
        said = str(err)
        return ("refused" if len(said.splitlines()) == 1 and len(said) <= _LONGEST else "long", said[:_LONGEST])
    except BaseException as err:  # what it raises is what is looked for
        frames = traceback.extract_tb(err.__traceback__)[-6:]
        place = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
        return "traceback", f"{type(err).__name__}: {str(err)[:200]!r} at {place}"
    finally:
        subject.path.write_bytes(subject.content)
    return "read", ""


class Watch:
    """Notes what a process does beside reading: programs it starts and files it changes outside its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder.resolve())
        self.deeds: list[Outcome] = []
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _RUNS:
            self.deeds.append(("ran", f"{event} {arguments[:2]!r}"))
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in _CHANGES:
            self._changed(event, arguments[0])

    def _changed(self, event: str, path: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        place = os.path.realpath(os.fsdecode(path))
        if not place.startswith(self._folder) and not place.startswith(("/dev/", "/proc/")):
            self.deeds.append(("outside", f"{event} {place}"))


def work(name: str, seeds: Sequence[int], folder: Path, out: Connection) -> None:
    """Examine mutations one after the other; send each outcome as it is known, and None before the first."""
    logging.disable()
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    tempfile.tempdir, sys.dont_write_bytecode = str(folder), True
    os.chdir(folder)
    subject = kinds(folder, name)[name]
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    examine(name, subject, seeds[0])  # what reading imports is not what the file makes grow
    watch = Watch(folder)
    out.send(None)
    for seed in seeds:
        watch.deeds.clear()
        before = memory("VmRSS")
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")  # the peak is now what is held
        outcome = examine(name, subject, seed)
        grown = memory("VmHWM") - before
        if watch.deeds:
            outcome = watch.deeds[0]
        elif grown > MOST_GROWTH:
            outcome = "growth", f"{grown / MOST_GROWTH:.1f} GB; {': '.join(outcome)}"
        out.send((seed, outcome))


def outcomes(name: str, seeds: Sequence[int], seconds: float) -> Iterator[tuple[int, Outcome]]:
    """Yield the outcome of each seed; a process that hangs or dies is replaced for the seeds behind."""
    context, left = multiprocessing.get_context("spawn"), list(seeds)
    while left:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(name, left, Path(folder), theirs), daemon=True)
            process.start()
            theirs.close()
            for found in _received(ours, process, seconds):
                yield left.pop(0), found
                if not left:
                    break
            process.kill()
            process.join()


def _received(ours: Connection, process: BaseProcess, seconds: float) -> Iterator[Outcome]:
    """Yield outcomes as a process sends them; the last one says that it does so no more."""
    patience = _START
    try:
        while ours.poll(patience):
            message, patience = ours.recv(), seconds
            if message is not None:
                yield message[1]
    except EOFError:
        process.join()
        yield "crash", f"exit code {process.exitcode}"
    else:
        yield "hang", f"longer than {patience:g} seconds"


def main() -> int:
    """Examine what the command line asks for; print failures as they come and the totals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kind", action="append", choices=NAMES, help="a kind of file; repeat for several (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=2000, help="mutations of each kind")
    parser.add_argument("--seconds", type=float, default=30, help="what one may take")
    parser.add_argument("--show", action="store_true", help="print every outcome")
    options = parser.parse_args()
    totals: dict[str, Counter[str]] = {}
    with contextlib.suppress(KeyboardInterrupt):  # the totals so far
        for name in options.kind or NAMES:
            totals[name] = Counter()
            seeds = range(options.seed, options.seed + options.count)
            for seed, (word, said) in outcomes(name, seeds, options.seconds):
                totals[name][word] += 1
                if options.show or word in _BAD:
                    print(f"{name} seed {seed}: {word}: {said}", flush=True)
    words = [*_GOOD, *_BAD]
    print(f"{'kind':12}" + "".join(f"{word:>10}" for word in words))
    for name, counts in totals.items():
        print(f"{name:12}" + "".join(f"{counts[word]:10}" for word in words))
    return int(any(counts[word] for counts in totals.values() for word in _BAD))


if __name__ == "__main__":
    sys.exit(main())
