"""Suites of token ids: scored as the texts that they spell, and silent about bytes where there are no texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pretrain.engine import Engine
from pretrain.evaluation.compare import compare
from pretrain.evaluation.eval_set import EvalSet, EvaluationConfig, find_suite, load_suite
from pretrain.evaluation.scores import DocumentScores, ScoresOfAverage, record_scores
from pretrain.evaluation.scoring import evaluate
from pretrain.evaluation.tables import difference_table, domain_table, step_table
from pretrain.run.eval_figure import EvalFigure
from pretrain.run.run_folder import RunFolder
from pretrain.run.wandb_rows import eval_rows
from pretrain.standing import check_figures
from pretrain.topology import Topology
from shards import ConfigError, ShardError, Tokenizer
from tests.distributed.evaluation import SEQ_LEN, TEXTS, TOKENIZER, engine_of

ALL = [text for texts in TEXTS.values() for text in texts if text]


@pytest.fixture(scope="module")
def engine(topology: Topology) -> Engine:
    return engine_of(topology, zero_stage=1)


def write(folder: Path, kind: str, texts: Sequence[str] = ALL, **changes: object) -> Path:
    """Write texts beside their ids as Parquet files or as a data set, in two domains; return the suite's file."""
    ids = [Tokenizer(TOKENIZER).encode_document(text).tolist() for text in texts]
    columns = {"text": list(texts), "ids": ids, "of": ["short" if len(text) < 40 else "long" for text in texts]}
    source: dict[str, object] = {"name": "s", "domain_from": "of"}
    if kind == "parquet":
        pq.write_table(pa.table(columns), folder / "all.parquet", row_group_size=2)
        source["path"] = "all.parquet"
    else:
        datasets.Dataset.from_dict(columns).save_to_disk(folder / "saved")
        source |= {"dataset": str(folder / "saved"), "split": "train"}
    (folder / "suite.yaml").write_text(json.dumps({"sources": [{**source, **changes}]}))
    return folder / "suite.yaml"


def loaded(suite: Path, tokenizer: Path = TOKENIZER, **changes: object) -> EvalSet:
    config = EvaluationConfig.model_validate({"suite": suite, **changes})
    found = find_suite(config)
    assert found is not None
    return load_suite(found, config, Tokenizer(tokenizer), SEQ_LEN, "fp32")


@pytest.fixture(scope="module")
def of_texts(tmp_path_factory: pytest.TempPathFactory, engine: Engine, topology: Topology) -> DocumentScores:
    return evaluate(engine.score, loaded(write(tmp_path_factory.mktemp("texts"), "parquet")), topology, 3)


@pytest.fixture(scope="module")
def of_ids(tmp_path_factory: pytest.TempPathFactory, engine: Engine, topology: Topology) -> DocumentScores:
    path = write(tmp_path_factory.mktemp("ids"), "parquet", input_ids_key="ids")
    return evaluate(engine.score, loaded(path), topology, 3)


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
@pytest.mark.parametrize("text_key", [None, "text"])
def test_scores_are_those_of_the_same_documents_as_texts(
    tmp_path: Path, engine: Engine, topology: Topology, of_texts: DocumentScores, kind: str, text_key: str | None
) -> None:
    suite = loaded(write(tmp_path, kind, input_ids_key="ids", text_key=text_key))
    found = evaluate(engine.score, suite, topology, 2)
    for column in ("nll", "tokens", "correct", "domain"):
        assert np.allclose(getattr(found, column), getattr(of_texts, column), rtol=1e-6), column
    assert suite.label != of_texts.suite, "their ids may be any"
    assert len(set(found.key.tolist())) == len(set(of_texts.key.tolist()))
    for line, expected in zip(found.records(5), of_texts.records(5), strict=True):
        known = text_key is not None
        assert (line["bits_per_byte"], line["bytes"]) == (
            (pytest.approx(expected["bits_per_byte"]), expected["bytes"]) if known else (None, None)
        )
        assert (line["domain"], line["tokens"]) == (expected["domain"], expected["tokens"])
        for key in ("nll_per_token", "perplexity", "accuracy"):
            assert line[key] == pytest.approx(expected[key], rel=1e-6), key


def test_bytes_are_unknown_where_one_domain_has_none(of_ids: DocumentScores, of_texts: DocumentScores) -> None:
    sizes = np.where(of_ids.domain == 0, of_texts.text_bytes, -1)
    mixed = DocumentScores(**{**vars(of_ids), "text_bytes": sizes})
    lines = {line["domain"]: line for line in mixed.records(1)}
    assert {name: line["bytes"] is not None for name, line in lines.items()} == {
        "s/long": True, "s/short": False, "source:s": False, "macro": False, "micro": False,
    }  # fmt: skip
    assert {name for name, line in lines.items() if line["bits_per_byte"] is None} == lines.keys() - {"s/long"}


def test_a_bounded_suite_of_ids_is_a_part_of_the_whole(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", input_ids_key="ids")
    whole, part = loaded(path), loaded(path, max_documents=1)
    assert len(part.targets) == 2
    assert set(part.document_key) < set(whole.document_key)


def test_everything_that_shows_evaluations_shows_those_without_bytes(tmp_path: Path, of_ids: DocumentScores) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    for step in (0, 10):
        lines = record_scores(folder, step, ScoresOfAverage(of_ids), of_ids)
    assert [json.loads(line)["bits_per_byte"] for line in folder.evals.path.read_text().splitlines()] == [None] * 20
    (row,) = eval_rows(lines)
    assert not any("bits_per_byte" in key or key.endswith("bytes") for key in row)
    assert row["eval/macro/perplexity"] == lines[-2]["perplexity"]
    console = Console(record=True, width=200)
    for table in (step_table(lines), domain_table(lines, lines)):
        console.print(table)
    assert "nan" not in console.export_text()


@pytest.mark.parametrize("key", ["checkpoint.best", "train.stop.metric"])
def test_comparing_checkpoints_by_bytes_that_are_unknown_is_refused(
    tmp_path: Path, of_ids: DocumentScores, key: str
) -> None:
    suite = loaded(write(tmp_path, "parquet", input_ids_key="ids"))
    check_figures({key: "eval/macro/nll_per_token"}, suite, False)
    for line in ("macro", "s/long", "source:s", "ema:micro"):
        with pytest.raises(
            ConfigError, match=rf"{key}=eval/{line}/bits_per_byte: the suite suite\..* unknown; name the"
        ):
            check_figures({key: f"eval/{line}/bits_per_byte"}, suite, True)
    with pytest.raises(ConfigError, match=r"macro/bits_per_byte: the suite .* or take nll_per_token"):
        EvalFigure.parse("eval/macro/bits_per_byte").costs(of_ids.records(1), of_ids.suite)


def test_models_are_compared_by_tokens_where_bytes_are_unknown(
    of_ids: DocumentScores, of_texts: DocumentScores
) -> None:
    worse = DocumentScores(**{**vars(of_ids), "nll": of_ids.nll + of_ids.tokens})
    differences = compare(of_ids, worse, draws=50)
    assert {one.unit for one in differences} == {"nats per token"}
    assert [one.difference for one in differences] == [pytest.approx(1)] * len(differences)
    console = Console(record=True, width=200)
    console.print(difference_table("s", ("a", "b"), differences))
    assert "nats per token" in console.export_text()
    other = DocumentScores(**{**vars(worse), "tokens": of_ids.tokens + 1})
    with pytest.raises(ConfigError, match="have other tokens in each; score both on texts"):
        compare(of_ids, other, draws=50)
    assert compare(of_texts, of_texts, draws=50)[-1].unit == "bits per byte"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids_key": "text"}, r"column 'text' holds texts; name it with text_key"),
        ({"input_ids_key": "ids", "text_key": "ids"}, r"column 'ids' holds token ids; text_key is for the texts"),
        ({"input_ids_key": "ids", "text_key": "body"}, r"has no column 'body'; its columns are text, ids, of"),
        ({"input_ids_key": "none"}, r"has no column 'none'"),
    ],
)
def test_a_column_that_holds_something_else_is_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ShardError, match=message):
        loaded(write(tmp_path, "parquet", **changes))


def test_ids_that_the_tokenizer_does_not_have_or_spells_otherwise_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", input_ids_key="ids", text_key="text")
    rows = pq.read_table(tmp_path / "all.parquet").to_pydict()
    rows["ids"][2] = [1, 4096]
    pq.write_table(pa.table(rows), tmp_path / "all.parquet")
    with pytest.raises(ShardError, match=r"all\.parquet#ids, line 3: token id 4096, but the tokenizer .* has 4096"):
        loaded(path)
    rows["ids"] = [[1, *(token % 4000 + 90 for token in ids[1:-1]), 2] for ids in rows["ids"]]
    pq.write_table(pa.table(rows), tmp_path / "all.parquet")
    with pytest.raises(ConfigError, match=r"does not give back the text of suite 'suite'"):
        loaded(path)
    rows["ids"] = [Tokenizer(TOKENIZER).encode(text) for text in rows["text"]]  # without BOS and EOS, as some have them
    pq.write_table(pa.table(rows), tmp_path / "all.parquet")
    assert loaded(path).targets.tolist() == [len(ids) - 1 for ids in rows["ids"]]


def test_ids_of_json_lines_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"ids": [1, 2]}\n')
    (tmp_path / "suite.yaml").write_text("sources: [{name: a, path: a.jsonl, input_ids_key: ids}]")
    with pytest.raises(ConfigError, match=r"'a': input_ids_key is for a data set or Parquet files, .*a\.jsonl"):
        loaded(tmp_path / "suite.yaml")
