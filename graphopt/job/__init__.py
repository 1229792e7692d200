"""The whole run: from a model and data to programs, artifacts and a report."""
