"""Load a checkpoint in several layouts on every rank; rank 0 prints the hashes of each, as a line of JSON.

Usage: python -m tests.distributed.state_hash RUN STEP TP_SIZE SCRATCH
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pretrain.assembly import make_engine
from pretrain.checkpoint.state import read_state
from pretrain.checkpoint.store import CheckpointConfig, CheckpointStore
from pretrain.checkpoint.universal import find_or_convert
from pretrain.config import load_config
from pretrain.run.run_folder import RunFolder
from pretrain.topology import Layout, started

LAYOUTS = [(1, "optimizer"), (2, "none"), (3, "none"), (3, "parameters")]


def main() -> None:
    folder, step, tp_size = RunFolder(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    checkpoint = CheckpointStore(folder.checkpoints, CheckpointConfig()).open(step)
    scratch = CheckpointStore(Path(sys.argv[4]), CheckpointConfig())
    found = {}
    with started(load_config(folder.config, [f"parallel.tp_size={tp_size}"]).parallel) as topology:
        for stage, offload in LAYOUTS:
            values = {"tp_size": tp_size, "zero_stage": stage, "offload": offload}
            overrides = [f"parallel.{key}={value}" for key, value in values.items()]
            engine = make_engine(load_config(folder.config, overrides, begun=True), topology, step)
            wanted = Layout(tp_size, topology.dp_size, stage)
            engine.load_universal(find_or_convert(scratch, checkpoint, read_state(checkpoint).layout, wanted, topology))
            hashes = engine.state_hash()
            found[f"{topology.dp_size} {stage} {offload}"] = [hashes.weights, hashes.optimizer]
        if topology.is_main:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
