"""scripts/prove scheduling in a short form: the same texts under every scheduler, and each token has a time."""

from __future__ import annotations

import pytest

from redraft import LLM, registry
from scripts.proofs import scheduling
from scripts.proofs.scheduling import BUDGETS, Served


def test_every_scheduler_serves_the_same_texts() -> None:
    llm = LLM("embedded", draft="none", max_model_len=160, prefix_sharing=False, cache_memory=1 << 26, **BUDGETS)
    arrivals = scheduling.trace(7, 100.0, 96, vocab=4096, seed=0)
    assert sum(len(one.prompt) > 48 for one in arrivals) == 1
    texts = []
    for name in registry.METHODS["sched"]:
        served = scheduling.serve(llm.sibling(scheduler=name, **BUDGETS), arrivals)
        assert [(one.prompt, len(one.times)) for one in served] == [(len(one.prompt), one.new) for one in arrivals]
        assert all(one.times[0] > 0 and one.times == sorted(one.times) for one in served)
        texts.append([one.tokens for one in served])
    assert all(text == texts[0] for text in texts)


def test_figures() -> None:
    served = [Served(9, [1, 2], [0.5, 1.5]), Served(90, [1], [4.0]), Served(80, [1, 2, 3], [3.0, 3.25, 3.5])]
    values = {"TTFT mean": 2.5, "short mean": 0.5, "long mean": 3.5, "long P99": 4.0, "gap P99": 1.0, "gap max": 1.0}
    assert scheduling.figures(served, long=90) == values
    assert [scheduling.percentile([3.0, 1.0, 2.0], share) for share in (0.3, 0.34, 0.99)] == [1.0, 2.0, 3.0]


def test_the_table_fits_80_columns_and_has_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    found = {"sarathi": [dict.fromkeys(scheduling.FIGURES, 2.0)], "piggyback:rows=240": [dict.fromkeys(scheduling.FIGURES, 3.0)]}
    scheduling.Console(width=80).print(scheduling.table(found))
    out = capsys.readouterr().out
    assert out.count("1.50 x") == 6 and "piggyback:rows=240" in out
    assert max(map(len, out.splitlines())) <= 80
