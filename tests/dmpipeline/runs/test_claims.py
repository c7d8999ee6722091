"""One process trains a block, as long as it is seen to be alive; nobody waits for one that is stopped or has died."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack

import pytest
from processes import Child

from dmpipeline.errors import RunError
from dmpipeline.runs.claims import (
    FIRST_PATIENCE_SECONDS,
    LEASE_SECONDS,
    MOST_DEATHS,
    MOST_FAILED_BLOCKS,
    Claims,
    Observed,
)
from dmpipeline.runs.directory import recorded_failures

BLOCKS = [range(start, start + 4) for start in range(0, 40, 4)]
HOLDER = """
import fcntl, sys
lock = open(sys.argv[1], "a+b")
for byte in sys.argv[2:]:
    fcntl.lockf(lock, fcntl.LOCK_EX, 1, int(byte))
print("locked", flush=True)
sys.stdin.read()
"""


class Clock:
    """Seconds that pass when a test adds to them."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def lock(tmp_path):
    with open(tmp_path / "lock", "a+b") as file:
        yield file


@pytest.fixture
def holder(tmp_path):
    """Start a process that locks bytes and does nothing else, as one that is stopped."""
    with ExitStack() as stack:

        def start(*numbers):
            command = [sys.executable, "-c", HOLDER, str(tmp_path / "lock"), *map(str, numbers)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            process = stack.enter_context(Child(command, text=True, **pipes))
            stack.callback(process.kill)
            assert process.stdout.readline() == "locked\n"

        yield start


def touch_at(file, clock, seconds):
    """Have it be so late, and the file touched just now."""
    clock.seconds = seconds
    file.touch()
    os.utime(file, (seconds, seconds))


def can_claim(claims, block, *, again=False):
    with claims.claimed(block, again=again) as is_ours:
        return is_ours


def die_training(claims, path, block):
    """Leave what a process leaves that is killed: the file of its claim, but no lock."""
    file = path / f".claim-{block}"
    with claims.claimed(block, again=True):
        left = file.read_bytes()
    file.write_bytes(left)


def test_a_claim_whose_process_is_stopped_expires_and_the_next_one_can_expire_as_well(tmp_path, lock, holder):
    holder(3, 3 + 2**32)
    clock = Clock()
    claims = Claims(tmp_path, BLOCKS, lock, "one", clock=clock)
    assert not can_claim(claims, 3)
    clock.seconds += LEASE_SECONDS
    assert not can_claim(claims, 3)
    clock.seconds += 1
    assert not can_claim(claims, 3), "the second lock is only seen now"
    clock.seconds += LEASE_SECONDS + 1
    assert can_claim(claims, 3)
    assert can_claim(claims, 4)
    assert not list(tmp_path.glob(".claim-*"))


def test_a_claim_whose_file_is_touched_lasts_unless_others_train_a_block_much_faster(tmp_path, lock, holder):
    holder(3)
    clock = Clock()
    slow, fast = (Claims(tmp_path, BLOCKS, lock, "one", clock=clock, observed=Observed(its)) for its in (20, 10))
    for seconds in range(0, 200, 10):
        touch_at(tmp_path / ".claim-3", clock, seconds)
        assert not can_claim(slow, 3)
        assert can_claim(fast, 3) == (seconds > 100)


def test_a_process_without_a_block_of_its_own_waits_for_one_that_hangs_only_so_long_over_all_its_turns(
    tmp_path, lock, holder
):
    holder(3)
    clock, observed = Clock(), Observed()
    for seconds in range(0, 200, 10):
        touch_at(tmp_path / ".claim-3", clock, seconds)
        turn = Claims(tmp_path, BLOCKS, lock, "one", clock=clock, observed=observed)
        with turn.claimed(3, again=False) as is_ours:
            assert is_ours == (seconds > FIRST_PATIENCE_SECONDS)
        if is_ours:
            break
    else:
        pytest.fail("it waited for ever")


def test_patience_begins_again_when_another_process_claims_the_same_block(tmp_path, lock, holder):
    holder(3)
    clock = Clock()
    claims = Claims(tmp_path, BLOCKS, lock, "one", clock=clock, observed=Observed(10))
    for seconds in range(0, 200, 10):
        (tmp_path / ".claim-3").write_text(json.dumps({"claim": "first" if seconds < 100 else "second"}))
        touch_at(tmp_path / ".claim-3", clock, seconds)
        assert not can_claim(claims, 3)


def test_a_claim_whose_file_cannot_be_read_is_one_that_was_not_touched(tmp_path, lock, holder):
    holder(3)
    (tmp_path / ".claim-3").mkdir()
    clock = Clock()
    claims = Claims(tmp_path, BLOCKS, lock, "one", clock=clock)
    assert not can_claim(claims, 3)
    clock.seconds += LEASE_SECONDS + 1
    assert can_claim(claims, 3)


def test_blocks_are_free_that_nobody_has_claimed(tmp_path, lock):
    claims, other = (Claims(tmp_path, BLOCKS, lock, "one") for _ in range(2))
    with claims.claimed(0, again=False):
        assert other.are_free(2, range(4))
        assert not other.are_free(3, range(4))


def test_what_another_command_has_given_up_leaves_no_file_of_a_claim_behind(tmp_path, lock, holder):
    holder(3)
    (tmp_path / ".claim-3").write_text(json.dumps({"command": "other", "is_failed": True}))
    clock = Clock()
    claims = Claims(tmp_path, BLOCKS, lock, "one", clock=clock)
    assert not can_claim(claims, 3)
    clock.seconds += LEASE_SECONDS + 1
    assert can_claim(claims, 3)
    assert [file.name for file in tmp_path.glob(".claim-*")] == [".claim-3"]


def test_a_command_that_is_over_leaves_alone_what_its_workers_still_hold(tmp_path, lock, holder):
    holder(3, 5)
    claims = Claims(tmp_path, BLOCKS, lock, "one")
    for block in (3, 4, 5):
        (tmp_path / f".claim-{block}").write_text(json.dumps({"command": "one", "n_begun": 1, "claim": str(block)}))
    assert claims.begun() == {3: "3", 4: "4", 5: "5"}
    claims.clear(done=[5])
    assert [file.name for file in tmp_path.glob(".claim-*")] == [".claim-3"]


def test_a_process_touches_the_file_of_its_claim(tmp_path, lock):
    with Claims(tmp_path, BLOCKS, lock, "one", lease_seconds=0.1) as claims, claims.claimed(3, again=False):
        file = tmp_path / ".claim-3"
        before = file.stat().st_mtime_ns
        while file.stat().st_mtime_ns == before:
            pass
    assert not file.exists()


def test_a_block_that_a_process_of_the_same_command_died_of_comes_last_and_is_given_up_in_the_end(tmp_path, lock):
    claims, other = (Claims(tmp_path, BLOCKS, lock, command) for command in ("one", "other"))
    for _ in range(MOST_DEATHS):
        die_training(claims, tmp_path, 3)
        assert not can_claim(claims, 3)
    assert not claims.failed()
    assert not can_claim(claims, 3, again=True)
    assert claims.failed() == {3}
    assert "every worker that trained it died" in recorded_failures(tmp_path)[3]
    assert not other.failed()
    assert can_claim(other, 3), "the next command tries it again"
    assert not list(tmp_path.glob(".claim-*"))


def test_a_block_that_fails_is_given_up_by_all_processes_of_a_command_that_carries_on(tmp_path, lock):
    claims, peer = (Claims(tmp_path, BLOCKS, lock, "one", carries_on=True) for _ in range(2))
    for block in range(MOST_FAILED_BLOCKS):
        with claims.claimed(block, again=False), claims.failures(block):
            raise ArithmeticError
        assert not can_claim(peer, block, again=True)
    assert peer.failed() == set(range(MOST_FAILED_BLOCKS))
    with pytest.raises(RunError), claims.claimed(5, again=False), claims.failures(5):
        raise RunError("the disk is full")
    assert can_claim(peer, 5)
    alone = Claims(tmp_path, BLOCKS, lock, "two")
    with pytest.raises(ArithmeticError), alone.claimed(6, again=False), alone.failures(6):
        raise ArithmeticError
    peer.clear(done=[])
    assert not list(tmp_path.glob(".claim-*"))
