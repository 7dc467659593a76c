"""Configs: valid ones load and round-trip; errors are reported with their place and what would be right."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from pretrain.config import RunConfig, load_config
from pretrain.config_changes import compare_for_resume, may_change
from pretrain.config_file import dump, read_tree
from pretrain.config_problems import check_masks
from shards import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
_SUITES = ("held-out", "held-out-by-hash", "instructions-held-out", "wikipedia-held-out")
EXPERIMENTS = [
    path
    for path in sorted((ROOT / "configs/experiments").glob("*.yaml"))
    if path.stem not in _SUITES and not path.name.endswith(".sweep.yaml")
]

SMALL = """\
run: {name: small, seed: 7}
model: {dim: 64, n_layers: 2, n_heads: 4, n_kv_heads: 2, vocab_size: 512}
data:
  seq_len: 128
  tokenizer: some.model
  lanes: 12
  sources:
    - {name: pile, paths: ["pile/*.jsonl.zst"], weight: 0.7}
    - name: dolma
      paths: ["dolma/*.json.gz"]
      weight: 0.3
train: {steps: 100, global_batch_size: 24, micro_batch_size: 2}
optim:
  learning_rate: 3e-4
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e6", 1e6),
        (".5", 0.5),
        ("-.inf", -float("inf")),
        ("off", "off"),
        ("yes", "yes"),
        ("true", True),
        ("12:30:00", "12:30:00"),
        ("2024-01-01", "2024-01-01"),
        ("010", 10),
        ("0x10", 16),
        ("1_000", 1000),
        ("'3e-4'", "3e-4"),
        ("~", None),
        ("", None),
        ("[1, a]", [1, "a"]),
    ],
)
def test_scalars_mean_what_they_look_like_and_survive_a_dump(tmp_path: Path, text: str, value: object) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"key: {text}\n")
    tree, _ = read_tree(path)
    assert repr(tree["key"]) == repr(value)
    path.write_text(dump(tree))
    assert repr(read_tree(path)[0]) == repr(tree)
    assert repr(read_tree(path, [f"key={text}"])[0]) == repr(tree)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", ":3:1: the key 'a' appears twice, first in line 1"),
        ("a: [1\nb: 2\n", ":2:2:"),
        ("a:\n\t- x\n", ":2:1:"),
        ("a: *x\n", ":1:4:"),
        ("a: !!python/name:os.system\n", ":1:4:"),
        ("- a\n", "mapping of sections"),
    ],
)
def test_broken_yaml_is_reported_with_its_line(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert f"{path}" in complaint(path)
    assert line in complaint(path)


def test_a_missing_file_is_reported_with_one_that_exists(small: Path) -> None:
    assert f"did you mean {small}?" in complaint(small.with_name("smal.yaml"))


def test_overriding_an_alias_leaves_its_anchor_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: &x {n: 1}\nb: *x\n")
    assert read_tree(path, ["b.n=2"])[0] == {"a": {"n": 1}, "b": {"n": 2}}


@pytest.mark.parametrize("override", ["train.steps", "=3", ".a=3", "data.sources.2.weight=1", "run.name.x=1", "run=[1"])
def test_an_override_of_no_known_key_is_quoted(small: Path, override: str) -> None:
    assert repr(override) in complaint(small, override)


def test_overrides_reach_every_depth(small: Path) -> None:
    config = load_config(
        small, ["optim.learning_rate=1e-3", "data.sources.1.weight=2", "wandb.tags=[a, b]", "precision=fp32"]
    )
    assert config.optim.learning_rate == 1e-3
    assert [source.weight for source in config.data.sources] == [0.7, 2]
    assert config.wandb.tags == ("a", "b")
    assert config.precision == "fp32"
    assert config.model == load_config(small).model


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.n_heds=4", "model.n_heds: unknown key; did you mean model.n_heads?"),
        ("model.learning_rate=1", "did you mean optim.learning_rate?"),
        ("seq_len=1", "did you mean data.seq_len?"),
        ("data.sources.0.wieght=1", "did you mean data.sources.0.weight?"),
        ("model.qqq=1", "known here: architecture, attention_dropout, base, dim, dropout"),
        ("train.steps=many", 'train.steps: "many" is wrong; it should be a whole number'),
        ("train.steps=true", "train.steps: true is wrong"),
        ("train.steps=0", "train.steps: 0 is wrong; it should be greater than or equal to 1"),
        ("optim.learning_rate='1e-3'", 'optim.learning_rate: "1e-3" is wrong; it should be a number'),
        ("parallel.compile=on", 'parallel.compile: "on" is wrong; it should be true or false'),
        ("wandb.mode=off", "it should be 'online', 'offline' or 'disabled'"),
        ("data.sources=[]", "data.sources: [] is wrong; it should be a list of at least 1"),
        ("data.packing.overflow_tolerance=0", "data.packing.overflow_tolerance: 0 is wrong"),
        ("run.name=../x", "run.name:"),
        ("model=", "model: null is wrong; it should be a section"),
        (
            "model.n_heads=5",
            "model.dim=64 cannot be split by model.n_heads=5; make model.dim a multiple, such as 60 or 65",
        ),
        ("model.dim=12", "gives heads of size 3; rotary positions need an even head size"),
        ("parallel.tp_size=4", "model.n_kv_heads=2 cannot be split by parallel.tp_size=4"),
        (
            "model.vocab_size=9 parallel.tp_size=8",
            "model.vocab_size=9 leaves some of parallel.tp_size=8 ranks without a token",
        ),
        ("train.micro_batch_size=5", "train.micro_batch_size a divisor: 1, 2, 3, 4, 6, 8, 12, 24"),
        (
            "checkpoint.every=10 checkpoint.keep_every=25",
            "checkpoint.keep_every=25 cannot be split by checkpoint.every=10",
        ),
        ("parallel.sequence_parallel=true", "parallel.sequence_parallel=true divides tokens among tensor-parallel"),
        (
            "parallel.tp_size=2 parallel.sequence_parallel=true data.seq_len=127",
            "data.seq_len=127 cannot be split by parallel.tp_size=2",
        ),
        ("parallel.sp_size=3", "model.n_heads=4 cannot be split by parallel.sp_size=3"),
        (
            "parallel.tp_size=2 parallel.sp_size=4",
            "model.n_heads / parallel.tp_size (2)=2 cannot be split by parallel.sp_size=4",
        ),
        ("parallel.sp_size=2 data.seq_len=127", "data.seq_len=127 cannot be split by parallel.sp_size=2"),
        (
            'parallel.sp_size=2 train.steps=9 stages=[{"step":5,"data":{"seq_len":33}}]',
            "stages.0.data.seq_len=33 cannot be split by parallel.sp_size=2",
        ),
        (
            "parallel.tp_size=2 parallel.sp_size=2 parallel.sequence_parallel=true data.seq_len=126",
            "data.seq_len=126 cannot be split by parallel.tp_size times parallel.sp_size=4",
        ),
        ("parallel.activation_checkpointing=some", "parallel.activation_checkpointing"),
        ("parallel.offload=parameters", "parallel.offload=parameters needs parallel.zero_stage=3, not 1"),
        ("parallel.offload=activations", "which is all that is kept of it with parallel.activation_checkpointing=full"),
        ('parallel.offload=["none","optimizer"]', "parallel.offload"),
        ("parallel.offload=[optimizer,optimizer]", "parallel.offload: name each of optimizer, parameters and"),
        ("parallel.offload=[optimizer,[x]]", "parallel.offload"),
        (
            "parallel.feed_forward_tokens=8 init_from=a model.lora.r=2 model.lora.alpha=2",
            "model.lora.targets: parallel.feed_forward_tokens=8 computes feed-forward networks without adapters; leave"
            " w1, w2, w3 out",
        ),
        ("optim.name=lion", "optim.name: \"lion\" is wrong; it should be 'adamw' or 'muon'"),
        (
            "optim.learning_rate_groups={'norm.weigth':2}",
            "optim.learning_rate_groups: no weight's name matches 'norm.weigth'; the names are embedding.weight,",
        ),
        ("optim.learning_rate_groups={'*':0}", "optim.learning_rate_groups.*: 0 is wrong; it should be greater than 0"),
        ("deepspeed.bf16.enabled=false", "deepspeed.bf16.enabled=False contradicts True"),
    ],
)
def test_a_wrong_value_is_reported_with_what_would_be_right(small: Path, override: str, message: str) -> None:
    assert message in complaint(small, *override.split())


RECURRENT = "model: {architecture: recurrent, dim: 64, n_layers: 2, vocab_size: 512}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.dimm=2", "model.dimm: unknown key; did you mean model.dim?"),
        (
            "model.n_heads=4",
            "model.n_heads: unknown key; known here: architecture, context_dim, dim, dropout, ffn_dim,",
        ),
        ("model.context_dim=0", "model.context_dim: 0 is wrong; it should be greater than or equal to 1"),
        ("model.architecture=gpt", "model.architecture: \"gpt\" is wrong; it should be one of 'llama', 'recurrent'"),
        ("model.architecture=llama", "model.n_heads: missing, and it has no default"),
        ("parallel.tp_size=2", "parallel.tp_size=2: model.architecture=recurrent cannot be split over ranks"),
        ("parallel.sp_size=2", "parallel.sp_size=2: model.architecture=recurrent cannot divide a row over ranks"),
        ("parallel.attention=sdpa", "parallel.attention=sdpa: model.architecture=recurrent has no attention"),
        ("parallel.feed_forward_tokens=8", "8: model.architecture=recurrent does not compute a few tokens at a time"),
        (
            "optim.learning_rate_groups={'*.wq.weight':2}",
            "no weight's name matches '*.wq.weight'; the names are embedding.weight, blocks.*.norm.weight,",
        ),
    ],
)
def test_each_architecture_has_its_own_keys_and_limits(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "recurrent.yaml"
    path.write_text(re.sub("model: .*", RECURRENT, SMALL))
    assert load_config(path).model.architecture == "recurrent"
    assert message in complaint(path, override)


def test_what_is_offloaded_is_a_name_or_several_and_written_as_before(small: Path) -> None:
    more = ["parallel.activation_checkpointing=full", "parallel.zero_stage=3"]
    for written, names in (("none", ()), ("optimizer", ("optimizer",)), ("[]", ()), ("[optimizer]", ("optimizer",)),
                           ("[optimizer,activations]", ("optimizer", "activations")),
                           ("[activations,optimizer]", ("optimizer", "activations")),
                           ("[optimizer,parameters]", ("parameters",))):  # fmt: skip
        config = load_config(small, [*more, f"parallel.offload={written}"])
        assert config.parallel.offload == names
        assert RunConfig.parse(config.model_dump(mode="json")) == config
        one_name = "none" if not names else names[0] if len(names) == 1 else [*names]
        assert config.model_dump(mode="json")["parallel"]["offload"] == one_name
        zero = config.deepspeed_config()["zero_optimization"]
        assert zero["offload_optimizer"]["device"] == ("cpu" if {"optimizer", "parameters"} & {*names} else "none")
        assert zero["offload_param"]["device"] == ("cpu" if "parameters" in names else "none")


def test_masks_that_are_too_large_are_refused_where_training_starts_and_read_elsewhere(small: Path) -> None:
    stages = 'stages=[{"step":5,"data":{"seq_len":131072}}]'
    long = load_config(small, ["train.steps=9", stages, "model.attention_dropout=0.1"])
    message = (
        "stages.0.data.seq_len=131072: model.attention_dropout=0.1 needs a whole mask, which grows with the square of a"
        " row's length, here 17.2 GB a row; set model.attention_dropout=0, or rows of at most 32768"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check_masks(long.all_stages, long.model, long.parallel)
    for overrides in (["parallel.attention=sdpa", "data.seq_len=32768"], ["data.seq_len=131072"]):
        config = load_config(small, overrides)
        check_masks(config.all_stages, config.model, config.parallel)


def test_a_key_of_another_architecture_is_unknown(small: Path) -> None:
    assert "model.context_dim: unknown key; known here: architecture," in complaint(small, "model.context_dim=8")
    assert "train.context_dim: unknown key; did you mean model.context_dim?" in complaint(small, "train.context_dim=8")


def test_a_run_from_before_there_were_architectures_is_a_llama_and_resumes(small: Path, tmp_path: Path) -> None:
    stages = "stages=[{step: 50, data: {sources: [{name: web, paths: [web.jsonl]}]}}]"
    config, old = load_config(small, [stages]), tmp_path / "old.yaml"
    values = json.loads(json.dumps(config.model_dump(mode="json")))
    assert values["model"].pop("architecture") == "llama"
    assert values["parallel"].pop("sp_size") == 1  # which came later still, as did these
    assert values["parallel"].pop("feed_forward_tokens") is None
    assert values["stages"][0].pop("model") == {"rope_theta": None, "rope_scaling": None}
    for source in (*values["data"]["sources"], *values["stages"][0]["data"]["sources"]):
        assert source.pop("min_tokens") is source.pop("max_tokens") is None
    assert values["evaluation"].pop("needles") is None
    old.write_text(dump(values))
    begun = load_config(old, begun=True)
    assert compare_for_resume(begun, config.settled(begun), 10) == ([], [])
    hashed = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
    assert config.hash() == hashed == load_config(small, ["model.architecture=llama", stages]).hash()
    assert load_config(small, [stages, "stages.0.data.sources.0.min_tokens=9"]).hash() != hashed
    assert load_config(small, [stages, "stages.0.model.rope_theta=9.0"]).hash() != hashed


def test_all_errors_are_reported_at_once_each_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(SMALL.replace("seq_len: 128", "seq_lenn: 128").replace("n_heads: 4", "n_heads: 5"))
    lines = complaint(path, "train.steps=x", "optim.eps=-1").splitlines()
    assert f"{path}:4: data.seq_lenn: unknown key; did you mean data.seq_len?" in lines
    assert f"{path}:3: data.seq_len: missing, and it has no default" in lines
    assert any(line.startswith("command line: train.steps:") for line in lines)
    assert any(line.startswith("command line: optim.eps:") for line in lines)
    assert any("model.dim=64 cannot be split by model.n_heads=5" in line for line in lines)
    assert len(lines) == 6  # including n_heads by n_kv_heads


def test_a_config_survives_a_round_trip_through_yaml(small: Path, tmp_path: Path) -> None:
    config = load_config(small, ["wandb.tags=['1', 'off', '3e-4']", "data.packing={overflow_tolerance: 9}"])
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert load_config(again) == config
    assert load_config(again).hash() == config.hash()
    assert load_config(again, ["optim.eps=1e-9"]).hash() != config.hash()


def test_check_accepts_exactly_the_rank_counts_that_it_lists(small: Path) -> None:
    config = load_config(small)  # 24 rows in micro-batches of 2
    works = []
    for dp_size in range(1, 30):
        try:
            config.check(dp_size)
        except ConfigError as error:
            assert "these numbers of data-parallel ranks work: 1, 2, 3, 4, 6, 12" in str(error)  # noqa: PT017
        else:
            works.append(dp_size)
            assert config.stage_at(0).micro_steps(dp_size) * dp_size * 2 == 24
    assert works == [1, 2, 3, 4, 6, 12]


def test_check_names_values_that_would_work(small: Path) -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size=24 .* on 8 .* a multiple of 16, such as 16 or 32"):
        load_config(small).check(8)


@pytest.mark.parametrize(
    "override",
    ["run.seed=8", "model.n_layers=3", "data.seq_len=64", "data.sources.0.weight=1", "data.lanes=24", "precision=fp32",
     "train.global_batch_size=48", "data.tokenizer=other.model data.bos=false", "data.sources.0.max_epochs=2",
     "optim.name=muon"],
)  # fmt: skip
def test_a_resume_refuses_what_would_corrupt_the_run(small: Path, override: str) -> None:
    refused, _ = compare_for_resume(load_config(small), load_config(small, override.split()), 10)
    (change,) = refused
    assert change.key == override.split()[-1].split("=")[0]
    assert change.old != change.new


def test_a_resume_refuses_other_groups_of_learning_rates(small: Path) -> None:
    changed = load_config(small, ["optim.learning_rate_groups={norm.weight: 2}"])
    refused, _ = compare_for_resume(load_config(small), changed, 10)
    assert refused == [("optim.learning_rate_groups.norm.weight", None, 2)]


@pytest.mark.parametrize(
    "override",
    ["train.steps=200", "train.micro_batch_size=4", "run.dir=elsewhere", "data.num_workers=3", "parallel.zero_stage=2",
     "data.sources.0.paths=[moved/*.zst]", "wandb.mode=disabled", "evaluation.every=5", "optim.learning_rate=1e-5",
     "checkpoint.every=7", "deepspeed.dump_state=true", "data.tokenizer=moved.model"],
)  # fmt: skip
def test_a_resume_allows_what_may_change_and_reports_it(small: Path, override: str) -> None:
    refused, allowed = compare_for_resume(load_config(small), load_config(small, [override]), 10)
    assert not refused
    assert allowed
    assert all(change.key.startswith(override.split("=")[0]) for change in allowed)


@pytest.mark.parametrize("version", [1, 2])
def test_spelling_out_a_default_changes_nothing(small: Path, version: int) -> None:
    old = load_config(small, ["data.lanes=null", f"data.plan_version={version}"])
    spelled = ["data.lanes=24", "model.ffn_dim=256", "data.window_bytes=1048576", f"data.plan_version={version}"]
    assert compare_for_resume(old, load_config(small, spelled), 10) == ([], [])


def test_a_run_folder_without_a_plan_version_has_version_1(small: Path) -> None:
    new = load_config(small)
    old = load_config(small, begun=True)
    assert (old.data.plan, new.data.plan) == (1, 2)
    assert new.settled(old).data.plan_version == 1
    assert new.settled(None).data.plan_version == 2
    assert compare_for_resume(old, new.settled(old), 10) == ([], [])
    refused, _ = compare_for_resume(old, load_config(small, ["data.plan_version=2"]).settled(old), 10)
    assert refused == [("data.plan_version", 1, 2)]


def test_batch_sizes_in_the_deepspeed_section_of_an_old_run_are_ignored(small: Path) -> None:
    sizes = ["deepspeed.gradient_accumulation_steps=1", "deepspeed.dump_state=true"]
    assert "deepspeed.gradient_accumulation_steps" in complaint(small, *sizes)
    assert load_config(small, sizes, begun=True).deepspeed == {"dump_state": True}


def test_a_run_may_end_by_epochs_instead_of_steps(small: Path) -> None:
    config = load_config(small, ["train.steps=null", "train.epochs=3"])
    assert [source.max_epochs for source in config.data.sources] == [3] * len(config.data.sources)
    assert "either steps (optimizer steps) or epochs" in complaint(small, "train.epochs=3")
    assert "either steps (optimizer steps) or epochs" in complaint(small, "train.steps=null")
    said = complaint(small, "train.steps=null", "train.epochs=3", "data.sources.0.max_epochs=2")
    assert "has max_epochs=2, but train.epochs=3 applies to all sources" in said
    refused, _ = compare_for_resume(config, load_config(small, ["train.steps=null", "train.epochs=4"]), 10)
    assert "train.epochs" in [change.key for change in refused]


def test_an_additional_source_is_refused(small: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.yaml"
    more.write_text(SMALL.replace("train:", '    - {name: third, paths: ["x"]}\ntrain:'))
    refused, _ = compare_for_resume(load_config(small), load_config(more), 10)
    assert "data.sources.2.name" in [change.key for change in refused]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_the_configs_of_experiments_parse(path: Path) -> None:
    load_config(path).check(1)


def test_a_key_without_a_rule_may_not_change() -> None:
    assert not may_change("something.new")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_parse_and_fit_the_rank_counts_they_name(path: Path) -> None:
    config = load_config(path)
    named = re.search(r"dp_size that work: ([0-9, ]+)", path.read_text())
    assert named or path.stem.startswith("quickstart")
    working = [int(count) for count in named[1].split(",")] if named else [1]
    for dp_size in range(1, max(working) + 1):
        if dp_size in working:
            config.check(dp_size)
        else:
            with pytest.raises(ConfigError, match="data-parallel ranks work"):
                config.check(dp_size)


def test_a_deepspeed_key_of_a_begun_run_is_refused_by_name_and_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(SMALL + "deepspeed: {zero_optimization: {round_robin_gradients: true}}\n")
    said = complaint(path)
    assert f"{path}: deepspeed.zero_optimization.round_robin_gradients is refused" in said
    assert "by the version of Headrace that began it" in said
