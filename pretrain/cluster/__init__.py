"""Slurm: job scripts, checks before a run is submitted, checks of nodes."""
