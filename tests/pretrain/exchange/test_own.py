"""Our own layout holds models of every architecture; what does not fit is refused by the key that differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain.exchange.export import export
from pretrain.exchange.folder import describe, open_codec, open_model, open_tokenizer
from pretrain.model.architecture import Layout
from pretrain.model.recurrent import Recurrent, RecurrentConfig
from pretrain.model.weights import check_row_splits, check_splits, fill, weight_specs
from shards import ConfigError
from tests.pretrain.exchange.test_exchange import DATA, GROUPED, NORMED, PLAIN, Memory, build, same_files

pytestmark = pytest.mark.usefixtures("topology")


class Drawn:
    """The parameters of a drawn recurrent model as a source of weights."""

    def __init__(self, config: RecurrentConfig) -> None:
        model = Recurrent(config)
        model.initialize(seed=3)
        self._state, self._specs = dict(model.named_parameters()), weight_specs(config)

    def read(self, name: str, index: int = 0, count: int = 1) -> Tensor:
        return self._state[name].detach()[self._specs[name].bounds(index, count)]


def recurrent(**changes: object) -> RecurrentConfig:
    values = {"dim": 24, "n_layers": 2, "context_dim": 20, "ffn_dim": 40, "vocab_size": 4096}
    return RecurrentConfig.model_validate(values | changes)


@pytest.mark.parametrize("tied", [False, True])
def test_a_recurrent_model_survives_a_round_trip(tied: bool, tmp_path: Path) -> None:
    config = recurrent(tie_embeddings=tied, dropout=0.1)
    written = export(Drawn(config), config, DATA, tmp_path / "model", max_shard_bytes=100_000)
    assert written == "headrace"
    assert len(list((tmp_path / "model").glob("*.safetensors"))) >= 2
    opened = open_model(tmp_path / "model", recurrent(tie_embeddings=tied, init_std=0.5, vocab_multiple=64))
    assert opened.description.config == config
    assert opened.description.context == 64
    back = Recurrent(config)
    fill(back, opened, 0, 1)
    for name, parameter in back.named_parameters():
        assert torch.equal(parameter, Drawn(config).read(name)), name
    export(opened, config, DATA, tmp_path / "again", max_shard_bytes=100_000)
    assert same_files(tmp_path / "model", tmp_path / "again")
    codec, tokenizer = open_codec(tmp_path / "model"), open_tokenizer(tmp_path / "model")
    assert codec.ends == {tokenizer.eos_id}
    assert codec.encode("the cat") == [tokenizer.bos_id, *tokenizer.encode("the cat")]


@pytest.mark.parametrize("changes", [PLAIN, GROUPED | NORMED])
def test_a_llama_has_the_same_weights_in_our_layout_as_in_hugging_faces(
    changes: dict[str, object], tmp_path: Path
) -> None:
    ours = build(changes)
    layouts: tuple[Layout, ...] = ("hf", "headrace")
    models = []
    for layout in layouts:
        export(Memory(ours), ours.config, DATA, tmp_path / layout, layout)
        models.append(open_model(tmp_path / layout, ours.config))
    for name in weight_specs(ours.config):
        assert torch.equal(models[0].read(name, 1, 2), models[1].read(name, 1, 2)), name
    assert "n_kv_heads" in describe(tmp_path / "headrace")


def test_a_model_of_another_architecture_or_size_is_refused(tmp_path: Path) -> None:
    llama, config = build(PLAIN), recurrent()
    export(Memory(llama), llama.config, DATA, tmp_path / "hf")
    export(Drawn(config), config, DATA, tmp_path / "model")
    with pytest.raises(
        ConfigError, match=r"another model: it is a llama, but model.architecture='recurrent'. To print"
    ):
        open_model(tmp_path / "hf", config)
    with pytest.raises(
        ConfigError, match=r"another model: it is a recurrent, but model.architecture='llama'. To print"
    ):
        open_model(tmp_path / "model", llama.config)
    with pytest.raises(ConfigError, match=r"model.context_dim=20, but model.context_dim=16. To print"):
        open_model(tmp_path / "model", recurrent(context_dim=16))
    assert "context_dim: 20" in describe(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"--tp=2: model.architecture=recurrent cannot be split"):
        check_splits(config, 2, "--tp")
    check_splits(config, 1, "--tp")
    with pytest.raises(ConfigError, match=r"--sp=2: a model of architecture=recurrent cannot divide a row over ranks"):
        check_row_splits(config, 1, 2, 64, "--sp")
    check_row_splits(config, 1, 1, 64, "--sp")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"architecture": "mamba"}}, 'config.json.model.architecture: "mamba" is wrong; it should be one of'),
        ({"model": {"architecture": "recurrent", "dim": 24}}, "model.n_layers: missing"),
        ({"model": None}, "needs the keys model, a section, and seq_len"),
        ({"seq_len": "x"}, "needs the keys model, a section, and seq_len"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_by_its_key(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    export(Drawn(recurrent()), recurrent(), DATA, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError) as caught:
        open_model(tmp_path / "model")
    assert message in str(caught.value)


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_layouts_of_other_programs_are_refused_and_leave_nothing(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--format {layout}: no program that reads that layout has model.archit"):
        export(Drawn(recurrent()), recurrent(), DATA, tmp_path / "no", layout)
    assert not list(tmp_path.iterdir())
