"""The sampler: the chosen token is the argmax of the processed logits plus Gumbel noise, over the tokens that the filters keep.

The noise is a function of (seed, position, id) and zero for greedy requests. Ties go to the lowest id. The result depends only on
the row's logits, the parameters, the row's path, the seed and the position. So trees, batches and chunks cannot change a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from redraft import registry
from redraft.config import SamplingParams
from redraft.core.batch import Batch
from redraft.core.distribution import TopLogprobs
from redraft.core.noise import Stream, draw, gumbel, key, uniform
from redraft.core.plan import Accepted, Work
from redraft.core.ranking import top
from redraft.core.sequence import Sequence
from redraft.core.taps import NO_TAPS, Taps
from redraft.core.tree import I32, TokenTree
from redraft.ops.arrays import Tensor, array, device
from redraft.ops.backend import ForwardResult
from redraft.sample.processors.processor import (
    F64,
    I64,
    Constraint,
    Ending,
    Feedback,
    LazyCheck,
    Processor,
    Row,
    TextError,
    Vocabulary,
    weigh,
)

Chosen = tuple[Processor, ...]  # a request's processors in the registry's order; kept in seq.state[sampler]


class NotNumbers(TextError):
    """The model's logits for a text contain NaN or an infinity: the weights are damaged, or a narrow dtype overflowed."""

    def __init__(self, seq: Sequence) -> None:
        super().__init__(seq, f"the model's output after token {len(seq.tokens) - 1} is NaN or infinite")


class NoToken(TextError):
    """A control's check refuses every token that the filters of its request leave."""

    def __init__(self, seq: Sequence) -> None:
        super().__init__(seq, f"control: no token that the filters leave may follow token {len(seq.tokens) - 1}")


class Sampler:
    """vocab: size of the logits; eos: the model's end-of-text ids; encode: the token id sequences that spell a bad word,
    None without a tokenizer; drafts: the noise stream for drafters that sample, chosen by the verifier (Verifier.drafts);
    exact: no tree changes a text, see Verifier; draw: that of core/noise.py, or a backend's with the same results; bytes_of: the bytes
    that a token adds to a text, None without a tokenizer; plain, special: see Vocabulary."""

    def __init__(
        self,
        vocab: int,
        eos: frozenset[int],
        encode: Callable[[str], list[list[int]]] | None = None,
        drafts: Stream = Stream.TARGET,
        draw: Callable[[int, I64, F64], int] = draw,
        bytes_of: Callable[[int], bytes] | None = None,
        exact: bool = True,
        plain: Callable[[str], list[int]] | None = None,
        special: Iterable[int] = (),
    ) -> None:
        self.processors: tuple[type[Processor], ...] = tuple(map(registry.load, registry.PROCESSORS.values()))
        self.vocabulary = Vocabulary(vocab, eos, encode, bytes_of, plain, frozenset(special))
        self.ids: I64 = np.arange(vocab)
        self.drafts, self.exact = drafts, exact
        self.draw = draw

    def for_drafts(self, drafts: Stream, exact: bool) -> DraftView:
        """The sampler's interface for a drafter that must draw with this noise stream."""
        return DraftView(self, drafts, exact)

    def check(self, params: SamplingParams) -> Chosen:
        """The processors that a request needs. Raises InvalidInput for parameters that this vocabulary does not allow."""
        made = (processor.of(params, self.vocabulary) for processor in self.processors)
        return tuple(processor for processor in made if processor is not None)

    def begin(self, seq: Sequence) -> Chosen:
        chosen = self.check(seq.params)
        seq.constrained = any(isinstance(one, Constraint) for one in chosen)
        seq.checked = any(isinstance(one, LazyCheck) for one in chosen)
        seq.reacts = any(isinstance(one, Feedback) for one in chosen)
        return chosen

    def fork(self, state: Chosen, seq: Sequence) -> Chosen:
        return self.begin(seq)  # processors recompute their counts from seq.tokens

    def end(self, state: Chosen) -> None:
        pass

    def constraint(self, seq: Sequence) -> Constraint | None:
        """The processor that knows which drafts are in vain; None without one."""
        return next((one for one in seq.state[self] if isinstance(one, Constraint)), None) if seq.constrained else None

    def finished(self, seq: Sequence, tokens: Seq[int]) -> bool:
        """Whether a processor of the request declares the text complete after seq.tokens and `tokens`."""
        chosen = seq.state[self]
        return bool(chosen) and any(one.finished(seq, tokens) for one in chosen if isinstance(one, Ending))

    def needs(self, work: Seq[Work]) -> Taps:
        """The outputs that this step needs. If every row is greedy, without processors and without logprobs, only the argmax."""
        return Taps(logits=True) if any(map(self._reads_logits, work)) else NO_TAPS

    def _reads_logits(self, work: Work) -> bool:
        seq, params = work.seq, work.seq.params
        draws = work.done and (not params.greedy or bool(seq.state[self]) or params.logprobs is not None)
        return draws or bool(work.prompt_rows)

    def row(self, values: F64, seq: Sequence, drafted: list[int], parent: Callable[[], Row] | None = None) -> Row:
        """Applies the request's processors to the logits after seq.tokens and `drafted`. Both the target and draft models are
        sampled from the result. values: f64[V], overwritten; parent: see Row."""
        row = Row(self.ids, values, seq, drafted, parent)
        for processor in seq.state[self]:
            processor.apply(row)
        return row

    def few(self, ids: I64, values: F64, seq: Sequence, drafted: list[int]) -> Row:
        """As `row`, of some tokens only: ids i64[M], ascending; values f64[M], their logits, overwritten."""
        chosen = seq.state[self]
        if any(getattr(processor, "by_id", False) for processor in chosen):
            whole = np.full(len(self.ids), -np.inf)
            whole[ids] = values
            row = self.row(whole, seq, drafted)
            row.keep(np.flatnonzero(row.values > -np.inf))
            return row
        row = Row(ids, values, seq, drafted)
        for processor in chosen:
            if len(row.ids):  # a grammar may have dropped all
                processor.apply(row)
        return row

    def distribution(self, out: ForwardResult, batch: Batch, work: Seq[Work], trees: Seq[TokenTree]) -> TargetDistribution:
        """The distribution of the next token at each logit row of one step. Rows are computed on request."""
        return TargetDistribution(self, out, batch, work, trees, batch.roots)


@dataclass(frozen=True, eq=False)
class DraftView:
    """redraft.draft.drafter.DraftSampler with another noise stream than the engine's, for a request with its own verifier."""

    sampler: Sampler
    drafts: Stream
    exact: bool

    @property
    def vocabulary(self) -> Vocabulary:
        return self.sampler.vocabulary

    def row(self, values: F64, seq: Sequence, drafted: list[int]) -> Row:
        return self.sampler.row(values, seq, drafted)

    def few(self, ids: I64, values: F64, seq: Sequence, drafted: list[int]) -> Row:
        return self.sampler.few(ids, values, seq, drafted)


@dataclass(eq=False, slots=True)
class TargetDistribution:
    """redraft.core.distribution.Distribution of one step."""

    sampler: Sampler
    out: ForwardResult
    batch: Batch
    work: Seq[Work]
    trees: Seq[TokenTree]
    roots: I32
    processed: dict[int, Row] = field(default_factory=dict)  # of sequences that react: row in the batch -> the same, processed

    def only(self, indices: Seq[int]) -> TargetDistribution:
        """The distribution for a verifier of some of the sequences: `indices` are their places in the batch."""
        return replace(self, roots=self.roots[np.asarray(indices, np.int64)])

    def draw(self, rows: Seq[int]) -> list[int]:
        """The token drawn at each logit row, with the processors of its sequence and the noise of its position. Raises NotNumbers."""
        argmax = self.out.argmax.tolist()  # faster than indexing the array
        drawn: list[int] = [argmax[row] for row in rows]
        if self.out.logits is None and min(drawn, default=0) >= 0:  # nothing needs more, see Sampler.needs
            return drawn
        packed, owners = self._owners(rows)
        processed = [i for i, s in enumerate(owners) if not self._argmax_suffices(s, packed[i], drawn[i])]
        fetched = self._fetch([rows[i] for i in processed])
        for i, values in zip(processed, fetched, strict=True):
            row = self._row(values, owners[i], packed[i])
            noise = None if row.seq.params.greedy else self._key(row.seq, Stream.TARGET, packed[i])
            place = int(row.values.argmax()) if noise is None else self.sampler.draw(noise, row.ids, row.values)
            if row.seq.checked and not self._allows(row, place):
                place = self._next_allowed(row, place, noise)
            drawn[i] = int(row.ids[place])
        return drawn

    def probs(self, rows: Seq[int]) -> F64:
        """f64[R, V]: the distribution from which `draw` samples. For a greedy request it is one-hot."""
        packed, owners = self._owners(rows)
        probs = np.zeros((len(rows), self.sampler.vocabulary.size))
        greedy = [self.work[s].seq.params.greedy for s in owners]
        certain = [i for i, one in enumerate(greedy) if one]
        probs[certain, self.draw([rows[i] for i in certain])] = 1
        sampled = [i for i, one in enumerate(greedy) if not one]
        for i, values in zip(sampled, self._fetch([rows[i] for i in sampled]), strict=True):
            row = self._row(values, owners[i], packed[i])
            weights = weigh(row.values)
            if row.seq.checked:
                weights[[place for place in np.flatnonzero(weights).tolist() if not self._allows(row, place)]] = 0
                if not weights.any():
                    raise NoToken(row.seq)
            probs[i, row.ids] = weights / weights.sum()
        return probs

    def uniform(self, rows: Seq[int], n: int) -> F64:
        packed, owners = self._owners(rows)
        keys = [self._key(self.work[s].seq, Stream.ACCEPT, at) for s, at in zip(owners, packed, strict=True)]
        return np.stack([uniform(one, np.arange(n)) for one in keys])

    def choose(self, row: int, weights: F64) -> int:
        (packed,), (owner,) = self._owners([row])
        ids = np.flatnonzero(weights)
        noise = gumbel(self._key(self.work[owner].seq, Stream.RESIDUAL, packed), ids)
        return int(ids[(np.log(weights[ids]) + noise).argmax()])

    def states(self, rows: Seq[int], layer: int) -> Tensor:
        return self.out.hidden[layer][self.batch.logit_rows[np.asarray(rows, np.int64)].astype(np.int64)]

    def allows(self, row: int, token: int) -> bool:
        (packed,), (owner,) = self._owners([row])
        if not self.work[owner].seq.state[self.sampler]:
            return True
        (values,) = self._fetch([row])
        left = self._row(values, owner, packed)
        place = np.flatnonzero((left.ids == token) & (left.values > -np.inf))
        return bool(len(place)) and (not left.seq.checked or self._allows(left, int(place[0])))

    def surprises(self, accepted: Seq[Accepted]) -> list[tuple[Sequence, float]]:
        """The sequences that react to how likely their tokens were, and Sequence.surprise after these tokens. Before the commit."""
        found = []
        for s, (work, one) in enumerate(zip(self.work, accepted, strict=True)):
            if work.seq.reacts and one.tokens:
                total, first_node = work.seq.surprise, int(self.batch.tree_starts[s])
                for packed, token in zip([first_node - 1, *(first_node + node for node in one.path)], one.tokens, strict=False):
                    total += self._processed(s, packed).surprise(token)
                found.append((work.seq, total))
        return found

    def logprobs(self, rows: Seq[int], ids: Seq[int], k: int) -> list[TopLogprobs]:
        """log softmax in float64 of the raw logits. Ranks start at 1; of equal logits the lowest id comes first."""
        found = []
        for token, values in zip(ids, self._fetch(rows), strict=True):
            own = values[token]
            rank = 1 + np.count_nonzero(values > own) + np.count_nonzero(values[:token] == own)
            best = top(values, k)
            largest = values.max()
            total = largest + np.log(np.exp(values - largest).sum())
            likeliest = tuple(zip(best.tolist(), (values[best] - total).tolist(), strict=True))
            found.append(TopLogprobs(token, float(own - total), int(rank), likeliest))
        return found

    def _argmax_suffices(self, s: int, packed: int, argmax: int) -> bool:
        """Whether the processors leave the likeliest token as it is. A constraint that allows it does."""
        seq = self.work[s].seq
        if not seq.params.greedy:
            return False
        chosen = seq.state[self.sampler]
        return all(isinstance(one, Constraint | LazyCheck) and one.allows(seq, self._drafted(s, packed), argmax) for one in chosen)

    def _allows(self, row: Row, place: int) -> bool:
        """Whether the lazy checks allow the token at this place of a row."""
        checks = (one for one in row.seq.state[self.sampler] if isinstance(one, LazyCheck))
        return all(one.allows(row.seq, row.drafted, int(row.ids[place])) for one in checks)

    def _next_allowed(self, row: Row, place: int, noise: int | None) -> int:
        """The place that is drawn of those that the lazy checks allow, where they refuse `place`, which comes first. Raises NoToken. The
        order of noisy logits is that of draws without replacement, so this is a draw from the distribution of the allowed tokens."""
        noisy = row.values.copy() if noise is None else row.values + gumbel(noise, row.ids)
        while True:
            noisy[place] = row.values[place] = -np.inf
            place = int(noisy.argmax())
            if noisy[place] == -np.inf:
                raise NoToken(row.seq)
            if self._allows(row, place):
                return place

    def _fetch(self, rows: Seq[int]) -> Iterator[F64]:
        """Float64 copies of these rows of logits, one at a time, after one transfer from the device."""
        if not rows:
            return
        assert self.out.logits is not None, "logits were not requested: see Sampler.needs"
        logits, places = self.out.logits, list(rows)
        if str(device(logits)) != "cpu":
            logits, places = logits[places].cpu(), list(range(len(places)))
        fetched = array(logits)
        for place in places:
            yield fetched[place].astype(np.float64)

    def _owners(self, rows: Seq[int]) -> tuple[list[int], list[int]]:
        """For each logit row: its row in the batch, and the place of its sequence in the batch. Raises NotNumbers."""
        places = np.asarray(rows, np.int64)
        packed = self.batch.logit_rows[places]
        owners = (np.searchsorted(self.batch.starts, packed, side="right") - 1).tolist()
        if (found := self.out.argmax[places].tolist()) and min(found) < 0:
            raise NotNumbers(self.work[owners[found.index(-1)]].seq)
        return packed.tolist(), owners

    def _key(self, seq: Sequence, stream: Stream, packed: int) -> int:
        return key(seq.seed, stream, int(self.batch.positions[packed]) + 1)

    def _row(self, values: F64, s: int, packed: int) -> Row:
        seq, drafted = self.work[s].seq, self._drafted(s, packed)
        if not seq.reacts:
            return self.sampler.row(values, seq, drafted)
        if packed not in self.processed:
            self.processed[packed] = self.sampler.row(values, seq, drafted, partial(self._parent, s, packed))
        return self.processed[packed]

    def _parent(self, s: int, packed: int) -> Row:
        """The processed row of a node's parent."""
        first_node = int(self.batch.tree_starts[s])
        return self._processed(s, first_node + int(self.trees[s].parents[packed - first_node]))  # the root's parent is -1

    def _processed(self, s: int, packed: int) -> Row:
        if packed not in self.processed:
            (values,) = self._fetch([int(np.searchsorted(self.batch.logit_rows, packed))])
            return self._row(values, s, packed)
        return self.processed[packed]

    def _drafted(self, s: int, packed: int) -> list[int]:
        """The drafted tokens on the path of a row, which may be that of a node."""
        tree, first_node = self.trees[s], int(self.batch.tree_starts[s])
        nodes = tree.path_to(self.work[s].first + packed - first_node) if packed >= first_node else []
        return tree.tokens[nodes].tolist() if nodes else []
