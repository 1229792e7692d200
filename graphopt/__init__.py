"""graphopt: a compiler that makes trained PyTorch models small and fast enough to deploy."""
