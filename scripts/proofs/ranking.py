"""Which direction ranks documents better: how likely the query is after a document (/rerank), or a document after the query (/score).

`redraft serve MODEL` runs as a process of its own. For each of 20 queries exactly one of 16 short documents is right. Printed are how often
it comes first and the mean reciprocal of its rank.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from scripts.proofs.fuzz import Client, serving

DOCUMENTS = (
    "Photosynthesis is the process by which plants use sunlight, water and carbon dioxide to make sugar and oxygen.",
    "The Great Wall of China was built over many centuries to protect the northern borders of the empire.",
    "A list in Python is an ordered, mutable collection; append adds an item to its end.",
    "A tuple in Python is an ordered collection that cannot be changed after it was made.",
    "The heart pumps blood through arteries to the body and receives it back through veins.",
    "Mount Everest, on the border of Nepal and Tibet, is the highest mountain above sea level.",
    "Water boils at 100 degrees Celsius at sea level, and at lower temperatures on high mountains.",
    "Paris is the capital of France and lies on the river Seine.",
    "Berlin is the capital of Germany and lies on the river Spree.",
    "Penicillin was discovered in 1928 by Alexander Fleming when mould killed bacteria in a dish.",
    "To bake bread, mix flour, water, salt and yeast, let the dough rise, and bake it for forty minutes.",
    "The moon causes the tides of the sea by its gravity; there are two high tides a day.",
    "Interest on a loan is the price of borrowing money, usually given as a percentage a year.",
    "Shakespeare wrote Hamlet around 1600; it is a tragedy about a prince of Denmark.",
    "Bees collect nectar from flowers and turn it into honey, which they store in combs.",
    "The stock exchange is a place where shares of companies are bought and sold.",
)
QUERIES = (
    ("how do plants make food?", 0), ("why was the great wall built", 1), ("add an element to a python list", 2),
    ("immutable sequence type in python", 3), ("what organ moves blood around the body?", 4), ("tallest mountain in the world", 5),
    ("at what temperature does water boil?", 6), ("capital of France", 7), ("Which river flows through Berlin?", 8),
    ("who discovered penicillin", 9), ("recipe for bread", 10), ("what causes high and low tide", 11), ("cost of borrowing money", 12),
    ("who wrote Hamlet?", 13), ("how is honey made?", 14), ("where are shares traded", 15), ("carbon dioxide and sunlight", 0),
    ("emperor border defence China", 1), ("the first antibiotic", 9), ("boiling point at altitude", 6),
)  # fmt: skip


def by_query(client: Client, query: str) -> list[int]:
    """The documents, best first, by the likelihood of the query."""
    reply: Any = client.json("POST", "/rerank", {"query": query, "documents": DOCUMENTS, "return_documents": False})
    return [one["index"] for one in reply["results"]]


def by_document(client: Client, query: str) -> list[int]:
    """The documents, best first, by the likelihood of the document."""
    body = {"text_1": f"Query: {query}\n\nDocument:", "text_2": [f" {text}" for text in DOCUMENTS]}
    scores = [one["score"] for one in client.json("POST", "/score", body)["data"]]
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def show(name: str, rank: Callable[[str], list[int]]) -> None:
    places = [rank(query).index(right) + 1 for query, right in QUERIES]
    mean = sum(1 / place for place in places) / len(places)
    print(f"{name:<28}first {places.count(1)} of {len(places)}, mean reciprocal rank {mean:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    with serving(options.model, "--dtype", options.dtype) as (_, port, _):
        client = Client("127.0.0.1", port, timeout=600)
        show("query after document", lambda query: by_query(client, query))
        show("document after query", lambda query: by_document(client, query))


if __name__ == "__main__":
    main()
