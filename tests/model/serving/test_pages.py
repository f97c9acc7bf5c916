"""Page numbers: counted, shared, kept for those who begin alike, and given up when they are needed."""

import random

import pytest

from model.serving.pages import Pages, prefix_keys


def test_the_scratch_page_is_never_given_out():
    pages = Pages(5)
    assert pages.capacity == 4 and not pages.can_take(5)
    assert sorted(pages.take(4)) == [1, 2, 3, 4]


def test_a_shared_page_is_free_when_its_last_holder_lets_go():
    pages = Pages(4)
    mine = pages.take(3)
    pages.hold(mine[:1])
    pages.release(mine)
    assert pages.num_free == 2
    pages.release(mine[:1])
    assert pages.num_free == 3


def test_a_page_released_twice_is_noticed():
    pages = Pages(3)
    mine = pages.take(1)
    pages.release(mine)
    with pytest.raises(AssertionError, match="released twice"):
        pages.release(mine)


def test_the_longest_known_beginning_is_found_and_held():
    pages = Pages(20)
    first = pages.take(8)
    keys = prefix_keys("dense", range(1024), 256, 1023)
    assert len(keys) == 3, "a chunk that holds the last token is not shared"
    for i, key in enumerate(keys):
        pages.keep(key, first[2 * i : 2 * i + 2])
    pages.release(first)
    assert pages.num_free == 13
    other = prefix_keys("dense", [*range(600), *range(424)], 256, 1023)
    assert pages.find(other) == first[:4]
    assert pages.find(prefix_keys("recency", range(1024), 256, 1023)) == []
    assert pages.find(keys[1:]) == first[2:6], "a key names all that came before it"


def test_kept_beginnings_go_from_their_end_and_the_least_used_first():
    pages = Pages(13)
    runs = {}
    for name in ("old", "new"):
        runs[name] = prefix_keys(name, range(768), 256, 768)
        mine = pages.take(6)
        for i, key in enumerate(runs[name]):
            pages.keep(key, mine[2 * i : 2 * i + 2])
        pages.release(mine)
    pages.release(pages.find(runs["old"]))  # used once more
    assert pages.num_free == 0 and pages.can_take(12) and not pages.can_take(13)
    pages.take(2)
    found = {name: pages.find(keys) for name, keys in runs.items()}
    assert len(found["old"]) == 6
    assert not pages.can_take(5), "what somebody holds is not given up"
    assert pages.can_take(12 - 2 - 6 - len(found["new"]))


def test_nothing_is_lost_or_given_twice_in_a_long_life():
    rng = random.Random(5)
    pages = Pages(40)
    held: list[list[int]] = []
    for step in range(3000):
        count = rng.randrange(1, 9)
        if rng.random() < 0.5 and pages.can_take(count):
            before = [page for run in held for page in run]
            mine = pages.take(count)
            assert not set(mine) & set(before)
            held.append(mine)
            if rng.random() < 0.5:
                pages.keep(str(step).encode(), mine)
        elif held:
            pages.release(held.pop(rng.randrange(len(held))))
    for run in held:
        pages.release(run)
    assert sorted(pages.take(39)) == list(range(1, 40))
