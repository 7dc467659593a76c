"""Faults: everything that ends a run early or leaves a step out."""
