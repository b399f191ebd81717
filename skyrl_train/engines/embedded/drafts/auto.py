"""Whether guessing pays, measured: seconds for a token with guesses and without, at each size of batch.

A step's cost is the processor time of the thread that computes it, so what others do on the machine does not count. It
depends on how many requests decode together: for one, rows of guesses are nearly free; for many, each row
is paid for. So sizes are told apart by powers of two, and each has its own two costs, averaged over blocks of steps
that do nothing but decode. The cheaper way is taken; the other one is looked at again after a while, rarely where it
has lost again and again. To go over it must win by a margin, so that noise does not swing it.

Nothing of this is seen in an answer: with a seed its tokens are the same with guesses and without, however the clock
ran. Its log-probabilities are too, to the bit, where kernels give a row the same bits in a step of any size: with
packed weights and decoders of the common form, and always in deterministic inference. Elsewhere their last bits may
differ. How far an answer is when the engine is paused does depend on the clock (config/check_drafts.py warns of it).
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from dataclasses import dataclass, field

BLOCK = 4
"""Steps that are measured together."""
FIRST_BLOCKS = 4
"""Of each way, before anything is decided."""
NEWEST = 0.15
"""Weight of a new block in the averages."""
NUM_RECENT = 15
OUTLIER = 3.0
"""A step that took so many times the median of the recent ones counts as that: the machine was busy elsewhere."""
IDLE = 28
"""Steps without measurement behind each block of the way that won: a look at the clock costs too."""
MARGIN = 0.05
WAIT = 64
LONGEST_WAIT = 8192
"""Steps until the other way is looked at again; twice as many each time that it has lost again."""


class Cost:
    """Of one way at one size: seconds and tokens of a block, averaged, and their ratio."""

    def __init__(self) -> None:
        self.num_blocks = 0
        self.newest = 0.0
        """Seconds for a token in the last full block."""
        self._seconds = self._tokens = 0.0
        self._recent: deque[float] = deque(maxlen=NUM_RECENT)
        self._block: list[tuple[float, int]] = []

    @property
    def per_token(self) -> float:
        return self._seconds / self._tokens

    def add(self, seconds: float, tokens: int) -> bool:
        """One step; whether a block is full."""
        self._recent.append(seconds)
        self._block.append((min(seconds, OUTLIER * statistics.median(self._recent)), tokens))
        if len(self._block) < BLOCK:
            return False
        took, brought = (float(sum(part)) for part in zip(*self._block, strict=True))
        self._block.clear()
        if not brought:
            return False
        self.newest = took / brought
        weight = NEWEST if self.num_blocks else 1.0
        self._seconds += weight * (took - self._seconds)
        self._tokens += weight * (brought - self._tokens)
        self.num_blocks += 1
        return True


@dataclass
class Size:
    """What is known for one size of batch. `guesses` is the way that is taken now, `pays` the one that won."""

    guessing: Cost = field(default_factory=Cost)
    plain: Cost = field(default_factory=Cost)
    guesses: bool = True
    pays: bool = True
    since: int = 0
    wait: int = WAIT
    idle: int = 0
    """Steps to come that nobody measures."""

    def rest(self) -> None:
        """A step that is not measured."""
        self.idle -= 1
        self.since += 1
        if not self.idle and self.since >= self.wait:
            self.guesses = not self.pays

    def add(self, seconds: float, tokens: int) -> None:
        cost = self.guessing if self.guesses else self.plain
        if not cost.add(seconds, tokens):
            return
        if min(self.guessing.num_blocks, self.plain.num_blocks) < FIRST_BLOCKS:
            self.guesses = self.guessing.num_blocks <= self.plain.num_blocks
            return
        was_trial = self.guesses != self.pays
        paid = self.pays
        ratio = self.guessing.per_token / self.plain.per_token
        self.pays = ratio < 1 if self.pays else ratio < 1 - MARGIN
        if self.pays != paid:
            self.wait = WAIT
        elif was_trial:
            self.wait = min(2 * self.wait, LONGEST_WAIT)
        self.since = 0 if was_trial else self.since + BLOCK
        usual = self.guessing if self.pays else self.plain
        # The average of the other way is old: a trial that goes well goes on until that is replaced.
        goes_well = was_trial and self.guesses != self.pays and cost.newest < (1 - MARGIN) * usual.per_token
        self.guesses = not self.pays if goes_well or self.since >= self.wait else self.pays
        if self.guesses == self.pays:
            self.idle = max(min(IDLE, self.wait - self.since), 0)


class Auto:
    """Decides before each step, and is told afterwards what it took."""

    def __init__(self) -> None:
        self.sizes: dict[int, Size] = defaultdict(Size)

    def guesses(self, num_decoding: int) -> bool:
        return self.size(num_decoding).guesses

    def add(self, num_decoding: int, seconds: float, tokens: int) -> None:
        """A step that decoded for so many requests and did nothing else brought `tokens`."""
        size = self.size(num_decoding)
        if size.idle:
            size.rest()
        else:
            size.add(seconds, tokens)

    def size(self, num_decoding: int) -> Size:
        """What is known for this many requests."""
        return self.sizes[(num_decoding - 1).bit_length()]
