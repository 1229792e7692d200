"""What runs with a second device, in a process of its own: torch keeps a device that it was told of until that ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CHECKS = Path(__file__).with_name("on_a_second_device.py")


def test_with_a_second_device() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(CHECKS)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=CHECKS.parents[3])
    assert found.returncode == 0, found.stdout[-5000:]
    assert " passed" in found.stdout
