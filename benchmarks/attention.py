"""Time one layer's attention on the CPU: pieces by themselves against the whole mask.

    python benchmarks/attention.py [--threads 2] [--rounds 7] [--quick]

Both backends in turn, forward and backward pass, round after round; medians, in milliseconds, as a Markdown table. On
one thread its CPU time is taken, which neighbours on a shared host disturb little, on several the time that passes.
`benchmarks/gpu.py` measures a GPU's backends.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from training_rows import Rows

from pretrain.model.attention import AttentionBackend, attention_within_pieces
from pretrain.model.pieces import pieces_of
from pretrain.model.rotary import rotary_angles, rotate

BACKENDS: tuple[AttentionBackend, ...] = ("sdpa", "varlen")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# rows, tokens a row, query heads, key-value heads, head_dim
SHAPES = ((8, 512, 8, 8, 64), (8, 128, 4, 2, 64), (4, 2048, 16, 16, 128))
DOCUMENTS = (None, 200, 30)  # tokens; None: one a row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="only the smallest shape")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    print(f"{arguments.threads} thread(s), medians of {arguments.rounds} rounds, forward + backward in ms\n")
    print(
        "| rows x tokens, heads, head_dim | type | documents | whole mask | by pieces | times as fast | RoPE of q, k |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for shape in SHAPES[1:2] if arguments.quick else SHAPES:
        for name, dtype in TYPES.items():
            for document_tokens in DOCUMENTS:
                if (document_tokens or 0) < shape[1]:
                    print(
                        line(
                            shape,
                            name,
                            document_tokens,
                            measure(shape, dtype, document_tokens, arguments.rounds, clock),
                        )
                    )


def line(shape: tuple[int, ...], dtype: str, document_tokens: int | None, times: dict[str, tuple[float, float]]) -> str:
    """Return a row of the table."""
    rows, length, heads, kv_heads, head_dim = shape
    documents = str(document_tokens or f"{length} (one a row)")
    ratio = sum(times["sdpa"]) / sum(times["varlen"])
    columns = [f"{forward:.1f} + {backward:.1f}" for forward, backward in times.values()]
    columns.insert(2, f"{ratio:.1f}")
    return f"| {rows} x {length}, {heads}/{kv_heads}, {head_dim} | {dtype} | {documents} | {' | '.join(columns)} |"


def measure(
    shape: tuple[int, ...], dtype: torch.dtype, document_tokens: int | None, rounds: int, clock: Callable[[], float]
) -> dict[str, tuple[float, float]]:
    """Return the median milliseconds of the forward and backward pass of each backend, and of RoPE."""
    rows, length, heads, kv_heads, head_dim = shape
    ids = Rows.draw(rows, length, 100, document_tokens).segment_ids[:, :-1]
    pieces = pieces_of(ids, torch.device("cpu"))
    inputs = [torch.randn(rows, length, n, head_dim).to(dtype).requires_grad_() for n in (heads, kv_heads, kv_heads)]
    angles = rotary_angles(pieces.positions, head_dim, 1e4)
    contenders: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    for backend in BACKENDS:
        attend = attention_within_pieces(pieces, backend)
        contenders[backend] = lambda attend=attend: (attend(*inputs),)  # type: ignore[misc]
    contenders["rotation"] = lambda: tuple(rotate(x, *angles) for x in inputs[:2])
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, contender in contenders.items():
            begin = clock()
            outs = contender()
            middle = clock()
            torch.autograd.grad(outs, inputs[: 2 if name == "rotation" else 3], outs)
            times[name].append((1e3 * (middle - begin), 1e3 * (clock() - middle)))
    # The first round warms up.
    return {name: tuple(map(statistics.median, zip(*taken[1:], strict=True))) for name, taken in times.items()}  # type: ignore[misc]


if __name__ == "__main__":
    main()
