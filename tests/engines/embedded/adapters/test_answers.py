"""An adapter's answers are the merged model's: alone, beside others and the plain model, cached, cut and retracted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from skyrl_train.attention import ATTENTION_NAME
from skyrl_train.engines.embedded.adapters.rows import Alone, Parts, RowAdapters, Together
from skyrl_train.engines.embedded.adapters.settings import LoraLimits
from skyrl_train.engines.embedded.core import EngineCore
from skyrl_train.types import AdapterWeights, GenerateRequest
from tests.engines.embedded.adapters.common import (
    ask,
    assert_is_of,
    base,
    make_adapted,
    merged,
    random_adapter,
    save,
)
from tests.engines.embedded.common import make_core, random_prompts, run

ADAPTERS = {
    "all": random_adapter(1),
    "attention": random_adapter(2, rank=2, modules=("q_proj", "v_proj")),
    "mlp": random_adapter(3, rank=6, modules=("gate_proj", "down_proj")),
}
NAMES = (None, *ADAPTERS)


@pytest.fixture(scope="module")
def judges() -> dict[str | None, torch.nn.Module]:
    return {None: merged(None), **{name: merged(weights) for name, weights in ADAPTERS.items()}}


@pytest.fixture
def core() -> EngineCore:
    return with_adapters(make_adapted())


def with_adapters(core: EngineCore) -> EngineCore:
    assert core.adapters is not None
    for name, weights in ADAPTERS.items():
        core.adapters.load(name, weights, paused=False)
    return core


def assert_all_are_right(judges: dict, items: list[GenerateRequest], core: EngineCore) -> None:  # type: ignore[type-arg]
    answers = run(core, items)
    for item, answer in zip(items, answers, strict=True):
        assert_is_of(judges[item.adapter], item, answer)


@pytest.mark.parametrize("name", NAMES)
def test_alone(name: str | None, judges: dict, core: EngineCore) -> None:  # type: ignore[type-arg]
    (prompt,) = random_prompts(30, seed=4)
    assert_all_are_right(
        judges, [ask("greedy", name, prompt), ask("drawn", name, prompt, temperature=1.0, seed=3)], core
    )


def test_the_answers_differ(judges: dict, core: EngineCore) -> None:  # type: ignore[type-arg]
    """Or none of these tests would say anything."""
    (prompt,) = random_prompts(30, seed=4)
    answers = run(core, [ask(str(name), name, prompt) for name in NAMES])
    assert len({answer.token_ids for answer in answers}) == len(NAMES)


def test_all_of_them_and_the_plain_model_in_one_batch(judges: dict, core: EngineCore) -> None:  # type: ignore[type-arg]
    prompts = random_prompts(3, 50, seed=5)
    items = [ask(f"{name}-{i}", name, prompt) for i, prompt in enumerate(prompts) for name in NAMES]
    assert_all_are_right(judges, items, core)


def test_a_seeded_answer_is_the_same_alone_and_in_company(core: EngineCore) -> None:
    prompts = random_prompts(9, 30, 21, seed=6)
    items = [
        ask(f"{name}-{i}", name, prompt, temperature=1.0, seed=i) for i, prompt in enumerate(prompts) for name in NAMES
    ]
    together = run(core, items)
    for item, answer in zip(items, together, strict=True):
        (alone,) = run(with_adapters(make_adapted()), [item])
        assert alone.token_ids == answer.token_ids


def test_the_same_prompt_under_two_adapters_shares_no_keys(judges: dict, core: EngineCore) -> None:  # type: ignore[type-arg]
    """Each is asked again, so that a cached prefix of another's would be found if it could."""
    (prompt,) = random_prompts(40, seed=7)
    for turn in range(2):
        for name in NAMES:
            item = ask(f"{name}-{turn}", name, prompt)
            (answer,) = run(core, [item])
            assert_is_of(judges[name], item, answer)
            assert answer.num_cached_tokens == (39 if turn else 0)


def test_a_group_of_one_adapter_shares_its_prompt(core: EngineCore) -> None:
    (prompt,) = random_prompts(40, seed=8)
    items = [ask(f"{name}-{i}", name, prompt, temperature=1.0, seed=i) for name in ("all", None) for i in range(3)]
    assert [answer.num_cached_tokens for answer in run(core, items)] == [0, 39, 39, 0, 39, 39]


@pytest.mark.parametrize("settings", [{"enable_prefix_caching": False}, {"chunked_prefill": False}, {}])
def test_cut_prompts_in_a_pool_that_retracts(settings: dict, judges: dict) -> None:  # type: ignore[type-arg]
    core = with_adapters(make_adapted(max_num_batched_tokens=8, kv_cache_tokens=130, max_context_len=100, **settings))
    prompts = random_prompts(30, 12, seed=9)
    items = [
        ask(f"{name}-{i}-{k}", name, prompt, 40, temperature=k, seed=i)
        for i, prompt in enumerate(prompts)
        for name in NAMES
        for k in range(2)
    ]
    assert_all_are_right(judges, items, core)
    assert core.stats().num_retractions_total > 0


@pytest.mark.parametrize("packs", [False, True])
def test_steps_in_c_and_those_through_the_twin_give_the_same(packs: bool, judges: dict) -> None:  # type: ignore[type-arg]
    prompts = random_prompts(3, 50, seed=5)
    core = with_adapters(make_adapted(pack_weights=packs))
    assert (core._runner._direct is not None) == packs  # type: ignore[attr-defined]
    for _ in range(2):
        items = [ask(f"{name}-{i}", name, prompt) for i, prompt in enumerate(prompts) for name in NAMES]
        assert_all_are_right(judges, items, core)


def test_what_goes_wrong_in_a_step_in_c_is_raised(core: EngineCore) -> None:
    """A callback of C can't raise by itself."""

    class Broken:
        def add(self, site: str, x: torch.Tensor, y: torch.Tensor) -> None:
            raise ValueError(f"no {site}")

    core.add(ask("1", "all", (1, 2, 3)))
    core.step()
    assert core.adapters is not None
    core.adapters.rows.select = lambda row_seats: setattr(core.adapters.rows, "form", Broken())  # type: ignore[method-assign, union-attr]
    with pytest.raises(ValueError, match=r"no model.layers.0.self_attn.q_proj"):
        core.step()


def test_rslora_is_scaled_by_the_root_of_the_rank() -> None:
    weights = random_adapter(11, rank=4, use_rslora=True, lora_alpha=3)
    core = make_adapted()
    assert core.adapters is not None
    core.adapters.load("rs", weights, paused=False)
    (prompt,) = random_prompts(20, seed=2)
    item = ask("1", "rs", prompt)
    assert_is_of(merged(weights), item, run(core, [item])[0])


def test_ranks_may_differ_between_modules() -> None:
    wide, narrow = random_adapter(12, rank=6, modules=("q_proj",)), random_adapter(13, rank=2, modules=("up_proj",))
    weights = AdapterWeights(
        tensors={**wide.tensors, **narrow.tensors},
        config={**wide.config, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 2}},
    )
    core = make_adapted()
    assert core.adapters is not None
    core.adapters.load("mixed", weights, paused=False)
    (prompt,) = random_prompts(20, seed=2)
    item = ask("1", "mixed", prompt)
    assert_is_of(merged(weights), item, run(core, [item])[0])


def test_a_folder_that_peft_wrote_is_served(tmp_path, judges: dict) -> None:  # type: ignore[no-untyped-def, type-arg]
    folder = save(ADAPTERS["all"], tmp_path / "all")
    core = make_adapted(LoraLimits(paths={"saved": folder}))
    (prompt,) = random_prompts(20, seed=2)
    item = ask("1", "saved", prompt)
    assert_is_of(judges["all"], item, run(core, [item])[0])


def test_the_trainers_module_is_left_as_it_was() -> None:
    model = base(ATTENTION_NAME)
    before = {name: (id(module), type(module)) for name, module in model.named_modules()}
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    core = make_core(model, lora=LoraLimits())
    run(with_adapters(core), [ask("1", "all", (1, 2, 3))])
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == before
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


# -- the ways of computing the sum


def rows_of(core: EngineCore, *names: str | None) -> RowAdapters:
    """Seat i has a request of names[i]."""
    assert core.adapters is not None
    places = core.adapters.places
    for seat, name in enumerate(names):
        item = ask("x", name, (1,))
        places.sit(seat, core.adapters.of(item))
    return core.adapters.rows


def slow_sum(core: EngineCore, names: list[str | None], site: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = y.clone()
    for row, name in enumerate(names):
        pair = None if name is None else core.adapters.of(ask("x", name, (1,))).pairs.get(site)  # type: ignore[union-attr]
        if pair is not None:
            out[row] += pair.scale * (x[row] @ pair.low.T) @ pair.high
    return out


@pytest.mark.parametrize(
    ("row_seats", "form"),
    [
        ([0, 0, 0, 0], Alone),
        ([0, 3, 0, 3, 3], Alone),
        ([3, 0, 1, 2, 0, 1, 2], Together),
        ([0, 1, 2, 0, 1, 2], Together),
        ([2, 1, 0], Together),
        ([*[0] * 200, 1, 2, 3], Parts),
        ([*[3] * 200, *[0] * 3], Together),
        ([*[3] * 200, *[0] * 60], Parts),
        ([*[3, 0, 1] * 3, *[0] * 200], Parts),
        ([*[3] * 200, *[0] * 201], Alone),
    ],
)
def test_each_way_gives_the_sum_row_by_row(row_seats: list[int], form: type, core: EngineCore) -> None:
    seated = ["all", "attention", "mlp", None]
    rows = rows_of(core, *seated)
    rows.select(np.array(row_seats, dtype=np.int32))
    assert isinstance(rows.form, form)
    names = [seated[seat] for seat in row_seats]
    assert core.adapters is not None
    generator = torch.Generator().manual_seed(0)
    for site, spec in core.adapters.sites.items():
        out_features, in_features = spec.shape
        x = torch.randn(len(row_seats), in_features, generator=generator)
        y = torch.randn(len(row_seats), out_features, generator=generator)
        wanted = slow_sum(core, names, site, x, y)
        rows.form.add(site, x, y)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)


def test_a_batch_that_uses_none_adds_nothing(core: EngineCore) -> None:
    rows = rows_of(core, None, "all")
    rows.select(np.array([0, 0], dtype=np.int32))
    assert rows.form is None


def test_a_forward_that_was_not_announced_is_an_error(core: EngineCore) -> None:
    run(core, [ask("1", "all", (1, 2, 3))])
    token = torch.zeros((1, 1), dtype=torch.long)
    with pytest.raises(AssertionError, match="call select first"):
        core._runner._model(input_ids=token, position_ids=token, use_cache=False)  # type: ignore[attr-defined]


def test_an_engine_whose_requests_all_have_an_adapter_packs_each_matrix_once() -> None:
    """A policy that is an adapter must not cost a second packed copy of the gated maps."""
    used, plain = with_adapters(make_adapted(pack_weights=True)), make_adapted(pack_weights=True)
    run(used, [ask("1", "all", (1, 2, 3))])
    run(plain, [ask("1", None, (1, 2, 3))])
    packed = [core._runner._model.packing.num_bytes for core in (used, plain)]  # type: ignore[attr-defined]
    assert packed[0] <= 1.05 * packed[1]
