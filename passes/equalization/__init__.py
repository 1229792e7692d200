"""How equalize decides: where channels can be scaled, and by how much."""
