"""A request that goes on where an aborted attempt ended."""

from __future__ import annotations

import pytest

from skyrl_train.engines.embedded.config import EmbeddedConfig
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.types import Completion, GenerateRequest, LocalWeights, SamplingParams, VersionSpan, WeightUpdate
from tests.tiny import make_model, make_tokenizer

PROMPT = tuple(range(60, 75))


def make_engine() -> EmbeddedEngine:
    return EmbeddedEngine(make_model(), make_tokenizer(), config=EmbeddedConfig(max_context_len=128, seed=3))


def first_tokens(whole: Completion, count: int) -> Completion:
    return Completion(
        request_id=whole.request_id,
        token_ids=whole.token_ids[:count],
        logprobs=whole.logprobs[:count],
        finish_reason="abort",
        versions=(VersionSpan(version=0, start=0, end=count),),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 7, "temperature": 1.0},
        {"temperature": 0.0},
        {"seed": 9, "temperature": 0.7, "top_p": 0.9, "frequency_penalty": 0.5, "min_new_tokens": 20},
    ],
)
async def test_the_rest_is_what_the_whole_attempt_sampled(options: dict[str, float]) -> None:
    engine = make_engine()
    sampling = SamplingParams(max_new_tokens=30, **options)  # type: ignore[arg-type]
    whole = await engine.generate(GenerateRequest(request_id="a", prompt_token_ids=PROMPT, sampling=sampling))
    for count in (1, 7, len(whole.token_ids) - 1):
        await engine.flush_cache()
        again = await engine.generate(
            GenerateRequest(
                request_id="a", prompt_token_ids=PROMPT, sampling=sampling, partial=first_tokens(whole, count)
            )
        )
        assert again.token_ids == whole.token_ids and again.finish_reason == whole.finish_reason
        assert again.logprobs[:count] == whole.logprobs[:count]
        assert again.logprobs == pytest.approx(whole.logprobs, abs=1e-5)
    await engine.close()


async def test_each_part_keeps_the_version_it_was_sampled_under() -> None:
    engine = make_engine()
    sampling = SamplingParams(max_new_tokens=12, seed=1, ignore_eos=True)
    whole = await engine.generate(GenerateRequest(request_id="a", prompt_token_ids=PROMPT, sampling=sampling))
    await engine.pause()
    await engine.update_weights(WeightUpdate(version=5, source=LocalWeights()))
    await engine.resume()
    again = await engine.generate(
        GenerateRequest(request_id="a", prompt_token_ids=PROMPT, sampling=sampling, partial=first_tokens(whole, 4))
    )
    assert again.versions == (VersionSpan(version=0, start=0, end=4), VersionSpan(version=5, start=4, end=12))
    await engine.close()


async def test_a_partial_answer_counts_in_the_budget() -> None:
    whole = Completion(
        request_id="a",
        token_ids=(1, 2, 3),
        logprobs=(-1.0,) * 3,
        finish_reason="abort",
        versions=(VersionSpan(version=0, start=0, end=3),),
    )
    with pytest.raises(ValueError, match="has 3 tokens already, max_new_tokens is 3"):
        GenerateRequest(
            request_id="a", prompt_token_ids=PROMPT, sampling=SamplingParams(max_new_tokens=3), partial=whole
        )
