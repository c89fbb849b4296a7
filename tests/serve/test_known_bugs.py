"""The table of ``known_bugs.md`` is true; and those of its bugs that no other test is about."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.http_service import CHAT, COMPLETIONS, Client, serving
from tests.support.scripted_cluster import ScriptedCluster
from tests.support.tokenizers import TOKENIZERS

TEXT = "Ω 𐍈𐍈 né\u0301 日本 👩‍👩‍👧"
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with ScriptedCluster(TEXT) as cluster, serving(cluster) as client:
        yield client


def test_the_table_names_tests_that_exist():
    folder = Path(__file__).parent
    lines = (folder / "known_bugs.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")][2:]
    there = {name for path in folder.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
    assert len(rows) >= 25
    for _, reported, tests in rows:
        assert re.search(r"\w \d+", reported)
        named = re.findall(r"test_\w+", tests)
        assert named and set(named) <= there, tests


def test_characters_are_whole_in_streams(client: Client):
    """Most of these characters are several tokens."""
    assert len(TOKENIZERS["bytes"].encode(TEXT)) > len(TEXT)
    for path, more in ((COMPLETIONS, {"prompt": "a", "max_tokens": 99}), (CHAT, {"messages": HELLO})):
        parts = [
            choice.get("text") or choice.get("delta", {}).get("content") or ""
            for event in client.post(path, {"stream": True, **more}).events
            for choice in event["choices"]
        ]
        assert "".join(parts) == TEXT
        assert not any("\ufffd" in part for part in parts)


def test_bytes_of_partial_characters_are_exact(client: Client):
    """All of them together are the text's, for any text of a single token."""
    body: Any = {"messages": HELLO, "logprobs": True}
    content = client.post(CHAT, body).json["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(each["bytes"]) for each in content).removesuffix(b"<eos>").decode().startswith(TEXT)
    partial = [each for each in content if each["token"].startswith("bytes:")]
    assert partial
    for each in partial:
        assert each["token"] == "bytes:" + "".join(f"\\x{byte:02x}" for byte in each["bytes"])


def test_an_empty_bias_changes_nothing(client: Client):
    assert client.post(COMPLETIONS, {"prompt": "a", "logit_bias": {}}).status == 200
