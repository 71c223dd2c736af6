"""`LLM`: a loaded checkpoint that generates text. One engine serves any number of prompts and threads."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self, cast
from weakref import WeakSet

import numpy as np

from redraft import inputs, registry
from redraft.config import ADAPTER_NAME, EngineConfig, SamplingParams, SchedulerConfig
from redraft.core.sequence import Pooling, Request, Wants
from redraft.core.tree import F32, F64
from redraft.engine.engine import Engine
from redraft.engine.interrupt import InterruptBetween
from redraft.engine.output import Event, Stats
from redraft.engine.prepend import Prepend, embed
from redraft.errors import InvalidInput, RedraftError, Unsupported, shown
from redraft.front import Front
from redraft.inputs import Conversation, Params, Patch, Prompt, Tools
from redraft.kv.reuse.chunks import FILLER, text_of
from redraft.models import adapter, packs
from redraft.models.runner import Runner
from redraft.ops.backend import Room
from redraft.outputs import CacheMiss, CompletionOutput, Delta, RequestOutput
from redraft.sample.sampler import Sampler
from redraft.sched.scheduler import Scheduler
from redraft.setup import scheduler_of
from redraft.turns import Turns

SPARE = 0.5  # seconds that measurements may take after a reply


class LLM(Front):
    """A loaded model with an engine.

    >>> from redraft import LLM, SamplingParams
    >>> llm = LLM("embedded", draft="token-recycling")                                          # doctest: +SKIP
    >>> llm.generate("def add(", temperature=0, max_tokens=20)[0].outputs[0].text                # doctest: +SKIP

    Options are the flat fields of EngineConfig (model, dtype, draft, verify, scheduler, token_budget, max_seqs,
    draft_rows, cache_memory ...). Raises CheckpointError, OutOfMemory, InvalidInput or Unsupported, one line each.
    room: gives the cache its memory, so that other processes can read it.

    Prompts: a string, a list of token ids, or a mapping with `prompt`, `prompt_token_ids`, `prompt_embeds` or `messages`; or a
    list of these. prompt_embeds: an array [n, hidden] that takes the place of the tokens' embeddings; beside n prompt_token_ids its
    rows of NaN start from their tokens. A mapping may add `context`: n. Cache policies then treat the prompt's tokens after the
    first n as generated.
    {"prompt": ..., "suffix": ...} fills in the middle: the text is what stands between the two.

    Parameters: a SamplingParams, a list with one for each prompt, or its fields as keywords. An object and keywords
    together are refused.

    Threads
    -------
    Any number of threads may call one LLM. Their requests run together, in the batches of one engine. Every request gets
    the text that it gets alone with the same seed. The engine makes one step at a time, in the thread of any caller that
    waits for output. An iterator that `stream` returned belongs to one thread at a time. Siblings share pages, so they
    run one at a time: a call raises Unsupported while another sibling has requests under way. Ctrl-C reaches the main
    thread only, between two steps.
    """

    def __init__(self, model: str | None = None, *, config: EngineConfig | None = None, room: Room | None = None, **options: Any) -> None:
        super().__init__(model, config=config, **options)
        setup, checkpoint, config = self.setup, self.setup.checkpoint, self.config
        weights = packs.read(checkpoint, setup.backend, config.model.weight_cache)
        self.runner = Runner(
            checkpoint.spec,
            weights,
            setup.backend,
            setup.blocks,
            sharing=config.cache.prefix_sharing,
            source=checkpoint.path,
            draft_model=config.draft_model,
            quant=checkpoint.quant,
            weight_cache=config.model.weight_cache,
            room=room,
        )
        if config.cache.kept is not None:
            self.runner.keep_prefixes(config.cache.kept, config.cache.prefix_cache_size, str(checkpoint.path))
        self._turns = Turns()
        for name, folder in config.model.adapters.items():
            self.load_lora(name, folder)
        self.engine = self._engine(setup.scheduler, setup.drafter)
        for length in self.cache_lengths:
            self.engine.policies.check(self.cached(SamplingParams(), length))  # a conflict is an error now, not for the first request
        self._engines = WeakSet([self.engine])  # of this LLM and its siblings
        self._numbers = itertools.count()
        self._own_scheduler: Scheduler | None = None  # the engine's, while a call has another one
        self._inboxes: dict[str, deque[Event]] = {}  # request id -> what its caller has not taken yet

    def sibling(self, **options: Any) -> Self:
        """The same loaded model with another engine: other draft, verify or scheduler options. Nothing is loaded again.

        Siblings share pages, so they run one at a time: a call raises Unsupported while another has requests under way.
        """
        if other := set(options) - {*SchedulerConfig.model_fields, "draft", "verify"}:
            raise InvalidInput(f"sibling: {', '.join(sorted(other))} cannot differ from the loaded model's")
        own = {**self.config.schedule.model_dump(exclude_unset=True), "draft": self.config.draft, "verify": self.config.verify}
        changed = EngineConfig.of(**{**own, **options})
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        made._own_scheduler = None
        made.config = changed.but(model=self.config.model, cache=self.config.cache, draft_model=self.config.draft_model)
        drafter = registry.create("draft", made.config.draft)
        with InterruptBetween(), self._turns:
            made.engine = made._engine(scheduler_of(made.config, str(self.runner.backend.device)), drafter)
            self._engines.add(made.engine)
        return made

    @property
    def adapters(self) -> dict[str, Any]:
        return self.runner.adapters

    @property
    def sampler(self) -> Sampler:
        return self.engine.sampler

    def load_lora(self, name: str, folder: str | Path) -> None:
        """Reads a LoRA adapter, a folder that PEFT wrote; requests choose it with lora=name. Requests of other threads continue meanwhile.
        InvalidInput if the name is taken or has other characters than letters, digits, '.', '-' and '_'; CheckpointError or Unsupported,
        one line, names what is wrong in the folder, OutOfMemory how much memory it needs."""
        if not isinstance(name, str) or not ADAPTER_NAME.fullmatch(name):
            raise InvalidInput(f"lora = {shown(name)}: must be at most 64 letters, digits, '.', '-' and '_', not '.' first")
        if not isinstance(folder, str | Path):
            raise InvalidInput(f"folder is a {type(folder).__name__}: a path is needed")
        if name not in self.runner.adapters:
            backend = self.runner.backend
            found = adapter.read(name, folder, self.runner.spec, self.setup.checkpoint.named, backend)
            if self.runner.adapters.setdefault(name, found) is found:
                return
        raise InvalidInput(f"lora = {shown(name)}: an adapter of this name is loaded; unload it first")

    def unload_lora(self, name: str) -> None:
        """New requests can no longer choose the adapter; those under way finish with it. InvalidInput if there is none of this name."""
        if not isinstance(name, str) or self.runner.adapters.pop(name, None) is None:
            raise InvalidInput(adapter.unknown(name, self.runner.adapters))

    def _engine(self, scheduler: Any, drafter: Any) -> Engine:
        sampler, tokenizer = self._new_sampler(), self.tokenizer
        return Engine(
            self.runner,
            scheduler,
            drafter.open(self.runner, sampler),
            registry.create("verify", self.config.verify),
            sampler,
            max_model_len=self.max_model_len,
            eos=self.eos,
            decode=tokenizer.decoder,
            decode_all=tokenizer.decoder_all,
            draft=self.config.draft,
            draft_memory=self.config.schedule.draft_memory,
        )

    # ---- use

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: Params = None,
        *,
        reuse: str | None = None,
        scheduler: str | None = None,
        **fields: Any,
    ) -> list[RequestOutput]:
        """One RequestOutput for each prompt. fields: of SamplingParams. reuse: how prompts of segments that name no method reuse the cache
        of their chunks, such as "cacheblend:ratio=0.15"; the same chunks in another order or under another question keep their cache.
        "kvshare" does so for any prompt, and finds what other prompts had too.
        scheduler: one for this call in place of the own one, such as "batchllm", which orders a list by what its prompts share; Unsupported
        if other requests are under way.

        A single prompt that is refused raises InvalidInput (PromptTooLong), or Unsupported if this model or backend cannot
        serve what it chose; RedraftError says so if the model's output is not a number. In a list, RequestOutput.error says
        why a prompt was refused or its text ended so, and the rest finish. A bad type of `prompts` or of a field raises
        InvalidInput at once.
        """
        many, single = inputs.prompts_of(prompts)
        params = inputs.params_of(len(many), sampling_params, fields)
        with self._scheduled(scheduler):
            return self._whole(inputs.reusing(many, reuse), params, single)

    def cache(self, chunks: Seq[str | Seq[int]], *, sink: str | Seq[int] = "", lora: str | None = None) -> list[int]:
        """Computes the cache of chunks, which prompts of segments with the head `sink` then reuse. Returns the tokens of each chunk.
        InvalidInput names an empty or too long one. The cache is kept like that of any prompt: the least recently used blocks leave."""
        head = self._segment(sink, True) if isinstance(sink, str) else inputs.token_ids(sink, "sink")
        if not head:
            raise InvalidInput("sink is empty: the head of the prompts, with at least one token, is needed")
        prompts = []
        for i, chunk in enumerate(inputs.elements(chunks, "chunks", "a list of texts or lists of token ids")):
            tokens, spans = inputs.segments_of([head, chunk, [FILLER]], self._segment, f"chunks[{i}]")
            prompts.append((text_of(head, tokens[slice(*spans[0])]), spans[0][1] - spans[0][0]))
        params = SamplingParams(temperature=0, max_tokens=1, draft="none", lora=lora)
        texts = [{"prompt_token_ids": [*text, FILLER], "wants": Wants()} for text, _ in prompts]  # what wants say get no cache policy
        self._whole(texts, [params] * len(prompts), single=True)
        return [count for _, count in prompts]

    def chat(
        self, messages: Conversation | Seq[Conversation], sampling_params: Params = None, *, tools: Tools | None = None, **fields: Any
    ) -> list[RequestOutput]:
        """Replies to one conversation or a list of them, by the checkpoint's chat template. Else like `generate`; a prompt
        {"messages": [...], "tools": [...]} gives `generate` and `stream` the same conversation. tools: functions in OpenAI's form, which
        the template describes to the model. A call is in the text, in the model's own format; the server parses it."""
        many, single = inputs.conversations_of(messages)
        prompts = [{"messages": one, "tools": tools} for one in many]
        return self._whole(prompts, inputs.params_of(len(many), sampling_params, fields), single)

    def stream(
        self, prompts: Prompt | Seq[Prompt], sampling_params: Params = None, *, reuse: str | None = None, **fields: Any
    ) -> Generator[Delta]:
        """The same as `generate`, piece by piece, with the same errors. A Delta with finish_reason "error" reports such a
        prompt of a list. Closing the iterator aborts what is not finished."""
        many, single = inputs.prompts_of(prompts)
        outputs = self._submit(inputs.reusing(many, reuse), inputs.params_of(len(many), sampling_params, fields), single)
        deltas = self._deltas(outputs, single)
        next(deltas)  # enters its try block, so that an iterator that is never read aborts its requests too
        return deltas

    def edit(
        self,
        text: str | RequestOutput,
        patch: Patch | Seq[Patch],
        sampling_params: SamplingParams | None = None,
        *,
        reuse: str = "pie",
        **fields: Any,
    ) -> list[RequestOutput]:
        """Continues an edited text. Cached parts of the old text are reused, the edited part is computed.

        text: a string given to `generate` before, or what `generate` or `edit` returned (the prompt and its first text). patch:
        one or several; positions count characters of that text, ranges must not overlap. If nothing is cached, the new text is
        computed in full. Pages of an edited text are not cached, so a chain of edits goes back to the last text that was
        computed in full. Such a request takes no keep, no codec and no read with data of its own. InvalidInput names a
        position outside of the text.
        """
        old, before = self._edited(text)
        new = inputs.patched(old, patch)
        prompt = {"prompt_token_ids": self._encode(new, "text"), "before": before, "reuse": reuse}
        outputs = self._whole([prompt], inputs.params_of(1, sampling_params, fields), single=True)
        for output in outputs:
            output.prompt, output.before = new, before
        return outputs

    def embed(
        self,
        prompts: Prompt | Seq[Prompt],
        pooling: str = "last",
        *,
        normalize: bool = True,
        lora: str | None = None,
        prepend: str | Prepend | None = None,
    ) -> list[F64]:
        """f64[hidden] for each prompt: hidden states after the final norm, of its last token ("last") or the mean of all
        ("mean"); of length 1 if `normalize`; lora: the name of a loaded adapter. InvalidInput names a prompt that is refused.

        prepend: options of token prepending such as "start=1,exit=7,out=-2" (engine/prepend.py). Each prompt is then a text, which is
        written into a template, and its vector the state of the template's last token at `out`.
        """
        if not isinstance(pooling, str) or pooling not in ("last", "mean"):
            raise InvalidInput(f"pooling = {shown(pooling)}: last or mean is allowed")
        if not isinstance(normalize, bool):
            raise InvalidInput(f"normalize = {shown(normalize)}: True or False is allowed")
        many, single = inputs.prompts_of(prompts)
        params = SamplingParams(temperature=0, max_tokens=1, draft="none", lora=lora)
        if prepend is not None:
            if pooling != "last":
                raise InvalidInput(f"pooling = {shown(pooling)}: with prepend the vector is the last token's")
            return self._prepended(many, prepend, lora, normalize=normalize)
        outputs: list[RequestOutput] = []
        try:
            for i, prompt in enumerate(many):
                try:
                    fields = inputs.fields_of(prompt)
                    source = {"prompt_embeds", "prompt_token_ids"} & fields.keys() if "prompt_embeds" in fields else ()
                    pooled = {name: fields[name] for name in source} or {"prompt_token_ids": self._tokens(fields)}
                    pooled["wants"] = Wants(pooling=Pooling(pooling))
                    outputs += self._submit([pooled], [params], single=True)
                except RedraftError as error:
                    raise type(error)(str(error) if single or len(many) == 1 else f"prompts[{i}]: {error}") from None
            for _ in self._run(outputs, single=True):
                pass
        finally:
            self._end(outputs)
        return [cast(Request, output.request).embedding(normalize) for output in outputs]

    def _prepended(self, prompts: list[Any], given: str | Prepend, lora: str | None, *, normalize: bool) -> list[F64]:
        if not isinstance(given, str | Prepend):
            raise InvalidInput(f"prepend = {shown(given)}: options such as start=1,exit=7,out=-2 are needed")
        method = given if isinstance(given, Prepend) else registry.build(Prepend, f"prepend:{given}")
        used = None if lora is None else self.runner.adapters.get(lora)
        if lora is not None and used is None:
            raise InvalidInput(adapter.unknown(lora, self.runner.adapters))
        texts = []
        for i, prompt in enumerate(prompts):
            fields = inputs.fields_of(prompt)
            if set(fields) != {"prompt"}:
                raise InvalidInput(f"prompts[{i}]: with prepend only a text is allowed")
            texts.append(method.tokens(inputs.text_of(fields["prompt"], "prompt"), self.tokenizer))
        with InterruptBetween(), self._turns:
            found = embed(self.runner, method, texts, longest=self.max_model_len - 1, adapter=used)
        return [one / max(float(np.linalg.norm(one)), 1e-12) if normalize else one for one in found]

    # ---- requests

    @contextmanager
    def _scheduled(self, name: str | None) -> Iterator[None]:
        """The engine has another scheduler meanwhile; None: its own."""
        if name is None:
            yield
            return
        if not isinstance(name, str):
            raise InvalidInput(f"scheduler = {shown(name)}: the name of a scheduler is needed, with options if need be")
        schedule = self.config.schedule.but(scheduler=name)
        chosen = scheduler_of(self.config.but(schedule=schedule), str(self.runner.backend.device))
        with InterruptBetween(), self._turns:
            if self.engine.has_work or self._own_scheduler is not None:
                raise Unsupported(f"scheduler = {shown(name)}: other requests are under way, and all have one scheduler")
            self._own_scheduler, self.engine.scheduler = self.engine.scheduler, chosen
        try:
            yield
        finally:
            self._turns.soon(self._reschedule)

    def _reschedule(self) -> None:
        assert self._own_scheduler is not None
        self.engine.scheduler, self._own_scheduler = self._own_scheduler, None

    def _whole(self, prompts: Seq[Prompt], params: Seq[SamplingParams | None], single: bool) -> list[RequestOutput]:
        outputs = self._submit(prompts, params, single)
        try:
            for _ in self._run(outputs, single):
                pass
        finally:
            self._end(outputs)
        self.calibrate(SPARE)
        return outputs

    def calibrate(self, seconds: float = 60.0) -> None:
        """Measures what the drafter still wants to know about this machine, for at most so many seconds and only while no request is under
        way. `generate`, `chat` and `stream` do it after a reply, for SPARE seconds, until all is measured. InvalidInput for anything but
        a number from 0 on."""
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds >= 0:
            raise InvalidInput(f"seconds = {shown(seconds)}: a number, 0 or more, is needed")
        until = time.monotonic() + min(seconds, 1e9)
        more = True
        while more and time.monotonic() < until:
            with InterruptBetween(), self._turns:
                more = self.engine.idle()

    def _deltas(self, outputs: list[RequestOutput], single: bool) -> Generator[Delta]:
        place = {output.request_id: i for i, output in enumerate(outputs)}
        try:
            yield cast(Delta, None)  # taken by `stream`
            for i, output in enumerate(outputs):
                if output.error is not None:
                    yield Delta(i, 0, "", [], [], [], "error", Stats(), output.error)
            for event in self._run(outputs, single):
                if event.error is not None:
                    yield Delta(place[event.request.id], 0, "", [], [], [], "error", Stats(), str(event.error))
                    continue
                reason = None if event.reason is None else str(event.reason)
                what = place[event.request.id], event.index, event.text, event.tokens, event.drafted, event.logprobs
                yield Delta(*what, reason, event.stats.copy(), provenance=event.provenance)
        finally:
            self._end(outputs)
        self.calibrate(SPARE)

    def _submit(self, prompts: Seq[Prompt], params: Seq[SamplingParams | None], single: bool) -> list[RequestOutput]:
        """Queues all prompts. In a list, whatever one of them raises becomes its `error`."""
        outputs: list[RequestOutput] = []
        try:
            for prompt, one in zip(prompts, params, strict=True):
                outputs.append(RequestOutput(str(next(self._numbers)), None, []))
                try:
                    self._add(outputs[-1], prompt, one)
                except Exception as error:
                    if single:
                        raise
                    outputs[-1].error = str(error) if isinstance(error, RedraftError) else f"{type(error).__name__}: {shown(error)}"
            if not single:
                with InterruptBetween(), self._turns:
                    self.engine.arrange()
        except BaseException:
            self._end(outputs)
            raise
        return outputs

    def _add(self, output: RequestOutput, prompt: Prompt, params: SamplingParams | None) -> None:
        """Queues one prompt and fills `output`, or raises and queues nothing."""
        output.prompt = prompt if isinstance(prompt, str) else None
        fields = inputs.fields_of(prompt)
        output.prompt = fields.get("prompt")
        chosen = self.params(params)
        if isinstance(chosen.prediction, str):
            chosen = chosen.but(prediction=tuple(self.tokenizer.encode(chosen.prediction, special=False)))
        output.prompt_token_ids, vectors, chunks = self._read(fields)
        if "suffix" in fields:
            chosen = self.fill.params(chosen)
        options = {name: fields[name] for name in inputs.OPTIONS if name in fields}
        if not options.keys() & {"before", "reuse", "wants"}:
            chosen = self.cached(chosen, len(output.prompt_token_ids))
        request = Request(output.request_id, output.prompt_token_ids, chosen, vectors=vectors, chunks=chunks, **options)
        with InterruptBetween(), self._turns:
            if any(other.has_work for other in self._engines if other is not self.engine):
                raise Unsupported("a sibling of this LLM has requests under way: siblings share pages and run one at a time")
            self.engine.add(request)
            self._inboxes[request.id] = deque()
        output.request, output.seed = request, request.params.seed
        output.guarantee = self.guarantee_of(chosen, request.reuse or None).label
        output.outputs = [CompletionOutput(i, logprobs=None if chosen.logprobs is None else []) for i in range(chosen.n)]

    def _read(self, fields: dict[str, Any]) -> tuple[list[int], F32 | None, list[tuple[int, int]]]:
        """The token ids of a prompt, its vectors if it has any, and its chunks."""
        if "segments" in fields:
            tokens, chunks = inputs.segments_of(fields["segments"], self._segment)
            return tokens, None, chunks
        if "prompt_embeds" not in fields:
            return self._tokens(fields), None, []
        given = self._tokens(fields) if "prompt_token_ids" in fields else None
        return *inputs.vectors_of(fields["prompt_embeds"], given), []

    def _segment(self, text: str, first: bool) -> list[int]:
        return self.tokenizer.encode(text, special=first) if text else []

    def _tokens(self, fields: dict[str, Any]) -> list[int]:
        """The token ids of a prompt; see `inputs.fields_of`. Ids that are given come before text."""
        if "prompt_token_ids" in fields:
            return inputs.token_ids(fields["prompt_token_ids"])
        if "messages" in fields:
            variables: dict[str, Any] = {"tools": inputs.tools_of(fields["tools"])} if "tools" in fields else {}
            rendered = self.tokenizer.render(inputs.messages_of(fields["messages"]), **variables)
            return self.tokenizer.encode(inputs.text_of(rendered, "messages"), special=False)
        if "suffix" in fields:
            return self.fill.tokens(inputs.text_of(fields["prompt"], "prompt"), inputs.text_of(fields["suffix"], "suffix"))
        return self._encode(fields["prompt"], "prompt")

    def _encode(self, text: str, name: str) -> list[int]:
        return self.tokenizer.encode(inputs.text_of(text, name)) if text else []

    def _edited(self, text: Any) -> tuple[str, list[int]]:
        """The text to edit and its token ids."""
        if isinstance(text, str):
            return text, self._encode(text, "text")
        if not isinstance(text, RequestOutput):
            raise InvalidInput(f"edit: text of type {type(text).__name__}: a string or a RequestOutput is needed")
        if not text.outputs:
            raise InvalidInput("edit: this output holds no text, its prompt was refused")
        prompt = self.tokenizer.decode(text.prompt_token_ids) if text.prompt is None else text.prompt
        return prompt + text.outputs[0].text, text.before or text.prompt_token_ids + text.outputs[0].token_ids

    # ---- the engine, shared by threads: each holds it for a turn, and Ctrl-C waits for the end of the turn

    def _run(self, outputs: Iterable[RequestOutput], single: bool) -> Iterator[Event]:
        """Steps the engine until all are finished. A step may find events of other callers; they go to their inboxes. In a list, an error
        about one text becomes its `error`."""
        mine = {output.request_id: output for output in outputs if output.error is None}
        while not all(output.finished for output in mine.values()):
            with InterruptBetween(), self._turns:
                news = self._news(mine)
                aborted = not news and not self.engine.has_work
            if aborted:
                return
            for event in news:
                output = mine[event.request.id]
                if event.error is None:
                    self._apply(event, output)
                elif single or not isinstance(event.error, RedraftError):
                    raise event.error
                else:
                    output.error, output.outputs = str(event.error), []
                yield event

    def _news(self, mine: dict[str, RequestOutput]) -> list[Event]:
        """Takes what the inboxes of these requests hold. If that is nothing, makes one step first."""
        inboxes = [self._inboxes[name] for name in mine]
        if not any(inboxes) and self.engine.has_work:
            for event in self.engine.step():
                if event.request.id in self._inboxes:
                    self._inboxes[event.request.id].append(event)
        found = [event for inbox in inboxes for event in inbox]
        for inbox in inboxes:
            inbox.clear()
        return found

    def _end(self, outputs: Iterable[RequestOutput]) -> None:
        """Removes these requests from the engine, whatever ended them: Ctrl-C and a closed iterator too."""
        for output in outputs:
            ended = output.error is not None or (bool(output.outputs) and output.finished)
            self._turns.soon(partial(self._forget, output.request_id, abort=not ended))
            for one in output.outputs:
                one.finish_reason = one.finish_reason or "abort"

    def _forget(self, request_id: str, *, abort: bool) -> None:
        self._inboxes.pop(request_id, None)
        if abort:
            self.engine.abort(request_id)

    def _apply(self, event: Event, output: RequestOutput) -> None:
        one = output.outputs[event.index]
        one.text += event.text
        one.token_ids += event.tokens
        one.drafted += event.drafted
        one.provenance += event.provenance
        one.stats = event.stats
        if one.logprobs is not None:
            one.logprobs += event.logprobs
        if event.reason is not None:
            one.finish_reason = str(event.reason)
        output.cached_tokens, output.reused_tokens = event.request.cached_tokens or 0, event.request.reused_tokens
        output.disk_tokens, output.disk_seconds = event.request.disk_tokens, event.request.disk_seconds
        output.repaired_tokens, output.repair_rows = event.request.repaired_tokens, event.request.repair_rows
        if event.request.miss is not None and output.cache_miss is None:
            at, token, cached, lost = event.request.miss
            output.cache_miss = CacheMiss(at, token, self.tokenizer.decode_all([token]), cached, self.tokenizer.decode_all([cached]), lost)
        if event.request.wants.prompt_logprobs is not None:
            output.prompt_logprobs = event.request.prompt_logprobs
