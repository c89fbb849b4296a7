"""A job through Ray's job API, on two nodes with token authentication: stopped in the middle, and submitted again.

The first time with a group on each node, one of which computes prompts; then with one rank: that is no part of the results.
"""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.support import ROOT, zoo
from tests.support.held_job import HELD
from tests.support.ray_helpers import start_nodes
from tests.support.thread_cluster import expected

pytestmark = [
    pytest.mark.timeout(600),  # two nodes, and Ray's agents on them, which take their time on a busy machine
    pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning"),  # Ray's client says it to aiohttp
]

PROMPTS = [zoo.random_ids(1, 3 + 15 * (n % 4), seed=n)[0].tolist() for n in range(30)]
LINES = len(PROMPTS) + 1
NEW = 20


def follow(client: JobSubmissionClient, job: str, stop_at: str | None = None) -> str:
    """A job's log, to its end; the job is stopped when the log has what ``stop_at`` matches."""

    async def read() -> str:
        log, stopped = "", False
        async for lines in client.tail_job_logs(job):
            log += lines
            if stop_at is not None and not stopped and re.search(stop_at, log):
                stopped = client.stop_job(job)
        return log

    return asyncio.run(read())


def test_a_job_is_stopped_and_goes_on(ray_tokens: None, checkpoint: Callable[[str], Path], tmp_path: Path):
    folder = checkpoint("qwen3_moe")
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps({"prompt": prompt, "id": n, "stop_tokens": []}) for n, prompt in enumerate(PROMPTS)]
    prompts.write_text("\n".join([*lines, '{"prompt": [1, 2', ""]))
    arguments = [
        *("--model", folder, "--strategy", "STRICT_SPREAD", "--slots", 3),
        *("--prompts", prompts, "--output", output, "--max-new-tokens", NEW, "--kv-tokens", 512, "--device", "cpu"),
        *("--cache-dir", tmp_path / "cache"),
    ]
    with start_nodes(dashboard=True) as nodes, nodes.further():
        client = JobSubmissionClient(f"http://{nodes.head.webui_url}")

        def submit(module: str, ranks: Sequence[str], attempts: int = 5) -> str:
            command = shlex.join(map(str, [sys.executable, "-m", module, *arguments, *ranks]))
            code = {"working_dir": str(ROOT), "excludes": [".git", "examples"]}
            try:
                return client.submit_job(entrypoint=command, runtime_env=code)
            except RuntimeError as error:  # after ten seconds, when Ray's agent isn't up yet
                if not attempts or "No available agent" not in str(error):
                    raise
                return submit(module, ranks, attempts - 1)

        def run(module: str, ranks: Sequence[str], stop_at: str | None = None, attempts: int = 4) -> tuple[str, str]:
            job = submit(module, ranks)
            log = follow(client, job, stop_at)
            # On a busy machine a node may be late to join, or to be free again. Then nothing was begun, and that is said.
            begun = f"/{LINES} prompts" in log
            assert begun or "error: " in log, log
            if begun or not attempts:
                return job, log
            nodes.replace_lost()
            return run(module, ranks, stop_at, attempts - 1)

        first, log = run("tests.support.held_job", ["--prefill-ranks", "1", "--decode-ranks", "1"], stop_at=HELD)
        assert client.get_job_status(first) == JobStatus.STOPPED, log
        done = output.read_text().count("\n")
        assert 0 < done < LINES, log
        second, rest = run("cluster.job", ["--ranks", "1"])
        assert client.get_job_status(second) == JobStatus.FAILED, rest  # as one line is no prompt
    assert f"going on: {done} of {LINES} prompts were done before" in rest, rest
    assert f"line {LINES}" in log + rest, log + rest
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(line["line"] for line in found) == list(range(1, LINES + 1)), rest
    texts = {line["id"]: tuple(line["token_ids"]) for line in found if "error" not in line}
    assert [texts[n] for n in range(len(PROMPTS))] == expected(folder, PROMPTS, NEW)
