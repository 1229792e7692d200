"""What holds for every test."""

from __future__ import annotations

import gc

# Graphs of torch, sympy and ONNX are many small objects that live on; looking through them for garbage after every 700
# new ones, Python's default, took a seventh of the suite's time.
gc.set_threshold(20_000, 20, 100)
