from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from skyrl_train.training.model import export_hf
from tests.serving.running import Served, served
from tests.tiny import make_model, make_tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model(attn_implementation="sdpa")
    return export_hf(model, make_tokenizer(), tmp_path_factory.mktemp("model") / "export")


@pytest.fixture(scope="session")
def server(model_folder: Path) -> Iterator[Served]:
    with served(model_folder, "--served-model-name", "tiny") as running:
        yield running


@pytest.fixture
def client(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as opened:
        yield opened
