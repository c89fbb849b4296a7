"""The command line as its users meet it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from epslots.cli import main
from epslots.example import example_model
from tests import zoo


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


def test_sampling_repeats_with_its_seed(run: Callable[..., Run], cache_dir: Path):
    def sample(seed: int) -> str:
        options = ("--temperature", 1.5, "--top-p", 0.95, "--top-k", 50, "--seed", seed, "--max-new-tokens", 16)
        return str(run("generate", "--cache-dir", cache_dir, *options, "import os\n").out)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


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
        ("lines.jsonl", b'{"prompt": "x"}\n{"text": "y"}\n', 'line 2: not an object with "prompt"'),
        ("lines.jsonl", b'{"prompt": "x"}\n{oops\n', "line 2"),
        ("lines.jsonl", b'{"prompt": 3}\n', 'line 1: "prompt" must be text'),
        ("both.txt", b"x", "not both"),
    ],
)
def test_bad_prompt_files(name: str, data: bytes, message: str, run: Callable[..., Run], tmp_path: Path):
    (tmp_path / name).write_bytes(data)
    got = run("generate", "--file", tmp_path / name, *(["and an argument"] if name == "both.txt" else []))
    assert got.code == 2
    assert message in got.err


def test_verify(run: Callable[..., Run], cache_dir: Path):
    got = run("verify", "--cache-dir", cache_dir, "--checkpoint")
    assert (got.code, got.out) == (0, "192 experts: all as they were built and as the checkpoint has them\n")
    (store,) = cache_dir.glob("*.experts")
    with open(store, "r+b") as file:
        file.seek(-5000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-5000, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    got = run("verify", "--cache-dir", cache_dir)
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


def test_help_teaches(run: Callable[..., Run]):
    got = run("generate", "--help")
    assert got.code == 0
    for word in ("12GiB", "--stats", "standard output", "epslots generate --model"):
        assert word in got.out


def test_ctrl_c_ends_cleanly_and_leaves_nothing(tmp_path: Path):
    """SIGINT in the middle of text: no traceback, code 130."""
    command = [
        sys.executable,
        "-c",
        "from epslots.cli import main; main()",
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
