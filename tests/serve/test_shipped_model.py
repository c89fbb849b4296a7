"""The shipped model over HTTP: texts and log-probabilities are those of Python's API and of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.api import Cluster
from epslots.example import example_model
from tests.support import zoo
from tests.support.fake_backend import FakeBackend
from tests.support.grouped_ranks import TOKENS_TRAVEL
from tests.support.http_service import CHAT, COMPLETIONS, Client, serving
from tests.support.rank_helpers import PATIENCE_S

PROMPTS = ["def read(path):\n", "import os\n", "class Point:\n    def __init__(self, ", "for line in "]


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Cluster]]:
    stores: Path = tmp_path_factory.mktemp("stores")
    with (
        Cluster(
            example_model(),
            ranks=2,
            backend=FakeBackend(),
            cache_dir=stores,
            progress=False,
            slots=4,
            dtype="float32",
            kv_tokens=2048,
            costs=TOKENS_TRAVEL,
            silence_s=PATIENCE_S,
        ) as cluster,
        serving(cluster) as client,
    ):
        yield client, cluster


def test_texts_are_those_of_python(there: tuple[Client, Cluster]):
    """Greedy; many at once, streamed and whole."""
    client, cluster = there
    right = {result.index: result.text for result in cluster.generate(PROMPTS, max_new_tokens=24)}

    def ask(number: int) -> str:
        body = {"prompt": PROMPTS[number % 4], "max_tokens": 24, "temperature": 0, "stream": number >= 4}
        reply = client.post(COMPLETIONS, body)
        assert reply.status == 200
        events = reply.events if body["stream"] else [reply.json]
        return "".join(choice["text"] for event in events for choice in event["choices"])

    with ThreadPoolExecutor(8) as pool:
        for number, text in enumerate(pool.map(ask, range(8))):
            assert text == right[number % 4]


def test_a_seed_makes_the_same_texts_again(there: tuple[Client, Cluster]):
    client, _ = there
    body = {"prompt": PROMPTS[0], "max_tokens": 12, "temperature": 1, "seed": 7, "n": 3}
    first, second = (client.post(COMPLETIONS, body).json["choices"] for _ in range(2))
    assert first == second
    assert len({choice["text"] for choice in first}) > 1


def test_log_probabilities_are_transformers(there: tuple[Client, Cluster]):
    """Of a prompt that is echoed, as evaluations ask for it, and of the new tokens."""
    client, cluster = there
    prompt = cluster.encode(PROMPTS[0])
    body = {"prompt": prompt, "max_tokens": 3, "temperature": 0, "echo": True, "logprobs": 2}
    choice = client.post(COMPLETIONS, body).json["choices"][0]
    found = choice["logprobs"]
    reference = zoo.reference(example_model())
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(3):
            ids = torch.cat((ids, reference(ids).logits[:, -1:].argmax(-1)), dim=1)
        right = torch.log_softmax(reference(ids).logits[0].float(), -1)
    chosen = [right[place, token].item() for place, token in enumerate(ids[0, 1:].tolist())]
    assert found["token_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(chosen, abs=1e-4)
    best = right[:-1].max(-1).values.tolist()
    assert [max(top.values()) for top in found["top_logprobs"][1:]] == pytest.approx(best, abs=1e-4)
    assert choice["text"] == "".join(found["tokens"]) == PROMPTS[0] + choice["text"].removeprefix(PROMPTS[0])


def test_an_answer_follows_its_schema(there: tuple[Client, Cluster]):
    client, _ = there
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2}},
        "required": ["ok", "tags"],
        "additionalProperties": False,
    }
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "hi"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        "max_tokens": 60,
        "seed": 3,
    }
    choice = client.post(CHAT, body).json["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert json.loads(choice["message"]["content"]).keys() == {"ok", "tags"}
    cut = client.post(CHAT, body | {"max_tokens": 2}).json["choices"][0]
    assert cut["finish_reason"] == "length"
    chosen = client.post(COMPLETIONS, {"prompt": "a", "guided_choice": ["yes", "no"], "seed": 1}).json["choices"][0]
    assert chosen["text"] in ("yes", "no")


def test_the_ranks_numbers_are_metrics(there: tuple[Client, Cluster]):
    client, cluster = there
    page = client.get("/metrics").body.decode()
    stats = cluster.stats()
    line = next(line for line in page.splitlines() if line.startswith("epslots:expert_hits_total{"))
    assert 0 < float(line.split()[-1]) <= stats.total.hits
    assert 'epslots:ranks{model_name="scripted"} 2.0' in page


def test_extreme_settings_are_served(there: tuple[Client, Cluster]):
    """The least and the largest numbers that are allowed: no overflow ends a request."""
    client, _ = there
    some = [{str(token): sign * 100 for token in range(1024)} for sign in (-1, 1)]
    for more in (
        {"temperature": 5e-324}, {"temperature": 1e6}, {"temperature": 5e-324, "repetition_penalty": 5e-324},
        {"top_p": 5e-324}, {"min_p": 1}, {"repetition_penalty": 1000, "temperature": 1e6},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"top_k": 2**63 - 1, "logit_bias": some[0]}, {"temperature": 5e-324, "logit_bias": some[1]}, {"logprobs": 20},
    ):  # fmt: skip
        reply = client.post(COMPLETIONS, {"prompt": "def f(", "max_tokens": 3, **more})
        assert reply.status == 200, (more, reply.body)


def test_a_grammar_without_a_text_is_refused(there: tuple[Client, Cluster]):
    client, _ = there
    for name, given in (("guided_grammar", "start: start"), ("guided_json", {"$ref": "#"})):
        reply = client.post(COMPLETIONS, {"prompt": "a", name: given})
        assert (reply.status, reply.error["param"]) == (400, name)
        assert "no token of the vocabulary continues the text" in reply.error["message"]
