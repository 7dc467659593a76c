"""Faults: everything that ends a run early or skips a step."""
