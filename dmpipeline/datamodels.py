"""Datamodels: for every target, a sparse linear model from the training subset to the trained model's output.

They are kept in the space of the raw masks: an output is predicted by `masks @ weight + bias`. A saved file is
complete or not there.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

import dmdata
from dmdata.errors import FormatError
from dmpipeline.errors import SpecError
from dmpipeline.moments import BLOCK_ROWS, RowSliceable, as_binary
from dmpipeline.tensors import save_tensors


@dataclass(frozen=True, slots=True, eq=False)
class Certificate:
    """How near its optimum each target's fit is; measured in float64 from the weights themselves.

    Attributes
    ----------
    gap : array of float64, shape (n_targets,)
        Duality gap as a share of the output's variance: the objective is at most this far above its minimum.
    kkt : array of float64, shape (n_targets,)
        Worst violation of an optimality condition over all examples, as a share of lam.
    """

    gap: NDArray[np.float64]
    kkt: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Datamodels:
    """A fitted set of datamodels, one column a target, in raw-mask space.

    Attributes
    ----------
    weight : array of float32, shape (n_train, n_targets)
        Change of the output when the example joins the subset, in the output's units.
    bias : array of float32, shape (n_targets,)
        Predicted output of the empty subset.
    lam : array of float32, shape (n_targets,)
        The chosen strength in 1/2n |y - Xw|^2 + lam |w|_1, where X are masks centred and scaled to unit variance.
    certificate : Certificate or None
        None where the set was read from a file without one, as the release's.
    validation_error : array of float64, shape (n_targets,), or None
        Mean squared error on the rows held out to choose lam, of the weights fitted to the others. None where the set
        was read from a file without it.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    lam: NDArray[np.float32]
    certificate: Certificate | None = None
    validation_error: NDArray[np.float64] | None = None

    def __repr__(self) -> str:
        nonzero = np.count_nonzero(self.weight) / max(self.n_targets, 1)
        return (
            f"<Datamodels: {self.n_targets} targets, {self.n_train} examples, {nonzero:.0f} nonzero weights a target>"
        )

    @property
    def n_train(self) -> int:
        """Training examples a mask covers."""
        return int(self.weight.shape[0])

    @property
    def n_targets(self) -> int:
        """Targets predicted."""
        return int(self.weight.shape[1])

    def predict(self, masks: RowSliceable, *, block_rows: int = BLOCK_ROWS) -> NDArray[np.float32]:
        """Predict the outputs of models trained on these subsets, reading `block_rows` masks at a time.

        Parameters
        ----------
        masks : bool or 0/1, shape (n_models, n_train)

        Returns
        -------
        outputs : array of float32, shape (n_models, n_targets)

        Raises
        ------
        SpecError
            Masks of another width, or with other values than 0 and 1.
        """
        if not hasattr(masks, "shape"):
            raise SpecError(f"masks are a {type(masks).__name__}; hand in an array, such as numpy.asarray(masks)")
        if len(masks.shape) != 2 or masks.shape[1] != self.n_train:
            raise SpecError(
                f"masks have shape {masks.shape}; these datamodels expect (n_models, {self.n_train})", shape=masks.shape
            )
        predicted = np.empty((masks.shape[0], self.n_targets), np.float32)
        for first in range(0, len(predicted), block_rows):
            block = as_binary(np.asarray(masks[first : first + block_rows]), first=first)
            np.matmul(block.astype(np.float32), self.weight, out=predicted[first : first + block_rows])
        predicted += self.bias
        return predicted

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the release's `.pt` form: a dict of the float32 tensors `weight`, `bias` and `lam`.

        What else is known goes beside them as float64 tensors: `gap` and `kkt` of the certificate, `validation_error`.
        The file is written beside its destination and moved into place, so a reader finds all of it or none.

        Raises
        ------
        SpecError
            If the path does not end in ``.pt``, by which the form is known when it is read.
        RunError
            If the file cannot be written.
        """
        arrays: dict[str, NDArray[Any]] = {name: np.array(getattr(self, name), np.float32) for name in _TENSORS}
        if self.certificate is not None:
            arrays |= {"gap": self.certificate.gap, "kkt": self.certificate.kkt}
        if self.validation_error is not None:
            arrays["validation_error"] = self.validation_error
        return save_tensors(arrays, path)

    @classmethod
    def load(cls, name: str | os.PathLike[str], *, catalog: dmdata.CatalogLike = None) -> Self:
        """Read datamodels in the release's form; nothing in the file is unpickled or run.

        Parameters
        ----------
        name : str or path
            Of a `.pt`: a path, a URL, or a name in a catalog, as "cifar/50pct/test_datamodels".
        catalog : Catalog, path or URL, optional
            See `dmdata.load_catalog`.

        Raises
        ------
        FormatError
            Anything but `weight` (n_train, n_targets), `bias` (n_targets,) and `lam` (n_targets,), all real numbers.
        CatalogError, BudgetError, AccessError, ObjectMissingError, SourceError
            If there is no such file or it cannot be read; see `dmdata.open`.
        """
        tensors = [dmdata.open(f"{os.fspath(name)}/{tensor}", catalog=catalog) for tensor in _TENSORS]
        _check_tensors(*tensors)
        weight, bias, lam = (np.asarray(tensor[...], np.float32, order="C") for tensor in tensors)
        gap, kkt, validation_error = (
            _read_optional(f"{os.fspath(name)}/{tensor}", lam.shape, catalog)
            for tensor in ("gap", "kkt", "validation_error")
        )
        certificate = None if gap is None or kkt is None else Certificate(gap=gap, kkt=kkt)
        return cls(weight=weight, bias=bias, lam=lam, certificate=certificate, validation_error=validation_error)


_TENSORS = ("weight", "bias", "lam")


def _check_tensors(weight: dmdata.LazyArray, bias: dmdata.LazyArray, lam: dmdata.LazyArray) -> None:
    if len(weight.shape) != 2 or bias.shape != weight.shape[1:] or lam.shape != weight.shape[1:]:
        raise FormatError(
            f"{weight.url} holds weight {weight.shape}, bias {bias.shape} and lam {lam.shape}; "
            "expected (n_train, n_targets), (n_targets,) and (n_targets,)",
            url=weight.url,
        )
    for tensor in (weight, bias, lam):
        if tensor.dtype.kind != "f":
            raise FormatError(f"{tensor.name} has dtype {tensor.dtype}; expected floating point", url=tensor.url)


def _read_optional(name: str, shape: tuple[int, ...], catalog: dmdata.CatalogLike) -> NDArray[np.float64] | None:
    """Read a tensor of one number a target, or None where a file whose other tensors were read has no such."""
    try:
        tensor = dmdata.open(name, catalog=catalog)
    except FormatError:
        return None
    return np.asarray(tensor[...], np.float64) if tensor.shape == shape and tensor.dtype.kind == "f" else None
