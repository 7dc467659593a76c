"""Provenance names exactly the documents whose tokens were in a step's batch, or says why it cannot."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pretrain.commands import dispatch
from pretrain.feed import chain_hash
from pretrain.run.run_folder import RunFolder
from shards import Batch, DataConfig, Loader, Tokenizer, read_documents
from tests.pretrain.loader_run import begin, train
from tests.shards.corpora import TOKENIZER, record, words, write_shard
from tests.tiny_run import write_config

STEPS, ROWS, SEED, EVERY = 23, 6, 4, 10

Result = tuple[int, list[dict[str, str]], str]  # exit code, lines of the table, output on stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, list[Batch]]:
    """Write a run's folder as training leaves it, using only a loader; return it and the batches."""
    root = tmp_path_factory.mktemp("run")
    for shard, suffix in enumerate((".jsonl.zst", ".json.gz", ".jsonl")):
        lines = [record(f"s{shard} d{i} é " + words(i, 3 + i * i % 90)) for i in range(40)]
        lines.insert(5, b"\n")
        lines.insert(9, b"{}\n")
        write_shard(root / f"{'aab'[shard]}-{shard}{suffix}", b"".join(lines), frames=1 + shard)
    listed = [{"name": name, "paths": [f"{root}/{name}-*"], "weight": w} for name, w in (("a", 0.7), ("b", 0.3))]
    plain = {
        "seq_len": 32, "tokenizer": str(TOKENIZER), "num_workers": 0, "window_bytes": 2048, "lanes": 3,
        "on_bad_record": "skip", "sources": listed, "plan_version": 2,
    }  # fmt: skip
    folder = RunFolder(root)
    model = {"dim": 64, "n_layers": 1, "n_heads": 2, "vocab_size": 4096}
    train = {"steps": STEPS, "global_batch_size": ROWS, "micro_batch_size": 2}
    optim = {"learning_rate": 0.001}
    config = {"run": {"name": "x", "seed": SEED}, "model": model, "data": plain, "train": train, "optim": optim}
    folder.config.write_text(yaml.safe_dump(config))
    batches, batch_hash = [], ""
    with Loader(DataConfig.parse(plain), ROWS, SEED) as loader:
        folder.cursors.append({"step": 0, **loader.state_dict()})
        for step in range(1, STEPS + 1):
            batches.append(next(loader))
            batch_hash = chain_hash(batch_hash, batches[-1].row_hash)
            folder.metrics.append({"step": step, "batch_hash": batch_hash})
            if step % EVERY == 0:
                folder.cursors.append({"step": step, **loader.state_dict()})
    return folder, batches


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def run(*arguments: object) -> Result:
        code = dispatch.run("provenance", [str(argument) for argument in arguments])
        said = capsys.readouterr()
        return code, list(csv.DictReader(said.out.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)), said.err

    return run


@pytest.mark.parametrize("step", [1, 2, 10, 11, 20, 21, STEPS])
def test_exactly_the_documents_of_a_step_are_named(
    trained: tuple[RunFolder, list[Batch]], command: Callable[..., Result], step: int
) -> None:
    """Check that each row holds the named spans, reread from their shards and tokenized, and nothing else."""
    folder, batches = trained
    before = {path: path.read_bytes() for path in folder.root.iterdir() if path.suffix != ".manifest"}
    code, lines, said = command("--run", folder.root, "--step", step, "--text")
    assert code == 0, said
    tokenizer = Tokenizer(TOKENIZER)
    rows: list[list[int]] = [[] for _ in range(ROWS)]
    for line in lines:
        assert Path(line["shard"]).name.startswith(line["source"])
        document = next(d for d in read_documents(line["shard"], None, "skip") if d.line == int(line["line"]))
        piece = tokenizer.encode_document(document.text)[int(line["start"]) : int(line["stop"])].tolist()
        assert len(piece) == int(line["stop"]) - int(line["start"])
        assert json.loads(line["text"]) == tokenizer.decode(piece)
        rows[int(line["row"])] += piece
    batch = batches[step - 1]
    assert rows == [t[s > 0].tolist() for t, s in zip(batch.tokens, batch.segment_ids, strict=True)]
    after = {path: path.read_bytes() for path in folder.root.iterdir() if path.suffix != ".manifest"}
    assert after == before, "provenance writes nothing to the run"


def test_a_missing_run_or_step_is_named(
    trained: tuple[RunFolder, list[Batch]], command: Callable[..., Result], tmp_path: Path
) -> None:
    root = trained[0].root
    for step in (0, -1, STEPS + 1):
        code, lines, said = command("--run", root, "--step", step)
        assert (code, lines) == (2, [])
        assert f"step {step}: the run in {root} has trained steps 1 to {STEPS} so far" in said
    code, _, said = command("--run", root.with_name("nowhere"), "--step", 1)
    assert code == 2
    beside = said.partition("nowhere: no run there (it has no config.yaml); runs beside it: ")[2]
    assert str(root) in beside.split(", ")
    (tmp_path / "config.yaml").write_text(trained[0].config.read_text())
    code, _, said = command("--run", tmp_path, "--step", 1)
    assert code == 2
    assert "has not trained a step yet" in said


def test_a_batch_other_than_the_one_trained_on_is_refused(
    trained: tuple[RunFolder, list[Batch]], command: Callable[..., Result]
) -> None:
    code, lines, said = command("--run", trained[0].root, "--step", 12, "data.eos=false")
    assert (code, lines) == (1, [])
    assert "step 12: rebuilt, its batch hash is" in said


def test_documents_with_prompts_are_named_and_spelled_whole(tmp_path: Path, command: Callable[..., Result]) -> None:
    tasks = [{"task": words(i, 3 + i % 9), "done": words(i + 7, 5 + i % 30)} for i in range(60)]
    shard = write_shard(tmp_path / "tasks.jsonl.zst", "".join(json.dumps(task) + "\n" for task in tasks).encode())
    source = {"name": "tasks", "paths": [str(shard)], "template": "Task: {task}\nDone: {done}"}
    folder = begin(write_config(tmp_path, "x", data={"sources": [source], "lanes": 1, "seq_len": 256}))
    held = train(folder, 4, set())[3]
    code, lines, said = command("--run", folder.root, "--step", 3, "--text")
    assert code == 0, said
    assert [(line["shard"], int(line["line"]), int(line["start"])) for line in lines] == [
        (piece.shard, piece.line, piece.start) for piece in held
    ]
    spelled = {line["line"]: json.loads(line["text"]) for line in lines if line["start"] == "0"}
    whole = {line: "Task: {task}\nDone: {done}".format(**tasks[int(line) - 1]) for line in spelled}
    assert len(spelled) > 5
    assert sum(spelled[line] == text for line, text in whole.items()) > 3
    assert all(text.startswith(spelled[line]) for line, text in whole.items())
