"""What a model has learned, told by text that it was not trained on: suites, scores, comparisons, downstream tasks."""
