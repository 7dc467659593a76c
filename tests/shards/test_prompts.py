"""Which tokens are prompts is a property of a document, whatever rows, ranks, stages and restarts it goes through."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards import (
    Batch,
    ConfigError,
    DataConfig,
    Loader,
    ShardError,
    SourceConfig,
    Tokenizer,
    batch_after,
    check_fingerprint,
    document,
    merge_states,
    preparation,
    read_documents,
)  # fmt: skip
from tests.shards.corpora import TOKENIZER, config, record, restarted_hashes, words, write_shard
from tests.shards.test_stages import hash_of, loaders, staged, steps

TEMPLATE = "Task: {task}\nDone: {done}"
RECORDS = 90


class Expected(NamedTuple):
    """A document: its ids, and which of them are a prompt's."""

    ids: list[int]
    is_prompt: list[bool]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write tasks with answers in two shards, and texts in a third."""
    folder = tmp_path_factory.mktemp("tasks")
    for shard in range(2):
        lines = [json.dumps(task(shard, i)).encode() + b"\n" for i in range(RECORDS)]
        write_shard(folder / f"tasks-{shard}.jsonl.zst", b"".join(lines))
    write_shard(folder / "texts.jsonl", b"".join(record(words(i, 12 + i)) for i in range(40)))
    return folder


def task(shard: int, i: int) -> dict[str, str]:
    return {"task": words(100 * shard + i, 1 + i % 23), "done": words(i + 7, (i * i) % 70)}


def sources(corpus: Path, **changes: object) -> list[dict[str, object]]:
    tasks = {"name": "tasks", "paths": [f"{corpus}/tasks-*"], "template": TEMPLATE, "max_epochs": 1, **changes}
    return [tasks, {"name": "texts", "paths": [f"{corpus}/texts.jsonl"], "weight": 0.2, "max_epochs": 1}]


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, int], Expected]:
    """Encode what comes before an answer, and the answer, apart from each other, as a model would be asked."""
    tokenizer, found = Tokenizer(TOKENIZER), {}
    for shard, i in itertools.product(range(2), range(RECORDS)):
        one = task(shard, i)
        (prompt,) = tokenizer.encode_beginnings([f"Task: {one['task']}\nDone:" + " " * (not one["done"])])
        (answer,) = tokenizer.encode_following([f" {one['done']}" if one["done"] else ""])
        ids = [*prompt.tolist(), *answer.tolist(), tokenizer.eos_id]
        found[f"tasks-{shard}.jsonl.zst", i + 1] = Expected(ids, [j < len(prompt) for j in range(len(ids))])
    return found


def checked(
    batch: Batch,
    expected: dict[tuple[str, int], Expected],
    gone: frozenset[tuple[str, int]] = frozenset(),
    dp_size: int = 1,
) -> int:
    """Compare every piece of a batch with its document; return the number of tasks' targets."""
    targets, others = 0, 0
    origins = sorted(batch.origins(), key=lambda origin: origin.slot)
    for slot, found in itertools.groupby(origins, key=lambda origin: origin.slot):
        tokens, ids = batch.tokens[slot // dp_size], batch.segment_ids[slot // dp_size]
        for number, origin in enumerate(found, 1):
            name = Path(origin.shard).name, origin.line
            inside = np.abs(ids) == number
            if name in gone:
                assert not inside.any()
            elif name in expected:
                document = expected[name]
                is_prompt = document.is_prompt[origin.start : origin.stop]
                assert tokens[inside].tolist() == document.ids[origin.start : origin.stop]
                assert (ids[inside] < 0).tolist() == is_prompt
                targets += is_prompt[1:].count(False)
            else:
                assert (ids[inside] > 0).all()
                others += origin.stop - origin.start - 1
    assert batch.n_targets == batch.is_target.sum() == targets + others
    return targets


@pytest.mark.parametrize("packing", ["best_fit", "concat", "pad", "truncate", {"overflow_tolerance": 4}])
def test_each_answer_is_learned_once_and_no_prompt_is(
    corpus: Path, expected: dict[tuple[str, int], Expected], packing: object
) -> None:
    data = config(sources(corpus), lanes=3, packing=packing)
    with Loader(data, 6) as loader:
        learned = sum(checked(batch, expected) for batch in loader)
    kept = data.seq_len + 1 if packing == "truncate" else None
    answers = sum(document.is_prompt[:kept].count(False) for document in expected.values())
    assert 0.9 * answers < learned < answers if isinstance(packing, dict) else learned == answers


def test_with_all_tokens_learned_the_rows_are_the_same(corpus: Path) -> None:
    alone, everything = (Loader(config(sources(corpus, loss_on=on), lanes=2), 4) for on in ("response", "all"))
    masked = 0
    for one, other in itertools.zip_longest(alone, everything):
        assert (one.tokens == other.tokens).all()
        assert (np.abs(one.segment_ids) == other.segment_ids).all()
        assert (one.row_hash == other.row_hash) == bool((one.segment_ids == other.segment_ids).all())
        assert one.source_tokens == other.source_tokens
        masked += other.n_targets - one.n_targets
    assert masked > 1000


def test_prompts_survive_ranks_restarts_and_workers(corpus: Path) -> None:
    data = config([source | {"max_epochs": None} for source in sources(corpus)], lanes=8)
    with Loader(data, 8, 3) as loader:
        whole = [next(loader).row_hash for _ in range(30)]
    assert restarted_hashes(data) == whole
    with Loader(data.model_copy(update={"num_workers": 1}), 8, 3) as loader:
        assert [next(loader).row_hash for _ in range(30)] == whole


@pytest.mark.parametrize("dp_size", [1, 2])
def test_prompts_survive_windows_that_a_stage_cuts_and_forgotten_documents(
    corpus: Path, expected: dict[tuple[str, int], Expected], tmp_path: Path, dp_size: int
) -> None:
    listed = tmp_path / "forget.jsonl"
    gone = {("tasks-0.jsonl.zst", line) for line in range(3, RECORDS, 4)}
    listed.write_text("".join(json.dumps({"shard": shard, "line": line}) + "\n" for shard, line in sorted(gone)))
    data = config(sources(corpus), lanes=4)
    longer, packed = {"seq_len": 48, "forget": str(listed)}, {"packing": "pad", "lanes": 2}
    run = staged(data, 4, (3, longer, None), (6, packed, None))
    hashes, states, forgotten = [], [], 0
    ranks = loaders(run, dp_size)
    for step, batches in enumerate(steps(ranks)):
        hashes.append(hash_of(batches))
        states.append(merge_states([rank.state_dict() for rank in ranks]))
        for batch in batches:
            checked(batch, expected, frozenset(gone) if step >= 3 else frozenset(), dp_size)
            forgotten += batch.forgotten_tokens
    assert forgotten > 100
    (resumed,) = loaders(run, 1)
    for step in range(1, 20):
        resumed.load_state_dict(json.loads(json.dumps(states[step - 1])))
        assert resumed.next_batch().row_hash == hashes[step]


def test_a_batch_made_again_names_its_documents(corpus: Path, expected: dict[tuple[str, int], Expected]) -> None:
    data = config(sources(corpus), lanes=2)
    with Loader(data, 4, 9) as loader:
        state = [(next(loader), loader.state_dict())[1] for _ in range(3)][-1]
        fingerprint, batch = loader.fingerprint, next(loader)
    again = batch_after(data, 4, 9, state, 0, json.loads(json.dumps(fingerprint)))
    assert (again.row_hash, list(again.origins())) == (batch.row_hash, list(batch.origins()))
    assert checked(again, expected)


def test_documents_that_a_suite_contains_take_their_prompts_with_them(
    corpus: Path, expected: dict[tuple[str, int], Expected], tmp_path: Path
) -> None:
    quoted = [f"Done: {task(shard, i)['done']}" for shard in range(2) for i in range(20, RECORDS, 7)]
    write_shard(tmp_path / "suite" / "x" / "val.jsonl", b"".join(map(record, quoted)))
    rule = {"suite": str(tmp_path / "suite"), "splits": ["val"], "min_tokens": 5}
    data = config(sources(corpus), lanes=1, decontaminate=rule, index_dir=str(tmp_path))
    with Loader(data, 4) as loader:
        batches = list(loader)
    assert {21, 28} < {found.line for batch in batches for found in batch.contaminated}
    assert sum(checked(batch, expected) for batch in batches) > 1000


def fingerprint_of(data: DataConfig) -> dict[str, object]:
    with Loader(data, 2) as loader:
        found: dict[str, object] = json.loads(json.dumps(loader.fingerprint))
    return found


def test_a_run_keeps_its_form(corpus: Path) -> None:
    begun = fingerprint_of(config(sources(corpus), lanes=1))
    check_fingerprint(begun, fingerprint_of(config(sources(corpus, loss_on="response"), lanes=1)))
    for changes, key in (({"loss_on": "all"}, "loss_on"), ({"template": TEMPLATE + "!"}, "template")):
        with pytest.raises(ConfigError, match=rf"data\.sources\[0\]\.{key}: the run was begun with"):
            check_fingerprint(begun, fingerprint_of(config(sources(corpus, **changes), lanes=1)))


def test_a_source_of_texts_is_known_as_before_there_were_forms(corpus: Path) -> None:
    (plain,) = fingerprint_of(config(sources(corpus)[1:], lanes=1))["config"]["sources"]  # type: ignore[index]
    assert plain.keys() == {"name", "weight", "max_epochs", "text_key", "input_ids_key"}


def test_markers_without_a_token_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    write_shard(tmp_path / "a.jsonl", (json.dumps({"m": turns}) + "\n").encode() * 9)
    chat = {"name": "chat", "paths": [f"{tmp_path}/a.jsonl"], "messages_key": "m", "chat_format": "chatml"}
    with caplog.at_level(logging.WARNING), Loader(config([chat], seq_len=64), 1) as loader:
        batch = next(loader)
    assert "has no token <|im_start|> or <|im_end|> of the chat_format chatml" in caplog.text
    tokenizer = Tokenizer(TOKENIZER)
    learned = batch.tokens[0][batch.segment_ids[0] == 1]
    assert tokenizer.decode(learned) == "yes<|im_end|>"


def test_a_column_of_a_parquet_file_has_no_form(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x"], "b": ["y"]}), tmp_path / "a.parquet")
    source = SourceConfig.parse({"name": "a", "paths": [f"{tmp_path}/a.parquet#text"], "template": "{b}"})
    with pytest.raises(ShardError, match="template reads JSON lines, and of .* a single column is read"):
        preparation.shard_paths(source)


def test_a_document_that_is_looked_up_has_its_parts(corpus: Path) -> None:
    path = corpus / "tasks-0.jsonl.zst"
    source = SourceConfig.parse({"name": "a", "paths": [str(path)], "template": TEMPLATE})
    first = next(iter(read_documents(path, source)))
    assert document(path, first.line, source, index_dir=corpus).parts == first.parts is not None
