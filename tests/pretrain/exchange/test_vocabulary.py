"""Models and tokenizers of different sizes: rows without a token, tokens without a row."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from pretrain.commands.generate import find_model
from pretrain.exchange.export import export
from pretrain.exchange.folder import open_model
from pretrain.exchange.tokenizer_files import check_tokenizer
from pretrain.inference.forward_model import ForwardModel
from pretrain.inference.generate import Sampling, generate
from pretrain.model.architecture import Layout
from pretrain.model.transformer import Transformer
from pretrain.model.weights import fill
from pretrain.parallel_config import ParallelConfig
from pretrain.topology import Topology
from shards import ConfigError, Tokenizer
from tests.pretrain.exchange.test_exchange import DATA, PLAIN, Memory, build, logits, tokens_of
from tests.vocabularies import write_model

pytestmark = pytest.mark.usefixtures("topology")


@pytest.mark.parametrize("layout", ["hf", "meta", "headrace"])
def test_rows_of_an_embedding_that_have_no_token_are_left_out(
    layout: Layout, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    theirs = build(PLAIN | {"vocab_size": 4160})
    export(Memory(theirs), theirs.config, DATA, tmp_path / "model", layout)
    wanted = theirs.config.model_copy(update={"vocab_size": 4097})
    model = open_model(tmp_path / "model", wanted)
    assert "the last 63 rows of its embedding have no token" in caplog.text
    ours = Transformer(wanted)
    fill(ours, model, 0, 1)
    torch.testing.assert_close(logits(ours, tokens_of()), logits(theirs, tokens_of())[..., :4097])
    for name in ("embedding.weight", "output.weight"):
        slices = [model.read(name, index, 4) for index in range(4)]
        assert torch.equal(torch.cat(slices), theirs.get_parameter(name)[:4097])
    with pytest.raises(ConfigError, match="4160, but model.vocab_size=4161"):
        open_model(tmp_path / "model", theirs.config.model_copy(update={"vocab_size": 4161}))


@pytest.mark.parametrize("rows", [4160, 400])
def test_generate_keeps_to_the_ids_that_tokenizer_and_model_share(
    rows: int, topology: Topology, tmp_path: Path
) -> None:
    model = build(PLAIN | {"vocab_size": rows})
    with torch.no_grad():
        for weight in (model.embedding.weight, model.output.weight):
            weight[4096:] *= 50  # the most extreme logits are those of rows without a token
    export(Memory(model), model.config, DATA, tmp_path / "model")
    chosen = find_model(argparse.Namespace(model=tmp_path / "model", precision=None))
    assert chosen.codec.size == min(rows, 4096)
    sampling = Sampling(max_tokens=30, temperature=2.0)
    forward = ForwardModel(model.config, ParallelConfig(), "fp32", topology)
    chosen.load(forward, topology)

    def continued(prompt: str) -> str:
        return "".join(
            generate(forward.next_logits, forward.config.new_cache, 64, chosen.codec, prompt, sampling, topology)
        )

    assert continued("") != ""
    if rows < 4096:
        with pytest.raises(ConfigError, match=r"the prompt has the token id \d+, but the model has only 400 tokens"):
            continued("Once upon a time")


def test_metas_layout_refuses_a_vocabulary_that_its_files_cannot_share(tmp_path: Path) -> None:
    ours = build(PLAIN | {"vocab_size": 4097})
    with pytest.raises(
        ConfigError, match="--tp=2 does not divide the model's vocab_size=4097, and Meta's files have no"
    ):
        export(Memory(ours), ours.config, DATA, tmp_path / "meta", "meta", tp_size=2)
    export(Memory(ours), ours.config, DATA, tmp_path / "meta", "meta")
    assert torch.equal(open_model(tmp_path / "meta", ours.config).read("output.weight"), ours.output.weight)


def test_a_tokenizer_that_lacks_tokens_of_the_models_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "tokenizer.model", ["a", "b", "c"])
    fewer = Tokenizer(write_model(tmp_path / "fewer.model", ["a", "b"]))
    with pytest.raises(ConfigError, match=r"data.tokenizer=x lacks tokens .* it has 5, and .*ids up to 5"):
        check_tokenizer(tmp_path, fewer, "data.tokenizer=x")
