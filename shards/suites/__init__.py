"""Evaluation suites, and which training documents share text with them."""
