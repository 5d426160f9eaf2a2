"""What must be true, by operation."""
