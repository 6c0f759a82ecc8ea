"""Connections between two ranks: in one process, through shared memory, over torch."""
