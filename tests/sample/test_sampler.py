"""The sampler on packed steps: rows, paths, seeds and positions. Also the text of coupled against plain decoding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redraft.config import SamplingParams
from redraft.core.batch import Batch
from redraft.core.plan import Work
from redraft.core.taps import NO_TAPS, Taps
from redraft.core.testing import sequence, view
from redraft.core.tree import EMPTY, TokenTree
from redraft.ops.arrays import DTYPES, array, name_of
from redraft.ops.backend import ForwardResult
from redraft.sample.sampler import Sampler
from redraft.verify.coupled import Coupled
from tests.contracts.algebra import LEAST_P, chi_square_p
from tests.sample import plain
from tests.sample.toy import begun, step, toy_logits

V = 9
EOS = frozenset({0})
SPELLED = {"a": [[4]], "bc": [[5, 6], [7, 7, 1]]}
PARAMS = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.4, "frequency_penalty": 0.4},
    {},
    {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1},
    {"top_k": 3, "presence_penalty": 1.0, "min_tokens": 6, "logit_bias": {2: 1.0}},
    {"temperature": 1.3, "min_p": 0.1, "bad_words": ("a", "bc")},
    {"typical_p": 0.7, "frequency_penalty": -0.5, "stop_token_ids": (2,), "min_tokens": 4},
    {"dry_multiplier": 1.5, "dry_allowed_length": 1, "dry_sequence_breakers": ("c",), "temperature": 0},
    {"dry_multiplier": 0.5, "dry_base": 1.2, "dry_penalty_last_n": 9, "xtc_probability": 0.5, "xtc_threshold": 0.15},
    {"top_n_sigma": 1.2, "dynatemp_range": 0.7, "dynatemp_exponent": 0.5, "temperature": 1.1},
    {"mirostat": 2, "mirostat_tau": 1.5, "mirostat_eta": 0.4, "temperature": 1.5},
    {"mirostat": 2, "mirostat_tau": 2.5, "mirostat_eta": 0.1, "xtc_probability": 0.3, "dry_multiplier": 1.0, "top_k": 7},
]
LETTERS = "abcdefghi"


def sampler():
    return Sampler(V, EOS, SPELLED.__getitem__, bytes_of=lambda token: LETTERS[token].encode())


def random_tree(rng, seq):
    """Half of the nodes are the tokens of plain decoding at temperature 0, so that paths get accepted."""
    tokens, parents = [], []
    for i in range(int(rng.integers(0, 14))):
        parents.append(int(rng.integers(-1, i)))
        context, at = [], parents[-1]
        while at >= 0:
            context, at = [tokens[at], *context], parents[at]
        guess = int(toy_logits(seq.tokens + context, V).argmax())
        tokens.append(guess if rng.random() < 0.5 else int(rng.integers(0, V)))
    return TokenTree.build(tokens, parents, vocab=V, rows=99, depth=99)


def plain_text(prompt, params, seed, length):
    texts, surprises = list(prompt), []
    checked = begun(sampler(), prompt, **params).params
    while len(texts) < length:
        extend(texts, surprises, checked, len(prompt), seed)
    return texts


def extend(context, surprises, params, prompt_len, seed, token=None):
    """Appends the token that the definition draws, or the given one, and its surprise."""
    words = [ids for text in params.bad_words for ids in SPELLED[text]]
    given = toy_logits(context, V), params, context, prompt_len
    more = EOS, words, seed, LETTERS, list(surprises)
    drawn = plain.token(*given, seed, EOS, words, *more[3:]) if token is None else token
    surprises.append(plain.surprise(*plain.processed(*given, *more), drawn))
    context.append(drawn)


def test_coupled_gives_the_plain_text_for_any_trees_in_any_batch():
    own, rng, accepted_nodes, rejected = sampler(), np.random.default_rng(3), 0, 0
    prompts = [[1, 2, 3], [5, 5], [8], [1, 2, 3], [4, 6, 4, 6], [7, 2], [3, 1, 8], [3, 4], [1, 2, 1], [6], [2, 5, 8], [7]]
    seqs = [begun(own, prompt, seed=i % 3, **params) for i, (prompt, params) in enumerate(zip(prompts, PARAMS, strict=True))]
    while any(len(seq.tokens) < 40 for seq in seqs):
        run = [seq for seq in seqs if len(seq.tokens) < 40 and rng.random() < 0.8]
        trees = [random_tree(rng, seq) for seq in run]
        distribution = step(own, run, trees) if run else None
        found = Coupled().accept(trees, distribution) if run else []
        surprises = {id(seq): total for seq, total in distribution.surprises(found)} if run else {}
        for seq, tree, accepted in zip(run, trees, found, strict=True):
            seq.surprise = surprises.get(id(seq), 0)
            seq.advance(seq.pending, accepted.tokens, len(accepted.path))
            accepted_nodes += len(accepted.path)
            rejected += len(tree) - len(accepted.path)
            if rng.random() < 0.1:  # preempted: all tokens are pending again, and the state is built again
                seq.stored = int(rng.integers(0, len(seq.tokens)))
                seq.state[own] = own.begin(seq)
    assert accepted_nodes > 50 and rejected > 50
    assert all(bool(seq.surprise) == ("mirostat" in params) for seq, params in zip(seqs, PARAMS, strict=True))
    for i, (seq, prompt, params) in enumerate(zip(seqs, prompts, PARAMS, strict=True)):
        assert seq.tokens == plain_text(prompt, params, i % 3, len(seq.tokens)), params


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 32), st.lists(st.sampled_from(range(len(PARAMS))), min_size=1, max_size=5))
def test_every_node_draws_by_its_own_path_together_as_alone(seed, chosen):
    own, rng = sampler(), np.random.default_rng(seed)
    seqs, trees = [], []
    for i in chosen:
        tokens = rng.integers(0, V, int(rng.integers(2, 9))).tolist()
        seqs.append(begun(own, tokens, prompt_len=int(rng.integers(1, len(tokens) + 1)), seed=int(rng.integers(0, 99)), **PARAMS[i]))
        trees.append(random_tree(rng, seqs[-1]))
    distribution = step(own, seqs, trees)
    rows = [int(row) for row in rng.permutation(len(distribution.batch.logit_rows))]
    together = dict(zip(rows, distribution.draw(rows), strict=True))
    assert together == {row: distribution.draw([row])[0] for row in rows}
    for s, (seq, tree) in enumerate(zip(seqs, trees, strict=True)):
        for node in range(-1, len(tree)):
            context, surprises = list(seq.tokens), [0.0] * seq.generated
            for token in tree.tokens[tree.path_to(node)].tolist():
                extend(context, surprises, seq.params, seq.prompt_len, seq.seed, token)
            extend(context, surprises, seq.params, seq.prompt_len, seq.seed)
            assert together[int(distribution.roots[s]) + 1 + node] == context[-1]


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 1500}, {"typical_p": 0.6}, {"min_p": 0.2, "temperature": 0.7}])
@pytest.mark.parametrize("spread", [0.02, 3.0])
def test_large_vocabulary_equals_the_plain_sort(params, spread):
    size = 20_000  # more than one NOISE_CHUNK, and flat enough for several doublings
    own = Sampler(size, EOS)
    rng = np.random.default_rng(5)
    table = {i: np.round(rng.normal(size=size) * spread, 3) for i in range(3)}
    seqs = [begun(own, [1, i], seed=i, **params) for i in range(3)]
    distribution = step(own, seqs, logits=lambda context, _: table[context[-1]])
    assert distribution.draw([2, 0, 1]) == [plain.token(table[i], seqs[i].params, [1, i], 2, i) for i in (2, 0, 1)]


def test_draws_follow_the_distribution():
    own = Sampler(8, EOS)
    logits = np.asarray([0.0, 1.0, -1.0, 2.0, 0.5, -np.inf, 0.0, -3.0])
    seqs = [begun(own, [1] * (1 + i % 7), seed=i, temperature=0.7, top_p=0.95) for i in range(3000)]
    drawn = step(own, seqs, logits=lambda *_: logits).draw(range(3000))
    ids, values = plain.processed(logits, seqs[0].params, [1], 1)
    probs = np.zeros(8)
    probs[ids] = np.exp(values) / np.exp(values).sum()
    assert 0 < np.count_nonzero(probs) < 7
    assert chi_square_p(np.bincount(drawn, minlength=8), probs * 3000) >= LEAST_P


def test_position_is_the_index_of_the_drawn_token():
    """The same context length drawn at a root, at a tree node, and after a longer chain of pending tokens."""
    own = sampler()
    logits = toy_logits([0], V)
    short, long = begun(own, [1, 2, 3], seed=9), begun(own, [1, 2, 3, 4, 5], seed=9)
    long.stored = 1
    distribution = step(own, [short, long], [TokenTree.chain([4, 5]), EMPTY], logits=lambda *_: logits)
    root, first, second, other = distribution.draw([0, 1, 2, 3])
    assert second == other == plain.token(logits, short.params, [0] * 5, 5, 9)
    assert [root, first] == [plain.token(logits, short.params, [0] * n, n, 9) for n in (3, 4)]


def test_a_growing_tail_draws_as_the_whole_tree():
    own = sampler()
    tree = TokenTree.build([4, 5, 6, 6], [-1, -1, 0, 2], vocab=V, rows=9, depth=9)
    for seed in range(20):
        a, b = begun(own, [1, 2, 3], seed=seed, frequency_penalty=2.0), begun(own, [5, 6], seed=5)
        whole = step(own, [b, a], [EMPTY, tree])
        works = [Work(b, 1, first=0), Work(a, 1, first=2)]
        batch = Batch.pack(works, [EMPTY, tree], view(works))
        assert whole.out.logits is not None
        distribution = own.distribution(
            ForwardResult(whole.out.argmax[[0, 4, 5]], logits=whole.out.logits[[0, 4, 5]]), batch, works, [EMPTY, tree]
        )
        assert distribution.draw([0, 1, 2]) == whole.draw([0, 4, 5])


def test_needs():
    own = sampler()

    def needs(**params):
        seq = begun(own, [1, 2, 3], **params)
        return own.needs([Work(seq, seq.pending)])

    assert own.needs([]) == NO_TAPS
    assert needs(temperature=0) == needs(temperature=0, top_p=0.5) == NO_TAPS
    assert needs() == needs(temperature=0, logit_bias={1: 1.0}) == needs(temperature=0, logprobs=0) == Taps(logits=True)
    chunk = begun(own, [1, 2, 3])
    chunk.stored = 0
    assert own.needs([Work(chunk, 2)]) == NO_TAPS, "an unfinished chunk draws nothing"
    asks = begun(own, [1, 2, 3], temperature=0, prompt_logprobs=0)
    assert own.needs([Work(asks, 1)]) == NO_TAPS, "the prompt is behind it"
    asks.stored = 0
    assert own.needs([Work(asks, 2)]) == own.needs([Work(chunk, 2), Work(asks, 2)]) == Taps(logits=True)


def test_greedy_rows_need_no_logits():
    own = sampler()
    distribution = step(own, [begun(own, [1, 2], temperature=0), begun(own, [4], temperature=0, top_p=0.3)])
    bare = own.distribution(ForwardResult(np.asarray([7, 3], np.int32)), distribution.batch, distribution.work, distribution.trees)
    assert bare.draw([1, 0]) == [3, 7]


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_drawing_leaves_the_logits_as_they_are(backend, dtype):
    def place(table):
        if backend == "numpy":
            return table.astype(DTYPES[dtype])
        import torch

        return torch.tensor(table, dtype=getattr(torch, dtype))

    own = sampler()
    seqs = [begun(own, [1, i], seed=i, temperature=0.5, logit_bias={1: 2.0}) for i in range(4)]
    distribution = step(own, seqs, place=place)
    assert distribution.out.logits is not None and name_of(distribution.out.logits.dtype) == dtype
    before = array(distribution.out.logits).copy()
    drawn = distribution.draw(range(4))
    assert drawn == distribution.draw(range(4))
    np.testing.assert_array_equal(before, array(distribution.out.logits))
    assert drawn == [plain.token(before[i].astype(np.float64), seqs[i].params, [1, i], 2, i) for i in range(4)]


def test_only_some_sequences():
    own = sampler()
    distribution = step(own, [begun(own, [1, i], seed=i) for i in range(4)], [EMPTY, TokenTree.chain([1, 2]), EMPTY, TokenTree.chain([3])])
    some = distribution.only([1, 3])
    assert some.roots.tolist() == distribution.roots[[1, 3]].tolist()
    assert some.draw(some.roots.tolist()) == distribution.draw(distribution.roots[[1, 3]].tolist())


LOGITS = st.lists(st.sampled_from([-np.inf, -2.0, 0.0, 1.0, 1.5]) | st.floats(-9, 9), min_size=V, max_size=V)


@settings(max_examples=40, deadline=None)
@given(LOGITS, st.integers(0, V - 1), st.integers(0, V + 3))
def test_logprobs_of_the_raw_logits(logits, token, k):
    if max(logits) == -np.inf:
        return
    own = sampler()
    seqs = [begun(own, [1], logit_bias={2: 5.0}, temperature=0.1, top_k=1, logprobs=k), begun(own, [2], logprobs=k)]
    distribution = step(own, seqs, logits=lambda context, size: np.asarray(logits) if context == [2] else toy_logits(context, size))
    for found, raw, own_token in zip(distribution.logprobs([1, 0], [token, 3], k), [logits, toy_logits([1], V)], [token, 3], strict=True):
        wanted = np.asarray(raw) - np.logaddexp.reduce(raw)
        order = plain.by_rank(raw)
        assert found.token == own_token
        np.testing.assert_allclose(found.logprob, wanted[own_token], rtol=1e-12, atol=1e-14)
        assert found.rank == order.index(own_token) + 1
        assert [i for i, _ in found.top] == order[:k]
        np.testing.assert_allclose([p for _, p in found.top], wanted[order[:k]], rtol=1e-12, atol=1e-15)


def test_a_fork_counts_for_itself():
    own = sampler()
    seq = begun(own, [1, 2], temperature=0, frequency_penalty=2.0)
    step(own, [seq]).draw([0])
    child = begun(own, [1, 2], temperature=0, frequency_penalty=2.0)
    child.state[own] = own.fork(seq.state[own], child)
    child.tokens += [6, 6]
    child.stored = 3
    distribution = step(own, [seq, child])
    assert distribution.draw([0, 1]) == [plain.token(toy_logits(s.tokens, V), s.params, s.tokens, 2, 0) for s in (seq, child)]
    own.end(child.state[own])


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=0.7, top_k=3),
        SamplingParams(temperature=1, min_p=0.2),
        SamplingParams(temperature=0.7, logit_bias={3: 5.0, 8: -np.inf}, repetition_penalty=1.3, presence_penalty=0.5),
    ],
)
def test_few_tokens_are_processed_as_in_a_row_of_all(params: SamplingParams) -> None:
    """If the others have no mass."""
    sampler = Sampler(12, frozenset({3}))
    seq = sequence([1, 3, 5, 8])
    seq.request.params = params
    seq.state[sampler] = sampler.begin(seq)
    ids, values = np.array([2, 3, 5, 8, 11]), np.array([0.3, 1.0, 1.2, 2.0, -0.5])
    whole = np.full(12, -np.inf)
    whole[ids] = values
    expected, found = sampler.row(whole.copy(), seq, [5]), sampler.few(ids, values.copy(), seq, [5])
    left = expected.values > -np.inf
    assert found.ids.tolist() == expected.ids[left].tolist() and len(found.ids)
    assert np.allclose(found.values, expected.values[left])
