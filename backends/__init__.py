"""Built-in backends, found through the `graphopt.backends` entry points like any stranger's."""
