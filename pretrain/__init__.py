"""Headrace's training library: the model, the engine, the loop and what surrounds them. `shards` feeds it."""

from __future__ import annotations

from shards import __version__

__all__ = ["__version__"]
