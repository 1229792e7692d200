"""Running ONNX files in ONNX Runtime, and proving that they compute what the program does."""

import os

# ONNX Runtime 1.31 for Linux starts a thread that reports to its makers, and looks here while it is imported;
# `disable_telemetry_events` comes too late for what it says of the start.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
