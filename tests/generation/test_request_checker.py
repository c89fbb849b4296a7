"""Prompts and settings are refused before any work is done, in a time that grows with their size alone; or become requests."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import PreTrainedTokenizerBase

from cluster.api import _tokenizer_of
from epslots.errors import ConfigError
from epslots.example import example_model
from epslots.generation.request_checker import RequestChecker
from epslots.generation.request_limits import ModelLimits
from epslots.generation.requests import Grammar, Request
from epslots.generation.sampling import Sampling, choice_seed, uniform_numbers
from epslots.generation.settings import MOST_STOP_TOKENS, GenerationSettings, Prompt, read_settings, with_own_settings
from epslots.generation.text import MOST_STOP_CHARS, MOST_STOP_STRINGS, encode_prompt, load_tokenizer

LIMITS = ModelLimits(capacity=500, vocabulary=2048, context=400, end_tokens=(7,))
TOKENIZER = load_tokenizer(example_model())
SETTINGS = GenerationSettings(max_new_tokens=10)


def checker(tokenizer: PreTrainedTokenizerBase | None = TOKENIZER, **limits: Any) -> RequestChecker:
    return RequestChecker(msgspec.structs.replace(LIMITS, **limits), tokenizer)


def request(one: RequestChecker, prompt: Prompt, settings: GenerationSettings = SETTINGS) -> Request:
    """The request of a prompt with one choice."""
    (found,) = one.requests(*with_own_settings(prompt, settings))
    return found


class Untouched(Sequence[int]):
    """A prompt that says how long it is, and refuses to be read."""

    def __len__(self) -> int:
        return 10**8

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("it was read")


@pytest.mark.parametrize("prompt", [Untouched(), range(10**12), [5] * 391, bytes(1000)])
def test_token_ids_are_counted_before_they_are_read(prompt: Any):
    with pytest.raises(
        ConfigError, match=r"the prompt has \d+ tokens and max_new_tokens is 10, but the model's context holds 400"
    ):
        request(checker(), prompt)
    with pytest.raises(ConfigError, match="but a rank's cache holds 100"):
        request(checker(context=None, capacity=100), prompt)


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
        request(checker(), text)
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
    thread = threading.Thread(target=lambda: found.append(request(one, "slow")))
    thread.start()
    assert slow.wait(60)
    assert request(one, "quick").prompt == tuple(TOKENIZER("quick")["input_ids"])
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
    assert request(one, "def f(").prompt == tuple(TOKENIZER("def f(")["input_ids"])


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
        ({"seed": 10**5000}, "seed=<int>; allowed: an int, from 0"),
        ({"seed": -1}, "seed=-1; allowed: an int, from 0"),
        ({"top_k": -(10**5000)}, "top_k=<int>; allowed: an int, at least 0"),
        ({"temperature": float("nan")}, "temperature=nan; allowed: a finite number"),
        ({"temperature": float("inf")}, "temperature=inf; allowed: a finite number"),
        ({"temperature": 10**400}, "Number out of range - at"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"min_p": 1.5}, "min_p=1.5; allowed: a number from 0 to 1"),
        ({"presence_penalty": 3}, "presence_penalty=3.0; allowed: a number from -2 to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty=-3.0; allowed: a number from -2 to 2"),
        ({"repetition_penalty": 0}, "repetition_penalty=0.0; allowed: a number over 0"),
        ({"n": 0}, "n=0; allowed: at least 1, up to 128"),
        ({"n": 129}, "n=129; allowed: at least 1, up to 128"),
        ({"n": 10**5000}, "n=<int>; allowed: at least 1"),
        ({"n": True}, "Expected `int`, got `bool`"),
        ({"min_tokens": -1}, "min_tokens=-1; allowed: an int, at least 0"),
        ({"min_tokens": 129}, "min_tokens=129; allowed: up to max_new_tokens, which is 128"),
        ({"logprobs": 21}, "logprobs=21; allowed: at least 0, up to 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs=-1; allowed: at least 0"),
        ({"logit_bias": dict.fromkeys(range(10**5), 1)}, "logit_bias=.*; allowed: pairs .* at most 1024"),
        ({"logit_bias": {5: float("nan")}}, r"logit_bias=\(\(5, nan\),\); allowed"),
        ({"logit_bias": {"five": 1}}, "Expected `int`"),
        ({"logit_bias": [5]}, "Expected `object"),
        ({"json_schema": True, "regex": "a"}, "json_schema and regex: a text has one grammar at most"),
        ({"regex": "a", "grammar": "start: /a/"}, "regex and grammar: a text has one grammar at most"),
        ({"regex": ""}, "regex=''; allowed: at least one character"),
        ({"grammar": "\ud800"}, "grammar='.*': character 0 is half of a pair"),
        ({"json_schema": False}, "json_schema=False; allowed: a JSON schema"),
        ({"json_schema": "[1]"}, r"json_schema='\[1\]'; allowed: a JSON schema"),
        ({"json_schema": "{" * 10**6}, "json_schema='{+.*; allowed: a JSON schema"),
        ({"json_schema": {"type": object()}}, "json_schema=.*; allowed: a JSON schema, as an object or its text"),
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
        request(checker(), prompt)
    assert len(str(caught.value)) < 300


# --- what ends a text --------------------------------------------------------------------------------------------------------


def ends_of(one: RequestChecker, **settings: Any) -> set[int]:
    return set(request(one, [5], GenerationSettings(**settings)).stop_tokens)


def test_the_tokenizers_end_token_ends_a_text_as_well():
    one, eos = checker(), TOKENIZER.eos_token_id
    assert eos != 7
    assert ends_of(one) == {7, eos}
    assert ends_of(one, ignore_tokenizer_eos=True) == {7}
    assert ends_of(one, stop_tokens=()) == set()
    assert ends_of(one, stop_tokens=(9,)) == {9}
    assert ends_of(one, ignore_eos=True) == set()
    assert ends_of(one, ignore_eos=True, stop_tokens=(9,)) == {9}, "end tokens are ignored, not tokens that the user named"
    assert ends_of(checker(None)) == {7}


def test_end_tokens_that_the_model_has_not_end_nothing():
    """Configurations that name tokens beyond the vocabulary must not have all requests refused."""
    assert ends_of(checker(end_tokens=(7, 5000))) == {7, TOKENIZER.eos_token_id}
    tokenizer = load_tokenizer(example_model())
    tokenizer.eos_token = "<a token that there isn't>"
    assert ends_of(checker(tokenizer)) == {7}


# --- all settings reach the engine's requests --------------------------------------------------------------------------------


def test_each_setting_is_in_the_request():
    """Those of the tokenizer and the driver (chat, stop, n, ends) aside, which have tests of their own."""
    given = {
        "max_new_tokens": 20, "min_tokens": 3, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "seed": 4,
        "presence_penalty": 0.25, "frequency_penalty": 0.75, "repetition_penalty": 1.5, "logit_bias": {"9": 2, "5": -1.5},
        "logprobs": 2, "prompt_logprobs": 0, "stop_tokens": [8],
    }  # fmt: skip
    sampling = Sampling(
        temperature=0.5, top_k=7, top_p=0.9, seed=4, min_p=0.1, presence_penalty=0.25, frequency_penalty=0.75,
        repetition_penalty=1.5, logit_bias=((5, -1.5), (9, 2.0)), min_tokens=3,
    )  # fmt: skip
    assert request(checker(), {"prompt": [5, 6], **given}) == Request(
        "0", (5, 6), 20, frozenset({8}), sampling, logprobs=2, prompt_logprobs=0
    )
    for number in (1, 2**62):
        assert read_settings({"logit_bias": {number: 1}}) == read_settings({"logit_bias": {str(number): 1.0}})


OTHER: dict[str, Any] = {
    "max_new_tokens": 9,
    "min_tokens": 2,
    "n": 2,
    "stop": "x",
    "stop_tokens": (9,),
    "ignore_eos": True,
    "ignore_tokenizer_eos": True,
    "chat": True,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.5,
    "min_p": 0.5,
    "seed": 1,
    "presence_penalty": 1,
    "frequency_penalty": 1,
    "repetition_penalty": 2,
    "logit_bias": {5: 1},
    "json_schema": True,
    "regex": "a+",
    "grammar": "start: /a/",
    "logprobs": 0,
    "prompt_logprobs": 0,
    "priority": 1,
}
"""A value for each setting that is none of the defaults."""


@pytest.mark.parametrize("name", GenerationSettings.__struct_fields__)
def test_no_setting_is_accepted_and_ignored(name: str):
    def outcome(**given: Any) -> object:
        settings = read_settings(given)
        try:
            return [replace(each, id="") for each in checker().requests("text", settings)], settings.stops
        except ConfigError as error:  # this tokenizer has no chat template
            return str(error)

    assert outcome(**{name: OTHER[name]}) != outcome()


@pytest.mark.parametrize(
    ("given", "grammar"),
    [
        ({"json_schema": {"type": "object"}}, Grammar("json_schema", '{"type":"object"}')),
        ({"json_schema": ' {"type": "object"}'}, Grammar("json_schema", ' {"type": "object"}')),
        ({"json_schema": True}, Grammar("json_object", "")),
        ({"json_schema": "true"}, Grammar("json_object", "")),
        ({"regex": "[a-z]+"}, Grammar("regex", "[a-z]+")),
        ({"grammar": 'start: "a" | "b"'}, Grammar("lark", 'start: "a" | "b"')),
        ({}, None),
    ],
)
def test_a_grammar_is_in_the_request(given: dict[str, Any], grammar: Grammar | None):
    settings = read_settings(given)
    assert settings.text_grammar == grammar
    assert request(checker(), [5], settings).grammar == grammar
    if grammar is not None:
        with pytest.raises(ConfigError, match="json_schema, regex and grammar need the tokens' text"):
            request(checker(None), [5], settings)


@pytest.mark.parametrize("given", [{"regex": "("}, {"grammar": "start: nothing"}, {"json_schema": {"type": "no such type"}}])
def test_a_grammar_that_cannot_be_followed_is_refused(given: dict[str, Any]):
    """When the settings are read, so before any prompt is."""
    with pytest.raises(ConfigError) as caught:
        read_settings(given)
    assert len(str(caught.value)) < 800


def mixed(z: int) -> int:
    """SplitMix64's finalizer."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_seeds_of_choices_are_numbers_before_the_drawn_ones():
    stride = 0x9E3779B97F4A7C15
    seeds = [0, 1, 2, 11, 2**32, 2**63 - 1]
    found = {(seed, choice): choice_seed(seed, choice) for seed in seeds for choice in range(128)}
    for (seed, choice), derived in found.items():
        start = mixed((seed + stride) % 2**64)
        assert derived == (mixed((start - choice * stride) % 2**64) >> 1 if choice else seed)
        assert 0 <= derived < 2**63
    assert len(set(found.values())) == len(found)
    # The same generator draws tokens, from position 0 on.
    assert uniform_numbers([11], [3]).tolist() == [(mixed((mixed(11 + stride) + 3 * stride) % 2**64) >> 11) / 2**53]


def test_choices_differ_in_their_seeds_alone():
    one = checker()
    settings = read_settings({"n": 4, "seed": 11, "temperature": 1, "prompt_logprobs": 3, "logprobs": 1})
    requests = one.requests("def f(", settings)
    assert [each.sampling.seed for each in requests] == [choice_seed(11, choice) for choice in range(4)]
    assert requests[0].sampling.seed == 11
    assert [each.prompt_logprobs for each in requests] == [3, None, None, None], "the prompt is computed once"
    alike = [replace(each, id="", sampling=Sampling(), prompt_logprobs=None) for each in requests]
    assert alike == alike[:1] * 4
    assert len({each.id for each in [*requests, *one.requests("x", settings)]}) == 8


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"prompt": [5], "logit_bias": {2048: 1}}, "logit_bias has token 2048; allowed: 0 to 2047"),
        ({"prompt": [5], "logit_bias": {-1: 1}}, "logit_bias=.*; allowed"),
        ({"prompt": [5], "stop_tokens": [2048]}, "stop_tokens has token 2048; allowed: 0 to 2047"),
        ({"prompt": [5], "chat": True}, "chat=True with a prompt of token ids; allowed"),
        ({"prompt": "x", "chat": True}, "this tokenizer has no chat template"),
        ({"prompt": [5], "nn": 2}, "'nn': no such setting; allowed: max_new_tokens, min_tokens, n, stop"),
    ],
)
def test_settings_that_a_model_cannot_follow_are_refused(prompt: Prompt, message: str):
    with pytest.raises(ConfigError, match=message):
        request(checker(), prompt)


def test_a_prompts_own_settings_go_first():
    settings = read_settings({"max_new_tokens": 9, "stop": "a", "n": 2})
    assert with_own_settings("x", settings) == ("x", settings)
    assert with_own_settings({"prompt": "x"}, settings) == ("x", settings)
    own = with_own_settings({"prompt": [5], "n": 1, "stop": ["b"]}, settings)[1]
    assert (own.n, own.stops, own.max_new_tokens) == (1, ("b",), 9)


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
    one = RequestChecker(LIMITS, tokenizer, problem)
    assert request(one, [5, 6]).prompt == (5, 6)
    with pytest.raises(ConfigError, match="the checkpoint has no tokenizer; give prompts as token ids") as caught:
        request(one, "text")
    assert problem in str(caught.value)
    with pytest.raises(ConfigError, match="stop: the checkpoint has no tokenizer; use stop_tokens"):
        request(one, [5], GenerationSettings(stop="x"))


def test_what_a_tokenizer_raises_is_the_prompts_error(monkeypatch: pytest.MonkeyPatch):
    """Also what those in Rust raise when they panic, which is no Exception."""

    class Panic(BaseException):
        pass

    def fail(*_: Any, **__: Any) -> Any:
        raise Panic("no such index\nin a line")

    monkeypatch.setattr(type(TOKENIZER), "_encode_plus", fail)
    with pytest.raises(ConfigError, match=r"the tokenizer fails on the prompt \(Panic: no such index in a line\)"):
        request(checker(), "text")
