"""Stop after three steps, go on in a new process: the weights equal those of six steps in one, to the bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from skyrl_train.algorithms.kl import k3
from skyrl_train.algorithms.objective import PolicyObjective
from skyrl_train.algorithms.policy_losses import ppo_clip
from skyrl_train.algorithms.reductions import token_mean
from skyrl_train.data.pack import pack
from skyrl_train.training.checkpoint import CheckpointStore
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.training.update import update_policy
from tests.tiny import make_model
from tests.training.batches import make_samples

OBJECTIVE = PolicyObjective(
    policy_loss=ppo_clip, reduction=token_mean, kl=k3, kl_loss_coef=0.05, entropy_loss_coef=0.01
)


def train(root: Path, until: int) -> None:
    """Go on from the latest checkpoint under `root`, or from the start, and save at step `until`."""
    settings = OptimizerSettings(lr=5e-3, num_warmup_steps=2, scheduler="linear", num_steps=20, weight_decay=0.01)
    trainer = PolicyTrainer(make_model("qwen3"), settings, reference=make_model("qwen3", seed=1))
    store = CheckpointStore(root)
    step = 0
    if (found := store.latest()) is not None:
        trainer.load(found.path / "policy")
        step = found.run_state["step"]
    while step < until:
        batches = [pack(make_samples(seed=10 * step + i), max_tokens_per_micro_batch=50) for i in range(2)]
        update_policy(trainer, batches, OBJECTIVE)
        step += 1
    store.save(step, {"policy": trainer.save}, {"step": step})


def test_a_resumed_run_ends_at_the_same_weights_to_the_bit(tmp_path: Path) -> None:
    train(tmp_path / "straight", 6)
    train(tmp_path / "resumed", 3)
    command = f"from tests.training.test_resume import *; train(Path({str(tmp_path / 'resumed')!r}), 6)"
    subprocess.run([sys.executable, "-c", command], check=True, timeout=120)
    straight, resumed = (read(tmp_path / root / "global_step_6" / "policy") for root in ("straight", "resumed"))
    assert straight.keys() == resumed.keys() and any(name.endswith(".exp_avg_sq") for name in straight)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())
    values = [(tmp_path / root / "global_step_6/policy/state.json").read_text() for root in ("straight", "resumed")]
    assert values[0] == values[1]


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
