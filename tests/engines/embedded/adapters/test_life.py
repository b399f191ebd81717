"""Adapters come, change and go: names, places in the batch, memory, updates, the policy as an adapter."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import torch

from skyrl_train.attention import ATTENTION_NAME
from skyrl_train.engines.embedded import EmbeddedConfig, EmbeddedEngine
from skyrl_train.engines.embedded.adapters.settings import LoraLimits
from skyrl_train.engines.embedded.core import EngineCore
from skyrl_train.errors import ConfigError, RequestRejected, WeightUpdateError
from skyrl_train.types import (
    AdapterWeights,
    Completion,
    GenerateRequest,
    LocalWeights,
    NamedWeights,
    SessionRef,
    WeightSource,
    WeightUpdate,
)
from skyrl_train.weight_sync.sync import sync_weights
from tests.engines.embedded.adapters.common import (
    SHAPE,
    ask,
    assert_is_of,
    base,
    make_adapted,
    merged,
    random_adapter,
    save,
)
from tests.engines.embedded.common import logprob_reference, random_prompts, run
from tests.tiny import make_model, make_tokenizer

(PROMPT,) = random_prompts(25, seed=1)


def served(core: EngineCore) -> set[str]:
    """In memory now."""
    assert core.adapters is not None
    return set(core.adapters._loaded)


def folders(root: Path, *names: str) -> dict[str, str]:
    return {name: save(random_adapter(seed), root / name) for seed, name in enumerate(names, 30)}


def update(core: EngineCore, source: WeightSource) -> None:
    core.pause("keep")
    core.update_weights(WeightUpdate(version=core.policy_version + 1, source=source))
    core.check_integrity()
    core.resume()


# -- names


def test_an_unknown_name_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    core = make_adapted(LoraLimits(paths=folders(tmp_path, "b", "a")))
    with pytest.raises(RequestRejected, match="no adapter 'c'; it has a, b"):
        core.add(ask("1", "c", PROMPT))
    core.check_integrity()
    with pytest.raises(RequestRejected, match="no adapter 'c'; it has none"):
        make_adapted().add(ask("1", "c", PROMPT))


def test_one_in_use_is_neither_unloaded_nor_replaced_while_the_engine_steps() -> None:
    core = make_adapted(max_num_seqs=1)
    assert core.adapters is not None
    core.adapters.load("a", random_adapter(1), paused=False)
    core.add(ask("runs", "a", PROMPT))
    core.add(ask("waits", "a", PROMPT))
    core.step()
    with pytest.raises(RequestRejected, match="2 open requests use adapter a"):
        core.adapters.unload("a")
    with pytest.raises(WeightUpdateError, match="pause to replace it"):
        core.adapters.load("a", random_adapter(2), paused=False)
    while core.has_work:
        core.step()
    core.adapters.unload("a")
    core.check_integrity()
    with pytest.raises(RequestRejected, match="it has none"):
        core.add(ask("late", "a", PROMPT))


def test_one_that_is_replaced_under_a_running_request_answers_from_there_on() -> None:
    core = make_adapted()
    assert core.adapters is not None
    old, new = random_adapter(1), random_adapter(2)
    core.adapters.load("a", old, paused=False)
    core.adapters.load("other", random_adapter(3), paused=False)
    item, beside = ask("1", "a", PROMPT, 20), ask("2", "other", PROMPT, 20)
    states = [core.add(item), core.add(beside)]
    for _ in range(8):
        core.step()
    before, _ = core.answer_so_far(states[0])
    core.pause("keep")
    core.adapters.load("a", new, paused=True)
    core.check_integrity()
    assert states[0].seat < 0 <= states[1].seat, "only those of that name compute their keys again"
    core.resume()
    done = {}
    while core.has_work:
        done |= {finished.completion.request_id: finished.completion for finished in core.step()}
        core.check_integrity()
    answer, split = done["1"], len(before)
    assert answer.token_ids[:split] == before and 0 < split < 20
    found = torch.tensor(answer.logprobs)
    for weights, part in ((old, slice(0, split)), (new, slice(split, 20))):
        torch.testing.assert_close(found[part], _logprobs(merged(weights), item, answer)[part], rtol=0, atol=1e-4)
    assert_is_of(merged(random_adapter(3)), beside, done["2"])


def test_a_name_that_is_loaded_again_finds_no_keys_of_its_former_life() -> None:
    core = make_adapted()
    assert core.adapters is not None
    for seed in (1, 2):
        core.adapters.load("a", random_adapter(seed), paused=False)
        item = ask(str(seed), "a", PROMPT)
        (answer,) = run(core, [item])
        assert answer.num_cached_tokens == 0
        assert_is_of(merged(random_adapter(seed)), item, answer)


def test_unloading_frees_the_slots_of_its_keys_and_leaves_those_of_others() -> None:
    core = make_adapted()
    assert core.adapters is not None
    core.adapters.load("a", random_adapter(1), paused=False)
    core.adapters.load("unused", random_adapter(2), paused=False)
    run(core, [ask("1", "a", PROMPT), ask("2", None, PROMPT)])
    core.adapters.unload("unused")
    core.adapters.unload("a")
    core.check_integrity()
    assert core.scheduler.cache.num_evictable == len(PROMPT) + 11
    assert run(core, [ask("3", None, PROMPT)])[0].num_cached_tokens == len(PROMPT) - 1


# -- memory


@pytest.mark.parametrize(("policy", "stays"), [("lru", {"a", "c"}), ("fifo", {"b", "c"})])
def test_over_its_bound_an_idle_one_leaves_and_is_read_again_when_asked_for(
    policy: str, stays: set[str], tmp_path: Path
) -> None:
    paths = folders(tmp_path, "a", "b", "c")
    core = make_adapted(LoraLimits(paths=paths, max_loaded=2, eviction_policy=policy))  # type: ignore[arg-type]
    judges = {name: merged(random_adapter(seed)) for seed, name in enumerate(paths, 30)}
    assert served(core) == {"b", "c"}
    for name in ("a", "b", "a", "c"):
        item = ask(name, name, PROMPT)
        assert_is_of(judges[name], item, run(core, [item])[0])
        assert len(served(core)) == 2
    assert served(core) == stays


def test_those_that_are_asked_for_at_once_are_all_served(tmp_path: Path) -> None:
    paths = folders(tmp_path, "a", "b", "c")
    core = make_adapted(LoraLimits(paths=paths, max_loaded=1, max_in_batch=1))
    judges = {name: merged(random_adapter(seed)) for seed, name in enumerate(paths, 30)}
    items = [ask(name, name, PROMPT) for name in paths]
    for item, answer in zip(items, run(core, items), strict=True):
        assert_is_of(judges[item.adapter or ""], item, answer)
    assert len(served(core)) == 1


def test_a_folder_that_is_gone_rejects_the_request_that_needs_it(tmp_path: Path) -> None:
    core = make_adapted(LoraLimits(paths=folders(tmp_path, "a", "b"), max_loaded=1))
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(RequestRejected, match="adapter a can't be loaded again"):
        core.add(ask("1", "a", PROMPT))
    core.check_integrity()
    assert len(run(core, [ask("2", "b", PROMPT)])[0].token_ids) == 12


# -- places in the batch


def test_a_request_whose_adapter_has_no_place_waits_and_nobody_starves(tmp_path: Path) -> None:
    """Two places, three adapters and the plain model; the ones that come later are many."""
    core = make_adapted(LoraLimits(paths=folders(tmp_path, "a", "b", "c"), max_in_batch=2))
    order = ["a", None, "b", *["a"] * 6, "c", *[None] * 6]
    for i, name in enumerate(order):
        core.add(ask(str(i), name, PROMPT[: 5 + i], 6))
    ended: list[int] = []
    while core.has_work:
        finished = core.step()
        core.check_integrity()
        running = {state.request.adapter for state in core.scheduler.running()}
        assert len(running) <= 2
        ended += [int(item.completion.request_id) for item in finished]
    assert len(ended) == len(order)
    started = [core_order for core_order in ended if order[core_order] in ("b", "c")]
    assert started == [2, 9], "each in its turn"
    assert ended.index(2) < ended.index(3) and ended.index(9) < ended.index(15), (
        "nobody passes by who waits for a place"
    )


def test_one_place_serves_all_in_turn(tmp_path: Path) -> None:
    core = make_adapted(LoraLimits(paths=folders(tmp_path, "a", "b"), max_in_batch=1))
    judges = {None: merged(None), "a": merged(random_adapter(30)), "b": merged(random_adapter(31))}
    items = [ask(f"{name}{i}", name, PROMPT) for i in range(2) for name in judges]
    for item, answer in zip(items, run(core, items), strict=True):
        assert_is_of(judges[item.adapter], item, answer)


# -- the policy


def test_the_policy_is_the_adapter_of_the_last_update_until_the_model_itself_is() -> None:
    core = make_adapted()
    assert core.adapters is not None
    core.adapters.load("named", random_adapter(9), paused=False)
    before = {name: tensor.clone() for name, tensor in core.model.state_dict().items()}
    named = merged(random_adapter(9))
    for seed in (1, 2):
        update(core, random_adapter(seed))
        items = [ask(f"policy{seed}", None, PROMPT), ask(f"named{seed}", "named", PROMPT)]
        answers = run(core, items)
        assert_is_of(merged(random_adapter(seed)), items[0], answers[0])
        assert_is_of(named, items[1], answers[1])
        assert answers[0].num_cached_tokens == 0 and answers[0].versions[0].version == seed
    assert all(torch.equal(tensor, before[name]) for name, tensor in core.model.state_dict().items())
    other = make_model("qwen3", seed=5, **SHAPE)
    update(core, NamedWeights(tensors=other.state_dict()))
    item = ask("base", None, PROMPT)
    judge = make_model("qwen3", seed=5, attn_implementation="eager", **SHAPE)
    assert_is_of(judge, item, run(core, [item])[0])


def test_an_update_under_running_requests_goes_on_with_the_new_policy() -> None:
    core = make_adapted()
    update(core, random_adapter(1))
    items = [ask(str(i), None, PROMPT[: 10 + i], 16) for i in range(6)]
    states = [core.add(item) for item in items]
    for _ in range(6):
        core.step()
    begun = [len(core.answer_so_far(state)[0]) for state in states]
    update(core, random_adapter(2))
    done = {}
    while core.has_work:
        done |= {finished.completion.request_id: finished.completion for finished in core.step()}
        core.check_integrity()
    old, new = merged(random_adapter(1)), merged(random_adapter(2))
    for item, split in zip(items, begun, strict=True):
        answer = done[item.request_id]
        assert [(span.version, span.start, span.end) for span in answer.versions] == [(1, 0, split), (2, split, 16)]
        both = [_logprobs(model, item, answer) for model in (old, new)]
        found = torch.tensor(answer.logprobs)
        torch.testing.assert_close(found[:split], both[0][:split], rtol=0, atol=1e-4)
        torch.testing.assert_close(found[split:], both[1][split:], rtol=0, atol=1e-4)


def _logprobs(model: torch.nn.Module, item: GenerateRequest, answer: Completion) -> torch.Tensor:
    return logprob_reference(model, item.prompt_token_ids, answer.token_ids)


def test_a_policy_that_does_not_fit_changes_nothing() -> None:
    core = make_adapted(LoraLimits(max_rank=4))
    update(core, random_adapter(1))
    good = random_adapter(2)
    name = next(iter(good.tensors))
    core.pause("keep")
    for bad, message in (
        (
            AdapterWeights(tensors={**good.tensors, name: torch.zeros(4, 3)}, config=good.config),
            "lora_A and lora_B are",
        ),
        (random_adapter(3, rank=8), "its rank is 8"),
    ):
        with pytest.raises(WeightUpdateError, match=message):
            core.update_weights(WeightUpdate(version=2, source=bad))
    core.resume()
    item = ask("1", None, PROMPT)
    assert_is_of(merged(random_adapter(1)), item, run(core, [item])[0])
    assert core.policy_version == 1


# -- sessions


def test_a_session_may_change_its_adapter_between_turns() -> None:
    core = make_adapted()
    assert core.adapters is not None
    core.adapters.load("a", random_adapter(1), paused=False)
    judges = {None: merged(None), "a": merged(random_adapter(1))}
    session = core.sessions.open(200)
    parent, history = None, ()
    for turn, (name, cached) in enumerate([("a", 0), ("a", 29), (None, 0), ("a", 34)]):
        new = PROMPT[:20] if turn == 0 else PROMPT[turn : turn + 5]
        item = ask(f"turn{turn}", name, new, 10)
        item = GenerateRequest(
            request_id=item.request_id, prompt_token_ids=new, sampling=item.sampling, adapter=name,
            session=SessionRef(session_id=session, parent_request_id=parent),
        )  # fmt: skip
        (answer,) = run(core, [item])
        whole = ask("whole", name, (*history, *new), 10)
        assert_is_of(judges[name], whole, answer)
        assert answer.num_cached_tokens >= cached
        parent, history = item.request_id, (*whole.prompt_token_ids, *answer.token_ids)
    core.adapters.unload("a")
    core.check_integrity()
    core.close_session(session)
    core.check_integrity()


# -- behind asyncio


async def test_updates_under_load_behind_a_thread() -> None:
    """Each token is of the policy that its span names; named adapters and the policy change meanwhile."""
    config = EmbeddedConfig(
        max_context_len=128, kv_cache_tokens=600, max_num_seqs=4, max_num_batched_tokens=16, lora=LoraLimits()
    )
    engine = EmbeddedEngine(base(ATTENTION_NAME), make_tokenizer(), config=config, driver="thread")
    await engine.start()
    await engine.load_adapter("named", random_adapter(9))
    items = [ask(str(i), "named" if i % 3 == 0 else None, PROMPT[: 5 + i], 40) for i in range(10)]
    asked = [asyncio.create_task(engine.generate(item)) for item in items]
    for version in (1, 2, 3):
        await asyncio.sleep(0.02)
        await sync_weights(engine, WeightUpdate(version=version, source=random_adapter(version)))
    answers = await asyncio.gather(*asked)
    with pytest.raises(RequestRejected, match="no adapter 'gone'"):
        await engine.unload_adapter("gone")
    await engine.unload_adapter("named")
    await engine.close()
    judges = [merged(None), *(merged(random_adapter(version)) for version in (1, 2, 3))]
    named = merged(random_adapter(9))
    for item, answer in zip(items, answers, strict=True):
        for span in answer.versions:
            judge = named if item.adapter else judges[span.version]
            wanted = _logprobs(judge, item, answer)[span.start : span.end]
            found = torch.tensor(answer.logprobs[span.start : span.end])
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


async def test_without_adapters_nothing_of_them_is_served() -> None:
    engine = EmbeddedEngine(make_model(), make_tokenizer(), config=EmbeddedConfig(max_context_len=64))
    assert not {"lora", "adapter_weights"} & engine.info.capabilities
    with pytest.raises(WeightUpdateError, match="was started without adapters"):
        await engine.load_adapter("a", random_adapter(1))
    with pytest.raises(RequestRejected, match="was started without adapters"):
        await engine.unload_adapter("a")
    with pytest.raises(RequestRejected, match="no adapter 'a', nor any other"):
        await engine.generate(ask("1", "a", PROMPT))
    await engine.close()


def test_deterministic_inference_has_no_adapters() -> None:
    with pytest.raises(ConfigError, match="don't go together"):
        EmbeddedConfig(deterministic=True, lora=LoraLimits())


# -- a random life


@pytest.mark.parametrize("seed", range(3))
def test_a_random_life(seed: int, tmp_path: Path) -> None:
    """Company, cache, cuts, retraction, eviction of keys and of adapters may change nothing but the time."""
    rng = random.Random(seed)
    paths = folders(tmp_path, "a", "b", "c")
    limits = LoraLimits(paths=paths, max_in_batch=rng.choice([1, 2, 4]), max_loaded=rng.choice([1, 2, None]))
    shape = {"kv_cache_tokens": 110, "max_context_len": 90}
    core = make_adapted(
        limits,
        max_num_seqs=rng.choice([2, 5]),
        max_num_batched_tokens=rng.choice([5, 11, 64]),
        enable_prefix_caching=rng.random() < 0.8,
        **shape,
    )
    prompts = [tuple(rng.randrange(256) for _ in range(rng.randint(3, 25))) for _ in range(3)]
    sent: dict[str, GenerateRequest] = {}
    done: dict[str, Completion] = {}

    def settle(finished: list) -> None:  # type: ignore[type-arg]
        done.update({item.completion.request_id: item.completion for item in finished})
        core.check_integrity()

    for _ in range(160):
        event = rng.random()
        if event < 0.3 and len(sent) < 18:
            prompt = rng.choice(prompts)
            name = rng.choice([None, "a", "b", "c"])
            item = ask(str(len(sent)), name, prompt, rng.randint(1, 60), temperature=rng.choice([0, 1]), seed=seed)
            sent[item.request_id] = item
            core.add(item)
        elif event < 0.34 and sent:
            settle(core.abort([rng.choice(list(sent))]))
        elif event < 0.38:
            settle(core.pause("keep"))
            if rng.random() < 0.5:
                core.update_weights(WeightUpdate(version=core.policy_version + 1, source=LocalWeights()))
                assert core.scheduler.pool.num_free == 110
            core.check_integrity()
            core.resume()
        elif event < 0.42:
            assert core.adapters is not None
            name = rng.choice(["a", "b", "c"])
            if not core.adapters._num_open[name]:
                core.adapters.unload(name)
                core.adapters.load(name, paths[name], paused=False)
                core.check_integrity()
        elif core.has_work:
            settle(core.step())
    while core.has_work:
        settle(core.step())
    assert done.keys() == sent.keys()
    core.scheduler.cache.flush()
    assert core.scheduler.pool.num_free == 110
    alone = make_adapted(LoraLimits(paths=paths), max_context_len=90)
    for name, item in sent.items():
        (wanted,) = run(alone, [item])
        assert done[name].token_ids == wanted.token_ids[: len(done[name].token_ids)]
        assert done[name].finish_reason == "abort" or done[name].token_ids == wanted.token_ids
