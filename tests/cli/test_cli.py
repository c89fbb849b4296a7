"""The command line as its users meet it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import epslots
from cluster.api import Cluster
from cluster.job.command import app as job_app
from epslots import UnsupportedModelError, cli
from epslots.cli import extensions, launchers, main
from epslots.cli.find_model import FoundModel
from epslots.cli.generate import read_prompts
from epslots.config import EngineConfig, LoadConfig
from epslots.example import example_model
from epslots.generation.end_tokens import end_tokens
from epslots.models.known_shapes import known_model
from tests.support import ROOT, zoo
from tests.support.entry_points import named_only
from tests.support.fake_backend import FakeBackend, one_load_at_a_time
from tests.support.grouped_ranks import TOKENS_TRAVEL

__all__ = ["one_load_at_a_time"]


class Run:
    """One run of ``epslots`` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> None:
        argv, sys.argv = sys.argv, ["epslots", *map(str, arguments)]
        try:
            main()
            self.code: object = 0
        except SystemExit as stop:
            self.code = stop.code or 0
        finally:
            sys.argv = argv
        self.out, self.err = capsys.readouterr()


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all: the example's host store is built once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: Run(capsys, *arguments)


def test_generate_prints_the_models_own_text(run: Callable[..., Run], cache_dir: Path):
    prompt = "def read(self):\n"
    got = run(
        "generate", "--slots", 4, "--cache-dir", cache_dir, "--max-new-tokens", 24, "--dtype", "float32", "--stats", prompt
    )
    assert got.code == 0
    tokenizer, plain = AutoTokenizer.from_pretrained(example_model()), zoo.reference(example_model())
    inputs = tokenizer(prompt, return_tensors="pt")
    expected = plain.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert got.out.strip("\n") == tokenizer.decode(expected, skip_special_tokens=True).strip("\n")
    assert "hit rate" in got.err
    assert "model.layers.0.mlp.experts" in got.err
    (line,) = [line for line in got.err.splitlines() if line.strip("│ ").startswith("0 ")]
    prompt_tokens = inputs["input_ids"].shape[1]
    assert line.replace("│", " ").split()[:8] == ["0", "24", "0", str(prompt_tokens), "0", "24", "0", "0"]
    assert "4/32" in got.err


def test_prompts_from_a_file_a_jsonl_and_standard_input(
    run: Callable[..., Run], tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    text, many = tmp_path / "prompt.py", tmp_path / "prompts.jsonl"
    text.write_text("import os\n")
    many.write_text('{"prompt": "import os\\n"}\n\n{"prompt": "class A:"}\n')
    common = ("generate", "--cache-dir", cache_dir, "--max-new-tokens", 6)
    from_argument = run(*common, "import os\n").out
    assert run(*common, "--file", text).out == from_argument
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"import os\n")))
    assert run(*common).out == from_argument
    several = run(*common, "--file", many)
    assert several.out.startswith(from_argument)
    assert "--- 2 of 2" in several.err
    assert run(*common, "--echo", "import os\n").out.startswith("import os\n")


@pytest.mark.parametrize("command", [("generate",), ("verify",), ("plan",), ("trace", "record", "t.npz", "--slots", "1")])
def test_an_empty_model_is_not_the_shipped_one(command: tuple[str, ...], run: Callable[..., Run]):
    """As ``--model "$MODEL"`` arrives from a shell without that variable."""
    prompt = ["x"] if command[0] in ("generate", "trace") else []
    got = run(*command, "--model", "", *prompt)
    assert got.code == 2
    assert "name is empty" in got.err


def test_sampling_repeats_with_its_seed(run: Callable[..., Run], cache_dir: Path):
    def sample(seed: int) -> str:
        options = ("--temperature", 1.5, "--top-p", 0.95, "--top-k", 50, "--seed", seed, "--max-new-tokens", 16)
        return str(run("generate", "--cache-dir", cache_dir, *options, "import os\n").out)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_several_prompts_answer_as_each_alone_up_to_a_stop(run: Callable[..., Run], cache_dir: Path):
    prompts = ("import os\n", "class A:\n    def", "def read(self):\n")
    common = ("generate", "--cache-dir", cache_dir, "--dtype", "float32", "--max-new-tokens", 20, "--slots", 8)
    alone = [run(*common, prompt).out for prompt in prompts]
    assert run(*common, *prompts).out == "".join(alone)
    assert run(*common, "--kv-tokens", 40, *prompts).out == "".join(alone), "they take turns in a small cache"
    stop = alone[0][5:8]
    first, second, _ = (text.partition(stop)[0] + "\n" * (stop in text) for text in alone)
    assert run(*common, "--stop", stop, "--stop", "no such text", *prompts[:2]).out == first + second


def test_prompts_of_a_file_have_settings_of_their_own(run: Callable[..., Run], tmp_path: Path, cache_dir: Path):
    """They are those of a job's lines, and go before the options."""
    common = ("generate", "--cache-dir", cache_dir, "--dtype", "float32", "--slots", 8, "--temperature", 1.5)
    alone = run(*common, "--max-new-tokens", 12, "--seed", 5, "import os\n").out
    tokens = AutoTokenizer.from_pretrained(example_model())("import os\n")["input_ids"]
    lines = [
        {"prompt": "import os\n", "seed": 5},
        {"prompt": tokens, "seed": 5},
        {"prompt": "class A:", "n": 2, "temperature": 0},
    ]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    got = run(*common, "--max-new-tokens", 12, "--file", tmp_path / "lines.jsonl")
    assert got.code == 0, got.err
    assert got.out.startswith(alone * 2)
    greedy = got.out.removeprefix(alone * 2)
    assert greedy == greedy[: len(greedy) // 2] * 2
    assert [line for line in got.err.splitlines() if line.startswith("---")] == [
        "--- 1 of 3", "--- 2 of 3", "--- 3 of 3, choice 1 of 2", "--- 3 of 3, choice 2 of 2"
    ]  # fmt: skip


def test_log_probabilities_are_a_table(run: Callable[..., Run], cache_dir: Path):
    """On standard error, where they don't mix with the text."""
    common = ("generate", "--cache-dir", cache_dir, "--dtype", "float32", "--slots", 8, "--max-new-tokens", 5)
    got = run(*common, "--logprobs", 2, "--prompt-logprobs", 0, "import os\n")
    assert (got.code, got.out) == (0, run(*common, "import os\n").out), got.err
    tokenizer, plain = AutoTokenizer.from_pretrained(example_model()), zoo.reference(example_model())
    prompt = tokenizer("import os\n", return_tensors="pt")["input_ids"]
    ids = plain.generate(prompt, max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        logprobs = plain(ids).logits[0].float().log_softmax(-1)
    rows = [line for line in got.err.splitlines() if re.match(r"\W*\d+ ", line)]
    assert len(rows) == ids.shape[1] - 1
    for row, token, at in zip(rows, ids[0, 1:].tolist(), logprobs, strict=False):
        for word in (str(token), repr(tokenizer.decode([token])), f"{at[token]:.3f}"):
            assert word in row
    best, second = logprobs[-2].topk(2).indices.tolist()
    assert f"{tokenizer.decode([best])!r} {logprobs[-2][best]:.3f}, {tokenizer.decode([second])!r}" in rows[-1]


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch, one_load_at_a_time: None) -> list[dict[str, Any]]:
    """Makes ``--ranks`` start threads; the settings of each start."""
    started: list[dict[str, Any]] = []

    class Threads(EntryPoint):
        def load(self) -> Any:
            def start(path: str, **settings: Any) -> Cluster:
                started.append({"path": path, **settings})
                return Cluster(
                    path, **{**settings, "address": None}, backend=FakeBackend(), costs=TOKENS_TRAVEL, progress=False
                )

            return start

    monkeypatch.setattr(extensions, "entry_points", named_only(Threads("ray", "x:y", launchers.GROUP)))
    return started


def test_a_seed_gives_the_same_text_on_any_number_of_ranks(
    run: Callable[..., Run], cache_dir: Path, launcher: list[dict[str, Any]]
):
    prompts = ("import os\n", "class A:", "def read(self):\n")
    common = ("generate", "--cache-dir", cache_dir, "--dtype", "float32", "--max-new-tokens", 16, "--slots", 8)
    drawn = ("--temperature", 1.2, "--top-p", 0.9, "--top-k", 40, "--seed", 7, "--n", 2)
    for ranks, sampling in ((("--ranks", 2, "--groups", 2), ()), (("--prefill-ranks", 1, "--decode-ranks", 1), drawn)):
        one = run(*common, *sampling, *prompts)
        two = run(*common, *sampling, *ranks, "--stats", *prompts)
        assert (two.code, two.out) == (0, one.out), two.err
    assert run(*common, "--address", "auto", "--strategy", "SPREAD", *prompts[:1]).code == 0
    (in_groups, two_ranks, elsewhere) = launcher
    assert (in_groups["ranks"], in_groups["groups"]) == (2, 2)
    assert (two_ranks["ranks"], two_ranks["prefill_ranks"], two_ranks["decode_ranks"]) == (None, 1, 1)
    assert two_ranks["path"] == str(example_model().resolve())
    assert two_ranks["address"] is None
    assert two_ranks["max_queue"] == 6
    assert (elsewhere["ranks"], elsewhere["address"], elsewhere["strategy"]) == (1, "auto", "SPREAD")
    for word in ("--- 3 of 3, choice 2 of 2", "node fake, worker 2", "hit rate", "16/32", "prompt tokens"):
        assert word in two.err


def test_a_text_that_fails_ends_no_other(run: Callable[..., Run], cache_dir: Path, tmp_path: Path):
    """Its error stands behind it; ``prompt 2`` has a grammar without any text."""
    lines: list[dict[str, Any]] = [{"prompt": "import "}, {"prompt": "x", "regex": "[a-z&&[0-9]]"}]
    lines += [{"prompt": "import ", "temperature": 0}, {"prompt": "x", "regex": "a{9}"}, {"prompt": "x", "regex": "a"}]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    common = ("generate", "--cache-dir", cache_dir, "--dtype", "float32", "--max-new-tokens", 3, "--slots", 8)
    alone = run(*common, "import ")
    got = run(*common, "--stats", "--file", tmp_path / "lines.jsonl")
    assert (alone.code, got.code) == (0, 2)
    assert got.out == f"{alone.out}\n{alone.out}aaa\na\n"
    assert got.err.count("cut off by max_new_tokens=3") == 1, "only the text whose grammar wants more"
    errors = [line for line in got.err.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: regex: no token of the vocabulary continues the text as its grammar wants it",
        "error: 1 of 5 texts ended with an error",
    ]
    assert "hit rate" in got.err, "statistics come all the same"
    assert "error: regex: no token" in run(*common, "--regex", "[a-z&&[0-9]]", "x").err


def test_ranks_without_a_launcher_are_told_what_to_install(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extensions, "entry_points", lambda **_: [])
    got = run("generate", "--ranks", 2, "x")
    assert (got.code, got.out) == (2, "")
    assert "error: --ranks, --address: nothing here starts several ranks; install epslots again" in got.err
    missing = EntryPoint("ray", "no_such_package.api:Cluster", launchers.GROUP)
    monkeypatch.setattr(extensions, "entry_points", named_only(missing))
    got = run("generate", "--address", "auto", "x")
    assert got.code == 2
    assert "can't be imported (No module named 'no_such_package'); install epslots again" in got.err


def test_the_project_brings_a_launcher():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = project["entry-points"][launchers.GROUP]
    assert EntryPoint(launchers.NAME, found[launchers.NAME], launchers.GROUP).load() is Cluster


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--slots", "0", "x"], "slots='0' leaves no slot"),
        (["generate", "--slots", "200%", "x"], "slots='200%' is not a share"),
        (["generate", "--model", "/nowhere/at/all", "x"], "/nowhere/at/all doesn't exist"),
        (["generate", "--policy", "fifo", "x"], "policy='fifo': allowed: lru, lfu, lrfu"),
        (["generate"], "an empty prompt"),
        (["generate", ""], "an empty prompt"),
        (["generate", "--file", "/nowhere.txt"], "/nowhere.txt: No such file"),
        (["generate", "--chat", "x"], "this tokenizer has no chat template"),
        (["generate", "--max-new-tokens", "5000", "x"], "the model's context holds 2048"),
        (["generate", "--kv-tokens", "100", "x"], "need 128 tokens of KV cache, but --kv-tokens is 100"),
        (["generate", "--kv-tokens", "some", "x"], "kv_tokens='some'; allowed: a number of tokens, or 'auto'"),
        (["generate", "--top-p", "0", "x"], "top_p=0.0; allowed: a number over 0"),
        (["generate", "--stop", "", "x"], "stop=('',); allowed: strings of at least one character"),
        (["generate", "--stop", "x" * 1000, "x"], "at least one character each and at most 256"),
        (["generate", *["--stop", "x"] * 65, "x"], "in a list or a tuple of at most 64"),
        (["generate", "x" * 10**6], "a prompt of 1,000,000 characters; at most"),
        (["generate", "--max-new-tokens", "0", "x"], "max_new_tokens=0; allowed: at least 1"),
        (["generate", "--n", "200", "x"], "n=200; allowed: at least 1, up to 128"),
        (["generate", "--logit-bias", "5", "x"], "--logit-bias '5'; allowed: TOKEN=NUMBER, such as 198=-100"),
        (["generate", "--logit-bias", "9999=1", "x"], "logit_bias has token 9999; allowed: 0 to 2047"),
        (["generate", "--json-schema", "@/nowhere.json", "x"], "--json-schema @/nowhere.json: No such file"),
        (["generate", "--json-schema", "{", "x"], "json_schema='{'; allowed: a JSON schema, as an object or its text"),
        (["generate", "--regex", "a", "--json-schema", "true", "x"], "json_schema and regex: a text has one grammar at most"),
        (["bench", "everything"], "benchmark 'everything': allowed: overhead"),
    ],
)
def test_a_users_mistake_is_one_line_and_code_2(arguments: list[str], message: str, run: Callable[..., Run], cache_dir: Path):
    if arguments[0] == "generate":
        arguments += ["--cache-dir", str(cache_dir)]
    got = run(*arguments)
    assert got.code == 2
    assert got.err.startswith("error: ")
    assert message in got.err
    assert "Traceback" not in got.err
    assert got.out == ""


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("bytes.txt", b"\xff\xfe", "is not UTF-8 text"),
        (
            "lines.jsonl",
            b'{"prompt": "x"}\n{"text": "y"}\n',
            'line 2: no such field: "text"; allowed: prompt, id, max_new_tokens',
        ),
        ("lines.jsonl", b'{"prompt": "x"}\n{oops\n', "line 2"),
        ("lines.jsonl", b'{"prompt": 3}\n', 'line 1: "prompt": text or a list of token ids is needed, and not an integer'),
        ("lines.jsonl", b'{"prompt": [5]}\n{"prompt": []}\n', "prompt 2 of 2: an empty prompt"),
        (
            "lines.jsonl",
            b'{"prompt": [5]}\n{"prompt": "x", "n": 129}\n',
            "prompt 2 of 2: n=129; allowed: at least 1",
        ),
        ("lines.jsonl", b'{"prompt": "x", "top_p": 7}\n', "top_p=7.0; allowed: a number over 0, up to 1"),
        ("both.txt", b"x", "not both"),
    ],
)
def test_bad_prompt_files(name: str, data: bytes, message: str, run: Callable[..., Run], tmp_path: Path):
    (tmp_path / name).write_bytes(data)
    got = run("generate", "--file", tmp_path / name, *(["and an argument"] if name == "both.txt" else []))
    assert got.code == 2
    assert message in got.err


@pytest.mark.parametrize(
    "data",
    [
        b'\xef\xbb\xbf{"prompt": "ab"}\n{"prompt": "c"}\n\n',
        b'{"prompt": "ab"}\r\n\r\n\xef\xbb\xbf{"prompt": "c", "id": 3}',
        '{"prompt": "a\u2028b\x85"}\n \x0c\n{"prompt": "\\u0000\x7f"}'.encode(),
    ],
)
def test_prompt_files_as_other_tools_write_them(data: bytes, tmp_path: Path):
    (tmp_path / "lines.JSONL").write_bytes(data)
    decoded = [json.loads(row) for row in data.decode().replace("\ufeff", "").split("\n") if row.strip()]
    assert [line.prompt for line in read_prompts([], tmp_path / "lines.JSONL")] == [row["prompt"] for row in decoded]
    text = '{"prompt": "a\u2028"}\r\n'
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [line.prompt for line in read_prompts([], tmp_path / "text.txt")] == [text]


def test_the_version_needs_no_model(run: Callable[..., Run]):
    got = run("--version")
    assert (got.code, got.out) == (0, f"epslots {epslots.__version__}\n")
    argv, sys.argv = sys.argv, ["job", "--version"]
    try:
        with pytest.raises(SystemExit) as caught:
            cli.run(job_app)
    finally:
        sys.argv = argv
    assert caught.value.code == 0


def test_a_model_that_predicts_no_tokens_is_refused_unloaded(
    run: Callable[..., Run], checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3MoeModel"]}))
    monkeypatch.setattr(epslots.loading, "load", lambda *_, **__: pytest.fail("it was loaded"))
    for command in (["generate"], ["generate", "--ranks", 2], ["trace", "record", tmp_path / "t.npz"]):
        got = run(*command, "--model", folder, "x")
        assert (got.code, got.out) == (2, "")
        assert "holds a Qwen3MoeModel, which has no language-model head" in got.err
    with pytest.raises(UnsupportedModelError, match="Qwen3MoeModel"):
        Cluster(folder, ranks=1, backend=FakeBackend())


def test_a_text_ends_at_the_tokenizers_end_token_too(
    run: Callable[..., Run], cache_dir: Path, tmp_path: Path, launcher: list[dict[str, Any]]
):
    """Also where the tokenizer alone states that token; on one rank and on two."""
    tokenizer = AutoTokenizer.from_pretrained(example_model())
    prompt = "import os\n"
    common = ("generate", "--dtype", "float32", "--max-new-tokens", 12, "--slots", 8)
    whole = run(*common, "--cache-dir", cache_dir, prompt).out
    tokens = tokenizer(whole)["input_ids"]
    folder = Path(shutil.copytree(example_model(), tmp_path / "model"))
    end = tokenizer.convert_ids_to_tokens(tokens[2])
    assert end not in tokenizer.convert_ids_to_tokens(tokens[:2])
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": end}))
    assert tokens[2] in end_tokens(epslots.load(folder, cache_dir=tmp_path, slots=1))
    for ranks in (1, 2):
        ended = run(*common, "--cache-dir", tmp_path, "--model", folder, "--ranks", ranks, prompt)
        assert ended.code == 0, ended.err
        assert ended.out.strip("\n") == tokenizer.decode(tokens[:2]).strip("\n")
        on = run(*common, "--cache-dir", tmp_path, "--model", folder, "--ranks", ranks, "--ignore-tokenizer-eos", prompt)
        assert len(on.out) > len(ended.out)


def test_verify(run: Callable[..., Run], tmp_path: Path):
    got = run("verify", "--cache-dir", tmp_path, "--checkpoint")
    assert (got.code, got.out) == (0, "192 experts: all as they were built and as the checkpoint has them\n")
    (store,) = tmp_path.glob("*.experts")
    with open(store, "r+b") as file:
        file.seek(-5000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-5000, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    got = run("verify", "--cache-dir", tmp_path)
    assert got.code == 2
    assert "expert 31 of model.layers.5.mlp.experts is corrupt" in got.err
    assert "1 of 192 experts differ" in got.err


def test_trace_record(run: Callable[..., Run], tmp_path: Path, cache_dir: Path):
    output = tmp_path / "trace.npz"
    got = run("trace", "record", output, "import os\n", "class A:", "--cache-dir", cache_dir, "--max-new-tokens", 5)
    assert got.code == 0
    with np.load(output) as file:
        assert {name: file[name].dtype.name for name in file.files} == {
            "expert_ids": "int16", "starts": "int64", "num_experts": "int64",
        }  # fmt: skip
        assert file["starts"].shape == (2,)
        assert file["num_experts"].tolist() == [32] * 6
        assert file["expert_ids"].shape[1:] == (6, 4)


def test_plan_of_the_example(run: Callable[..., Run]):
    got = run("plan", "--slots", "25%", "--json")
    assert got.code == 0
    plan = json.loads(got.out)
    assert plan["fits"] is True
    assert "8" in str(plan)


def test_a_cache_in_slots_is_planned_and_serves(run: Callable[..., Run], cache_dir: Path):
    plan = json.loads(run("plan", "--slots", "25%", "--kv-tokens", "auto", "--json").out)
    assert plan["kv_tokens"] == "auto" and plan["fits"] is True
    arguments = ("generate", "--slots", "25%", "--cache-dir", cache_dir, "--max-new-tokens", 8, "--dtype", "float32", "def f(")
    usual, exchanged = run(*arguments), run(*arguments, "--kv-tokens", "auto", "--stats")
    assert exchanged.out == usual.out
    assert f"(up to {plan['most_kv_tokens']:,}; 0 slots ceded)" in exchanged.err


def test_plan_chooses_the_cache_by_the_given_sizes(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch):
    seen: list[LoadConfig] = []

    def find_model(model: str, device: str, config: LoadConfig, stored_format: str | None) -> FoundModel:
        seen.append(config)
        return FoundModel(known_model("mixtral-8x7b")[0])

    monkeypatch.setattr(sys.modules["epslots.cli.plan"], "find_model", find_model)
    sizes = ("--kv-tokens", "77", "--max-requests", "5", "--max-batch-tokens", "9", "--cache", "rows")
    run("plan", "--model", "mixtral-8x7b", "--slots", "1", "--memory", "900GiB", *sizes, "--json")
    assert seen[0].engine == EngineConfig(kv_tokens=77, max_requests=5, max_batch_tokens=9, cache="rows")


def test_help_teaches(run: Callable[..., Run]):
    got = run("generate", "--help")
    assert got.code == 0
    for word in ("12GiB", "--stats", "standard output", "epslots generate --model", "The sampling", "198=-100", "@FILE"):
        assert word in got.out


def test_ctrl_c_ends_cleanly_and_leaves_nothing(tmp_path: Path):
    """SIGINT in the middle of text: no traceback, code 130."""
    command = [
        sys.executable,
        "-c",
        # A parent in the background has it ignored.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from epslots.cli import main; main()",
        "generate",
        "--cache-dir",
        str(tmp_path / "cache"),
    ]
    command += ["--max-new-tokens", "1900", "--host-store", "memory", "import os\nimport sys\n\nclass"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"] == []
