"""No reply names a path of the machine, whatever the text of the error."""

from __future__ import annotations

import pytest

from redraft.errors import CheckpointError, InvalidInput, OutOfMemory
from redraft.serve.errors import refused, without_paths


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no profile /root/x/y.st; make one", "no profile (path); make one"),
        ("models/m: no tokenizer", "(path): no tokenizer"),
        ("path=~/a/b: bad", "path=(path): bad"),
        ("in '/srv/a' and \"C:\\\\x\", (../y)", "in '(path)' and \"(path)\", ((path))"),
        ("no path at all: 3 < 4", "no path at all: 3 < 4"),
        ("JSON schema: #/a/type: no type, in /srv/x", "JSON schema: #/a/type: no type, in (path)"),
    ],
)
def test_words_that_may_be_paths_are_hidden(text: str, shown: str) -> None:
    assert without_paths(text) == shown


def test_words_that_the_client_knows_are_shown() -> None:
    text = "roles must alternate user/assistant/user/..., not /srv/x"
    assert without_paths(text, "raise('roles must alternate user/assistant/user/...')") == text.replace("/srv/x", "(path)")


def test_of_files_nothing_is_replied() -> None:
    for error in (CheckpointError("/srv/m: no weights"), CheckpointError("weights: damaged")):
        reply = refused(error)
        assert reply.status == 400 and not {"srv", "weights"} & set(reply.message.replace("/", " ").split())
    assert refused(InvalidInput("stop = '/srv/x': no")).message == "stop = '(path)': no"
    assert (refused(OutOfMemory("/srv/m: 3 GiB")).status, refused(OSError("/srv/x")).message) == (503, "internal error")
