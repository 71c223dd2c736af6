"""EAGLE's drafts against a dense computation of its layer over the whole text."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import pytest

from redraft import registry
from redraft.core.noise import Stream, gumbel, key
from redraft.core.plan import Budget
from redraft.core.sequence import Request, Sequence
from redraft.core.spec import Attention, Norm, Rotary
from redraft.core.tree import TokenTree
from redraft.draft.eagle import Drafting
from redraft.draft.follower import Followed
from redraft.errors import InvalidInput
from tests.contracts import plain
from tests.contracts.identity import SAMPLING, drive, engine, prompts
from tests.draft.test_follower import HEADS, HIDDEN, KV_HEADS, SIZE, THETA, arrays, text

ROTARY = Rotary(tuple(THETA ** (-i / (SIZE // 2)) for i in range(SIZE // 2)))
MIXER = Attention(HEADS, KV_HEADS, SIZE, ROTARY)


class Numbers:
    """The arrays of a file in float64."""

    def __init__(self, name: str) -> None:
        self.held = {at: one.astype(np.float64) for at, one in arrays(name)[0].items()}

    def normed(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * self.held[f"{name}.weight"]

    def times(self, x: np.ndarray, *names: str) -> np.ndarray:
        return np.concatenate([x @ self.held[f"{name}.weight"].T for name in names], -1)

    def layer(self, x: np.ndarray, *, mlp: bool = True) -> np.ndarray:
        own = "layer.self_attn"
        qkv = self.times(self.normed(x, "layer.input_layernorm"), f"{own}.q_proj", f"{own}.k_proj", f"{own}.v_proj")
        x = x + self.times(plain.attention(qkv, MIXER), f"{own}.o_proj")
        if not mlp:
            return x
        y = self.normed(x, "layer.post_attention_layernorm")
        gate, up = self.times(y, "layer.mlp.gate_proj"), self.times(y, "layer.mlp.up_proj")
        return x + self.times(gate / (1 + np.exp(-gate)) * up, "layer.mlp.down_proj")

    def logits(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What stands for the states, and the logits."""
        states = self.normed(rows, "norm")
        return states, states @ np.asarray(plain.tiny()[1].head.weight).T


def states(tokens: Seq[int], layers: int = 2, *, final: bool = True) -> np.ndarray:
    """The target's states behind so many of its layers."""
    spec, weights = plain.tiny()
    x = np.asarray(weights.embed)[list(tokens)]
    for layer, own in zip(spec.layers[:layers], weights.layers, strict=False):
        x = x + plain.linear(
            plain.MIXERS[type(layer.mixer)](plain.linear(plain.rms(x, own.attn_norm, layer.norm), own.qkv), layer.mixer), own.out
        )
        x = x + plain.mlp(plain.rms(x, own.mlp_norm, layer.norm), own)
    return plain.rms(x, weights.final_norm, Norm()) if final else x


def logits(numbers: Numbers, tokens: Seq[int], drafted: Seq[int]) -> np.ndarray:
    """Of the token after `drafted`."""
    known, embed = states(tokens[:-1]), np.asarray(plain.tiny()[1].embed)
    for count in range(len(drafted) + 1):
        rows = embed[[*tokens[1:], *drafted[:count]]]
        made, found = numbers.logits(numbers.layer(numbers.times(np.concatenate([known, rows], -1), "fc")))
        known = np.concatenate([known, made[-1:]])
    return found[-1]


def chances(values: np.ndarray, seq: Sequence, depth: int) -> np.ndarray:
    if not seq.params.greedy:
        values = values / seq.params.temperature + gumbel(key(seq.seed, Stream.TARGET, len(seq.tokens) + depth), np.arange(len(values)))
    weights = np.exp(values - values.max())
    return weights / weights.sum()


class Checked(Drafting):
    """Compares each tree with the dense computation."""

    compared = deepest = 0

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        trees = super().propose(seqs, budgets)
        for seq, tree in zip(seqs, trees, strict=True):
            state: Followed = seq.state[self]
            if state.whole and len(tree):
                self._compare(seq, tree)
        return trees

    def _compare(self, seq: Sequence, tree: TokenTree) -> None:
        assert tree.scores is not None
        tree.check(vocab=plain.VOCAB, rows=80, depth=3)
        numbers = Numbers("eagle")
        for node in range(-1, len(tree)):
            if not (children := tree.drawn(node)):
                continue
            path = tree.tokens[tree.path_to(node)].tolist()
            expected = chances(logits(numbers, seq.tokens, path), seq, len(path))
            above = float(tree.scores[node]) if node >= 0 else 1.0
            np.testing.assert_allclose(tree.scores[children], above * expected[tree.tokens[children]], rtol=1e-4, atol=1e-9)
            assert tree.tokens[children[0]] == expected.argmax()
            self.compared += len(children)
            self.deepest = max(self.deepest, len(path) + 1)


def checked(runner: Any, sampler: Any) -> Checked:
    from redraft.draft.trained_layers import TrainedLayers

    made = registry.create("draft", text("eagle", ",least=0,worth=0,levels=3"))
    return Checked(made, TrainedLayers.load(made, runner), runner, sampler)


@pytest.mark.parametrize(("chunk", "arrivals", "pool"), [(512, (0,), 40), (24, (0, 1, 3, 3), 40), (24, (0, 1, 0, 1, 0), 5)])
@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
def test_trees_are_those_of_a_dense_computation(sampling: str, chunk: int, arrivals: tuple[int, ...], pool: int) -> None:
    made = engine(checked, chunk=chunk, pool=pool)
    few = SAMPLING[sampling].but(max_tokens=8 if pool > 5 else 16)
    requests = [Request(str(i), list(prompts()[i]), few.but(seed=100 + i)) for i in range(len(arrivals))]
    seen = drive(made, requests, arrivals)
    drafter = made.drafter.own.drafter
    assert isinstance(drafter, Checked) and drafter.compared > 60 and drafter.deepest == 3
    assert seen.accepted and seen.rejected and bool(seen.preempted) == (pool == 5)


def test_a_state_of_another_token_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above fails if rows get the states of their own tokens' neighbours."""
    monkeypatch.setattr(Checked, "seen", lambda self, hidden: Drafting.seen(self, hidden)[[-1, *range(len(hidden) - 1)]])
    made = engine(checked)
    made.add(Request("a", list(prompts()[0]), SAMPLING["greedy"].but(max_tokens=4)))
    while made.has_work:
        faults = [event.stats.fault for event in made.step()]
    assert "AssertionError" in faults[-1]


@pytest.mark.parametrize(("options", "most"), [("levels=1", 1), ("levels=2,width=1", 2), ("worth=1.1", 1)])
def test_options_bound_the_tree(options: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(text("eagle", f",{options}"))
    drafter, depths = made.drafter.own.drafter, []
    propose = drafter.propose

    def looked(seqs: Any, budgets: Any) -> Any:
        trees = propose(seqs, budgets)
        depths.extend(int(tree.depths().max()) for tree in trees if len(tree))
        return trees

    monkeypatch.setattr(drafter, "propose", looked)
    drive(made, [Request("a", list(prompts()[0]), SAMPLING["greedy"])], (0,))
    assert max(depths) == most


@pytest.mark.parametrize(
    ("option", "message"), [("levels=0", "levels=0: must be 1 or"), ("width=0", "width=0: must"), ("least=2", "least=2.0: must be 0 to 1")]
)
def test_bad_options_are_refused(option: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=f"^eagle:{message}"):
        registry.create("draft", f"eagle:path=x,{option}")


def test_hidden_size_is_that_of_the_tests() -> None:
    assert plain.tiny()[0].hidden == HIDDEN
