"""Residual branches: finding them in a graph, measuring what they contribute, taking them out."""
