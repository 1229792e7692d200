"""Quantized programs in a form that can be trained, and what was trained as they store it."""
