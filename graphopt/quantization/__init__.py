"""Quantization in the graph: operators with explicit scale, zero point, axis and range, and how those are chosen."""
