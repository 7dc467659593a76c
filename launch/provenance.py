"""Names every document of a step: `python launch/provenance.py --run runs/quickstart --step 300`."""

if __name__ == "__main__":
    from _run import run  # of this folder

    run("provenance")
