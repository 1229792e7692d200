"""Axis inference: which index ranges of a program belong together, and rewriting it once some are removed."""
