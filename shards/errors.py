"""The errors that Headrace raises on purpose. Anything else that escapes is a bug."""

from __future__ import annotations


class HeadraceError(Exception):
    """An error that the user can fix; its message says what is wrong, where, and how to fix it."""

    exit_code = 1  # exit code of the command that the error ends


class ConfigError(HeadraceError):
    """A config value is unknown, ill-typed, or impossible together with another."""

    exit_code = 2


class ShardError(HeadraceError):
    """A shard, its index or the tokenizer is missing, damaged, or not what it was."""

    exit_code = 2


class DamageError(ShardError):
    """A shard's contents cannot be decoded, or differ from what was indexed."""


class CheckpointError(HeadraceError):
    """A run cannot resume from a saved state."""
