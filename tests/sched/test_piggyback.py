from __future__ import annotations

from tests.sched.test_scheduler import world


def test_a_step_has_one_chunk_and_every_text_that_draws() -> None:
    at = world("piggyback:rows=16", blocks=60, max_seqs=4, draft_total=0)
    seqs = [at.add(length, 12) for length in (40, 20, 9, 16)]
    seen = []
    while any(not seq.generated for seq in seqs):
        drawing = [seq for seq in at.running if seq.pending == 1]
        plan = at.step()
        assert {seq.id for seq in drawing} <= {seq.id for seq in plan.seqs}
        seen.append([(work.seq.id, work.rows) for work in plan.work if work.seq not in drawing])
    assert seen == [[(1, 16)], [(1, 16)], [(1, 8)], [(2, 16)], [(2, 4)], [(3, 9)], [(4, 16)]]


def test_the_budget_of_rows_holds() -> None:
    at = world("piggyback:rows=16", blocks=60, token_budget=8, max_seqs=4, draft_total=0)
    at.add(4, 20)
    at.step()
    at.add(30, 5)
    assert [work.rows for work in at.step().work] == [1, 7]


def test_one_chunk_as_long_as_the_prompt_is_plain_prefill_and_decoding() -> None:
    at = world("piggyback:rows=64", blocks=60, max_seqs=1, draft_total=0)
    at.add(50, 3)
    at.add(30, 2)
    assert [[(w.seq.id, w.rows) for w in at.step().work] for _ in range(5)] == [[(1, 50)], [(1, 1)], [(1, 1)], [(2, 30)], [(2, 1)]]
