"""A request on its way from one engine to another: its texts so far, and where the first engine keeps their pages."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, NamedTuple, Protocol

from redraft.core.sequence import Request, Space
from redraft.core.tree import I32
from redraft.engine.admission import salted
from redraft.engine.output import Progress, Stats
from redraft.errors import Unsupported, shown
from redraft.kv.parcel import StoredText
from redraft.models.runner import Runner
from redraft.ops.format import Arrays


class Source(Protocol):
    """The memory of the engine that a parcel comes from."""

    def read(self, space: Space, pages: I32) -> Arrays:
        """Copies of these pages, name -> [pages, *shape]. OSError if they cannot be read any more."""
        ...


class Parcel(NamedTuple):
    """request: as it was before admission; progress: of each text; stored: what the memory exported of each text, None for one that
    ended or must be computed again; form: of the engine's model (Runner.form); adapter: the digest of the request's adapter, empty
    without one."""

    request: Request
    progress: list[Progress]
    stored: list[Any]
    form: dict[str, str]
    adapter: str

    @classmethod
    def made(cls, request: Request, progress: list[Progress], stored: list[Any], runner: Runner) -> Parcel:
        adapter = request.adapter
        salt = request.salt if adapter is None else request.salt.removeprefix(adapter.salted(""))
        if request.vectors is not None:
            salt = salt.removeprefix(salted(request.vectors, ""))
        copy = replace(request, salt=salt, adapter=None, leaves=False, sequences=[], prompt_logprobs=list(request.prompt_logprobs))
        return cls(copy, progress, stored, runner.form, "" if adapter is None else adapter.digest)

    def check(self, runner: Runner) -> None:
        """Unsupported unless the pages of the parcel are those that this model would compute."""
        for name, value in runner.form.items():
            if self.form.get(name) != value:
                raise Unsupported(f"request {self.request.id}: its pages come from an engine with another {name}")
        lora = self.request.params.lora
        own = runner.adapters.get(lora) if self.request.adapter is None and lora is not None else self.request.adapter
        if own is not None and own.digest != self.adapter:
            raise Unsupported(f"request {self.request.id}: lora = {shown(lora)} is the name of another adapter here")

    def numbers(self) -> dict[str, Any]:
        """All but the request, as JSON can hold it."""
        return {
            "progress": [[one.tokens, asdict(one.stats), one.ended] for one in self.progress],
            "texts": [_numbers(one) for one in self.stored],
            "form": self.form,
            "adapter": self.adapter,
            "counts": [self.request.cached_tokens, self.request.reused_tokens],
        }

    @classmethod
    def of(cls, request: Request, numbers: dict[str, Any]) -> Parcel:
        """What numbers() returned, with the request, which is not admitted anywhere."""
        request.cached_tokens, request.reused_tokens = numbers["counts"]
        progress = [Progress(tokens, _stats(stats), ended) for tokens, stats, ended in numbers["progress"]]
        return cls(request, progress, [_stored(one) for one in numbers["texts"]], numbers["form"], numbers["adapter"])


def _stats(numbers: dict[str, Any]) -> Stats:
    return Stats(**{**numbers, "by_drafter": {name: tuple(counts) for name, counts in numbers["by_drafter"].items()}})


def _numbers(stored: Any) -> Any:
    """What a memory exported; several memories export a list."""
    if isinstance(stored, list):
        return [_numbers(one) for one in stored]
    return stored.numbers() if isinstance(stored, StoredText) else stored


def _stored(numbers: Any) -> Any:
    if isinstance(numbers, list):
        return [_stored(one) for one in numbers]
    return StoredText.of(numbers) if isinstance(numbers, dict) else numbers
