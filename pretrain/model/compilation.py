"""Whether compiled code is compiled again: a model whose shapes keep changing spends its time in the compiler."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_logger = logging.getLogger(__name__)

_FIRST_STEPS = 2  # in which everything that training needs is compiled


class CompilationLog:
    """Logs the graphs that training steps compile, and warns of those compiled after the first steps."""

    def __init__(self) -> None:
        self._steps = 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Watch one training step; `number` is that of the run."""
        before = compiled_graphs()
        yield
        self._steps += 1
        made = compiled_graphs() - before
        if made and self._steps <= _FIRST_STEPS:
            _logger.info("step %d compiled %d graphs, or took them from torch's cache", number, made)
        elif made:
            _logger.warning(
                "step %d compiled %d more graphs, although all steps share those of the first; TORCH_LOGS=recompiles"
                " says why",
                number, made,
            )  # fmt: skip


def compiled_graphs() -> int:
    """Count the graphs that torch.compile has made in this process."""
    # torch loads its compiler at the first use of it. Importing it here would cost every command a third of its start.
    compiler = sys.modules.get("torch._dynamo.utils")
    return int(compiler.counters["stats"]["unique_graphs"]) if compiler else 0
