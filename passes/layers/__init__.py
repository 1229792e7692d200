"""What passes share about layers: which calls are some, where their weights lie, what they are multiplied with."""
