"""The embedded pair: its tokenizer, its two shapes, its data, and the run that trains and exports both."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig

from redraft_train.embedded_pair import corpus, export, pretrain
from redraft_train.embedded_pair import tokenizer as bpe

Documents = list[corpus.Document]

VOCABULARY = 4096
CONTEXT = 1024
SHARES = {"stdlib": 0.6, "peps": 0.4}
"""Shares of the training tokens. Source code leads: the demo's prompts are code."""

ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(2**28),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Keep freed activations in the process, on huge pages: a third more tokens per second on Linux. And let a waiting thread sleep:
otherwise a training run that shares its cores nearly stops."""


@dataclass(frozen=True)
class Member:
    """One model of the pair and how many tokens it is trained on."""

    name: str
    config: LlamaConfig
    tokens: int


def shape(hidden: int, layers: int, heads: int, mlp: int) -> LlamaConfig:
    """A Llama with heads of 64, one key/value head, and the embedding tied to the output head."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=64,
        intermediate_size=mlp,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        attn_implementation="sdpa",
    )


PAIR = (
    Member("target", shape(hidden=320, layers=8, heads=5, mlp=896), tokens=5_500_000),
    Member("draft", shape(hidden=128, layers=3, heads=2, mlp=448), tokens=4_000_000),
)


def load_documents(stdlib: Path | None, peps: Path) -> tuple[Documents, Documents]:
    """(training, held-out) documents of the recipe's two sources."""
    return corpus.split([*corpus.separated_file(peps, "peps"), *corpus.standard_library(stdlib)])


def load_tokenizer(work: Path, training: Documents) -> Tokenizer:
    """The tokenizer in `work`, trained there first if there is none."""
    path = work / "tokenizer.json"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        trained = bpe.train((document.text for document in training), VOCABULARY)
        partial = path.with_suffix(".partial")
        trained.save(str(partial))
        os.replace(partial, path)
    return Tokenizer.from_file(str(path))


class Run:
    """One model of the pair with its data, in `work / name`; it continues from a checkpoint found there."""

    def __init__(self, member: Member, work: Path, training: Documents, held: Documents) -> None:
        self.member, self.plan = member, pretrain.Plan(tokens=member.tokens)
        self.tokenizer = load_tokenizer(work, training)
        encoded = corpus.encode(held, self.tokenizer)
        streams = {source: np.concatenate(documents) for source, documents in encoded.items()}
        self.characters = {
            source: sum(len(document.text) for document in held if document.source == source) / len(stream)
            for source, stream in streams.items()
        }
        self.trainer = pretrain.Trainer(
            pretrain.build(member.config, self.plan.seed),
            self.plan,
            corpus.Mixture(corpus.encode(training, self.tokenizer), SHARES, self.plan.seed),
            {source: corpus.windows(stream, CONTEXT) for source, stream in streams.items()},
            work / member.name,
        )

    def export(self, out: Path, command: str) -> None:
        """Measure the model as it stands on all held-out rows and write it to `out / name`."""
        seen, planned = (steps * self.plan.batch for steps in (self.trainer.step, sum(self.plan.steps())))
        result = export.Result(seen, planned, self.trainer.evaluate(), self.characters, command)
        export.write(self.trainer.model, self.tokenizer, result, out / self.member.name)
        print(f"{self.member.name}: {seen:,} tokens, held-out loss {result.held_out}, written to {out}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m redraft_train.embedded_pair.recipe", description=__doc__)
    parser.add_argument("--peps", type=Path, required=True, help="PEPs separated by <|endoftext|> lines, .txt or .zst")
    parser.add_argument("--stdlib", type=Path, help="standard library (default: the running interpreter's)")
    parser.add_argument("--work", type=Path, default=Path(".train/embedded"), help="checkpoints and logs (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("redraft/embedded"), help="where to export (%(default)s)")
    parser.add_argument("--only", choices=[member.name for member in PAIR], help="train only this model of the pair")
    parser.add_argument("--tokens", type=int, help="training tokens (default: each model's own)")
    parser.add_argument("--export", action="store_true", help="train nothing: export the checkpoints as they stand")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    arguments = parser.parse_args()
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:  # a process reads it only at its start
        os.execve(sys.executable, [sys.executable, "-m", "redraft_train.embedded_pair.recipe", *sys.argv[1:]], os.environ | ENVIRONMENT)
    torch.set_num_threads(arguments.threads)
    try:
        training, held = load_documents(arguments.stdlib, arguments.peps)
        members = [member for member in PAIR if arguments.only in (None, member.name)]
        for member in members:
            run = Run(replace(member, tokens=arguments.tokens or member.tokens), arguments.work, training, held)
            if not arguments.export:
                run.trainer.run()
            run.export(arguments.out, f"python -m redraft_train.embedded_pair.recipe --peps {arguments.peps.name}")
    except (FileNotFoundError, ImportError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
