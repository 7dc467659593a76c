"""Indexes the shards of a run before it reads them: `python launch/index.py --config configs/my-run.yaml`."""

if __name__ == "__main__":
    from _run import run  # of this folder

    run("index")
