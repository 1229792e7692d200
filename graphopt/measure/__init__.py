"""What a program costs, how far it is from another, how good and how fast it is."""
