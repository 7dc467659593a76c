"""The loss without logits equals the plain one, with its gradients, and never holds the logits of all targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.model import loss
from pretrain.model.loss import Targets, argmax_over_tp, next_token_targets, target_scores, training_loss

ROWS, LENGTH, DIM, VOCABULARY = 3, 17, 16, 97
SCALE = 0.37  # what a caller multiplies the loss by


@pytest.fixture(params=["by targets", "by vocabulary"])
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Split the targets of these tests, or the vocabulary, into several chunks, and those into several blocks."""
    if request.param == "by vocabulary":
        monkeypatch.setattr(loss, "SUMMED_WEIGHTS", 0)
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 12 * VOCABULARY)
    monkeypatch.setattr(loss, "_CACHED_LOGITS", 5 * VOCABULARY)


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Targets]:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(ROWS, LENGTH, DIM, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, DIM, generator=generator).to(dtype).requires_grad_()
    positions = torch.randperm(ROWS * LENGTH, generator=generator)[:40].sort().values
    return hidden, weight, Targets(positions, torch.randint(VOCABULARY, (40,), generator=generator))


def plain_loss(hidden: Tensor, weight: Tensor, targets: Targets, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return total, nll and logsumexp by the formulas, in the arguments' type."""
    logits = (hidden @ weight.t()).flatten(0, 1)[targets.positions]
    logsumexp = logits.logsumexp(-1)
    nll = logsumexp - logits.gather(1, targets.tokens[:, None])[:, 0]
    return nll.sum() + z_loss * logsumexp.square().sum(), nll, logsumexp


@pytest.mark.usefixtures("topology", "small_chunks")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_the_loss_and_its_gradients_equal_the_plain_formulas(z_loss: float, compiled: bool) -> None:
    hidden, weight, targets = problem()
    found = training_loss(hidden, weight, targets, z_loss, compiled)
    (SCALE * found.total).backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    total, nll, logsumexp = plain_loss(*exact, targets, z_loss)
    (SCALE * total).backward()
    close = {"rtol": 1e-6, "atol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(found.total, total, **close)
    torch.testing.assert_close(found.nll, nll, **close)
    torch.testing.assert_close(found.logsumexp, logsumexp, **close)
    torch.testing.assert_close(hidden.grad, exact[0].grad, **close)
    torch.testing.assert_close(weight.grad, exact[1].grad, **close | {"atol": 1e-5})
    assert not found.nll.requires_grad


@pytest.mark.usefixtures("topology", "small_chunks")
def test_bf16_loses_no_more_than_its_rounding() -> None:
    hidden, weight, targets = problem(torch.bfloat16)
    found = training_loss(hidden, weight, targets, 0.0)
    found.total.backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    total, nll, _ = plain_loss(*exact, targets, 0.0)
    total.backward()
    assert found.nll.dtype == torch.float32
    torch.testing.assert_close(found.nll, nll, rtol=1e-2, atol=4e-2, check_dtype=False)
    for gradient, expected in ((hidden.grad, exact[0].grad), (weight.grad, exact[1].grad)):
        assert gradient is not None
        assert expected is not None
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.usefixtures("topology", "small_chunks")
def test_positions_without_a_target_get_no_gradient() -> None:
    hidden, weight, targets = problem()
    training_loss(hidden, weight, targets, 1e-2).total.backward()
    assert hidden.grad is not None
    reached = hidden.grad.flatten(0, 1).abs().sum(-1) > 0
    assert reached.nonzero().squeeze(1).tolist() == targets.positions.tolist()


@pytest.mark.usefixtures("topology")
def test_no_targets_are_no_loss_and_no_gradient() -> None:
    hidden, weight, _ = problem()
    nothing = Targets(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    found = training_loss(hidden, weight, nothing, 1e-2)
    found.total.backward()
    assert found.total == 0
    for gradient in (hidden.grad, weight.grad):
        assert gradient is not None
        assert not gradient.any()
    assert target_scores(hidden, weight, nothing).nll.shape == (0,)


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements of anything computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.usefixtures("topology", "small_chunks")
def test_the_logits_of_more_than_a_chunk_never_exist() -> None:
    hidden, weight, targets = problem()
    with LargestTensor() as largest:
        training_loss(hidden, weight, targets, 1e-2).total.backward()
        target_scores(hidden, weight, targets)
    assert largest.elements <= max(12 * VOCABULARY, weight.numel()) < 40 * VOCABULARY


@pytest.mark.usefixtures("topology", "small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_equal_torch_also_where_several_tokens_are_as_likely(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.eye(40).view(1, 40, 40)
    weight = torch.randint(-4, 5, (VOCABULARY, 40), generator=generator).float()  # the logits: many equal values
    lowest = weight.t().argmax(-1)
    highest = VOCABULARY - 1 - weight.t().flip(-1).argmax(-1)
    anything = torch.randint(VOCABULARY, (40,), generator=generator)
    tokens = torch.stack((lowest, highest, anything))[torch.arange(40) % 3, torch.arange(40)]
    scores = target_scores(hidden.to(dtype), weight.to(dtype), Targets(torch.arange(40), tokens))
    torch.testing.assert_close(scores.nll, torch.nn.functional.cross_entropy(weight.t(), tokens, reduction="none"))
    assert torch.equal(scores.correct, weight.t().argmax(-1) == tokens)
    assert 13 < scores.correct.sum() < 27
    assert torch.equal(argmax_over_tp(weight.t()), weight.t().argmax(-1))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(-3, 4), min_size=7, max_size=7), min_size=1, max_size=4))
def test_targets_are_the_tokens_that_follow_another_of_their_piece_and_belong_to_no_prompt(
    rows: list[list[int]],
) -> None:
    segments = torch.tensor(rows)
    tokens = torch.arange(segments.numel()).view(segments.shape)
    found = next_token_targets(tokens, segments)
    places = [(i, j) for i, row in enumerate(rows) for j in range(6) if row[j + 1] > 0 and abs(row[j]) == row[j + 1]]
    expected = [(i * 6 + j, i * 7 + j + 1) for i, j in places]
    assert list(zip(found.positions.tolist(), found.tokens.tolist(), strict=True)) == expected
