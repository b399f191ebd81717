"""Which distribution an engine's log-probabilities are of, and what can be done with them."""

from __future__ import annotations

from typing import Protocol

from skyrl_train.engines.base import LogprobSpace


class Sampling(Protocol):
    """What of sampling parameters changes the distribution that is drawn from."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def min_p(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def presence_penalty(self) -> float: ...
    @property
    def frequency_penalty(self) -> float: ...
    @property
    def min_new_tokens(self) -> int: ...
    @property
    def logit_processor(self) -> object: ...


_TRUNCATION = ("top_p", "top_k", "min_p")

_OFF = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_new_tokens": 0,
    "logit_processor": None,
}


def reshaping(sampling: Sampling) -> list[str]:
    """The settings, `name=value`, under which tokens are drawn from another distribution than the model's."""
    return [f"{name}={getattr(sampling, name)}" for name, off in _OFF.items() if getattr(sampling, name) != off]


def comparable(space: LogprobSpace, sampling: Sampling) -> str | None:
    """None where the engine's numbers are of the distribution that the trainer computes; otherwise why not.

    The trainer's are those of the model's logits over the temperature, without penalties and truncation.
    """
    if space == "raw" and sampling.temperature != 1.0:
        return f"the engine gives log-probabilities at temperature 1, the trainer those at {sampling.temperature}"
    if space == "penalised":
        settings = [setting for setting in reshaping(sampling) if setting.partition("=")[0] not in _TRUNCATION]
    else:
        settings = reshaping(sampling) if space == "sampled" else []
    if settings:
        return (
            f"the engine gives log-probabilities after {', '.join(settings)}, the trainer computes those of the whole "
            "distribution"
        )
    return None


def correctable(space: LogprobSpace, sampling: Sampling) -> str | None:
    """None where exp(old - rollout) is the importance weight of a drawn token; otherwise why not.

    With truncation it is not in any space: either the numbers are not those that were drawn from, or what was cut off
    can never be drawn, and the weights' mean is the mass that was kept, not 1.
    """
    reason = comparable(space, sampling)
    if reason is None and (settings := reshaping(sampling)):
        return f"tokens are drawn under {', '.join(settings)}, and the engine's log-probabilities are those without"
    return reason
