"""How weights become numbers of entries in a table, and where a graph looks them up."""
