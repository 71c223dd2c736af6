#!/usr/bin/env bash
# llguidance 1.9.1 compiles JSON schemas whose grammar accepts values that the schema does not allow.
#
# Expected: as its documentation says, "either a grammar conformant to the JSON schema semantics, or an error", apart from known departures.
# Seen, with default options:
# - a name may be written with \u escapes, and then escapes the schema of the property of that name: {"\u0061": "x"} passes as another name;
# - an excluded bound that is an integer is included if the other bound is less than 1 away: 0 passes {"exclusiveMinimum": 0, "maximum": 0.5};
# - integers beyond 2**53 are rounded: 9007199254740992 passes {"const": 9007199254740993};
# - 29 February passes the format date in every year;
# - two members of the same name pass {"minProperties": 2} (documented for names, not for minProperties);
# - the format "unknown" passes without an error, which all other unknown formats raise.
#
# Installs the package in a temporary folder. Exits with 1 if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check llguidance==1.9.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
import sys

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper


class Bytes:
    eos_token_id, bos_token_id, special_token_ids = 256, None, [256]
    tokens = [bytes([i]) for i in range(256)] + [b"<end>"]

    def __call__(self, text):
        return list(text)


tokenizer = LLTokenizer(TokenizerWrapper(Bytes()), slices=[])


def accepts(schema, text):
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema)), log_level=0)
    if matcher.is_error():
        return matcher.get_error().splitlines()[0]
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


cases = [
    ({"properties": {"a": {"type": "integer"}}}, '{"\\u0061":"x"}', True),
    ({"properties": {"a": {"type": "integer"}}}, '{"a":"x"}', False),
    ({"exclusiveMinimum": 0, "maximum": 0.5}, "0", True),
    ({"exclusiveMinimum": 0, "maximum": 1.5}, "0", False),
    ({"const": 9007199254740993}, "9007199254740992", True),
    ({"format": "date"}, '"2023-02-29"', True),
    ({"format": "date"}, '"2023-04-31"', False),
    ({"type": "object", "minProperties": 2}, '{"a":1,"a":1}', True),
    ({"format": "unknown"}, '"x"', True),
    ({"format": "anything"}, '"x"', "Unknown format: anything"),
]
seen = [accepts(schema, text) for schema, text, _ in cases]
for (schema, text, _), found in zip(cases, seen):
    print("%-45s %-20s %s" % (json.dumps(schema), text, found))
sys.exit(seen != [then for _, _, then in cases])
PYTHON
