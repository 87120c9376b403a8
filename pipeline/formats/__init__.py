"""The forms in which a network leaves: each writes a folder, and reads it back to be compared."""
