"""Shared by `half` and `bfloat16`: what may be stored, and what computed, in 16 bits."""
