import pytest

from skyrl_train.types import Completion, GenerateRequest, SamplingParams, VersionSpan


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("max_new_tokens", 0, ">= 1"),
        ("temperature", -1.0, "0 or at least 1e-4"),
        ("temperature", 1e-45, "0 or at least 1e-4"),
        ("temperature", float("nan"), "0 or at least 1e-4"),
        ("top_p", 0.0, r"in \(0, 1\]"),
        ("top_k", 2**40, "in"),
        ("min_p", 1.5, r"in \[0, 1\]"),
        ("repetition_penalty", 0.0, "> 0"),
        ("min_new_tokens", 9, "max_new_tokens=8"),
        ("stop", ("",), "non-empty"),
    ],
)
def test_a_sampling_parameter_out_of_range_is_named_with_what_was_wanted(
    field: str, value: object, wanted: str
) -> None:
    with pytest.raises(ValueError, match=rf"{field} must be .*{wanted}"):
        SamplingParams(**{"max_new_tokens": 8, field: value})  # type: ignore[arg-type]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="request r: prompt_token_ids is empty"):
        GenerateRequest(request_id="r", prompt_token_ids=(), sampling=SamplingParams(max_new_tokens=1))


def test_a_completion_checks_that_its_parallel_sequences_agree() -> None:
    span = VersionSpan(version=0, start=0, end=2)
    whole = {"request_id": "r", "token_ids": (1, 2), "logprobs": (-1.0, -1.0), "finish_reason": "stop"}
    Completion(**whole, versions=(span,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="differ in length"):
        Completion(**{**whole, "logprobs": (-1.0,)}, versions=(span,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without gaps"):
        Completion(**whole, versions=(VersionSpan(version=0, start=1, end=2),))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="end at 1, the completion has 2 tokens"):
        Completion(**whole, versions=(VersionSpan(version=0, start=0, end=1),))  # type: ignore[arg-type]
