"""Coarse, idempotent tasks on a Dask cluster, with the budgets and the environment of their caller.

A task takes along the caller's budgets, ``DMDATA_*`` settings and where S3 is, and never a key: each worker uses the
credentials of its own machine. Budgets hold together only where all count in one ledger, so a worker that does not
share the caller's ``DMDATA_HOME`` refuses work that is paid for.
"""

import contextlib
import importlib
import itertools
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dmdata.errors import DmdataError
from dmdata.money.budgets import BUDGETS_VARIABLE, in_force_here
from dmdata.money.ledger import DEFAULT_PROCESS_USD, budget, home
from dmdata.settings import settings

_WHERE_S3_IS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
# a worker's own may differ where the caller's are not set
_BUDGETS = (BUDGETS_VARIABLE, "DMDATA_MAX_COST")
_TASKS_A_THREAD = 2


@dataclass(frozen=True, slots=True)
class Carried:
    """What a task takes along of its caller's environment; no credentials.

    Attributes
    ----------
    variables : dict of str to str or None
        None: not set.
    token : str or None
        A file in the caller's ``DMDATA_HOME``, by which a worker sees that it shares it; None where nothing is paid.
    """

    variables: dict[str, str | None]
    token: str | None

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Work as the caller would, while the block runs.

        Raises
        ------
        DmdataError
            If money would be spent and this process does not share the caller's ledger.
        """
        with _ENVIRONMENT.set_to(self.variables):
            if self.token and not (home() / self.token).exists():
                raise DmdataError(
                    f"this worker does not share the caller's ledger: {home()} is another directory there; set "
                    "DMDATA_HOME to one that all share, or read from a free source"
                )
            yield


@contextlib.contextmanager
def carried_along(*, paid: bool) -> Iterator[Carried]:
    """Yield what tasks sent during the block take along.

    Where no budget is set they share one of the default amount, because otherwise each process would have its own.
    """
    with contextlib.ExitStack() as stack:
        if not in_force_here() and settings().max_cost is None:
            stack.enter_context(budget(usd=DEFAULT_PROCESS_USD))
        token = None
        if paid:
            token = f"cluster-{uuid.uuid4().hex}"
            home().mkdir(parents=True, exist_ok=True)
            (home() / token).touch()
            stack.callback((home() / token).unlink, missing_ok=True)
        own = [name for name in os.environ if name.startswith("DMDATA_")]
        variables = {name: os.environ.get(name) for name in (*_WHERE_S3_IS, *_BUDGETS, *own)}
        # this thread's blocks, not those of others
        variables[BUDGETS_VARIABLE] = ",".join(map(str, in_force_here())) or None
        variables["DMDATA_HOME"] = str(home())
        yield Carried(variables, token)


def run_on_cluster(scheduler: str, work: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """Run a function for each of many arguments on a Dask cluster; yield results as they come, in any order.

    A task whose worker dies is run again elsewhere.

    Parameters
    ----------
    scheduler : str
        Address of the scheduler, as ``tcp://host:8786``.
    work : callable
        Importable by the workers; it must be safe to run twice.
    tasks : iterable of tuples
        Arguments of `work`; drawn from as workers become free.

    Raises
    ------
    DmdataError
        If Dask is not installed, the cluster cannot be reached, or a task was lost with several workers.
    Exception
        What `work` raised.
    """
    client = connect(scheduler)
    with client:
        left = iter(tasks)
        n_threads = sum(client.nthreads().values()) or 1
        first = itertools.islice(left, _TASKS_A_THREAD * n_threads)
        pending = {client.submit(work, *arguments, pure=False) for arguments in first}
        with client.as_current():
            futures = dask_distributed().as_completed(pending)
        try:
            for future in futures:
                pending.discard(future)
                result = _result(future, scheduler)
                for arguments in itertools.islice(left, 1):
                    following = client.submit(work, *arguments, pure=False)
                    pending.add(following)
                    futures.add(following)
                yield result
        finally:
            client.cancel(list(pending))


def connect(scheduler: Any) -> Any:
    """Return a client of a Dask cluster, given its scheduler's address or an object of Dask's that runs one.

    Raises
    ------
    DmdataError
        If Dask is not installed, or the cluster cannot be reached.
    """
    try:
        return dask_distributed().Client(scheduler, set_as_default=False, timeout="10s")
    except (OSError, ValueError, TypeError) as error:
        raise DmdataError(f"no Dask scheduler answers at {scheduler} ({error}); check its address") from error


def dask_distributed() -> Any:
    """Import Dask's `distributed`, which is optional.

    Raises
    ------
    DmdataError
        If it is not installed.
    """
    try:
        return importlib.import_module("distributed")
    except ImportError as error:
        raise DmdataError("a cluster needs Dask; pip install 'dmdata[dask]'") from error


def _result(future: Any, scheduler: str) -> Any:
    from distributed.scheduler import KilledWorker

    try:
        return future.result()
    except KilledWorker as error:
        raise DmdataError(
            f"every worker that ran a task was lost: {error}; give workers more memory (each thread needs the "
            f"memory of the copy), and see the logs of {scheduler}"
        ) from error


class _SharedEnvironment:
    """Environment variables of tasks: tasks of one caller run at the same time, those of another wait."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._set: dict[str, str | None] | None = None
        self._before: dict[str, str | None] = {}
        self._n_tasks = 0

    @contextlib.contextmanager
    def set_to(self, variables: dict[str, str | None]) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._set in (None, variables))
            if self._set is None:
                self._before = {name: os.environ.get(name) for name in variables}
                _set_variables(variables)
            self._set = variables
            self._n_tasks += 1
        try:
            yield
        finally:
            with self._changed:
                self._n_tasks -= 1
                if not self._n_tasks:
                    _set_variables(self._before)
                    self._set = None
                    self._changed.notify_all()


_ENVIRONMENT = _SharedEnvironment()


def _set_variables(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
