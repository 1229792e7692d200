"""Where `graphopt.axes.proof` was before: what plugins import from here stays importable."""
