"""`python -m graphopt`: the command line."""

from graphopt.cli.app import main

main()
