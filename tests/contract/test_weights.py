"""New weights arrive whole: no answer is of a mixture, and after an update the numbers are the new model's."""

from __future__ import annotations

import asyncio

import pytest
import torch

from skyrl_train.errors import RequestRejected, WeightUpdateError
from skyrl_train.types import Completion, DiskWeights, NamedWeights, WeightUpdate
from skyrl_train.weight_sync.sync import sync_weights
from tests.contract import models
from tests.contract.asking import ENDLESS, LONG, MOMENTS, Ids, ask, assert_greedy, prompts, until
from tests.contract.under_test import Case

PATHS = pytest.mark.setting("plain", "disk", "gloo")
UPDATE = pytest.mark.capability("Weight updates: whole, under load (weight_sync_backend={setting})")


@UPDATE
@PATHS
async def test_no_answer_is_of_a_mixture(case: Case) -> None:
    """Two constant models take turns while requests run: each token is that of its declared version's model."""
    if case.is_refused():
        return
    under_test = case.started
    tokens = {0: 65, 1: 66}
    both = {turn: models.constant(token, direction=turn) for turn, token in tokens.items()}
    says: dict[int, int] = {}
    answers: list[tuple[Ids, Completion]] = []
    stop = asyncio.Event()

    async def keep_asking(number: int) -> None:
        lengths = [3 + number, 40 + number, 130 + number]
        while not stop.is_set():
            for prompt in prompts(*lengths, seed=number):
                # Each has a length of its own: answers that all end at once leave nothing for an update to run into.
                answer = await case.engine.generate(ask(prompt, 150 + 37 * number, temperature=1.0))
                answers.append((prompt, answer))

    async with under_test.serving(both[0]):
        says[under_test.version] = tokens[0]
        asking = [asyncio.create_task(keep_asking(number)) for number in range(6)]
        try:
            for number in range(20):
                if number >= 4 and any(len(answer.versions) > 1 for _, answer in answers):
                    break
                turn = 1 - number % 2
                count = len(answers)
                await until(lambda count=count: len(answers) >= count + 6)
                update = under_test.update_to(both[turn])
                says[update.version] = tokens[turn]
                await sync_weights(case.engine, update)
            count = len(answers)
            await until(lambda: len(answers) >= count + 6)
        finally:
            stop.set()
            await asyncio.gather(*asking)
    seen = set[int]()
    for _, answer in answers:
        assert answer.finish_reason == "length"
        for span in answer.versions:
            seen.add(span.version)
            made = set(answer.token_ids[span.start : span.end])
            assert made == {says[span.version]}, f"{answer.versions}: {answer.token_ids}"
    assert seen == set(says)
    assert any(len(answer.versions) > 1 for _, answer in answers), "no request ran over an update"


@UPDATE
@PATHS
async def test_after_an_update_the_numbers_are_the_new_models(case: Case) -> None:
    """Also for a prompt whose old keys and values were in the cache."""
    if case.is_refused():
        return
    (prompt,) = prompts(300, seed=41)
    assert_greedy(case.reference, prompt, await case.engine.generate(ask(prompt, 12)))
    other = models.policy(seed=1)
    async with case.started.serving(other):
        answer = await case.engine.generate(ask(prompt, 12))
        assert_greedy(other, prompt, answer)
        assert [span.version for span in answer.versions] == [case.started.version]
        assert (await case.engine.stats()).policy_version == case.started.version
    assert_greedy(case.reference, prompt, await case.engine.generate(ask(prompt, 12)))


@UPDATE
@PATHS
async def test_an_answer_over_an_update_goes_on_as_the_new_model_from_what_it_has(case: Case) -> None:
    if case.is_refused():
        return
    (prompt,) = prompts(24, seed=42)
    other = models.policy(seed=1)
    for moment in MOMENTS:
        task = asyncio.create_task(case.engine.generate(ask(prompt, LONG)))
        await asyncio.sleep(moment)
        old = case.started.version
        async with case.started.serving(other):
            answer = await task
        if len(answer.versions) > 1:
            break
    assert [span.version for span in answer.versions] == [old, old + 1]
    border = answer.versions[0].end
    _assert_part(case.reference, prompt, answer, 0, border)
    _assert_part(other, prompt, answer, border, LONG)


@UPDATE
@PATHS
async def test_what_an_update_does_not_name_stays(case: Case) -> None:
    if case.is_refused():
        return
    (prompt,) = prompts(24, seed=43)
    mixed = models.policy()
    name = "model.layers.1.mlp.down_proj.weight"
    with torch.no_grad():
        mixed.get_parameter(name).mul_(-1)
    case.started.version += 1
    source = NamedWeights(tensors={name: mixed.get_parameter(name)})
    await sync_weights(case.engine, WeightUpdate(version=case.started.version, source=source))
    answer = await case.engine.generate(ask(prompt, 12))
    await case.started.restore()
    assert_greedy(mixed, prompt, answer)


@pytest.mark.capability("Weight updates that don't fit are refused, the next one heals (weight_sync_backend={setting})")
@PATHS
@pytest.mark.parametrize("fault", ["shape", "name"])
async def test_a_refused_update_leaves_a_paused_engine_that_a_whole_one_heals(case: Case, fault: str) -> None:
    if case.is_refused():
        return
    state = dict(case.reference.state_dict())
    if fault == "shape":
        state["model.norm.weight"] = torch.zeros(32)
    else:
        state["model.no_such.weight"] = torch.zeros(32)
    case.started.version += 1
    await case.engine.pause("keep")
    with pytest.raises(WeightUpdateError):
        await case.engine.update_weights(WeightUpdate(version=case.started.version, source=NamedWeights(tensors=state)))
    assert (await case.engine.stats()).paused
    other = models.policy(seed=1)
    await case.engine.update_weights(case.started.update_to(other))
    await case.engine.resume()
    (prompt,) = prompts(20, seed=44)
    answer = await case.engine.generate(ask(prompt, 12))
    await case.started.restore()
    assert_greedy(other, prompt, answer)


@pytest.mark.capability("Weight updates only while paused")
async def test_an_update_of_a_running_engine_is_refused(case: Case) -> None:
    with pytest.raises(WeightUpdateError):
        await case.engine.update_weights(case.started.update_to(case.reference))
    case.started.version -= 1
    assert len((await case.engine.generate(ask([65, 66], 4))).token_ids) == 4


@pytest.mark.capability("Weights from a folder")
async def test_weights_from_a_folder(case: Case) -> None:
    other = models.policy(seed=2)
    folder = models.save(other, case.started.folder.parent / "other")
    if not await case.can("disk_weights"):
        return
    case.started.version += 1
    await sync_weights(case.engine, WeightUpdate(version=case.started.version, source=DiskWeights(path=str(folder))))
    (prompt,) = prompts(20, seed=45)
    answer = await case.engine.generate(ask(prompt, 12))
    await case.started.restore()
    assert_greedy(other, prompt, answer)


@pytest.mark.capability("Prefix cache, and forgetting it")
async def test_a_prefix_is_cached_until_the_cache_is_flushed(case: Case) -> None:
    (prompt,) = prompts(400, seed=46)
    await case.engine.flush_cache()
    cached = [(await case.engine.generate(ask(prompt, 4))).num_cached_tokens for _ in range(2)]
    await case.engine.flush_cache()
    cached.append((await case.engine.generate(ask(prompt, 4))).num_cached_tokens)
    assert cached[0] == cached[2] == 0
    assert cached[1] >= 256


@pytest.mark.capability("Prefix cache, and forgetting it")
async def test_a_flush_while_requests_run_is_refused(case: Case) -> None:
    request = ask([65, 66, 67], ENDLESS)
    task = asyncio.create_task(case.engine.generate(request))
    await asyncio.sleep(MOMENTS[0])
    with pytest.raises(RequestRejected):
        await case.engine.flush_cache()
    await case.engine.abort([request.request_id])
    assert (await task).finish_reason == "abort"


def _assert_part(model: object, prompt: Ids, answer: Completion, start: int, end: int) -> None:
    """Tokens [start, end) are this model's greedy ones after everything before them."""
    assert end > start
    part = Completion(
        request_id=answer.request_id,
        token_ids=answer.token_ids[start:end],
        logprobs=answer.logprobs[start:end],
        finish_reason="length",
        versions=(type(answer.versions[0])(version=0, start=0, end=end - start),),
    )
    assert_greedy(model, prompt + answer.token_ids[:start], part)  # type: ignore[arg-type]
