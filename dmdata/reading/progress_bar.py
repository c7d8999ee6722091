"""One progress bar for whatever this process is reading, once it takes longer than two seconds: bytes, dollars, time.

It is on standard error of a terminal, where it disappears with the read, or in the cell of a notebook, where its last
line stays; in pipes, log files and worker processes there is none. Reads of several threads share it. It is drawn by a
thread of its own, and a short read costs no more than an entry in a list.
"""

import atexit
import contextlib
import contextvars
import importlib
import io
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from dmdata.errors import SettingsError
from dmdata.money.prices import readable_bytes, readable_seconds, readable_usd
from dmdata.settings import settings

SECONDS_UNSHOWN = 2.0
"""How long a read may take before it is shown."""

_TICK_SECONDS = 0.2
# how long the thread that draws waits for another read before it ends
_IDLE_SECONDS = 10.0
_NOTEBOOK_COLUMNS = 100


@contextlib.contextmanager
def shown(
    name: str, n_bytes: int, price: Callable[[], float], *, wanted: bool
) -> Iterator[Callable[[int], object] | None]:
    """Show a read while the block runs, if it takes long; reads within the block are part of it and show nothing.

    Parameters
    ----------
    name : str
    n_bytes : int
        That will arrive.
    price : callable
        Returns the dollars of all of it; asked only when there is something to show.
    wanted : bool
        False for a read that the caller shows, or wants silent.

    Yields
    ------
    arrived : callable or None
        To be called with the bytes that arrived since the last call, from any thread; None where nothing is shown.
    """
    if _is_within.get():
        yield None
        return
    within = _is_within.set(True)
    try:
        if not wanted or not can_show():
            yield None
            return
        read = _Read(name, n_bytes, price)
        _board.enter(read)
        try:
            yield read.arrived
        finally:
            _board.leave(read)
    finally:
        _is_within.reset(within)


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Show no read of this process while the block runs: for commands that have bars of their own."""
    _board.hide(+1)
    try:
        yield
    finally:
        _board.hide(-1)


_is_within = contextvars.ContextVar("dmdata_is_within_a_shown_read", default=False)


@dataclass(slots=True, eq=False)
class _Read:
    """A read under way; `usd` is unknown until it is shown."""

    name: str
    n_bytes: int
    price: Callable[[], float]
    usd: float | None = None
    n_arrived: int = 0
    is_done: bool = False
    began: float = field(default_factory=time.monotonic)
    lock: Any = field(default_factory=threading.Lock)
    # a notebook puts output into the cell that the context belongs to
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    def arrived(self, n_bytes: int) -> None:
        with self.lock:
            self.n_arrived += n_bytes

    def priced(self) -> float:
        if self.usd is None:
            self.usd = self.price()
        return self.usd


class _Line:
    """One line that sums up some reads."""

    def __init__(self, **console: Any) -> None:
        # only for what is shown: importing dmdata stays quick
        from rich import progress
        from rich.console import Console

        self.bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.DownloadColumn(binary_units=True),
            progress.TextColumn("{task.fields[dollars]}"),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            console=Console(**console),
            transient=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self.bar.add_task("", total=None, dollars="")
        self.summary = ""

    def update(self, reads: list[_Read]) -> None:
        name = reads[0].name if len(reads) == 1 else f"{len(reads)} reads"
        arrived, n_bytes = sum(read.n_arrived for read in reads), sum(read.n_bytes for read in reads)
        usd = sum(read.priced() for read in reads)
        so_far = usd * min(arrived / n_bytes, 1.0) if n_bytes else 0.0
        dollars = f"{readable_usd(so_far)} of {readable_usd(usd)}" if usd else "free"
        self.bar.update(self._task, description=name, completed=arrived, total=n_bytes or None, dollars=dollars)
        seconds = time.monotonic() - min(read.began for read in reads)
        self.summary = (
            f"{name}: {readable_bytes(arrived)} of {readable_bytes(n_bytes)}, {dollars}, in {readable_seconds(seconds)}"
        )


class _TerminalLine(_Line):
    """Drawn over again, and wiped when it ends."""

    def __init__(self) -> None:
        super().__init__(stderr=True)

    def show(self) -> None:
        self.bar.start()  # the first time alone
        self.bar.refresh()

    def end(self) -> None:
        self.bar.stop()


class _NotebookLine(_Line):
    """An output of the cell, replaced again and again; rich itself would need ipywidgets there."""

    def __init__(self, context: contextvars.Context) -> None:
        super().__init__(file=io.StringIO(), width=_NOTEBOOK_COLUMNS, force_terminal=False, force_jupyter=False)
        self._context = context
        self._handle: Any = None

    def show(self) -> None:
        with self.bar.console.capture() as captured:
            self.bar.console.print(self.bar.get_renderable())
        self._put(captured.get().rstrip())

    def end(self) -> None:
        self._put(self.summary)

    def _put(self, text: str) -> None:
        display = importlib.import_module("IPython.display").display  # what runs in a notebook has it
        if self._handle is None:
            self._handle = self._context.run(display, {"text/plain": text}, raw=True, display_id=True)
        else:
            self._context.run(self._handle.update, {"text/plain": text}, raw=True)


def can_show() -> bool:
    """Return whether somebody may be looking: at a terminal or notebook, and not at a worker process."""
    if multiprocessing.parent_process() is not None:
        return False
    return _in_notebook() or _is_terminal(sys.stderr)


def _is_terminal(stream: Any) -> bool:
    try:
        return stream is not None and bool(stream.isatty())
    except ValueError:  # it is closed
        return False


def _in_notebook() -> bool:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


def _is_allowed() -> bool:
    try:
        return settings().progress
    except SettingsError:
        return False  # a read that spends reports it; a free read does not fail for it


class _Board:
    """The reads under way, and the line that shows those that take long."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reads: list[_Read] = []
        self._n_hiding = 0
        self._drawer: threading.Thread | None = None
        self._line: _TerminalLine | _NotebookLine | None = None

    def enter(self, read: _Read) -> None:
        with self._lock:
            self._reads.append(read)
            if self._drawer is None or not self._drawer.is_alive():
                self._drawer = threading.Thread(target=self._draw_until_idle, name="dmdata-progress", daemon=True)
                self._drawer.start()

    def leave(self, read: _Read) -> None:
        with self._lock:
            read.is_done = True
            if read.began > time.monotonic() - SECONDS_UNSHOWN:
                self._reads = [other for other in self._reads if other is not read]
            elif self._line is None:
                self._forget_done()
            else:
                self._draw()  # what is printed next must not meet the bar

    def _forget_done(self) -> None:
        self._reads = [read for read in self._reads if not read.is_done]

    def hide(self, more: int) -> None:
        with self._lock:
            self._n_hiding += more
            self._draw()

    def _draw_until_idle(self) -> None:
        busy = time.monotonic()
        while True:
            time.sleep(_TICK_SECONDS)
            with self._lock:
                self._draw()
                if self._reads:
                    busy = time.monotonic()
                elif time.monotonic() - busy > _IDLE_SECONDS:
                    self._drawer = None
                    return

    def _draw(self) -> None:
        began_before = time.monotonic() - SECONDS_UNSHOWN
        # those that are done stay in the sum for as long as others are under way
        late = [read for read in self._reads if read.began <= began_before]
        is_over = self._n_hiding > 0 or all(read.is_done for read in late)
        try:
            if not is_over and self._line is None and _is_allowed():
                self._line = _NotebookLine(late[0].context) if _in_notebook() else _TerminalLine()
            if self._line is not None:
                if late:
                    self._line.update(late)
                if is_over:
                    line, self._line = self._line, None
                    line.end()
                else:
                    self._line.show()
        except (OSError, ValueError):
            self._line = None  # the terminal is gone, or standard error is closed: there is nobody to show it to
        if self._line is None:
            self._forget_done()


_board = _Board()


def _begin_again() -> None:
    """Start again in a forked child, which has the lock and the list but not the thread that draws."""
    global _board
    _board = _Board()


os.register_at_fork(after_in_child=_begin_again)
atexit.register(lambda: _board.hide(+1))
