"""Which sample goes to which rank and micro-batch: groups stay together, ranks get equal work.

A family is the samples that share a prompt; splitting it over two bins computes the prompt twice.
Work is counted in rows (tokens computed). Everything is deterministic: ties go to the earlier sample, the lower bin.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One sample to place: `num_own` rows, plus `num_shared` that its family pays once per bin."""

    sample: int
    family: int
    num_shared: int
    num_own: int


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What a micro-batch may hold; None is no bound."""

    max_rows: int | None = None
    max_samples: int | None = None

    @staticmethod
    def of(max_rows: int | None, max_samples: int | None) -> Limit:
        if (max_rows is None) == (max_samples is None):
            raise ValueError(
                f"give either max_tokens_per_micro_batch or micro_batch_size, found {max_rows} and {max_samples}"
            )
        bound = max_rows if max_rows is not None else max_samples
        if bound is None or bound < 1:
            raise ValueError(f"a micro-batch must hold at least 1, found {bound}")
        return Limit(max_rows=max_rows, max_samples=max_samples)

    def allows(self, num_rows: int, num_samples: int) -> bool:
        return (self.max_rows is None or num_rows <= self.max_rows) and (
            self.max_samples is None or num_samples <= self.max_samples
        )


@dataclass
class Bin:
    """Some answers, by family, and the rows that they cost together."""

    members: dict[int, list[Answer]] = field(default_factory=dict)
    num_rows: int = 0
    num_samples: int = 0

    def __bool__(self) -> bool:
        return self.num_samples > 0

    def cost(self, answers: Sequence[Answer]) -> int:
        """Rows that these answers of one family would add."""
        prompt = 0 if answers[0].family in self.members else answers[0].num_shared
        return prompt + sum(a.num_own for a in answers)

    def add(self, answers: Sequence[Answer]) -> None:
        self.num_rows += self.cost(answers)
        self.num_samples += len(answers)
        self.members.setdefault(answers[0].family, []).extend(answers)

    def remove(self, answers: Sequence[Answer]) -> None:
        family = self.members[answers[0].family]
        for answer in answers:
            family.remove(answer)
        self.num_rows -= sum(a.num_own for a in answers)
        self.num_samples -= len(answers)
        if not family:
            del self.members[answers[0].family]
            self.num_rows -= answers[0].num_shared

    def families(self) -> list[list[Answer]]:
        """In the order of the samples, whatever the order of placement."""
        return sorted((sorted(f, key=_by_sample) for f in self.members.values()), key=lambda f: f[0].sample)


def spread(answers: Sequence[Answer], limit: Limit, dp_size: int) -> list[list[Bin]]:
    """bins[dp_rank][k], equally many on each rank, the largest first; a rank short of samples gets empty bins."""
    if dp_size < 1:
        raise ValueError(f"dp_size must be >= 1, found {dp_size}")
    ranks = [_fill(rank, limit) for rank in _balance(answers, dp_size)]
    num_bins = max(len(bins) for bins in ranks)
    for bins in ranks:
        while len(bins) < num_bins:
            bins.append(_halve(bins))
        bins.sort(key=lambda b: (-b.num_rows, min((f[0].sample for f in b.families()), default=-1)))
    return ranks


def _balance(answers: Sequence[Answer], dp_size: int) -> list[Bin]:
    """Whole families to the least loaded rank, then answers move from the heaviest to the lightest while that helps."""
    ranks = [Bin() for _ in range(dp_size)]
    for family in _families(answers):
        min(ranks, key=lambda r: r.num_rows).add(family)
    while dp_size > 1:
        heavy = max(ranks, key=lambda r: r.num_rows)
        light = min(ranks, key=lambda r: r.num_rows)
        moves = list(_moves(heavy, light))
        if not moves:
            break
        peak, _, move = min(moves, key=lambda m: m[:2])
        if peak >= heavy.num_rows:
            break
        heavy.remove(move)
        light.add(move)
    return ranks


def _moves(heavy: Bin, light: Bin) -> Iterable[tuple[int, int, list[Answer]]]:
    """(higher of the two loads afterwards, first sample, answers to move): the tail of each family, every length."""
    for family in heavy.families():
        for start in range(len(family)):
            tail = family[start:]
            gone = sum(a.num_own for a in tail) + (tail[0].num_shared if start == 0 else 0)
            yield max(heavy.num_rows - gone, light.num_rows + light.cost(tail)), tail[0].sample, tail


def _fill(rank: Bin, limit: Limit) -> list[Bin]:
    """First fit, families by falling cost. A family that no bin can hold whole is cut; a row has no padding to save."""
    bins: list[Bin] = []
    for family in _families([a for f in rank.families() for a in f]):
        rest = family
        while rest:
            empty = Bin()
            if limit.allows(empty.cost(rest), len(rest)):
                home = next(
                    (b for b in bins if limit.allows(b.num_rows + b.cost(rest), b.num_samples + len(rest))), None
                )
                if home is None:
                    bins.append(home := empty)
                home.add(rest)
                break
            bins.append(empty)
            while rest and limit.allows(empty.num_rows + empty.cost(rest[:1]), empty.num_samples + 1):
                empty.add(rest[:1])
                rest = rest[1:]
    return bins


def _halve(bins: Sequence[Bin]) -> Bin:
    """Take about half the rows out of the largest bin that has two samples; empty when none has."""
    half = Bin()
    source = max((b for b in bins if b.num_samples > 1), key=lambda b: b.num_rows, default=None)
    while source is not None and source.num_samples > 1 and half.num_rows * 2 < source.num_rows + half.num_rows:
        last = source.families()[-1][-1:]
        source.remove(last)
        half.add(last)
    return half


def _families(answers: Iterable[Answer]) -> list[list[Answer]]:
    """By falling cost; ties by first sample."""
    families: dict[int, list[Answer]] = {}
    for answer in answers:
        families.setdefault(answer.family, []).append(answer)
    return sorted(families.values(), key=lambda f: (-f[0].num_shared - sum(a.num_own for a in f), f[0].sample))


def _by_sample(answer: Answer) -> int:
    return answer.sample
