"""Thousands of bodies that no client should send: none is a server error, and every answer is one that the page describes.

``EPSLOTS_FUZZ_BODIES=100000 pytest tests/serve/test_fuzz.py`` tries more.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from cluster.serve import answer_schema as answers
from cluster.serve.app import create_app
from cluster.serve.auth import ApiKeys
from cluster.serve.config import ServeConfig
from cluster.serve.errors import MOST_MESSAGE_CHARS, TYPES
from cluster.serve.schema import FIELDS
from cluster.serve.service import Service
from tests.support.asgi_client import ask_app
from tests.support.http_service import CHAT, COMPLETIONS, TEMPLATE, Reply
from tests.support.scripted_cluster import ScriptedCluster

BODIES = int(os.environ.get("EPSLOTS_FUZZ_BODIES", "10000"))
AT_A_TIME = 100
HELLO = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]
COMMON = {
    "model": "m", "max_tokens": 2, "n": 2, "temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": 3,
    "stop": ["z"],
    "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.5, "logit_bias": {"5": 2}, "min_tokens": 1,
    "ignore_eos": True, "stop_token_ids": [9], "truncate_prompt_tokens": 5, "stream_options": {"include_usage": True},
    "guided_json": SCHEMA, "guided_regex": "a+", "structured_outputs": {"choice": ["a", "b"]}, "prompt_logprobs": 1,
}  # fmt: skip
BASES: dict[str, dict[str, Any]] = {
    COMPLETIONS: COMMON | {"prompt": ["a", [5, 6]], "echo": True, "logprobs": 2, "best_of": 2, "suffix": None},
    CHAT: COMMON | {
        "messages": [*HELLO, {"role": "assistant", "content": [{"type": "text", "text": "so"}]}], "logprobs": True,
        "top_logprobs": 1, "tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"},
        "chat_template_kwargs": {"style": "brief"}, "continue_final_message": True, "reasoning_effort": "low",
    },
    "/tokenize": {"prompt": "a", "messages": HELLO, "tools": TOOLS, "add_special_tokens": False, "return_token_strs": True},
    "/detokenize": {"tokens": [5, 6]},
}  # fmt: skip
NEEDED = {COMPLETIONS: "prompt", CHAT: "messages", "/tokenize": "prompt", "/detokenize": "tokens"}
ANSWERS: dict[str, type[BaseModel]] = {
    COMPLETIONS: answers.Completion,
    CHAT: answers.ChatCompletion,
    "/tokenize": answers.Tokenized,
    "/detokenize": answers.Detokenized,
}
LEAKS = re.compile(r"Traceback|File \"|/(?:usr|tmp|root|home|etc)/|site-packages|0x[0-9a-f]{6}")
deep: Any = 1
for _ in range(60):
    deep = [deep]
STRANGE = [json.dumps(value) for value in (
    None, True, False, 0, 1, -1, 2, 20, 2**31, 2**63, -(2**63) - 1, 10**25, 0.5, -0.0, 1e308, 5e-324, "", "a", "5", "auto",
    "\0",
    "\u2028é𐍈", "x" * 3000, "{}", "[1", [], [[]], {}, {"a": 1}, {"": None}, [1, 2], ["a"], [None], [True], [2**40], deep,
    [[5], "a", [[]]], {"type": "object"}, {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}, {"type": []},
    HELLO, [{"role": "user", "content": [{"type": "input_audio"}]}], [{"role": []}], {"$ref": "file:///secrets"},
)]  # fmt: skip


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """All places in a JSON value: pairs of a container and a key."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *places_in(value[key]))]


def strange_body(chance: random.Random, path: str) -> bytes:
    """A valid body of some fields, with some values replaced, and sometimes with some bytes changed."""
    base = json.loads(json.dumps(BASES[path]))
    body = {name: base[name] for name in base if name == NEEDED[path] or chance.random() < 0.12}
    if chance.random() < 0.2:
        body["stream"] = True
    for _ in range(chance.choice((0, 1, 1, 2))):
        container, key = chance.choice(places_in(body))
        container[key] = json.loads(chance.choice(STRANGE))
    if chance.random() < 0.1:
        body[chance.choice((*sorted(FIELDS), "x", "chat_template"))] = json.loads(chance.choice(STRANGE))
    data = json.dumps(body, ensure_ascii=chance.random() < 0.5).encode()
    if chance.random() < 0.1:
        at = chance.randrange(len(data))
        data = data[:at] + chance.choice((b"", b"\xff", b'"', b"}", b"\\ud800", b"NaN", b"1e999", b"\0")) + data[at + 1 :]
    return data


@pytest.fixture(scope="module")
def there() -> Iterator[tuple[asyncio.Runner, Any, Service, ScriptedCluster]]:
    with ScriptedCluster(places=10_000) as cluster, asyncio.Runner() as runner:
        config = ServeConfig(names=("m",), chat_template=TEMPLATE, log_requests=False)
        service = Service(config)
        service.attach(cluster)
        yield runner, create_app(service, ApiKeys(), local=True), service, cluster
        service.close()


def check(path: str, body: bytes, reply: Reply, statuses: frozenset[int]) -> None:
    """An answer is one that the page describes, and an error says what is wrong and nothing else."""
    assert reply.status in statuses - {500, 503}, (path, body, reply.body)
    if reply.status != 200:
        error = reply.error
        assert error["type"] == TYPES[reply.status]
        assert 0 < len(error["message"]) <= MOST_MESSAGE_CHARS + 3
        assert not LEAKS.search(error["message"])
        if error["param"]:
            assert error["param"].partition(".")[0] in error["message"], (body, error)
    elif reply.headers["content-type"] == "application/json":
        ANSWERS[path].model_validate_json(reply.body)
    else:
        assert all("error" not in event for event in reply.events), (body, reply.body)


def test_thousands_of_bodies(there: tuple[asyncio.Runner, Any, Service, ScriptedCluster]):
    runner, app, service, cluster = there
    page = runner.run(ask_app(app, "GET", "/openapi.json")).json
    documented = {path: frozenset(map(int, page["paths"][path]["post"]["responses"])) for path in BASES}
    found: Counter[int] = Counter()

    @settings(max_examples=BODIES // AT_A_TIME, database=None, phases=[Phase.generate])
    @given(st.integers(0, 2**64))
    def try_some(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(AT_A_TIME):
            path = chance.choice(list(BASES))
            body = strange_body(chance, path)
            reply = runner.run(ask_app(app, "POST", path, body))
            found[reply.status] += 1
            check(path, body, reply, documented[path])

    try_some()
    assert found.total() >= BODIES
    assert found[200] > BODIES // 10, "many are served"
    assert found[400] > BODIES // 10, "and many are not"
    assert (service.running, cluster.state().running) == (0, 0), "nothing is left of them"
