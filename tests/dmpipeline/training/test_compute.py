import threading
from contextlib import contextmanager

import pytest

from dmpipeline.compute import Shared


def test_threads_that_overlap_share_a_context_and_the_last_to_go_leaves_it():
    told, both, first_gone = [], threading.Barrier(2), threading.Event()

    @contextmanager
    def made():
        told.append("entered")
        yield len(told)
        told.append("left")

    shared = Shared(made)

    def stay(leaves_first):
        with shared() as value:
            both.wait(timeout=10)
            assert value == 1
            if not leaves_first:
                assert first_gone.wait(timeout=10)
                assert told == ["entered"]
        if leaves_first:
            first_gone.set()

    threads = [threading.Thread(target=stay, args=(first,)) for first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert told == ["entered", "left"]
    with shared() as value, shared() as again:
        assert (value, again) == (3, 3)
    assert told == ["entered", "left"] * 2


def test_a_context_that_cannot_be_entered_is_tried_again_by_the_next():
    attempts = []

    @contextmanager
    def fails_at_first():
        attempts.append(1)
        if len(attempts) == 1:
            raise OSError("not now")
        yield

    shared = Shared(fails_at_first)
    with pytest.raises(OSError, match="not now"), shared():
        pass
    with shared():
        assert len(attempts) == 2
