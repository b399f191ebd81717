"""The coefficient of the KL to the reference, in the loss or in the reward: fixed, or steered towards a target."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from skyrl_train.errors import CheckpointError

MAX_ERROR = 0.2
"""One update sees an error of at most this: a wild estimate must not throw the coefficient."""


@dataclass(frozen=True, kw_only=True)
class KlTarget:
    """`kl` per token to steer to; an error that stays at its bound changes the coefficient e^0.2-fold in `horizon`
    samples."""

    kl: float
    horizon: int


class KlController:
    """Owns the coefficient; `target` None keeps it. Call it for the present value.

    Ziegler et al. (arXiv:1909.08593), section 2.2: e = clip(KL / target - 1, -0.2, 0.2), coefficient *= 1 + K e. K is
    samples / horizon, as in their code, so that it does not depend on the batch size. Their KL is a sum over the
    answer; ours is a mean over tokens, so that the target does not depend on the length.

        coefficient 0.1    target 0.05    horizon 1000    KL 0.2 over 100 samples    ->  0.1 (1 + 0.1 * 0.2) = 0.102
    """

    def __init__(self, coefficient: float, target: KlTarget | None = None) -> None:
        self._coefficient = coefficient
        self._target = target

    def __call__(self) -> float:
        return self._coefficient

    @property
    def is_adaptive(self) -> bool:
        return self._target is not None

    def update(self, kl: float, num_samples: int) -> float:
        """After a step whose tokens had this mean KL; the coefficient of the next step."""
        if self._target is not None:
            error = min(max(kl / self._target.kl - 1, -MAX_ERROR), MAX_ERROR)
            self._coefficient *= 1 + error * num_samples / self._target.horizon
        return self._coefficient

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self._coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._coefficient = float(state["coefficient"])

    def save(self, folder: str | Path) -> None:
        """Write all that `load` needs."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "state.json").write_text(json.dumps(self.state_dict()))

    def load(self, folder: str | Path) -> None:
        """Raises CheckpointError where there is none."""
        try:
            self.load_state_dict(json.loads((Path(folder) / "state.json").read_text()))
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise CheckpointError(f"{folder} holds no state of the KL controller: {exc}") from exc
