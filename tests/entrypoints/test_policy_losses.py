"""The main job with every policy loss, with corrections, and with a bound that stops it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.config.check_training import POLICY_LOSSES
from skyrl_train.config.load import load_config
from skyrl_train.engines.base import EngineInfo
from skyrl_train.entrypoints.build_off_policy import respect_logprob_space
from skyrl_train.entrypoints.run import DONE, FAILED, run
from skyrl_train.errors import ConfigError
from skyrl_train.observability.metrics import read_metrics
from skyrl_train.types import SamplingParams
from tests.entrypoints.test_main_job import arguments, inputs

__all__ = ["inputs"]  # the fixture

GROUP = "trainer.algorithm"


@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_every_loss_runs_from_the_configuration(loss: str, inputs: Path, tmp_path: Path) -> None:
    options = {
        "clip_cov": [f"{GROUP}.clip_cov.clip_ratio=0.1", f"{GROUP}.clip_cov.clip_cov_lb=0.0"],
        "kl_cov": [f"{GROUP}.kl_cov.kl_cov_frac=0.1"],
    }.get(loss, [])
    command = arguments(inputs, tmp_path / "run", "trainer.max_steps=2", f"{GROUP}.policy_loss_type={loss}", *options)
    assert run(load_config(command)) == DONE
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["step"] > 0]
    assert all(row["policy/grad_norm"] > 0 for row in rows)
    assert all(row["policy/importance_ratio_mean"] == pytest.approx(1, abs=1e-5) for row in rows)
    if options:
        # A tenth, rounded down in each of the two mini-batches.
        assert all(0.08 < row["policy/cov_selected_frac"] <= 0.1 for row in rows)


def test_corrections_leave_what_the_engine_and_the_trainer_agree_on(inputs: Path, tmp_path: Path) -> None:
    corrections = (
        f"{GROUP}.use_tis=true",
        f"{GROUP}.off_policy.sequence_mask=geometric",
        f"{GROUP}.off_policy.token_veto_below=0.01",
    )
    for name, options in (("plain", ()), ("corrected", corrections)):
        assert run(load_config(arguments(inputs, tmp_path / name, "trainer.max_steps=2", *options))) == DONE
    plain, corrected = (read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("plain", "corrected"))
    assert corrected["policy/grad_norm"] == pytest.approx(plain["policy/grad_norm"], rel=1e-3)
    assert corrected["policy/tis_truncated_frac"] == corrected["policy/masked_sample_frac"] == 0


def test_a_bound_that_rounding_crosses_stops_the_run_and_names_the_place(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bound = f"{GROUP}.off_policy.max_logprob_diff=1e-12"
    assert run(load_config(arguments(inputs, tmp_path / "run", bound))) == FAILED
    message = capsys.readouterr().err
    assert "engine and trainer part (rollout)" in message
    assert "the engine runs the trainer's own tensors" in message
    assert "the first is token" in message and "comparable (temperature, temperature 1)" in message
    assert not (tmp_path / "run" / "export").exists()
    bound = f"{GROUP}.off_policy.max_logprob_diff=1e-3"
    assert run(load_config(arguments(inputs, tmp_path / "run2", bound, "trainer.max_steps=1"))) == DONE


def judge(space: Any, sampling: SamplingParams, *options: str) -> None:
    engine = EngineInfo(name="engine-0", model="m", max_context_len=64, logprob_space=space, capabilities=frozenset())
    respect_logprob_space(load_config(list(options)).config.trainer.algorithm, engine, sampling)


def test_an_engine_in_another_space_is_refused_where_it_matters(caplog: pytest.LogCaptureFixture) -> None:
    cold = SamplingParams(max_new_tokens=9, temperature=0.5)
    with pytest.raises(ConfigError, match=r"engine engine-0 \(log-probabilities: raw\).*use_tis.* at temperature 1"):
        judge("raw", cold, f"{GROUP}.use_tis=true")
    with pytest.raises(ConfigError, match=r"max_logprob_diff=0.5 would stop every run"):
        judge("raw", cold, f"{GROUP}.off_policy.max_logprob_diff=0.5")
    with caplog.at_level(logging.WARNING):
        judge("raw", cold)
    assert "compare unlike numbers" in caplog.text
    caplog.clear()
    judge("temperature", cold, f"{GROUP}.use_tis=true", f"{GROUP}.off_policy.max_logprob_diff=0.5")
    truncated = SamplingParams(max_new_tokens=9, top_p=0.8)
    judge("temperature", truncated, f"{GROUP}.off_policy.max_logprob_diff=0.5")
    assert not caplog.text
    with pytest.raises(ConfigError, match=r"drawn under top_p=0.8"):
        judge("temperature", truncated, f"{GROUP}.off_policy.sequence_mask=product")
