"""Distillation: taps on a graph, pairs of taps between two programs, losses on them, and the training loop."""
