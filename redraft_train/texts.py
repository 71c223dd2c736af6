"""Texts that a model writes for training: answers to prompts, kept in a file that a later run continues."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import closing
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import islice
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from redraft.bench import prompts as suite
from redraft.bench.compare import Dialogue
from redraft.bench.prompts import Prompt
from redraft.cli.prompting import CONTINUES
from redraft.config import SamplingParams
from redraft.core.noise import sample_seed
from redraft.errors import CheckpointError, InvalidInput

if TYPE_CHECKING:
    from redraft.llm import LLM

GREEDY = 0.7  # the share of prompts whose first answer is greedy; the others, and all further answers, are sampled
TEMPERATURE, WARMER = 0.7, 1.0  # of sampled answers; from the third answer to a prompt on
PASSES = 8  # answers to a prompt, at most
WAVE = 512  # conversations under way
HELD = 0.05  # the share of prompts that are held out
FEWEST, MOST = 1, 48  # prompts that are held out, within these limits


@dataclass(frozen=True)
class Text:
    """tokens: a whole conversation; answers: (first, last) ranges of tokens that the model wrote; held: its prompt is not trained on;
    prompt, number: the id of the prompt, and which of the answers to it this is."""

    prompt: str
    number: int
    held: bool
    temperature: float
    tokens: list[int]
    answers: list[tuple[int, int]]

    @property
    def written(self) -> int:
        return sum(last - first for first, last in self.answers)


def prompts(path: Path, llm: LLM) -> list[Prompt]:
    """The prompts of a file: one a line, as text in a .txt file, else as JSON (see bench/prompts.py). A plain prompt is what a user says if
    the model has a chat template. InvalidInput names file and line."""
    chat = llm.tokenizer.has_template and llm.name not in CONTINUES
    if path.suffix != ".txt":
        return suite.load(path, chat=chat)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: cannot be read ({error.strerror if isinstance(error, OSError) else 'not UTF-8 text'})") from None
    found = [Prompt(str(i), "all", prompt=line.strip()).shaped(chat=chat) for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InvalidInput(f"{path}: holds no prompts")
    return found


def split(found: Seq[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held out), by a hash of the content, so equal prompts are on one side. InvalidInput for a single prompt."""
    order = sorted({prompt.content for prompt in found}, key=lambda content: sha256(content.encode()).hexdigest())
    if len(order) < 2:
        raise InvalidInput("prompts: 2 different ones or more are needed, one to train on and one that is held out")
    held = set(order[: min(MOST, max(FEWEST, round(HELD * len(order))))])
    return [one for one in found if one.content not in held], [one for one in found if one.content in held]


@dataclass(eq=False)
class _Job:
    """One conversation that the model is writing."""

    prompt: Prompt
    number: int
    held: bool
    temperature: float
    seed: int
    dialogue: Dialogue
    ids: list[int] = field(default_factory=list)
    reply: list[int] = field(default_factory=list)
    answers: list[tuple[int, int]] = field(default_factory=list)
    said: list[int] = field(default_factory=list)  # the conversation so far

    def ask(self) -> list[int]:
        """The tokens that the model reads next. What it wrote before counts as its own where this continues it."""
        self.ids, self.reply = self.dialogue.ids(), []
        if self.ids[: len(self.said)] != self.said:
            self.answers = []
        return self.ids

    def close(self) -> None:
        self.answers.append((len(self.ids), len(self.ids) + len(self.reply)))
        self.said = self.ids + self.reply
        self.dialogue.reply(self.reply)
        self.reply = []

    @property
    def begun(self) -> bool:
        """Whether what it has is a text."""
        return bool(self.reply or self.answers)

    def text(self) -> Text:
        return Text(self.prompt.id, self.number, self.held, self.temperature, self.said, self.answers)


class Writer:
    """Lets a model answer prompts and appends each text to a file. A text that is in the file is not written again.

    The held-out prompts come first, once each. Then come the others in a random order of `seed`, up to PASSES times.
    """

    def __init__(self, llm: LLM, file: Path, training: Seq[Prompt], held: Seq[Prompt], *, max_tokens: int = 256, seed: int = 0) -> None:
        self.llm, self.file, self.max_tokens, self.seed = llm, file, max_tokens, seed
        self.wanted = [(prompt, 0, True) for prompt in held]
        for number in range(PASSES):
            order = sorted(training, key=lambda prompt: sha256(f"{seed} {number} {prompt.id}".encode()).digest())
            self.wanted += [(prompt, number, False) for prompt in order]
        self.texts = read(file)

    def run(self, seconds: float = inf, limit: int | None = None, tick: Callable[[int], None] = lambda tokens: None) -> list[Text]:
        """Writes for so long, at least one held-out text and one other, or the first `limit` texts. Answers that are under way when time is
        up are cut. tick gets the number of new tokens. Returns all texts in the order of prompts."""
        until = time.monotonic() + seconds
        wanted = self.wanted if limit is None else self.wanted[:limit]
        jobs, waiting = self._jobs(wanted), deque[_Job]()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:

            def keep(job: _Job) -> None:
                file.write(json.dumps(asdict(job.text())) + "\n")
                file.flush()
                self.texts.append(job.text())

            while wave := [waiting.popleft() for _ in range(min(len(waiting), WAVE))] or [*islice(jobs, WAVE)]:
                under_way = dict.fromkeys(wave)
                for job, new, ended in self._wave(wave):
                    tick(new)
                    if ended:
                        del under_way[job]
                        job.close()
                        if job.dialogue.open and len(job.dialogue.ids()) < self.llm.max_model_len - 1:
                            waiting.append(job)
                        else:
                            keep(job)
                    if time.monotonic() > until:
                        begun = [one for one in (*waiting, *under_way) if one.begun]
                        if {text.held for text in self.texts} | {job.held for job in begun} == {True, False}:
                            for job in begun:
                                if job.reply:
                                    job.close()
                                keep(job)
                            return self._sorted(wanted)
        return self._sorted(wanted)

    def _sorted(self, wanted: Seq[tuple[Prompt, int, bool]]) -> list[Text]:
        """The texts of these prompts."""
        found = {(text.prompt, text.number): text for text in self.texts}
        return [found[prompt.id, number] for prompt, number, _ in wanted if (prompt.id, number) in found]

    def _jobs(self, wanted: Seq[tuple[Prompt, int, bool]]) -> Iterator[_Job]:
        """Of the texts that are not written yet. Prompts that leave no room for an answer are left out."""
        done = {(text.prompt, text.number) for text in self.texts}
        for i, (prompt, number, held) in enumerate(wanted):
            dialogue = Dialogue(prompt, self.llm.tokenizer)
            if (prompt.id, number) not in done and len(dialogue.ids()) < self.llm.max_model_len - 1:
                yield _Job(prompt, number, held, self._temperature(prompt, number), sample_seed(self.seed, i), dialogue)

    def _temperature(self, prompt: Prompt, number: int) -> float:
        if number:
            return TEMPERATURE if number == 1 else WARMER
        share = int.from_bytes(sha256(f"{self.seed} {prompt.id}".encode()).digest()[:4], "big") / 2**32
        return 0.0 if share < GREEDY else TEMPERATURE

    def _wave(self, jobs: Seq[_Job]) -> Iterator[tuple[_Job, int, bool]]:
        """Yields each with the number of its new tokens, and whether its answer is written. Errors of single prompts are left out."""
        params = [SamplingParams(temperature=job.temperature, seed=job.seed, max_tokens=self.max_tokens) for job in jobs]
        with closing(self.llm.stream([{"prompt_token_ids": job.ask()} for job in jobs], params)) as deltas:
            for delta in deltas:
                job = jobs[delta.prompt]
                job.reply += delta.token_ids
                if delta.error is None:
                    yield job, len(delta.token_ids), delta.finish_reason is not None


def read(file: Path) -> list[Text]:
    """The texts of a file; none if there is no file. A last line that was cut short is removed. CheckpointError for any other damage."""
    if not file.exists():
        return []
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(file, len(whole))
    found = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            value = json.loads(line)
            found.append(Text(**{**value, "answers": [(int(first), int(last)) for first, last in value["answers"]]}))
        except (ValueError, TypeError, KeyError):
            raise CheckpointError(f"{file}:{number}: not a text that redraft train wrote") from None
    return found
