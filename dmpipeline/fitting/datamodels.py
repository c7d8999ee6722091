"""Datamodels: for every target, a sparse linear model from the training subset to the trained model's output.

In the space of raw masks an output is predicted by `masks @ weight + bias`; weights that come from elsewhere may be of
standardised masks, and say so once that is known. A saved file is complete or not there.
"""

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

import dmdata
from dmdata.errors import CatalogError, FormatError, SelectionError
from dmdata.layout.archives import TAIL_BYTES
from dmdata.layout.formats import PT_HEAD_BYTES
from dmdata.release import opening, pricing
from dmdata.shown import as_html
from dmpipeline.errors import SpecError
from dmpipeline.fitting.influences import Influences, largest
from dmpipeline.fitting.limits import LinearLimit
from dmpipeline.fitting.pairs.terms import PairTerms
from dmpipeline.moments.arrays import RowSliceable, as_rows, read_masks
from dmpipeline.moments.moments import BLOCK_ROWS
from dmpipeline.moments.tensors import save_tensors

SpaceName = Literal["raw", "standardised"]


@dataclass(frozen=True, slots=True, eq=False)
class Certificate:
    """How near its optimum each target's fit is; measured in float64 from the weights themselves.

    Of a fit with a prior, which is a mixture of several, it is the worst of those that count in it. How they are mixed
    is chosen on the validation rows and has no optimum to certify.

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
    """A fitted set of datamodels, one column a target.

    Attributes
    ----------
    weight : array of float32, shape (n_train, n_targets)
        Change of the output when the example joins the subset, in the output's units.
    bias : array of float32, shape (n_targets,)
        Predicted output of the empty subset; of the average subset where `space` is "standardised".
    lam : array of float32, shape (n_targets,)
        The chosen strength in ``1/2n |y - Xw|^2 + lam |w|_1``, where X are masks centred and scaled to unit variance.
        Of a mixture, that of the fit that counts most.
    certificate : Certificate or None
        None where the set was read from a file without one, as the release's.
    validation_error : array of float64, shape (n_targets,), or None
        Mean squared error on the rows held out to choose lam, of the weights fitted to the others, mixed if there was
        a prior. None where the set was read from a file without it.
    prior_strength : float or None
        How far the prior of the fit was trusted: the share of guided fits in the mixture, from 0, not at all, to 1;
        None if there was none.
    space : {"raw", "standardised"}
        What a weight is multiplied by: a mask's 0 or 1, or (mask - mean) / deviation as in the reference solver, where
        mean is the share of subsets that hold the example. `fit` returns raw ones; `dmpipeline.fitting.readings` finds
        out.
    fitted_masks : array of uint64, shape (n_models,), or None
        A key of each mask that was fitted on, those that chose lam included
        (`dmpipeline.moments.identity.keys_of_masks`): `evaluate` warns of scores on them. None where it is not known.
    pairs : PairTerms or None
        What two examples do together, beyond the sum of both; None for a linear datamodel. All other attributes are of
        the linear part.
    limit : LinearLimit or None
        What linear datamodels could explain with endlessly many models; None where it is not known.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    lam: NDArray[np.float32]
    certificate: Certificate | None = None
    validation_error: NDArray[np.float64] | None = None
    prior_strength: float | None = None
    space: SpaceName = "raw"
    fitted_masks: NDArray[np.uint64] | None = None
    pairs: PairTerms | None = None
    limit: LinearLimit | None = None

    def __repr__(self) -> str:
        nonzero = np.count_nonzero(self.weight) / max(self.n_targets, 1)
        return (
            f"<Datamodels: {self.n_targets} targets, {self.n_train} examples, {nonzero:.0f} nonzero weights a target, "
            f"{self.space}{'' if self.pairs is None else f', pairs of {self.pairs.k} examples a target'}>"
        )

    def _repr_html_(self) -> str:
        nonzero = np.count_nonzero(self.weight) / max(self.n_targets, 1)
        facts = {"targets": self.n_targets, "training examples": self.n_train, "nonzero weights a target": nonzero}
        gap = None if self.certificate is None else f"{self.certificate.gap.max(initial=0):.1e} of the variance"
        pairs = None if self.pairs is None else f"of {self.pairs.k} examples a target"
        return as_html("Datamodels", facts | {"worst duality gap": gap, "space": self.space, "pair terms": pairs})

    @property
    def linear(self) -> Self:
        """The linear part alone."""
        return replace(self, pairs=None)

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
            Masks of another width, or with other values than 0 and 1; or weights that are not raw.
        """
        if self.space != "raw":
            raise SpecError(
                "these weights are of standardised masks; turn them with .to_raw(mean=0.5), or whichever share of the "
                "subsets holds an example"
            )
        masks = as_rows(masks, "masks")
        shape = tuple(masks.shape)
        if len(shape) != 2 or shape[1] != self.n_train:
            turned = "; hand in masks.T" if len(shape) == 2 and shape[0] == self.n_train else ""
            raise SpecError(
                f"masks have shape {shape}; these datamodels expect (n_models, {self.n_train}){turned}", shape=shape
            )
        predicted = np.empty((masks.shape[0], self.n_targets), np.float32)
        for first in range(0, len(predicted), block_rows):
            last = min(first + block_rows, len(predicted))
            block = read_masks(masks, first, last).astype(np.float32)
            np.matmul(block, self.weight, out=predicted[first:last])
            if self.pairs is not None:
                self.pairs.add_to(predicted[first:last], block)
        predicted += self.bias
        return predicted

    def top(self, target: int, k: int = 10) -> Influences:
        """List the training examples that help and hurt a target most.

        Parameters
        ----------
        target : int
            Column of the weights.
        k : int
            How many of each kind, at most: weights of zero are neither.

        Raises
        ------
        SpecError
            If there is no such target, or k is not 1 or more.
        """
        if not 0 <= target < self.n_targets:
            raise SpecError(f"there is no target {target}; choose 0 to {self.n_targets - 1:,}", value=target)
        weight = self.weight[:, target]
        return Influences(largest(weight, k), index=target, n_nonzero=int(np.count_nonzero(weight)))

    def read_as(self, space: SpaceName) -> Self:
        """Take the same numbers for weights of the other space, where that is what they are."""
        if space not in ("raw", "standardised"):
            raise SpecError(f"there is no space {space!r}; choose raw or standardised")
        return replace(self, space=space)

    def to_raw(self, *, mean: NDArray[np.float64] | float) -> Self:
        """Turn weights of standardised masks into those of raw ones, which predict the same.

        With deviations d = sqrt(mean (1 - mean)), a weight w becomes w / d, and the bias b becomes b - sum mean w / d.
        An example that is in all subsets or in none gets 0. `lam` is that of standardised masks in either space.

        Parameters
        ----------
        mean : array of float64, shape (n_train,), or float
            Share of the fitted subsets that hold each example: alpha, if it is not known for each.
        """
        if self.space == "raw":
            return self
        mean, deviation = self._spread(mean)
        inverse = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 0)
        weight = (self.weight * inverse[:, None]).astype(np.float32)
        return replace(self, weight=weight, bias=(self.bias - mean @ weight).astype(np.float32), space="raw")

    def to_standardised(self, *, mean: NDArray[np.float64] | float) -> Self:
        """Turn weights of raw masks into those of standardised ones; see `to_raw`."""
        if self.space == "standardised":
            return self
        mean, deviation = self._spread(mean)
        bias = (self.bias + mean @ self.weight).astype(np.float32)
        weight = (self.weight * deviation[:, None]).astype(np.float32)
        return replace(self, weight=weight, bias=bias, space="standardised")

    def _spread(self, mean: NDArray[np.float64] | float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        share = np.asarray(mean, np.float64)
        if share.shape not in ((), (self.n_train,)) or not ((share >= 0) & (share <= 1)).all():
            raise SpecError(
                f"mean {mean} is not a share of subsets for each of {self.n_train} examples; "
                "choose alpha, such as 0.5, or masks.mean(axis=0)"
            )
        share = np.broadcast_to(share, (self.n_train,))
        return share, np.sqrt(share * (1 - share))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the release's `.pt` form: a dict of the float32 tensors `weight`, `bias` and `lam`.

        What else is known goes next to them: `gap` and `kkt` of the certificate, `validation_error`, `standardised`
        where weights are not raw, `fitted_masks` as int64, the fields of `pairs` as `pair_examples` (int64),
        `pair_weight`, `pair_mean`, `pair_gap` and `pair_validation_error`, and those of `limit` as `limit_variance`,
        `limit_linear` and `limit_error`.
        The file is written next to its destination and moved into place, so a reader finds all of it or none.

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
        if self.space == "standardised":
            arrays["standardised"] = np.ones(self.n_targets)
        if self.fitted_masks is not None:
            arrays["fitted_masks"] = self.fitted_masks.view(np.int64)
        if self.pairs is not None:
            arrays |= {_pair(name): getattr(self.pairs, name) for name in _OF_PAIRS}
            arrays["pair_examples"] = self.pairs.examples.astype(np.int64)
        if self.limit is not None:
            arrays |= {f"limit_{name}": getattr(self.limit, name) for name in _OF_LIMIT}
        return save_tensors(arrays, path)

    @classmethod
    def load(
        cls,
        name: str | os.PathLike[str],
        *,
        catalog: dmdata.CatalogLike = None,
        targets: slice | NDArray[np.integer[Any]] | None = None,
        space: SpaceName | None = None,
        to: str | None = None,
    ) -> Self:
        """Read datamodels in the release's form; nothing in the file is unpickled or run.

        Parameters
        ----------
        name : str or path
            Of a `.pt`: a path, a URL, or a name in a catalog, as "cifar/50pct/test_datamodels".
        catalog : Catalog, path or URL, optional
            See `dmdata.load_catalog`.
        targets : slice or array of int, optional
            Read these alone: of weights in a bucket, only their bytes are paid.
        space : {"raw", "standardised"}, optional
            What the weights are multiplied by. If not given, what the file says; the release's says nothing, and is
            taken for raw: `dmpipeline.find_space` detects it.
        to : {"internet", "same-region", "cross-region"}, optional
            Where the bytes go, as for `dmdata.open`; `price_load` prices them.

        Raises
        ------
        FormatError
            Anything but `weight` (n_train, n_targets), `bias` (n_targets,) and `lam` (n_targets,), all real numbers.
        CatalogError, BudgetError, AccessError, ObjectMissingError, SourceError
            If there is no such file or it cannot be read; see `dmdata.open`.
        """
        opened = partial(_open_tensor, os.fspath(name), catalog=catalog, to=to)
        tensors = [opened(tensor) for tensor in _TENSORS]
        _check_tensors(*tensors)
        picked = slice(None) if targets is None else targets
        weight = np.asarray(tensors[0].oindex[:, picked], np.float32, order="C")
        bias, lam = (np.asarray(tensor.oindex[picked], np.float32) for tensor in tensors[1:])
        gap, kkt, validation_error, standardised, *limit = (
            _read_of_targets(opened(tensor, is_optional=True), tensors[1].shape, picked) for tensor in _OF_TARGETS
        )
        known = [array for array in limit if array is not None]
        loaded = cls(
            weight=weight,
            bias=bias,
            lam=lam,
            certificate=None if gap is None or kkt is None else Certificate(gap=gap, kkt=kkt),
            validation_error=validation_error,
            fitted_masks=_read_fitted_masks(opened(_OF_MODELS, is_optional=True)),
            pairs=_read_pairs({name: opened(_pair(name), is_optional=True) for name in _OF_PAIRS}, tensors[0], picked),
            limit=LinearLimit(*known) if len(known) == len(_OF_LIMIT) else None,
        )
        return loaded.read_as(space or ("raw" if standardised is None else "standardised"))


_TENSORS = ("weight", "bias", "lam")
_OF_LIMIT = ("variance", "linear", "error")
# there or not, a number a target each
_OF_TARGETS = ("gap", "kkt", "validation_error", "standardised", *(f"limit_{name}" for name in _OF_LIMIT))
_OF_MODELS = "fitted_masks"
_OF_PAIRS = ("examples", "weight", "mean", "gap", "validation_error")


def _pair(field: str) -> str:
    """Return the name under which a field of the pair terms is saved."""
    return f"pair_{field}"


def price_load(
    name: str | os.PathLike[str],
    *,
    catalog: dmdata.CatalogLike = None,
    targets: slice | NDArray[np.integer[Any]] | None = None,
    example: int | None = None,
    to: str | None = None,
) -> list[tuple[dmdata.Artifact, dmdata.Estimate]]:
    """Price what `Datamodels.load` reads, tensor by tensor, by what a catalog claims; an address's header is read.

    Takes and raises what `Datamodels.load` does. With `example` it prices the weights of that training example for all
    targets instead.
    """
    terms, chosen = opening.in_force(to, catalog)
    picked = slice(None) if targets is None else targets
    keys: dict[str, Any] = {"weight": (slice(None), picked)} | dict.fromkeys((*_TENSORS[1:], *_OF_TARGETS), (picked,))
    keys |= {_OF_MODELS: slice(None)} | {_pair(name): slice(None) if name == "mean" else picked for name in _OF_PAIRS}
    if example is not None:
        keys = {"weight": (example,)}
    priced: list[tuple[dmdata.Artifact, dmdata.Estimate]] = []
    for tensor, key in keys.items():
        try:
            found = opening.look_up(f"{os.fspath(name)}/{tensor}", terms, catalog=chosen)
            priced += opening.price_reading(found, terms, key=key)
        except (FormatError, CatalogError, SelectionError):  # one of another shape is not read
            if tensor in _TENSORS:
                raise
    first, price = priced[0]
    if first.at is None and price.n_requests:  # an object's header is read once, for all its tensors
        header = pricing.same_both_ways(PT_HEAD_BYTES + TAIL_BYTES, 1, terms, table=pricing.named_prices(first, terms))
        priced[0] = (first, pricing.total_of([price, header], terms))
    return priced


def _open_tensor(
    name: str, tensor: str, *, catalog: dmdata.CatalogLike, to: str | None, is_optional: bool = False
) -> Any:
    """Open a tensor; None for an optional one that a file, whose other tensors were opened, does not hold."""
    try:
        return dmdata.open(f"{name}/{tensor}", catalog=catalog, to=to).read_header()
    except (FormatError, CatalogError):
        if not is_optional:
            raise
        return None


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


def _read_of_targets(
    tensor: dmdata.LazyArray | None, shape: tuple[int, ...], picked: slice | NDArray[np.integer[Any]]
) -> NDArray[np.float64] | None:
    """Read a tensor of one number a target; None where there is none."""
    if tensor is None or tensor.shape != shape or tensor.dtype.kind != "f":
        return None
    return np.asarray(tensor.oindex[picked], np.float64)


def _read_pairs(
    tensors: dict[str, Any], weight: dmdata.LazyArray, picked: slice | NDArray[np.integer[Any]]
) -> PairTerms | None:
    """Read pair terms; None where there are none, FormatError where they do not fit the weights."""
    if all(tensor is None for tensor in tensors.values()):
        return None
    n_train, n_targets = weight.shape
    shapes = {name: None if tensor is None else tuple(tensor.shape) for name, tensor in tensors.items()}
    k = (shapes["examples"] or (0, 0))[-1]
    expected = {"examples": (n_targets, k), "weight": (n_targets, k * (k - 1) // 2), "mean": (n_train,)}
    expected |= dict.fromkeys(("gap", "validation_error"), (n_targets,))
    arrays = {}
    if shapes == expected:
        arrays = {
            name: np.asarray(tensor[:] if name == "mean" else tensor.oindex[picked]) for name, tensor in tensors.items()
        }
    if not arrays or (arrays["examples"] < 0).any() or (arrays["examples"] >= n_train).any():
        raise FormatError(f"{weight.url} holds pair terms {shapes}; expected {expected}", url=weight.url)
    return PairTerms(
        examples=arrays["examples"].astype(np.int32),
        weight=arrays["weight"].astype(np.float32),
        mean=arrays["mean"].astype(np.float32),
        gap=arrays["gap"].astype(np.float64),
        validation_error=arrays["validation_error"].astype(np.float64),
    )


def _read_fitted_masks(tensor: dmdata.LazyArray | None) -> NDArray[np.uint64] | None:
    if tensor is None or tensor.ndim != 1 or tensor.dtype != np.int64:
        return None
    return np.asarray(tensor[:]).view(np.uint64)
