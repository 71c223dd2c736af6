"""Whether a text is JSON so far."""

from __future__ import annotations

import re

STRING = r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*'
WHOLE = re.compile(rf'(?P<space>[ \t\n\r]+)|(?P<string>{STRING}")|(?P<scalar>-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null)|'
                   r"(?P<sign>[{}\[\],:])", re.ASCII)  # fmt: skip
NUMBER = r"-?(?:(?:0|[1-9]\d*)(?:\.(?:\d+(?:[eE][+-]?\d*)?)?|[eE][+-]?\d*)?)?"
CUT_STRING = re.compile(rf"{STRING}(?:\\(?:u[0-9a-fA-F]{{0,3}})?)?")
CUT_SCALAR = re.compile(rf"{NUMBER}|t(?:r(?:u)?)?|f(?:a(?:l(?:s)?)?)?|n(?:u(?:l)?)?", re.ASCII)

VALUE, FIRST, KEY, FIRST_KEY, COLON, AFTER = "value", "value or ]", "key", "key or }", ":", ", or the end"


def may_be_json(text: str, ended: bool) -> bool:
    """Whether a JSON value begins with this text, or is this text if it `ended`."""
    at, wanted, within = 0, VALUE, ""  # within: the closing marks of what is open, the innermost last
    while at < len(text):
        value = wanted in (VALUE, FIRST)
        if not ended and ((value and CUT_SCALAR.fullmatch(text, at)) or (wanted not in (COLON, AFTER) and CUT_STRING.fullmatch(text, at))):
            return True
        word = WHOLE.match(text, at)
        if word is None:
            return False
        at, kind, found = word.end(), word.lastgroup, word[0]
        if kind == "space":
            continue
        if value and (kind == "scalar" or kind == "string"):
            wanted = AFTER
        elif value and found in ("[", "{"):
            within, wanted = within + ("]" if found == "[" else "}"), FIRST if found == "[" else FIRST_KEY
        elif wanted in (KEY, FIRST_KEY) and kind == "string":
            wanted = COLON
        elif wanted == COLON and found == ":":
            wanted = VALUE
        elif (
            wanted in (AFTER, FIRST, FIRST_KEY)
            and within
            and found == within[-1]
            and (wanted, found) not in ((FIRST, "}"), (FIRST_KEY, "]"))
        ):
            within, wanted = within[:-1], AFTER
        elif wanted == AFTER and within and found == ",":
            wanted = VALUE if within[-1] == "]" else KEY
        else:
            return False
    return not ended or (wanted == AFTER and not within)
