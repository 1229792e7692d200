"""What typical data says about the values inside a program."""
