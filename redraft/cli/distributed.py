"""Offline batches on a Ray cluster: each of several engines computes pieces of a file of prompts. Ray moves the pieces, places the engines
and starts them again. The prompts are read, and the results written, by the machine of the command."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Generator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from redraft import __version__
from redraft.bench import report
from redraft.cli import batch
from redraft.cli.options import Given
from redraft.cli.pieces import Pieces
from redraft.cli.prompting import Prompting
from redraft.cli.rows import Prompts
from redraft.config import EngineConfig
from redraft.errors import RedraftError
from redraft.workers.ray_cluster import RayCluster, connect, last_line

if TYPE_CHECKING:
    from redraft.llm import LLM

AT_ONCE = 2  # pieces of an engine, so that the end of one does not leave it without work
WAITING = 1  # further pieces that lie ready at an engine
RETRIES = 3  # times that a piece is computed again after the process of its engine died


@dataclass(frozen=True)
class Job:
    """What each engine computes with."""

    config: EngineConfig
    template: str | None
    raw: bool
    sampling: Given
    version: str = __version__

    def about(self) -> dict[str, Any]:
        """What the texts depend on, for a later run."""
        engine = self.config.model_dump(mode="json", exclude={"model": {"threads", "weight_cache"}, "cache": True, "schedule": True})
        given = {**engine.pop("model"), **engine, "sampling": self.sampling, "chat_template": self.template, "raw": self.raw}
        return dict(json.loads(json.dumps(given)))


class Worker:
    """The actor with an engine. Threads call it at the same time."""

    def __init__(self, job: Job) -> None:
        self.job, self.failed = job, ""
        try:
            if job.version != __version__:
                raise RedraftError(f"a node of the cluster has Redraft {__version__}, this machine {job.version}")
            self.llm, self.prompting = _load(job)
        except RedraftError as error:
            self.failed = str(error)

    def __call__(self, piece: Mapping[str, Any]) -> dict[str, Any]:
        if self.failed:
            return {"start": piece["start"], "rows": b"", "failed": self.failed}
        named = [(batch.Result(index, name), line) for index, name, line in zip(piece["index"], piece["name"], piece["line"])]
        found = [result.row() for result in batch.results(self.llm, self.prompting, named, self.job.sampling)]
        return {"start": piece["start"], "rows": json.dumps(found).encode(), "failed": ""}


def _load(job: Job) -> tuple[LLM, Prompting]:
    from redraft.llm import LLM

    llm = LLM(config=job.config)
    return llm, Prompting.of(llm, job.template, raw=job.raw)


@dataclass(frozen=True)
class Reader:
    """Gives a piece its lines."""

    prompts: Prompts
    size: int

    def __call__(self, piece: Mapping[str, Any]) -> dict[str, Any]:
        start = int(piece["start"])
        named = batch.named(self.prompts, start, start + self.size)
        return {
            "start": start,
            "index": [result.index for result, _ in named],
            "name": [result.name for result, _ in named],
            "line": [line for _, line in named],
        }


def run(job: Job, prompts: Prompts, output: Path, address: str | None, replicas: int | None, *, overwrite: bool) -> int:
    """Writes the pieces of `output` that are missing. address: of a cluster, see ray_cluster.connect; replicas: engines, None: one for each
    node. The exit code: 1 if any row of the folder has an error, 130 after Ctrl-C."""
    from rich.console import Console

    code = 0
    pieces = Pieces(output, prompts, job.about(), AT_ONCE * (replicas or 1), overwrite=overwrite)
    failed, before = pieces.errors_before, pieces.rows_before
    written = before
    console = Console(stderr=True)
    if pieces.missing:
        with ExitStack() as stack:
            tick = stack.enter_context(report.bar(console, prompts.count - before))
            cluster = stack.enter_context(connect(address, (replicas or 1) * (job.config.model.threads or 1)))
            stack.enter_context(warnings.catch_warnings(action="ignore"))  # Ray's, about its own settings
            computed = stack.enter_context(closing(_computed(cluster, job, pieces, replicas or len(cluster.cpus))))
            try:
                for start, found in computed:
                    pieces.write(start, found)
                    for row in found:
                        failed += row["error"] is not None
                        tick("prompts")
                    written += len(found)
            except KeyboardInterrupt:
                code = 130
    earlier = f", {before} of them by an earlier run" if before else ""
    typer.echo(f"{written} of {prompts.count} {prompts.word}s are in {output}{earlier}, {failed} with an error", err=True)
    return code or int(failed > 0)


def _computed(cluster: RayCluster, job: Job, pieces: Pieces, replicas: int) -> Generator[tuple[int, list[dict[str, Any]]]]:
    """The first row and the results of each missing piece, as they finish. RedraftError if an engine cannot begin, or dies again and again
    with the same piece."""
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a piece takes as long as it takes
    config, cpus, gpus = cluster.placed(job.config, replicas)
    here = {f"node:{ray.util.get_node_ip_address()}": 0.001}  # a resource that only this node has
    found = (
        ray.data.from_items([{"start": start} for start in pieces.missing], override_num_blocks=len(pieces.missing))
        .map(Reader(pieces.prompts, pieces.size), compute=ray.data.TaskPoolStrategy(size=1), num_cpus=0, resources=here)
        .map(
            Worker,
            fn_constructor_args=(replace(job, config=config),),
            compute=ray.data.ActorPoolStrategy(
                size=replicas,
                max_tasks_in_flight_per_actor=AT_ONCE + WAITING,
                max_concurrent_calls_per_actor=AT_ONCE,
                enable_true_multi_threading=True,
            ),
            num_cpus=cpus,
            num_gpus=gpus,
            ray_remote_args_fn=lambda: {"max_restarts": -1, "max_task_retries": RETRIES},
        )
    )
    try:
        with closing(
            iter(found.iter_batches(batch_size=1, batch_format="pyarrow"))
        ) as batches:  # else a thread of it goes on after an error
            for one in (one for some in batches for one in some.to_pylist()):
                if one["failed"]:
                    raise RedraftError(one["failed"])
                yield one["start"], json.loads(one["rows"])
    except ray.exceptions.RayActorError:
        raise RedraftError(f"the process of an engine died {RETRIES + 1} times with the same rows; the others are written") from None
    except ray.exceptions.RayError as error:
        raise RedraftError(f"an engine failed: {last_line(error)}") from None
