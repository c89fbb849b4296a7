"""The endpoints that continue texts: each goes through a request's life, and leaves its decisions to pure modules."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from cluster.serve import chat, completions
from cluster.serve.answering import Answering
from cluster.serve.errors import refused
from cluster.serve.message_reader import MessageReader, NamedToolReader, PlainReader, TemplateReader, ToolListReader
from cluster.serve.request_settings import GRAMMARS, api_names, check_min_tokens, common_settings
from cluster.serve.request_summary import RequestSummary, summary_of
from cluster.serve.schema import ChatRequest, CommonRequest, CompletionRequest, NamedTool
from cluster.serve.served_model import ServedModel
from cluster.serve.service import QUICK, Service
from epslots.generation.chat_template import Chat
from epslots.generation.request_limits import foreign_token


def _note(service: Service, body: CommonRequest, request: Request, prompt: Any, choices: int) -> RequestSummary:
    """Check the model's name, and note the request."""
    summary = summary_of(request.scope)
    summary.model, summary.choices = service.name_of(body.model), choices
    if service.config.log_prompts:
        summary.prompt, summary.text = prompt, [""] * choices
    return summary


def _head(summary: RequestSummary, prefix: str, kind: str) -> dict[str, Any]:
    return {"id": prefix + summary.id, "object": kind, "created": int(time.time()), "model": summary.model}


def _truncated(tokens: Sequence[int], body: CommonRequest, most: int) -> Sequence[int]:
    """The end of a prompt, if the request allows that."""
    kept = body.truncate_prompt_tokens
    if kept is None:
        return tokens
    kept = most if kept == -1 else min(kept, most)
    if kept < 1:
        raise refused("truncate_prompt_tokens: allowed: at least 1, or -1 for as many as fit", "truncate_prompt_tokens")
    return tokens[-kept:]


async def complete(service: Service, body: CompletionRequest, request: Request) -> Response:
    """Continue the prompts of a request."""
    given = body.prompt
    prompts: list[str | list[int]] = [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)
    if len(prompts) > service.config.max_prompts:
        raise refused(f"prompt: {len(prompts)} prompts; allowed: up to {service.config.max_prompts}", "prompt")
    summary = _note(service, body, request, given, len(prompts) * body.choices)
    with service.admitted(summary.choices) as (model, places):
        settings = common_settings(body, model.cluster.end_tokens, service.drawn_seed())
        wanted = 1 if body.max_tokens == 0 else body.max_tokens
        quick = sum(map(len, prompts)) <= QUICK
        tokens = [await _tokens(service, model, body, prompt, wanted, quick=quick) for prompt in prompts]
        summary.prompt_tokens = sum(map(len, tokens))
        asked = [(each, settings | _limits(model, body, len(each), wanted)) for each in tokens]
        for _, own in asked:
            check_min_tokens(own, own["max_new_tokens"], "max_tokens")
        echoes = None
        if body.echo:
            echoes = [
                prompt if isinstance(prompt, str) and body.truncate_prompt_tokens is None else model.tokenizer.decode(ids)
                for prompt, ids in zip(prompts, tokens, strict=True)
            ]
        answer = completions.CompletionAnswer(body, tokens, echoes, model.texts)
        reader = await service.start(asked, api_names(body), places, whole=not body.stream)
    head = _head(summary, completions.ID_PREFIX, completions.OBJECT)
    answering = Answering(
        service=service,
        summary=summary,
        reader=reader,
        body=body,
        head=head,
        chunk_head=head,
        answer=answer,
        join=completions.joined_completion,
        prompt_tokens=summary.prompt_tokens,
    )
    return await answering.respond(request)


async def _tokens(
    service: Service,
    model: ServedModel,
    body: CompletionRequest,
    prompt: str | Sequence[int],
    wanted: int | None,
    *,
    quick: bool,
) -> Sequence[int]:
    """A prompt's tokens, cut as the request allows."""
    if isinstance(prompt, str):
        prompt = await service.encode(prompt, "prompt", fits=body.truncate_prompt_tokens is None, quick=quick)
    elif wrong := foreign_token(prompt, model.cluster.limits.vocabulary):
        raise refused(f"prompt: {wrong}", "prompt")
    return _truncated(prompt, body, model.room.most - (wanted or 1))


def _limits(model: ServedModel, body: CompletionRequest, length: int, wanted: int | None) -> dict[str, Any]:
    """The settings of one prompt that depend on its length."""
    most = model.room.new_tokens(length, wanted, name="max_tokens", clamp=False, field="prompt")
    found: dict[str, Any] = {"max_new_tokens": most}
    if body.logprobs is not None:
        found["logprobs"] = body.logprobs
        if body.echo:
            found["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    return found


async def answer_chat(service: Service, body: ChatRequest, request: Request) -> Response:
    """Answer the chat of a request."""
    messages = [message.model_dump(exclude_none=True) for message in body.messages] if service.config.log_prompts else None
    summary = _note(service, body, request, messages, body.choices)
    with service.admitted(body.choices) as (model, places):
        made = chat.chat_of(body, service.config.chat_template)
        _check_chat(model, body)
        settings = common_settings(body, model.cluster.end_tokens, service.drawn_seed())
        settings |= _one_grammar(settings, body)
        tokens = await service.encode(made, "messages", fits=body.truncate_prompt_tokens is None)
        tokens = list(_truncated(tokens, body, model.room.most - 1))
        summary.prompt_tokens = len(tokens)
        wanted = body.max_completion_tokens or body.max_tokens
        name = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
        settings["max_new_tokens"] = model.room.new_tokens(len(tokens), wanted, name=name, clamp=True, field="messages")
        check_min_tokens(settings, settings["max_new_tokens"], name)
        if body.logprobs:
            settings["logprobs"] = body.top_logprobs or 0
        reads = _reads_template(model, body)
        prompt = str(model.tokenizer.decode(tokens)) if reads else ""
        readers = [_message_reader(model, body, made, prompt) for _ in range(body.choices)]
        reader = await service.start(
            [(tokens, settings)], api_names(body), places, special_tokens=reads, whole=not body.stream
        )
    answering = Answering(
        service=service,
        summary=summary,
        reader=reader,
        body=body,
        head=_head(summary, chat.ID_PREFIX, chat.OBJECT),
        chunk_head=_head(summary, chat.ID_PREFIX, chat.CHUNK_OBJECT),
        answer=chat.ChatAnswer(body, readers, model.texts),
        join=chat.joined_chat,
        prompt_tokens=summary.prompt_tokens,
    )
    return await answering.respond(request)


def _check_chat(model: ServedModel, body: ChatRequest) -> None:
    """Refuse what this model can't do."""
    if not model.chat:
        raise refused(
            "messages: this model's tokenizer has no chat template; use /v1/completions, or start the service with "
            "--chat-template",
            "messages",
        )
    if body.tools and body.tool_choice in (None, "auto") and model.response_template is None:
        raise refused(
            "tools: no response template says how this model calls tools; allowed: tool_choice none, required or a named "
            "function, or a service that is started with --response-template",
            "tools",
        )


def _one_grammar(settings: Mapping[str, Any], body: ChatRequest) -> dict[str, Any]:
    """The setting that makes the model call a tool."""
    forced = chat.tool_grammar(body)
    if forced and any(name in settings for name in GRAMMARS):
        raise refused("tool_choice: a text that has to call a tool has no other grammar", "tool_choice")
    return forced


def _reads_template(model: ServedModel, body: ChatRequest) -> bool:
    """Whether the response template reads the texts: not where a grammar says what they are."""
    forced = body.tool_choice not in (None, "none", "auto")
    return model.response_template is not None and not forced


def _message_reader(model: ServedModel, body: ChatRequest, made: Chat, prompt: str) -> MessageReader:
    parallel = body.parallel_tool_calls is not False
    if isinstance(body.tool_choice, NamedTool):
        return NamedToolReader(body.tool_choice.function.name)
    if body.tool_choice == "required":
        return ToolListReader(parallel)
    if model.response_template is None:
        return PlainReader()
    return TemplateReader(
        model.response_template,
        prompt,
        made.tools or (),
        parallel=parallel,
        reasoning=body.include_reasoning is not False,
    )
