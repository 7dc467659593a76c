"""Downstream tasks of EleutherAI's lm-evaluation-harness on our models. forward_model -> harness -> commands.evaluate.

The only importer of lm_eval, an optional dependency: `pip install -e '.[eval]'`. All ranks run the harness alike, on
the same requests, which are dealt to the dp ranks; each rank then receives the others' answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import simple_evaluate, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from pretrain.evaluation.rows import RowPacker
from pretrain.evaluation.scoring import sums_over
from pretrain.inference.forward_model import ForwardModel
from pretrain.model.parallel import gather_vocab
from pretrain.topology import Topology
from shards import ConfigError, Tokenizer
from shards.tokenizer_check import MAX_UNKNOWN_SHARE

_MAX_NEW_TOKENS = 256  # if the task does not set it

Request = tuple[Any, list[int], list[int]]  # the request's source, the context's tokens, the continuation's tokens


class HeadraceLM(TemplateLM):  # type: ignore[misc]  # the library has no types
    """Answers the harness's three kinds of requests.

    Args:
        seq_len: the maximum context of a prediction, in tokens; longer contexts lose their beginning.
        batch_size: rows that a rank scores at once.
    """

    def __init__(self, model: ForwardModel, tokenizer: Tokenizer, seq_len: int, topology: Topology, batch_size: int):
        super().__init__()
        self._model, self._tokenizer, self._topology = model, tokenizer, topology
        self._seq_len, self._batch_size = seq_len, batch_size
        self._encoded, self._unknown = 0, 0  # number of ids so far, and of those that are UNK

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Return the id before an answer without a context: the one before the first word of a training document."""
        return self._tokenizer.bos_id if self._tokenizer.bos_id >= 0 else self._tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Return token ids, with BOS as in a training document unless told otherwise."""
        start = [] if add_special_tokens is False or self._tokenizer.bos_id < 0 else [self._tokenizer.bos_id]
        ids = self._tokenizer.encode(string)
        self._encoded += len(ids)
        self._unknown += ids.count(self._tokenizer.unk_id)
        return [*start, *ids]

    def _check_spelled(self) -> None:
        if self._unknown and self._unknown >= MAX_UNKNOWN_SHARE * self._encoded:
            raise ConfigError(
                f"--tasks: the tokenizer {self._tokenizer.path} cannot spell their texts:"
                f" {self._unknown / self._encoded:.1%} of the ids are UNK; name the model's own tokenizer"
            )

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: object) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood in nats, and whether greedy decoding produces it."""
        self._check_spelled()
        topology, targets = self._topology, []
        packer = RowPacker(self._seq_len, topology.dp_rank, topology.dp_size)
        for number, (_, context, continuation) in enumerate(requests):
            tokens = np.array([*context, *continuation][-(self._seq_len + 1) :], np.int64)
            targets.append(max(0, min(len(continuation), len(tokens) - 1)))
            packer.add(number, tokens, given=len(tokens) - targets[-1])
        packer.pack()
        scored = (self._model.score, packer.rows, packer.num_rows, len(requests), self._seq_len)
        totals = sums_over(*scored, topology, self._batch_size, group=np.zeros(0, np.int32)).items
        assert totals[:, 1].tolist() == targets, "each target is counted exactly once"
        return [(-float(nll), bool(correct == count)) for nll, count, correct in totals]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in the harness's windows; the last has as much context as fits."""
        parts: list[Request] = []
        counts = []
        for (text,) in (request.args for request in requests):
            tokens = self.tok_encode(text, add_special_tokens=False)
            windows = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self._seq_len, context_len=1)
            before = len(parts)
            parts += [(None, *utils.make_disjoint_window(window)) for window in windows]
            counts.append(len(parts) - before)
        values = [value for value, _ in self._loglikelihood_tokens(parts)]
        ends = np.cumsum(counts).tolist()
        return [sum(values[end - count : end]) for end, count in zip(ends, counts, strict=True)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return greedy continuations, each up to the first of its stop strings."""
        topology = self._topology
        answered = [self._continue(*request.args) for request in requests[topology.dp_rank :: topology.dp_size]]
        answers = topology.gather_objects(answered)[:: topology.world_size // topology.dp_size]
        return [answers[i % topology.dp_size][i // topology.dp_size] for i in range(len(requests))]

    @torch.no_grad()
    def _continue(self, context: str, options: dict[str, Any]) -> str:
        if options.get("do_sample") and options.get("temperature", 0.0) > 0:
            raise ConfigError("--tasks: a task that samples its answers (do_sample, temperature) is not supported")
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        most = min(int(options.get("max_gen_toks", _MAX_NEW_TOKENS)), self._seq_len - 1)
        ids = self.tok_encode(context)[-(self._seq_len - most) :]
        self._check_spelled()
        cache = self._model.config.new_cache(self._seq_len)
        fresh, answer, text = ids, [], ""
        for _ in range(most):
            tokens = torch.tensor([fresh], device=self._topology.device)
            logits = gather_vocab(self._model.next_logits(tokens, cache))[0]
            choice = int(logits[: self._tokenizer.vocab_size].argmax())  # logits beyond the vocabulary are meaningless
            if choice == self.eot_token_id:
                break
            answer.append(choice)
            text = self._tokenizer.decode(answer)
            if found := [text.index(stop) for stop in stops if stop in text]:
                return text[: min(found)]
            fresh = [choice]
        return text


def run_tasks(
    lm: HeadraceLM, tasks: Sequence[str], task_path: Path | None, limit: int | None
) -> dict[str, dict[str, Any]]:
    """Run tasks by name. Every rank must call it.

    Args:
        task_path: a folder with the user's own task files.
        limit: documents per task; None: all.
    Returns:
        The figures of each task, as the harness names them.
    Raises:
        ConfigError: if a task does not exist.
    """
    folder = None if task_path is None else str(task_path)
    manager = TaskManager(include_path=folder, include_defaults=False)
    if set(tasks) - set(manager.all_tasks):  # listing the harness's thousands of tasks takes seconds
        manager = TaskManager(include_path=folder)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise ConfigError(f"--tasks: the harness has no task {', '.join(unknown)}; give --task-path for your own")
    results = simple_evaluate(lm, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False)
    assert results is not None
    return dict(results["results"])
