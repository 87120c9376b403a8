"""One training loop and what runs round it."""
