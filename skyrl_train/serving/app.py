"""The endpoint as a FastAPI app over any engine: OpenAI's protocol, health and metrics."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from skyrl_train.engines.base import Engine
from skyrl_train.serving.auth import RequireKey
from skyrl_train.serving.bodies import ChatBody, CompletionBody
from skyrl_train.serving.errors import install_error_handlers
from skyrl_train.serving.metrics import CountRequests, ServingMetrics
from skyrl_train.serving.prepare import prepare_chat, prepare_completion
from skyrl_train.serving.service import Service


def create_app(engine: Engine, tokenizer: Any, model_name: str, api_key: str | None = None) -> FastAPI:
    """Serve an engine under a name. With a key, all but /health requires it.

    Answers stream token by token where the engine is a `StreamingEngine`, and in one piece where it is not. The app
    lives in one event loop and leaves the engine open.
    """
    app = FastAPI(title="skyrl_train", docs_url=None, redoc_url=None)
    metrics = ServingMetrics(engine.info.name)
    service = Service(engine, tokenizer, model_name, metrics)
    model_card = {
        "id": model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "skyrl_train",
        "max_model_len": engine.info.max_context_len,
        "logprob_space": engine.info.logprob_space,
    }
    install_error_handlers(app)
    if api_key is not None:
        app.add_middleware(RequireKey, api_key=api_key)
    app.add_middleware(CountRequests, metrics=metrics)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, http: Request) -> Response:
        service.check_model(body.model)
        return await service.answer(prepare_completion(body, tokenizer, engine.info), http)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, http: Request) -> Response:
        service.check_model(body.model)
        return await service.answer(prepare_chat(body, tokenizer, engine.info), http)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return model_card

    @app.get("/health")
    async def health() -> Response:
        reason = await service.why_unhealthy()
        if reason is not None:
            return JSONResponse({"status": "unavailable", "reason": reason}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def render_metrics() -> Response:
        return Response(await service.render_metrics(), media_type=CONTENT_TYPE_LATEST)

    return app
