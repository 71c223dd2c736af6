"""The service behind the routes: a loaded model, the limits of its server, and the way from a request's body to the engine and back."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Any, cast

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from redraft import registry
from redraft.config import SamplingParams, closed
from redraft.core import sequence
from redraft.core.noise import Stream
from redraft.core.sequence import NO_WANTS, Pooling, Wants
from redraft.engine.budgets import CACHE
from redraft.errors import PromptTooLong, RedraftError
from redraft.front import POLICIES, Front
from redraft.kv.disk.pages import secret_of
from redraft.models.adapter import Adapter
from redraft.models.tokenizer import Tokenizer
from redraft.serve import schema
from redraft.serve.choices import FIELDS, checked
from redraft.serve.config import ServeConfig
from redraft.serve.errors import Refused, refused, renamed
from redraft.serve.limits import ENDED, unless_gone
from redraft.serve.metrics import Metrics
from redraft.serve.prompts import LATE, Prompt, Prompts
from redraft.serve.reply import Wanted, Writer
from redraft.serve.shell import Shell, Submission
from redraft.serve.stream import EventStream, ended, lines, whole
from redraft.workers.host import Host

PREDICTED = "aggressive"  # the drafter of a request's prediction
ADAPTER = "redraft.adapter"  # key of the scope: the adapter of the request, or None
FORMAT = {"structured_outputs.json": "response_format.json_schema.schema"}  # its name where OpenAI's field for it is given
SAME_NAME = (
    "n", "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens",
    "top_n_sigma", "xtc_probability", "xtc_threshold", "dynatemp_range", "dynatemp_exponent", "mirostat", "mirostat_tau", "mirostat_eta",
    "dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers", "ignore_eos", "stop_token_ids",
    "bad_words", "include_stop_str_in_output", "skip_special_tokens", "prompt_logprobs", "stop",
)  # fmt: skip

Write = Callable[[Tokenizer, list[Submission], list[str]], Writer]

log = logging.getLogger("redraft.serve")


class Service:
    """Its methods raise Refused or RedraftError for requests that cannot be answered."""

    def __init__(self, llm: Front, host: Host, config: ServeConfig) -> None:
        self.llm, self.host, self.config = llm, host, config
        config.check_names(llm.name, llm.loras)
        self.names = config.names(llm.name)
        self.metrics = Metrics(config.metrics_prefix, self.names[0], host.workers, host.figures)
        self.shell = Shell(host, self.metrics, max_queue=config.max_queue, max_seqs=llm.scheduler.max_seqs * len(host.workers))
        self.prompts = Prompts(llm, config)
        self.began = int(time.time())
        self.uses: Counter[Adapter] = Counter()  # requests under way with each adapter
        self._numbers = itertools.count()
        self._secret = secrets.token_bytes(32) if (folder := llm.config.cache.kept) is None else secret_of(folder)

    @property
    def own(self) -> SamplingParams:
        """What requests get that choose no policy."""
        return SamplingParams(**{seam: own for seam in POLICIES if (own := getattr(self.config, seam))})

    @property
    def deadline(self) -> float:
        """Of a request that arrives now, a time of time.monotonic."""
        return monotonic() + (self.config.request_timeout or float("inf"))

    def tenant(self, key: str, salt: str) -> str:
        """The salt in the prefix cache of requests with this API key and cache_salt: nothing from which a key can be guessed."""
        if not key and not salt:
            return ""
        return hmac.digest(self._secret, f"{key}\0{salt}".encode(), "sha256").hex()[:32]  # a key has no \0

    # ---- what a body requests

    def known(self, model: str | None) -> str:
        """The name, of the model or of an adapter, by which the reply calls what answers."""
        if model is None or model in self.names or model in self.llm.adapters:
            return model or self.names[0]
        raise Refused(404, f"no model {model!r} here; there is {', '.join([*self.names, *self.llm.loras])}", "model", "model_not_found")

    def chosen(self, http: Request, model: str | None) -> str | None:
        """The name of the adapter that the request chose as its model. The request keeps it until its reply has ended, also if it is
        unloaded meanwhile."""
        name = self.known(model)
        adapter = None if name in self.names else self.llm.adapters[name]
        http.scope[ADAPTER] = adapter
        if adapter is None:
            return None
        self.uses[adapter] += 1

        def release() -> None:
            self.uses[adapter] -= 1
            if not self.uses[adapter]:
                del self.uses[adapter]

        http.scope[ENDED] = release
        return str(adapter.name)

    def effort(self, wanted: str, field: str, tools: Any) -> dict[str, str]:
        """The variable of the chat template for an effort of reasoning. Refused (400) names the field if the template does not know it."""
        if "reasoning_effort" not in self.llm.tokenizer.template(self.config.chat_template, tools):
            raise Refused(400, f"{field} = {wanted!r}: the chat template does not know an effort of reasoning", field)
        return {"reasoning_effort": wanted}

    def params(self, body: schema.Sampled, **more: Any) -> SamplingParams:
        """The request's sampling parameters, then the checkpoint's defaults."""
        config, given = self.config, {name: value for name in SAME_NAME if (value := getattr(body, name)) is not None}
        within("n", body.n, config.max_n)
        within("prompt_logprobs", body.prompt_logprobs, config.max_logprobs)
        if isinstance(body.stop, list) and len(body.stop) > config.max_stop:
            raise Refused(400, f"stop has {len(body.stop)} strings: at most {config.max_stop} are allowed", "stop")
        if body.seed is not None:
            given["seed"] = body.seed % (1 << 64)
        if body.logit_bias is not None:
            given["logit_bias"] = {int(token): amount for token, amount in body.logit_bias.items()}
        if body.control is not None:
            given["control"] = checked("control", body.control, None)
        given |= self._policies(body) | self._speculation(body) | _structure(body)
        return self.llm.params(SamplingParams(**given | {name: value for name, value in more.items() if value is not None}))

    def _policies(self, body: schema.Sampled) -> dict[str, str]:
        """Methods of the cache, of layer skipping and of steering: the request's choice, else the server's."""
        found = {}
        for seam in POLICIES:
            own, chosen = getattr(self.config, seam), getattr(body if seam == "steer" else body.cache, seam, None)
            if body.cache == "off" and seam in CACHE:
                chosen = "none"
            if chosen is not None:
                checked(seam, chosen, own)
            if chosen or own:
                found[seam] = chosen or own
        return found

    def _speculation(self, body: schema.Sampled) -> dict[str, Any]:
        """Drafter and verifier. A prediction is drafted from as well."""
        engine, chosen = self.llm.config, body.speculation
        if chosen == "off":
            return {"draft": "none", "draft_rows": 0}
        choice = chosen if isinstance(chosen, schema.SpeculationChoice) else schema.SpeculationChoice()
        given: dict[str, Any] = {}
        if choice.method is not None:
            given["draft"] = checked("draft", choice.method, engine.draft)
        if choice.verifier is not None:
            given["verify"] = checked("verify", choice.verifier, engine.verify)
        if choice.budget is not None:
            given["draft_rows"] = choice.budget
        if body.prediction is not None:
            given["prediction"] = body.prediction.text
            given["draft"] = _predicting(given.get("draft", engine.draft), given.get("verify", engine.verify))
        return given

    def wanted(self, body: schema.Sampled, params: SamplingParams, **more: Any) -> Wanted:
        return Wanted(
            model=body.model or self.names[0],
            role=self.config.response_role,
            prompt_logprobs=body.prompt_logprobs,
            token_ids=bool(body.return_token_ids),
            provenance=params.provenance,
            usage=bool(body.stream_options and body.stream_options.include_usage),
            predicted=PREDICTED if body.prediction is not None else "",
            **more,
        )

    # ---- to the engine and back

    async def submit(
        self, prompts: list[Prompt], params: SamplingParams, http: Request, body: Any, deadline: float, pool: Pooling = Pooling.NONE
    ) -> list[Submission]:
        """Queues all prompts or none."""
        if isinstance(params.prediction, str):
            params = params.but(prediction=tuple(await self.prompts.prediction(params.prediction, deadline)))
        key, adapter = http.scope["redraft.key"], http.scope[ADAPTER]
        salt = self.tenant(key, body.cache_salt or "")
        requests = []
        reuse = getattr(body, "reuse", None) or ""
        if (
            reuse
            and registry.create("reuse", checked("reuse", reuse, None)).needs
            and any(prompt.field != "segments" for prompt in prompts)
        ):
            raise Refused(400, f"reuse = {reuse}: a prompt of segments is needed", "reuse")
        for prompt in prompts:
            name = f"{next(self._numbers)}-{secrets.token_hex(4)}"
            wants = Wants(pooling=pool) if prompt.scored is None else Wants(0, pool, range(prompt.scored, len(prompt.tokens)))
            options = {"priority": body.priority or 0, "wants": wants, "adapter": adapter, "vectors": prompt.vectors}
            options |= {"reuse": reuse, "chunks": list(prompt.chunks)} if reuse else {}
            own = self.llm.cached(params, len(prompt.tokens)) if wants == NO_WANTS and not reuse else params
            requests.append(sequence.Request(name, prompt.tokens, own, salt, **options))
        try:
            if params.structured_outputs is not None:
                await self.prompts.compiled(params, deadline)
            return await self._queued(requests, http, deadline)
        except PromptTooLong as error:
            raise Refused(400, str(error), prompts[0].field, "context_length_exceeded") from None
        except RedraftError as error:
            raise self._refused(error, params, body) from None
        except (OverflowError, MemoryError, OSError) as error:
            raise self._unopened(error, body) from error

    async def _queued(self, requests: list[sequence.Request], http: Request, deadline: float) -> list[Submission]:
        """Waits until a worker has them, which takes long if all workers start or hang."""
        queueing = asyncio.ensure_future(self.shell.submit(*requests))
        try:
            async with asyncio.timeout(max(0.0, deadline - monotonic()) if deadline < float("inf") else None):
                return cast("list[Submission]", await unless_gone(http.receive, queueing))
        except BaseException as error:
            if queueing.done() and not queueing.cancelled() and queueing.exception() is None:  # at the same moment
                self.shell.forget(*queueing.result())
            if isinstance(error, TimeoutError):
                raise Refused(504, LATE) from None
            raise

    async def read(
        self, prompts: list[Prompt], http: Request, body: Any, deadline: float, lora: str | None, pool: Pooling = Pooling.NONE
    ) -> list[Submission]:
        """Runs prompts of which only what they want is needed, and no text. They wait for their turn, as many at a time as may wait."""
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, draft="none", draft_rows=0, seed=0, lora=lora)
        found: list[Submission] = []
        for at in range(0, len(prompts), self.config.max_queue):
            some = await self.submit(prompts[at : at + self.config.max_queue], params, http, body, deadline, pool)
            await unless_gone(http.receive, ended(some, deadline), partial(self.shell.forget, *some))
            found += some
        return found

    @staticmethod
    def _refused(error: RedraftError, params: SamplingParams, body: schema.Body) -> Refused:
        """The reply to an error of the engine, with the field of the method that it is about."""
        known = [json.dumps(body.model_dump(exclude_none=True), ensure_ascii=False, default=str)]
        if params.structured_outputs is not None:
            text = params.structured_outputs.text
            known += [text, repr(text), f"/{text}/"]  # as the library's errors quote it
        found = refused(error, *known)
        chosen = {field: str(own) for seam, field in FIELDS.items() if (own := getattr(params, seam, None)) is not None}
        names = {field: registry.parse(text)[0] for field, text in chosen.items()}
        about = next((field for field, name in names.items() if str(error).startswith(f"{name}:")), None)
        if about is not None:
            return replace(found, param=about)
        if found.param is None:
            return replace(found, param=next((field for field, name in names.items() if str(error).startswith(name)), None))
        return renamed(found, FORMAT) if getattr(body, "response_format", None) is not None else found

    @staticmethod
    def _unopened(error: Exception, body: Any) -> Exception:
        """The reply if the engine cannot open what a request chose; `error` itself if the request chose nothing."""
        chosen = [name for name in ("speculation", "cache", "steer", "control") if isinstance(getattr(body, name, None), schema.Body | str)]
        if not chosen:
            return error
        log.warning("what a request chose of %s cannot be opened", " and ".join(chosen), exc_info=error)
        return Refused(400, f"{' and '.join(chosen)}: this server cannot open what the request chose; its log says why", chosen[0])

    async def reply(
        self, http: Request, body: schema.Sampled, prompts: list[Prompt], params: SamplingParams, write: Write, deadline: float
    ) -> Response:
        """The whole answer, or a stream of it. write: makes the writer of the reply's form."""
        submissions = await self.submit(prompts, params, http, body, deadline)
        writer = write(self.llm.tokenizer, submissions, [prompt.text for prompt in prompts])
        headers = {writer.id_header: writer.wanted.id}
        if body.stream:
            return EventStream(self.shell, writer, lines(writer, deadline, self.config.keep_alive), headers)
        forget = partial(self.shell.forget, *submissions)
        return JSONResponse(await unless_gone(http.receive, whole(writer, deadline), forget), headers=headers)


def service(http: Request) -> Service:
    """That of the application which a request came to."""
    return cast(Service, http.app.state.service)


def _structure(body: schema.Sampled) -> dict[str, Any]:
    """What the text must be: the fields of OpenAI and of vLLM for it."""
    wanted, own = body.response_format, body.structured_outputs
    if wanted is None or wanted.type == "text":
        return {} if own is None else {"structured_outputs": own.model_dump(by_alias=True, exclude_none=True)}
    if own is not None:
        raise Refused(400, "structured_outputs and response_format exclude each other", "structured_outputs")
    if wanted.json_schema is None:
        given = None if wanted.schema_ is None else {"type": "object"} | wanted.schema_
        return {"structured_outputs": {"json_object": True} if given is None else {"json": closed(given)}}
    schema_ = wanted.json_schema.schema_
    return {"structured_outputs": {"json": closed(schema_) if wanted.json_schema.strict else schema_}}


def within(name: str, value: int | None, limit: int) -> None:
    """Raises Refused (400) if the value is above `limit`."""
    if value is not None and value > limit:
        raise Refused(400, f"{name} = {value}: at most {limit} is allowed", name)


def _predicting(draft: str, verify: str) -> str:
    """The drafter of a request with a prediction: `draft` and the one that copies from it."""
    name = registry.parse(draft)[0]
    verifier: Any = registry.method("verify", registry.parse(verify)[0])
    if name == PREDICTED:
        return draft
    return PREDICTED if name == "none" or verifier.drafts is not Stream.TARGET else f"union:parts=({PREDICTED})+({draft})"
