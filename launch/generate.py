"""Continues prompts with a model: `python launch/generate.py --run runs/x --prompt "The "`."""

if __name__ == "__main__":
    from _run import run  # of this folder

    run("generate")
