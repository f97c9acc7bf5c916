import random

import pytest

from tasks.errors import TaskError
from tasks.niah.build import build
from tasks.niah.sentences import MAX_CHARS, made_up, split
from tasks.niah.texts import read_sentences


def count_words(text: str, prefix: str) -> int:
    """White space separates tokens; ten more stand for a chat template."""
    return len(text.split()) + len(prefix.split()) + 10


def docs(data, **metadata):
    metadata = {"samples": 1, "lengths": [512], "depths": [50], "count_tokens": count_words} | metadata
    return build(task="niah_single_2", options={}, data=str(data), **metadata)["test"].to_list()


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("One.  Two!\nThree?", ["One.", "Two!", "Three?"]),
        ("Chapter I\n\nIt rained. It\nstopped.", ["Chapter I", "It rained.", "It stopped."]),
        ("“Go!” He went. (Twice.) Then left.", ["“Go!”", "He went.", "(Twice.)", "Then left."]),
        ("Mr. Bennet met Mrs. Long. St. Paul saw J. Smith.", ["Mr. Bennet met Mrs. Long.", "St. Paul saw J. Smith."]),
        ('He said "no." and 3.5 metres. 7 left.', ['He said "no." and 3.5 metres.', "7 left."]),
        ("", []),
        (" \n\n \n", []),
    ],
)
def test_texts_are_cut_into_sentences(text, sentences):
    assert split(text) == sentences


def test_a_very_long_sentence_is_cut_at_clauses_and_loses_no_word():
    text = ", ".join(f"clause {i} of a sentence without an end" for i in range(100)) + "; " + "x" * 1000 + "."
    pieces = split(text)
    assert max(map(len, pieces)) <= MAX_CHARS
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(piece.endswith(("end,", "end;")) for piece in pieces[:10])


def test_made_up_sentences_hold_no_needle_and_seldom_repeat():
    source = made_up(random.Random(0))
    sentences = [next(source) for _ in range(5000)]
    assert len(set(sentences)) > 4900
    assert all(split(sentence) == [sentence] for sentence in sentences)
    assert not any(char.isdigit() for sentence in sentences for char in sentence)
    assert not any("magic" in sentence or "VAR" in sentence for sentence in sentences)
    assert not any(f" a {vowel}" in sentence for sentence in sentences for vowel in "aeiou")


def test_a_haystack_repeats_when_the_texts_end(tmp_path):
    (tmp_path / "a.txt").write_text("First one here. Second one there.", encoding="utf-8")
    (tmp_path / "b.txt").write_text("Third one everywhere.", encoding="utf-8")
    starts = set()
    for doc in docs(tmp_path, samples=20, depths=[0]):
        words = doc["prompt"].partition(doc["needles"][0])[2].partition("\nWhat")[0].strip()
        pieces = split(words)
        cycle = ["First one here.", "Second one there.", "Third one everywhere."]
        start = cycle.index(pieces[0])
        assert pieces == [cycle[(start + i) % 3] for i in range(len(pieces))] and len(pieces) > 50
        starts.add(start)
    assert starts == {0, 1, 2}


def test_one_file_serves_as_well_as_a_folder(tmp_path):
    (tmp_path / "a.txt").write_text("First one here. Second one there.", encoding="utf-8")
    assert docs(tmp_path) == docs(tmp_path / "a.txt")


def test_missing_empty_and_unreadable_texts_are_refused(tmp_path):
    with pytest.raises(TaskError, match="does not exist"):
        docs(tmp_path / "nowhere")
    with pytest.raises(TaskError, match=r"holds no \.txt file"):
        docs(tmp_path)
    (tmp_path / "a.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(TaskError, match="are empty"):
        docs(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"abc \xff\xfe")
    with pytest.raises(TaskError, match=r"a\.txt is not UTF-8 \(byte 4\)"):
        docs(tmp_path)


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_2", "niah_vt"])
def test_texts_for_a_task_that_makes_its_own_haystack_are_refused(task, tmp_path):
    with pytest.raises(TaskError, match=f"^{task}: data: .* remove data"):
        build(task=task, options={}, lengths=[512], depths=1, data=str(tmp_path), count_tokens=count_words)


def test_real_books_make_haystacks(shared):
    folder = shared / "data" / "haystack"
    books = " ".join(" ".join(file.read_text(encoding="utf-8").split()) for file in sorted(folder.glob("*.txt")))
    for doc in docs(folder, lengths=[1024, 4096], depths=3):
        before, _, behind = doc["prompt"].partition(doc["needles"][0])
        before, behind = before.partition("afterwards.\n")[2].strip(), behind.rpartition("\nWhat is")[0].strip()
        assert f"{before} {behind}".strip() in books
        assert 0 <= doc["length"] - count_words(doc["prompt"], doc["gen_prefix"]) - 128 < MAX_CHARS / 2


def test_the_sentences_of_real_books_are_short_enough_to_meet_a_length(shared):
    sentences = read_sentences(str(shared / "data" / "haystack"))
    assert len(sentences) > 40_000
    assert max(map(len, sentences)) <= MAX_CHARS
    assert not any(sentence.endswith((" Mr.", " Mrs.")) for sentence in sentences)
