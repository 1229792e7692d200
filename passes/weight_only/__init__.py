"""How weights become integers with a scale for each block of a row, and where a graph reads them."""
