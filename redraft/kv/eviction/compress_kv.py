"""Evicts once, at the end of the prompt: only the heads that find what a text asks for have a say, and fragile layers keep more.

Xiaolin Lin, Jingcun Wang, Olga Kondrateva, Yiyu Shi, Bing Li, Grace Li Zhang: CompressKV: Semantic Retrieval Heads Know What Tokens are Not
Important Before Generation, 2025, arXiv 2508.02401.

Once for each model, by `calibrate`:
1. Texts hide a sentence, and end with a question about it and its answer. The score of a query head is the attention that the rows of
   the answer give to the whole sentence.
2. The damage of a layer is how far the outputs of its attention move, relative to their size, if the same rows read only the
   TINY slots that the rows before the answer attended to most.

For each prompt:
3. Add up the attention that the last `window` rows give to every slot, in the `heads` best heads of a layer. Average over `pool`
   neighbours.
4. All heads of a layer keep the slots with the largest sums, and the observing rows.
5. Layers share the budget: each keeps `least` slots, and of the others a part by its damage, but at most three budgets.

Differs: sentences of random words in shuffled words of the given texts; outputs before the projection; heads are scored on all answers,
not only right ones; the first `sinks` are protected too.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.sequence import Lanes
from redraft.core.spec import Attention
from redraft.core.tree import F32, F64, I64
from redraft.errors import CheckpointError, InvalidInput
from redraft.kv.eviction.eviction import OpenEviction
from redraft.kv.eviction.parts import AtContext, Evicting, Mass, Selector
from redraft.models import calibration
from redraft.models.trained import Trained, model_hash, place
from redraft.ops.arrays import array
from redraft.options import Options, number

if TYPE_CHECKING:
    from redraft.models.runner import Runner

METHOD = "compresskv"
TINY = 32  # slots that a damaged layer reads
LENGTH, HIDDEN, ANSWER = 400, 12, 6  # tokens of a text, of its hidden sentence, and of the answer, which ends the sentence


@dataclass(frozen=True, eq=False)
class HeadScores:
    """heads: f32[L, H], attention to the hidden sentence; damage: f32[L], sum 1; model: the hash of the model; tokens: read."""

    heads: F32
    damage: F32
    model: str
    tokens: int
    texts: int

    def best(self, count: int) -> tuple[tuple[bool, ...], ...]:
        """[layer][query head]: whether it is one of the `count` best heads of its layer; of equal ones the lower."""
        order = np.argsort(-self.heads, axis=1, kind="stable")[:, :count]
        found = np.zeros(self.heads.shape, bool)
        np.put_along_axis(found, order, True, 1)
        return tuple(tuple(layer) for layer in found.tolist())

    def save(self, path: Path | None = None) -> Path:
        """Writes a safetensors file, by default where `open` looks for it; returns its path."""
        about = {"tokens": self.tokens, "texts": self.texts}
        return Trained(METHOD, self.model, about, {"heads": self.heads, "damage": self.damage}).save(path or place(METHOD, self.model))

    @classmethod
    def load(cls, path: Path) -> HeadScores:
        """CheckpointError if the file is damaged or of another method."""
        found = Trained.load(path, METHOD)
        try:
            return cls(found.arrays["heads"], found.arrays["damage"], found.model, int(found.about["tokens"]), int(found.about["texts"]))
        except KeyError as error:
            raise CheckpointError(f"{path}: not a complete file of {METHOD}: {error}") from None


@dataclass(frozen=True, eq=False)
class ByDamage:
    """Step 5. damage: f64[lanes], sum 1."""

    damage: F64
    least: int

    def longest(self, kept: int) -> int:
        return max(3 * kept, self.least)

    def shares(self, kept: int, keys: Seq[F64], ranks: I64, lengths: I64) -> I64:
        lanes, least = len(lengths), min(self.least, kept)
        wanted, most = least + self.damage * lanes * (kept - least), np.minimum(3 * kept, lengths)
        for _ in range(lanes):  # what is cut off goes to the other lanes
            over = wanted >= most
            spare = (wanted - most)[over].sum()
            wanted[over] = most[over]
            if spare <= 0 or over.all():
                break
            wanted[~over] += spare * self.damage[~over] / max(self.damage[~over].sum(), np.finfo(float).tiny)
        found = np.floor(wanted + 1e-9).astype(np.int64)
        order = np.argsort(found - wanted, kind="stable")  # the largest remainders first
        for lane in np.tile(order, lanes):
            if found.sum() == lanes * kept:
                break
            found[lane] += found[lane] < most[lane]
        return found


@dataclass(frozen=True)
class CompressKV(Options):
    """budget: slots of the prompt that a layer keeps on average, or the part of the prompt if it is 1 or less; heads: the number of query
    heads of a layer that choose; window: the number of the prompt's last rows, which observe and stay; pool: the number of neighbouring
    slots that share their attention, odd; sinks: the number of first tokens that always stay; least: slots that every layer keeps; even:
    the same budget for all layers; profile: the file of a calibration, None for the place where `redraft calibrate` writes it."""

    budget: float = number(0.25, gt=0, le=1 << 20)
    heads: int = number(4, ge=1)
    window: int = number(8, ge=1)
    pool: int = number(15, ge=1)
    sinks: int = number(4, ge=0)
    least: int = number(32, ge=1)
    even: bool = False
    profile: Path | None = None

    reads_texts: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        "CompressKV",
        "Lin, Wang, Kondrateva, Shi, Li, Zhang, CompressKV: Semantic Retrieval Heads Know What Tokens are Not Important Before "
        "Generation, 2025, arXiv 2508.02401",
        Guarantee.LOSSY,
        deviates="heads are scored on made-up sentences; sinks are spared",
        summary="The heads that retrieve choose; long prompts",
        needs="scores of the model's heads, once: redraft calibrate --method compresskv",
        budget="budget={part}",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool % 2 == 0:
            raise InvalidInput(f"compresskv:pool={self.pool}: must be odd, a slot and as many on each side")

    @staticmethod
    def calibrate(runner: Runner, texts: Seq[Seq[int]], samples: int = 8) -> HeadScores:
        """Scores the heads and layers of a model on up to `samples` texts made of these tokens."""
        return calibrate(runner, texts, samples)

    def open(self, runner: Any) -> OpenEviction:
        profile = self._profile(runner)
        layers, counted = len(runner.spec.attention), profile.best(self.heads)
        spared = self.window + self.sinks
        damage = np.full(layers, 1 / layers) if self.even else profile.damage.astype(np.float64) / profile.damage.sum(dtype=np.float64)
        return Evicting(
            layers,
            trigger=AtContext(self.budget, least=max(self.least, spared + 1)),
            scorer=Mass(self.window, self.pool, self.window, counted),  # 3.
            selector=Selector(self.sinks, self.window),  # 4.
            allocator=ByDamage(damage, max(self.least, spared + 1)),  # 5.
            lanes=Lanes.PER_LAYER,
        )

    def _profile(self, runner: Runner) -> HeadScores:
        path = self.profile.expanduser() if self.profile else place(METHOD, model_hash(runner))
        if not path.exists():
            of = str(runner.source or "MODEL")
            raise InvalidInput(f"{METHOD}: no profile {path}; make one with: redraft calibrate {of} --method {METHOD} --texts FILE")
        found = HeadScores.load(path)
        Trained(METHOD, found.model, {}, {}).check(runner, path)
        return found


def calibrate(runner: Runner, texts: Seq[Seq[int]], samples: int, seed: int = 0) -> HeadScores:
    dice, words = np.random.default_rng(seed), np.array([token for text in texts for token in text])
    length = min(LENGTH, runner.spec.context - 1)
    if len(words) < length:
        raise InvalidInput(f"{METHOD}: {len(words)} tokens of text: at least {length} are needed")
    count, layers = max(1, samples), len(runner.spec.attention)
    heads, damage = np.zeros((layers, runner.spec.attention[0].heads)), np.zeros(layers)
    for _ in range(count):
        at, sentence = int(dice.integers(len(words) - length + 1)), dice.choice(words, HIDDEN)
        filler = words[at : at + length - 2 * HIDDEN]
        where = int(dice.integers(8, len(filler) - 8))
        tokens = [*filler[:where], *sentence, *filler[where:], *sentence]  # its beginning again is the question

        def score(index: int, layer: Attention, q: Any, k: Any, v: Any, where: int = where) -> None:
            rows, keys, values = (array(x).astype(np.float32).reshape(len(k), -1, layer.head_dim) for x in (q, k, v))
            weights = _weights(rows[len(k) - 2 * ANSWER :], keys, layer)  # [H, question and answer, slots]
            heads[index] += weights[:, ANSWER:, where : where + HIDDEN].sum(-1).mean(-1) / count  # 1.
            damage[index] += _damage(weights, values)  # 2.

        calibration.run(runner, [tokens], length, score)
    means = (heads.astype(np.float32), (damage / damage.sum()).astype(np.float32))
    return HeadScores(*means, model_hash(runner), count * length, len(texts))


def _damage(weights: F32, values: F32) -> float:
    """How far the outputs of the answer's rows move if these read only the TINY slots that the question's rows attend to most. weights:
    [H, question and answer, slots]; values: [slots, K, D]."""
    kept = np.zeros(weights.shape[-1], bool)
    kept[np.argsort(-weights[:, :ANSWER].sum((0, 1)), kind="stable")[:TINY]] = True
    kept[-ANSWER:] = True
    answer, by_head = weights[:, ANSWER:], np.repeat(values, len(weights) // values.shape[1], 1).swapaxes(0, 1)
    cut = np.where(kept, answer, 0.0)
    whole, less = answer @ by_head, (cut / cut.sum(-1, keepdims=True)) @ by_head
    return float(np.linalg.norm(whole - less) / (np.linalg.norm(whole) + 1e-5))


def _weights(q: F32, k: F32, layer: Attention) -> F32:
    """Attention weights [H, rows, slots] of the last rows."""
    rows, n, share = len(q), len(k), layer.heads // layer.kv_heads
    logits = np.einsum("rhd,nhd->hrn", q, np.repeat(k, share, 1)) * np.float32(layer.score_scale)
    if layer.softcap is not None:
        logits = layer.softcap * np.tanh(logits / layer.softcap)
    at = np.arange(n - rows, n)[:, None]
    hidden = np.arange(n) > at
    if layer.window is not None:
        hidden |= at - np.arange(n) >= layer.window
    logits[:, hidden] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    found: F32 = weights / weights.sum(-1, keepdims=True)
    return found
