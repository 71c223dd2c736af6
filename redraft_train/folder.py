"""The folder of a trained head: what drafters read, and its card. Each file is whole or absent, and what drafters read comes last."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.numpy import save_file

from redraft.bench import files
from redraft.errors import InvalidInput
from redraft.models.checkpoint import SINGLE
from redraft.models.loader import CONFIG
from redraft.models.trained import FILE, Trained

if TYPE_CHECKING:
    from redraft_train.heads.head import Head

CARD = "README.md"
MODEL = "draft-model"  # the method of heads that are models of their own, in the form of Hugging Face
TOKENIZER = "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "generation_config.json"
ENDS = "bos_token_id", "eos_token_id", "pad_token_id"


def draft(method: str, out: Path) -> str:
    """What --draft takes."""
    return f"{method}:{'model' if method == MODEL else 'path'}={out}"


def finished(out: Path) -> bool:
    return (out / FILE).exists() or (out / SINGLE).exists()


def check(method: str, source: Path) -> None:
    """InvalidInput if a model needs the tokenizer of a target that has no files of one."""
    if method == MODEL and not source.is_dir():
        raise InvalidInput(f"--head draft: {source} is one file; the draft model takes over the tokenizer's files of a folder")


def write(head: Head, out: Path, model: str, source: Path, card: str) -> None:
    """model: the hash of the target; source: its checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    files.write_text(out / CARD, card)
    if head.method != MODEL:
        Trained(head.method, model, head.about(), head.export()).save(out)
        return
    for pattern in TOKENIZER:
        for file in source.glob(pattern):
            shutil.copy(file, out / file.name)
    own: dict[str, Any] = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    files.write(out / CONFIG, {**head.about(), **{name: own[name] for name in ENDS if name in own}})
    partial = out / f".{SINGLE}.part"
    save_file(head.export(), partial, {"format": "pt"})
    os.replace(partial, out / SINGLE)
