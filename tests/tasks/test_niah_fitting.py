from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.niah.fitting import largest_fit
from tasks.niah.puzzle import Haystack, Puzzle, interleave


def endless(lengths):
    while True:
        yield from ("x" * length for length in lengths)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=8),
    overhead=st.integers(0, 300),
    chars_per_token=st.floats(0.5, 12),
    limit=st.integers(1, 3000),
)
def test_the_largest_fit_is_what_counting_every_size_finds(lengths, overhead, chars_per_token, limit):
    def tokens(num_pieces):
        pieces = [lengths[i % len(lengths)] for i in range(num_pieces)]
        return overhead + sum(int(length / chars_per_token) + 1 for length in pieces)

    expected = None
    size = 1
    while tokens(size) <= limit:
        expected, size = size, size + 1
    assert largest_fit(Haystack(endless(lengths), " "), tokens, limit) == expected


@settings(max_examples=100, deadline=None)
@given(noise=st.lists(st.integers(-15, 15), min_size=400, max_size=400), limit=st.integers(30, 4000))
def test_the_fit_holds_for_counts_that_are_not_monotone(noise, limit):
    def tokens(num_pieces):
        return 30 + 20 * num_pieces + noise[num_pieces % 400]

    size = largest_fit(Haystack(endless([90]), " "), tokens, limit)
    if size is None:
        assert tokens(1) > limit
    else:
        assert tokens(size) <= limit < tokens(size + 1)


def test_pieces_do_not_depend_on_how_many_are_asked_for():
    forward, backward = (Haystack(iter(["a", "bb", "ccc", "d", "e"]), " ") for _ in range(2))
    assert [forward.take(1), forward.take(4)] == [["a"], ["a", "bb", "ccc", "d"]]
    assert [backward.take(4), backward.take(1)] == [["a", "bb", "ccc", "d"], ["a"]]
    assert [forward.chars(n) for n in range(4)] == [0, 2, 5, 9]
    assert [forward.within(n) for n in (0, 1, 2, 4, 5, 9)] == [0, 0, 1, 1, 2, 3]


def test_a_boundary_is_chosen_by_characters_not_by_sentences():
    haystack = Haystack(endless([1, 1, 1, 96]), " ")  # boundaries at 0, 2, 4, 6 and 103 characters
    assert [haystack.boundary(4, share) for share in (0, 0.02, 0.05, 0.5, 0.6, 1)] == [0, 1, 3, 3, 4, 4]


def test_hidden_sentences_at_one_boundary_keep_their_order():
    assert interleave(["a", "b"], ["1", "2", "3"], [1, 2, 1]) == ["a", "1", "3", "b", "2"]
    assert interleave(["a"], ["1", "2"], [0, 0]) == ["1", "2", "a"]


def test_ordered_needles_never_overtake_the_first():
    puzzle = Puzzle(
        head="", tail="", gen_prefix="", hidden=("1", "2", "3"), places=(0.9, 0.0), ordered=True,
        haystack=Haystack(endless([1]), ""), needles=("1",), answers=("1",),
    )  # fmt: skip
    assert puzzle.prompt(4, 50) == "xx12x3x" or puzzle.prompt(4, 50) == "xx12xx3"
    assert puzzle.prompt(4, 100) == "xxxx123"
