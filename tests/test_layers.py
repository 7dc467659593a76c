"""Imports between the rooms point one way only, checked by reading every import statement."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for package in ("shards", "pretrain") for path in (ROOT / package).rglob("*.py"))

# From the bottom up. A module may import those of its own layer and below; a module missing here fails the test.
LAYERS = (
    (
        "shards.installation",
        "shards.errors",
        "shards.processes",
        "shards.arrays",
        "shards.hashing",
        "shards.config_errors",
        "shards.config_base",
        "shards.config",
        "shards.stages",
    ),
    ("shards.formats",),
    ("shards.storage",),
    ("shards.records",),
    ("shards.index",),
    ("shards.plan", "shards.tokenize"),
    ("shards.suites",),
    ("shards.windows",),
    ("shards.exposure",),
    ("shards.preparation", "shards.tokenizer_check", "shards.source"),
    ("shards.lane", "shards.prefetch", "shards.batch", "shards.fingerprint", "shards.forecast"),
    ("shards.leg", "shards.carry"),
    ("shards.run_plan", "shards.description", "shards.whereabouts", "shards.sparing_pool"),
    ("shards.loader", "shards.history"),
    ("shards.provenance", "shards"),
    (
        "pretrain.parallel_config",
        "pretrain.topology",
        "pretrain.config_file",
        "pretrain.token_lengths",
        "pretrain.rng",
        "pretrain.log",
        "pretrain.parametrization",
        "pretrain.optim",
        "pretrain.ema",
        "pretrain.host_memory",
        "pretrain.devices",
    ),
    ("pretrain.run",),
    ("pretrain.model",),
    ("pretrain.checkpoint", "pretrain.deepspeed_keys"),
    (
        "pretrain.zero_pieces",
        "pretrain.saved_weights",
        "pretrain.weight_average",
        "pretrain.weight_norms",
        "pretrain.weight_hash",
        "pretrain.layer_figures",
        "pretrain.gradient_noise",
        "pretrain.adamw",
        "pretrain.muon",
        "pretrain.step_stats",
        "pretrain.step_hooks",
        "pretrain.mpu",
        "pretrain.engine",
    ),
    ("pretrain.stages",),
    ("pretrain.inference",),
    ("pretrain.exchange", "pretrain.evaluation"),
    ("pretrain.faults",),
    (
        "pretrain.startup_barrier",
        "pretrain.feed",
        "pretrain.held_out",
        "pretrain.data_end",
        "pretrain.journal",
        "pretrain.rewind",
        "pretrain.standing",
        "pretrain.provenance",
        "pretrain.exposure",
    ),
    ("pretrain.train_config", "pretrain.config_problems", "pretrain.config", "pretrain.config_changes"),
    ("pretrain.report",),
    ("pretrain.stepper", "pretrain.recorder"),
    ("pretrain.profiling",),
    ("pretrain.trainer", "pretrain.loop", "pretrain.assembly", "pretrain.fork", "pretrain.unlearning"),
    ("pretrain.start",),
    ("pretrain.audit",),
    ("pretrain.cluster",),
    ("pretrain.sweep",),
    ("pretrain.commands",),
    ("pretrain.__main__",),
)

# Third-party engines, and the only modules that may import them.
OWNERS = {
    "wandb": {"pretrain.run.wandb_tracker"},
    "deepspeed": {"pretrain.engine", "pretrain.zero_pieces"},
    # Forming the groups, and asking for them in the sharded layers.
    "fairscale.nn.model_parallel.initialize": {"pretrain.topology", "pretrain.model.parallel"},
    "fairscale.nn.model_parallel.initialize.initialize_model_parallel": {"pretrain.topology"},
    "datasets": {"shards.records.hf_datasets"},
    "lm_eval": {"pretrain.evaluation.harness"},
    "matplotlib": {"pretrain.evaluation.compare", "pretrain.report.png"},
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


@functools.cache
def imports_of(path: Path) -> frozenset[str]:
    """Return everything that a file imports, at its top or inside a function, as dotted names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def layer_of(name: str) -> int | None:
    """Find the layer of a module, or of a name in it: that of the longest entry that it is within."""
    if name.partition(".")[0] == "shards" and name not in MODULES and name.rpartition(".")[0] == "shards":
        name = "shards"  # a name that the package exports
    places = [
        (len(entry), i)
        for i, layer in enumerate(LAYERS)
        for entry in layer
        if name == entry or (entry != "shards" and within(name, entry))
    ]
    return max(places)[1] if places else None


def test_every_layer_names_only_modules_and_rooms() -> None:
    entries = {entry for layer in LAYERS for entry in layer} | {owner for owners in OWNERS.values() for owner in owners}
    assert entries <= MODULES


def test_imports_point_down() -> None:
    assert [problem for path in FILES for problem in upward_imports(path)] == []


def upward_imports(path: Path) -> Iterator[str]:
    module = module_of(path)
    if module == "pretrain":
        assert imports_of(path) == {"shards.__version__"}
        return
    layer = layer_of(module)
    assert layer is not None, f"{module} has no layer; give it one here"
    for name in imports_of(path):
        if name.partition(".")[0] in ("shards", "pretrain", "launch", "tests"):
            below = layer_of(name)
            if name.startswith("pretrain.") and below is None:
                continue  # the type check catches `from pretrain import x` if x is not a module
            if below is None:
                yield f"{module} imports {name}, which has no layer"
            elif below > layer:
                yield f"{module} imports {name}, which is above it"


def test_third_party_engines_have_one_owner() -> None:
    assert [problem for path in FILES for problem in disowned_imports(path)] == []


def disowned_imports(path: Path) -> Iterator[str]:
    module = module_of(path)
    for name in imports_of(path):
        for engine, owners in OWNERS.items():
            if within(name, engine) and module not in owners:
                yield f"{module} imports {name}; only {', '.join(sorted(owners))} may"
        if within(module, "shards") and any(within(name, heavy) for heavy in ("torch", "transformers", "fairscale")):
            yield f"{module} imports {name}"


def test_only_what_runs_or_submits_a_whole_training_sees_the_whole_config() -> None:
    users = {module_of(path) for path in FILES if any(within(name, "pretrain.config") for name in imports_of(path))}
    running = {
        "pretrain.config_changes",
        "pretrain.stepper",
        "pretrain.trainer",
        "pretrain.assembly",
        "pretrain.fork",
        "pretrain.unlearning",
        "pretrain.start",
        "pretrain.audit.interval",
        "pretrain.audit.comparison",
        "pretrain.audit.replay",
        "pretrain.cluster.submission",
    }
    assert {name for name in users if not within(name, "pretrain.commands")} == running


def test_the_architecture_page_names_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    listing = re.search(r"^```\n(shards/.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert listing is not None
    named, package, room = set(), "", ""
    for line in listing[1].splitlines():
        indent = len(line) - len(line.lstrip())
        names = line.split("   ")[0].split() if indent == 0 else line.strip().split("    ")[0].split()
        if indent == 0:
            package, room = names[0].rstrip("/"), ""
        elif indent == 2:
            room = names[0].rstrip("/") if names[0].endswith("/") else ""
        if indent > 0 and not names[0].endswith("/"):
            parts = (package, room) if indent > 2 else (package,)
            named |= {".".join((*parts, name)) for name in names}
    modules = {module_of(path) for path in FILES if path.name != "__init__.py"}
    assert named == modules
