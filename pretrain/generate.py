"""Continues a prompt with the trained model, token by token. engine, tokenizer -> text."""

from __future__ import annotations

import torch

from pretrain.engine import Engine
from pretrain.model.parallel import gather_vocab
from shards import Tokenizer


@torch.no_grad()
def continue_text(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str,
    length: int,
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> str:
    """Samples a continuation; every rank calls it and gets the same text.

    Args:
        length: positions in a forward pass, in tokens; one shape for all, so that nothing is compiled twice. The prompt
            and its continuation end there.
        max_tokens: of the continuation.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample among so many of the most likely tokens.
    Returns:
        The continuation, without the prompt; it ends early at the end of the document.
    """
    device = engine.topology.device
    # The draws are made on the CPU: the same on every rank and device
    generator = torch.Generator().manual_seed(seed)
    start_of_document = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    ids = [*start_of_document, *tokenizer.encode(prompt)][:length]
    start = len(ids)
    tokens = torch.zeros(1, length, dtype=torch.int64, device=device)
    segment_ids = torch.zeros_like(tokens)
    for _ in range(min(max_tokens, length - start)):
        tokens[0, : len(ids)] = torch.tensor(ids, device=device)
        segment_ids[0, : len(ids)] = 1
        logits = gather_vocab(engine.logits(tokens, segment_ids)[:, len(ids) - 1])[0].float().cpu()
        # Ranks that drew different tokens, for a last bit of difference in a logit, would wait for each other for ever
        ids.append(engine.topology.broadcast_object(_sample(logits, temperature, top_k, generator)))
        if ids[-1] == tokenizer.eos_id:
            break
    return tokenizer.decode(ids[start:])


def _sample(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token id from logits [vocab_size]."""
    if temperature == 0:
        return int(logits.argmax())
    best, ids = logits.topk(min(top_k, len(logits)))
    choice = torch.multinomial((best / temperature).softmax(-1), 1, generator=generator)
    return int(ids[choice])
