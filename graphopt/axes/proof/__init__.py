"""The oracle of masked equivalence: an interpreter that follows removed positions through the original graph.

It shares no code with the inference and the rewriting it judges: all it takes from them is which indices of
which parameter went.
"""
