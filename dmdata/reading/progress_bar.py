"""One progress bar for whatever this process is doing, once it takes longer than two seconds.

Of reads it has bytes, dollars and time; of long work, which goes before reads, its stages. It is on standard error of a
terminal, where it disappears when all is done, or in the cell of a notebook, where what was done stays; in pipes, log
files and worker processes there is none. Reads of several threads share it. It is drawn by a thread of its own, and a
short read costs no more than an entry in a list.
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
from typing import TYPE_CHECKING, Any

from dmdata import phases
from dmdata.errors import SettingsError
from dmdata.money.prices import readable_bytes, readable_seconds, readable_usd
from dmdata.settings import settings

if TYPE_CHECKING:
    from rich.console import Console

    from dmdata.reading.one_line import OneLine
    from dmdata.reading.stages import Stages

SECONDS_UNSHOWN = 2.0
"""How long a read or other work may take before it is shown."""

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
def stages_shown(units: dict[str, str]) -> Iterator[Callable[[str, int, int], None] | None]:
    """Show the stages of a work while the block runs, if it takes long; reads within the block show nothing.

    Parameters
    ----------
    units : dict of str to str
        What each stage counts, by its name.

    Yields
    ------
    show : callable or None
        To be called with (stage, done, in total); None where nothing is shown, as where a command shows it.
    """
    if _is_within.get() or phases.heard_by() is not None or not can_show():
        yield None
        return
    within = _is_within.set(True)
    work = _Work.of(units)
    _board.begin(work)
    try:
        with phases.listening(work.stages):
            yield work.stages.show
    finally:
        _board.end(work)
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


@dataclass(slots=True, eq=False)
class _Work:
    """Long work under way."""

    stages: "Stages"
    bar: "OneLine"
    began: float = field(default_factory=time.monotonic)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    @classmethod
    def of(cls, units: dict[str, str]) -> "_Work":
        from dmdata.reading.stages import Stages, stage_bars

        bar = stage_bars(_console(), **_BY_HAND)
        return cls(Stages(bar, units), bar)

    def update(self) -> None:
        """Stages are noted as they are reported."""

    def summary(self) -> str:
        from dmdata.reading.stages import line_of

        facts = [column for column in self.bar.columns[:-1] if not isinstance(column, str)]
        return "\n".join(line_of(task, facts) for task in self.bar.tasks)


class _Sum:
    """Some reads, in one line."""

    def __init__(self, board: "_Board") -> None:
        # only for what is shown: importing dmdata stays quick
        from dmdata.reading.one_line import Bytes, Dollars, OneLine, Speed

        self._board = board
        self.context = board.late()[0].context
        self.bar = OneLine(Bytes(), Dollars(), Speed(), console=_console(), **_BY_HAND)
        self._task = self.bar.add_task("", total=None, n_bytes=0, usd=0.0)
        self._summary = ""

    def update(self) -> None:
        if not (reads := self._board.late()):
            return
        name = reads[0].name if len(reads) == 1 else f"{len(reads)} reads"
        arrived, n_bytes = sum(read.n_arrived for read in reads), sum(read.n_bytes for read in reads)
        usd = sum(read.priced() for read in reads)
        so_far = usd * min(arrived / n_bytes, 1.0) if n_bytes else 0.0
        dollars = f"{readable_usd(so_far)} of {readable_usd(usd)}" if usd else "free"
        began = min(read.began for read in reads)
        self.bar.tasks[0].start_time = began  # it is shown later
        self.bar.update(self._task, n_bytes=n_bytes, usd=usd)
        self.bar.update(self._task, description=name, completed=arrived, total=n_bytes or None)
        seconds = time.monotonic() - began
        self._summary = (
            f"{name}: {readable_bytes(arrived)} of {readable_bytes(n_bytes)}, {dollars}, in {readable_seconds(seconds)}"
        )

    def summary(self) -> str:
        return self._summary


# a bar that is wiped when it ends and drawn when it is told to
_BY_HAND = {"transient": True, "auto_refresh": False, "redirect_stdout": False, "redirect_stderr": False}


def _console() -> "Console":
    from rich.console import Console

    if not _in_notebook():
        return Console(stderr=True)
    # rich itself would need ipywidgets there
    return Console(file=io.StringIO(), width=_NOTEBOOK_COLUMNS, force_terminal=False, force_jupyter=False)


class _AtTerminal:
    """Drawn over again, and wiped when it ends."""

    def __init__(self, shown: _Work | _Sum) -> None:
        self.shown = shown

    def show(self) -> None:
        self.shown.update()
        self.shown.bar.start()  # the first time alone
        self.shown.bar.refresh()

    def end(self) -> None:
        self.shown.bar.stop()


class _InNotebook:
    """An output of the cell, replaced again and again; what was done stays."""

    def __init__(self, shown: _Work | _Sum) -> None:
        self.shown = shown
        self._handle: Any = None

    def show(self) -> None:
        self.shown.update()
        bar = self.shown.bar
        with bar.console.capture() as captured:
            bar.console.print(bar.get_renderable())
        self._put(captured.get().rstrip())

    def end(self) -> None:
        self.shown.update()
        self._put(self.shown.summary())

    def _put(self, text: str) -> None:
        display = importlib.import_module("IPython.display").display  # what runs in a notebook has it
        if self._handle is None:
            self._handle = self.shown.context.run(display, {"text/plain": text}, raw=True, display_id=True)
        else:
            self.shown.context.run(self._handle.update, {"text/plain": text}, raw=True)


def can_show() -> bool:
    """Return whether somebody may be looking: at a terminal or notebook, and not at a worker process."""
    if multiprocessing.parent_process() is not None:
        return False
    return _in_notebook() or (_is_terminal(sys.stderr) and not in_cells_shell())


def in_cells_shell() -> bool:
    """Return whether a notebook's cell started this process, as by ``!``.

    Its terminal shows every state of a bar, one after the other, and nobody can type there.
    """
    return "JPY_PARENT_PID" in os.environ or "matplotlib_inline" in os.environ.get("MPLBACKEND", "")


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
    """What is under way, and the line or lines that show what takes long: the first of the works, or all reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reads: list[_Read] = []
        self._works: list[_Work] = []
        self._n_hiding = 0
        self._drawer: threading.Thread | None = None
        self._drawn: _AtTerminal | _InNotebook | None = None

    def enter(self, read: _Read) -> None:
        with self._lock:
            self._reads.append(read)
            self._start_drawing()

    def leave(self, read: _Read) -> None:
        with self._lock:
            read.is_done = True
            if read.began > time.monotonic() - SECONDS_UNSHOWN:
                self._reads = [other for other in self._reads if other is not read]
            elif self._drawn is None:
                self._forget_done()
            else:
                self._draw()  # what is printed next must not meet the bar

    def begin(self, work: _Work) -> None:
        with self._lock:
            self._works.append(work)
            self._start_drawing()

    def end(self, work: _Work) -> None:
        with self._lock:
            self._works = [other for other in self._works if other is not work]
            if self._drawn is not None:
                self._draw()

    def late(self) -> list[_Read]:
        """List the reads that take long; those that are done stay in the sum for as long as others are under way."""
        began_before = time.monotonic() - SECONDS_UNSHOWN
        return [read for read in self._reads if read.began <= began_before]

    def hide(self, more: int) -> None:
        with self._lock:
            self._n_hiding += more
            self._draw()

    def _start_drawing(self) -> None:
        if self._drawer is None or not self._drawer.is_alive():
            self._drawer = threading.Thread(target=self._draw_until_idle, name="dmdata-progress", daemon=True)
            self._drawer.start()

    def _forget_done(self) -> None:
        self._reads = [read for read in self._reads if not read.is_done]

    def _draw_until_idle(self) -> None:
        busy = time.monotonic()
        while True:
            time.sleep(_TICK_SECONDS)
            with self._lock:
                self._draw()
                if self._reads or self._works:
                    busy = time.monotonic()
                elif time.monotonic() - busy > _IDLE_SECONDS:
                    self._drawer = None
                    return

    def _draw(self) -> None:
        began_before = time.monotonic() - SECONDS_UNSHOWN
        work = next((work for work in self._works if work.began <= began_before), None)
        is_over = self._n_hiding > 0 or (work is None and all(read.is_done for read in self.late()))
        try:
            drawn = self._drawn
            if drawn is not None and (is_over or work is not (drawn.shown if isinstance(drawn.shown, _Work) else None)):
                self._drawn = None
                drawn.end()
            if not is_over and self._drawn is None and _is_allowed():
                shown = work or _Sum(self)
                self._drawn = _InNotebook(shown) if _in_notebook() else _AtTerminal(shown)
            if self._drawn is not None:
                self._drawn.show()
        except (OSError, ValueError):
            self._drawn = None  # the terminal is gone, or standard error is closed: there is nobody to show it to
        if self._drawn is None:
            self._forget_done()


_board = _Board()


def _begin_again() -> None:
    """Start again in a forked child, which has the lock and the list but not the thread that draws."""
    global _board
    _board = _Board()


os.register_at_fork(after_in_child=_begin_again)
atexit.register(lambda: _board.hide(+1))
