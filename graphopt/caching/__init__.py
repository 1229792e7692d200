"""Results of passes, kept by the content of everything they are made of, in memory and on disk."""
