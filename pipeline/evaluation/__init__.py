"""Evaluators: functions that yield `(name, value)`."""
