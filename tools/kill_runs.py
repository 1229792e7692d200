"""Kill runs at every step and at random moments, fill the disk at every write: a result is the old or the new one.

    python tools/kill_runs.py                            # everything
    python tools/kill_runs.py --moments 20 --seed 7      # fewer kills at random, other ones

Results of one model, for two targets, are replaced by those of another, for one, in a folder that holds files of
somebody else too. After each attempt the folder must hold the one result whole or the other whole, or no manifest and
files of one of them at most, and be refused with one sentence. The next run must clear all that is left besides. An
attempt is a process forked from this one; nothing in graphopt knows of it. Full disks are small file systems in memory
where these can be mounted, which takes root, and a limit on the size of files everywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphopt
from graphopt.cli.app import run
from graphopt.files import MANIFEST, SCRATCH, ScratchDirectory, sha256

_REPORT = "report.json"  # holds times: two runs of one model write two
_FOREIGN = {"notes.txt": "mine", "model.d": "onnxruntime.onnx: model.pt2\n"}
_STEPS = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "utime", "link", "symlink")
_PAGE = 4096  # bytes that a file takes at least
_PAGES_OF_ROOM = 40  # more than the second result takes


@dataclass(frozen=True)
class Case:
    """Two results of which the second is to replace the first.

    Attributes:
        place: a folder for everything.
        old: files of the first, a folder.
        new: files of the second, a folder.
        write: writes the second to a folder, in this process.
    """

    place: Path
    old: Path
    new: Path
    write: Callable[[Path], object]

    @property
    def said(self) -> Path:
        """What an attempt has printed."""
        return self.place / "said"

    @property
    def folder(self) -> Path:
        """What the attempts are on."""
        return self.place / "out"

    def reset(self) -> None:
        """Put the old result in place, with what is not graphopt's."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.old, self.folder)
        for name, text in _FOREIGN.items():
            (self.folder / name).write_text(text)

    def judge(self) -> str:
        """Return "old", "new" or "none".

        Raises:
            AssertionError: it is neither, mixed, or not refused as it should.
        """
        found = _digests(self.folder)
        for name, text in _FOREIGN.items():
            assert (self.folder / name).read_text() == text, f"{name} was changed"
            del found[name]
        old, new = _digests(self.old), _digests(self.new)
        report, old_report, _ = (one.pop(_REPORT, None) for one in (found, old, new))
        if report is not None and found == old and report == old_report:
            return "old"
        if report is not None and found == new and report != old_report:
            return "new"
        assert MANIFEST not in found, f"a manifest beside {sorted(found)}"
        rest = {*found.items()}
        only_old, only_new = rest - {*new.items()}, rest - {*old.items()}
        assert not (only_old and only_new), f"files of both, or of neither: {sorted(only_old)}, {sorted(only_new)}"
        try:
            graphopt.open(self.folder)
        except graphopt.GraphOptError as err:
            if "\n" not in str(err):
                return "none"
            raise
        raise AssertionError("a folder without manifest was opened")

    def clear(self) -> None:
        """Do what the next run does first, and see that nothing of the attempt is left.

        Raises:
            AssertionError: something is.
        """
        for parent in (self.folder, Path(tempfile.gettempdir())):
            for left in parent.glob(f"{SCRATCH}*"):
                os.utime(left, (1, 1))  # one without a lock is spared for a minute
            ScratchDirectory(parent).cleanup()
            left_over = [path.name for path in parent.glob(f"{SCRATCH}*")]
            assert not left_over, left_over


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir() if path.is_file()}


def fork(act: Callable[[], object], said: Path) -> int:
    """Run `act` in a process of its own, what it says in a file; return the process."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        with said.open("w", buffering=1) as stream:
            for handle in (1, 2):
                os.dup2(stream.fileno(), handle)
            sys.stdout = sys.stderr = stream
            try:
                found = act()
                code = found if isinstance(found, int) else 0
            except graphopt.GraphOptError as err:
                print(f"graphopt: {err}")
                code = err.exit_code
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """Wait for a process; return its exit code, or its signal below zero."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(case: Case, step: int, *, after: bool) -> bool:
    """Save in a process that is killed before or after its call number `step` that changes a folder; say if it was."""

    def act() -> None:
        left = iter(range(step, -1, -1))

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                last = next(left, 1) == 0
                try:
                    if not last or after:
                        return call(*args, **kwargs)
                finally:
                    if last:
                        os.kill(os.getpid(), signal.SIGKILL)

            return wrapper

        for name in _STEPS:
            setattr(os, name, counted(getattr(os, name)))
        case.write(case.folder)

    code = ended(fork(act, case.said))
    assert code in (0, -signal.SIGKILL), case.said.read_text()
    return code != 0


def kill_at_steps(case: Case, every: int = 1) -> Iterator[str]:
    """Kill a save before and after each call that changes a folder, or each of so many; yield what was left."""
    step = 0
    while True:
        for after in (False, True):
            case.reset()
            killed = killed_at(case, step, after=after)
            yield case.judge()
            case.clear()
        if not killed:
            return
        step += every


def kill_at_moments(case: Case, count: int, seed: int) -> Iterator[str]:
    """Kill whole runs at moments drawn evenly from the time that one takes; yield what was left."""
    started = time.monotonic()
    assert ended(fork(lambda: case.write(case.folder), case.said)) == 0, case.said.read_text()
    longest = time.monotonic() - started
    draws = random.Random(seed)
    for _ in range(count):
        case.reset()
        child = fork(lambda: case.write(case.folder), case.said)
        time.sleep(draws.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        ended(child)
        yield case.judge()
        case.clear()


def refused(case: Case, act: Callable[[], object]) -> bool:
    """Run `act` on a full disk; return whether it failed, which takes one sentence and no traceback.

    Raises:
        AssertionError: it ended in another way.
    """
    code, said = ended(fork(act, case.said)), case.said.read_text()
    if code == 0:
        return False
    sentences = [line for line in said.splitlines() if line.startswith("graphopt: ")]
    assert code in (2, 5), (code, said)
    assert len(sentences) == 1, said
    assert "Traceback" not in said, said
    return True


def limit_files(case: Case, sizes: list[int]) -> Iterator[str]:
    """Run whole runs that can write no file of more than so many bytes; yield what was left."""
    for size in sizes:
        case.reset()

        def act(size: int = size) -> object:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            return case.write(case.folder)

        failed = refused(case, act)
        state = case.judge()
        assert state == ("old" if failed else "new"), (size, state)
        yield state
        case.clear()


@contextlib.contextmanager
def disk(folder: Path, size: int) -> Iterator[None]:
    """Mount a file system in memory.

    Raises:
        CalledProcessError: this process may not.
    """
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_disks(case: Case, count: int, *, temporary: bool) -> Iterator[str]:
    """Run whole runs on disks that hold the old result and ever more besides; yield what was left.

    Args:
        case: what is replaced.
        count: how many disks, the last with room enough.
        temporary: it is the disk for temporary files that is full.
    """
    sizes = [*(len(text) for text in _FOREIGN.values()), *(path.stat().st_size for path in case.old.iterdir())]
    held = sum(-(-size // _PAGE) for size in sizes)
    home = case.place / "tmp" if temporary else case.folder
    shutil.rmtree(case.folder, ignore_errors=True)
    for index in range(count):
        with disk(home, _PAGE * ((0 if temporary else held) + 1 + _PAGES_OF_ROOM * index // (count - 1))):
            if temporary:
                case.reset()
            else:
                shutil.copytree(case.old, case.folder, dirs_exist_ok=True)
                for name, text in _FOREIGN.items():
                    (case.folder / name).write_text(text)

            def act() -> object:
                if temporary:
                    tempfile.tempdir = str(home)
                return case.write(case.folder)

            failed = refused(case, act)
            state = case.judge()
            assert state == ("old" if failed else "new"), (index, state)
            yield state
            case.clear()


def small_model(seed: int) -> nn.Module:
    """Return a small convolutional network."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 64)
    ).eval()


def prepare(place: Path) -> tuple[Case, Case]:
    """Return a result that is saved, and a whole run: a program that was opened is written in other words."""
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    graphopt.optimize(small_model(0), x, "fold", ["onnxruntime", "tensorrt"], bench=False, cache=False).save(
        place / "old"
    )
    graphopt.capture(small_model(1), (x[:2],)).save(place / "model.pt2")

    def whole(folder: Path) -> int:
        return run(
            ["optimize", str(place / "model.pt2"), "--passes", "fold", "--no-bench", "--no-cache", "-o", str(folder)]
        )

    runs = Case(place, place / "old", place / "run", whole)
    assert ended(fork(lambda: whole(runs.new), runs.said)) == 0, runs.said.read_text()
    saves = Case(place, place / "old", place / "saved", graphopt.open(runs.new).save)
    saves.write(saves.new)
    return saves, runs


def main() -> None:
    """Make every attempt; print what came of how many."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=100, help="kills at random moments of whole runs")
    parser.add_argument("--disks", type=int, default=_PAGES_OF_ROOM + 1, help="full disks of either kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "temporary").mkdir()
        tempfile.tempdir = str(place / "temporary")
        saves, runs = prepare(place)
        largest = max(path.stat().st_size for path in runs.new.iterdir())
        sizes = [2048 + largest * index // (options.disks - 1) for index in range(options.disks)]  # room for messages
        attempts = {
            "killed before and after every step of a save": kill_at_steps(saves),
            "killed at random moments of a run": kill_at_moments(runs, options.moments, options.seed),
            "no file larger than": limit_files(runs, sizes),
            "full disk of results": fill_disks(runs, options.disks, temporary=False),
            "full disk of temporary files": fill_disks(runs, options.disks, temporary=True),
        }
        for name, left in attempts.items():
            try:
                totals = Counter(left)
            except subprocess.CalledProcessError:
                print(f"{name}: not tried, no file system can be mounted here", flush=True)
            else:
                counts = ", ".join(f"{state} {count}" for state, count in sorted(totals.items()))
                print(f"{name}: {totals.total()} attempts: {counts}; never mixed", flush=True)


if __name__ == "__main__":
    main()
