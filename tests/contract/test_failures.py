"""A server that is killed is started again: every request is answered once, by the weights that are current."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from skyrl_train.errors import ConfigError
from skyrl_train.types import SessionRef
from tests.contract import models
from tests.contract.asking import MOMENTS, Ids, ask, assert_greedy, prompts
from tests.contract.backends import refuse_before_start
from tests.contract.under_test import NO_SERVER, Case

DOOMED = pytest.mark.setting("doomed")
KILLED = pytest.mark.capability("A killed server is started again: nothing lost, nothing twice, current weights")


@KILLED
@DOOMED
async def test_a_server_killed_in_the_middle_loses_nothing(case: Case) -> None:
    if case.is_refused():
        return
    under_test = case.started
    other = models.policy(seed=1)
    async with under_test.serving(other):
        before = await case.engine.stats()
        wanted = prompts(*range(8, 24), seed=95)
        requests = [ask(prompt, 600) for prompt in wanted]
        tasks = [asyncio.create_task(case.engine.generate(request)) for request in requests]
        await asyncio.sleep(MOMENTS[0])
        assert under_test.server_pid is not None
        pid = under_test.server_pid()
        os.kill(pid, signal.SIGKILL)
        answers = await asyncio.gather(*tasks)
        after = await case.engine.stats()
        for request, prompt, answer in zip(requests, wanted, answers, strict=True):
            assert answer.request_id == request.request_id
            assert (len(answer.token_ids), answer.finish_reason) == (600, "length")
            assert [span.version for span in answer.versions] == [under_test.version]
            assert_greedy(other, prompt, answer)
        assert after.num_restarts_total == before.num_restarts_total + 1
        assert after.num_resent_total > before.num_resent_total
        assert after.num_generated_tokens_total - before.num_generated_tokens_total == 16 * 600
        assert under_test.server_pid() != pid
        assert not Path(f"/proc/{pid}").exists()


@KILLED
@DOOMED
async def test_a_session_goes_on_in_the_next_life_of_the_server(case: Case) -> None:
    if case.is_refused():
        return
    root, new = prompts(40, 9, seed=96)
    session_id = await case.engine.open_session(400)
    try:
        first = ask(root, 8, session=SessionRef(session_id=session_id))
        whole: Ids = root + (await case.engine.generate(first)).token_ids
        assert case.started.server_pid is not None
        os.kill(case.started.server_pid(), signal.SIGKILL)
        at = SessionRef(session_id=session_id, parent_request_id=first.request_id)
        assert_greedy(case.reference, whole + new, await case.engine.generate(ask(new, 12, session=at)))
    finally:
        await case.engine.close_session(session_id)


@pytest.mark.capability("An unknown server option is refused before the start")
async def test_an_unknown_server_option_is_refused_before_the_start(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no_such_option"):
        await refuse_before_start(case.on.backend, tmp_path, {"engine_init_kwargs.no_such_option": 1})


@pytest.mark.capability("The server's own metrics")
async def test_metrics_have_the_servers_own_names(case: Case) -> None:
    before = await case.engine.metrics_text()
    if case.on.backend == "embedded":
        assert before == ""
        case.says_no(NO_SERVER)
        return
    await case.engine.generate(ask([65, 66, 67], 12))
    after = await case.engine.metrics_text()
    name = {"sglang": "sglang:generation_tokens_total", "vllm": "vllm:generation_tokens_total"}[case.on.backend]
    assert _total(after, name) >= _total(before, name) + 12


def _total(text: str, name: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))
