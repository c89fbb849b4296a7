"""``/v1/completions`` over HTTP: what clients of OpenAI's API expect, streamed and whole."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.serve.request_settings import grammar_of
from cluster.serve.schema import CompletionRequest
from epslots.generation.grammar import GrammarCompiler
from epslots.generation.requests import Grammar
from tests.support.http_service import COMPLETIONS, Client
from tests.support.scripted_cluster import SAYS, ScriptedCluster, scored
from tests.support.tokenizers import TOKENIZERS, byte_level

TOKENIZER = TOKENIZERS["bytes"]
TOKENS = TOKENIZER.encode(SAYS, add_special_tokens=False)


def both_ways(client: Client, body: dict[str, Any]) -> tuple[Any, list[Any]]:
    """An answer whole, and the events of its stream."""
    whole = client.post(COMPLETIONS, body)
    stream = client.post(COMPLETIONS, body | {"stream": True, "stream_options": {"include_usage": True}})
    assert (whole.status, stream.status) == (200, 200), whole.body
    return whole.json, stream.events


def joined(events: list[Any]) -> dict[int, dict[str, Any]]:
    """The choices of a stream."""
    found: dict[int, dict[str, Any]] = {}
    for event in events:
        for choice in event["choices"]:
            one = found.setdefault(choice["index"], {"text": "", "tokens": [], "offsets": [], "reasons": []})
            one["text"] += choice["text"]
            one["reasons"] += [choice["finish_reason"]] if choice["finish_reason"] else []
            if choice["logprobs"]:
                one["tokens"] += choice["logprobs"]["tokens"]
                one["offsets"] += choice["logprobs"]["text_offset"]
    return found


def test_a_prompt_is_continued(client: Client):
    reply = client.post(COMPLETIONS, {"model": "scripted", "prompt": "def f(", "max_tokens": 5})
    assert reply.status == 200
    body = reply.json
    assert body["choices"] == [{"index": 0, "text": TOKENIZER.decode(TOKENS[:5]), "logprobs": None, "finish_reason": "length"}]
    assert (body["object"], body["model"]) == ("text_completion", "scripted")
    assert body["id"] == f"cmpl-{reply.headers['x-request-id']}"
    prompt = len(TOKENIZER("def f(").input_ids)
    assert body["usage"] == {"prompt_tokens": prompt, "completion_tokens": 5, "total_tokens": prompt + 5}


def test_the_end_token_ends_it(client: Client):
    body = client.post(COMPLETIONS, {"prompt": "a", "max_tokens": 100}).json
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == (SAYS, "stop")
    assert body["usage"]["completion_tokens"] == len(TOKENS) + 1


def test_a_stream_is_the_whole_in_parts(client: Client):
    """Texts, reasons and usage; n > 1 and several prompts, each counted once."""
    body = {"prompt": ["a", "bb", [5, 6, 7]], "n": 2, "max_tokens": 4, "temperature": 0.5}
    whole, events = both_ways(client, body)
    parts = joined(events)
    assert [choice["index"] for choice in whole["choices"]] == list(range(6)) == sorted(parts)
    for choice in whole["choices"]:
        part = parts[choice["index"]]
        assert (part["text"], part["reasons"]) == (choice["text"], [choice["finish_reason"]])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert {str(event["usage"]) for event in events[:-1]} == {"None"}
    prompts = [len(TOKENIZER(text).input_ids) for text in ("a", "bb")]
    assert whole["usage"] == {"prompt_tokens": sum(prompts) + 3, "completion_tokens": 24, "total_tokens": sum(prompts) + 27}


def test_a_stream_has_usage_only_if_asked(client: Client):
    for options in ({}, {"stream_options": {}}, {"stream_options": {"include_usage": False}}, {"stream_options": None}):
        events = client.post(COMPLETIONS, {"prompt": "a", "stream": True, **options}).events
        assert not any("usage" in event for event in events)
    events = client.post(
        COMPLETIONS,
        {
            "prompt": "a",
            "max_tokens": 3,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    ).events
    assert [event["usage"]["completion_tokens"] for event in events] == sorted(
        event["usage"]["completion_tokens"] for event in events
    )
    assert events[-1]["usage"]["completion_tokens"] == 3


def test_a_stop_string_across_chunks(client: Client):
    """It ends streamed and whole text at the same place, and isn't a part of it."""
    for stop in ("two thr", ["zzz", "two thr"]):
        whole, events = both_ways(client, {"prompt": "a", "max_tokens": 100, "stop": stop})
        assert whole["choices"][0]["text"] == "one " == joined(events)[0]["text"]
        assert whole["choices"][0]["finish_reason"] == "stop"


def test_settings_reach_the_engine(client: Client, cluster: ScriptedCluster):
    client.post(
        COMPLETIONS,
        {
            "prompt": "a", "max_tokens": 9, "temperature": 0.25, "top_p": 0.5, "top_k": -1, "min_p": 0.125, "seed": -1,
            "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.5, "min_tokens": 2,
            "logit_bias": {"5": -100, "6": 1.5}, "stop_token_ids": [9, 8],
        },
    )  # fmt: skip
    (request,) = cluster.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.25, 0.5, 0, 0.125)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, -0.5, 1.5)
    assert (sampling.min_tokens, sampling.seed) == (2, 2**63 - 1)
    assert sampling.logit_bias == ((5, -100.0), (6, 1.5))
    assert request.stop_tokens == {8, 9} | cluster.end_tokens, "beside the model's own"
    assert request.max_new_tokens == 9


def test_defaults_are_openais(client: Client, cluster: ScriptedCluster):
    """16 new tokens, temperature 1, another seed each time."""
    for _ in range(2):
        client.post(COMPLETIONS, {"prompt": "a"})
    first, second = cluster.requests
    assert (first.max_new_tokens, first.sampling.temperature, first.sampling.top_p) == (16, 1.0, 1.0)
    assert first.sampling.seed != second.sampling.seed
    assert first.stop_tokens == cluster.end_tokens


def test_null_is_the_default(client: Client, cluster: ScriptedCluster):
    """Clients send null for what their caller left out."""
    names = (
        "max_tokens temperature top_p top_k min_p n seed stop stream logit_bias presence_penalty frequency_penalty user echo "
        "logprobs best_of suffix repetition_penalty ignore_eos min_tokens stop_token_ids truncate_prompt_tokens priority"
    )
    body = {"prompt": "a"} | dict.fromkeys(names.split())
    assert client.post(COMPLETIONS, body).status == 200
    assert cluster.requests[0].max_new_tokens == 512 - len(cluster.requests[0].prompt), "as many as fit"


def test_ignore_eos_leaves_the_other_ends(client: Client, cluster: ScriptedCluster):
    client.post(COMPLETIONS, {"prompt": "a", "ignore_eos": True})
    client.post(COMPLETIONS, {"prompt": "a", "ignore_eos": True, "stop_token_ids": [9]})
    assert [request.stop_tokens for request in cluster.requests] == [frozenset(), {9}]


def test_a_priority_is_passed_on(client: Client, cluster: ScriptedCluster):
    client.post(COMPLETIONS, {"prompt": "a", "priority": -7, "n": 2})
    client.post(COMPLETIONS, {"prompt": "a"})
    assert [request.priority for request in cluster.requests] == [-7, -7, 0]


def test_log_probabilities_of_new_tokens(client: Client):
    whole, events = both_ways(client, {"prompt": "a", "max_tokens": 3, "logprobs": 2})
    found = whole["choices"][0]["logprobs"]
    texts = [TOKENIZER.decode([token]) for token in TOKENS[:3]]
    assert found["tokens"] == texts == joined(events)[0]["tokens"]
    assert found["token_logprobs"] == [scored(token, 2).logprob for token in TOKENS[:3]]
    assert found["text_offset"] == [0, len(texts[0]), len(texts[0] + texts[1])] == joined(events)[0]["offsets"]
    for token, top in zip(TOKENS, found["top_logprobs"], strict=False):
        assert top[TOKENIZER.decode([token])] == scored(token, 2).logprob, "the token's own is among them"


def test_no_likeliest_tokens_but_the_chosen_one(client: Client):
    found = client.post(COMPLETIONS, {"prompt": "a", "max_tokens": 2, "logprobs": 0}).json["choices"][0]["logprobs"]
    assert [len(top) for top in found["top_logprobs"]] == [1, 1]


@pytest.mark.parametrize("new", [0, 1])
def test_an_echo_with_log_probabilities(client: Client, new: int):
    """As lm-eval asks for them: the prompt's tokens, the first one without; the new token, if one is asked for."""
    prompt = [5, 6, 7, 8]
    body = {"prompt": prompt, "max_tokens": new, "echo": True, "logprobs": 1, "n": 2, "temperature": 1}
    whole, events = both_ways(client, body)
    for choice in whole["choices"]:
        found = choice["logprobs"]
        assert choice["text"] == TOKENIZER.decode(prompt) + TOKENIZER.decode(TOKENS[:new])
        assert found["token_logprobs"][:4] == [None, *(scored(token, 1).logprob for token in prompt[1:])]
        assert found["top_logprobs"][0] is None
        assert [len(found[name]) for name in found] == [4 + new] * 4
        part = joined(events)[choice["index"]]
        assert (part["text"], part["tokens"]) == (choice["text"], found["tokens"])
        assert part["reasons"] == ["length"]
    assert whole["usage"]["completion_tokens"] == 2 * new


def test_an_echo_is_the_prompt_as_given(client: Client):
    whole, events = both_ways(client, {"prompt": ["def  f(", "b"], "max_tokens": 1, "echo": True})
    assert [choice["text"] for choice in whole["choices"]] == [
        text + TOKENIZER.decode(TOKENS[:1]) for text in ("def  f(", "b")
    ]
    assert joined(events)[0]["text"] == whole["choices"][0]["text"]


def test_a_prompt_is_truncated_from_its_beginning(client: Client, cluster: ScriptedCluster):
    long = list(range(5, 505)) * 4
    client.post(COMPLETIONS, {"prompt": long, "truncate_prompt_tokens": 3, "max_tokens": 2})
    client.post(COMPLETIONS, {"prompt": long, "truncate_prompt_tokens": -1, "max_tokens": 2})
    assert [request.prompt for request in cluster.requests] == [tuple(long[-3:]), tuple(long[-510:])]


@pytest.mark.parametrize(
    ("given", "setting"),
    [
        ({"guided_json": {"type": "object"}}, ("json_schema", '{"type":"object"}')),
        ({"guided_regex": "a+"}, ("regex", "a+")),
        ({"guided_choice": ["yes", 'n"o']}, ("lark", 'start: CHOICE\nCHOICE: "yes" | "n\\"o"')),
        ({"guided_grammar": 'start: "a"'}, ("lark", 'start: "a"')),
        ({"structured_outputs": {"json": {"type": "object"}}}, ("json_schema", '{"type":"object"}')),
        ({"structured_outputs": {"json_object": True}}, ("json_object", "")),
        ({"structured_outputs": {"choice": ["a"]}}, ("lark", 'start: CHOICE\nCHOICE: "a"')),
    ],
)
def test_grammars_of_vllms_names(client: Client, cluster: ScriptedCluster, given: Any, setting: tuple[str, str]):
    assert client.post(COMPLETIONS, {"prompt": "a", **given}).status == 200
    grammar = cluster.requests[0].grammar
    assert grammar is not None
    assert (grammar.kind, grammar.text) == setting


def test_all_choices_that_are_allowed_fit_a_grammar():
    choices = [f'{number} "of\n" é😀\x7f' for number in range(1024)]
    (text,) = grammar_of(CompletionRequest(prompt="a", guided_choice=choices)).values()
    compiler, grammar = GrammarCompiler(byte_level(), 257, (256,)), Grammar("lark", text)
    ends = {}
    for choice in ("1023", choices[1023], choices[0]):
        state = compiler.start(grammar, frozenset((256,)), choice.encode())
        assert state.error is None
        ends[choice] = bool(state.allowed()[256 // 32] & 1)
    assert ends == {"1023": False, choices[1023]: True, choices[0]: True}


def test_a_prompts_log_probabilities(client: Client):
    """vLLM's: of each prompt, by token id; they come beside an echo's."""
    body = {"prompt": [[5, 6, 7], [8]], "n": 2, "temperature": 1, "max_tokens": 1, "prompt_logprobs": 2}
    first = [None, *({str(token): {"logprob": scored(token, 2).logprob, "rank": 1, "decoded_token": TOKENIZER.decode([token])},
                      str(token + 1): {"logprob": scored(token, 2).logprob - 1, "rank": 2,
                                       "decoded_token": TOKENIZER.decode([token + 1])}} for token in (6, 7))]  # fmt: skip
    for more in ({}, {"echo": True}, {"echo": True, "logprobs": 1}):
        choices = client.post(COMPLETIONS, body | more).json["choices"]
        assert [choice["prompt_logprobs"] for choice in choices] == [first, first, [None], [None]]
    own = client.post(COMPLETIONS, body | {"prompt_logprobs": 0, "n": 1}).json["choices"][0]["prompt_logprobs"]
    assert own[1] == {"6": {"logprob": scored(6, 0).logprob, "rank": None, "decoded_token": TOKENIZER.decode([6])}}
