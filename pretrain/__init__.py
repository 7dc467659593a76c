"""Headrace's training library: the model, the engine, the loop and their surroundings. `shards` feeds it."""

from __future__ import annotations

from shards import __version__

__all__ = ["__version__"]
