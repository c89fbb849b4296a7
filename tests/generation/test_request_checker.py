"""What a cluster refuses before any work is done, in a time that doesn't grow with what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from cluster.api import _tokenizer_of
from cluster.generation import MOST_STOP_TOKENS, GenerationSettings, read_settings
from cluster.messages.rank import Loaded
from cluster.request_checker import RequestChecker
from epslots.errors import ConfigError
from epslots.example import example_model
from epslots.generation.text import MOST_STOP_CHARS, MOST_STOP_STRINGS, encode_prompt, load_tokenizer

LOADED = Loaded(capacity=500, batches=True, vocabulary=2048, context=400, end_tokens=(7,), seconds={})
TOKENIZER = load_tokenizer(example_model())
SETTINGS = GenerationSettings(max_new_tokens=10)


def checker(tokenizer: PreTrainedTokenizerBase | None = TOKENIZER, **loaded: Any) -> RequestChecker:
    values = {name: getattr(LOADED, name) for name in Loaded.__struct_fields__}
    return RequestChecker(Loaded(**(values | loaded)), tokenizer)


class Untouched(Sequence[int]):
    """A prompt that says how long it is, and that nobody may read."""

    def __len__(self) -> int:
        return 10**8

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("it was read")


@pytest.mark.parametrize("prompt", [Untouched(), range(10**12), [5] * 391, bytes(1000)])
def test_token_ids_are_counted_before_they_are_read(prompt: Any):
    with pytest.raises(
        ConfigError, match=r"the prompt has \d+ tokens and max_new_tokens is 10, but the model's context holds 400"
    ):
        checker().request(prompt, SETTINGS)
    with pytest.raises(ConfigError, match="but a rank's cache holds 100"):
        checker(context=None, capacity=100).request(prompt, SETTINGS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x" * 20_000_000, "a prompt of 20,000,000 characters; at most 65,536 are read where 390 tokens fit"),
        ("def f(x):\n" * 6_000, r"the prompt has \d+ tokens and max_new_tokens is 10, but the model's context holds 400"),
        ("", "allowed: text that isn't empty"),
        ("a\udfff" + "b" * 10**5, "at most 65,536 are read"),
        ("a\udfff" + "b" * 5000, "character 1 is half of a pair"),
    ],
)
def test_long_text_is_refused_before_it_is_tokenized(text: str, message: str, monkeypatch: pytest.MonkeyPatch):
    longest = 0
    encode = type(TOKENIZER)._encode_plus

    def watched(self: Any, text: Any, *arguments: Any, **settings: Any) -> Any:
        nonlocal longest
        longest = max(longest, len(text))
        return encode(self, text, *arguments, **settings)

    monkeypatch.setattr(type(TOKENIZER), "_encode_plus", watched)
    with pytest.raises(ConfigError, match=message) as caught:
        checker().request(text, SETTINGS)
    assert longest <= 2**16
    assert len(str(caught.value)) < 300


def test_of_long_text_that_might_fit_a_part_is_tokenized_first(monkeypatch: pytest.MonkeyPatch):
    fits = "\t" * 100 + "=" * 70_000  # tokens of many characters
    assert len(encode_prompt(TOKENIZER, fits)) < 20_000
    assert encode_prompt(TOKENIZER, fits, most_tokens=20_000) == encode_prompt(TOKENIZER, fits)
    with pytest.raises(ConfigError, match=r"of which the first 80,000 alone have [\d,]+ tokens; 5,000 tokens fit"):
        encode_prompt(TOKENIZER, "def f(x):\n" * 10_000, most_tokens=5_000)


def test_text_prompts_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch):
    """One prompt that takes its time holds up no other."""
    slow, go_on = threading.Event(), threading.Event()
    encode = type(TOKENIZER)._encode_plus

    def waiting(self: Any, text: Any, *arguments: Any, **settings: Any) -> Any:
        if text == "slow":
            slow.set()
            assert go_on.wait(60)
        return encode(self, text, *arguments, **settings)

    monkeypatch.setattr(type(TOKENIZER), "_encode_plus", waiting)
    one, found = checker(), []
    thread = threading.Thread(target=lambda: found.append(one.request("slow", SETTINGS)))
    thread.start()
    assert slow.wait(60)
    assert one.request("quick", SETTINGS)[0].prompt == tuple(TOKENIZER("quick")["input_ids"])
    assert not found
    go_on.set()
    thread.join(60)
    assert found


def test_a_users_tokenizer_is_not_the_one_that_many_threads_use():
    """Setting its padding would fail while another thread tokenizes, and let that fail in turn."""
    tokenizer = load_tokenizer(example_model())
    tokenizer(["a", "a longer one"], padding="max_length", max_length=50, truncation=True)
    one = checker(tokenizer)
    inner: Any = one._tokenizer
    assert inner.backend_tokenizer is not tokenizer.backend_tokenizer
    assert one.request("def f(", SETTINGS)[0].prompt == tuple(TOKENIZER("def f(")["input_ids"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stop": [f"s{n}" for n in range(300_000)]}, f"in a list or a tuple of at most {MOST_STOP_STRINGS}"),
        ({"stop": "x" * (MOST_STOP_CHARS + 1)}, f"at most {MOST_STOP_CHARS}"),
        ({"stop": ["a", ""]}, "at least one character"),
        ({"stop": "ab" * 10**6}, f"at most {MOST_STOP_CHARS}"),
        ({"stop_tokens": [1] * (MOST_STOP_TOKENS + 1)}, f"stop_tokens has 1,025; allowed: at most {MOST_STOP_TOKENS:,}"),
        ({"stop_tokens": "x" * 10**6}, "Expected"),
        ({"max_new_tokens": 10**30}, "max_new_tokens=10{30}; allowed: at least 1"),
        ({"max_new_tokens": 10**5000}, "max_new_tokens=<int>; allowed: at least 1"),
        ({"max_new_tokens": -(10**5000)}, "max_new_tokens=<int>; allowed: at least 1"),
        ({"seed": 10**5000}, "seed=<int>; allowed: an int from 0"),
        ({"seed": -1}, "seed=-1; allowed: an int from 0"),
        ({"top_k": -(10**5000)}, "top_k=<int>; allowed: an int, at least 0"),
        ({"temperature": float("nan")}, "temperature=nan; allowed: a finite number"),
        ({"temperature": float("inf")}, "temperature=inf; allowed: a finite number"),
        ({"temperature": 10**400}, "Number out of range - at"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({f"setting{n}": n for n in range(100_000)}, "no such setting; allowed: max_new_tokens"),
        ({"x" * 10**6: 1}, "no such setting; allowed: max_new_tokens"),
        ({"chat": "x" * 10**6}, "Expected `bool"),
    ],
)
def test_settings_of_any_size_are_refused_in_a_few_words(given: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        read_settings(given)
    assert len(str(caught.value)) < 800


def test_stop_strings_that_never_end_are_refused():
    with pytest.raises(ConfigError):
        read_settings({"stop": itertools.repeat("x")})


@pytest.mark.parametrize("prompt", [None, 3, {5}, [1.5], [True], ["x" * 10**6], object(), {"prompt": {"prompt": [5]}}, {}])
def test_prompts_of_other_kinds_are_refused_in_a_few_words(prompt: Any):
    with pytest.raises(ConfigError) as caught:
        checker().request(prompt, SETTINGS)
    assert len(str(caught.value)) < 300


# --- what ends a text --------------------------------------------------------------------------------------------------------


def ends_of(one: RequestChecker, **settings: Any) -> set[int]:
    return set(one.request([5], GenerationSettings(**settings))[0].stop_tokens)


def test_the_tokenizers_end_token_ends_a_text_as_well():
    one, eos = checker(), TOKENIZER.eos_token_id
    assert eos != 7
    assert ends_of(one) == {7, eos}
    assert ends_of(one, ignore_tokenizer_eos=True) == {7}
    assert ends_of(one, stop_tokens=()) == set()
    assert ends_of(one, stop_tokens=(9,)) == {9}
    assert ends_of(checker(None)) == {7}


def test_end_tokens_that_the_model_has_not_end_nothing():
    """Configurations that name tokens beyond the vocabulary must not have all requests refused."""
    assert ends_of(checker(end_tokens=(7, 5000))) == {7, TOKENIZER.eos_token_id}
    tokenizer = load_tokenizer(example_model())
    tokenizer.eos_token = "<a token that there isn't>"
    assert ends_of(checker(tokenizer)) == {7}


# --- tokenizers that can't be loaded -----------------------------------------------------------------------------------------


def newer(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"] |= {"type": "BPE2"}
    (folder / "tokenizer.json").write_text(json.dumps(data))


def cut_short(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text[: len(text) // 2])


def change(folder: Path, **settings: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "newer": newer,
    "cut short": cut_short,
    "nested": lambda folder: (folder / "tokenizer.json").write_text("[" * 100_000),
    "of bytes": lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff" * 1000),
    "a config of another kind": lambda folder: (folder / "tokenizer_config.json").write_text("[5]"),
    "templates of another kind": lambda folder: change(folder, chat_template=[{"name": "a"}, 5]),
    "a special token of another kind": lambda folder: change(folder, eos_token={"nothing": [5]}),
    "gone": lambda folder: [path.unlink() for path in folder.glob("*token*")],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_bad_tokenizer_costs_text_alone(name: str, tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in example_model().iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    DAMAGES[name](folder)
    with pytest.raises(ConfigError, match="has no tokenizer") as caught:
        load_tokenizer(folder)
    assert len(str(caught.value)) < 800
    assert "\n" not in str(caught.value)
    tokenizer, problem = _tokenizer_of(folder)
    assert tokenizer is None
    one = RequestChecker(LOADED, tokenizer, problem)
    assert one.request([5, 6], SETTINGS)[0].prompt == (5, 6)
    with pytest.raises(ConfigError, match="the checkpoint has no tokenizer; give prompts as token ids") as caught:
        one.request("text", SETTINGS)
    assert problem in str(caught.value)
    with pytest.raises(ConfigError, match="stop: the checkpoint has no tokenizer; use stop_tokens"):
        one.request([5], GenerationSettings(stop="x"))


def test_what_a_tokenizer_raises_is_the_prompts_error(monkeypatch: pytest.MonkeyPatch):
    """Also what those in Rust raise when they panic, which is no Exception."""

    class Panic(BaseException):
        pass

    def fail(*_: Any, **__: Any) -> Any:
        raise Panic("no such index\nin a line")

    monkeypatch.setattr(type(TOKENIZER), "_encode_plus", fail)
    with pytest.raises(ConfigError, match=r"the tokenizer fails on the prompt \(Panic: no such index in a line\)"):
        checker().request("text", SETTINGS)
