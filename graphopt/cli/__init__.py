"""The command line. It is the Python API with words for arguments; importing it imports no torch."""

from graphopt.cli.app import main

__all__ = ["main"]
