"""From a text to the documents of a run's sources that share it, and where they lie."""
