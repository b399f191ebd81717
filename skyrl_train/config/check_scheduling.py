"""Rules of scheduling, structured output and logit processors in the embedded engine, and of processors elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator

from skyrl_train.config.findings import Checked, Finding, Rule, error, warning

_SCHEDULING = "generator.scheduling"
_PROCESSORS = "generator.custom_logit_processor.enabled"


def scheduling(checked: Checked) -> Iterator[Finding]:
    generator = checked.config.generator
    keys = generator.scheduling
    if generator.backend != "embedded":
        return
    for name in ("low_priority_values_first", "preemption_threshold", "disable_preemption"):
        if checked.is_set(f"{_SCHEDULING}.{name}") and not keys.enable_priority:
            yield warning(
                f"{checked.show(f'{_SCHEDULING}.{name}')} has no effect while "
                f"{checked.show(f'{_SCHEDULING}.enable_priority')}"
            )
    if keys.disable_preemption and checked.is_set(f"{_SCHEDULING}.preemption_threshold"):
        yield error(
            f"{checked.show(f'{_SCHEDULING}.preemption_threshold')} says when to preempt, and "
            f"{checked.show(f'{_SCHEDULING}.disable_preemption')} says never; keep one of them"
        )
    if keys.policy == "lpm" and not generator.enable_prefix_caching:
        yield error(
            f"{checked.show(f'{_SCHEDULING}.policy')} looks for cached prefixes, and "
            f"{checked.show('generator.enable_prefix_caching')}; use fcfs, or cache"
        )


def logit_processors(checked: Checked) -> Iterator[Finding]:
    generator = checked.config.generator
    for group, sampling in (
        ("generator.sampling_params", generator.sampling_params),
        ("generator.eval_sampling_params", generator.eval_sampling_params),
    ):
        name = f"{group}.logit_processor"
        if sampling.logit_processor is None:
            if sampling.logit_processor_kwargs:
                yield error(f"{checked.show(f'{name}_kwargs')} are arguments of nothing; set {name}")
            continue
        try:
            json.dumps(sampling.logit_processor_kwargs)
        except TypeError as exc:
            yield error(f"{name}_kwargs must be what JSON can hold: {exc}")
        if generator.backend != "embedded":
            yield error(
                f"{checked.show(name)} is a function of this process, and {generator.backend} samples in another; use "
                "generator.backend=embedded"
            )
        elif not generator.custom_logit_processor.enabled:
            yield error(f"{checked.show(name)} needs {_PROCESSORS}=true: it is code that the engine runs")


SCHEDULING_RULES: tuple[Rule, ...] = (scheduling, logit_processors)
