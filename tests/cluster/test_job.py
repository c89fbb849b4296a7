"""Jobs on a cluster of straw: what they write, how they go on, and how they end."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.api import Cluster
from cluster.errors import ClusterError
from cluster.job.progress import Counts, JobProgress
from cluster.job.run import JobSettings, run_job
from epslots.config import LoadConfig
from epslots.errors import ConfigError
from epslots.example import example_model
from epslots.generation.settings import GenerationSettings
from epslots.generation.text import load_tokenizer
from tests.support import ROOT
from tests.support.fake_backend import FakeBackend
from tests.support.fake_cluster import FakeCluster, opened
from tests.support.grouped_ranks import TOKENS_TRAVEL

GOOD = b"\n".join(b'{"prompt": "%s", "id": %d}' % (b"abcdefghij"[: 1 + n % 7], n) for n in range(20)) + b"\n"
MIXED = b"""{"prompt": "one", "id": "first"}

{"promt": "two"}
{"prompt": [7, 8, 9]}
{"prompt": "\xff"}
   \t
{"prompt": ""}
{"prompt": "five", "max_new_tokens": 0}
{"prompt": "six", "max_new_tokens": 1000000000, "id": 6}
{"prompt": "seven", "temperature": 0.5}
oops
{"prompt": "one"}"""


CHOICES = b"\n".join(b'{"prompt": "%s", "n": %d}' % (b"abcdefg"[:n], n) for n in (1, 2, 3, 4))
CHOICES += b"""
{"prompt": "five", "n": 3, "seed": 13}
{"prompt": "six", "n": 2, "max_new_tokens": 1000}
{"prompt": "seven", "n": 200}
"""


@pytest.fixture
def job(tmp_path: Path) -> JobSettings:
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    return make_job(tmp_path)


def make_job(folder: Path, **generation: Any) -> JobSettings:
    how = GenerationSettings(**{"max_new_tokens": 8, **generation})
    return JobSettings(folder / "in.jsonl", folder / "out.jsonl", "a/model", how)


def run(job: JobSettings, cluster: FakeCluster) -> int:
    return run_job(job, lambda: opened(cluster))


def results(job: JobSettings) -> dict[int, dict[str, Any]]:
    """The output by line, each line once."""
    lines = [json.loads(line) for line in job.output.read_bytes().splitlines()]
    found = {line["line"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def test_each_prompt_gets_a_line_as_it_finishes(job: JobSettings, capsys: pytest.CaptureFixture[str]):
    cluster = FakeCluster()
    assert run(job, cluster) == 0
    found = results(job)
    assert list(found) != sorted(found)
    assert sorted(found) == list(range(1, 21))
    assert found[3] == {
        "line": 3, "id": 2, "text": "abc:0", "tokens": 4, "reason": "length", "digest": found[3]["digest"],
    }  # fmt: skip
    assert cluster.most_waiting == 4
    err = capsys.readouterr().err.splitlines()
    assert err[0] == "0/20 prompts, 0 errors, 0.0 tokens/s"
    assert err[-1].startswith("done: 20 of 20 prompts done, 0 with errors, 57 new tokens, ")


def test_lines_that_are_wrong_are_said_and_the_others_go_on(job: JobSettings, capsys: pytest.CaptureFixture[str]):
    job.prompts.write_bytes(MIXED)
    assert run(job, FakeCluster()) == 1
    found = results(job)
    errors = {line: result["error"] for line, result in found.items() if "error" in result}
    assert sorted(found) == [1, 3, 4, 5, 7, 8, 9, 10, 11, 12]
    assert sorted(errors) == [3, 5, 7, 8, 9, 11]
    for line, words in {
        3: 'no such field: "promt"',
        5: "not UTF-8 text",
        7: "an empty prompt",
        8: "max_new_tokens=0",
        9: "a rank's cache holds 100",
        11: "not JSON",
    }.items():
        assert words in errors[line]
    assert found[1]["id"] == "first"
    assert found[9]["id"] == 6
    assert found[4]["token_ids"] == [0, 1, 2, 3]
    assert "token_ids" not in found[1]
    assert found[10]["text"] == "seven:0.5"
    err = capsys.readouterr().err
    assert f"warning: {job.prompts}, line 5: not UTF-8 text" in err
    assert "6 with errors" in err

    assert run(job, FakeCluster(fail_after=0)) == 1, "nothing is left, so no cluster is needed; the errors stay"


def test_choices_are_one_line_and_in_order(job: JobSettings, capsys: pytest.CaptureFixture[str]):
    job.prompts.write_bytes(CHOICES)
    assert run(job, FakeCluster()) == 1
    found = results(job)
    assert sorted(found) == [1, 2, 3, 4, 5, 6, 7]
    assert found[1] == {"line": 1, "text": "a:0", "tokens": 2, "reason": "length", "digest": found[1]["digest"]}
    assert found[3] == {
        "line": 3,
        "choices": [{"text": f"abc:0.{choice}", "tokens": 4, "reason": "length"} for choice in range(3)],
        "digest": found[3]["digest"],
    }
    good = ["text", "tokens", "reason"]
    assert [list(choice) for choice in found[5]["choices"]] == [good, ["error"], good]
    assert "a rank's cache holds" in found[6]["error"]
    assert "n=200; allowed" in found[7]["error"]
    err = capsys.readouterr().err
    assert f"warning: {job.prompts}, line 5: choice 1: NaN, says the fake" in err
    assert "7 of 7 prompts done, 3 with errors, 50 new tokens" in err
    assert run(job, FakeCluster(fail_after=0)) == 1, "nothing is left"
    assert "7 of them in earlier runs, 3 with errors" in capsys.readouterr().err


def test_logprobs_are_compact_lists(job: JobSettings):
    job.prompts.write_bytes(b"""{"prompt": "a", "logprobs": 2, "prompt_logprobs": 0}
{"prompt": "a", "logprobs": 0}
{"prompt": "a", "logprobs": 0, "prompt_logprobs": 1, "n": 2}
""")
    assert run(job, FakeCluster()) == 0
    found = results(job)
    third = [1, -0.333333]
    assert found[1]["logprobs"] == [[0, 0.0, [[0, 0.0]] * 2], [*third, [third] * 2]]
    assert found[1]["prompt_logprobs"] == [[0, 0.0, [[0, 0.0]] * 2], [*third, [third] * 2]]
    assert found[2]["logprobs"] == [[0, 0.0], third]
    assert "prompt_logprobs" not in found[2]
    assert [choice["logprobs"] for choice in found[3]["choices"]] == [[[0, 0.0], third]] * 2
    assert found[3]["prompt_logprobs"] == [[0, 0.0], third]
    assert run(job, FakeCluster(fail_after=0)) == 0


def test_a_refused_line_keeps_its_names(job: JobSettings):
    """Text, numbers and truth values come back as they were written, from lines that are objects; and the job goes on."""
    rows = [
        (b'{"prompt": "x", "stop": null, "id": "a"}', {"id": "a"}),
        (b'{"messages": [], "id": "a", "custom_id": "request-1"}', {"id": "a", "custom_id": "request-1"}),
        (b'{"prompt": "x", "max_new_tokens": "4", "id": 7}', {"id": 7}),
        (b'{"prompt": "x", "custom_id": "c"}', {"custom_id": "c"}),
        (b'{"prompt": 5, "id": 1.0}', {"id": 1.0}),
        (b'{"prompt": "", "id": ' + b"9" * 40 + b"}", {"id": int("9" * 40)}),
        (b'{"id": "\\u00e9\\n"}', {"id": "\u00e9\n"}),
        (b'{"id": true}', {"id": True}),
        (b'{"id": null}', {}),
        (b'{"id": {"a": [1]}, "custom_id": ["b"]}', {}),
        (b'{"id": "\xff", "custom_id": "c"}', {"custom_id": "c"}),
        (b'{"id": ' + b"9" * 5000 + b"}", {}),
        (b'{"id": "a", "id": "b"}', {"id": "b"}),
        (b'{"prompt": "\xff", "id": "a"}', {"id": "a"}),
        (b'["id", "a"]', {}),
        (b'{"id": "a"', {}),
        (b'{"prompt": "\\ud800", "id": "a", "custom_id": "\\udfff"}', {"id": "a"}),
        (b'{"prompt": "x", "temperature": NaN, "id": "\\u00e9"}', {"id": "\u00e9"}),
        (b'{"prompt": "x", "temperature": 1e999, "id": NaN, "custom_id": -Infinity}', {}),
        (b'{"x": ' + b"[" * 10**5 + b"]" * 10**5 + b', "id": "a"}', {}),
    ]
    job.prompts.write_bytes(b"\n".join(row for row, _ in rows) + b"\n" + GOOD)
    assert run(job, FakeCluster(fail_after=7)) == 3
    assert run(job, FakeCluster()) == 1, "the output is read again, by other names, too"
    found = results(job)
    assert sorted(found) == list(range(1, len(rows) + 21))
    for number, (_, names) in enumerate(rows, start=1):
        assert "error" in found[number]
        assert {name: found[number][name] for name in ("id", "custom_id") if name in found[number]} == names
    assert len(job.output.read_text(encoding="utf-8").splitlines()) == len(found)


def test_warnings_are_bounded(job: JobSettings, capsys: pytest.CaptureFixture[str]):
    job.prompts.write_bytes(b"oops\n" * 50)
    assert run(job, FakeCluster()) == 1
    err = capsys.readouterr().err
    assert err.count("not JSON") == 10
    assert "50 with errors" in err


def test_nothing_to_do_needs_no_cluster(job: JobSettings):
    def refuse() -> Any:
        raise AssertionError("no cluster is needed")

    job.prompts.write_bytes(b"\n\n")
    assert run_job(job, refuse) == 0
    assert job.output.read_bytes() == b""


def test_a_cluster_that_fails_leaves_no_line_and_the_job_goes_on(job: JobSettings, capsys: pytest.CaptureFixture[str]):
    assert run(job, FakeCluster(fail_after=7)) == 3
    assert len(results(job)) == 7
    assert "error: all ranks are lost" in capsys.readouterr().err
    again = FakeCluster(order=5)
    assert run(job, again) == 0
    assert len(again.asked) == 13
    assert sorted(results(job)) == list(range(1, 21))
    assert "going on: 7 of 20 prompts were done before" in capsys.readouterr().err


def test_a_cluster_that_cannot_start_is_not_a_failure_midway(job: JobSettings, capsys: pytest.CaptureFixture[str]):
    def fail() -> Any:
        raise ClusterError("Ray isn't running: start it with ray start --head")

    assert run_job(job, fail) == 2
    assert capsys.readouterr().err.endswith("error: Ray isn't running: start it with ray start --head\n")


def test_a_bug_is_shown_and_not_taken_for_an_end(job: JobSettings, capsys: pytest.CaptureFixture[str]):
    class Broken(FakeCluster):
        def generate(self, prompts: Any, **settings: Any) -> Any:
            raise RuntimeError("a bug")

    assert run(job, Broken()) == 3
    assert "Traceback" in capsys.readouterr().err


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    prompts=st.sampled_from([GOOD, MIXED, CHOICES]),
    stops=st.lists(st.integers(0, 12) | st.none(), max_size=6),
)
def test_stopped_anywhere_and_started_again_all_comes_out_once(data: st.DataObject, prompts: bytes, stops: list[int | None]):
    """Killed in the middle of a write, or broken off: in the end the output is that of an undisturbed run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "undisturbed").mkdir()
        for place in (folder, folder / "undisturbed"):
            (place / "in.jsonl").write_bytes(prompts)
        undisturbed, job = make_job(folder / "undisturbed"), make_job(folder)
        code = run(undisturbed, FakeCluster())

        for order, stop in enumerate(stops):
            run(job, FakeCluster(order=order, fail_after=stop))
            whole = job.output.read_bytes()
            kept = data.draw(st.integers(len(whole) // 2, len(whole)), label="bytes that reached the disk")
            os.truncate(job.output, kept)
        assert run(job, FakeCluster(order=9)) == code
        assert results(job) == results(undisturbed)


def test_what_is_not_this_jobs_output_is_refused_and_left_alone(job: JobSettings, capsys: pytest.CaptureFixture[str]):
    assert run(job, FakeCluster(fail_after=7)) == 3
    written = job.output.read_bytes()
    first = min(results(job))

    def refused(other: JobSettings, message: str, output: bytes = written) -> None:
        capsys.readouterr()
        other.output.write_bytes(output)
        assert run(other, FakeCluster()) == 2
        assert message in capsys.readouterr().err
        assert other.output.read_bytes() == output

    for other in ({"temperature": 0.5}, {"n": 2}, {"json_schema": True}, {"logit_bias": {5: 1.0}}):
        refused(make_job(job.prompts.parent, **other), "another model or other settings")
    refused(JobSettings(job.prompts, job.output, "another/model", job.generation), "another model or other settings")
    for config in ({"dtype": "float16"}, {"execute_predicted": True}, {"batch_invariant": True}):
        refused(replace(job, config=LoadConfig(**config)), "another model or other settings")
    refused(job, "a second time", written + written.splitlines(keepends=True)[0])
    refused(job, "line 1 of it is no result of a job", b"my diary\n")
    refused(job, "line 1 of it is no result of a job", b"my diary, last words")
    refused(job, "line 1 of it is no result of a job", b'{"line": 1, "id": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n")
    refused(job, "line 8 of it is no result of a job", written + b"a note of mine")
    refused(job, "line 1 of it is no result", b'{"line": 1, "text": "x", "digest": "", "more": 1}\n')
    rows = GOOD.splitlines(keepends=True)
    job.prompts.write_bytes(b"".join(rows[: first - 1] + rows[first:]))
    refused(job, "answers another prompt")
    job.prompts.write_bytes(GOOD)
    assert run(job, FakeCluster()) == 0


def test_the_digest_is_that_of_settings_that_are_no_defaults():
    """A version with more settings goes on with the jobs of one with fewer."""
    base = JobSettings(Path("in"), Path("out"), "a/model", GenerationSettings())
    for name in ("n", "logit_bias", "chat"):
        default = getattr(base.generation, name)
        same = GenerationSettings(**{name: default})
        assert replace(base, generation=same).digest == base.digest
    assert replace(base, config=LoadConfig(kv_tokens=99, slots=5)).digest == base.digest, "they change no text"
    encoded = msgspec.json.encode(("a/model", base.config.output_settings, {}), order="sorted")
    assert base.digest == xxhash.xxh3_64_intdigest(encoded) >> 32


def test_prompts_may_be_added_at_the_end(job: JobSettings):
    assert run(job, FakeCluster()) == 0
    job.prompts.write_bytes(GOOD + b'{"prompt": "another"}')
    later = FakeCluster()
    assert run(job, later) == 0
    assert [asked["prompt"] for asked in later.asked] == ["another"]


def test_failed_prompts_run_again_when_their_lines_are_deleted(job: JobSettings):
    job.prompts.write_bytes(MIXED)
    assert run(job, FakeCluster()) == 1
    kept = [line for line in job.output.read_bytes().splitlines(keepends=True) if b'"error"' not in line]
    job.output.write_bytes(b"".join(kept))
    later = FakeCluster()
    assert run(job, later) == 1
    assert sorted(results(job)) == [1, 3, 4, 5, 7, 8, 9, 10, 11, 12]
    assert len(later.asked) == 3, "those that the cluster refuses; the others are refused here"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (b'{"prompt": "new"}\n' * 20, "line 1 was changed while"),
        (b"".join(GOOD.splitlines(True)[:9]), "11 prompts got no answer"),
    ],
)
def test_prompts_that_change_under_a_running_job_break_it_off(
    job: JobSettings, change: bytes, message: str, capsys: pytest.CaptureFixture[str]
):
    class Editor(FakeCluster):
        def generate(self, prompts: Any, **settings: Any) -> Any:
            job.prompts.write_bytes(change)
            return super().generate(prompts, **settings)

    assert run(job, Editor()) == 3
    assert message in capsys.readouterr().err


def test_two_jobs_never_write_to_one_file(job: JobSettings, capsys: pytest.CaptureFixture[str]):
    with open(job.output, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert run(job, FakeCluster()) == 2
    assert "another job is writing to it" in capsys.readouterr().err
    assert run(job, FakeCluster()) == 0


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("in.jsonl", "is the file of the prompts"),
        ("none/out.jsonl", "No such file or directory"),
        ("", "is not a plain file"),
        ("runtime_resources/working_dir_files/_ray_pkg_1/out.jsonl", "deletes after it"),
    ],
)
def test_outputs_that_cannot_be(job: JobSettings, output: str, message: str, capsys: pytest.CaptureFixture[str]):
    other = JobSettings(job.prompts, job.output.parent / output, job.model, job.generation)
    assert run(other, FakeCluster()) == 2
    assert message in capsys.readouterr().err
    assert job.prompts.read_bytes() == GOOD


def test_a_full_disk_breaks_off(job: JobSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    class Disk(io.FileIO):
        """Takes some bytes at a time, and then no more."""

        room = 250

        def write(self, data: Any) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            taken = min(len(data), self.room, 20)
            self.room -= taken
            return super().write(bytes(data[:taken]))

    whole_open = Path.open

    def small_open(path: Path, mode: str = "r", *given: Any, **options: Any) -> Any:
        return Disk(path, "a+") if path == job.output and mode == "a+b" else whole_open(path, mode, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", small_open)
        assert run(job, FakeCluster()) == 3
    assert "can't be written any more: No space left on device" in capsys.readouterr().err
    assert len(job.output.read_bytes()) == 250
    assert run(job, FakeCluster()) == 0
    assert sorted(results(job)) == list(range(1, 21))


def test_a_log_is_told_now_and_then():
    class Clock:
        now = 0.0

        def __call__(self) -> float:
            return self.now

    clock, stream, counts = Clock(), io.StringIO(), Counts(total=1000, before=0, errors_before=0)
    progress = JobProgress(counts, stream, clock)
    progress.start()
    for _ in range(150):
        counts.served += 1
        counts.tokens += 10
        clock.now += 0.01
        progress.advance()
    clock.now += 20
    progress.advance()
    progress.advance()
    progress.finish("done")
    assert stream.getvalue().splitlines() == [
        "0/1,000 prompts, 0 errors, 0.0 tokens/s",
        "100/1,000 prompts, 0 errors, 1,000.0 tokens/s",
        "150/1,000 prompts, 0 errors, 69.8 tokens/s",
        "done: 150 of 1,000 prompts done, 0 with errors, 1,500 new tokens, 69.8 tokens/s",
    ]


def test_a_terminal_has_a_bar():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream, counts = Terminal(), Counts(total=3, before=1, errors_before=0)
    progress = JobProgress(counts, stream)
    progress.start()
    counts.served += 1
    progress.advance()
    progress.warn("in.jsonl, line 3: [no] such field")
    progress.finish("done")
    assert "2/3" in stream.getvalue()
    assert "[no] such field" in stream.getvalue()


STOPPED_JOB = """
import sys, threading
from pathlib import Path
from cluster.job.run import JobSettings, run_job
from epslots.generation.settings import GenerationSettings
from tests.support.fake_cluster import FakeCluster

class Waits(FakeCluster):
    def generate(self, prompts, **settings):
        for number, result in enumerate(super().generate(prompts, **settings)):
            if number == 5:
                print("now", flush=True)
                threading.Event().wait()
            yield result

    def __enter__(self):
        return self

    def __exit__(self, *_):
        print("closed", flush=True)

folder = Path(sys.argv[1])
how = GenerationSettings(max_new_tokens=8)
sys.exit(run_job(JobSettings(folder / "in.jsonl", folder / "out.jsonl", "a/model", how), Waits))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_job_closes_its_cluster_and_can_go_on(job: JobSettings, number: int, code: int):
    command = [sys.executable, "-c", STOPPED_JOB, str(job.prompts.parent)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(number)
        out, err = process.communicate()
    assert (process.returncode, out) == (code, "closed\n")
    assert "Traceback" not in err
    assert "5 of 20 prompts done" in err
    assert "start the job again with the same arguments to go on" in err
    later = FakeCluster()
    assert run(job, later) == 0
    assert len(later.asked) == 15
    assert sorted(results(job)) == list(range(1, 21))


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.job", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_commands_help_needs_no_torch_and_teaches(monkeypatch: pytest.MonkeyPatch):
    got = command("--help")
    assert got.returncode == 0
    for word in ("ray job submit", '{"prompt": [5, 6, 7], "id"', "143  stopped by SIGTERM", "--strategy", "--address"):
        assert word in got.stdout
    code = "import sys, cluster.job; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'ray')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_settings_that_are_wrong_are_one_line(job: JobSettings):
    got = command("--prompts", job.prompts, "--output", job.output, "--top-p", 0)
    assert got.returncode == 2
    assert got.stderr.startswith("error: top_p=0.0; allowed")
    assert got.stderr.count("\n") == 1
    assert not job.output.exists()


@contextmanager
def _never() -> Iterator[FakeCluster]:
    raise ConfigError("strategy='NEAR'; allowed: PACK")
    yield FakeCluster()


def test_a_wrong_setting_of_the_cluster_is_one_line(job: JobSettings, capsys: pytest.CaptureFixture[str]):
    assert run_job(job, _never) == 2
    assert capsys.readouterr().err == "error: strategy='NEAR'; allowed: PACK\n"


REAL = b"""{"prompt": "import os\\n", "id": "a"}
{"prompt": "def f(", "temperature": 1.0, "seed": 3}
{"prompt": [5, 6, 7]}
{"prompt": "class A:", "stop": ["\\n"], "max_new_tokens": 30, "logprobs": 1}
{"prompt": [99999]}
{"prompt": ""}
{"prompt": []}
{"prompt": "x", "max_new_tokens": 0}
{"prompt": "x", "max_new_tokens": 1000000000}
{"prompt": "x", "max_new_tokens": 100000000000000000000000}
{"prompt": "x", "top_p": 7}
{"prompt": "x", "seed": -1}
{"prompt": "x", "chat": true}
{"prompt": "import os\\n", "temperature": 1.0, "n": 2, "prompt_logprobs": 0}
{"prompt": "class A:", "stop": ["\\n"], "max_new_tokens": 30, "min_tokens": 14, "logit_bias": {"5": 1.5}}
"""


def without_logprobs(found: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Results with the tokens of their log-probabilities alone."""
    names = ("logprobs", "prompt_logprobs")
    return {
        line: {name: [each[0] for each in value] if name in names else value for name, value in result.items()}
        for line, result in found.items()
    }


@pytest.mark.usefixtures("one_load_at_a_time")
def test_a_job_on_real_ranks_broken_off_and_resumed(tmp_path: Path, cache_dir: Path):
    """Every bad prompt has its line, and the texts are those of an undisturbed run on one rank.

    Though it began on two groups with roles, and went on with two that do all.
    """

    class Breaks(Cluster):
        def generate(self, prompts: Any, **settings: Any) -> Any:
            for number, result in enumerate(super().generate(prompts, **settings)):
                if number == 2:
                    raise ClusterError("all ranks are lost")
                yield result

    def ranks(count: int, kind: type[Cluster] = Cluster, **groups: int) -> Cluster:
        settings: dict[str, Any] = {"slots": 8, "kv_tokens": 256, "dtype": "float32", "costs": TOKENS_TRAVEL, **groups}
        return kind(example_model(), ranks=count, backend=FakeBackend(), cache_dir=cache_dir, progress=False, **settings)

    (tmp_path / "one").mkdir()
    for folder in (tmp_path, tmp_path / "one"):
        (folder / "in.jsonl").write_bytes(REAL)
    one, job = make_job(tmp_path / "one"), make_job(tmp_path)
    assert run_job(one, lambda: ranks(1)) == 1
    assert run_job(job, lambda: ranks(2, Breaks, prefill_ranks=1)) == 3
    assert len(results(job)) == 2
    assert run_job(job, lambda: ranks(2, groups=2)) == 1
    found = results(job)
    assert without_logprobs(found) == without_logprobs(results(one))  # whose last digits differ with the batch
    assert sorted(found) == list(range(1, 16))
    assert {line for line, result in found.items() if "error" in result} == set(range(5, 14))
    assert len(found[3]["token_ids"]) == found[3]["tokens"] == 8
    assert (found[4]["reason"], "\n" in found[4]["text"]) == ("stop", False)
    assert len(found[4]["logprobs"]) == found[4]["tokens"] < 14 < found[15]["tokens"]
    first, second = found[14]["choices"]
    assert first["tokens"] == second["tokens"] == 8
    assert first["text"] != second["text"]
    assert len(found[14]["prompt_logprobs"]) == len(load_tokenizer(example_model())("import os\n")["input_ids"]) - 1
