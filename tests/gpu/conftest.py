"""Tests that need a CUDA device: nothing here is collected without one (`make test-gpu` on a machine that has it)."""

import torch

if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
