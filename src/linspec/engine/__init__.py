"""Requests become steps, steps become rounds, rounds become tokens."""
