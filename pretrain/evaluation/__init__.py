"""Evaluation on text that a model was not trained on: suites, scores, comparisons, downstream tasks."""
