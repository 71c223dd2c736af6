"""Trains the judge of `--verify judge`: whether a text stays right after a draft model's token that the model would not have written.

    python -m redraft_train.judge MODEL --draft-model DRAFT

Labels need no annotation. Where the draft model's likeliest token is not the next one of the model's greedy text, it is forced, and the
model goes on. The token is right if its text joins the greedy one again: RUN tokens in a row that begin within WITHIN tokens in both. The
judge is a logistic regression on the model's final state behind the token, in which wrong tokens count more.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redraft import LLM, SamplingParams
from redraft.errors import InvalidInput, RedraftError

METHOD = "judge"
WITHIN, RUN = 8, 4  # tokens
WRONG = 2.0  # weight of a wrong token
ROUNDS = 20  # of Newton's method
F64 = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Examples:
    """Of N forced tokens: states f64[N, hidden] behind the final norm; right: bool[N]; text: i64[N], the index of the prompt."""

    states: F64
    right: Bools
    text: NDArray[np.int64]

    def of(self, chosen: Bools) -> Examples:
        return Examples(self.states[chosen], self.right[chosen], self.text[chosen])


@dataclass(frozen=True, eq=False)
class Fit:
    """sigmoid(w.h + b) is the chance that a token is right. w: f64[hidden]."""

    w: F64
    b: float

    def chances(self, states: F64) -> F64:
        return np.asarray(1 / (1 + np.exp(-np.clip(states @ self.w + self.b, -500, 500))))


def joins(text: Seq[int], greedy: Seq[int]) -> bool:
    """Whether RUN tokens in a row that begin within WITHIN tokens are in both."""
    runs = [{tuple(one[i : i + RUN]) for i in range(min(WITHIN, len(one) - RUN) + 1)} for one in (text, greedy)]
    return bool(runs[0] & runs[1])


def forced(llm: LLM, draft: LLM, ids: list[int], tokens: int) -> Iterator[tuple[list[int], bool]]:
    """The texts up to each token that was forced, and whether it is right, for the first `tokens` tokens after a prompt."""
    from redraft.bench.divergence import rows

    def written(given: Seq[list[int]], count: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        return [list(one.outputs[0].token_ids) for one in llm.generate([{"prompt_token_ids": one} for one in given], params)]

    (greedy,) = written([ids], tokens + WITHIN + RUN)
    guesses = [int(np.argmax(row)) for row in rows(draft, ids + greedy[:tokens])][len(ids) - 1 : -1]
    differ = [i for i, guess in enumerate(guesses) if guess != greedy[i]]
    texts = [[*ids, *greedy[:i], guesses[i]] for i in differ]
    if texts:
        for i, text, after in zip(differ, texts, written(texts, WITHIN + RUN), strict=True):
            yield text, joins(after, greedy[i : i + WITHIN + RUN])


def examples(llm: LLM, draft: LLM, prompts: Seq[list[int]], tokens: int = 48, show: Any = lambda line: None) -> Examples:
    """InvalidInput if all forced tokens have the same label."""
    states: list[Any] = []
    right, text = [], []
    for number, ids in enumerate(prompts):
        found = list(forced(llm, draft, ids, tokens))
        if found:
            states += llm.embed([{"prompt_token_ids": one} for one, _ in found], normalize=False)
        right += [label for _, label in found]
        text += [number] * len(found)
        show(f"prompt {number + 1} of {len(prompts)}: {len(right)} tokens, {sum(right)} right")
    if len(set(right)) < 2:
        raise InvalidInput(f"{len(right)} forced tokens, {sum(right)} right: right and wrong ones are needed; take more prompts")
    return Examples(np.array(states, np.float64), np.array(right), np.array(text))


def fit(given: Examples, decay: float = 0.1) -> Fit:
    """Logistic regression with wrong tokens weighted by WRONG. decay: of the squared weights, a token."""
    mean, scale = given.states.mean(0), given.states.std(0) + 1e-6
    x = np.column_stack([(given.states - mean) / scale, np.ones(len(given.right))])
    weight = np.where(given.right, 1.0, WRONG)
    decays = np.full(x.shape[1], decay * len(x))
    decays[-1] = 1e-6
    v = np.zeros(x.shape[1])
    for _ in range(ROUNDS):
        p = 1 / (1 + np.exp(-np.clip(x @ v, -30, 30)))
        gradient = x.T @ (weight * (p - given.right)) + decays * v
        curve = (x * (weight * p * (1 - p))[:, None]).T @ x + np.diag(decays)
        v -= np.linalg.solve(curve, gradient)
    w = v[:-1] / scale
    return Fit(w, float(v[-1] - w @ mean))


def report(found: Fit, held: Examples) -> dict[str, str]:
    """Of held-out tokens: which pass at some t."""
    chances, lines = found.chances(held.states), {}
    for t in (0.3, 0.5, 0.7, 0.9):
        right, wrong = (chances[held.right == label] > t for label in (True, False))
        lines[f"t = {t}"] = f"{right.sum()} of {len(right)} right tokens pass, {wrong.sum()} of {len(wrong)} wrong ones"
    return lines


def save(found: Fit, llm: LLM, folder: Path | None, card: dict[str, Any]) -> Path:
    """Writes the file that `--verify judge` reads, and a card beside it in a folder."""
    from redraft.models.trained import Trained, model_hash, place

    model = model_hash(llm.runner)
    path = Trained(METHOD, model, {"b": found.b}, {"w": found.w.astype(np.float32)}).save(folder or place(METHOD, model))
    if folder is not None:
        lines = [f"# {METHOD}", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in card.items())]
        (folder / "README.md").write_text("\n".join(lines) + "\n")
    return path


def main() -> None:
    from redraft.bench import prompts
    from redraft.bench.compare import Dialogue

    parser = argparse.ArgumentParser(prog="python -m redraft_train.judge", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--draft-model", required=True, metavar="DRAFT", help="a model of the same vocabulary")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="default: the suite of redraft bench")
    parser.add_argument("--limit", type=int, default=60, help="prompts at most, a quarter of them held out, default %(default)s")
    parser.add_argument("--tokens", type=int, default=48, help="of each text, default %(default)s")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: where --verify judge looks")
    given = parser.parse_args()
    try:
        llm, draft = LLM(given.model, draft="none"), LLM(given.draft_model, draft="none")
        texts = [Dialogue(one, llm.tokenizer).ids() for one in prompts.load(given.prompts, limit=given.limit)]
        room = min(llm.max_model_len, draft.max_model_len) - given.tokens - WITHIN - RUN
        own = examples(llm, draft, [ids for ids in texts if len(ids) <= room], given.tokens, print)
        held = own.text % 4 == 3
        found = fit(own.of(~held))
        card = {"draft model": Path(given.draft_model).name, "tokens": f"{(~held).sum()} trained, {held.sum()} held out, of other prompts",
                **report(found, own.of(held))}  # fmt: skip
        print("\n".join(f"{name}: {value}" for name, value in card.items()))
        print(f"wrote {save(found, llm, given.out, card)}")
    except RedraftError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
