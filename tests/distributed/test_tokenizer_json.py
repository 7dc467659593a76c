"""A run on raw text with a tokenizer.json, from the first start to the model that other programs load."""

from __future__ import annotations

import itertools
import json
import signal
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pretrain.config import load_config
from pretrain.feed import chain_hash
from pretrain.run.run_folder import RunFolder
from shards import Loader, read_documents
from shards.tokenize.training import train_byte_level
from tests.distributed.ranks import ROOT, Rank, run_ranks, run_starts, start_ranks
from tests.tiny_run import write_config

STEPS, KILLED_AFTER, VOCABULARY = 24, 7, 600
SHARD = "pile.jsonl"

pytestmark = pytest.mark.distributed


# Python's audit events of a start
WATCHED = """
import os, sys
def told(event, arguments):
    if event == "open" and arguments[0] == "{folder}/tokenizer.json":
        os.write(1, b"TOKENIZER OPENED\\n")
    if event in ("os.listdir", "os.scandir") and str(arguments[0]) == "{folder}/suite/pile":
        os.write(1, b"SUITE LISTED\\n")
sys.addaudithook(told)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Train with a tokenizer.json made here; the first start is killed, the second one finishes."""
    folder = tmp_path_factory.mktemp("run")
    documents = read_documents(ROOT / "shards/sample/train/pile-00.jsonl.zst")
    texts = [document.text[:3000] for document in itertools.islice(documents, 200)]
    (folder / "tokenizer.json").write_bytes(train_byte_level(iter(texts[:40]), VOCABULARY))
    (folder / "suite" / "pile").mkdir(parents=True)
    for path, part in ((folder / SHARD, texts), (folder / "suite" / "pile" / "val.jsonl", texts[:3])):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    config = write_config(
        folder,
        "run",
        model={"vocab_size": VOCABULARY},
        data={
            "tokenizer": str(folder / "tokenizer.json"),
            "sources": [{"name": "pile", "paths": [str(folder / SHARD)]}],
        },
        train={"steps": STEPS},
        checkpoint={"every": 3},
        evaluation={"every": STEPS, "suite": str(folder / "suite")},
    )
    (rank,) = start_ranks(1, "pretrain", "train", "--config", str(config))
    kill_after(rank, folder / "run" / "metrics.jsonl", KILLED_AFTER)
    codes, output = run_starts(config, [(1, [], WATCHED.format(folder=folder))])
    assert codes == [[0]], output
    (folder / "output").write_text(output)
    return RunFolder(folder / "run")


def kill_after(rank: Rank, metrics: Path, step: int) -> None:
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < step:
        assert rank.poll() is None, rank.output
        time.sleep(0.005)
    rank.kill_group()
    assert rank.wait() == -signal.SIGKILL, rank.output


@pytest.fixture(scope="module")
def exported(run: RunFolder) -> Path:
    model = run.root.parent / "model"
    run_ranks(1, "pretrain", "export", "--run", str(run.root), "--to", str(model))
    return model


def test_a_start_opens_the_tokenizer_and_looks_the_suite_up_once(run: RunFolder) -> None:
    output = (run.root.parent / "output").read_text()
    assert (output.count("TOKENIZER OPENED"), output.count("SUITE LISTED")) == (1, 1), output


def test_a_killed_run_has_the_batches_of_the_loader_and_the_ids_of_the_export(run: RunFolder, exported: Path) -> None:
    """Tokenize the documents of all batches with what transformers makes of the export."""
    config = load_config(run.config, begun=True)
    _, data, rows = config.all_stages[0].of_loader
    theirs = AutoTokenizer.from_pretrained(exported)
    texts = [document.text for document in read_documents(run.root.parent / SHARD)]
    found = [json.loads(line) for line in run.metrics.path.read_text().splitlines()]
    assert len(found) == STEPS
    batch_hash, compared = "", 0
    with Loader(data, rows, config.run.seed) as loader:
        for record, batch in zip(found, itertools.islice(loader, STEPS), strict=True):
            batch_hash = chain_hash(batch_hash, batch.row_hash)
            assert record["batch_hash"] == batch_hash
            for row, origins in itertools.groupby(batch.origins(), key=lambda origin: origin.slot):
                pieces = []
                for origin in origins:
                    ids = [*theirs(texts[origin.line - 1]).input_ids, theirs.eos_token_id]
                    pieces += ids[origin.start : origin.stop]
                assert batch.tokens[row, : len(pieces)].tolist() == pieces
                compared += len(pieces)
    assert compared > STEPS * 8 * 60


def test_the_export_continues_and_scores_as_the_run_does(run: RunFolder, exported: Path) -> None:
    options = ("--prompt", "The <|end_of_text|> of", "--max-tokens", "8", "--temperature", "0")
    said = [
        run_ranks(1, "pretrain", "generate", *source, *options).splitlines()[-1]
        for source in (("--run", str(run.root)), ("--model", str(exported)))
    ]
    assert said[0] == said[1] != ""
    suite = ("--suite", str(run.root.parent / "suite"), "--seq-len", "64", "--precision", "fp32")
    run_ranks(1, "pretrain", "evaluate", "--model", str(exported), *suite)
    ours, theirs = (
        {
            line["domain"]: line
            for line in map(json.loads, (folder / "evals.jsonl").read_text().splitlines())
            if line["step"] in (0, STEPS)
        }
        for folder in (run.root, exported)
    )
    assert ours.keys() == theirs.keys()
    for domain, line in ours.items():
        for key in ("tokens", "bytes"):
            assert theirs[domain][key] == line[key], key
        assert theirs[domain]["nll_per_token"] == pytest.approx(line["nll_per_token"], rel=1e-6)
