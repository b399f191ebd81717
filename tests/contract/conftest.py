"""One engine at a time, in the order that starts each setting of each backend once, and the record of what passed."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.contract.backends import BACKENDS, LABELS, SERVERS, start
from tests.contract.record import Record
from tests.contract.under_test import Case, Refused, UnderTest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test runs on each backend, in its setting: `@setting("ngram")`, else "plain"."""
    if "under_test" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("setting")
    settings = marker.args if marker is not None else ("plain",)
    cases = [
        pytest.param(
            (backend, setting),
            id=f"{backend}-{setting}",
            marks=[pytest.mark.contract, *([pytest.mark.engines] if backend in SERVERS else [])],
        )
        for backend in BACKENDS
        for setting in settings
    ]
    metafunc.parametrize("under_test", cases, indirect=True, scope="session")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """An engine's connections belong to one event loop: all tests of a session share it."""
    for item in items:
        if pytest_asyncio.is_async_test(item) and "under_test" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def under_test(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[UnderTest | Refused]:
    backend, setting = request.param
    async with start(backend, setting, tmp_path_factory.mktemp(f"{backend}-{setting}")) as started:
        yield started


@pytest_asyncio.fixture(loop_scope="session")
async def case(under_test: UnderTest | Refused, request: pytest.FixtureRequest) -> AsyncIterator[Case]:
    backend, setting = request.node.callspec.params["under_test"]
    marker = request.node.get_closest_marker("capability")
    assert marker is not None, "a contract test names the capability that it is a part of"
    request.node.user_properties += [
        ("contract-row", marker.args[0].format(setting=LABELS.get(setting, setting))),
        ("contract-backend", backend),
        ("contract-release", under_test.release),
    ]
    yield Case(on=under_test, node=request.node)
    if isinstance(under_test, UnderTest):
        await under_test.check_at_rest()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Record(), "contract-record")
