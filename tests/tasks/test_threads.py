"""Documents made side by side: nothing of it may be seen in them."""

import threading

import pytest

from tasks import threads
from tasks.errors import TaskError
from tasks.threads import make_all


def test_documents_come_in_the_order_of_their_cells_whoever_is_done_first(monkeypatch):
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 2)
    second_is_done = threading.Event()

    def make(length, index):
        if (length, index) == (10, 0):
            assert second_is_done.wait(10)  # in turn it would wait for ever
        if (length, index) == (10, 1):
            second_is_done.set()
        return f"{length}/{index}"

    cells = [(length, index) for length in (10, 20) for index in range(3)]
    assert make_all(make, cells) == ["10/0", "10/1", "10/2", "20/0", "20/1", "20/2"]


def test_a_document_that_cannot_be_made_ends_it_with_its_own_error():
    def make(length):
        if length == 2:
            raise TaskError("niah: lengths: 2 is too short")
        return length

    with pytest.raises(TaskError, match="2 is too short"):
        make_all(make, [(1,), (2,), (3,)])
