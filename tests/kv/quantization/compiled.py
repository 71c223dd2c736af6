"""A codec of whole pages on the compiled kernels: they attend as NumPy does, and a text is the same in any batch and chunks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from redraft import LLM, SamplingParams
from redraft.core.sequence import Lanes
from redraft.core.view import Watch, Window
from redraft.ops import library
from redraft.ops.format import PAGE, Format, plain
from tests.ops import test_views
from tests.ops.tensors import Faced

F32, BF16 = torch.float32, torch.bfloat16

CASES = {
    "tail": test_views.Case(Lanes.PER_HEAD, "", "blocks", watch=(Watch("mass"),)),
    "window": test_views.Case(Lanes.PER_HEAD, "", "blocks", window=Window(4, 40), layer=30),
}
PROMPTS = [list(range(5, 105)), list(range(90, 20, -1))]


def attends(codec: Any, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """codec: opened, for PyTorch's dtype. Pages have the same bits, outputs differ by rounding."""
    if why_not := library.why_not():
        pytest.skip(f"no native kernels: {why_not}")
    from tests.ops.tensors import Tensors

    formats = {"blocks": Format("blocks", codec.arrays, codec), "labelled": Format("labelled", plain(codec.dtype, size))}
    monkeypatch.setattr(test_views, "SIZE", size)
    monkeypatch.setattr(test_views, "model", partial(test_views.model, size=size))
    monkeypatch.setattr(test_views, "formats", lambda *_: formats)
    for case in CASES.values():
        mine, numpys = (test_views.program(ops(codec.dtype), case, codec.dtype) for ops in (Tensors, Faced))
        for one, other in zip(mine.found, numpys.found, strict=True):
            limit = 0.01 if codec.dtype == torch.bfloat16 else 2e-5
            assert not one.numel() or (one.double() - other.double()).abs().max() <= limit * max(1.0, float(other.abs().max()))
        units = torch.tensor(mine.main.encoded).flatten().numpy()
        held, right = (world.pool.formats["blocks"].take(codec.arrays, units) for world in (mine, numpys))
        assert all((held[name] == right[name]).all() for name in codec.arrays)


def attends_over_codes(codec: Any, units: Any, dense: Any, draw: Any, tolerance: float, largest_key: Any) -> None:
    """Attention over codes against `dense`, over the decoded cache, with queries and weights in float32, as in the engine. bfloat16:
    decode() rounds, by 2 ** -9 at most. largest_key: of the decoded keys that a query meets."""
    q, weights = draw(2, 2, 6, 16, dtype=F32), draw(3, 2, 6, 4 * PAGE, dtype=F32).softmax(-1)
    scores, out = dense(codec, units, q, weights)
    assert codec.scores(units, q).dtype == codec.mix(units, weights).dtype == F32
    assert ((codec.scores(units, q) - scores).abs() <= tolerance * q.abs().sum(-1, keepdim=True) * largest_key).all()
    assert ((codec.mix(units, weights) - out).abs() <= tolerance * codec.decode(units)[1].abs().max()).all()


def attends_with_queries_of_bfloat16(codec: Any, units: Any, dense: Any, draw: Any) -> None:
    q, weights = draw(2, 1, 3, 16, dtype=BF16), draw(3, 1, 3, 2 * PAGE, dtype=F32).softmax(-1).to(BF16)
    for got, want in zip((codec.scores(units, q), codec.mix(units, weights)), dense(codec, units, q, weights), strict=True):
        assert got.dtype == BF16
        assert (got.double() - want).abs().max() <= 0.02 * want.abs().max()


def same_in_any_batch(choice: str, seam: str = "codec", keep: str | None = None) -> None:
    """choice: a method that acts on texts of a hundred tokens, with a keep policy or none. Log-probabilities have the same bits in
    bfloat16."""
    if why_not := library.why_not():
        pytest.skip(f"no native kernels: {why_not}")
    params = SamplingParams(temperature=0, max_tokens=40, logprobs=1, ignore_eos=True, keep=keep, **{seam: choice})
    found = []
    for budget in (7, 512):
        llm = LLM("embedded", backend="native", dtype="bfloat16", token_budget=budget, draft="none" if budget == 7 else "ngram", threads=1)
        groups = [[one] for one in PROMPTS] if budget == 7 else [PROMPTS]
        texts = [out.outputs[0] for group in groups for out in llm.generate(group, params)]
        found.append([(text.token_ids, text.logprobs) for text in texts])
    assert found[0] == found[1]
