"""N:M sparsity: which weights of each group stay, and what the others take over."""
