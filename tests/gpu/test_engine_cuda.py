"""The embedded engine on a GPU: the same promises as on the CPU, under CUDA graphs and one step ahead of the host."""

import asyncio
from dataclasses import replace

import pytest
import torch

from skyrl_train.engines.embedded.config import EmbeddedConfig
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.types import Completion, GenerateRequest, LocalWeights, SamplingParams, WeightUpdate
from tests.tiny import EOS_ID, make_model, make_tokenizer

pytestmark = pytest.mark.gpu

CONFIG = EmbeddedConfig(max_num_seqs=16, max_num_batched_tokens=64, kv_cache_tokens=4096, max_context_len=256)
PROMPTS = [tuple((7 * i + j) % 250 for j in range(3 + 11 * i)) for i in range(12)]


def run(engine: EmbeddedEngine, sampling: SamplingParams, prompts=PROMPTS) -> list[Completion]:
    async def all_of_them() -> list[Completion]:
        requests = [
            GenerateRequest(request_id=f"r{i}", prompt_token_ids=ids, sampling=replace(sampling, seed=i))
            for i, ids in enumerate(prompts)
        ]
        done = await asyncio.gather(*(engine.generate(request) for request in requests))
        engine.core.check_integrity()
        return list(done)

    return asyncio.run(all_of_them())


def make_engine(arch: str = "qwen2", config: EmbeddedConfig = CONFIG, device: str = "cuda"):
    model = make_model(arch).to(device)
    return EmbeddedEngine(model, make_tokenizer(), config=config), model


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "llama", "mistral"])
def test_greedy_tokens_and_logprobs_equal_transformers(arch: str) -> None:
    engine, _ = make_engine(arch)
    plain = make_model(arch, attn_implementation="eager").to("cuda")
    for ids, got in zip(PROMPTS, run(engine, SamplingParams(max_new_tokens=20, temperature=0)), strict=True):
        prompt = torch.tensor([ids], device="cuda")
        wanted = plain.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=EOS_ID, pad_token_id=256)
        assert got.token_ids == tuple(wanted[0, len(ids) :].tolist())
        whole = torch.tensor([[*ids, *got.token_ids]], device="cuda")
        with torch.no_grad():
            logprobs = plain(whole).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        wanted_logprobs = logprobs.gather(1, whole[0, len(ids) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(got.logprobs), wanted_logprobs.cpu(), atol=1e-4, rtol=0)


def test_the_step_ahead_changes_nothing_but_speed() -> None:
    """The CPU's runner takes every token in before the next step; the lagging one must sample the same."""
    sampling = SamplingParams(max_new_tokens=40)
    lagging, _ = make_engine()
    plain, _ = make_engine(device="cpu")
    same = [a.token_ids == b.token_ids for a, b in zip(run(lagging, sampling), run(plain, sampling), strict=True)]
    assert sum(same) >= len(same) - 1, same  # a rounding at a boundary may turn one


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.8},
        {"top_k": 5},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.2},
        {"min_new_tokens": 30},
        {"stop": ("a",)},
        {"stop_token_ids": tuple(range(40))},
    ],
)
def test_every_sampling_option_gives_what_the_cpu_gives(options) -> None:
    sampling = SamplingParams(max_new_tokens=40, **options)
    lagging, _ = make_engine()
    plain, _ = make_engine(device="cpu")
    pairs = list(zip(run(lagging, sampling), run(plain, sampling), strict=True))
    same = [
        (a.token_ids, a.finish_reason, a.stop_reason) == (b.token_ids, b.finish_reason, b.stop_reason) for a, b in pairs
    ]
    assert sum(same) >= len(same) - 1, same


def test_a_full_pool_retracts_and_still_gives_every_token() -> None:
    roomy, _ = make_engine()
    tight, _ = make_engine(config=replace(CONFIG, kv_cache_tokens=330))
    sampling = SamplingParams(max_new_tokens=60, temperature=0, ignore_eos=True)
    pairs = list(zip(run(roomy, sampling), run(tight, sampling), strict=True))
    assert all(len(a.token_ids) == len(b.token_ids) == 60 for a, b in pairs)
    assert sum(a.token_ids == b.token_ids for a, b in pairs) >= len(pairs) - 1
    assert tight.core.stats().num_retractions_total > 0


def test_captured_graphs_read_weights_that_were_updated_in_place() -> None:
    engine, model = make_engine()
    sampling = SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True)
    before = run(engine, sampling)

    async def update() -> None:
        await engine.pause()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-0.5)
        await engine.update_weights(WeightUpdate(version=1, source=LocalWeights()))
        await engine.resume()

    asyncio.run(update())
    after = run(engine, sampling)
    fresh_model = make_model().to("cuda")
    with torch.no_grad():
        for parameter in fresh_model.parameters():
            parameter.mul_(-0.5)
    fresh = run(EmbeddedEngine(fresh_model, make_tokenizer(), config=CONFIG), sampling)
    assert [c.token_ids for c in after] == [c.token_ids for c in fresh] != [c.token_ids for c in before]
    assert {span.version for c in after for span in c.versions} == {1}


def test_an_abort_keeps_what_was_sampled() -> None:
    engine, _ = make_engine()

    async def go() -> Completion:
        request = GenerateRequest(
            request_id="long",
            prompt_token_ids=(1, 2, 3),
            sampling=SamplingParams(max_new_tokens=200, ignore_eos=True),
        )
        task = asyncio.create_task(engine.generate(request))
        for _ in range(20):
            await asyncio.sleep(0)
        await engine.abort(["long"])
        engine.core.check_integrity()
        return await task

    done = asyncio.run(go())
    assert done.finish_reason == "abort" and 0 < len(done.token_ids) < 200
