"""The bodies of answers, for the page at ``/openapi.json``; tests hold real answers to these types.

The service itself writes plain dictionaries, which costs a tenth.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length", "tool_calls"]


class _AnswerBody(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorDetail(_AnswerBody):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(_AnswerBody):
    """A refusal or a failure."""

    error: ErrorDetail


class TokenUsage(_AnswerBody):
    """Tokens of a request; each prompt counts once, for any n."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(_AnswerBody):
    """Log-probabilities of a text's tokens; the first token of a prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptToken(_AnswerBody):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptToken] | None]
"""Of a prompt's tokens, the first of which has none: its own, and those of the likeliest ones, by token id (vLLM's)."""


class CompletionChoice(_AnswerBody):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(_AnswerBody):
    """The continuations of prompts; in a stream, a part of them."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: TokenUsage | None = None


class CalledFunction(_AnswerBody):
    name: str | None = None
    arguments: str | None = None


class ToolCallAnswer(_AnswerBody):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ToolCallDelta(_AnswerBody):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class ChatMessageAnswer(_AnswerBody):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallAnswer] | None = None


class ChatDelta(_AnswerBody):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class LikelyToken(_AnswerBody):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(LikelyToken):
    top_logprobs: list[LikelyToken]


class ChatLogprobs(_AnswerBody):
    content: list[ChatToken]
    refusal: None = None


class ChatChoice(_AnswerBody):
    index: int
    message: ChatMessageAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(_AnswerBody):
    """Answers to a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage
    prompt_logprobs: PromptLogprobs | None = None


class ChatChunkChoice(_AnswerBody):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(_AnswerBody):
    """A part of the answers to a chat, in a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: TokenUsage | None = None


class ModelCard(_AnswerBody):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(_AnswerBody):
    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(_AnswerBody):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(_AnswerBody):
    prompt: str


class Readiness(_AnswerBody):
    """Whether requests are served now."""

    status: Literal["starting", "ready", "draining", "failed"]
    ranks: int


class Version(_AnswerBody):
    version: str
