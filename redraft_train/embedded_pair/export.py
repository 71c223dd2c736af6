"""Write a trained model as a Hugging Face checkpoint with its tokenizer, chat template and model card."""

from __future__ import annotations

import copy
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaForCausalLM

from redraft_train.embedded_pair import tokenizer as bpe

TEMPERATURE = 0.5  # of the generation_config.json: what `redraft generate` samples with unless another is given


@dataclass(frozen=True)
class Result:
    """What a model card reports. `held_out` (nats per token) and `characters` (per token) are by source."""

    tokens: int
    planned: int
    held_out: dict[str, float]
    characters: dict[str, float]
    command: str


def write(model: LlamaForCausalLM, tokenizer: Tokenizer, result: Result, folder: Path) -> None:
    """Write the checkpoint in bfloat16. Each file is complete before it gets its name in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        partial = Path(name)
        half = copy.deepcopy(model).to(torch.bfloat16)
        # a small model repeats itself at temperature 0 and wanders at 1
        ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        half.generation_config = GenerationConfig(**ends, do_sample=True, temperature=TEMPERATURE)
        half.save_pretrained(partial)
        bpe.save(tokenizer, partial, config.max_position_embeddings)
        (partial / "MODEL_CARD.md").write_text(card(folder.name, model, result))
        for file in sorted(partial.iterdir()):
            file.chmod(0o644)
            os.replace(file, folder / file.name)


def card(name: str, model: LlamaForCausalLM, result: Result) -> str:
    """The model card: data, licences, tokens seen and held-out loss."""
    config = model.config
    rows = "\n".join(
        f"| {source} | {loss:.3f} | {result.characters[source]:.2f} | {loss / result.characters[source] / math.log(2):.3f} |"
        for source, loss in result.held_out.items()
    )
    state = "" if result.tokens >= result.planned else " **An unfinished checkpoint: it will be replaced.**"
    return f"""\
# Redraft embedded {name}

A Llama of {model.num_parameters():,} parameters: {config.num_hidden_layers} layers of width {config.hidden_size}, \
{config.num_attention_heads} heads of {config.head_dim} with {config.num_key_value_heads} key/value head, \
MLP {config.intermediate_size}, tied embedding of {config.vocab_size:,}, context {config.max_position_embeddings:,}, \
bfloat16. It continues Python source and PEP-like prose, and knows nothing else.

Trained from random weights on {result.tokens:,} of {result.planned:,} planned tokens.{state}

| held-out documents | nats per token | characters per token | bits per character |
| --- | --- | --- | --- |
{rows}

Measured in rows of {config.max_position_embeddings:,} tokens on the ~2 % of documents whose SHA-256 keeps them out of \
training.

## Data and licences

- `stdlib`: the source of CPython 3.11's standard library without tests and generated tables. PSF-2.0 (a few files \
carry their own permissive notices).
- `peps`: the Python Enhancement Proposals whose text says public domain or CC0-1.0.

The chat template is plain prose (`Question:`, `Answer:`): the model has seen no chats.

## Command

    {result.command}
"""
