"""Functions that take long show their progress where somebody is looking, unless the caller takes it."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from dmdata.reading.progress_bar import stages_shown

_P = ParamSpec("_P")
_R = TypeVar("_R")


def shows_stages(units: dict[str, str]) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Give a function's `progress`, where it is not given, to a bar for each stage.

    At a terminal the bars disappear when the work is done, in a notebook what was done stays; elsewhere, and under a
    command, which has bars of its own, nothing is shown. Warnings of the function's caller count one call more.

    Parameters
    ----------
    units : dict of str to str
        What each stage counts, by its name; the function calls `progress` with (stage, done, in total).
    """

    def decorate(work: Callable[_P, _R]) -> Callable[_P, _R]:
        return _shown(work, units, lambda show: show)

    return decorate


def shows_count(what: str, unit: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Give a function's `progress`, where it is not given, to one bar; see `shows_stages`.

    Parameters
    ----------
    what, unit : str
        What is done and what is counted, as "training" and "models"; the function calls `progress` with (done, in
        total).
    """

    def decorate(work: Callable[_P, _R]) -> Callable[_P, _R]:
        return _shown(work, {what: unit}, lambda show: functools.partial(show, what))

    return decorate


def _shown(work: Callable[_P, _R], units: dict[str, str], told: Callable[[Any], Any]) -> Callable[_P, _R]:
    place = list(inspect.signature(work).parameters).index("progress")

    @functools.wraps(work)
    def shown(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if len(args) > place or kwargs.get("progress") is not None:
            return work(*args, **kwargs)
        with stages_shown(units) as show:
            if show is not None:
                kwargs["progress"] = told(show)
            return work(*args, **kwargs)

    return shown
