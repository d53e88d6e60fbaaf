"""The routes: which address leads to what."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import ExitStack
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from qwen_engine import __version__
from qwen_engine.errors import QwenError
from qwen_run.runtime.request import message_of
from qwen_serve.anthropic.fields import Counting, Messages
from qwen_serve.anthropic.messages import MessagesAnswer, count_tokens
from qwen_serve.common.errors import ServeError
from qwen_serve.common.sse import ClientGone, EventStream, JsonAnswer, unless_gone
from qwen_serve.engine.job import RequestJob
from qwen_serve.engine.metrics import CONTENT_TYPE
from qwen_serve.engine.serving import Serving, Status, refused
from qwen_serve.http.middleware import Door, Log, error_response, log_line, read_body
from qwen_serve.http.reference import reference_page
from qwen_serve.openai.chat import ChatAnswer
from qwen_serve.openai.completions import CompletionAnswer
from qwen_serve.openai.fields import ApplyTemplate, Body, Chat, Completion, Detokenize, SampledBody, Tokenize, parsed
from qwen_serve.openai.pooled import classify, embed, rerank, score
from qwen_serve.openai.pooled_fields import Classify, Embeddings, PooledBody, Rerank, Score
from qwen_serve.openai.response_fields import Responses
from qwen_serve.openai.responses import ResponsesAnswer
from qwen_serve.openai.tokens import apply_template, detokenize, tokenize
from qwen_serve.page.responses import ChatPage

_PROBES = frozenset(["/health", "/ready"])  # who asks these has no key
_PARSED_BESIDE = 64 << 10  # bytes of JSON from which it is read in a thread

Sampling = SampledBody | Responses | Messages
Answering = Callable[[Serving, Any], Coroutine[Any, Any, dict[str, Any]]]


def make_app(serving: Serving, log: Log = log_line) -> ASGIApp:
    """The application that answers for ``serving``, whose engine is opened and closed by others."""
    app = FastAPI(
        title="qwen-serve",
        version=__version__,
        summary=f"One engine, {serving.name}",
        redirect_slashes=False,
        docs_url=None,  # FastAPI's page loads scripts from a public site
        redoc_url=None,
    )

    async def reference() -> Response:
        return reference_page(app.openapi())

    app.add_api_route("/docs", reference, include_in_schema=False)
    _Answers(serving).add_to(app)
    _States(serving).add_to(app)
    page = ChatPage() if serving.settings.page else None
    if page is not None:
        for path in page.paths:
            _add_file(app, path, page)
    handlers: dict[Any, Any] = {
        ServeError: _told,
        QwenError: _refused,
        HTTPException: _no_route,
        ClientGone: _nobody,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    app.add_exception_handler(Exception, _ours)
    inner: ASGIApp = app
    if serving.settings.origins:
        inner = CORSMiddleware(app, allow_origins=serving.settings.origins, allow_methods=["*"], allow_headers=["*"])
    return Door(inner, serving.settings, log, _PROBES | (page.paths if page else frozenset()))


class _Answers:
    """The routes that take a request in JSON."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    def add_to(self, app: FastAPI) -> None:
        sampled: dict[str, tuple[type[Sampling], Any]] = {
            "/v1/chat/completions": (Chat, ChatAnswer),
            "/v1/completions": (Completion, CompletionAnswer),
            "/v1/responses": (Responses, ResponsesAnswer),
            "/v1/messages": (Messages, MessagesAnswer),
        }
        for path, (kind, answer) in sampled.items():
            _add(app, path, kind, self._sampled(kind, answer))
        pooled: dict[tuple[str, ...], tuple[type[PooledBody], Any]] = {
            ("/v1/embeddings",): (Embeddings, embed),
            ("/v1/rerank", "/rerank"): (Rerank, rerank),
            ("/v1/score", "/score"): (Score, score),
            ("/v1/classify", "/classify"): (Classify, classify),
        }
        for paths, (pooled_kind, answering_) in pooled.items():
            for path in paths:
                _add(app, path, pooled_kind, self._pooled(pooled_kind, answering_))
        others: dict[str, tuple[type[Body], Answering]] = {
            "/tokenize": (Tokenize, tokenize),
            "/detokenize": (Detokenize, detokenize),
            "/apply-template": (ApplyTemplate, apply_template),
            "/v1/messages/count_tokens": (Counting, count_tokens),
        }
        for path, (kind_, answering) in others.items():
            _add(app, path, kind_, self._plain(kind_, answering))

    async def _job(self, request: Request) -> tuple[RequestJob, str | None]:
        """What answers ``request``, and what keeps its cached prompt from those of other keys."""
        await self._serving.check()
        job = RequestJob(self._serving, self._timeout(request), request.headers.get("x-session-id"))
        request.state.job = job
        return job, request.state.api_key if self._serving.settings.cache_per_key else None

    def _sampled(self, kind: type[Sampling], answer: Any) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            body = await self._body(request, kind)
            job, salt = await self._job(request)
            job.session = job.session or getattr(body, "prompt_cache_key", None)
            with ExitStack() as stack:
                stack.callback(job.close)
                begun = await unless_gone(request.receive, answer.begin(job, body, salt))
                if not body.stream:
                    return JsonAnswer(await unless_gone(request.receive, begun.whole()))
                stack.pop_all()  # the stream closes the job
                return EventStream(begun.chunks(), self._serving.settings.keep_alive_s, job.close)

        return endpoint

    def _pooled(self, kind: type[PooledBody], answer: Any) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            body = await self._body(request, kind)
            job, salt = await self._job(request)
            try:
                return JsonAnswer(await unless_gone(request.receive, answer(job, body, salt)))
            finally:
                job.close()

        return endpoint

    def _plain(self, kind: type[Body], answering: Answering) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            body = await self._body(request, kind)
            await self._serving.check()
            return JsonAnswer(await unless_gone(request.receive, answering(self._serving, body)))

        return endpoint

    async def _body(self, request: Request, kind: type[Any]) -> Any:
        settings = self._serving.settings
        try:
            async with asyncio.timeout(settings.read_timeout_s):
                data = await read_body(request.receive, request.headers, settings.max_body_bytes)
        except TimeoutError:
            message = f"the request has not come within {settings.read_timeout_s:g} s"
            raise ServeError("request_timeout", message) from None
        return await asyncio.to_thread(parsed, kind, data) if len(data) > _PARSED_BESIDE else parsed(kind, data)

    def _timeout(self, request: Request) -> float | None:
        most = self._serving.settings.request_timeout_s
        given = request.headers.get("x-request-timeout-ms", "")
        if not given:
            return most
        if not given.isdecimal() or not 0 < int(given) <= 10**9:
            message = f"x-request-timeout-ms is {given!r:.80}, expected milliseconds, 1 or more"
            raise ServeError("invalid_request", message, "x-request-timeout-ms")
        return min(int(given) / 1000, most or float("inf"))


class _States:
    """The routes that tell how the server is."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    def add_to(self, app: FastAPI) -> None:
        for path, endpoint in (
            ("/health", self._health),
            ("/ready", self._ready),
            ("/metrics", self._metrics),
            ("/version", self._version),
            ("/v1/models", self._models),
            ("/v1/models/{name:path}", self._one),
        ):
            app.add_api_route(path, endpoint, description=endpoint.__doc__)

    async def _health(self) -> Response:
        """200 while requests are answered, also while the last ones are."""
        if self._serving.status is not Status.DRAINING:
            await self._serving.check()
        return JsonAnswer({"status": self._serving.status.value})

    async def _ready(self) -> Response:
        """200 while requests are taken."""
        await self._serving.check()
        return JsonAnswer({"status": self._serving.status.value})

    async def _metrics(self) -> Response:
        """Figures for Prometheus."""
        return Response(self._serving.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def _version(self) -> Response:
        """The version of the server."""
        return JsonAnswer({"version": __version__})

    async def _models(self) -> Response:
        """The names of the model."""
        return JsonAnswer({"object": "list", "data": [self._model(name) for name in self._serving.names]})

    async def _one(self, name: str) -> Response:
        """The model, and its sampling defaults."""
        if name not in self._serving.names:
            expected = ", ".join(self._serving.names)
            raise ServeError("model_not_found", f"there is no model {name!r:.80}, expected {expected}", "model")
        return JsonAnswer(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        serving = self._serving
        found: dict[str, Any] = {"id": name, "object": "model", "created": serving.created, "owned_by": "qwen-engine"}
        if serving.opened is not None:
            params = serving.opened.default_params
            names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            found["max_model_len"] = serving.opened.llm.max_seq_len
            found["meta"] = {
                "default_sampling_params": {each: getattr(params, each) for each in names},
                "chat_template": serving.template_knows,
            }
        return found


def _add(app: FastAPI, path: str, kind: type[Body], endpoint: Callable[[Request], Awaitable[Response]]) -> None:
    """A route whose request ``/docs`` shows."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    content = {"required": True, "content": {"application/json": {"schema": schema}}}
    app.add_api_route(
        path,
        endpoint,
        methods=["POST"],
        name=kind.__name__,
        description=kind.__doc__,
        openapi_extra={"requestBody": content},
        response_model=None,
    )


def _add_file(app: FastAPI, path: str, page: ChatPage) -> None:
    """A route to a file of the chat page."""

    async def endpoint(request: Request) -> Response:
        return page.response(path, request)

    app.add_api_route(path, endpoint, methods=["GET", "HEAD"], include_in_schema=False)


async def _told(request: Request, error: ServeError) -> Response:
    return error_response(error, request.scope)


async def _refused(request: Request, error: QwenError) -> Response:
    return error_response(refused(error), request.scope)


async def _no_route(request: Request, error: HTTPException) -> Response:
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    message = f"{request.method} {request.url.path:.200} is not served; GET /openapi.json lists what is"
    response = error_response(ServeError(code, message), request.scope)
    response.headers.update(error.headers or {})
    return response


async def _nobody(request: Request, error: ClientGone) -> Response:
    return error_response(ServeError("client_closed_request", "the client has gone"), request.scope)


async def _ours(request: Request, error: Exception) -> Response:
    ours = ServeError("internal_error", f"a mistake of the server's: {message_of(error)}")
    return error_response(ours, request.scope)
