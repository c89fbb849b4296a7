"""The application: FastAPI's routes for a ``Service``, and the middlewares around them.

A request passes, from outside: summaries -> origins (CORS) -> keys -> bodies' forms and sizes -> route -> endpoint.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

import epslots
from cluster.serve import answer_schema as answers
from cluster.serve.auth import ApiKeys, Authentication
from cluster.serve.chat import chat_of
from cluster.serve.endpoints import answer_chat, complete
from cluster.serve.errors import INTERNAL, TYPES, ApiError, of_problems, refused
from cluster.serve.live_feed import LiveFeed
from cluster.serve.metrics import CONTENT_TYPE
from cluster.serve.middleware import JsonBodies, Records
from cluster.serve.page import add_page
from cluster.serve.request_summary import summary_of
from cluster.serve.responses import error_response, json_response
from cluster.serve.schema import FIELDS, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from cluster.serve.service import Service
from epslots.generation.request_limits import foreign_token

logger = logging.getLogger("epslots.serve")
_QUERY = {"layer", "layers"}
"""Names of parameters in URLs."""
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": answers.ErrorAnswer} for status in (400, 401, 403, 404, 413, 415, 429, 500, 503, 504)
}


class _StrictRequest(Request):
    """A request whose body is JSON by its standard: without NaN, Infinity and halves of surrogate pairs."""

    async def json(self) -> Any:
        body = await self.body()
        try:
            return from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error


class _Route(APIRoute):
    """A route that reads strict JSON, and notes its path in the request's summary."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        handle, path = super().get_route_handler(), self.path

        async def handle_strictly(request: Request) -> Response:
            summary_of(request.scope).route = path
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


def create_app(service: Service, keys: ApiKeys, *, local: bool, on_close: Callable[[], None] | None = None) -> Any:
    """The ASGI application of a service.

    Args:
        service: answers the requests.
        keys: the API keys; none = everybody is let in.
        local: without keys, the service is only for this machine.
        on_close: called at the end, in the loop's thread.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()
        if on_close is not None:
            on_close()

    config = service.config
    app = FastAPI(
        title="epslots",
        description="A Mixture-of-Experts model from bounded expert slots, with OpenAI's API.",
        version=epslots.__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
    )
    app.router.route_class = _Route
    _add_errors(app, config.max_body_bytes)
    _add_endpoints(app, service)
    _add_plain_routes(app, service)
    add_page(app, LiveFeed(service), config.stalled_s)
    _describe(app, has_keys=bool(keys))
    wrapped: Any = Authentication(JsonBodies(app, config.max_body_bytes), keys, local)
    if config.cors_origins:
        wrapped = CORSMiddleware(
            wrapped,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id"],
        )
    return Records(wrapped, service.done)


def _add_errors(app: FastAPI, most_bytes: int) -> None:
    """Answer every error in OpenAI's form."""

    def answer(request: Request, error: ApiError) -> Response:
        summary_of(request.scope).problem = error.code or str(error.status)
        return error_response(error)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return answer(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(request, of_problems(error.errors(), FIELDS | _QUERY))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        status = error.status_code if error.status_code in TYPES else 400 if error.status_code < 500 else 500
        messages = {
            404: f"{request.method} {request.url.path[:200]}: there is no such path; see /openapi.json",
            405: f"{request.method} {request.url.path[:200]}: allowed: {(error.headers or {}).get('Allow', 'another method')}",
            413: f"the body is too large; allowed: up to {most_bytes:,} bytes",
        }
        return answer(request, ApiError(status, messages.get(status, str(error.detail)), headers=error.headers))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return answer(request, INTERNAL)  # Starlette raises it again, and the server logs it


def _add_endpoints(app: FastAPI, service: Service) -> None:
    """The endpoints of OpenAI's API."""

    @app.post(
        "/v1/completions",
        responses=_ERRORS | _answer_of(answers.Completion, answers.Completion),
        response_model=answers.Completion,
    )
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue prompts."""
        return await complete(service, body, request)

    @app.post(
        "/v1/chat/completions",
        responses=_ERRORS | _answer_of(answers.ChatCompletion, answers.ChatChunk),
        response_model=answers.ChatCompletion,
    )
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer a chat."""
        return await answer_chat(service, body, request)

    @app.get("/v1/models", responses=_ERRORS, response_model=answers.ModelList)
    async def list_models() -> Response:
        """The names of the model."""
        data = [_model_card(service, name, began) for name in service.config.names]
        return json_response({"object": "list", "data": data})

    @app.get("/v1/models/{model:path}", responses=_ERRORS, response_model=answers.ModelCard)
    async def retrieve_model(model: str) -> Response:
        """One name of the model."""
        return json_response(_model_card(service, service.name_of(model), began))

    @app.post("/tokenize", responses=_ERRORS, response_model=answers.Tokenized)
    async def tokenize(body: TokenizeRequest) -> Response:
        """The tokens of a prompt or a chat."""
        service.name_of(body.model)
        model = service.model
        if body.prompt is not None:
            special = body.add_special_tokens is not False
            tokens = await service.encode(body.prompt, "prompt", special_tokens=special, fits=False)
        else:
            tokens = await service.encode(chat_of(body, service.config.chat_template), "messages", fits=False)
        found: dict[str, Any] = {"count": len(tokens), "max_model_len": model.room.most, "tokens": tokens}
        if body.return_token_strs:
            found["token_strs"] = await service.in_thread(lambda: model.tokenizer.convert_ids_to_tokens(tokens))
        return json_response(found)

    @app.post("/detokenize", responses=_ERRORS, response_model=answers.Detokenized)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of tokens."""
        service.name_of(body.model)
        model = service.model
        if wrong := foreign_token(body.tokens, model.cluster.limits.vocabulary):
            raise refused(f"tokens: {wrong}", "tokens")
        text = await service.in_thread(lambda: model.tokenizer.decode(body.tokens))
        return json_response({"prompt": text})

    began = int(time.time())


def _answer_of(model: type[Any], event: type[Any]) -> dict[int | str, dict[str, Any]]:
    """The documentation of an answer that may be a stream of events."""
    text = f"Events. The data of each is a {event.__name__}; of the last one, [DONE]."
    return {200: {"model": model, "content": {"text/event-stream": {"schema": {"type": "string", "description": text}}}}}


def _model_card(service: Service, name: str, began: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": began,
        "owned_by": "epslots",
        "root": service.config.names[0],
        "max_model_len": service.model.room.most,
    }


def _add_plain_routes(app: FastAPI, service: Service) -> None:
    """The endpoints for operators."""

    def readiness() -> dict[str, Any]:
        return {"status": service.phase, "ranks": service.ranks}

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={503: {"model": answers.Readiness}}, response_model=answers.Readiness)
    async def health() -> Response:
        """Whether the service lives: also while it starts and drains."""
        return json_response(readiness(), 503 if service.phase == "failed" else 200)

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", responses={503: {"model": answers.Readiness}}, response_model=answers.Readiness)
    async def ready() -> Response:
        """Whether ranks serve, and requests are taken."""
        serves = service.phase == "ready" and service.ranks > 0
        return json_response(readiness(), 200 if serves else 503)

    @app.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics(layers: bool = False) -> Response:
        """Metrics in Prometheus' text format; with layers=true also of each MoE layer."""
        await service.sampled()
        return Response(service.metrics.page(layers=layers), media_type=CONTENT_TYPE)

    @app.get("/version", responses={401: _ERRORS[401]}, response_model=answers.Version)
    async def version() -> Response:
        """The version of epslots."""
        return json_response({"version": epslots.__version__})


def _describe(app: FastAPI, *, has_keys: bool) -> None:
    """Make the page at /openapi.json true: invalid requests get 400 here, and keys are needed if there are any."""
    make = app.openapi

    def describe() -> dict[str, Any]:
        page = make()
        page["openapi"] = "3.1.0"
        schemas = page["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        event = answers.ChatChunk.model_json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
        page["components"]["schemas"] = event.pop("$defs") | {"ChatChunk": event} | schemas
        for path in page["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
                if "parameters" in operation or "requestBody" in operation:
                    operation["responses"].setdefault("400", {"description": "Bad Request"})
        if has_keys:
            page["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            page["security"] = [{"key": []}]
        return page

    app.openapi = describe  # type: ignore[method-assign]
