"""The sampling parameters of running requests, as arrays over seats."""

from __future__ import annotations

import numpy as np

from skyrl_train.engines.embedded.uniforms import key_of_seed
from skyrl_train.types import SamplingParams


class SamplingTable:
    """The sampling parameters of running requests, one entry a seat."""

    def __init__(self, num_seats: int) -> None:
        self.temperature = np.ones(num_seats, dtype=np.float32)
        self.key = np.zeros(num_seats, dtype=np.uint64)
        self.top_k = np.zeros(num_seats, dtype=np.int32)
        self.top_p = np.ones(num_seats, dtype=np.float32)
        self.min_p = np.zeros(num_seats, dtype=np.float32)
        self.repetition = np.ones(num_seats, dtype=np.float32)
        self.presence = np.zeros(num_seats, dtype=np.float32)
        self.frequency = np.zeros(num_seats, dtype=np.float32)
        self.truncates = np.zeros(num_seats, dtype=bool)
        self.penalises = np.zeros(num_seats, dtype=bool)

    def set(self, seat: int, sampling: SamplingParams, seed: int) -> None:
        self.temperature[seat] = sampling.temperature
        self.key[seat] = key_of_seed(seed)
        self.top_k[seat] = sampling.top_k
        self.top_p[seat] = sampling.top_p
        self.min_p[seat] = sampling.min_p
        self.repetition[seat] = sampling.repetition_penalty
        self.presence[seat] = sampling.presence_penalty
        self.frequency[seat] = sampling.frequency_penalty
        self.truncates[seat] = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        self.penalises[seat] = (
            sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        )
