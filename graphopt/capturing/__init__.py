"""From a user's module or file to a program."""
