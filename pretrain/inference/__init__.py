"""A model without an optimizer: forward passes and generation."""
