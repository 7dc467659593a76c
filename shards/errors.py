"""The errors that Headrace raises on purpose. Anything else that escapes is a bug."""

from __future__ import annotations


class HeadraceError(Exception):
    """Something the user can put right; its message says what, where, and how."""

    exit_code = 1  # of a command that it ends


class ConfigError(HeadraceError):
    """A config value is unknown, ill-typed, or impossible together with another."""

    exit_code = 2


class ShardError(HeadraceError):
    """A shard, its index or the tokenizer is missing, damaged, or not what it was."""

    exit_code = 2


class DamageError(ShardError):
    """What a shard's file holds cannot be decoded, or is not what was indexed."""


class CheckpointError(HeadraceError):
    """A saved state cannot be continued from."""
