"""Built-in passes, found through the `graphopt.passes` entry points like any stranger's."""
