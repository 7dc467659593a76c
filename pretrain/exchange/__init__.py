"""Models in the layouts of other programs: Hugging Face folders and Meta's consolidated files, in and out."""
