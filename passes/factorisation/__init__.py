"""How svd splits: which layers can be two factors, and the truncated decomposition of their weights."""
