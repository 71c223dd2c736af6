"""Builds tiny tokenizers of every kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from redraft.models.tokenizer import Tokenizer

TEXTS = [
    "once upon a time", "def f(x):\n    return x + 1\n", "naïve café, 東京 🎉🎉", "  two  spaces\tand a tab", "é", "\n", "<b>&amp;</b>",
    "mañana ▁ Ġ 0x0A <0x0A>",
]  # fmt: skip
CORPUS = [*TEXTS, "the cat sat on the mat and the dog sat on the log " * 4] * 3


def save(folder: Path, made: Fast, **config: Any) -> Tokenizer:
    made.save(str(folder / "tokenizer.json"))
    raw = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({**raw, **config}))
    return Tokenizer(folder)


def byte_level(folder: Path) -> Tokenizer:
    made = Fast(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens(["<tool>", "naïve"])  # special tokens are in plain text, not in letters that stand for bytes
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return save(folder, made)


def sentencepiece(folder: Path) -> Tokenizer:
    """As in Llama 2: a letter stands for a space, unknown letters become bytes, and the text gets a leading space."""
    trained = Fast(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    head = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trained.train_from_iterator(CORPUS[-1:], trainers.BpeTrainer(vocab_size=340, special_tokens=head, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    made = Fast(models.BPE(model["vocab"], [tuple(m) for m in model["merges"]], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return save(folder, made)


def unigram(folder: Path, fallback: bool = False) -> Tokenizer:
    """As in T5. `fallback`: with byte tokens, as in XGLM and some Japanese models."""
    letters = sorted({letter for text in CORPUS for letter in text.replace(" ", "▁")})
    head = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256 * fallback))]
    pieces = [(piece, -9.0) for piece in [*head, "▁the", "▁cat", "at", *letters]]
    made = Fast(models.Unigram(pieces, unk_id=0, byte_fallback=fallback))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    chain = [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()] if fallback else [decoders.Metaspace()]
    made.decoder = decoders.Sequence(chain)
    return save(folder, made)


def characters(folder: Path) -> Tokenizer:
    """Each letter is a token."""
    letters = sorted({letter for text in CORPUS for letter in text})
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *letters])}
    made = Fast(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return save(folder, made)


def word_pieces(folder: Path) -> Tokenizer:
    """As in BERT: the decoder puts spaces between words, but not before `##`."""
    words = ["<unk>", "<s>", "</s>", "the", "cat", "##s", "##ing", "sat", ".", ",", "é", "##🎉"]
    made = Fast(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return save(folder, made)


def word_ends(folder: Path) -> Tokenizer:
    """As in the first GPT: `</w>` ends a word."""
    pieces = ["<unk>", "<s>", "</s>", "the</w>", "c", "at</w>", "s", "a", "t</w>", "é</w>", "🎉</w>"]
    made = Fast(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.decoder = decoders.BPEDecoder(suffix="</w>")
    return save(folder, made)


KINDS: dict[str, Callable[[Path], Tokenizer]] = {
    "byte-level BPE": byte_level,
    "SentencePiece BPE with byte fallback": sentencepiece,
    "unigram": unigram,
    "unigram with byte fallback": lambda folder: unigram(folder, fallback=True),
    "characters": characters,
    "word pieces": word_pieces,
    "ends of words": word_ends,
}
