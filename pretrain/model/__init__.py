"""The LLaMA-class transformer, built of fairscale's model-parallel layers."""
