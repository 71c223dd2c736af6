"""Makes tiny random checkpoints with weights, a tokenizer and, if requested, a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from tests.models import tiny

CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def tiny_llama(path: Path, *, family: str = "llama2", chat: bool = True, marks: tuple[str, ...] = (), **changes: Any) -> Path:
    """A Llama of three layers in `path`, with one token for each byte; `marks` are further special tokens, `changes` fields of its
    config. Greedy by default."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet, *marks])}
    tiny.save(family, path, **{"vocab_size": len(vocabulary), "max_position_embeddings": 256, **changes})
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", *marks])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "clean_up_tokenization_spaces": False}
    (path / "tokenizer_config.json").write_text(json.dumps({**config, **({"chat_template": CHAT} if chat else {})}))
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, "do_sample": False}))
    return path
