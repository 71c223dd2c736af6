#!/usr/bin/env bash
# tokenizers 0.23.3 and sentencepiece 0.2.3 decode the same byte tokens to different texts.
#
# Expected: both replace only the bytes that are not valid UTF-8, as bytes.decode(errors="replace") does.
# Seen: sentencepiece does. The ByteFallback decoder of tokenizers replaces every byte of the run, so one invalid byte at the end also
# turns the valid characters before it into U+FFFD. A server that streams text sends characters which the decoded whole text lacks.
#
# Installs both packages in a temporary folder. Exits with 1 if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check tokenizers==0.23.3 sentencepiece==0.2.3
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import sentencepiece
from tokenizers import Tokenizer, decoders, models

with open("text", "w") as file:
    file.write("one two three four five six\n" * 50)
sentencepiece.SentencePieceTrainer.train(
    input="text", model_prefix="small", vocab_size=300, byte_fallback=True, hard_vocab_limit=False, minloglevel=2
)
pieces = sentencepiece.SentencePieceProcessor(model_file="small.model")
vocab = {pieces.id_to_piece(i): i for i in range(len(pieces))}
fast = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])

seen = []
for data in (b"\xc3\xa9\n", b"\xc3\xa9\n\xff"):
    ids = [vocab[f"<0x{byte:02X}>"] for byte in data]
    seen.append((data, data.decode(errors="replace"), pieces.decode(ids), fast.decode(ids)))
    print("bytes %r  Python %r  sentencepiece %r  tokenizers %r" % seen[-1])
as_then = [
    (b"\xc3\xa9\n", "\u00e9\n", "\u00e9\n", "\u00e9\n"),
    (b"\xc3\xa9\n\xff", "\u00e9\n\ufffd", "\u00e9\n\ufffd", "\ufffd" * 4),
]
sys.exit(seen != as_then)
PYTHON
