"""The tests under another torch, in an environment of their own.

    python3 tools/test_with_torch.py 2.14.1
    python3 tools/test_with_torch.py 2.11.0 --environment /tmp/torch-2.11.0 tests/backends --exitfirst

The environment holds what constraints.txt says but for torch, and for setuptools, which torch before 2.13 bounds. It is
made on first use and kept. Further arguments go to pytest, in place of those of `make test`. The exit code is 0 where
everything passed.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]


def constraints_with(torch: str, constraints: str) -> str:
    """Return tested versions with another torch."""
    others = re.sub(r"(?m)^(torch|setuptools)==.*\n", "", constraints)
    return f"{others}torch=={torch}\n"


def main() -> int:
    """Make the environment if it is not there, and run the tests in it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("torch", help="its version")
    parser.add_argument("--environment", type=Path, help="where the environment lies; default: .venv-torch-VERSION")
    given, tests = parser.parse_known_args()

    environment: Path = (given.environment or _ROOT / f".venv-torch-{given.torch}").absolute()
    environment.mkdir(parents=True, exist_ok=True)
    constraints = environment / "constraints.txt"
    wanted = constraints_with(given.torch, (_ROOT / "constraints.txt").read_text())
    if not constraints.exists() or constraints.read_text() != wanted:  # make installs anew where this file is newer
        constraints.write_text(wanted)
    settings = [f"VENV={environment}", f"CONSTRAINTS={constraints}"]
    if tests:
        settings.append(f"TESTS={shlex.join(tests)}")
    return subprocess.run(["make", "--directory", str(_ROOT), "test", *settings], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
