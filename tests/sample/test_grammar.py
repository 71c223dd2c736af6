"""Grammars: which tokens they allow, against a plain definition, and what they do with drafts."""

from __future__ import annotations

import json
import re
import tracemalloc
from itertools import product, takewhile

import numpy as np
import pydantic
import pytest
from llguidance import LLParserLimits

from redraft.config import Grammar, SamplingParams, closed
from redraft.core.plan import Budget
from redraft.core.tree import EMPTY, Kind, TokenTree
from redraft.errors import InvalidInput, RedraftError
from redraft.sample.grammars import form
from redraft.sample.grammars.compiler import MAX_CHOICES
from redraft.sample.processors.grammar import FollowGrammar
from redraft.sample.processors.processor import Row
from redraft.sample.sampler import Sampler
from tests.sample.toy import begun

WORDS = [b"", b"<s>", b"a", b"b", b"ab", b"ba", b"abc", b"c", b"1", b"1x", b'"', b'{"', b'":', b" ", b"x", b"}", b"bb"]
EOS = 1
LANGUAGE = ["abc", "abab", "ab", "bbb", "a1cc", "bba", "b1x", "a1x", "bx1", "cabab"]  # the whole language of the first tests
REGEX = "abc|(ab){1,2}|bb[ab]|a1(cc|x)|b(1x|x1)|cabab"
LARK = 'start: "ab" ("c" | "ab")? | "bb" /[ab]/ | "a1" ("cc" | "x") | "b" ("1x" | "x1") | "cabab"'


def sampler(eos: tuple[int, ...] = (EOS,)) -> Sampler:
    def plain(text: str) -> list[int]:
        """The longest word first."""
        found: list[int] = []
        while text:
            token = max((i for i, word in enumerate(WORDS[2:], 2) if text.encode().startswith(word)), key=lambda i: len(WORDS[i]))
            found.append(token)
            text = text[len(WORDS[token]) :]
        return found

    return Sampler(len(WORDS), frozenset(eos), None, bytes_of=WORDS.__getitem__, plain=plain, special=[1])


def follow(tokens: list[int], made: Sampler | None = None, **grammar: object):
    made = made or sampler()
    seq = begun(made, [2, *tokens], prompt_len=1, structured_outputs=grammar)
    (processor,) = (one for one in seq.state[made] if isinstance(one, FollowGrammar))
    return made, seq, processor


def allowed(made: Sampler, seq, processor, drafted: list[int]) -> set[int]:
    row = Row(made.ids, np.zeros(len(WORDS)), seq, drafted)
    processor.apply(row)
    return set(row.ids.tolist())


def defined(path: list[int]) -> set[int]:
    """The tokens after which some text of the language is left."""
    text = b"".join(WORDS[token] for token in path)
    found = {i for i, word in enumerate(WORDS) if i > 1 and any(one.encode().startswith(text + word) for one in LANGUAGE)}
    return found | ({EOS} if text.decode() in LANGUAGE else set())


def forced(path: list[int]) -> bytes:
    """What all texts of the language that are left have next."""
    text = b"".join(WORDS[token] for token in path)
    left = [one.encode()[len(text) :] for one in LANGUAGE if one.encode().startswith(text)]
    return bytes(letters[0] for letters in takewhile(lambda letters: len({*letters}) == 1, zip(*left, strict=False)))


@pytest.mark.parametrize("form", [{"choice": LANGUAGE}, {"regex": REGEX}, {"grammar": LARK}], ids=lambda form: next(iter(form)))
def test_the_allowed_tokens_are_those_of_the_definition(form: dict[str, object]) -> None:
    """Where all texts go on with the same bytes, only the tokenizer's own spelling of them is allowed."""
    made, seq, processor = follow([], **form)
    paths = [list(path) for length in range(4) for path in product(range(2, len(WORDS)), repeat=length)]
    paths = [path for path in paths if all(token in defined(path[:i]) for i, token in enumerate(path))]
    free = sum(not forced(path) for path in paths)
    assert free > 8 and len(paths) - free > 5
    order = np.random.default_rng(5).permutation(len(paths))  # so that the state moves between branches
    for place in order.tolist():
        path, wanted = paths[place], defined(paths[place])
        assert processor.finished(seq, path) == (wanted == {EOS})
        if wanted == {EOS}:  # a text that cannot go on has ended
            continue
        found = allowed(made, seq, processor, path)
        assert {token for token in range(len(WORDS)) if processor.allows(seq, path, token)} == found
        if forced(path):
            assert found and found <= wanted and all(made.vocabulary.plain(forced(path).decode())[0] == token for token in found), path
        else:
            assert found == wanted, path


def test_as_many_choices_as_are_allowed() -> None:
    choices = ["".join(letters) for letters in product("abcx", repeat=6)]
    made, seq, processor = follow([], choice=choices)
    assert len(choices) == MAX_CHOICES
    assert allowed(made, seq, processor, []) == {i for i, word in enumerate(WORDS) if i > 1 and set(word) <= set(b"abcx")}
    assert processor.finished(seq, [2] * 6)
    with pytest.raises(InvalidInput, match="at most 4096 are allowed"):
        follow([], choice=[*choices, "a"])


def test_committed_tokens_move_the_state_for_good_and_a_rejected_draft_does_not() -> None:
    made, seq, processor = follow([], choice=LANGUAGE)
    assert allowed(made, seq, processor, [4]) == defined([4])
    seq.tokens.append(3)  # the draft was rejected
    assert allowed(made, seq, processor, []) == defined([3])
    seq.tokens.append(3)
    assert not processor.finished(seq, [])
    made, seq, processor = follow([3, 3], choice=LANGUAGE)  # as after a preemption
    assert processor.finished(seq, [2]) and not processor.finished(seq, [])


def test_a_row_after_a_draft_that_breaks_the_grammar_is_left_alone() -> None:
    made, seq, processor = follow([], choice=LANGUAGE)
    assert allowed(made, seq, processor, [14]) == set(range(len(WORDS)))
    assert allowed(made, seq, processor, []) == defined([])


def test_an_end_of_text_ends_it_and_can_be_taken_back() -> None:
    made, seq, processor = follow([4], choice=LANGUAGE)
    assert not processor.finished(seq, []) and processor.finished(seq, [EOS])
    assert allowed(made, seq, processor, []) == defined([4])


def test_greedy_rows_whose_likeliest_token_is_allowed_need_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.sample.toy import step

    made, seq, _ = follow([], choice=LANGUAGE)
    seq.request.params = seq.params.but(temperature=0)
    seq.state[made] = made.begin(seq)
    monkeypatch.setattr(FollowGrammar, "apply", lambda self, row: pytest.fail("no mask is needed"))
    assert step(made, [seq], logits=lambda context, vocab: np.eye(vocab)[4]).draw([0]) == [4]
    monkeypatch.undo()
    assert step(made, [seq], logits=lambda context, vocab: np.arange(vocab)[::-1].astype(float)).draw([0]) == [2]


# ---- drafts


def fit(tree: TokenTree, rows: int = 8, depth: int = 8, tokens: list[int] | None = None, **grammar: object) -> TokenTree:
    _, seq, processor = follow(tokens or [], **(grammar or {"choice": LANGUAGE}))
    fitted = processor.fit(seq, tree, Budget(rows, depth), 3)
    fitted.check(vocab=len(WORDS), rows=rows, depth=depth)
    return fitted


def test_nodes_that_break_the_grammar_are_pruned_with_what_follows_them() -> None:
    tree = TokenTree.build([4, 14, 7, 3, 8, 16], [-1, -1, 0, 1, 0, 0], vocab=17, rows=8, depth=8)
    fitted = fit(tree)
    assert (fitted.tokens.tolist(), fitted.parents.tolist(), fitted.origins.tolist()) == ([4, 7], [-1, 0], [0, 0])


def test_a_tree_that_follows_the_grammar_stays_as_it_is() -> None:
    tree = TokenTree.build([4, 7], [-1, 0], vocab=17, rows=8, depth=8)
    assert fit(tree) is tree and fit(EMPTY) is EMPTY


def test_forced_tokens_are_drafted_after_the_root_and_after_leaves() -> None:
    fitted = fit(EMPTY, regex="abc(c|1x1x)")
    assert (fitted.tokens.tolist(), fitted.origins.tolist()) == ([6], [3])
    tree = TokenTree.build([6, 9], [-1, 0], vocab=17, rows=8, depth=8)
    fitted = fit(tree, regex="abc(c|1x1x)")
    assert fitted.tokens.tolist() == [6, 9, 9] and fitted.parents.tolist() == [-1, 0, 1] and fitted.origins.tolist() == [3, 0, 3]
    assert fit(tree, rows=2, regex="abc(c|1x1x)").tokens.tolist() == [6, 9]
    assert fit(tree, depth=1, regex="abc(c|1x1x)").tokens.tolist() == [6]


def test_a_long_text_that_is_forced_takes_no_more_than_the_draft() -> None:
    tracemalloc.start()
    fitted = fit(EMPTY, depth=4, regex="a{5000}c")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert fitted.tokens.tolist() == [2, 2, 2, 2] and peak < 10 << 20


def test_one_pruned_and_one_forced_is_a_change() -> None:
    tree = TokenTree.build([14], [-1], vocab=17, rows=8, depth=8)
    assert fit(tree, regex="abc(c|1x1x)").tokens.tolist() == [6]


def test_sampled_children_stay_because_their_verifier_needs_every_draw() -> None:
    class Uniform:
        def probs(self, rows: list[int]) -> np.ndarray:
            return np.full((len(rows), len(WORDS)), 1 / len(WORDS))

    tree = TokenTree(np.array([14], np.int32), np.array([-1], np.int32), np.array([Kind.SINGLE, 0], np.uint8), Uniform())
    assert fit(tree) is tree


def test_scores_are_kept_and_forced_tokens_have_that_of_their_parent() -> None:
    tree = TokenTree.build([6, 9], [-1, 0], vocab=17, rows=8, depth=8)
    scored = TokenTree(tree.tokens, tree.parents, tree.kinds, scores=np.array([0.5, 0.25], np.float32))
    assert fit(scored, regex="abc(c|1x1x)").scores.tolist() == [1.0, 0.25, 0.25]


# ---- parameters


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("abc", "an object with one of json, json_object, regex, choice, grammar is needed"),
        ({}, "exactly one of .* is needed, not none"),
        ({"regex": "a", "choice": ["b"]}, "exactly one of .* is needed, not regex, choice"),
        ({"xml": "a"}, "unknown field 'xml'"),
        ({"json": 3}, "json: a JSON schema is needed"),
        ({"json": "{"}, "json: a JSON schema is needed"),
        ({"choice": []}, "choice: a list of texts is needed"),
        ({"choice": ["a", ""]}, "none of them empty"),
        ({"choice": "ab"}, "choice: a list of texts"),
        ({"regex": ""}, "regex, grammar: a text is needed"),
        ({"regex": "\ud800"}, "regex, grammar: a text is needed"),
        ({"json_object": 1}, "json_object: true is needed"),
    ],
)
def test_wrong_forms_are_refused(given: object, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        SamplingParams(structured_outputs=given)


def test_models_of_pydantic_are_closed() -> None:
    class Inner(pydantic.BaseModel):
        properties: int

    class Outer(pydantic.BaseModel):
        one: Inner
        many: list[Inner] = []
        free: dict[str, int]

    params = SamplingParams(structured_outputs={"json": Outer})
    assert params.structured_outputs is not None
    schema = json.loads(params.structured_outputs.text)
    assert schema["additionalProperties"] is schema["$defs"]["Inner"]["additionalProperties"] is False
    assert schema["$defs"]["Inner"]["properties"].keys() == {"properties"}
    assert schema["properties"]["free"]["additionalProperties"] == {"type": "integer"}
    parts = {"allOf": [{"properties": {"a": True}}, {"properties": {"b": True}}]}
    assert closed(parts) == parts and closed({"properties": {}, "allOf": []}) == {"properties": {}, "allOf": []}


def test_forms_are_kept_as_text_and_survive_a_copy() -> None:
    params = SamplingParams(structured_outputs={"json": '{"type": "null"}', "regex": None, "json_object": False})
    assert params.structured_outputs == Grammar("json", '{"type": "null"}')
    assert params.but(seed=1).structured_outputs == params.structured_outputs
    assert SamplingParams(structured_outputs=None).structured_outputs is None


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        ({"regex": "a("}, "structured_outputs.regex = 'a\\(': "),
        ({"grammar": "start: nothing"}, "structured_outputs.grammar = "),
        ({"grammar": 'root ::= "a" | missing'}, "structured_outputs.grammar = "),
        ({"regex": "a" * (1 << 18) + "b"}, "structured_outputs.regex has 262145 characters: at most 262144"),
        ({"regex": "(?<=a)b"}, "structured_outputs.regex = "),
        ({"grammar": 'start: a "c"\na[temperature=2.0]: "b"'}, "temperature: rules have no such attribute here"),
        ({"regex": "[^\\x00-\\x{10FFFF}]"}, "structured_outputs.regex = .*: no text follows it"),
        ({"grammar": "start: start"}, "structured_outputs.grammar = .*: no text follows it"),
        ({"grammar": "start: a\na[max_tokens=3]: /.*/"}, "structured_outputs.grammar = .*: rollback not supported with max_tokens"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_one_line(grammar: dict[str, str], said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as error:
        sampler().check(SamplingParams(structured_outputs=grammar))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_what_a_grammar_needs() -> None:
    with pytest.raises(InvalidInput, match="needs a model with a tokenizer"):
        Sampler(len(WORDS), frozenset({EOS})).check(SamplingParams(structured_outputs={"regex": "a"}))
    with pytest.raises(InvalidInput, match="needs a model with an end-of-text token"):
        sampler(eos=()).check(SamplingParams(structured_outputs={"regex": "a"}))
    with pytest.raises(InvalidInput, match="min_tokens = 3: not with structured_outputs"):
        sampler().check(SamplingParams(structured_outputs={"regex": "a"}, min_tokens=3))


def test_a_grammar_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from redraft.sample.grammars import compiler

    made, compiled = sampler(), []
    original = compiler.Compiler._compiled
    monkeypatch.setattr(compiler.Compiler, "_compiled", lambda self, grammar: compiled.append(grammar) or original(self, grammar))
    monkeypatch.setattr(compiler, "KEPT", 2)
    for text in ("a", "a", "b", "a", "c", "b"):
        made.check(SamplingParams(structured_outputs={"regex": text}))
    assert [grammar.text for grammar in compiled] == ["a", "b", "c", "b"]


def test_words_that_are_no_text_are_never_allowed() -> None:
    made, seq, processor = follow([], regex="(?s:.*)")
    found = allowed(made, seq, processor, [])
    assert 0 not in found and found == set(range(1, len(WORDS))) and re.fullmatch("(?s:.*)", "<s>")


def test_a_lexer_that_other_texts_filled_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    made = sampler()
    monkeypatch.setattr(form, "LIMITS", LLParserLimits(max_lexer_states=120, verbose_errors=False))
    for number in range(64):
        text = [2 + (number >> place & 1) for place in range(6)]
        _, seq, processor = follow([2], made, regex="(a|b)*a(a|b){8}c")
        for token in [*text, 2, 3, 2]:
            assert token in allowed(made, seq, processor, []) and processor.allows(seq, [], token)
            seq.tokens.append(token)
        assert not processor.finished(seq, [])


def test_an_error_that_a_new_lexer_does_not_heal_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "LIMITS", LLParserLimits(max_lexer_states=20, verbose_errors=False))
    made, seq, processor = follow([2], regex="(a|b)*a(a|b){8}c")
    seq.tokens += [2, 3, 2, 2, 3, 3, 2] * 4
    with pytest.raises(RedraftError, match="structured_outputs: the grammar cannot be followed further: lexer error: too many states"):
        allowed(made, seq, processor, [])


def test_a_row_reads_only_the_begin_of_a_long_text_that_is_forced() -> None:
    lengths: list[int] = []

    def plain(text: str) -> list[int]:
        lengths.append(len(text))
        return [2] * len(text)

    made = Sampler(len(WORDS), frozenset({EOS}), None, bytes_of=WORDS.__getitem__, plain=plain, special=[1])
    _, seq, processor = follow([], made, regex="a{15000}c")
    assert allowed(made, seq, processor, []) == {2} and 0 < max(lengths) < 5000


def test_rules_may_refer_to_each_other_as_deep_as_a_grammar_is_long() -> None:
    rules = [f"r{i}: r{i + 1}" for i in range(15_000)]
    made, seq, processor = follow([], grammar="\n".join(["start: r0", *rules, 'r15000: "a"']))
    assert allowed(made, seq, processor, []) == {2}
