"""AdamW with float32 master weights and a schedule, writing parameters in place.

Low-precision parameters get a float32 twin: a step of 1e-6 on a bfloat16 weight of 0.1 rounds to nothing, on the twin
it adds up. Gradients are summed over micro-batches in float32 too. Parameters keep their identity and storage: an
engine that runs the same module sees the new values.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from skyrl_train.training.offload import HostMemory

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """`num_steps` is the end of a linear or cosine schedule. Weight decay is for matrices, not biases and norms.

    With `offload_after_step`, masters and moments are on the device during a step only.
    """

    lr: float
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    scheduler: Schedule = "constant"
    num_warmup_steps: int = 0
    num_steps: int | None = None
    offload_after_step: bool = False

    def __post_init__(self) -> None:
        if self.scheduler != "constant" and (self.num_steps is None or self.num_steps <= self.num_warmup_steps):
            raise ValueError(
                f"scheduler {self.scheduler!r} needs num_steps > num_warmup_steps {self.num_warmup_steps}, "
                f"found {self.num_steps}"
            )

    def lr_at(self, step: int) -> float:
        """Of optimizer step `step`, counted from 0. Warm-up rises from lr / num_warmup_steps; the end is 0."""
        if step < self.num_warmup_steps:
            return self.lr * (step + 1) / self.num_warmup_steps
        if self.scheduler == "constant" or self.num_steps is None:
            return self.lr
        progress = min((step - self.num_warmup_steps) / (self.num_steps - self.num_warmup_steps), 1.0)
        return self.lr * (1 - progress if self.scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """Of one optimizer step; `grad_norm` is global and before clipping."""

    grad_norm: float
    lr: float


class MasterAdamW:
    """Owns the float32 masters, the Adam moments and the step count of `parameters`."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], settings: OptimizerSettings) -> None:
        self.settings = settings
        self.num_steps_done = 0
        self._parameters = [p for p in parameters if p.requires_grad]
        if not self._parameters:
            raise ValueError("there is no parameter to train")
        self._masters = [
            p if p.dtype in (torch.float32, torch.float64) else torch.nn.Parameter(p.detach().float())
            for p in self._parameters
        ]
        self._lowered = [(p, m) for p, m in zip(self._parameters, self._masters, strict=True) if p is not m]
        for parameter, master in self._lowered:
            parameter.register_post_accumulate_grad_hook(_accumulate_into(master))  # type: ignore[no-untyped-call]
        matrices = [m for m in self._masters if m.dim() >= 2]
        vectors = [m for m in self._masters if m.dim() < 2]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self._adam = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.lr,
            betas=settings.adam_betas,
            eps=settings.adam_epsilon,
            fused=True,
        )
        self._host = HostMemory(())
        self._send_away()

    @torch.no_grad()
    def step(self) -> StepStats:
        """Clip, step, write back in place, clear the gradients.

        Raises FloatingPointError, with nothing changed, if a gradient is not finite.
        """
        norm = torch.nn.utils.get_total_norm([m.grad for m in self._masters if m.grad is not None])
        grad_norm = float(norm)
        if not math.isfinite(grad_norm):
            self.clear_gradients()
            raise FloatingPointError(
                f"the gradient norm is {grad_norm} at optimizer step {self.num_steps_done}; the weights are unchanged"
            )
        if self.settings.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._masters, self.settings.max_grad_norm, norm)
        lr = self.settings.lr_at(self.num_steps_done)
        self._host.bring_back()
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        if self._lowered:
            torch._foreach_copy_([p.data for p, _ in self._lowered], [m.data for _, m in self._lowered])
        self.clear_gradients()
        self._send_away()
        self.num_steps_done += 1
        return StepStats(grad_norm=grad_norm, lr=lr)

    def clear_gradients(self) -> None:
        self._adam.zero_grad(set_to_none=True)

    def tensors(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """`<name>.exp_avg`, `.exp_avg_sq`, `.step` of each parameter that was stepped, `.master` where it has one.

        `names` are those of the trained parameters, in their order. By name, not by number: what is saved can be
        sharded, and loaded into another sharding.
        """
        result: dict[str, torch.Tensor] = {}
        for name, parameter, master in zip(names, self._parameters, self._masters, strict=True):
            if master is not parameter:
                result[f"{name}.master"] = self._host.values(master).detach()
            for key, value in self._adam.state.get(master, {}).items():
                result[f"{name}.{key}"] = self._host.values(value)
        return result

    def empty_tensors(self, names: Sequence[str], stored: Collection[str]) -> dict[str, torch.Tensor]:
        """What to load `stored` ones into: the shapes of `tensors`."""
        result: dict[str, torch.Tensor] = {}
        for name, parameter, master in zip(names, self._parameters, self._masters, strict=True):
            like = self._host.values(master).detach()
            if master is not parameter:
                result[f"{name}.master"] = torch.empty_like(like)
            if f"{name}.exp_avg" in stored:
                result |= {f"{name}.{key}": torch.empty_like(like) for key in ("exp_avg", "exp_avg_sq")}
                result[f"{name}.step"] = torch.zeros(())
        return result

    def load_tensors(self, names: Sequence[str], tensors: Mapping[str, torch.Tensor], num_steps_done: int) -> None:
        """After the parameters themselves were loaded."""
        self._host.bring_back()
        number = {id(p): i for i, p in enumerate(p for group in self._adam.param_groups for p in group["params"])}
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, parameter, master in zip(names, self._parameters, self._masters, strict=True):
            if master is not parameter:
                master.data.copy_(tensors[f"{name}.master"])
            if f"{name}.exp_avg" in tensors:
                keys = ("exp_avg", "exp_avg_sq", "step")
                moments[number[id(master)]] = {key: tensors[f"{name}.{key}"] for key in keys}
        self._adam.load_state_dict({**self._adam.state_dict(), "state": moments})
        self._send_away()
        self.num_steps_done = num_steps_done

    @property
    def num_device_bytes(self) -> int:
        """What masters and moments hold on their device just now."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._own_tensors())

    def _own_tensors(self) -> list[torch.Tensor]:
        """Masters and, after the first step, moments."""
        moments = [state[name] for state in self._adam.state.values() for name in ("exp_avg", "exp_avg_sq")]
        return [*(master for _, master in self._lowered), *moments]

    def _send_away(self) -> None:
        if self.settings.offload_after_step:
            self._host = self._host.of(self._own_tensors())
            self._host.send_away()


def _accumulate_into(master: torch.nn.Parameter) -> Any:
    """A hook that moves a parameter's fresh gradient into its master's."""

    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    return hook
