"""Objectives: modules whose `forward(batch)` returns `(loss_sum, metrics)`."""
