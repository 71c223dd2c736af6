"""Drafters without a tree of a second model: tokens a step, and where speed is the claim, processor time."""

from __future__ import annotations

import numpy as np

from scripts.claims.claim import Claim, Found
from scripts.claims.lab import Lab

AGAIN = "Repeat your answer word for word, but begin with a greeting."
SHORT = 0.3  # share of 4-grams that occurred before, up to which a text counts as one with little repetition
LINES = 24


def aded_adapts(lab: Lab) -> Found:
    llm, count = lab.llm, 6
    given = lab.prompts(llm, 2 * count)
    other, given = given[len(given) // 2 :], given[: len(given) // 2]
    corpus = [one.prompt + one.ids for one in lab.texts(llm, "none", other)]
    path = lab.folder / "aded.safetensors"
    table = lab.opened(llm, "aded").engine.drafter.own.drafter
    table.prefill(corpus)
    table.save(path)
    moving = lab.rates(llm, f"aded:path={path}", given, learns=True)
    static = lab.rates(llm, f"aded:path={path},increment=0", given, learns=True)
    return Found(moving - static, [f"tokens a step {moving.mean():.2f}, static {static.mean():.2f}"])


def aggressive_edits(lab: Lab) -> Found:
    """Predictions are the model's own texts with two wrong tokens. Temperature 1, because greedy texts go in circles, where an n-gram
    stands in several places."""
    llm = lab.llm
    given, found, notes = lab.prompts(llm, 6), [], []
    drafter = lab.opened(llm, "aggressive:block=256,first=256", rows=256)
    for i, ids in enumerate(given):
        steps = []
        for length in (64, 128):
            plain = lab.text(lab.opened(llm, "none"), ids, i, length, temperature=1.0).ids
            wrong = [(token + 1) % 1000 if at in (length // 4, length // 2) else token for at, token in enumerate(plain)]
            steps.append(lab.text(drafter, ids, i, length, temperature=1.0, prediction=tuple(wrong)).steps)
        found.append(steps[1] / steps[0])
        notes.append(f"{steps[0]} and {steps[1]} steps")
    return Found(found, ["with two edits, 64 and 128 tokens: " + ", ".join(notes)])


def copyspec_turns(lab: Lab) -> Found:
    llm = lab.llm
    first, second = [], []
    for i, question in enumerate(("List five facts about rivers.", "Explain how bread is made.", "Describe a walk in a forest.",
                                  "Write a short text on the history of clocks.", "Explain what a list in Python is.",
                                  "Give advice on how to learn a language.", "Describe the planets of the solar system.",
                                  "Write a letter that thanks a neighbour.")[: lab.count(8)]):  # fmt: skip
        opened, said = lab.opened(llm, "copyspec"), [{"role": "user", "content": question}]
        one = lab.text(opened, llm.tokenizer.encode_chat(said), i, 64)
        said += [{"role": "assistant", "content": llm.tokenizer.decode(one.ids)}, {"role": "user", "content": AGAIN}]
        first.append(one.rate)
        second.append(lab.text(opened, llm.tokenizer.encode_chat(said), i, 64).rate)
    gain = np.array(second) - first
    return Found(gain, [f"tokens a step {np.mean(first):.2f}, second turn {np.mean(second):.2f}"])


def ngram_pays(lab: Lab) -> Found:
    llm = lab.llm
    given = lab.prompts(llm, 6)
    rates = lab.rates(llm, "ngram", given, rows=6)
    return Found(lab.speedup(llm, "ngram", given), [f"tokens a step {rates.mean():.2f}"])


def suffix_outputs(lab: Lab) -> Found:
    """The same prompts again, after their texts at temperature 1 were seen, as agents ask alike things again and again."""
    llm = lab.llm
    given = lab.prompts(llm, 6)
    opened = lab.opened(llm, "suffix")
    cold = lab.rates(llm, "suffix", given)
    for i, ids in enumerate(given):
        lab.text(opened, ids, i, 48, temperature=0.7)
    hot = np.array([lab.text(opened, ids, i, 48).rate for i, ids in enumerate(given)])
    return Found(hot - cold, [f"tokens a step {cold.mean():.2f}, after texts of the same prompts at temperature 0.7 {hot.mean():.2f}"])


def skip_pays(lab: Lab) -> Found:
    llm = lab.llm
    given = lab.prompts(llm, 5)
    texts = lab.texts(llm, "self-skip", given, tokens=16)
    accepted = sum(one.accepted for one in texts) / max(1, sum(one.drafted for one in texts))
    note = f"tokens a step {np.mean([one.rate for one in texts]):.2f}, {accepted:.0%} of the drafted tokens accepted"
    return Found(lab.speedup(llm, "self-skip", given, tokens=16), [note])


def omnidraft_cache(lab: Lab) -> Found:
    """The draft model is the one in the package, whose vocabulary is another. Prompts one after the other, so that the cache grows."""
    llm = lab.llm
    given = lab.prompts(llm, 8)
    mapped, both = (lab.texts(llm, f"omnidraft:model=embedded,cached={size}", given, learns=True, tokens=24) for size in (0, 1 << 15))
    note = "tokens a step with the cache {:.3f}, map only {:.3f}".format(
        *(np.mean([one.rate for one in texts]) for texts in (both, mapped))
    )
    return Found([one.rate - other.rate for one, other in zip(both, mapped, strict=True)], [note])


def online_learns(lab: Lab) -> Found:
    """Requests of one category, then of another; each prompt several times at temperature 1, with other seeds."""
    import torch
    from transformers import AutoModelForCausalLM

    from redraft.draft.online import DRAFT, TEXTS
    from redraft.models import loader
    from redraft_train.online import Student, Text

    torch.set_num_threads(lab.threads)
    llm, path, rounds = lab.pair, lab.folder / "online", 5
    base = loader.resolve("embedded-draft")
    student = Student(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), base, path / DRAFT)
    opened, still = lab.opened(llm, f"online:path={path}"), lab.opened(llm, "draft-model")
    gains, notes = [], []
    for category in ("code-completion", "writing"):
        given = lab.prompts(llm, 8, category) * rounds
        pairs = []
        for i, ids in enumerate(given):
            one, other = (lab.text(which, ids, i, 32, temperature=1.0) for which in (opened, still))
            pairs.append((one.accepted / max(1, one.drafted), other.accepted / max(1, other.drafted)))
            for file in (path / TEXTS).iterdir():
                if (text := Text.read(file)) is not None:
                    student.add(text)
                file.unlink()
        rates, last = np.array(pairs), len(given) // rounds
        gains += list(rates[-2 * last :, 0] - rates[-2 * last :, 1])
        quarters = ", ".join("{:.0%} ({:.0%})".format(*part.mean(0)) for part in np.array_split(rates, 4))
        notes.append(f"{category}: accepted by quarters, in brackets without training: {quarters}")
    return Found(gains, [*notes, f"weights taken back: {opened.engine.drafter.own.drafter.reverted}"])


def recycling_hot(lab: Lab) -> Found:
    llm = lab.llm
    given = lab.prompts(llm, 10)
    cold, hot = (lab.rates(llm, "token-recycling", given, learns=learns) for learns in (False, True))
    half = len(given) // 2
    return Found((hot - cold)[half:], [f"tokens a step cold {cold[half:].mean():.2f}, after {half} other texts {hot[half:].mean():.2f}"])


def recycling_size(lab: Lab) -> Found:
    llm = lab.llm
    given = lab.prompts(llm, 10)
    return Found(lab.rates(llm, "token-recycling", given, learns=True)[len(given) // 2 :])


def recycling_fresh(lab: Lab) -> Found:
    """Of texts with few repeated 4-grams."""
    llm = lab.llm
    given = lab.prompts(llm, 8, "writing") + lab.prompts(llm, 8, "code-completion")
    fresh = [one.prompt for one in lab.texts(llm, "none", given) if repeated(one.prompt + one.ids, len(one.ids)) <= SHORT]
    recycled, copied = (lab.rates(llm, draft, fresh) for draft in ("token-recycling", "copyspec"))
    return Found(recycled - copied, [f"tokens a step {recycled.mean():.2f}, copyspec {copied.mean():.2f}"])


def repeated(ids: list[int], last: int) -> float:
    """The share of the last 4-grams that occurred before."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return sum(gram in set(grams[: len(grams) - last + i]) for i, gram in enumerate(grams[-last:])) / last


def union_gains(lab: Lab) -> Found:
    llm = lab.llm
    given = lab.prompts(llm, 8)
    parts = ("copyspec", "token-recycling")
    merged, *alone = (lab.rates(llm, draft, given) for draft in (f"union:parts={'+'.join(parts)}", *parts))
    notes = [f"tokens a step {merged.mean():.2f}, {', '.join(f'{p} {a.mean():.2f}' for p, a in zip(parts, alone, strict=True))}"]
    return Found(merged - max(alone, key=np.mean), notes)


def auto_pays(lab: Lab) -> Found:
    llm = lab.llm
    given = lab.prompts(llm, 6)
    ratio = lab.speedup(llm, "auto", given)
    return Found(ratio, [f"least {ratio.min():.2f}, most {ratio.max():.2f}"])


def vocabtrim_time(lab: Lab) -> Found:
    """The model drafts for itself, so that a draft costs as much as it can and the head has 49,152 rows."""
    whole, trimmed, given = trimmed_drafts(lab)
    ratio = lab.speedup(lab.llm, trimmed, given, base=whole, tokens=16)
    return Found(ratio)


def vocabtrim_accepts(lab: Lab) -> Found:
    llm = lab.llm
    whole, trimmed, given = trimmed_drafts(lab)
    share = [np.array([one.accepted / one.drafted for one in lab.texts(llm, draft, given, tokens=16)]) for draft in (whole, trimmed)]
    return Found(share[0] - share[1], [f"accepted {share[0].mean():.1%}, trimmed {share[1].mean():.1%}"])


def trimmed_drafts(lab: Lab) -> tuple[str, str, list[list[int]]]:
    """(the drafter, the same with a trimmed head, prompts)."""
    llm = lab.llm
    given = lab.prompts(llm, 10)
    learned, given = given[len(given) // 2 :], given[: len(given) // 2]
    path = lab.folder / "answers.txt"
    texts = lab.texts(llm, "none", learned)
    path.write_text("\n".join(llm.tokenizer.decode(one.prompt + one.ids) for one in texts), encoding="utf-8")
    whole = f"draft-model:model={lab.model},length=3"
    return whole, f"vocabtrim:draft=({whole}),keep=2048,text={path}", given


CLAIMS = (
    Claim("aded-adapts", ("draft=aded",), "A table of tri-grams that learns from the conversation drafts better than a fixed one",
          "table of 6 other texts, 6 prompts one after the other, increment 0.04 and 0", "tokens a step, difference", aded_adapts),
    Claim("aggressive-edits", ("draft=aggressive",), "Copying takes steps in proportion to the edits, not to the length",
          "predictions with two wrong tokens, temperature 1; the text twice as long", "steps of 128 tokens / of 64", aggressive_edits,
          border=1.5, below=True),
    Claim("auto-pays", ("draft=auto",), "Drafts that are planned by their cost never lose (Redraft's own claim)",
          "6 prompts x 40 tokens, nothing learned, beside plain decoding in turns", "processor time, plain / auto", auto_pays, border=1.0),
    Claim("copyspec-turns", ("draft=copyspec",), "Copying gains more at the second turn, where the answer is asked for again changed",
          "8 questions, then the answer again", "tokens a step, second turn minus first", copyspec_turns),
    Claim("ngram-pays", ("draft=ngram",), "Counts of n-grams that grow with the text make decoding up to 3.67 times as fast",
          "6 prompts x 40 tokens, nothing learned, in turns", "processor time, plain / n-gram", ngram_pays, border=1.0),
    Claim("omnidraft-cache", ("draft=omnidraft",), "A cache of n-grams raises the acceptance of a draft model with another tokenizer",
          "8 prompts x 24 tokens one after the other, drafts of the model in the package", "tokens a step, with the cache minus map only",
          omnidraft_cache),
    Claim("online-learns", ("draft=online",), "Training on corrections while serving raises acceptance (by 0.1 to 0.65)",
          "the pair in the package, 8 prompts of code x 5, then 8 of writing x 5, 32 tokens; the last two fifths of each",
          "share of drafted tokens accepted, trained minus static", online_learns),
    Claim("suffix-outputs", ("draft=suffix",), "Earlier outputs of alike requests lengthen drafts, which suits agents",
          "6 prompts again, after other texts of the same prompts", "tokens a step, difference", suffix_outputs),
    Claim("self-skip-pays", ("draft=self-skip",), "A model drafts for itself with half of its layers, up to 1.99 times as fast",
          "evenly spaced layers without a search, 5 prompts x 16 tokens, in turns", "processor time, plain / self-skip", skip_pays,
          border=1.0),
    Claim("token-recycling-hot", ("draft=token-recycling",), "A table filled by earlier texts drafts better than an empty one",
          "5 prompts after 5 others, and alone", "tokens a step, difference", recycling_hot),
    Claim("token-recycling-size", ("draft=token-recycling",), "About twice as fast with a filled table: more than 1.5 tokens a step",
          "5 prompts after 5 others", "tokens a step", recycling_size, border=1.5),
    Claim("token-recycling-fresh", ("draft=token-recycling",), "Better than copying from the prompt where a text repeats little",
          "texts with at most 30 % of repeated 4-grams", "tokens a step, minus copyspec's", recycling_fresh),
    Claim("union-gains", ("draft=union",), "Merged trees of several drafters are accepted more than the best of them alone",
          "copyspec and token-recycling, 16 nodes", "tokens a step, merged minus the better part", union_gains),
    Claim("vocabtrim-time", ("draft=vocabtrim",), "A trimmed head of the draft model raises the speed of drafts by 16 %",
          "the model drafts for itself; 2,048 of 49,152 rows", "processor time, whole / trimmed", vocabtrim_time, border=1.0),
    Claim("vocabtrim-accepts", ("draft=vocabtrim",), "Acceptance falls by a few points at most (here: 5)",
          "the same", "share of drafted tokens accepted, whole minus trimmed", vocabtrim_accepts, border=0.05, below=True),
)  # fmt: skip
