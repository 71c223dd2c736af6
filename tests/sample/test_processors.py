"""Every processor, alone and with all others, against its simple definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from redraft.config import SamplingParams
from redraft.core.ranking import top
from redraft.errors import InvalidInput
from redraft.sample.processors.processor import BUCKETS, Row, largest, repetitions
from redraft.sample.sampler import Sampler
from tests.sample import plain
from tests.sample.toy import begun

V = 12
EOS = frozenset({0, 3})
LETTERS = [*"abcdefghij", "cd", "dead"]  # the text of each token
SPELLED = {"x": [[4]], "yz": [[5, 6], [1, 5, 6]], "yzz": [[5, 6, 6], [7, 5]]}

LOGITS = st.lists(st.sampled_from([-np.inf, -30.0, -2.0, -1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 9.0]) | st.floats(-5, 5), min_size=V, max_size=V)
TOKENS = st.lists(st.integers(0, V - 1), max_size=8)
CHOICES = {
    "logit_bias": st.dictionaries(st.integers(0, V - 1), st.sampled_from([-np.inf, -1.5, 0.25, 3.0]), max_size=4),
    "bad_words": st.lists(st.sampled_from(sorted(SPELLED)), max_size=3).map(tuple),
    "min_tokens": st.integers(0, 6),
    "ignore_eos": st.booleans(),
    "stop_token_ids": st.lists(st.integers(0, V - 1), max_size=2).map(tuple),
    "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7]),
    "frequency_penalty": st.sampled_from([0.0, 0.5, -1.0]),
    "presence_penalty": st.sampled_from([0.0, 0.75, -0.5]),
    "temperature": st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.0]),
    "top_k": st.sampled_from([-1, 0, 1, 3, V - 1, V, 99]),
    "top_p": st.sampled_from([1e-9, 0.2, 0.5, 0.9, 0.999999, 1.0]),
    "min_p": st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    "typical_p": st.sampled_from([1e-9, 0.3, 0.9, 1.0]),
    "dry_multiplier": st.sampled_from([0.0, 0.5, 3.0]),
    "dry_base": st.sampled_from([1.0, 1.75]),
    "dry_allowed_length": st.sampled_from([1, 2, 3]),
    "dry_penalty_last_n": st.sampled_from([-1, 0, 4]),
    "dry_sequence_breakers": st.sampled_from([(), ("c",), ("de", "c")]),
    "top_n_sigma": st.sampled_from([-1.0, 0.0, 0.5, 1.5]),
    "xtc_probability": st.sampled_from([0.0, 0.5, 1.0]),
    "xtc_threshold": st.sampled_from([0.05, 0.2, 0.6]),
    "dynatemp_range": st.sampled_from([0.0, 0.25, 3.0]),
    "dynatemp_exponent": st.sampled_from([0.5, 1.0]),
}
ALONE = {
    "bias": ["logit_bias"],
    "bad_words": ["bad_words"],
    "min_tokens": ["min_tokens", "ignore_eos", "stop_token_ids"],
    "penalties": ["repetition_penalty", "frequency_penalty", "presence_penalty"],
    "temperature": ["temperature"],
    "top_k": ["top_k"],
    "top_p": ["top_p"],
    "min_p": ["min_p"],
    "typical_p": ["typical_p"],
    "dry": ["dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"],
    "top_n_sigma": ["top_n_sigma", "temperature"],
    "xtc": ["xtc_probability", "xtc_threshold"],
    "dynamic_temperature": ["dynatemp_range", "dynatemp_exponent", "temperature"],
    "all": list(CHOICES),
}


def check(logits, params, prompt, output, drafted):
    sampler = Sampler(V, EOS, SPELLED.__getitem__, bytes_of=lambda token: LETTERS[token].encode())
    seq = begun(sampler, [1, *prompt, *output], prompt_len=1 + len(prompt), seed=5, **params)
    row = Row(sampler.ids, np.asarray(logits, np.float64), seq, drafted)
    for processor in seq.state[sampler]:
        processor.apply(row)
    words = [ids for text in seq.params.bad_words for ids in SPELLED[text]]
    ids, values = plain.processed(logits, seq.params, seq.tokens + drafted, seq.prompt_len, EOS, words, 5, LETTERS)
    assert row.ids.tolist() == ids.tolist()
    np.testing.assert_array_equal(row.values, values)


@pytest.mark.parametrize("fields", ALONE.values(), ids=ALONE)
def test_equals_its_definition(fields):
    @settings(max_examples=80 if len(fields) < 9 else 400, deadline=None)
    @given(LOGITS, st.fixed_dictionaries({name: CHOICES[name] for name in fields}), TOKENS, TOKENS, TOKENS)
    def run(logits, params, prompt, output, drafted):
        check(logits, params, prompt, output, drafted)

    run()


def test_everything_banned_leaves_the_lowest_id():
    sampler = Sampler(V, EOS)
    bans = dict.fromkeys(range(V), -np.inf)
    choices = [{}, {"temperature": 0.5}, {"top_p": 0.5}, {"min_p": 0.5}, {"typical_p": 0.5}, {"top_k": 2, "top_p": 0.9}, {"temperature": 0}]
    for filters in choices:
        check([1.0] * V, {"logit_bias": bans, **filters}, [2], [], [])
        seq = begun(sampler, [1], logit_bias=bans, **filters)
        row = Row(sampler.ids, np.ones(V), seq, [])
        for processor in seq.state[sampler]:
            processor.apply(row)
        assert row.ids[row.values.argmax()] == 0


def test_a_tiny_temperature_does_not_overflow():
    for more in ({"top_p": 0.9}, {"top_n_sigma": 1000}, {"mirostat": 2}, {"xtc_probability": 1}, {"dynatemp_range": 1e-300}):
        check(np.linspace(-3, 1000, V).tolist(), {"temperature": 1e-300, **more}, [], [], [])


def test_penalties_follow_the_text_and_forget_the_draft():
    sampler = Sampler(V, EOS)
    seq = begun(sampler, [1, 2], repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.25)
    logits = np.linspace(-2, 2, V)
    for drafted, token in (([7, 7], 4), ([], 4), ([9], 2), ([2, 11], 0)):
        for path in ([], drafted, drafted[:1]):
            row = Row(sampler.ids, logits.copy(), seq, path)
            seq.state[sampler][0].apply(row)
            np.testing.assert_array_equal(row.values, plain.processed(logits, seq.params, seq.tokens + path, 2)[1])
        seq.tokens.append(token)


def test_nothing_to_do_costs_nothing():
    sampler = Sampler(V, EOS)
    assert sampler.check(SamplingParams()) == ()
    assert sampler.check(SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.1, typical_p=0.5, min_tokens=0, ignore_eos=True)) == ()
    assert sampler.check(SamplingParams(top_k=V)) == ()
    filters = {"top_n_sigma": 1, "xtc_probability": 0.5, "dynatemp_range": 0.5, "mirostat": 2}
    assert sampler.check(SamplingParams(temperature=0, **filters)) == ()
    assert sampler.check(SamplingParams(dry_multiplier=1, dry_penalty_last_n=0, top_n_sigma=-1, xtc_probability=1, xtc_threshold=0.6)) == ()
    assert Sampler(V, frozenset()).check(SamplingParams(min_tokens=3)) == ()


def test_order_is_the_documented_one():
    names = [processor.__name__ for processor in Sampler(V, EOS).processors]
    assert names == [
        "Bias", "BadWords", "MinTokens", "Penalties", "DRY", "Temperature", "LogitControls", "FollowGrammar", "TopNSigma", "TopK", "TopP",
        "MinP",        "TypicalP", "XTC", "DynamicTemperature", "Mirostat", "FilteredControls", "CheckControls",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"logit_bias": {V: 1.0}}, "token id 12 is not in 0..11"),
        ({"logit_bias": {-1: 1.0}}, "token id -1 "),
        ({"logit_bias": {1: np.inf}}, "must be a finite number"),
        ({"logit_bias": {1: np.nan}}, "must be a finite number"),
        ({"bad_words": "x"}, "needs a model with a tokenizer"),
        ({"dry_multiplier": 1}, "dry_sequence_breakers = .*: needs a model with a tokenizer"),
        ({"mirostat": 2, "dynatemp_range": 1}, "dynatemp_range = 1.0: must be 0 with mirostat"),
    ],
)
def test_what_the_vocabulary_cannot_give_is_refused(params, said):
    with pytest.raises(InvalidInput, match=said):
        Sampler(V, EOS).check(SamplingParams(**params))


def test_ends_outside_the_vocabulary_are_no_ban():
    check([1.0] * V, {"min_tokens": 2}, [], [], [])
    sampler = Sampler(V, frozenset({V + 5}))
    assert sampler.check(SamplingParams(min_tokens=2, stop_token_ids=(-1, V))) == ()


BIG = st.integers(0, 1 << 32).map(np.random.default_rng)


@settings(max_examples=25, deadline=None)
@given(BIG, st.sampled_from([1.0, 0.3, 0.05, 0.0]), st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.9999]))
@example(np.random.default_rng(0), 0.0, 0.5)
def test_selection_from_many_equals_the_plain_sort(rng, spread, mass):
    """Peaked and flat distributions, with ties (from rounding), bans, and cuts inside a tie."""
    values = np.round(rng.normal(size=3 * BUCKETS + 7) * 10 * spread, 1)
    values[rng.integers(0, len(values), 50)] = -np.inf
    order = plain.by_rank(values)
    for k in (0, 1, 2, 50, 2000, len(values), len(values) + 1):
        assert top(values, k).tolist() == order[:k]
    # whole numbers, so that every way of summing gives the same
    weights = rng.integers(0, 9, len(values)).astype(float)
    wanted = float(round(mass * weights.sum()))
    assert largest(values, weights, wanted).tolist() == plain.enough(order, weights, wanted)
    probs = plain.weights_of(values) / plain.weights_of(values).sum()
    kept = largest(values, probs, mass).tolist()
    assert kept == sorted(order[: len(kept)])
    assert probs[kept].sum() > mass - 1e-12 and probs[order[: len(kept) - 1]].sum() < mass + 1e-12


def test_largest_sees_through_any_scale():
    """One outlier leaves all others in one bucket, which must be divided again."""
    values = np.concatenate([[1e9], np.random.default_rng(0).normal(size=5000), [-1e9, -np.inf]])
    weights = np.ones(len(values))
    for wanted in (1, 2, 700, 4999, 5001, 5002, 5003):
        assert largest(values, weights, wanted).tolist() == sorted(plain.by_rank(values)[:wanted])


def test_largest_when_rounding_never_reaches_the_sum():
    weights = np.full(3000, 0.1)
    assert len(largest(-np.arange(3000.0), weights, 300 * (1 + 1e-9))) == 3000


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=14), st.integers(1, 9))
def test_repetitions_are_the_longest_that_occurred(tokens, longest):
    """A definition of its own: every end of the text, every place where it occurred."""
    found = {}
    for n in range(1, longest + 1):
        for at in range(n, len(tokens)):
            if tokens[at - n : at] == tokens[-n:]:
                found[tokens[at]] = n
    assert repetitions(np.asarray(tokens), longest) == found


def test_dry_does_not_compare_what_stands_in_for_vectors():
    sampler = Sampler(V, EOS)
    params = {"dry_multiplier": 1, "dry_allowed_length": 1, "dry_sequence_breakers": ()}
    seq = begun(sampler, [0, 0, 5, 0, 0], prompt_len=5, **params)
    seq.request.vectors = np.array([[1.0], [1.0], [np.nan], [1.0], [1.0]])
    for drafted, lowered in (([], {}), ([5], {}), ([5, 7, 5], {7: 1.0})):
        values = sampler.row(np.zeros(V), seq, drafted).values
        assert {token: -values[token] for token in np.flatnonzero(values).tolist()} == lowered


def test_the_coin_of_xtc_is_tossed_anew_for_each_token_and_seed():
    sampler, logits, kept = Sampler(V, EOS), np.log([0.4, 0.3, 0.15, *[0.15 / (V - 3)] * (V - 3)]), []
    for seed in range(60):
        seq = begun(sampler, [1], seed=seed, xtc_probability=0.3, xtc_threshold=0.2)
        kept += [len(sampler.row(logits.copy(), seq, drafted).ids) for drafted in ([], [2], [3], [2, 2])]
        assert kept[-2] == kept[-3], "of the position, not of the path"
    assert set(kept) == {V, V - 1}
    assert 0.2 < np.mean(np.asarray(kept) == V - 1) < 0.4


def test_mirostat_holds_the_surprise_of_a_text():
    """The mean surprise of drawn tokens approaches tau, whatever the temperature, where plain sampling does not."""
    rng, sampler = np.random.default_rng(1), Sampler(300, EOS)
    means = {}
    for temperature in (0.7, 2.0):
        for mirostat in (0, 2):
            seq = begun(sampler, [1], temperature=temperature, mirostat=mirostat, mirostat_tau=3.0)
            surprises = []
            for _ in range(300):
                row = sampler.row(rng.normal(size=300) * 2, seq, [])
                token = int(row.ids[(row.values + rng.gumbel(size=len(row.ids))).argmax()])
                surprises.append(row.surprise(token))
                seq.surprise += surprises[-1]
                seq.tokens.append(token)
            means[temperature, mirostat] = np.mean(surprises)
    assert abs(means[0.7, 2] - 3) < 0.3 and abs(means[2.0, 2] - 3) < 0.3
    assert means[0.7, 0] > 3.5 and means[2.0, 0] > 5
