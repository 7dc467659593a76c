"""No value of a wrong type is converted, in any section: a run computes exactly what its config says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.config import RunConfig
from pretrain.model.lora import LoraConfig
from shards import Config, ConfigError
from shards.suites.suite import SuiteFile

# Every key of a run's config with a non-null value of its type.
FULL = yaml.safe_load("""
run: {name: a, dir: runs, seed: 1}
model: {architecture: llama, dim: 64, n_layers: 2, n_heads: 4, n_kv_heads: 2, ffn_dim: 128, vocab_size: 512,
  vocab_multiple: 2, norm_eps: 0.5, rope_theta: 1.5,
  rope_scaling: {rope_type: llama3, factor: 8.5, low_freq_factor: 1.5, high_freq_factor: 4.5,
    original_max_position_embeddings: 64},
  qk_norm: true, tie_embeddings: true, dropout: 0.5, attention_dropout: 0.5, init: normal, init_std: 0.5,
  parametrization: mup, base: {dim: 8, ffn_dim: 16, n_layers: 1, head_dim: 2}}
init_from: a/folder
init_optimizer: true
data:
  sources:
    - {name: a, paths: [a, b], weight: 0.5, max_epochs: 2, text_key: text, id_key: id, source_from: meta.set,
      take: [1, 3], hash_range: [0.25, 0.5], min_tokens: 2, max_tokens: 9}
    - {name: b, dataset: x, dataset_config: c, split: train, revision: r, text_key: text, weight: 1.5, max_epochs: 2}
    - {name: t, paths: [t], template: "{a} {b}", loss_on: all}
    - {name: m, paths: [m], messages_key: m, chat_format: chatml}
    - {name: o, paths: [m], messages_key: m, chat_template: p}
  tokenizer: a.model
  seq_len: 32
  packing: {overflow_tolerance: 2}
  attention: row
  lanes: 4
  plan_version: 2
  bos: false
  rank_encoding: llama3
  bos_token: b
  eos_token: e
  eos: true
  weight_changes: [{step: 3, weights: {a: 0.5}}]
  on_bad_record: skip
  max_bad_records: 3
  decontaminate: {suite: s, splits: [val], match: ngram, min_tokens: 8}
  forget: f
  skip_steps: [[2, 3]]
  window_bytes: 1000
  index_dir: i
  max_index_at_start: 1000
  max_decoder_window: 2000
  remote_cache: {dir: c, max_bytes: 20000000}
  num_workers: 2
  prefetch_bytes: 1000
  worker_timeout: 1.5
train: {steps: 8, global_batch_size: 8, micro_batch_size: 2, on_nonfinite: stop, stall_timeout: 1.5, max_nonfinite: 2,
  weight_hash_every: 2, on_spike: skip, spike_window: 8, spike_score: 1.5, rewind_steps: 2, max_rewinds: 2,
  stop: {metric: eval/a/perplexity, patience: 2, min_delta: 1.5, explode: 1.5}, ema: {half_life_steps: 1.5}}
optim: {name: muon, moments: bf16, momentum: 0.5, learning_rate_groups: {norm.weight: 0.5},
  learning_rate: 0.5, schedule: wsd, warmup_steps: 2, decay_steps: 2, decay_shape: sqrt, floor: 0.5,
  batch_size_rule: sqrt, betas: [0.5, 0.25], moments: bf16, eps: 0.5, weight_decay: 0.5, grad_clip: 0.5, z_loss: 0.5}
parallel: {tp_size: 2, sp_size: 2, zero_stage: 1, offload: optimizer, sequence_parallel: true,
  activation_checkpointing: true, feed_forward_tokens: 8, compile: true, attention: sdpa, reduce_dtype: bf16,
  deterministic: true, timeout_minutes: 1.5}
precision: fp32
checkpoint: {every: 2, keep: 2, keep_every: 4, asynchronous: false, max_failed_saves: 2, reserve_bytes: 2,
  best: eval/a/accuracy}
evaluation: {every: 2, suite: s, split: val, max_documents: 2, max_tokens: 2, subset_seed: 2, batch_size: 2, prompt: x,
  tasks: [{requests: x, name: t, metric: acc_raw, max_instances: 2}],
  needles: {lengths: [2], depths: 2, count: 2, seed: 2}}
metrics: {log_every_seconds: 1.5, noise_scale: false, peak_flops: 1.5, layers_every: 2,
  profile: {steps: [2, 3], ranks: [1]}, on_event: x}
wandb: {mode: disabled, project: p, entity: e, group: g, tags: [a], system_metrics: false}
deepspeed: {memory_breakdown: true}
stages:
  - step: 4
    model:
      rope_theta: 2.5
      rope_scaling: {rope_type: llama3, factor: 8.5, low_freq_factor: 1.5, high_freq_factor: 4.5,
        original_max_position_embeddings: 64}
    data:
      sources:
        - {name: c, paths: [c], weight: 0.5, max_epochs: 2, text_key: text, id_key: id, source_from: meta.set,
          take: [1, 3], hash_range: [0.25, 0.5], min_tokens: 2, max_tokens: 9}
        - {name: d, dataset: x, dataset_config: c, split: train, revision: r, text_key: text, weight: 1.5,
          max_epochs: 2}
        - {name: u, paths: [u], template: "{a} {b}", loss_on: all}
        - {name: n, paths: [n], messages_key: m, chat_format: chatml}
        - {name: p, paths: [m], messages_key: m, chat_template: p}
      weights: {a: 0.25}
      seq_len: 64
      packing: {max_overflow: 4}
      attention: row
      lanes: 8
      decontaminate: {suite: t, splits: [val], match: ngram, min_tokens: 9}
      forget: g
    train: {global_batch_size: 16, micro_batch_size: 4}
    optim: {learning_rate: 0.25, schedule: linear, warmup_steps: 1, decay_steps: 2, decay_shape: cosine, floor: 0.25}
""")
# Keys that exclude another one above, or whose values are of other types than the one above.
OTHERS = {
    "model.lora",
    "train.epochs",
    "train.ema.decay",
    "train.ema.half_life_tokens",
    "data.sources.input_ids_key",
    "stages.data.sources.input_ids_key",
}
SUITE = {"name": "a", "sources": [{"name": "b", "path": "p", "text_key": "t", "domain_from": "d", "split": "val"}]}
LORA = {"r": 8, "alpha": 1.5, "dropout": 0.5, "targets": ["wq", "w2"]}
TREES: dict[type[Config], dict[str, Any]] = {RunConfig: FULL, SuiteFile: SUITE, LoraConfig: LORA}


def wrong_values(right: object) -> list[object]:
    """Return values of other types that a lenient reader would convert to the right value's type."""
    if isinstance(right, bool):
        return [str(right).lower(), int(right), float(right)]
    if isinstance(right, int):
        return [str(right), float(right), True]
    if isinstance(right, float):
        return [str(right), True]
    if isinstance(right, str):
        return [1, True, ["x"]]
    if isinstance(right, list):
        return ["x", 1, {"0": right[0]}]
    return ["x", 1, [right]]


def places(tree: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], object]]:
    """Yield the path and the value of everything below a tree."""
    below = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in below:
        yield (*path, key), value
        yield from places(value, (*path, key))


def replaced(tree: Any, path: tuple[str | int, ...], value: object) -> Any:
    """Return a copy of a tree with one value replaced."""
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = replaced(copy[path[0]], path[1:], value)
    return copy


def in_words(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


def test_the_full_config_is_valid_and_has_every_key() -> None:
    config = RunConfig.parse(FULL)
    spelled_out = config.model_dump(mode="json")
    assert {re.sub(r"\.\d+", "", in_words(path)) for path, _ in places(spelled_out)} == {
        re.sub(r"\.\d+", "", in_words(path)) for path, _ in places(FULL)
    } | OTHERS
    assert RunConfig.parse(spelled_out) == config
    assert config.data.sources[0].paths == ("a", "b")
    assert config.data.tokenizer == Path("a.model")


@pytest.mark.parametrize(
    ("kind", "path", "right"),
    [
        pytest.param(kind, path, right, id=in_words(path))
        for kind, tree in TREES.items()
        for path, right in places(tree)
        if path[0] != "deepspeed"  # DeepSpeed's own keys have their own table
    ],
)
def test_a_value_of_a_wrong_type_is_refused_by_name(
    kind: type[Config], path: tuple[str | int, ...], right: object
) -> None:
    for wrong in wrong_values(right):
        if path[:2] == ("evaluation", "tasks") and isinstance(right, dict) and wrong == "x":
            continue  # a task may be given by its requests alone
        with pytest.raises(ConfigError) as caught:
            kind.parse(replaced(TREES[kind], path, wrong))
        assert str(caught.value).startswith(in_words(path)), (wrong, caught.value)


def test_a_whole_number_may_stand_for_a_fraction() -> None:
    assert RunConfig.parse(replaced(FULL, ("optim", "grad_clip"), 1)).optim.grad_clip == 1.0
