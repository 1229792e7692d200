"""The program: one graph, its signature and its editing. What everything else is written in."""
