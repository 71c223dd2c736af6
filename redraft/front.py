"""A checkpoint as a configuration sets it up, without its weights: what a server needs that has requests computed elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from redraft import registry
from redraft.card import Guarantee
from redraft.config import EngineConfig, SamplingParams
from redraft.engine import cache_policy
from redraft.engine.budgets import CACHE
from redraft.errors import InvalidInput
from redraft.guarantee import weakest
from redraft.models import fill, generation
from redraft.models.tokenizer import Tokenizer
from redraft.ops.arrays import name_of
from redraft.ops.backend import Feature
from redraft.sample.controls.control import controls
from redraft.sample.sampler import Sampler
from redraft.setup import Setup

POLICIES = ("keep", "codec", "read", "depth", "steer")  # SamplingParams fields that name a method and have no default in the engine


class Front:
    """Options are the flat fields of EngineConfig. Raises CheckpointError, OutOfMemory, InvalidInput or Unsupported, one line each."""

    def __init__(self, model: str | None = None, *, config: EngineConfig | None = None, **options: Any) -> None:
        if config is not None and (options or model is not None):
            raise InvalidInput("LLM takes either a config or options, not both")
        if config is None:
            config = EngineConfig.of(**({} if model is None else {"model": model}), **options)
        if not isinstance(config, EngineConfig):
            raise InvalidInput(f"config is a {type(config).__name__}: EngineConfig is needed")
        self.setup = setup = Setup.of(config)
        self.config = config = setup.config
        checkpoint = setup.checkpoint
        self.spec, self.backend, self.source = checkpoint.spec, setup.backend, checkpoint.path
        self.max_model_len, self.scheduler = setup.max_model_len, setup.scheduler
        self.blocks = setup.blocks  # of the pool
        self.tokenizer = Tokenizer(checkpoint.path)
        self.defaults = checkpoint.defaults if config.model.generation_config == "auto" else {}
        self.eos = frozenset(checkpoint.eos_ids)
        self.name = config.model.model
        self.weight_bytes = checkpoint.weight_bytes
        self.cache_policy: cache_policy.CachePolicy | None = None
        if (policy := config.cache.policy) is not None:
            form = self.source, name_of(self.backend.dtype), self.backend.name
            self.cache_policy = cache_policy.of(policy, self.name, *form)

    @property
    def adapters(self) -> Mapping[str, Any]:
        """The adapters that requests may choose, by name; each has its `name`."""
        raise NotImplementedError

    @property
    def loras(self) -> list[str]:
        """The names of the adapters that requests may choose."""
        return sorted(self.adapters)

    @cached_property
    def fill(self) -> fill.Fill:
        """How prompts with a suffix are written. Unsupported if the vocabulary has no tokens for it."""
        return fill.find(self.tokenizer)

    @property
    def guarantee(self) -> Guarantee:
        """The guarantee for requests that choose no methods of their own, compared with the plain loop over the same weights, also
        if these are quantized; see `guarantee_of`."""
        config = self.config
        return weakest(draft=config.draft, verify=config.verify, sched=config.schedule.scheduler)

    def guarantee_of(self, params: SamplingParams, reuse: str | None = None, *, weights: bool = True) -> Guarantee:
        """The guarantee for one request, compared with the plain loop over the checkpoint's weights, or, with weights=False, over the
        same quantized ones. reuse: as given to `edit`."""
        params, config = self.params(params), self.config
        found = weakest(
            draft=config.draft if params.draft is None else params.draft,
            verify=config.verify if params.verify is None else params.verify,
            sched=config.schedule.scheduler,
            quant=config.model.quant if weights else None,
            reuse=reuse,
            **{seam: getattr(params, seam) for seam in POLICIES},
        )
        chosen = () if params.control is None else controls(params.control)
        return max([found, *(control.card.guarantee for control in chosen)])

    def guarantee_with_policy(self, params: SamplingParams, tokens: int | None = None, *, weights: bool = True) -> Guarantee:
        """`guarantee_of` with the cache policy of the configuration, for a prompt of `tokens` tokens, else the weakest of any length."""
        lengths = self.cache_lengths if tokens is None else (tokens,)
        return max(self.guarantee_of(self.cached(params, length), weights=weights) for length in lengths)

    def promise(self, params: SamplingParams, tokens: int | None = None) -> str:
        """What the last line of a command says of `guarantee_with_policy`: of the methods, and apart from these of the weights, if they
        are quantized. On a backend whose rows do not have the bits that they have alone, two tokens that are nearly as likely may change
        places, if its numbers have fewer than 64 bits."""
        backend, quant, methods = self.backend, self.config.model.quant, self.guarantee_with_policy(params, tokens, weights=False)
        exact = Feature.BIT_EXACT in backend.features or backend.dtype.itemsize > 4 or methods >= Guarantee.NEAR
        stored = f", weights {quant} ({weakest(quant=quant).label})" if quant else ""
        return f"{methods.label}{'' if exact else ' but for near-ties'}{stored}"

    def params(self, params: SamplingParams | None = None) -> SamplingParams:
        """The given fields, then those of the checkpoint's generation_config.json."""
        if not isinstance(params, SamplingParams | None):
            raise InvalidInput(f"params is a {type(params).__name__}: SamplingParams is needed")
        given = {} if params is None else {name: getattr(params, name) for name in params.model_fields_set}
        return SamplingParams(**generation.over(self.defaults, given))

    def cached(self, params: SamplingParams, tokens: int) -> SamplingParams:
        """The parameters of a request with a prompt of `tokens` tokens: with the cache policy of the configuration, unless they choose
        keep, codec or read, if only "none"."""
        if self.cache_policy is None or params.model_fields_set & {*CACHE}:
            return params
        return params.but(**self.cache_policy.params(tokens))

    @property
    def cache_lengths(self) -> tuple[int, ...]:
        """The least tokens of a prompt from which on `cached` chooses as it does."""
        return (1,) if self.cache_policy is None else self.cache_policy.lengths

    @property
    def sampler(self) -> Sampler:
        """Checks what requests ask for, and builds what they need."""
        return self._new_sampler()

    def _new_sampler(self) -> Sampler:
        verifier, tokenizer = registry.create("verify", self.config.verify), self.tokenizer
        return Sampler(
            self.spec.vocab, self.eos, tokenizer.spellings, verifier.drafts, self.backend.draw, tokenizer.bytes_of, verifier.exact,
            partial(tokenizer.encode, special=False), tokenizer.left_out,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class NamedAdapter:
    """An adapter that workers have loaded."""

    name: str


class Headless(Front):
    """A model whose requests are computed by workers."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config=config)
        self._adapters: dict[str, NamedAdapter] = {}
        self.name_adapters(config.model.adapters)

    @property
    def adapters(self) -> Mapping[str, NamedAdapter]:
        return self._adapters

    @property
    def of_worker(self) -> EngineConfig:
        """The configuration of each worker: its pool has the size that was found here."""
        pool = self.blocks * self.backend.block_bytes(self.spec)
        return self.config.but(cache=self.config.cache.but(memory=pool, policy=None))  # requests arrive with their policy

    def name_adapters(self, names: Iterable[str]) -> None:
        """Sets the adapters that requests may choose."""
        self._adapters = {name: self._adapters.get(name) or NamedAdapter(name) for name in names}
