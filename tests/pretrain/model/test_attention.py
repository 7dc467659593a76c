"""Every attention backend gives a document what it would get alone, gradients too; RoPE turns by the position."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.model import attention
from pretrain.model.attention import MASK_LIMIT, AttentionBackend, attention_within_pieces, mask_bytes
from pretrain.model.checkpointing import checkpointed
from pretrain.model.piece_attention import piece_attention, piece_attention_backward
from pretrain.model.pieces import pieces_of
from pretrain.model.rotary import rotary_angles, rotate

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def rows_of(*lengths: list[int]) -> Tensor:
    """Return the segment ids of rows, [B, T], given the lengths of each row's pieces; the rest of a row is padding."""
    longest = max(map(sum, lengths))
    rows = [[n for n, length in enumerate(row, start=1) for _ in range(length)] for row in lengths]
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def random_rows(seed: int, rows: int = 2, length: int = 48) -> Tensor:
    """Return segment ids of rows that are cut at random places, of which the last piece is padding in some."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.rand(rows, length, generator=generator) < 0.15
    ids = cuts.cumsum(1) + 1
    return ids.where((ids < ids.max(1, keepdim=True).values) | (torch.arange(rows) % 2 == 0)[:, None], 0)


def heads_of(segment_ids: Tensor, n_heads: int, n_kv_heads: int, dtype: torch.dtype, head_dim: int = 8) -> list[Tensor]:
    """Return random q, k and v."""
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(*segment_ids.shape, heads, head_dim, generator=generator).to(dtype).requires_grad_()
        for heads in (n_heads, n_kv_heads, n_kv_heads)
    ]


def of_documents_alone(segment_ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k / sqrt(D)) v in float64, document by document and head by head."""
    out = torch.zeros_like(q, dtype=torch.float64)
    group = q.shape[2] // k.shape[2]
    for row, ids in enumerate(segment_ids):
        for piece in ids.unique():
            (tokens,) = (ids == piece).nonzero(as_tuple=True)
            for head in range(q.shape[2]):
                queries, keys, values = (
                    x[row, tokens, number].double() for x, number in ((q, head), (k, head // group), (v, head // group))
                )
                scores = queries @ keys.T / math.sqrt(q.shape[3])
                hidden = torch.ones(len(tokens), len(tokens)).triu(1).bool()
                out[row, tokens, head] = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values
    return out


def results(attend: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return the output and the gradients of the inputs."""
    out = attend(*inputs)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


def assert_equal_to_documents_alone(attend: Callable[..., Tensor], segment_ids: Tensor, inputs: list[Tensor]) -> None:
    real = (segment_ids != 0)[:, :, None, None]  # what becomes of padding is nobody's concern, but that it is a number
    expected = results(lambda *x: of_documents_alone(segment_ids, *x) * real, inputs)
    tolerance = TOLERANCE[inputs[0].dtype]
    for found, wanted in zip(results(lambda *x: attend(*x) * real, inputs), expected, strict=True):
        assert found.dtype == inputs[0].dtype
        worst = wanted.double().abs().max().item()
        torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance * max(1, worst))


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    backend=st.sampled_from(["varlen", "sdpa"]),
)
def test_a_packed_row_is_its_documents_alone(
    lengths: list[list[int]], heads: tuple[int, int], dtype: torch.dtype, backend: AttentionBackend
) -> None:
    segment_ids = rows_of(*lengths)
    attend = attention_within_pieces(pieces_of(segment_ids, CPU), backend)
    assert_equal_to_documents_alone(attend, segment_ids, heads_of(segment_ids, *heads, dtype))


def test_padding_costs_no_more_than_its_length() -> None:
    pieces = pieces_of(rows_of([500], [3, 40]), CPU)
    lengths = pieces.bounds.diff()
    assert lengths[lengths > 0].tolist() == [500, 3, 40, 128 - 43, 128, 128, 500 - 3 * 128]
    assert pieces.extent.tolist() == [7, 500]


@pytest.mark.usefixtures("topology")
@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_dropout_sets_some_weights_to_zero_and_scales_the_others_up(n_kv_heads: int) -> None:
    segment_ids = rows_of([5, 7], [3, 9])
    inputs = heads_of(segment_ids, 4, n_kv_heads, torch.float32)
    attend = attention_within_pieces(pieces_of(segment_ids, CPU), "sdpa", dropout=0.3)
    torch.manual_seed(11)
    found = results(attend, inputs)
    torch.manual_seed(11)
    dropped = torch.empty(2, 4, 12, 12, dtype=torch.bool).bernoulli_(0.3)

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = []
        for row, head in itertools.product(range(2), range(4)):
            keys, values = (x[row, :, head * n_kv_heads // 4] for x in (k, v))
            seen = (segment_ids[row][:, None] == segment_ids[row]).tril()
            exponentials = torch.exp(q[row, :, head] @ keys.T / 8**0.5) * seen
            weights = exponentials / exponentials.sum(1, keepdim=True) * ~dropped[row, head] / 0.7
            out.append(weights @ values)
        return torch.stack(out).view(2, 4, 12, 8).transpose(1, 2)

    for one, other in zip(found, results(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("topology")
def test_tensor_parallel_ranks_drop_what_one_rank_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    segment_ids = rows_of([5, 7], [3, 9])
    inputs = heads_of(segment_ids, 4, 4, torch.float32)
    attend = attention_within_pieces(pieces_of(segment_ids, CPU), "sdpa", dropout=0.3)
    torch.manual_seed(11)
    whole = attend(*inputs)
    monkeypatch.setattr(attention, "tp_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(attention, "tp_rank", lambda rank=rank: rank)
        own = slice(2 * rank, 2 * rank + 2)
        torch.manual_seed(11)
        torch.testing.assert_close(attend(*(x[:, :, own] for x in inputs)), whole[:, :, own])


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
def test_flex_sees_the_same_tokens(heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward only, since FlexAttention has no gradients on the CPU; `test_gpu.py` has them."""
    monkeypatch.setattr(attention, "_compiled", lambda function: function)
    segment_ids = rows_of([1, 30, 7], [20], [5, 5, 5, 5])
    attend = attention_within_pieces(pieces_of(segment_ids, CPU), "flex")
    inputs = [x.detach() for x in heads_of(segment_ids, *heads, torch.float32, head_dim=16)]
    expected = of_documents_alone(segment_ids, *inputs)
    torch.testing.assert_close(attend(*inputs).double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["varlen", "sdpa"])
def test_padding_is_finite(backend: AttentionBackend) -> None:
    segment_ids = rows_of([3], [1, 2, 40])
    inputs = heads_of(segment_ids, 2, 2, torch.bfloat16)
    for found in results(attention_within_pieces(pieces_of(segment_ids, CPU), backend), inputs):
        assert found.isfinite().all()


@pytest.mark.parametrize("segment_ids", [rows_of([20], [20]), rows_of([3, 17], [17, 3])])
def test_it_does_not_matter_how_the_inputs_lie_in_memory(segment_ids: Tensor) -> None:
    """PyTorch's kernel reads wrong numbers where those of a head are not neighbours."""
    inputs = heads_of(segment_ids, 4, 2, torch.float32)
    apart = [x.detach().mT.contiguous().mT.requires_grad_() for x in inputs]
    attend = attention_within_pieces(pieces_of(segment_ids, CPU), "varlen")
    for one, other in zip(results(attend, inputs), results(attend, apart), strict=True):
        assert torch.equal(one, other)


def test_the_same_batch_gives_the_same_bits() -> None:
    segment_ids = random_rows(seed=1)
    inputs = heads_of(segment_ids, 4, 2, torch.bfloat16)
    first, second = (results(attention_within_pieces(pieces_of(segment_ids, CPU), "varlen"), inputs) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_the_operator_keeps_torchs_rules(heads: tuple[int, int]) -> None:
    """Its schema, gradient, and the shapes it promises to a compiler."""
    segment_ids = random_rows(seed=2, length=12)
    pieces = pieces_of(segment_ids, CPU)
    inputs = [x.detach().flatten(0, 1).requires_grad_() for x in heads_of(segment_ids, *heads, torch.float32)]
    torch.library.opcheck(piece_attention, (*inputs, pieces.bounds, pieces.extent))


def test_the_operator_has_shapes_on_a_gpu_that_is_not_there() -> None:
    with FakeTensorMode():
        q = torch.empty(96, 6, 64, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.empty(96, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        places = torch.empty(97, device="cuda", dtype=torch.int32), torch.empty(2, dtype=torch.int64)
        out, logsumexp = piece_attention(q, k, v, *places)
        gradients = piece_attention_backward(torch.empty_like(out), q, k, v, out, logsumexp, *places)
    for found, like in zip((out, *gradients), (q, q, k, v), strict=True):
        assert (found.device, found.dtype, found.shape) == (like.device, like.dtype, like.shape)
    assert (logsumexp.device, logsumexp.dtype, logsumexp.shape) == (q.device, torch.float32, (6, 96))


def turned_and_attended(attend: Callable[..., Tensor], cos: Tensor, sin: Tensor, *x: Tensor) -> Tensor:
    """Return what a layer does between its projections."""
    q, k, v = x
    return attend(rotate(q, cos, sin), rotate(k, cos, sin), v)


def test_compiled_once_for_all_documents() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(turned_and_attended, backend=counter, dynamic=False, fullgraph=True)
    for seed in range(10):
        segment_ids = random_rows(seed)
        pieces = pieces_of(segment_ids, CPU)
        attend = attention_within_pieces(pieces, "varlen")
        cos, sin = rotary_angles(pieces.positions, 8, 1e4)
        inputs = heads_of(segment_ids, 4, 2, torch.bfloat16)
        eager, found = (
            results(lambda *x, f=function: f(attend, cos, sin, *x), inputs)  # noqa: B023
            for function in (turned_and_attended, compiled)
        )
        assert all(torch.equal(one, other) for one, other in zip(eager, found, strict=True))
    assert counter.frame_count == 1


class CountedCalls(TorchDispatchMode):
    """Counts how often each operator is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("what", "forward_passes"), [("none", 1), ("selective", 1), ("full", 2)])
def test_checkpointing_changes_no_bit_and_selectively_keeps_attention(what: Any, forward_passes: int) -> None:
    segment_ids = random_rows(seed=5)
    pieces = pieces_of(segment_ids, CPU)
    attend = attention_within_pieces(pieces, "varlen")
    cos, sin = rotary_angles(pieces.positions, 8, 1e4)
    inputs = heads_of(segment_ids, 4, 2, torch.bfloat16)
    expected = results(lambda *x: turned_and_attended(attend, cos, sin, *x), inputs)
    compute = checkpointed(turned_and_attended, what)
    with CountedCalls() as counted:
        found = results(lambda *x: compute(attend, cos, sin, *x), inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert counted.calls["headrace.piece_attention.default"] == forward_passes
    assert counted.calls["headrace.piece_attention_backward.default"] == 1


@given(seed=st.integers(0, 1000), rows=st.integers(1, 3), length=st.integers(1, 30))
@settings(deadline=None, max_examples=25)
def test_pieces_lie_where_the_ids_change(seed: int, rows: int, length: int) -> None:
    segment_ids = random_rows(seed, rows, length)
    pieces = pieces_of(segment_ids, CPU)
    n_pieces, longest = pieces.extent.tolist()
    bounds = pieces.bounds.tolist()
    assert len(bounds) == rows * length + 1, "the shape must not tell how many pieces there are"
    assert bounds[n_pieces:] == [rows * length] * (rows * length + 1 - n_pieces)
    found = [list(range(*ends)) for ends in itertools.pairwise(bounds[: n_pieces + 1])]
    expected: list[list[int]] = []
    for index, (row, piece) in enumerate((row, piece) for row, ids in enumerate(segment_ids.tolist()) for piece in ids):
        if index % length == 0 or piece != segment_ids[row, index % length - 1]:
            expected.append([])
        expected[-1].append(index)
    assert found == expected
    assert longest == max(map(len, expected))
    assert pieces.positions.flatten().tolist() == [place for piece in expected for place in range(len(piece))]
    assert pieces.numbers.flatten().tolist() == [n for n, piece in enumerate(expected) for _ in piece]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_turns_each_pair_by_its_angle(dtype: torch.dtype) -> None:
    positions = torch.tensor([[0, 1, 5, 2049], [7, 0, 3, 100_000]])
    x = torch.randn(2, 4, 3, 8, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    cos, sin = rotary_angles(positions, 8, 1e4)
    angles = positions.double()[:, :, None, None] * 1e4 ** -(torch.arange(4).double() / 4)
    pairs = torch.complex(*x.double().unflatten(-1, (2, 4)).unbind(-2)) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((pairs.real, pairs.imag), dim=-1)
    (gradient,) = torch.autograd.grad(expected.pow(3).sum(), x)
    found = rotate(x, cos, sin)
    # An fp32 angle of 10^5 radians is known to 10^-2 of one.
    tolerance = max(1e-2, TOLERANCE[dtype])
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        torch.autograd.grad(found.double().pow(3).sum(), x)[0], gradient, rtol=5 * tolerance, atol=5 * tolerance
    )


class Largest(TorchDispatchMode):
    """Notes the most bytes of any tensor that operations make."""

    size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.size = max([self.size, *(x.nbytes for x in tree_leaves(made) if isinstance(x, Tensor))])
        return made


def test_nothing_of_a_long_document_grows_with_its_square_but_the_whole_mask() -> None:
    def largest(length: int, backend: AttentionBackend) -> int:
        pieces = pieces_of(torch.ones(1, length, dtype=torch.int64), CPU)
        with FakeTensorMode(allow_non_fake_inputs=True), Largest() as found:
            cos, sin = rotary_angles(pieces.positions, 16, 1e4)
            q, k, v = (torch.empty(1, length, heads, 16, requires_grad=True) for heads in (4, 2, 2))
            attend = attention_within_pieces(pieces, backend)
            attend(rotate(q, cos, sin), rotate(k, cos, sin), v).sum().backward()
        return found.size

    assert largest(131_072, "varlen") == 2 * largest(65_536, "varlen") == 131_072 * 4 * 16 * 4, "queries in fp32"
    assert largest(131_072, "sdpa") >= mask_bytes(131_072) > MASK_LIMIT
