"""What libraries do to a lazy array is one planned read of what was asked, or an error before the first byte."""

import copy
import functools
import math
import operator
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import dask.array
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import sklearn.utils
import torch
import xarray
from PIL import Image
from servers.loopback import LoopbackS3
from small_release import publish

import dmdata
from dmdata.errors import BudgetError

mpl.use("agg")

NAME = "toy/50pct/test_margins"
VALUES = np.arange(300 * 20, dtype=np.float32).reshape(300, 20)
LINE_NAME = "toy/50pct/line"
LINE = np.arange(40.0)
MARK = np.ones((300, 20), np.float32)


@pytest.fixture(autouse=True)
def nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the server for what is read again."""
    monkeypatch.setenv("DMDATA_CACHE_GIB", "0")


@pytest.fixture
def catalog(s3: LoopbackS3, tmp_path: Path) -> str:
    return publish(s3, {NAME: VALUES, LINE_NAME: LINE}, tmp_path)


@pytest.fixture
def lazy(s3: LoopbackS3, catalog: str) -> dmdata.LazyArray:
    opened = dmdata.open(NAME, catalog=catalog)
    s3.reset_log()
    return opened


@pytest.fixture
def line(s3: LoopbackS3, catalog: str) -> dmdata.LazyArray:
    opened = dmdata.open(LINE_NAME, catalog=catalog)
    s3.reset_log()
    return opened


def plot(lazy: Any) -> np.ndarray[Any, Any]:
    from matplotlib.figure import Figure

    return np.asarray(Figure().subplots().imshow(lazy).get_array())


READ_ONCE: dict[str, Callable[[Any], Any]] = {
    "np.asarray": np.asarray,
    "np.array": np.array,
    "np.asarray dtype": lambda a: np.asarray(a, np.float64),
    "np.ascontiguousarray": np.ascontiguousarray,
    "np.from_dlpack": np.from_dlpack,
    "np.random.permutation": lambda a: np.sort(np.random.default_rng(0).permutation(a), axis=0),
    "torch.asarray": torch.asarray,
    "torch.as_tensor": torch.as_tensor,
    "torch.tensor": torch.tensor,
    "torch.tensor dtype": lambda a: torch.tensor(a, dtype=torch.float64),
    "torch.Tensor": torch.Tensor,
    "torch.from_dlpack": torch.from_dlpack,
    "new_tensor": lambda a: torch.zeros(1).new_tensor(a),
    "pd.DataFrame": lambda a: pd.DataFrame(a).to_numpy(),
    "xarray.DataArray": lambda a: xarray.DataArray(a).to_numpy(),
    "xarray.Variable": lambda a: xarray.Variable(("model", "example"), a).to_numpy(),
    "dask.array.from_array": lambda a: dask.array.from_array(a, chunks=-1).compute(scheduler="sync"),
    "to_dask": lambda a: a.to_dask().compute(scheduler="sync"),
    "sklearn": sklearn.utils.check_array,
    "matplotlib": plot,
}


def test_what_asks_for_the_array_gets_it_by_one_planned_read(s3: LoopbackS3, lazy: dmdata.LazyArray) -> None:
    plan = lazy.plan()
    for name, consume in READ_ONCE.items():
        s3.reset_log()
        np.testing.assert_array_equal(np.asarray(consume(lazy)), VALUES, err_msg=name)
        assert (s3.n_requests, s3.n_bytes) == (plan.n_requests, plan.n_bytes) == (1, VALUES.nbytes), name
        with dmdata.budget(usd=0), pytest.raises(BudgetError):
            consume(lazy)
        assert s3.n_requests == plan.n_requests, f"a budget holds {name}, too"


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "sum": np.sum,
    "mean": np.mean,
    "argmax": np.argmax,
    "count_nonzero": np.count_nonzero,
    "exp": lambda a: np.exp(a / 1e4) if isinstance(a, np.ndarray) else np.exp(np.divide(a, 1e4)),
    "equal": lambda a: np.equal(a, 3),
    "where": lambda a: np.where(a, 1, 0),
    "matmul": lambda a: np.matmul(a, np.ones(20)),
    "einsum": lambda a: np.einsum("ij->i", a),
    "svd": lambda a: np.linalg.svd(a, compute_uv=False),
    "allclose": lambda a: np.allclose(a, VALUES),
    "array_equal": lambda a: np.array_equal(a, VALUES),
    "concatenate": lambda a: np.concatenate([VALUES, a]),
    "vstack": lambda a: np.vstack((a, VALUES)),
    "assignment": lambda a: MARK.copy().__setitem__(slice(None), a),
}


def test_numpys_functions_read_once_and_answer_as_of_the_values(s3: LoopbackS3, lazy: dmdata.LazyArray) -> None:
    for name, function in FUNCTIONS.items():
        s3.reset_log()
        np.testing.assert_array_equal(function(lazy), function(VALUES), err_msg=name)
        assert s3.n_requests == lazy.plan().n_requests, name


def test_one_dimension_becomes_a_series_and_a_choice_by_one_read(s3: LoopbackS3, line: dmdata.LazyArray) -> None:
    np.testing.assert_array_equal(pd.Series(line).to_numpy(), LINE)
    assert s3.n_requests == 1
    assert np.random.default_rng(0).choice(line) in LINE
    assert s3.n_requests == 2


OPERATORS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "==": (lambda a: a == 3, "lazy[...] == 3"),
    "!=": (lambda a: a != 0, "lazy[...] != 0"),
    "<": (lambda a: a < 1.5, "lazy[...] < 1.5"),
    ">=": (lambda a: a >= 1, "lazy[...] >= 1"),
    "reflected ==": (lambda a: 3 == a, "lazy[...] == 3"),  # noqa: SIM300 - that is what is tested
    "== None": (lambda a: a == None, "lazy[...] == other"),  # noqa: E711 - that is what is tested
    "== lazy": (lambda a: a == a, "lazy[...] == other"),
    "== array": (lambda a: a == MARK, "lazy[...] == other"),
    "array ==": (lambda a: MARK == a, "lazy[...] == other"),  # noqa: SIM300 - that is what is tested
    "array >": (lambda a: MARK > a, "lazy[...] < other"),  # noqa: SIM300 - that is what is tested
    "number of numpy ==": (lambda a: np.float32(3) == a, "lazy[...] == 3"),
    "count of equals": (lambda a: np.count_nonzero(a == 3), "lazy[...] == 3"),
    "+": (lambda a: a + 1, "lazy[...] + 1"),
    "reflected -": (lambda a: 1 - a, "1 - lazy[...]"),
    "array *": (lambda a: MARK * a, "other * lazy[...]"),
    "number of numpy *": (lambda a: np.float32(2) * a, "2.0 * lazy[...]"),
    "in place": (lambda a: operator.iadd(a, 1), "lazy[...] + 1"),
    "array in place": (lambda a: operator.iadd(MARK.copy(), a), "other + lazy[...]"),
    "tensor +": (lambda a: torch.ones(300, 20) + a, "other + lazy[...]"),
    "tensor ==": (lambda a: torch.ones(300, 20) == a, "lazy[...] == other"),
    "@": (lambda a: a @ np.ones(20), "lazy[...] @ other"),
    "array @": (lambda a: np.ones(300) @ a, "other @ lazy[...]"),
    "**": (lambda a: a**2, "lazy[...] ** 2"),
    "pow": (lambda a: pow(a, 2, 5), "lazy[...] ** 2"),
    "divmod": (lambda a: divmod(a, 2), "divmod(lazy[...], 2)"),
    "//": (lambda a: a // 2, "lazy[...] // 2"),
    "&": (lambda a: a & True, "lazy[...] & True"),
    "-": (operator.neg, "-lazy[...]"),
    "~": (operator.invert, "~lazy[...]"),
    "abs": (abs, "abs(lazy[...])"),
    "round": (round, "round(lazy[...])"),
    "int": (int, "int(lazy[...])"),
    "float": (float, "float(lazy[...])"),
    "floor": (math.floor, "float(lazy[...])"),
    "complex": (complex, "complex(lazy[...])"),
    "in": (lambda a: 3 in a, "3 in lazy[...]"),
    "iter": (iter, "lazy[0:100]"),
    "list": (list, "lazy[0:100]"),
    "reversed": (reversed, "lazy[::-1]"),
    "zip": (lambda a: dict(zip(a, a, strict=True)), "lazy[0:100]"),
    "enumerate": (enumerate, "lazy[0:100]"),
    "sum": (sum, "lazy[0:100]"),
    "max": (max, "lazy[0:100]"),
    "sorted": (sorted, "lazy[0:100]"),
    "unpacking": (lambda a: [*a], "lazy[0:100]"),
    "np.fromiter": (lambda a: np.fromiter(a, float), "lazy[0:100]"),
    "assignment": (lambda a: operator.setitem(a, 0, 1), "lazy[...]"),
}


def test_operators_and_iteration_are_refused_with_the_remedy_before_a_byte(
    s3: LoopbackS3, lazy: dmdata.LazyArray
) -> None:
    for name, (use, remedy) in OPERATORS.items():
        with pytest.raises(TypeError) as caught:
            use(lazy)
        assert NAME in str(caught.value), name
        assert remedy in str(caught.value), name
        assert not s3.log, name


def test_truth_is_refused_as_numpys_is(s3: LoopbackS3, lazy: dmdata.LazyArray) -> None:
    for use in (bool, operator.not_, lambda a: a or 1, lambda a: 1 if a else 2):
        with pytest.raises(ValueError, match=r"lazy\[\.\.\.\]\.any\(\)"):
            use(lazy)
    assert not s3.log


NO_PROTOCOL: dict[str, Callable[[Any], Any]] = {
    "memoryview": memoryview,
    "bytes": bytes,
    "np.frombuffer": np.frombuffer,
    "np.asarray copy": lambda a: np.asarray(a, copy=False),
    "np.array copy": lambda a: np.array(a, copy=False),
    "np.from_dlpack copy": lambda a: np.from_dlpack(a, copy=False),
    "np.concatenate": np.concatenate,
    "np.stack": np.stack,
    "np.choose": lambda a: np.choose([0], a),
    "torch.from_numpy": torch.from_numpy,
    "torch.frombuffer": lambda a: torch.frombuffer(a, dtype=torch.float32),
    "torch.stack": torch.stack,
    "torch.stack list": lambda a: torch.stack([a, a]),
    "torch.cat": lambda a: torch.cat([a, a]),
    "TensorDataset": lambda a: torch.utils.data.TensorDataset(a),
    "random.sample": lambda a: random.sample(a, 2),
    "Image": Image.fromarray,
    "operator.index": operator.index,
    "range": range,
    "join": lambda a: "".join(a),
    "set": set,
    "pyarrow.array": lambda a: a.__arrow_array__(),
}


def test_what_is_no_array_protocol_is_refused_before_a_byte(s3: LoopbackS3, lazy: dmdata.LazyArray) -> None:
    for name, use in NO_PROTOCOL.items():
        with pytest.raises((TypeError, ValueError, AttributeError, BufferError)):
            use(lazy)
        assert not s3.log, name


ATTRIBUTES = {
    "T": "lazy[...].T,",
    "mean": "lazy[...].mean(), or stay lazy: lazy.to_dask().mean()",
    "sum": "lazy[...].sum()",
    "astype": "lazy[...].astype()",
    "reshape": "lazy[...].reshape()",
    "item": "lazy[...].item()",
    "tolist": "lazy[...].tolist()",
    "copy": "lazy[...].copy()",
    "numpy": "lazy[...]",
    "values": "lazy[...]",
}


def test_an_attribute_of_arrays_is_missing_with_the_remedy(s3: LoopbackS3, lazy: dmdata.LazyArray) -> None:
    for name, remedy in ATTRIBUTES.items():
        assert not hasattr(lazy, name)
        with pytest.raises(AttributeError) as caught:
            getattr(lazy, name)
        assert remedy in str(caught.value)
        assert caught.value.name == name
    with pytest.raises(AttributeError, match=r"has no attribute 'shap'$"):
        lazy.shap  # type: ignore[attr-defined] # noqa: B018 - that is what is tested
    assert not s3.log


def test_a_lazy_array_stays_a_key_a_member_and_something_to_copy(s3: LoopbackS3, lazy: dmdata.LazyArray) -> None:
    assert {lazy: 1}[lazy] == 1
    assert lazy in [lazy]
    assert [lazy].index(lazy) == 0
    assert functools.lru_cache(lambda array: array.shape)(lazy) == VALUES.shape
    for other in (copy.copy(lazy), copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy))):
        assert (other.name, other.shape, other.url) == (lazy.name, lazy.shape, lazy.url)
    assert dask.base.tokenize(lazy) == dask.base.tokenize(lazy)
    assert isinstance(dmdata.LazyArray.__hash__(lazy), int)
    assert (lazy.ndim, len(lazy), lazy.size) == (2, 300, VALUES.size)
    assert not s3.log


def test_several_lazy_arrays_are_read_once_each(s3: LoopbackS3, lazy: dmdata.LazyArray) -> None:
    for join in (np.stack, np.array, lambda arrays: np.concatenate(arrays).reshape(2, 300, 20)):
        s3.reset_log()
        np.testing.assert_array_equal(join([lazy, lazy]), np.stack([VALUES, VALUES]))
        assert s3.n_requests == 2


def test_torchs_loader_reads_a_batch_at_once(s3: LoopbackS3, lazy: dmdata.LazyArray) -> None:
    batches = list(torch.utils.data.DataLoader(lazy, batch_size=100))  # type: ignore[arg-type] # no Dataset of torch's
    np.testing.assert_array_equal(torch.cat(batches), VALUES)
    assert s3.n_requests == 3
    s3.reset_log()
    some = torch.utils.data.Subset(lazy, [5, 3, 200])  # type: ignore[arg-type] # no Dataset of torch's
    (batch,) = torch.utils.data.DataLoader(some, batch_size=3)
    np.testing.assert_array_equal(batch, VALUES[[5, 3, 200]])
    assert s3.n_requests == lazy.plan(([5, 3, 200],)).n_requests


def test_rows_by_scikit_learns_split_are_one_read_each(s3: LoopbackS3, lazy: dmdata.LazyArray) -> None:
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(lazy, shuffle=False)
    np.testing.assert_array_equal(np.concatenate([train, test]), VALUES)
    assert s3.n_requests == 2


def test_torch_gets_another_byte_order_right(s3: LoopbackS3, tmp_path: Path) -> None:
    lazy = dmdata.open(LINE_NAME, catalog=publish(s3, {LINE_NAME: LINE.astype(">f4")}, tmp_path))
    s3.reset_log()
    np.testing.assert_array_equal(torch.tensor(lazy), LINE)
    assert s3.n_requests == 1


def test_torch_pays_for_nothing_that_it_cannot_hold(s3: LoopbackS3, line: dmdata.LazyArray) -> None:
    # as of an array of dates, whichever ways there are to open one
    dates = replace(line, layout=replace(line.layout, dtype=np.dtype("<M8[D]")))
    for convert in (torch.tensor, torch.asarray, np.from_dlpack):
        with pytest.raises(BufferError, match=r"use lazy\[\.\.\.\]"):
            convert(dates)
    assert not s3.log
