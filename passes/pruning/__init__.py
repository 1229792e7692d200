"""What prune decides by, and how the layers behind a removal are refitted."""
