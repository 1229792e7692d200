"""What a runtime can do, and what lowering to it means."""
