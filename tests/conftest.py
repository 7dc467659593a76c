"""What holds for all tests."""

import os

# Two tests run at once, and torch's threads collapse when they have to share a core
os.environ.setdefault("OMP_NUM_THREADS", "1")
