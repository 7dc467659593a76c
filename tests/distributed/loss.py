"""Compare the loss of a vocabulary that is split over all ranks to that of a whole one, with its gradients and scores.

Usage: python -m tests.distributed.loss TP_SIZE ORDER VOCABULARY MULTIPLE

ORDER is that of the gradients, targets or vocabulary; VOCABULARY the number of tokens, which TP_SIZE need not divide;
MULTIPLE what each rank's rows are rounded up to a multiple of.
"""

from __future__ import annotations

import sys

import torch

from pretrain.model import loss
from pretrain.model.loss import Targets, all_logits, argmax_over_tp, target_scores, training_loss
from pretrain.model.parallel import ColumnLinear, enter_branch, gather_vocab, shard_of, size_without_padding
from pretrain.parallel_config import ParallelConfig
from pretrain.topology import started

TARGETS, DIM, Z_LOSS = 40, 16, 1e-2


def slice_with_noisy_padding(whole: torch.Tensor, multiple: int) -> torch.nn.Parameter:
    """Return this rank's slice of an output projection, whose padding would be seen if anything read it."""
    weight = ColumnLinear(DIM, len(whole), multiple).weight
    with torch.no_grad():
        weight.copy_(shard_of(whole, weight))
        weight[size_without_padding(weight) :] = 9.0
    return weight


def main() -> None:
    tp_size, vocabulary, multiple = int(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4])
    if sys.argv[2] == "vocabulary":
        loss.SUMMED_WEIGHTS = 0
    loss.CHUNK_LOGITS, loss._CACHED_LOGITS = 12 * vocabulary // tp_size, 5 * vocabulary // tp_size
    generator = torch.Generator().manual_seed(4)
    # Small whole numbers, so that equal logits are equal to the last bit however they are summed
    hidden = torch.randint(-1, 2, (1, TARGETS, DIM), generator=generator).float().requires_grad_()
    weight = torch.randint(-1, 2, (vocabulary, DIM), generator=generator).float()
    half = vocabulary // 2
    weight[-half:] = weight[:half]  # each logit has an equal in another rank's slice
    targets = Targets(torch.arange(TARGETS), torch.randint(vocabulary, (TARGETS,), generator=generator))
    logits = (hidden[0].detach().double() @ weight.double().t()).requires_grad_()
    targets.tokens[::2] = logits.detach().argmax(-1)[::2]
    logsumexp = logits.logsumexp(-1)
    nll = torch.nn.functional.cross_entropy(logits, targets.tokens, reduction="none")
    (nll.sum() + Z_LOSS * logsumexp.square().sum()).backward()
    assert logits.grad is not None
    with started(ParallelConfig(tp_size=tp_size)) as topology:
        mine = slice_with_noisy_padding(weight, multiple)
        assert len(mine) % multiple == 0
        held = size_without_padding(mine)
        found = training_loss(enter_branch(hidden, split_tokens=False), mine, targets, Z_LOSS)
        found.total.backward()
        close = {"rtol": 1e-6, "atol": 1e-5, "check_dtype": False}
        torch.testing.assert_close(found.nll, nll.detach(), **close)
        torch.testing.assert_close(found.logsumexp, logsumexp.detach(), **close)
        torch.testing.assert_close(hidden.grad, (logits.grad @ weight.double())[None], **close)
        of_weight = logits.grad.t() @ hidden[0].detach().double()
        torch.testing.assert_close(mine.grad[:held], of_weight.split(len(mine))[topology.tp_rank], **close)
        assert not mine.grad[held:].any()
        scores = target_scores(hidden, mine, targets)
        torch.testing.assert_close(scores.nll, nll.detach(), **close)
        assert torch.equal(scores.correct, logits.argmax(-1) == targets.tokens)
        slices = all_logits(hidden[0], mine).detach()
        assert not slices[:, held:].isfinite().any() or held == len(mine)
        assert torch.equal(argmax_over_tp(slices), logits.argmax(-1))
        torch.testing.assert_close(gather_vocab(slices)[:, :vocabulary], logits.detach(), **close)
        probabilities = gather_vocab(slices).softmax(-1)
        assert not probabilities[:, vocabulary:].any()


if __name__ == "__main__":
    main()
