"""Models out and in: other programs' files hold the same model, to the last bit if they are only copied."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers import LlamaConfig as TheirConfig

from pretrain.checkpoint.store import CheckpointFile, write_complete
from pretrain.commands import dispatch
from pretrain.commands.export import export_run
from pretrain.config import load_config
from pretrain.exchange import hf
from pretrain.exchange.export import export
from pretrain.exchange.folder import describe, open_model
from pretrain.exchange.meta import halved, interleaved
from pretrain.exchange.tokenizer_files import check_tokenizer
from pretrain.model.transformer import LlamaConfig, Transformer
from pretrain.model.weights import fill, weight_specs
from shards import CheckpointError, ConfigError, DataConfig, Tokenizer, read_documents

TOKENIZER = Path("shards/sample/tokenizer-4k.model")
DATA = DataConfig.model_validate({"sources": [{"name": "x", "paths": ["x"]}], "tokenizer": TOKENIZER, "seq_len": 64})
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SHORT = {"original_max_position_embeddings": 32}
PLAIN = {"n_kv_heads": 4, "ffn_dim": 80}
GROUPED = {"n_kv_heads": 2, "ffn_dim": None, "tie_embeddings": True, "rope_theta": 5e5, "rope_scaling": LLAMA3}
NORMED = {"qk_norm": True}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0, "beta_slow": 0.05}

pytestmark = pytest.mark.usefixtures("topology")


class Memory:
    """A model's own parameters as a source of weights."""

    def __init__(self, model: Transformer) -> None:
        self._state, self._specs = dict(model.named_parameters()), weight_specs(model.config)

    def read(self, name: str, index: int = 0, count: int = 1) -> torch.Tensor:
        return self._state[name].detach()[self._specs[name].bounds(index, count)]


def build(changes: dict[str, object]) -> Transformer:
    values = {"dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 4096, "norm_eps": 1e-6, "init_std": 0.2}
    model = Transformer(LlamaConfig.model_validate(values | changes))
    model.initialize(seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # drawn too, since ones would hide a norm that is left out or in another's place
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def logits(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, torch.ones_like(tokens))


def imported(folder: Path, config: LlamaConfig) -> Transformer:
    model = Transformer(config)
    fill(model, open_model(folder, config), 0, 1)
    return model


def tokens_of(count: int = 40) -> torch.Tensor:
    return torch.randint(0, 4096, (2, count), generator=torch.Generator().manual_seed(1))


def same_files(first: Path, second: Path) -> bool:
    names = sorted(path.name for path in first.iterdir())
    same = [(first / name).read_bytes() == (second / name).read_bytes() for name in names]
    return names == sorted(path.name for path in second.iterdir()) and all(same)


@pytest.mark.parametrize(
    "changes",
    [
        PLAIN,
        GROUPED,
        PLAIN | NORMED,
        GROUPED | NORMED | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        GROUPED | {"rope_scaling": {"rope_type": "yarn", **YARN, "mscale": 1.2, "mscale_all_dim": 0.6}},
    ],
)
def test_an_export_has_our_logits_in_transformers_and_survives_a_round_trip(
    changes: dict[str, object], tmp_path: Path
) -> None:
    ours = build(changes)
    export(Memory(ours), ours.config, DATA, tmp_path / "hf", max_shard_bytes=100_000)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto", attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(ours, tokens_of()), theirs(tokens_of()).logits, rtol=1e-5, atol=1e-5)
    assert type(theirs) is (Qwen3ForCausalLM if ours.config.qk_norm else LlamaForCausalLM)
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == 2
    back = imported(tmp_path / "hf", ours.config)
    export(Memory(back), back.config, DATA, tmp_path / "again", max_shard_bytes=100_000)
    other = ours.config.model_copy(update={"qk_norm": not ours.config.qk_norm})
    with pytest.raises(ConfigError, match=rf"qwen3\)={ours.config.qk_norm}, but model.qk_norm={other.qk_norm}"):
        open_model(tmp_path / "hf", other)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    assert same_files(tmp_path / "hf", tmp_path / "again")


@pytest.mark.parametrize("changes", [PLAIN, GROUPED])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_metas_layout_round_trips_at_every_number_of_files(
    changes: dict[str, object], tp_size: int, tmp_path: Path
) -> None:
    ours = build(changes)
    export(Memory(ours), ours.config, DATA, tmp_path / "meta", "meta", tp_size=tp_size)
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    # How Meta's code computes the width from its keys.
    width = int(params.get("ffn_dim_multiplier", 1) * int(2 * 4 * params["dim"] / 3))
    assert -(-width // params["multiple_of"]) * params["multiple_of"] == ours.config.hidden_dim
    back = imported(tmp_path / "meta", ours.config)
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, back.state_dict()[name]), name
    first = torch.load(tmp_path / "meta" / "consolidated.00.pth")
    assert first["layers.0.attention.wo.weight"].shape == (48, 48 // tp_size)
    assert first["output.weight"].shape == (4096 // tp_size, 48)
    stored = 4 * sum(weight.numel() for weight in {w.data_ptr(): w for w in first.values()}.values())
    assert (tmp_path / "meta" / "consolidated.00.pth").stat().st_size < stored + 20_000, "views of larger tensors"


def test_metas_row_order_gives_our_scores_under_its_pairwise_rotation() -> None:
    heads, head_dim, x = 3, 8, torch.randn(5, 24).double()  # fp32 occasionally exceeds the tolerance
    ours_q, ours_k = torch.randn(2, heads * head_dim, 24).double().unbind()
    frequencies = 1e4 ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    angles = torch.arange(5)[:, None] * frequencies  # [position, head_dim / 2]

    def halves(weight: torch.Tensor) -> torch.Tensor:
        first, second = (x @ weight.T).view(5, heads, 2, -1).unbind(2)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)

    def pairs(weight: torch.Tensor) -> torch.Tensor:
        turned = (
            torch.view_as_complex((x @ weight.T).view(5, heads, -1, 2))
            * torch.polar(torch.ones_like(angles), angles)[:, None]
        )
        return torch.view_as_real(turned).flatten(2)

    expected = torch.einsum("qhd,khd->hqk", halves(ours_q), halves(ours_k))
    found = torch.einsum("qhd,khd->hqk", *(pairs(interleaved(weight, head_dim)) for weight in (ours_q, ours_k)))
    torch.testing.assert_close(found, expected)
    assert torch.equal(halved(interleaved(ours_q, head_dim), head_dim), ours_q)


def test_llama_2_splits_the_embedding_along_its_width(tmp_path: Path) -> None:
    ours = build(PLAIN)
    export(Memory(ours), ours.config, DATA, tmp_path / "meta", "meta", tp_size=2)
    for rank in range(2):
        path = tmp_path / "meta" / f"consolidated.{rank:02d}.pth"
        part = torch.load(path)
        part["tok_embeddings.weight"] = ours.embedding.weight.detach().chunk(2, 1)[rank].clone()
        torch.save(part, path)
    back = open_model(tmp_path / "meta", ours.config)
    assert torch.equal(back.read("embedding.weight"), ours.embedding.weight)
    assert torch.equal(back.read("embedding.weight", 1, 2), ours.embedding.weight[2048:])


@pytest.mark.parametrize(
    ("tied", "scaling", "beside"),
    [
        (False, {"rope_type": "llama3"} | LLAMA3 | SHORT, {}),
        (True, {"rope_type": "yarn", **YARN, "truncate": None}, {}),  # which is false
        (True, {"rope_type": "yarn", "factor": 4.0}, {}),  # whose original length is max_position_embeddings
        (True, {"rope_type": "yarn", "factor": 4.0}, {"original_max_position_embeddings": 16}),
    ],
)
def test_a_transformers_model_has_the_same_logits_in_ours(
    tied: bool, scaling: dict[str, object], beside: dict[str, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        TheirConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, intermediate_size=80,
            vocab_size=4096, rms_norm_eps=1e-6, tie_word_embeddings=tied, initializer_range=0.2,
            rope_parameters={"rope_theta": 5e5, **scaling}, max_position_embeddings=64, **beside,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    with torch.no_grad():
        expected = theirs(tokens_of(100)).logits
    for older in (False, True):
        if older:  # as earlier versions of transformers, and models of theirs, spell it
            rope = dict(theirs.config.rope_parameters)
            kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
            with_config(tmp_path, rope_parameters=None, rope_theta=theta, rope_scaling={"type": kind, **rope})
        config = open_model(tmp_path).description.config
        assert isinstance(config, LlamaConfig)
        assert config.rope_scaling is not None
        found = logits(imported(tmp_path, config), tokens_of(100))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_qwen3_of_transformers_has_the_same_logits_in_ours(tied: bool, tmp_path: Path) -> None:
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, intermediate_size=80,
            head_dim=8, vocab_size=4096, tie_word_embeddings=tied, initializer_range=0.2,
        )
    ).eval()  # fmt: skip
    for name, weight in theirs.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    theirs.save_pretrained(tmp_path)
    model = open_model(tmp_path)
    with torch.no_grad():
        expected = theirs(tokens_of(100)).logits
    found = logits(imported(tmp_path, model.description.config), tokens_of(100))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_shipped_config_with_qk_norm_exports_what_transformers_loads(tmp_path: Path) -> None:
    """Compare every key and shape of the 1B model, without the memory of its weights."""
    config = load_config(Path("configs/llama-1b-dolma.yaml")).model
    hf.write_config(tmp_path, config, 2048, torch.bfloat16, {"bos_token_id": 1, "eos_token_id": 2})
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert config.qk_norm
    assert type(theirs) is Qwen3ForCausalLM
    found = {hf.hf_name(name): spec.shape for name, spec in weight_specs(config).items()}
    assert found == {name: tuple(weight.shape) for name, weight in theirs.named_parameters()}


def test_the_exported_tokenizer_gives_our_ids(tmp_path: Path) -> None:
    ours = build(PLAIN)
    export(Memory(ours), ours.config, DATA, tmp_path / "hf")
    tokenizer, theirs = Tokenizer(TOKENIZER), AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts = [document.text for path in Path("shards/sample/eval").glob("*/val.*") for document in read_documents(path)]
    texts = [text[:3000] for text in texts[::3]]
    texts += [
        "",
        " ",
        "   a",
        "a  b ",
        "\n\n\tx",
        "<s>a</s> <0x0A>",
        "▁x",
        "née 你好 😀\u200d\u0301",
        "\r\n\x00",
        "=" * 99,
    ]
    for text in texts:
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
        assert theirs(text).input_ids == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    check_tokenizer(tmp_path / "hf", tokenizer, "data.tokenizer=x")


def with_config(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt_neox"}, "model_type='gpt_neox' is not the architecture"),
        ({"model_type": "olmo2"}, "model_type='olmo2' is not the architecture that Headrace trains, which has norms"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types='sliding_attention'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"head_dim": 16}, "head_dim=16"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling.rope_type='dynamic'"),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_type": "default"}},
            "the same as in rope_parameters",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "low": 1}}, "config.json.rope_scaling.low: unknown key"),
        ({"hidden_size": None}, "the key hidden_size is missing"),
        ({"hidden_size": "48"}, 'config.json.dim: "48" is wrong; it should be a whole number'),
        ({"num_attention_heads": 4.0}, "config.json.n_heads: 4.0 is wrong"),
        ({"tie_word_embeddings": "false"}, 'config.json.tie_embeddings: "false" is wrong'),
        ({"rope_theta": 5e5}, "rope_theta=500000.0, but model.rope_theta=10000.0"),
        ({"num_hidden_layers": 1}, "weights of another architecture: model.layers.1"),
        ({"num_hidden_layers": 3}, "lacks weights: model.layers.2"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "but model.rope_scaling=None"),
        ({"intermediate_size": 96}, "intermediate_size=96, but model.ffn_dim=80"),
    ],
)
def test_another_model_is_refused_by_the_key_that_differs(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    ours = build(PLAIN)
    export(Memory(ours), ours.config, DATA, tmp_path / "hf")
    with pytest.raises(ConfigError) as caught:
        open_model(with_config(tmp_path / "hf", **changes), ours.config)
    assert message in str(caught.value)


def test_what_a_layout_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    ours = build(PLAIN | {"qk_norm": True})
    with pytest.raises(ConfigError, match="model.qk_norm=true cannot be exported: Meta's LLaMA"):
        export(Memory(ours), ours.config, DATA, tmp_path / "out", "meta")
    scaled = build(PLAIN | {"rope_scaling": {"rope_type": "yarn", **YARN}})
    with pytest.raises(ConfigError, match=r"model.rope_scaling.rope_type=yarn cannot be exported: Meta's code has no"):
        export(Memory(scaled), scaled.config, DATA, tmp_path / "out", "meta")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        export(Memory(ours), ours.config, DATA, tmp_path / "out")


def test_another_tokenizer_is_refused_by_the_first_id_that_differs(tmp_path: Path) -> None:
    content = {"model": {"vocab": {"<unk>": 0, "<s>": 1, "Ġthe": 5}}, "added_tokens": [{"id": 2, "content": "<|end|>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"data.tokenizer=x .*id 2 is '</s>' there and '<|end|>'"):
        check_tokenizer(tmp_path, Tokenizer(TOKENIZER), "data.tokenizer=x")


def test_a_description_describes_the_same_model(tmp_path: Path) -> None:
    ours = build(GROUPED)
    export(Memory(ours), ours.config, DATA, tmp_path / "hf")
    text = describe(tmp_path / "hf")
    found = LlamaConfig.model_validate(yaml.safe_load(text)["model"])
    open_model(tmp_path / "hf", found)
    assert found.rope_scaling == ours.config.rope_scaling


def test_the_command_named_by_a_refusal_prints_a_matching_model_section(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.log.set_up", lambda *arguments: None)  # of the process that tests run in
    ours = build(GROUPED)
    export(Memory(ours), ours.config, DATA, tmp_path / "a model")
    with pytest.raises(ConfigError, match="describes another model") as caught:
        open_model(tmp_path / "a model", ours.config.model_copy(update={"n_layers": 7}))
    program, script, *words = shlex.split(str(caught.value).split("`")[-2])
    assert (program, script) == ("python", "launch/export.py")
    assert dispatch.run("export", words) == 0
    said = capsys.readouterr().out
    open_model(tmp_path / "a model", LlamaConfig.model_validate(yaml.safe_load(said)["model"]))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("consolidated.00.pth", b"PK\x03\x04 cut short"),
        ("consolidated.00.pth", b""),
        ("model.safetensors.index.json", b"{"),
        ("model.safetensors.index.json", b"{}"),
    ],
)
def test_truncated_files_are_named(file: str, content: bytes, tmp_path: Path) -> None:
    model, layout = build(PLAIN), "meta" if file.endswith(".pth") else "hf"
    export(Memory(model), model.config, DATA, tmp_path / "model", layout)
    (tmp_path / "model" / file).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{file}: cannot be read as"):
        open_model(tmp_path / "model")


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "quickstart"
    engine = run / "checkpoints" / "step_00000007" / "engine"
    engine.mkdir(parents=True)
    (run / "config.yaml").write_text(load_config(Path("configs/quickstart.yaml")).to_yaml())
    (engine / "x.pt").write_bytes(b"other")
    write_complete(engine.parent, [CheckpointFile("engine/x.pt", 5, "0" * 32)], 0.0)
    arguments = argparse.Namespace(
        run=run, step=None, overrides=[], to=tmp_path / "out", format="hf", weights="trained"
    )
    with pytest.raises(CheckpointError, match=r"x\.pt differs from what was saved"):
        export_run(arguments)
    assert not (tmp_path / "out").exists()
