"""The user's own function on the logits, by its dotted path: this module's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from skyrl_train.engines.embedded import EmbeddedConfig, EmbeddedEngine
from skyrl_train.engines.embedded.core import EngineCore
from skyrl_train.errors import RequestRejected
from skyrl_train.types import Completion, GenerateRequest, Grammar, LocalWeights, LogitProcessor, WeightUpdate
from tests.engines.embedded.common import logprob_reference, make_core, random_prompts, request, run
from tests.tiny import EOS_ID, make_model, make_tokenizer

MODEL = make_model(num_hidden_layers=1)
HERE = __name__
Ids = Sequence[int]


def only(logits: torch.Tensor, prompt: Ids, answer: Ids, *, token_ids: list[int]) -> None:
    """Of these tokens in turn, each as often as the others."""
    allowed = token_ids[len(answer) % len(token_ids) :]
    forbidden = torch.ones(len(logits), dtype=torch.bool)
    forbidden[allowed] = False
    logits[forbidden] = -torch.inf


def never_twice(logits: torch.Tensor, prompt: Ids, answer: Ids) -> None:
    logits[[*prompt, *answer]] = -torch.inf


def raises_at(logits: torch.Tensor, prompt: Ids, answer: Ids, *, place: int) -> None:
    if len(answer) == place:
        logits.zero_()
        raise KeyError("a bug of one's own")


def nothing_left(logits: torch.Tensor, prompt: Ids, answer: Ids) -> None:
    logits.fill_(-torch.inf)


def returns_it(logits: torch.Tensor, prompt: Ids, answer: Ids) -> torch.Tensor:
    return logits + 1


def as_nothing(logits: torch.Tensor, prompt: Ids, answer: Ids, **anything: Any) -> None:
    pass


def other_names(scores: torch.Tensor) -> None: ...


def named(function: str, **arguments: Any) -> LogitProcessor:
    return LogitProcessor(path=f"{HERE}.{function}", arguments=arguments)


def ask(name: str, prompt: tuple[int, ...], processor: LogitProcessor | None, max_new: int = 20, **more: Any) -> Any:
    settings = {"temperature": 1.0, "seed": 3, "ignore_eos": True, **more}
    return request(name, prompt, max_new, logit_processor=processor, **settings)


def test_only_what_it_allows_is_sampled_and_the_others_are_as_they_are() -> None:
    prompts = random_prompts(5, 9, 7, 12, seed=1)
    plain = [ask("a", prompts[0], None), ask("b", prompts[1], None, top_p=0.8)]
    core = make_core(MODEL, max_num_seqs=6)
    answers = run(
        core,
        [
            *plain,
            ask("only", prompts[2], named("only", token_ids=[7, 8, 9])),
            ask("once", prompts[3], named("never_twice"), 60),
            ask("nothing", prompts[0], named("as_nothing", x=1)),
        ],
    )
    alone = run(make_core(MODEL), plain)
    assert [answer.token_ids for answer in answers[:2]] == [answer.token_ids for answer in alone]
    assert answers[4].token_ids == alone[0].token_ids
    assert all(token in (7, 8, 9)[place % 3 :] for place, token in enumerate(answers[2].token_ids))
    assert len({*prompts[3], *answers[3].token_ids}) == len(set(prompts[3])) + 60


def test_the_logprobs_are_those_of_the_model_without_it() -> None:
    prompt = random_prompts(9, seed=2)[0]
    answer = run(make_core(MODEL), [ask("r", prompt, named("only", token_ids=[7, 8, 9]), temperature=0.8)])[0]
    reference = make_model(num_hidden_layers=1, attn_implementation="eager")
    wanted = logprob_reference(reference, prompt, answer.token_ids, 0.8)
    assert abs(wanted.numpy() - answer.logprobs).max() < 1e-4


def test_a_grammar_is_stronger_than_a_processor_and_both_are_kept() -> None:
    digits = Grammar(kind="regex", text="[0-9]{3,9}")
    processor = named("only", token_ids=[ord("x"), ord("1"), ord("2"), EOS_ID])
    requests = [
        ask(f"r{i}", p, processor, grammar=digits, ignore_eos=False, seed=i)
        for i, p in enumerate(random_prompts(4, 5, 6, 7))
    ]
    for answer in run(make_core(MODEL), requests):
        assert answer.finish_reason == "stop"
        assert bytes(answer.token_ids[:2]) in (b"11", b"12", b"21", b"22")
        assert answer.token_ids[2:] == (ord("2"), EOS_ID)


def test_a_processor_that_leaves_nothing_of_the_grammar_fails_its_request() -> None:
    prompts = random_prompts(4, 5, seed=6)
    letters = ask("bad", prompts[0], named("only", token_ids=[ord("x")]), grammar=Grammar(kind="regex", text="[0-9]+"))
    core = make_core(MODEL)
    for item in (letters, ask("good", prompts[1], None)):
        core.add(item)
    (first,) = core.step()
    core.check_integrity()
    assert first.failure is not None and "at token 0 of the answer to request bad left no token" in str(first.failure)
    while core.has_work:
        done = core.step()
    assert done[0].failure is None
    assert done[0].completion.token_ids == run(make_core(MODEL), [ask("good", prompts[1], None)])[0].token_ids


def test_retraction_new_weights_and_a_partial_answer_are_nothing_special_to_it() -> None:
    prompts = random_prompts(6, 9, 5, 8, 12, 7, seed=3)
    requests = [ask(f"r{i}", prompt, named("never_twice"), 40, seed=i) for i, prompt in enumerate(prompts)]
    alone = [run(make_core(MODEL), [item])[0] for item in requests]
    core = make_core(MODEL, kv_cache_tokens=100, max_context_len=100)
    for item in requests:
        core.add(item)
    done: dict[str, Completion] = {}
    for step in range(5000):
        if not core.has_work:
            break
        done |= {item.completion.request_id: item.completion for item in core.step()}
        core.check_integrity()
        if step % 11 == 10:
            core.pause("keep")
            core.update_weights(WeightUpdate(version=core.policy_version + 1, source=LocalWeights()))
            core.resume()
    assert core.stats().num_retractions_total > 3
    assert [done[item.request_id].token_ids for item in requests] == [answer.token_ids for answer in alone]

    item = requests[0]
    core.add(item)
    for _ in range(9):
        core.step()
    part = core.abort([item.request_id])[0].completion
    again = GenerateRequest(
        request_id="again", prompt_token_ids=item.prompt_token_ids, sampling=item.sampling, partial=part
    )
    assert 0 < len(part.token_ids) < 40
    assert run(core, [again])[0].token_ids == alone[0].token_ids


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (
            named("raises_at", place=4),
            r"raises_at' at token 4 of the answer to request bad: KeyError: \"a bug of one's",
        ),
        (named("nothing_left"), "left -inf as the greatest logit: one token at least must stay possible"),
        (named("returns_it"), "returned Tensor: change the logits in place, and return nothing"),
    ],
)
async def test_what_it_raises_fails_its_own_request(processor: LogitProcessor, message: str) -> None:
    engine = EmbeddedEngine(
        MODEL, make_tokenizer(), config=EmbeddedConfig(max_num_seqs=4, kv_cache_tokens=256, max_context_len=128)
    )
    prompts = random_prompts(5, 9, seed=4)
    other = asyncio.create_task(engine.generate(ask("good", prompts[0], None)))
    with pytest.raises(RequestRejected, match=f"logit processor .*{message}") as caught:
        await engine.generate(ask("bad", prompts[1], processor))
    assert caught.value.__cause__ is not None
    with pytest.raises(RequestRejected, match="logit processor"):
        async for _ in engine.stream(ask("bad", prompts[1], processor)):
            pass
    assert (await other).token_ids == run(make_core(MODEL), [ask("good", prompts[0], None)])[0].token_ids
    engine.core.check_integrity()
    assert (await engine.stats()).num_running == 0
    await engine.close()


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (LogitProcessor(path="no_such_module.f"), "'no_such_module.f' can't be imported: ModuleNotFoundError"),
        (named("nobody"), "has no 'nobody'"),
        (named("HERE"), "is str, not a function"),
        (named("other_names"), r"takes \(scores: .* write it as def name\(logits, prompt, answer, \*\*arguments\)"),
        (named("only"), "missing a required argument: 'token_ids'"),
        (named("never_twice", times=2), "unexpected keyword argument 'times'"),
    ],
)
def test_one_that_can_not_be_called_is_refused_with_what_is_wrong(processor: LogitProcessor, message: str) -> None:
    core = make_core(MODEL)
    with pytest.raises(RequestRejected, match=f"r1: logit processor .*{message}"):
        core.add(ask("r1", (1, 2), processor))
    assert not core.has_work


def test_an_engine_may_refuse_all_of_them() -> None:
    core: EngineCore = make_core(MODEL, logit_processors=False)
    with pytest.raises(
        RequestRejected, match=r"runs no logit processors \(asked for: .*as_nothing\); set generator.custom"
    ):
        core.add(ask("r1", (1, 2), named("as_nothing")))


def test_arguments_are_what_json_can_hold() -> None:
    with pytest.raises(ValueError, match="arguments must be what JSON can hold"):
        named("only", token_ids={1, 2})
