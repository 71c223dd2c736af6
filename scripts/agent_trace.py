"""Writes a replayed history of an agent: its prompts, turn by turn, as JSON lines.

A prompt is a list of blocks, as a client keeps them: the task, what tools returned, and the notes of the agent. Each turn adds a result and
a note (grow). Sometimes a file that was read before is read again and its old text is replaced (edit), or results come in another order
(move). Once the history is too long, the oldest results are taken out of its middle (trim).

python scripts/agent_trace.py --texts FILE ... --output trace.jsonl      texts or gzipped texts; else the standard library
"""

from __future__ import annotations

import argparse
import gzip
import json
import sysconfig
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

MODULES = ("tarfile", "argparse", "mailbox", "inspect", "typing", "doctest", "enum", "shutil")
TASK = (
    "You are an agent with tools that read files and search texts. After each result write one short note, then call the next tool.",
    "Task: find out what the files below are for, and keep the list of names that are used in more than one of them up to date.",
)
RESULT, START = "<result", "<note>"  # how a result begins, and where the agent goes on
NOTES = ("I will read the next file.", "This confirms what I noted before.", "Another name for the list.", "Nothing new here; I go on.")


class Turn(NamedTuple):
    """kind: grow, edit, move or trim; blocks: the whole prompt."""

    kind: str
    blocks: list[str]

    @property
    def results(self) -> list[int]:
        """The places of the blocks that tools returned."""
        return [i for i, block in enumerate(self.blocks) if block.startswith(RESULT)]


@dataclass
class Agent:
    """texts: what its tools return pieces of; most: letters of a history before it is trimmed."""

    texts: Seq[str]
    most: int
    dice: Random

    def piece(self, letters: int) -> str:
        """Whole lines from anywhere in the texts."""
        text = self.dice.choice(self.texts)
        start = text.rfind("\n", 0, self.dice.randrange(max(1, len(text) - letters))) + 1
        return text[start : start + letters].rpartition("\n")[0]

    def result(self, name: str, text: str) -> str:
        return f"{RESULT} tool={name}>\n{text}\n</result>\n"

    def turns(self, count: int) -> list[Turn]:
        task, body, found = [f"{text}\n" for text in TASK], [], []
        for i in range(count):
            kind = "grow"
            if sum(map(len, task + body)) > self.most:
                kind, half = "trim", len(body) // 2
                body = ["[earlier results were removed]\n", *body[half:]]
            elif (places := [j for j, block in enumerate(body) if block.startswith(RESULT)])[2:] and (luck := self.dice.random()) < 0.35:
                if luck < 0.2:
                    kind, at = "edit", self.dice.choice(places[:-1])
                    lines = body[at].splitlines(keepends=True)
                    row = self.dice.randrange(1, max(2, len(lines) - 1))
                    body[at] = "".join([*lines[:row], f"# changed in turn {i}: {self.dice.choice(NOTES)}\n", *lines[row + 1 :]])
                else:
                    kind, (a, b) = "move", self.dice.sample(places[:-1], 2) if len(places) > 2 else places[:2]
                    body[a], body[b] = body[b], body[a]
            body = [*body, self.result(self.dice.choice(("read", "search")), self.piece(self.dice.randint(500, 1600)))]
            body = [*body, START]
            found.append(Turn(kind, [*task, *body]))
            body = [*body, f"{self.dice.choice(NOTES)}</note>\n"]
        return found


def trace(texts: Seq[str], turns: int, most: int, seed: int) -> list[Turn]:
    return Agent(texts, most, Random(seed)).turns(turns)


def standard_library() -> list[str]:
    folder = Path(sysconfig.get_path("stdlib"))
    return [(folder / f"{name}.py").read_text(encoding="utf-8") for name in MODULES]


def text_of(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def read(path: Path) -> list[Turn]:
    """The turns of a file that was written before."""
    return [Turn(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, nargs="+", help="files that tools return pieces of")
    parser.add_argument("--turns", type=int, default=24)
    parser.add_argument("--most", type=int, default=9000, help="letters of a history before it is trimmed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    texts = [text_of(path) for path in given.texts or ()] or standard_library()
    lines = [json.dumps(turn._asdict()) for turn in trace(texts, given.turns, given.most, given.seed)]
    given.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
