"""`LLM`: a checkpoint that generates. Loads once, then any number of prompts through one engine."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, SupportsIndex, cast

import torch

from redraft import registry
from redraft.card import Card, Guarantee
from redraft.config import EngineConfig, SamplingParams, SchedulerConfig
from redraft.core.law import TopLogprobs
from redraft.core.sequence import Pooling, Request
from redraft.core.spec import ModelSpec
from redraft.core.tree import F64
from redraft.draft.drafter import Drafter
from redraft.engine import policies, speculation
from redraft.engine.engine import Engine, Event, Stats
from redraft.engine.interrupt import InterruptBetween
from redraft.errors import CheckpointError, InvalidInput, RedraftError, Unsupported
from redraft.models import loader, memory, mixers
from redraft.models.runner import Runner
from redraft.models.tokenizer import Message, Tokenizer
from redraft.ops import library
from redraft.ops.backend import Backend
from redraft.sample.sampler import Sampler
from redraft.sched.scheduler import Scheduler

Prompt = str | Mapping[str, Any]


@dataclass
class CompletionOutput:
    """One text. `drafted[i]`: token i was an accepted draft; `stats`: steps, drafted, accepted, mean_acceptance_length."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TopLogprobs] | None = None
    finish_reason: str | None = None
    drafted: list[bool] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)


@dataclass(frozen=True)
class CacheMiss:
    """Why no more of a prompt came from the prefix cache: its token `at` differs from cached text. cached_text: what stands there
    in the cache; lost: tokens that would have been reused as well, had it been the same from there on."""

    at: int
    token: int
    text: str
    cached_token: int
    cached_text: str
    lost: int

    def __str__(self) -> str:
        return f"token {self.at} is {self.text!r}, in the cache {self.cached_text!r}: up to {self.lost} more tokens would have been reused"


class Patch(NamedTuple):
    """`text` in place of the characters start..end (end excluded) of a text; start = end inserts, an empty text deletes."""

    start: int
    end: int
    text: str


@dataclass
class RequestOutput:
    """One prompt and its n texts. `error` is set, and `outputs` empty, when a prompt of a list was refused.

    cached_tokens: of the prompt, found in the prefix cache; cache_miss: what ended that, None where nothing cached goes on (texts
    with a codec, per-head eviction or a read with data of its own share no cache); reused_tokens: of an edited text, taken over
    from the text before the edit, whose tokens `before` are; guarantee: of the text, the weakest of engine and policies.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    prompt_logprobs: list[TopLogprobs | None] | None = None
    cached_tokens: int = 0
    reused_tokens: int = 0
    cache_miss: CacheMiss | None = None
    guarantee: str = ""
    before: list[int] = field(default_factory=list)
    request: Request | None = field(default=None, repr=False)
    seed: int | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.error is not None or all(output.finish_reason for output in self.outputs)


@dataclass(frozen=True)
class Delta:
    """A piece of a stream: `prompt` is the prompt's place in the list, `index` the sample's."""

    prompt: int
    index: int
    text: str
    token_ids: list[int]
    drafted: list[bool]
    logprobs: list[TopLogprobs]
    finish_reason: str | None
    stats: Stats
    error: str | None = None


@dataclass(frozen=True)
class Setup:
    """What follows from a configuration and the checkpoint's headers, before any weight is read. slabs: the pool."""

    drafter: Drafter
    scheduler: Scheduler
    checkpoint: loader.Checkpoint
    backend: Backend
    max_model_len: int
    slabs: int

    @classmethod
    def of(cls, config: EngineConfig) -> Setup:
        drafter = registry.create("draft", config.draft)  # wrong names are told before the checkpoint is looked for
        registry.create("verify", config.verify)
        quant = None if config.model.quant is None else registry.create("quant", config.model.quant)
        device = _device(config.model.device)
        scheduler = _scheduler(config, device)
        chosen = config.model.backend
        if chosen not in ("auto", *registry.BACKENDS):
            raise registry.unknown("backend", chosen, ("auto", *registry.BACKENDS))
        path = loader.resolve(config.model.model)
        if config.draft_model is not None:
            loader.resolve(config.draft_model)  # whether it is used or not
        checkpoint = loader.inspect(path, "float64" if chosen == "reference" else config.model.dtype, device, quant)
        if chosen == "auto":
            specs = [checkpoint.spec, *_second(config, device)]
            chosen = "native" if all(library.serves(checkpoint.dtype, device, spec)[0] == "native" for spec in specs) else "torch"
        backend: Backend = registry.load(registry.BACKENDS[chosen])(checkpoint.dtype, device)
        if config.model.threads is not None:
            backend.use_threads(config.model.threads)
        max_model_len = config.model.max_model_len or checkpoint.context
        if max_model_len > checkpoint.context:
            raise InvalidInput(f"max_model_len = {max_model_len}: the checkpoint's context is {checkpoint.context}")
        mixers.check(checkpoint.spec, backend)
        slab_bytes = backend.slab_bytes(checkpoint.spec)
        free, most = memory.limits(device), scheduler.max_seqs
        slabs = memory.pool_slabs(config.cache, checkpoint, slab_bytes, max_model_len, max_seqs=most, free=free)
        return cls(drafter, scheduler, checkpoint, backend, max_model_len, slabs)


class LLM:
    """A loaded model with an engine.

    >>> from redraft import LLM, SamplingParams
    >>> llm = LLM("embedded", draft="token-recycling")                                          # doctest: +SKIP
    >>> llm.generate("def add(", SamplingParams(temperature=0, max_tokens=20))[0].outputs[0].text    # doctest: +SKIP

    Options are the flat fields of EngineConfig (model, dtype, draft, verify, scheduler, token_budget, max_seqs,
    draft_rows, cache_memory ...). Raises CheckpointError, OutOfMemory, InvalidInput or Unsupported, one line each.
    """

    def __init__(self, model: str | None = None, *, config: EngineConfig | None = None, **options: Any) -> None:
        if config is not None and (options or model is not None):
            raise InvalidInput("LLM takes either a config or options, not both")
        if config is None:
            config = EngineConfig.of(**({} if model is None else {"model": model}), **options)
        self.config = config
        setup = Setup.of(config)
        checkpoint = setup.checkpoint
        self.max_model_len = setup.max_model_len
        self.tokenizer = Tokenizer(checkpoint.path)
        self.defaults = checkpoint.defaults
        self.eos = frozenset(checkpoint.eos_ids)
        self.name = config.model.model
        weights = loader.read(checkpoint, setup.backend.device, setup.backend.pack)
        self.runner = Runner(
            checkpoint.spec,
            weights,
            setup.backend,
            setup.slabs,
            sharing=config.cache.prefix_sharing,
            source=checkpoint.path,
            draft_model=config.draft_model,
            quant=checkpoint.quant,
        )
        self.engine = self._engine(setup.scheduler, setup.drafter)
        self._numbers = itertools.count()
        self._inboxes: dict[str, deque[Event]] = {}  # request id -> news that its caller has not taken yet

    def sibling(self, **options: Any) -> Self:
        """The same loaded model behind another engine: other draft, verify or scheduler options. The two share pages
        and must not run at the same time; nothing is loaded again."""
        own = {**self.config.schedule.model_dump(exclude_unset=True), "draft": self.config.draft, "verify": self.config.verify}
        if other := set(options) - {*SchedulerConfig.model_fields, "draft", "verify"}:
            raise InvalidInput(f"sibling: {', '.join(sorted(other))} cannot differ from the loaded model's")
        flat = {**own, **options}
        changed = EngineConfig.of(**flat)
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.config = changed.but(model=self.config.model, cache=self.config.cache, draft_model=self.config.draft_model)
        drafter = registry.create("draft", twin.config.draft)
        twin.engine = twin._engine(_scheduler(twin.config, self.runner.backend.device), drafter)
        return twin

    @property
    def guarantee(self) -> Guarantee:
        """The weakest of the parts towards the plain loop over the weights as they are held, for requests that choose no policies of
        their own; see `guarantee_of`."""
        config = self.config
        parts = {"draft": config.draft, "verify": config.verify, "sched": config.schedule.scheduler}
        cards: list[Card] = [cast(Any, registry.method(seam, registry.parse(text)[0])).card for seam, text in parts.items()]
        return max(card.guarantee for card in cards)

    def guarantee_of(self, params: SamplingParams, reuse: str = "") -> Guarantee:
        """The weakest of the engine's parts, of the form of the weights and of the parts that a request chooses; reuse: as given to
        `edit`."""
        quant, sched = self.runner.quant, registry.parse(self.config.schedule.scheduler)[0]
        weights = Guarantee.SAME_TEXT if quant is None else quant.card.guarantee
        own: Card = cast(Any, registry.method("sched", sched)).card
        chosen = speculation.guarantee(params, self.config.draft, self.config.verify)
        return max(own.guarantee, chosen, weights, policies.guarantee(params, reuse))

    def _engine(self, scheduler: Any, drafter: Any) -> Engine:
        verifier = registry.create("verify", self.config.verify)
        sampler = Sampler(self.runner.spec.vocab, self.eos, self.tokenizer.spellings, verifier.drafts, self.runner.backend.gumbel)
        return Engine(
            self.runner,
            scheduler,
            drafter.open(self.runner, sampler),
            verifier,
            sampler,
            max_model_len=self.max_model_len,
            eos=self.eos,
            decode=self.tokenizer.decode,
            decode_all=self.tokenizer.decode_all,
            draft=self.config.draft,
        )

    # ---- use

    def params(self, params: SamplingParams | None = None) -> SamplingParams:
        """The given fields over those that the checkpoint's generation_config.json sets."""
        given = {} if params is None else {name: getattr(params, name) for name in params.model_fields_set}
        return SamplingParams(**{**self.defaults, **given})

    def generate(
        self, prompts: Prompt | Seq[Prompt], sampling_params: SamplingParams | Seq[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Texts for one prompt or a list: each a string or {"prompt_token_ids": [...]}, with "context": n where policies shall
        act on the prompt's tokens behind the first n as if they had been generated. A single bad prompt raises; in a list its
        RequestOutput.error is set and the rest finish."""
        outputs = self._submit(prompts, sampling_params)
        try:
            for _ in self._run(outputs):
                pass
        finally:
            self._end(outputs)
        return outputs

    def edit(
        self,
        text: str | RequestOutput,
        patch: Patch | Seq[Patch],
        sampling_params: SamplingParams | None = None,
        *,
        reuse: str = "pie",
    ) -> list[RequestOutput]:
        """Goes on with a text that was changed: what is in the cache of the old text is taken over, the edited part computed.

        text: as given to `generate` before, or what it or `edit` returned (the prompt and its first text); patch: one or several,
        places in characters of that text, not overlapping. Nothing in the cache: the new text is computed as any other. An
        edited text's own pages are nobody's, so a chain of edits goes back to the last text that was computed whole. Such a
        request takes no keep, no codec and no read with data of its own. InvalidInput names a place outside of the text.
        """
        if isinstance(text, RequestOutput):
            if not text.outputs:
                raise InvalidInput("edit: this output holds no text, its prompt was refused")
            prompt = self.tokenizer.decode(text.prompt_token_ids) if text.prompt is None else text.prompt
            before = text.before or text.prompt_token_ids + text.outputs[0].token_ids
            old = prompt + text.outputs[0].text
        elif isinstance(text, str):
            before, old = self._tokens(text), text
        else:
            raise InvalidInput(f"edit: text of type {type(text).__name__}: a string or a RequestOutput is needed")
        if not isinstance(reuse, str) or registry.parse(reuse)[0] not in registry.METHODS["reuse"]:
            raise registry.unknown("reuse method", str(reuse), registry.METHODS["reuse"])
        new = _patched(old, [patch] if isinstance(patch, Patch) else list(patch))
        outputs = self.generate({"prompt_token_ids": self._tokens(new), "before": before, "reuse": reuse}, sampling_params)
        for output in outputs:
            output.prompt, output.before = new, before
        return outputs

    def chat(
        self, messages: Seq[Message] | Seq[Seq[Message]], sampling_params: SamplingParams | Seq[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Replies to one conversation or a list, by the checkpoint's chat template."""
        return self.generate(self.chat_prompts(messages), sampling_params)

    def chat_prompts(self, messages: Seq[Message] | Seq[Seq[Message]]) -> list[Prompt] | Prompt:
        """Conversations as prompts, for generate and stream."""
        if not messages:
            raise InvalidInput("messages is empty: at least one message is needed")
        if isinstance(messages[0], Mapping):
            return {"prompt_token_ids": self.tokenizer.encode_chat(cast(Seq[Message], messages))}
        return [{"prompt_token_ids": self.tokenizer.encode_chat(one)} for one in cast(Seq[Seq[Message]], messages)]

    def stream(
        self, prompts: Prompt | Seq[Prompt], sampling_params: SamplingParams | Seq[SamplingParams] | None = None
    ) -> Generator[Delta]:
        """The same as `generate`, piece by piece. Closing the iterator aborts what is not finished."""
        outputs = self._submit(prompts, sampling_params)
        deltas = self._deltas(outputs)
        next(deltas)  # into its try: an iterator that is dropped unread aborts too
        return deltas

    def embed(self, prompts: Prompt | Seq[Prompt], pooling: str = "last", *, normalize: bool = True) -> list[F64]:
        """f64[hidden] of each prompt: hidden states behind the final norm, of its last token or the mean of all ("last", "mean"), of
        length 1 where `normalize`. InvalidInput names a prompt that is refused."""
        if pooling not in ("last", "mean"):
            raise InvalidInput(f"pooling = {pooling!r}: last or mean is allowed")
        many = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        params = SamplingParams(temperature=0, max_tokens=1, draft="none")
        outputs: list[RequestOutput] = []
        try:
            for i, prompt in enumerate(many):
                try:
                    outputs += self._submit({"prompt_token_ids": self._tokens(prompt), "pool": Pooling(pooling)}, params)
                except RedraftError as error:
                    raise type(error)(f"prompts[{i}]: {error}" if len(many) > 1 else str(error)) from None
            for _ in self._run(outputs):
                pass
        finally:
            self._end(outputs)
        return [cast(Request, output.request).embedding(normalize) for output in outputs]

    def _deltas(self, outputs: list[RequestOutput]) -> Generator[Delta]:
        place = {output.request_id: i for i, output in enumerate(outputs)}
        try:
            yield cast(Delta, None)  # taken by `stream`
            for i, output in enumerate(outputs):
                if output.error is not None:
                    yield Delta(i, 0, "", [], [], [], "error", Stats(), output.error)
            for event in self._run(outputs):
                reason = None if event.reason is None else str(event.reason)
                where = place[event.request.id], event.index
                yield Delta(*where, event.text, event.tokens, event.drafted, event.logprobs, reason, event.stats.copy())
        finally:
            self._end(outputs)

    def _submit(self, prompts: Prompt | Seq[Prompt], sampling_params: SamplingParams | Seq[SamplingParams] | None) -> list[RequestOutput]:
        single = isinstance(prompts, (str, Mapping))
        many: list[Prompt] = [cast(Prompt, prompts)] if single else list(cast(Seq[Prompt], prompts))
        every: list[SamplingParams | None]
        every = (
            [sampling_params] * len(many)
            if sampling_params is None or isinstance(sampling_params, SamplingParams)
            else list(sampling_params)
        )
        if len(every) != len(many):
            raise InvalidInput(f"{len(many)} prompts but {len(every)} sampling params: give one, or one each")
        for i, one in enumerate(every):
            if not isinstance(one, SamplingParams | None):
                raise InvalidInput(f"sampling_params[{i}] is a {type(one).__name__}: SamplingParams is needed")
        outputs: list[RequestOutput] = []
        for prompt, one in zip(many, every, strict=True):
            output = RequestOutput(str(next(self._numbers)), prompt if isinstance(prompt, str) else None, [])
            try:
                chosen = self.params(one)
                if isinstance(chosen.prediction, str):
                    chosen = chosen.but(prediction=tuple(self.tokenizer.encode(chosen.prediction, special=False)))
                output.prompt_token_ids = self._tokens(prompt)
                extra = {name: value for name, value in prompt.items() if name != "prompt_token_ids"} if isinstance(prompt, Mapping) else {}
                request = Request(output.request_id, output.prompt_token_ids, chosen, **extra)
                self.engine.add(request)
                self._inboxes[request.id] = deque()
                output.request = request
            except RedraftError as error:
                if single:
                    raise
                output.error = str(error)
            except BaseException:  # not a prompt's fault: those before it must not stay behind
                self._end(outputs)
                raise
            else:
                output.seed, output.guarantee = request.params.seed, self.guarantee_of(chosen, request.reuse).label
                output.outputs = [CompletionOutput(i, logprobs=None if chosen.logprobs is None else []) for i in range(chosen.n)]
            outputs.append(output)
        return outputs

    def _tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt) if prompt else []
        if not isinstance(prompt, Mapping) or "prompt_token_ids" not in prompt:
            raise InvalidInput(f"prompt of type {type(prompt).__name__}: a string or {{'prompt_token_ids': [...]}} is needed")
        if unknown := set(prompt) - {"prompt_token_ids", "context", "before", "reuse", "pool"}:
            raise InvalidInput(f"prompt has an unknown key {min(unknown)!r}: prompt_token_ids, context, before and reuse are allowed")
        if not isinstance(prompt.get("reuse", ""), str) or not isinstance(prompt.get("before", []), list):
            raise InvalidInput("prompt: reuse is the name of a way of reuse, before a list of token ids")
        if not isinstance(prompt.get("pool", Pooling.NONE), Pooling):
            raise InvalidInput(f"pool = {prompt['pool']!r}: a Pooling is needed; see LLM.embed")
        if type(prompt.get("context", 0)) is not int:
            raise InvalidInput(f"context = {prompt['context']!r}: a number of tokens is needed")
        ids = prompt["prompt_token_ids"]
        if isinstance(ids, (str, bytes, Mapping)) or not isinstance(ids, Iterable):
            raise InvalidInput(f"prompt_token_ids of type {type(ids).__name__}: a list of token ids is needed")
        return [token if isinstance(token, bool) or not isinstance(token, SupportsIndex) else token.__index__() for token in ids]

    def _run(self, outputs: list[RequestOutput]) -> Iterator[Event]:
        """Steps until all are finished. Others may be under way in the same engine: whoever steps leaves their news in
        their inboxes."""
        mine = {output.request_id: output for output in outputs if output.error is None}
        while not all(output.finished for output in mine.values()):
            if not any(self._inboxes[request_id] for request_id in mine):
                if not self.engine.has_work:
                    return  # aborted by someone else
                with InterruptBetween() as interrupt:
                    for event in self.engine.step():
                        if event.request.id in self._inboxes:
                            self._inboxes[event.request.id].append(event)
                    interrupt.check()
            for request_id, output in mine.items():
                while inbox := self._inboxes[request_id]:
                    event = inbox.popleft()
                    self._apply(event, output)
                    yield event

    def _end(self, outputs: list[RequestOutput]) -> None:
        """Whatever happened, Ctrl-C and a closed iterator too, nothing of these requests stays in the engine."""
        for output in outputs:
            self._inboxes.pop(output.request_id, None)
            if not output.finished:
                self.engine.abort(output.request_id)
                for one in output.outputs:
                    one.finish_reason = one.finish_reason or "abort"

    def _apply(self, event: Event, output: RequestOutput) -> None:
        one = output.outputs[event.index]
        one.text += event.text
        one.token_ids += event.tokens
        one.drafted += event.drafted
        one.stats = event.stats
        if one.logprobs is not None:
            one.logprobs += event.logprobs
        if event.reason is not None:
            one.finish_reason = str(event.reason)
        output.cached_tokens, output.reused_tokens = event.request.cached_tokens or 0, event.request.reused_tokens
        if event.request.miss is not None and output.cache_miss is None:
            at, token, cached, lost = event.request.miss
            output.cache_miss = CacheMiss(at, token, self.tokenizer.decode_all([token]), cached, self.tokenizer.decode_all([cached]), lost)
        if event.request.params.prompt_logprobs is not None:
            output.prompt_logprobs = event.request.prompt_logprobs


def _patched(text: str, patches: list[Patch]) -> str:
    """The text with all patches applied; places are those of the text before any of them."""
    parts, at = [], 0
    for i, patch in enumerate(patches):
        if not isinstance(patch, Patch) or [type(part) for part in patch] != [int, int, str]:
            raise InvalidInput(f"patch[{i}] = {patch!r}: a Patch of two places and a text is needed")
    for start, end, new in sorted(patches):
        if not at <= start <= end <= len(text):
            allowed = f"{at} <= start <= end <= {len(text)}"
            raise InvalidInput(f"patch = ({start}, {end}, ...): outside of the text or over another patch; {allowed} is allowed")
        parts += [text[at:start], new]
        at = end
    return "".join([*parts, text[at:]])


def _scheduler(config: EngineConfig, device: torch.device) -> Scheduler:
    schedule = config.schedule
    total = schedule.draft_total if schedule.draft_total is not None else 128 if device.type == "cuda" else 32
    asked = "max_seqs" in schedule.model_fields_set
    max_seqs = schedule.max_seqs if asked else min(schedule.max_seqs, schedule.token_budget)
    budgets = {"token_budget": schedule.token_budget, "max_seqs": max_seqs, "draft_rows": schedule.draft_rows}
    return cast(Scheduler, registry.create("sched", schedule.scheduler, draft_total=total, **budgets))


def _second(config: EngineConfig, device: torch.device) -> list[ModelSpec]:
    """The second model's spec, where one is named and whole; what is wrong with it is told when it is loaded."""
    if config.draft_model is None:
        return []
    try:
        return [loader.inspect(loader.resolve(config.draft_model), config.model.dtype, device).spec]
    except (CheckpointError, Unsupported):
        return []


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidInput(f"device = {name!r}: auto, cpu, cuda or cuda:N is allowed") from None
    if device.type not in ("cpu", "cuda"):
        raise InvalidInput(f"device = {name!r}: auto, cpu, cuda or cuda:N is allowed")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInput(f"device = {name!r}: PyTorch finds no CUDA device here")
    return device
