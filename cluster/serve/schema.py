"""The bodies of requests: checked by these types, which make the page at ``/openapi.json``, too.

OpenAI's fields come first, then vLLM's common extra ones. Fields that change nothing here are accepted, since clients send
them by themselves. Any other field is refused by its name. The types of answers are in ``answer_schema.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from epslots.generation.requests import MOST_LOGPROBS
from epslots.generation.sampling import MOST_BIASES
from epslots.generation.settings import MOST_CHOICES, MOST_STOP_TOKENS
from epslots.generation.text import MOST_STOP_CHARS, MOST_STOP_STRINGS

_INT64 = 2**63
Token = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, Field(min_length=1, max_length=512)]
StopString = Annotated[str, Field(min_length=1, max_length=MOST_STOP_CHARS)]
Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Top = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)]


def _kind(prompt: object) -> str:
    """The branch of a union that a prompt is checked by: errors are only of that branch."""
    if not isinstance(prompt, list):
        return "as text"
    return "as tokens" if prompt and isinstance(prompt[0], int) else "as list"


def _kind_of_one(prompt: object) -> str:
    return "as tokens" if isinstance(prompt, list) else "as text"


_OnePrompt = Annotated[Annotated[Text, Tag("as text")] | Annotated[Tokens, Tag("as tokens")], Discriminator(_kind_of_one)]
Prompts = Annotated[
    Annotated[Text, Tag("as text")]
    | Annotated[Tokens, Tag("as tokens")]
    | Annotated[list[_OnePrompt], Field(min_length=1, fail_fast=True), Tag("as list")],
    Discriminator(_kind),
]


class _Body(BaseModel):
    """A JSON object without unknown fields. Values are of the type that is asked for: "5" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False)


class StreamOptions(_Body):
    """Parts of a stream beside the text."""

    include_usage: bool | None = False
    """A last chunk with the usage."""
    continuous_usage_stats: bool | None = False
    """Every chunk has the usage until then (vLLM's)."""
    include_obfuscation: bool | None = None
    """Changes nothing."""


class StructuredOutputs(_Body):
    """A grammar that the text is held to; one of these (vLLM's)."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1, max_length=1024)] | None = None
    grammar: Text | None = None
    """In the notation of Lark."""
    json_object: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if len(self.given) != 1:
            raise ValueError("give one of json, regex, choice, grammar and json_object")
        return self

    @property
    def given(self) -> dict[str, Any]:
        """The one that is given, by its name."""
        return self.model_dump(by_alias=True, exclude_none=True)


class CommonRequest(_Body):
    """The fields that completions and chats have in common."""

    model: Name | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = 1
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MOST_STOP_STRINGS)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MOST_BIASES)] | None = None
    user: str | None = None
    """Changes nothing."""

    top_k: Annotated[int, Field(ge=-1, lt=_INT64)] | None = 0
    """Sample from this many likeliest tokens; 0 and -1 = all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=1000)] | None = 1.0
    prompt_logprobs: Top | None = None
    """Return log-probabilities of the prompt's tokens, and of this many likeliest ones; not in streams."""
    min_tokens: Annotated[int, Field(ge=0, lt=_INT64)] | None = 0
    ignore_eos: bool | None = False
    stop_token_ids: Annotated[list[Token], Field(max_length=MOST_STOP_TOKENS)] | None = None
    """Tokens that end the text beside the model's end tokens."""
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=_INT64)] | None = None
    """Keep this many tokens from the end of the prompt; -1 = as many as fit."""
    priority: Annotated[int, Field(gt=-_INT64, lt=_INT64)] | None = 0
    """Of the requests that wait, those with the lowest number are served first; equal ones in the order of arrival."""
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: Text | None = None
    guided_choice: Annotated[list[Text], Field(min_length=1, max_length=1024)] | None = None
    guided_grammar: Text | None = None

    @model_validator(mode="after")
    def _fits_a_stream(self) -> CommonRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: allowed only with stream=true")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs: allowed only without stream")
        return self

    @property
    def choices(self) -> int:
        """Continuations of each prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_all_usage(self) -> bool:
        """Whether every chunk has the usage until then."""
        return self.wants_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionRequest(CommonRequest):
    """Continue prompts."""

    prompt: Prompts
    """Text, token ids, or a list of these."""
    max_tokens: Annotated[int, Field(ge=0, lt=_INT64)] | None = 16
    """New tokens at most; 0, with echo, returns only the prompt."""
    echo: bool | None = False
    logprobs: Top | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    """Left out, or equal to n."""
    suffix: None = None
    """Isn't supported."""

    @model_validator(mode="after")
    def _supported(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 is allowed only with echo=true")
        if self.best_of is not None and self.best_of != self.choices:
            raise ValueError(f"best_of: isn't supported; allowed: the value of n, {self.choices}")
        return self


class ContentPart(BaseModel):
    """A part of a message's content. Only text is supported."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _has_its_text(self) -> ContentPart:
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type {self.type!r} needs {self.type!r}")
        return self

    @property
    def words(self) -> str:
        return (self.text if self.type == "text" else self.refusal) or ""


class FunctionCall(BaseModel):
    """The call of a tool's function in an earlier answer."""

    model_config = ConfigDict(extra="ignore")
    name: Name
    arguments: str | dict[str, Any]
    """A JSON object, or its text."""


class MessageToolCall(BaseModel):
    """A tool call in an earlier answer."""

    model_config = ConfigDict(extra="ignore")
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """A message of a chat. Fields that the model's template has no use for are ignored, as answers come back with them."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @property
    def text(self) -> str | None:
        """The content as one text."""
        if isinstance(self.content, list):
            return "\n".join(part.words for part in self.content)
        return self.content


class FunctionDefinition(_Body):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of its arguments."""
    strict: bool | None = None


class Tool(_Body):
    """A tool that the model may use."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(_Body):
    name: Name


class NamedTool(_Body):
    """The one tool that the model has to call."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchemaFormat(_Body):
    name: Name
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(_Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("type 'json_schema' needs json_schema, and the other types have none")
        return self


class ChatRequest(CommonRequest):
    """Answer a chat."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    """New tokens at most; by default, and at most, what fits."""
    logprobs: bool | None = False
    top_logprobs: Top | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=1024)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    """A variable of the chat template."""
    modalities: list[Literal["text"]] | None = None
    """Only text is supported."""
    audio: None = None
    functions: None = None
    """Isn't supported: use tools."""
    function_call: None = None
    """Isn't supported: use tool_choice."""
    web_search_options: None = None
    prediction: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    verbosity: str | None = None
    """These, from prediction on, change nothing."""

    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template."""
    add_generation_prompt: bool | None = None
    """End the prompt with the beginning of an answer; by default, unless continue_final_message."""
    continue_final_message: bool | None = False
    """Go on with the last message."""
    include_reasoning: bool | None = True
    """Return the reasoning, where the model has some."""

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message: allowed only without add_generation_prompt")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: allowed only with logprobs=true")
        forced = self.tool_choice not in (None, "none", "auto")
        if forced and not self.tools:
            raise ValueError("tool_choice: allowed only with tools")
        if isinstance(self.tool_choice, NamedTool):
            names = [tool.function.name for tool in self.tools or ()]
            if self.tool_choice.function.name not in names:
                raise ValueError(f"tool_choice: allowed: a tool of this request: {', '.join(names)[:500]}")
        return self


class TokenizeRequest(_Body):
    """Tokenize a prompt, or a chat in the model's template."""

    model: Name | None = None
    prompt: Text | None = None
    add_special_tokens: bool | None = True
    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)] | None = None
    tools: Annotated[list[Tool], Field(max_length=1024)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give one of prompt and messages")
        return self


class DetokenizeRequest(_Body):
    """The text of tokens."""

    model: Name | None = None
    tokens: Annotated[list[Token], Field(max_length=1_000_000)]


def field_names(*models: type[BaseModel]) -> Iterator[str]:
    """The names of all fields of types, and of the types within them."""
    seen: set[type[BaseModel]] = set()
    waiting = list(models)
    while waiting:
        model = waiting.pop()
        if model in seen:
            continue
        seen.add(model)
        for name, field in model.model_fields.items():
            yield field.alias or name
            waiting += _models_in(field.annotation)


def _models_in(kind: Any) -> list[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [model for inner in getattr(kind, "__args__", ()) for model in _models_in(inner)]


FIELDS = frozenset(field_names(CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest))
