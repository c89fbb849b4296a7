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
from cluster.generation import GenerationSettings, Result
from cluster.job.progress import Counts, JobProgress
from cluster.job.prompts import LineIndex, decode_line, index_lines, open_prompts, read_names
from cluster.job.results import ResultFile, ResultLine, join_digest
from cluster.job.signals import JobStopped, StopSignals
from epslots.config import LoadConfig
from epslots.errors import ConfigError, EpslotsError
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
        """Results as they finish. Prompts are read in the caller's thread, as the queue has room for them."""


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
        shaping = msgspec.json.encode((self.model, self.config.output_settings, self.generation), order="sorted")
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
class _JobRun:
    """Prompts on their way into a cluster, and results on their way out.

    Attributes:
        index: lines of the prompts file; finished one by one.
        asked: prompts in the cluster, by their number there: line, id, and whether it was given as token ids.
    """

    job: JobSettings
    index: LineIndex
    results: ResultFile
    counts: Counts
    progress: JobProgress
    asked: dict[int, tuple[Line, str | int | None, bool]] = field(default_factory=dict)

    def serve(self, cluster: JobCluster) -> None:
        """Send the prompts that are left, and write the results as they finish.

        Raises:
            ClusterError: the cluster can't go on, or a prompt got no answer.
            ConfigError: the prompts were changed meanwhile.
            OutputLost: a result can't be written.
        """
        settings = msgspec.structs.asdict(self.job.generation)
        with open_prompts(self.job.prompts) as file:
            for result in cluster.generate(self._take(file), **settings):
                line, id, as_ids = self.asked.pop(result.index)
                if result.reason == "cancelled":
                    continue  # we cancelled nothing: the next start serves it
                if result.reason == "error":
                    self._refuse(line, result.error or "unknown")
                    continue
                self.counts.tokens += len(result.tokens)
                token_ids = result.tokens if as_ids or result.text is None else None
                self._write(
                    line, id=id, text=result.text, tokens=len(result.tokens), token_ids=token_ids, reason=result.reason
                )
        if missing := self.index.total - self.index.done:
            raise ClusterError(f"{missing:,} prompts got no answer; is their file shorter now?")

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
                prompt = decode_line(line)
            except ConfigError as error:
                self._refuse(line, str(error))
                continue
            self.asked[number] = (line, prompt.id, not isinstance(prompt.prompt, str))
            number += 1
            yield prompt.request()

    def _refuse(self, line: Line, problem: str) -> None:
        self.counts.errors += 1
        self.progress.warn(f"{self.job.prompts}, line {line.number}: {problem}")
        self._write(line, **read_names(line), error=problem)

    def _write(self, line: Line, **result: Any) -> None:
        digest = join_digest(self.job.digest, line.digest)
        self.results.append(ResultLine(line=line.number, digest=digest, **result))
        self.index.finish(line.number)
        self.counts.served += 1
        self.progress.advance()
