from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from skyrl_train.engines.embedded import EmbeddedConfig
from skyrl_train.engines.embedded.config import KVShape, resolve_kv_tokens
from skyrl_train.engines.embedded.core import EngineCore
from skyrl_train.engines.embedded.native import build
from skyrl_train.engines.embedded.native.build import NativeUnavailable, load_native
from skyrl_train.errors import ConfigError
from tests.engines.embedded.common import greedy_reference, make_core, random_prompts, request, run
from tests.tiny import EOS_ID, make_model, make_tokenizer


def test_the_context_is_the_models_unless_it_is_shorter() -> None:
    core = EngineCore(make_model(), None, config=EmbeddedConfig(kv_cache_tokens=4096))
    assert core.info.max_context_len == 2048
    core = EngineCore(make_model(), None, config=EmbeddedConfig(kv_cache_tokens=4096, max_context_len=100))
    assert core.info.max_context_len == 100
    core = EngineCore(make_model(), None, config=EmbeddedConfig(kv_cache_tokens=64, max_context_len=100))
    assert core.info.max_context_len == 64  # the pool is the tighter limit


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
        ({"cuda_kernels": "fast"}, "cuda_kernels is plain or fused, found 'fast'"),
        ({"cuda_kernels": "fused", "deterministic": True}, "does not go with deterministic"),
        ({"cuda_kernels": "fused", "attention_backend": "reference"}, "does not go with attention_backend"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 63}, "can't hold one row for each"),
        ({"kv_cache_frac": 1.5}, r"kv_cache_frac must be in \(0, 1\)"),
        ({"max_context_len": 4096}, "max_context_len 4096 is over the model's 2048 positions"),
        ({"kv_cache_frac": 1e-9}, "fewer than one context of 2048"),
    ],
)
def test_limits_that_do_not_fit_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineCore(make_model(), None, config=EmbeddedConfig(**config))


def test_the_default_pool_is_bounded_by_what_all_seats_can_use() -> None:
    shape = KVShape(num_heads=1, num_kv_heads=1, head_dim=16, dtype=torch.float32)
    config = EmbeddedConfig(max_num_seqs=2)
    assert resolve_kv_tokens(config, {0: shape}, 10, torch.device("cpu")) == 20


def test_a_model_with_another_attention_is_refused() -> None:
    with pytest.raises(ConfigError, match="loaded with attn_implementation='eager'"):
        make_core(make_model(attn_implementation="eager"))


def test_a_model_with_recurrent_layers_is_refused() -> None:
    model = make_model("qwen2", num_hidden_layers=2)
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ConfigError, match="has 2 layers, of which 1 are standard attention"):
        make_core(model)


def test_a_rope_that_depends_on_the_batch_is_refused_beyond_its_constant_range() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    model = make_model("llama", rope_parameters=rope)
    with pytest.raises(ConfigError, match="'dynamic' changes the angles beyond 64 positions"):
        make_core(model, max_context_len=65)
    make_core(model, max_context_len=64)


def test_end_tokens_come_from_generation_config_model_config_and_tokenizer() -> None:
    model = make_model()
    model.generation_config.eos_token_id = [7, 8]
    core = make_core(model, extra_eos_token_ids=(9,))
    assert set(core._seats.stops._eos_ids) == {7, 8, 9, EOS_ID}


def test_without_a_compiler_the_engine_is_slow_and_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (prompt,) = random_prompts(9)
    expected = run(make_core(), [request("a", prompt, 8, temperature=1.0, seed=3)])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    load_native.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no C kernels.*there is no C compiler"):
            core = make_core()
        with pytest.warns(UserWarning), pytest.raises(ConfigError, match="'cpu' can't be used"):
            make_core(attention_backend="cpu")
    finally:
        load_native.cache_clear()
    (found,) = run(core, [request("a", prompt, 8, temperature=1.0, seed=3)])
    assert found.token_ids == expected[0].token_ids


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no such target" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(NativeUnavailable, match="no such target"):
        build._built_library()


def test_the_library_is_built_once_and_where_the_user_keeps_caches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = build._built_library()
    assert first.parent == tmp_path / "skyrl_train" / "native"
    stamp = first.stat().st_mtime_ns
    assert build._built_library() == first and first.stat().st_mtime_ns == stamp
    assert os.listdir(first.parent) == [first.name]


@pytest.mark.parametrize(
    "overrides",
    [{"hidden_size": 96, "num_attention_heads": 4}, {"hidden_size": 1280, "num_attention_heads": 4}],
    ids=str,
)
def test_a_head_size_that_the_kernel_lacks_falls_back_with_one_warning(overrides: dict[str, Any]) -> None:
    model = make_model("llama", num_hidden_layers=1, **overrides)
    with pytest.warns(UserWarning, match="slow reference attention is used") as warned:
        core = make_core(model)
    assert len(warned) == 1
    eager = make_model("llama", num_hidden_layers=1, attn_implementation="eager", **overrides)
    (prompt,) = random_prompts(7)
    assert run(core, [request("a", prompt, 6)])[0].token_ids == greedy_reference(eager, prompt, 6)


def test_bfloat16_runs_on_the_kernels_and_float16_on_the_reference() -> None:
    settings = EmbeddedConfig(kv_cache_tokens=64, max_context_len=64)
    core = EngineCore(make_model().to(torch.bfloat16), make_tokenizer(), config=settings)
    with pytest.warns(UserWarning, match="slow reference attention is used: the CPU kernel wants float32 or bfloat16"):
        slow = EngineCore(make_model().to(torch.float16), make_tokenizer(), config=settings)
    for each in (core, slow):
        (answer,) = run(each, [request("a", (1, 2, 3), 6)])
        assert len(answer.token_ids) == 6


def test_fused_kernels_are_refused_off_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="wants a model on a GPU, found one on cpu"):
        make_core(cuda_kernels="fused")
