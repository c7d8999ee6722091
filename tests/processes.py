"""Other processes in tests: waiting for them, and killing them at moments that a seed decides."""

import os
import subprocess
import time
from collections.abc import Callable
from typing import Any


class Child(subprocess.Popen[Any]):
    """A process to use in a with statement that kills it if the test failed, and waits for it."""

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, *rest)


def wait_until(happens: Callable[[], object]) -> None:
    """Wait until a condition holds, however busy the machine is; the time limit of a test ends what never happens."""
    while not happens():
        time.sleep(0.01)


def printed_seed() -> int:
    """Draw a seed and print it, so that a test that failed can be repeated."""
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)
    return seed
