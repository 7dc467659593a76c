"""Compare the loss of a vocabulary that is split over all ranks to that of a whole one, with its gradients and scores.

Usage: python -m tests.distributed.loss TP_SIZE ORDER

ORDER is that of the gradients, targets or vocabulary.
"""

from __future__ import annotations

import sys

import torch

from pretrain.model import loss
from pretrain.model.loss import Targets, argmax_over_tp, target_scores, training_loss
from pretrain.model.parallel import enter_branch
from pretrain.topology import ParallelConfig, started

TARGETS, DIM, VOCABULARY, Z_LOSS = 40, 16, 96, 1e-2


def main() -> None:
    tp_size = int(sys.argv[1])
    if sys.argv[2] == "vocabulary":
        loss.SUMMED_WEIGHTS = 0
    loss.CHUNK_LOGITS, loss._CACHED_LOGITS = 12 * VOCABULARY // tp_size, 5 * VOCABULARY // tp_size
    generator = torch.Generator().manual_seed(4)
    # Small whole numbers, so that equal logits are equal to the last bit however they are summed
    hidden = torch.randint(-1, 2, (1, TARGETS, DIM), generator=generator).float().requires_grad_()
    weight = torch.randint(-1, 2, (VOCABULARY, DIM), generator=generator).float()
    weight[VOCABULARY // 2 :] = weight[: VOCABULARY // 2]  # each logit has an equal in another rank's slice
    targets = Targets(torch.arange(TARGETS), torch.randint(VOCABULARY, (TARGETS,), generator=generator))
    logits = (hidden[0].detach().double() @ weight.double().t()).requires_grad_()
    targets.tokens[::2] = logits.detach().argmax(-1)[::2]
    logsumexp = logits.logsumexp(-1)
    nll = torch.nn.functional.cross_entropy(logits, targets.tokens, reduction="none")
    (nll.sum() + Z_LOSS * logsumexp.square().sum()).backward()
    assert logits.grad is not None
    with started(ParallelConfig(tp_size=tp_size)) as topology:
        mine = weight.chunk(tp_size)[topology.tp_rank].clone().requires_grad_()
        found = training_loss(enter_branch(hidden, split_tokens=False), mine, targets, Z_LOSS)
        found.total.backward()
        close = {"rtol": 1e-6, "atol": 1e-5, "check_dtype": False}
        torch.testing.assert_close(found.nll, nll.detach(), **close)
        torch.testing.assert_close(found.logsumexp, logsumexp.detach(), **close)
        torch.testing.assert_close(hidden.grad, (logits.grad @ weight.double())[None], **close)
        of_weight = logits.grad.t() @ hidden[0].detach().double()
        torch.testing.assert_close(mine.grad, of_weight.chunk(tp_size)[topology.tp_rank], **close)
        scores = target_scores(hidden, mine, targets)
        torch.testing.assert_close(scores.nll, nll.detach(), **close)
        assert torch.equal(scores.correct, logits.argmax(-1) == targets.tokens)
        slices = logits.detach().float().chunk(tp_size, dim=-1)
        assert torch.equal(argmax_over_tp(slices[topology.tp_rank]), logits.argmax(-1))


if __name__ == "__main__":
    main()
