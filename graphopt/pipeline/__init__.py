"""Passes, their plans and options, and running them in order."""
