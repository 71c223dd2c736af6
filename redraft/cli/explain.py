"""`redraft explain`: the step of a configuration, with the part that does each line.

Reads headers, not weights: the engine is real, but its model is on the meta device.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from redraft import registry
from redraft.card import Card, Guarantee
from redraft.cli.options import ENGINE, KEPT, SAMPLING, Given, Model, adapted, engine_config, takes
from redraft.columns import fold, width
from redraft.config import EngineConfig, SamplingParams

if TYPE_CHECKING:
    from redraft.core.taps import Taps
    from redraft.engine.engine import Engine
    from redraft.setup import Setup

CALL = re.compile(r"self\.(\w+)\.\w+\(")  # a call of a part in a line of a step


@dataclass(frozen=True)
class Part:
    """The lines of a part of the engine under the step. guarantee: None if the part has none of its own."""

    lines: list[str]
    guarantee: Guarantee | None = None


@takes(sampling=SAMPLING, engine=ENGINE.without(*KEPT))
def explain(model: Model = "embedded", *, sampling: Given, engine: Given) -> None:
    """Print the step for a configuration, and the part that does each line.

    For each part: what it requests from the model, its guarantee, options and paper. Reads headers, not weights;
    adapters are read whole.
    """
    config = engine_config(model, engine)
    params = SamplingParams(**sampling)
    from redraft.engine.engine import Engine
    from redraft.models import generation
    from redraft.setup import Setup

    setup = Setup.of(config)
    config = setup.config
    defaults = setup.checkpoint.defaults if config.model.generation_config == "auto" else {}
    params = _cached(config, setup, SamplingParams(**generation.over(defaults, adapted(sampling, config))))
    parts = _parts(config, setup, _engine(config, setup), params)
    for line in [*_model(config, setup, parts), ""]:
        _print(line)
    shown = set()
    code = "\n".join(inspect.getsource(part) for part in (Engine.step, Engine.begin, Engine._plan, Engine.end))
    for line in textwrap.dedent(code).splitlines():
        _print(line, bold=True)
        indent = " " * (len(line) - len(line.lstrip()) + 8)
        for name in CALL.findall(line):
            if name in parts and name not in shown:
                shown.add(name)
                for text in parts[name].lines:
                    _print(indent + text)


def _cached(config: EngineConfig, setup: Setup, params: SamplingParams) -> SamplingParams:
    """With the cache policy of the configuration, as a long prompt gets it."""
    from redraft.engine import cache_policy
    from redraft.engine.budgets import CACHE
    from redraft.ops.arrays import name_of

    if config.cache.policy is None or params.model_fields_set & {*CACHE}:
        return params
    form = setup.checkpoint.path, name_of(setup.backend.dtype), setup.backend.name
    policy = cache_policy.of(config.cache.policy, config.model.model, *form)
    return params.but(**policy.params(policy.lengths[-1]))


def _print(line: str, bold: bool | None = None) -> None:
    for one in fold(line, width(), hang=4):
        typer.secho(one, bold=bold)


def _engine(config: EngineConfig, setup: Setup) -> Engine:
    """The engine as LLM makes it, but without weights and with a pool for one sequence."""
    from redraft.engine.engine import Engine
    from redraft.models import loader
    from redraft.models.runner import Runner
    from redraft.models.tokenizer import Tokenizer
    from redraft.sample.sampler import Sampler

    checkpoint = setup.checkpoint
    blocks = -(-setup.max_model_len // 32) + 1
    runner = Runner(
        checkpoint.spec,
        loader.meta_weights(checkpoint),
        setup.backend,
        blocks,
        sharing=config.cache.prefix_sharing,
        source=checkpoint.path,
        draft_model=config.draft_model,
    )
    verifier = registry.create("verify", config.verify)
    tokenizer = Tokenizer(checkpoint.path)
    sampler = Sampler(
        checkpoint.spec.vocab, frozenset(checkpoint.eos_ids), tokenizer.spellings, verifier.drafts, bytes_of=tokenizer.bytes_of,
        plain=partial(tokenizer.encode, special=False), special=tokenizer.left_out,
    )  # fmt: skip
    drafter = setup.drafter.open(runner, sampler)
    return Engine(
        runner, setup.scheduler, drafter, verifier, sampler, max_model_len=setup.max_model_len, eos=checkpoint.eos_ids, draft=config.draft
    )


def _model(config: EngineConfig, setup: Setup, parts: dict[str, Part]) -> list[str]:
    from redraft.models.memory import size

    checkpoint, spec = setup.checkpoint, setup.checkpoint.spec
    dtype = str(checkpoint.dtype)
    pool = size(setup.blocks * setup.backend.block_bytes(spec))
    weakest = max(part.guarantee for part in parts.values() if part.guarantee is not None)
    return [
        f"{config.model.model}: {spec.family}, {len(spec.layers)} layers of {spec.hidden}, vocabulary {spec.vocab}, {dtype}",
        f"  weights {size(checkpoint.weight_bytes)}; cache pool {pool}: {setup.blocks} blocks of 32 tokens;"
        f" texts of up to {setup.max_model_len} tokens",
        f"  guarantee: {weakest.label}, the weakest of the parts",
    ]


def _parts(config: EngineConfig, setup: Setup, engine: Engine, params: SamplingParams) -> dict[str, Part]:
    """Attribute of the engine -> its part in this configuration."""
    from redraft.core.plan import StepPlan
    from redraft.core.taps import NO_TAPS

    work = _work(engine, params)
    requests = {"sampler": engine.sampler.needs([work]), f"drafter {config.draft}": engine.drafter.taps([work.seq])}
    if (states := engine.verifier.taps([work.seq])) is not NO_TAPS:
        requests[f"verifier {config.verify}"] = states
    union = engine.taps(StepPlan([work], []))
    segments = [f"{first}..{last - 1}" for first, last in engine.runner.segments(union)]
    backend = setup.backend
    runner = [
        f"runner: backend {backend.name} on {backend.device}; segments of layers: {', '.join(segments)}",
        *(f"  {part} requests {_requested(taps)}" for part, taps in requests.items()),
        *_adapters(config, setup, params),
    ]
    chosen = [type(processor).__name__ for processor in work.seq.state[engine.sampler]]
    sampler = f"sampler: {'greedy' if params.greedy else 'argmax of processed logits and noise'}; processors: {', '.join(chosen) or 'none'}"
    schedule, budgets = config.schedule, setup.scheduler
    sharing = "shared across requests" if config.cache.prefix_sharing else "not shared"
    stored = _registered("weights", "quant", config.model.quant, setup.checkpoint.quant) if config.model.quant else None
    return {
        "scheduler": _registered("scheduler", "sched", schedule.scheduler, budgets),
        "drafter": _registered("drafter", "draft", config.draft, setup.drafter),
        "memory": Part([f"cache: {setup.blocks} blocks of 32 tokens, prefixes {sharing}"]),
        "runner": Part([*runner, *(stored.lines if stored else ())], stored.guarantee if stored else None),
        "sampler": _sampler(sampler, params),
        "policies": _policies(engine, params),
        "verifier": _registered("verifier", "verify", config.verify, registry.create("verify", config.verify)),
    }


def _sampler(line: str, params: SamplingParams) -> Part:
    """The processors, then the controls of the request."""
    chosen = [] if params.control is None else registry.split(params.control, "+")
    parts = [_registered("control", "control", text, registry.create("control", text)) for text in chosen]
    found = [part.guarantee for part in parts if part.guarantee is not None]
    return Part([line, *(more for part in parts for more in part.lines)], max(found, default=None))


def _adapters(config: EngineConfig, setup: Setup, params: SamplingParams) -> Iterator[str]:
    from redraft.models import adapter
    from redraft.models.memory import size

    checkpoint = setup.checkpoint
    for name, folder in config.model.adapters.items():
        found = adapter.read(name, folder, checkpoint.spec, checkpoint.named, setup.backend)
        chosen = ", which the request chose" if name == params.lora else ""
        ranks = sorted({len(term.b) for term in found.terms()})
        yield f"  adapter {name}{chosen}: ranks {', '.join(map(str, ranks))}; {size(found.bytes)}; {adapter.TITLE}"


def _work(engine: Engine, params: SamplingParams) -> Any:
    """A text of one token, before its next is drawn."""
    from redraft.core.plan import Work
    from redraft.core.sequence import Request, Sequence

    request = Request("explain", [0], params)
    seq = Sequence(0, request, 0, [0], 1, 0, engine.max_model_len - 1)
    seq.state[engine.sampler] = engine.sampler.begin(seq)
    return Work(seq, 1)


def _policies(engine: Engine, params: SamplingParams) -> Part:
    """The methods that the request chose for cache, depth and steering."""
    from redraft.engine.policies import CHOICES

    engine.policies.check(params)
    parts = [_registered(seam, seam, text, registry.create(seam, text)) for seam in CHOICES if (text := getattr(params, seam))]
    if not parts:
        return Part(["policies: none; every row reads the whole cache, all layers run"])
    return Part([line for part in parts for line in part.lines], max(part.guarantee for part in parts if part.guarantee is not None))


def _registered(role: str, seam: str, text: str, made: Any) -> Part:
    name = registry.parse(text)[0]
    card: Card = made.card
    values = ", ".join(f"{option}={getattr(made, option)}" for option in registry.options(type(made)))
    lines = [
        f"{role}: {name}, {card.title}; guarantee {card.guarantee.label}",
        *([f"  {values}"] if values else []),
        *([f"  {card.paper}"] if card.paper else []),
    ]
    return Part(lines, card.guarantee)


def _requested(taps: Taps) -> str:
    found = []
    if taps.logits:
        found.append("logits")
    if taps.top_k:
        found.append(f"the {taps.top_k} likeliest tokens of every row")
    if taps.hidden:
        found.append(f"hidden states after layers {', '.join(map(str, sorted(taps.hidden)))}")
    return " and ".join(found) or "nothing beyond the argmax"
