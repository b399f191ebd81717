"""Several engines described as one: their constants, their figures, their metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from operator import attrgetter

from skyrl_train.engines.base import EngineInfo, EngineStats
from skyrl_train.errors import ConfigError

_SUMMED = (
    "num_running",
    "num_waiting",
    "num_prompt_tokens_total",
    "num_cached_tokens_total",
    "num_generated_tokens_total",
    "num_retractions_total",
    "num_evicted_tokens_total",
    "num_host_cached_tokens_total",
    "num_steps_total",
    "num_verifications_total",
    "num_drafted_tokens_total",
    "num_accepted_tokens_total",
    "num_sessions",
    "num_restarts_total",
    "num_resent_total",
)
_COUNTERS = tuple(name for name in _SUMMED if name.endswith("_total"))


def joined_info(infos: Sequence[EngineInfo]) -> EngineInfo:
    """What holds whichever engine a request meets. Raises ConfigError for engines that are no copies of each other."""
    if not infos:
        raise ConfigError("a router needs at least one engine, found none")
    first = infos[0]
    for attribute in ("model", "logprob_space"):
        values = {info.name: getattr(info, attribute) for info in infos}
        if len(set(values.values())) > 1:
            raise ConfigError(
                f"engines behind one router need the same {attribute}, found "
                + ", ".join(f"{name}: {value}" for name, value in values.items())
            )
    names = [info.name for info in infos]
    if len(set(names)) < len(names):
        raise ConfigError(f"engines behind one router need names of their own, found {', '.join(names)}")
    return EngineInfo(
        name="+".join(names),
        model=first.model,
        max_context_len=min(info.max_context_len for info in infos),
        logprob_space=first.logprob_space,
        capabilities=frozenset.intersection(*(info.capabilities for info in infos)),
    )


def joined_stats(live: Sequence[EngineStats], gone: Sequence[EngineStats], *, policy_version: int) -> EngineStats:
    """Sums of requests, sessions and counters; `kv_used_frac` of the fullest engine; `accept_len` the mean over those
    that speculate; `paused` if one is. `gone`: the last figures of engines out of rotation, for counters must not fall.
    """
    sums = {name: sum(map(attrgetter(name), live)) for name in _SUMMED}
    for name in _COUNTERS:
        sums[name] += sum(map(attrgetter(name), gone))
    accepted = [stats.accept_len for stats in live if stats.accept_len is not None]
    behind = [stats.draft_updates_behind for stats in live if stats.draft_updates_behind is not None]
    return EngineStats(
        policy_version=policy_version,
        paused=any(stats.paused for stats in live),
        kv_used_frac=max((stats.kv_used_frac for stats in live), default=0.0),
        accept_len=sum(accepted) / len(accepted) if accepted else None,
        draft_updates_behind=max(behind, default=None),
        **sums,
    )


_COMMENT = re.compile(r"# (?:HELP|TYPE) (\S+)")
_ENDINGS = ("_bucket", "_sum", "_count", "_total", "_created")
_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"')
_SAMPLE = re.compile(r"([A-Za-z_:][A-Za-z0-9_:]*)(?:\{(.*)\})?( .*)")


def joined_metrics(texts: Mapping[str, str]) -> str:
    """One text in Prometheus' format of one for each engine, by its name: every series gets a label `engine`.

    A label `engine` that a server has itself, as vLLM does, becomes `exported_engine`, as Prometheus would do it.
    The lines of a metric stand together and its comments once, as the format asks.
    """
    comments: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for engine, text in texts.items():
        metric = ""
        label = 'engine="{}"'.format(engine.replace("\\", r"\\").replace('"', r"\""))
        for line in text.splitlines():
            if comment := _COMMENT.match(line):
                metric = comment[1]
                lines = comments.setdefault(metric, [])
                if not any(known.split()[1] == line.split()[1] for known in lines):
                    lines.append(line)
            elif sample := _SAMPLE.fullmatch(line):
                name, labels, value = sample.groups()
                # A histogram's series are named after it: NAME_bucket, NAME_sum, NAME_count.
                owner = metric if name in {metric, *(metric + ending for ending in _ENDINGS)} else name
                own = _without_clash(labels or "")
                samples.setdefault(owner, []).append(f"{name}{{{label}{',' if own else ''}{own}}}{value}")
    parts = [line for metric, lines in samples.items() for line in (*comments.get(metric, ()), *lines)]
    return "".join(f"{line}\n" for line in parts)


def _without_clash(labels: str) -> str:
    """`a="1",engine="0"` with its `engine` renamed; what stands in quotes is no label."""
    return _LABEL.sub(lambda found: f"exported_{found[0]}" if found[1] == "engine" else found[0], labels)
