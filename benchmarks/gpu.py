"""Measure everything that matters on one GPU in one call of at most eight minutes: `python benchmarks/gpu.py`.

    python benchmarks/gpu.py --out gpu-results              # one CUDA device, no network, no data
    python benchmarks/gpu.py --device cpu --tiny            # tries the program where there is none

Parts, the most important first: the machine; whether bf16 computes what fp32 does, for every attention backend, eager
and compiled, with and without checkpointing; the speed of a 1B model, of the largest part of a 7B model that fits, of
the 1B model with long rows, of attention by itself, of a 125M model: tokens/s, MFU, memory beside its estimate, the
parts of a step, kernels, and where the host waits for the device.

Each part is a process with a time limit, so one that fails or hangs costs the others nothing, and what it had found
until then is kept. In the folder `--out`: results.json, rewritten after each part; report.md, the tables that are also
printed; of each part its results as they came (NAME.jsonl) and what it logged (NAME.log). The exit code is 1 if
something was computed wrongly or a part was lost; goals missed do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Result = dict[str, Any]
Goals = dict[str, tuple[int, float]]  # tokens/s and MFU, by part

GRACE = 20.0  # seconds that a part has to end what it began in time
LEAST = 15.0  # seconds below which a part is not worth starting


@dataclass(frozen=True)
class Part:
    """One process of the measurement.

    Attributes:
        name: as `gpu_parts.py` calls it.
        seconds: after which it begins nothing new.
        about: what its results say.
        columns: the keys of its results that the table shows; a dot goes into a dictionary.
    """

    name: str
    seconds: float
    about: str
    columns: tuple[str, ...]


TRAINING = (
    "settings", "layers", "attention", "tokens_per_second", "tokens_per_second_of_whole", "mfu", "peak_memory_gb",
    "estimated_memory_gb", "estimated_host_gb", "median_seconds.forward_backward", "median_seconds.optimizer",
    "median_seconds.step", "graphs_compiled_after_warmup", "waits", "not_run",
)  # fmt: skip
PARTS = (
    Part("machine", 30, "The device and the most that it can do.",
         ("device", "torch", "memory_gb", "bf16_tflops_measured", "bf16_tflops_of_data_sheet", "memory_gb_per_second")),
    Part("correctness", 105, "Loss and gradients against fp32 with SDPA and whole logits: relative errors.",
         ("variant", "loss_error", "gradient_error", "bound", "worst_weight", "verdict")),
    Part("1b", 105, "configs/llama-1b-dolma.yaml, rows of 2,048.", TRAINING),
    Part("7b", 80, "configs/llama-7b-pile-dolma.yaml under ZeRO-1, rows of 4,096, the layers that fit.", TRAINING),
    Part("long", 70, "configs/llama-1b-dolma.yaml, a row of 32,768 or 131,072 tokens, by what saves memory.", TRAINING),
    Part("attention", 35, "One layer's attention by itself, bf16.",
         ("shape", "documents", "backend", "forward_ms", "with_backward_ms", "with_backward_tflops", "not_run")),
    Part("125m", 35, "configs/llama-125m-pile.yaml, rows of 2,048.", TRAINING),
)  # fmt: skip
GOALS: Goals = {"1b": (46_000, 0.50), "7b": (9_000, 0.55)}  # on one H200


@dataclass(frozen=True)
class Outcome:
    """What became of a part: its results, in order, and how it ended ("done", or what went wrong)."""

    results: list[Result]
    ending: str
    seconds: float


def run_part(command: Sequence[str], out: Path, name: str, limit: float) -> Outcome:
    """Run a command that writes results to stdout, a line of JSON each; keep what it wrote, however it ends.

    It compiles into folders of its own: one that is killed may leave half of a compiled file, which others would load.

    Args:
        out: the folder for NAME.jsonl and NAME.log.
        limit: seconds after which it is killed, with every process that it started.
    """
    begin = time.monotonic()
    results, log = out / f"{name}.jsonl", out / f"{name}.log"
    compiled = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with results.open("w") as stdout, log.open("w") as stderr, compiled as cache:
        folders = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
        process = subprocess.Popen(
            command, stdout=stdout, stderr=stderr, start_new_session=True, env=os.environ | folders
        )
        try:
            code = process.wait(timeout=limit)
            ending = "done" if code == 0 else f"ended with exit code {code}; see {log.name}"
        except subprocess.TimeoutExpired:
            ending = f"killed after {limit:.0f} s; see {log.name}"
        finally:
            with contextlib.suppress(ProcessLookupError):  # the whole group may be gone
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Outcome(list(lines_of(results)), ending, time.monotonic() - begin)


def lines_of(file: Path) -> Iterator[Result]:
    """Yield the results in a file, whose last line may have been cut off."""
    for line in file.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def run_all(options: argparse.Namespace) -> dict[str, Outcome]:
    """Run the parts in turn, as long as there is time; write results and report after each."""
    ends = time.monotonic() + options.minutes * 60
    outcomes: dict[str, Outcome] = {}
    for part in PARTS:
        if part.name not in options.parts:
            continue
        left = ends - time.monotonic() - GRACE
        if left < LEAST:
            outcomes[part.name] = Outcome([], "not run: no time left", 0.0)
        else:
            seconds = min(part.seconds, left)
            command = [sys.executable, str(Path(__file__).with_name("gpu_parts.py")), part.name]
            command += ["--device", options.device, "--seconds", str(seconds), *(["--tiny"] if options.tiny else [])]
            outcomes[part.name] = run_part(command, options.out, part.name, seconds + GRACE)
        goals = {} if options.tiny else GOALS
        write_results(outcomes, goals, options.out)
        print(section(part, outcomes[part.name], goals), flush=True)
    return outcomes


def write_results(outcomes: dict[str, Outcome], goals: Goals, out: Path) -> None:
    """Write results.json and report.md of the parts so far."""
    parts = {part.name: part for part in PARTS}
    explained = {
        name: {
            "about": parts[name].about,
            "ending": outcome.ending,
            "seconds": round(outcome.seconds, 1),
            "goal": dict(zip(("tokens_per_second", "mfu"), goals[name], strict=True)) if name in goals else None,
            "results": outcome.results,
        }
        for name, outcome in outcomes.items()
    }
    (out / "results.json").write_text(json.dumps(explained, indent=1))
    sections = (section(parts[name], outcome, goals) for name, outcome in outcomes.items())
    (out / "report.md").write_text("\n".join(sections))


def section(part: Part, outcome: Outcome, goals: Goals) -> str:
    """Describe a part's results: a table, how they stand to the goal, and where the time of a traced step went."""
    lines = [f"## {part.name}: {outcome.ending} ({outcome.seconds:.0f} s)", "", part.about, ""]
    columns = [c for c in part.columns if any(shown(result, c) for result in outcome.results)]
    if columns:
        lines += [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
        lines += [f"| {' | '.join(shown(result, c) for c in columns)} |" for result in outcome.results]
    if part.name in goals:
        lines += ["", standing(goals[part.name], outcome.results)]
    for result in outcome.results:
        for key in ("trace", "waits_by_line"):
            if result.get(key):
                lines += ["", f"{key} of {result['settings']}: {json.dumps(result[key])}"]
    return "\n".join([*lines, ""])


def shown(result: Result, column: str) -> str:
    """Return a value as a table shows it; empty if there is none."""
    if column == "waits":
        return str(sum(result["waits_by_line"].values())) if "waits_by_line" in result else ""
    value: Any = result
    for key in column.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if value is None:
        return ""
    return (
        f"{value:.4g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value).split("\n")[0]
    )


def standing(goal: tuple[int, float], results: list[Result]) -> str:
    """Say how the fastest settings of a model stand to its goals."""
    wanted_speed, wanted_share = goal
    ran = [result for result in results if result.get("mfu")]
    if not ran:
        return f"Goals: {wanted_speed:,} tokens/s and {wanted_share:.0%} MFU; nothing was measured against them."
    best = max(ran, key=lambda result: result["mfu"])
    speed = best.get("tokens_per_second_of_whole", best["tokens_per_second"])
    whole = ", by its operations those of the whole model" if "tokens_per_second_of_whole" in best else ""
    verdict = "met" if speed >= wanted_speed and best["mfu"] >= wanted_share else "missed"
    return (
        f"Goals: {wanted_speed:,} tokens/s and {wanted_share:.0%} MFU; found {speed:,} tokens/s{whole} and"
        f" {best['mfu']:.1%} with {best['settings']}: {verdict}."
    )


def is_sound(outcome: Outcome) -> bool:
    """Return whether a part ran to its end and computed nothing wrongly."""
    verdicts = (str(result.get("verdict", "")) for result in outcome.results)
    return outcome.ending == "done" and not any(v.startswith(("WRONG", "failed")) for v in verdicts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for results, report and logs")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that the program runs")
    parser.add_argument("--minutes", type=float, default=7.8, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=[p.name for p in PARTS], default=[p.name for p in PARTS])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes = run_all(options)
    return 0 if all(map(is_sound, outcomes.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
