"""Trains a model, or continues training it: `deepspeed launch/pretrain.py --config configs/quickstart.yaml`."""

if __name__ == "__main__":
    from _run import run  # of this folder

    run("train")
