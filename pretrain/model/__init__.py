"""The LLaMA-class transformer, built from fairscale's model-parallel layers."""
