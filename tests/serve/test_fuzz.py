"""The small form of `scripts/prove fuzz`: 300 malformed bodies, and a good request between them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest

from redraft import SamplingParams
from scripts.proofs.fuzz import GOOD, LACKED, PROMPT, SAMPLES, Client, Malformed, attack, malformed, slots, wrong
from tests.serve.raw import Live, embedded, live

SECRET = "not-to-be-shown"


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(api_key=(SECRET,), idle_timeout=0.5, max_body=100_000) as made:
        yield made


@pytest.fixture
def client(server: Live) -> Iterator[Client]:
    made = Client("127.0.0.1", server.port, SECRET)
    yield made
    made.close()


def test_malformed_bodies_are_refused_and_the_next_good_request_is_answered(server: Live, client: Client) -> None:
    known = embedded().generate(PROMPT, SamplingParams(temperature=0, max_tokens=GOOD["max_tokens"]))[0].outputs[0].text
    document = client.json("GET", "/openapi.json")
    kinds, statuses, faults = attack(client, malformed(document, 300, 1, large=200_000, key=SECRET), known, 50)
    assert not faults, faults[:3]
    assert sum(kinds.values()) == 300 and len(kinds) >= 11
    assert {400, 413} <= set(statuses)
    server.idle()


def test_samples_themselves_are_good(client: Client) -> None:
    for path, body in SAMPLES.items():
        if path not in LACKED:
            client.json("POST", path, body)


def test_every_field_gets_a_wrong_type(client: Client) -> None:
    document = client.json("GET", "/openapi.json")
    places = {(slot.path, slot.place) for slot in slots(document)}
    assert ("/v1/chat/completions", ("messages", 0, "content", 0, "text")) in places
    assert ("/v1/completions", ("speculation", "budget")) in places
    sent = [one for one in islice(malformed(document, 25000, 0, large=10), 25000) if one.kind == "type"]
    assert len({one.body for one in sent}) > len(places) * 5


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (200, b"{}"),
        (500, b'{"error": {"message": "x", "type": "x", "param": null, "code": null}}'),
        (422, b'{"error": {"message": "x", "type": "x", "param": null, "code": null}}'),
        (400, b'{"detail": "x"}'),
        (400, b"Bad Request"),
        (400, b'{"error": {"message": "in /home/me", "type": "x", "param": null, "code": null}}'),
        (400, b'{"error": {"message": "not-to-be-shown", "type": "x", "param": null, "code": null}}'),
    ],
)
def test_what_would_be_a_fault(status: int, answer: bytes) -> None:
    one: Any = Malformed("", "", b"")
    assert wrong(one, status, answer, SECRET)
    assert not wrong(one, 400, b'{"error": {"message": "x", "type": "x", "param": null, "code": null}}', SECRET)
