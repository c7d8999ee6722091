"""Programs run at a pseudoterminal, as a person would see them."""

import os
import pty
import select
import subprocess
import time

from processes import Child


def run_at_terminal(command: list[str], **env: str) -> str:
    """Run a command at a pseudoterminal; return what it wrote there."""
    ours, theirs = pty.openpty()
    with Child(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=os.environ | env) as process:
        os.close(theirs)
        written, deadline = b"", time.monotonic() + 60
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    chunk = os.read(ours, 1 << 16)
                except OSError:  # the other end is closed
                    break
                if not chunk:
                    break
                written += chunk
    os.close(ours)
    text = written.decode()
    assert process.returncode == 0, text
    return text
