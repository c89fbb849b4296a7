"""A job: a cluster continues the prompts of one file, and their results go to another.

In order: index the prompts; read the output, whose prompts are done; start the cluster, if any prompt is left; serve the
prompts that are left, and write each result as it comes. ``command.py`` calls ``run_job``.
"""

from __future__ import annotations

import enum
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import msgspec
import xxhash

from cluster.errors import ClusterError
from cluster.generation import Result
from cluster.job.progress import Counts, JobProgress
from cluster.job.prompts import LineIndex, index_lines, open_prompts, read_names
from cluster.job.results import ChoiceResult, ResultFile, ResultLine, compact_logprobs, join_digest
from cluster.job.signals import JobStopped, StopSignals
from epslots.config import LoadConfig
from epslots.errors import ConfigError, EpslotsError
from epslots.generation.prompt_line import decode_prompt
from epslots.generation.settings import GenerationSettings
from epslots.json_lines import Line, read_lines
from epslots.streams import say


class Exit(enum.IntEnum):
    """Exit codes of a job. One that is stopped by a signal has 128 + its number: 130 for Ctrl-C, 143 for SIGTERM."""

    DONE = 0
    SOME_ERRORS = 1
    NOT_STARTED = 2
    BROKEN_OFF = 3


class JobCluster(Protocol):
    """The part of a cluster that a job uses."""

    def generate(self, prompts: Iterable[Mapping[str, Any]], **settings: Any) -> Iterator[Result]:
        """Results as they finish, for each prompt as many as their ``choices`` say.

        Prompts are read in the caller's thread, as the queue has room for them.
        """


_GO_ON = "start the job again with the same arguments to go on"

OpenCluster = Callable[[], AbstractContextManager[JobCluster]]


@dataclass(frozen=True)
class JobSettings:
    """The prompts of a job, and the settings that they are served with.

    Attributes:
        prompts, output: files of JSON lines.
        model: a checkpoint folder or a hub id, as given; results of another model aren't mixed with this one's.
        generation: settings of prompts that have none of their own.
        config: settings of the model.
    """

    prompts: Path
    output: Path
    model: str
    generation: GenerationSettings
    config: LoadConfig = field(default_factory=LoadConfig)

    @cached_property
    def digest(self) -> int:
        """32 bits of everything that changes a text besides its prompt."""
        # Settings that are defaults aren't in it, so that a later version may have more.
        generation = msgspec.to_builtins(self.generation, str_keys=True)
        shaping = msgspec.json.encode((self.model, self.config.output_settings, generation), order="sorted")
        return xxhash.xxh3_64_intdigest(shaping) >> 32


def run_job(job: JobSettings, open_cluster: OpenCluster) -> int:
    """Serve the prompts of a job that are left; returns the exit code. Messages go to standard error.

    Args:
        job: the same at every start, until it is done.
        open_cluster: called if a prompt is left.
    """
    try:
        with StopSignals() as signals:
            _check_files(job)
            index = index_lines(job.prompts)
            with ResultFile(job.output) as results:
                return _resume(job, index, results, open_cluster, signals)
    except JobStopped as stopped:
        say(f"stopped by {stopped}; {_GO_ON}")
        return stopped.exit_code
    except EpslotsError as error:
        say(f"error: {error}")
        return Exit.NOT_STARTED


def _check_files(job: JobSettings) -> None:
    prompts, output = job.prompts, job.output
    if output.exists() and prompts.exists() and output.samefile(prompts):
        raise ConfigError(f"--output {output} is the file of the prompts; give another")
    if "/runtime_resources/working_dir_files/" in str(output.resolve()):
        raise ConfigError(
            f"--output {output} is in the copy of the working folder that Ray made for this job and deletes after it; "
            f"give an absolute path"
        )


def _resume(job: JobSettings, index: LineIndex, results: ResultFile, open_cluster: OpenCluster, signals: StopSignals) -> int:
    """Go on where the results end; returns the exit code."""
    before = results.resume(index, job.digest)
    counts = Counts(index.total, before.done, before.errors)
    progress = JobProgress(counts)
    if before.done:
        torn = "; a line that was not written whole is done again" if before.torn_bytes else ""
        progress.say(f"going on: {before.done:,} of {index.total:,} prompts were done before{torn}")
    if before.done == index.total:
        progress.finish("nothing to do")
    elif not _serve(_JobRun(job, index, results, counts, progress), open_cluster, signals):
        return Exit.BROKEN_OFF
    return Exit.SOME_ERRORS if counts.all_errors else Exit.DONE


def _serve(run: _JobRun, open_cluster: OpenCluster, signals: StopSignals) -> bool:
    """Serve the prompts that are left; returns False if that breaks off."""
    progress, opened = run.progress, False
    try:
        with open_cluster() as cluster:
            opened = True
            signals.take_back()
            progress.start()
            try:
                run.serve(cluster)
            except JobStopped as stopped:
                progress.finish(f"stopping for {stopped}")  # before closing: Ray kills a job after some seconds
                raise
            finally:
                signals.ignore()  # nothing may interrupt closing
    except Exception as error:
        deliberate = isinstance(error, EpslotsError)
        if deliberate and not opened:
            raise
        if not deliberate:
            say("".join(traceback.format_exception(error)).rstrip())
        progress.finish("broken off")
        progress.say(f"error: {error}")
        progress.say(_GO_ON)
        return False
    progress.finish("done")
    return True


@dataclass
class _AskedLine:
    """A prompt in the cluster.

    Attributes:
        id: the prompt's own.
        as_ids: it was given as token ids.
        results: of its choices that are done.
    """

    line: Line
    id: str | int | None
    as_ids: bool
    results: list[Result] = field(default_factory=list)

    def choice(self, result: Result) -> ChoiceResult:
        """One of the results, as it is written."""
        if result.reason == "error":
            return ChoiceResult(error=result.error or "unknown")
        return ChoiceResult(
            text=result.text,
            tokens=len(result.tokens),
            token_ids=result.tokens if self.as_ids or result.text is None else None,
            reason=result.reason,
            logprobs=None if result.logprobs is None else compact_logprobs(result.logprobs),
        )


@dataclass
class _JobRun:
    """Prompts on their way into a cluster, and results on their way out.

    Attributes:
        index: lines of the prompts file; finished one by one.
        asked: prompts in the cluster, by their number there.
    """

    job: JobSettings
    index: LineIndex
    results: ResultFile
    counts: Counts
    progress: JobProgress
    asked: dict[int, _AskedLine] = field(default_factory=dict)

    def serve(self, cluster: JobCluster) -> None:
        """Send the prompts that are left, and write the results as they finish.

        Raises:
            ClusterError: the cluster can't go on, or a prompt got no answer.
            ConfigError: the prompts were changed meanwhile.
            OutputLost: a result can't be written.
        """
        with open_prompts(self.job.prompts) as file:
            for result in cluster.generate(self._take(file), **self.job.generation.keywords()):
                asked = self.asked[result.index]
                asked.results.append(result)
                if len(asked.results) == result.choices:
                    self._answer(self.asked.pop(result.index))
        if pending := self.index.total - self.index.done:
            raise ClusterError(f"{pending:,} prompts got no answer; is their file shorter now?")

    def _answer(self, asked: _AskedLine) -> None:
        """Write the result of a prompt whose choices are all done."""
        results = sorted(asked.results, key=lambda result: result.choice)
        if any(result.reason == "cancelled" for result in results):
            return  # we cancelled nothing: the next start serves it
        choices = [asked.choice(result) for result in results]
        if len(choices) == 1 and choices[0].error is not None:
            self._refuse(asked.line, choices[0].error)
            return
        for number, choice in enumerate(choices):
            if choice.error is not None:
                self._warn(asked.line, f"choice {number}: {choice.error}")
        self.counts.errors += any(choice.error is not None for choice in choices)
        self.counts.tokens += sum(choice.tokens or 0 for choice in choices)
        found: dict[str, Any] = {"choices": tuple(choices)} if len(choices) > 1 else msgspec.structs.asdict(choices[0])
        if (of_prompt := results[0].prompt_logprobs) is not None:
            found["prompt_logprobs"] = compact_logprobs(of_prompt)
        self._write(asked.line, id=asked.id, **found)

    def _take(self, file: BinaryIO) -> Iterator[Mapping[str, Any]]:
        """The prompts that are left; lines that hold no prompt get an error in the output here."""
        number = 0
        for line in read_lines(file):
            if line.number > self.index.last:
                return  # the line was added after the start: the next start serves it
            if line.digest != self.index.digest(line.number):
                raise ConfigError(f"--prompts {self.job.prompts}: line {line.number} was changed while the job ran")
            if self.index.is_done(line.number):
                continue
            try:
                prompt = decode_prompt(line)
            except ConfigError as error:
                self._refuse(line, str(error))
                continue
            self.asked[number] = _AskedLine(line, prompt.id, as_ids=not isinstance(prompt.prompt, str))
            number += 1
            yield prompt.request()

    def _refuse(self, line: Line, problem: str) -> None:
        self.counts.errors += 1
        self._warn(line, problem)
        self._write(line, **read_names(line), error=problem)

    def _warn(self, line: Line, problem: str) -> None:
        self.progress.warn(f"{self.job.prompts}, line {line.number}: {problem}")

    def _write(self, line: Line, **result: Any) -> None:
        digest = join_digest(self.job.digest, line.digest)
        self.results.append(ResultLine(line=line.number, digest=digest, **result))
        self.index.finish(line.number)
        self.counts.served += 1
        self.progress.advance()
