"""How int8 decides: which kernels a graph holds, where integers stand, what the weights become, and the rewrite."""
