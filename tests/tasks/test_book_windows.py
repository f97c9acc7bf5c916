import itertools
import math
import random

import pytest

from tasks.book_perplexity.windows import build, score
from tasks.errors import TaskError
from tasks.niah import sentences


def count_words(text: str, prefix: str) -> int:
    return len(text.split())


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    source = sentences.made_up(random.Random(0))
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text("\n\n".join(" ".join(next(source) for _ in range(5)) for _ in range(200)))
    return path


def docs(book, **options):
    settings = {"samples": 4, "lengths": [300, 900], "scored": 100, "count_tokens": count_words}
    return build(data=str(book), **(settings | options))["test"].to_list()


def test_windows_are_pieces_of_the_book_that_fill_their_length(book):
    text = " ".join(book.read_text().split())
    for doc in docs(book):
        window = doc["context"] + doc["continuation"]
        assert window in text
        longest = 40  # words of a made-up sentence are fewer
        assert doc["length"] - longest < count_words(window, "") <= doc["length"]
        assert doc["context"][-1] == "." and doc["continuation"][:2] == " " + doc["continuation"].strip()[0]


def test_the_scored_part_is_whole_sentences_and_counted(book):
    for doc in docs(book):
        words = count_words(doc["continuation"], "")
        assert 100 <= words < 140
        assert doc["num_tokens"] == words
        assert doc["num_bytes"] == len(doc["continuation"].encode())


def test_lengths_share_their_scored_parts_and_samples_do_not(book):
    found = docs(book)
    by_length = {length: [doc for doc in found if doc["length"] == length] for length in (300, 900)}
    for short, long in zip(by_length[300], by_length[900], strict=True):
        assert short["continuation"] == long["continuation"] and long["context"].endswith(short["context"])
        assert short["cluster"] == long["cluster"]
    assert len({doc["continuation"] for doc in found}) == 4
    text = " ".join(book.read_text().split())
    places = [(text.index(doc["continuation"]), len(doc["continuation"])) for doc in by_length[300]]
    assert all(start + size <= following for (start, size), (following, _) in itertools.pairwise(places))
    assert places[-1][0] > 0.9 * len(text)


def test_one_sample_stands_in_the_middle(book):
    (doc,) = docs(book, samples=1, lengths=[300])
    text = " ".join(book.read_text().split())
    assert 0.4 < text.index(doc["continuation"]) / len(text) < 0.6


def test_scores_are_the_logarithms_of_one_another():
    doc = {"num_tokens": 10, "num_bytes": 40}
    found = score(doc, [(-10 * math.log(8), False)])
    assert found["token_probability"] == pytest.approx(1 / 8)
    assert found["nats_per_token"] == pytest.approx(math.log(8))
    assert found["bits_per_byte"] == pytest.approx(30 / 40)
    assert found["answer"] == "perplexity 8.000"


def test_a_hopeless_prediction_is_a_score_too():
    found = score({"num_tokens": 1, "num_bytes": 4}, [(-2000.0, False)])
    assert found["token_probability"] == 0.0 and found["answer"] == "2000.0 nats a token"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scored": 300}, "scored: expected tokens below the shortest length 300, got 300"),
        ({"scored": True}, "scored: expected tokens below"),
        ({"lengths": [100_000]}, r"lengths: 100000 is more than the \d+ tokens of data; ask for less"),
        ({"samples": 500}, r"samples: 500 scored parts of 100 tokens would overlap in \d+ tokens of data; ask for"),
        ({"lengths": [105], "scored": 100}, "lengths: 105 leaves no sentence before the scored part; ask for more"),
        ({"lengths": []}, "lengths: expected a list"),
        ({"data": None}, "data: expected a .txt file or a folder of .txt files, got nothing"),
    ],
)
def test_options_that_cannot_be_used_are_told_in_a_line(book, options, message):
    settings = {"data": str(book), "samples": 4, "lengths": [300], "scored": 100, "count_tokens": count_words}
    with pytest.raises(TaskError, match=message) as caught:
        build(**(settings | options))
    assert "\n" not in str(caught.value)
