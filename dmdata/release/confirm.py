"""What of a catalog's claims its source confirms: object by object, by reading headers again.

Size, ETag, shape and dtype are what the object's own header and the store say now. A digest is compared with the one
that was recorded when the object was last read whole under this ``DMDATA_HOME``: nothing is read whole for that.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from dmdata.bodies import InZarr
from dmdata.catalog.entries import ArraySchema, Artifact, Basis, Catalog
from dmdata.errors import AccessError, DmdataError, FormatError, ObjectMissingError, SourceError
from dmdata.layout.formats import Layout, stored_as
from dmdata.money.prices import Estimate, Terms
from dmdata.objects.address import ObjectState
from dmdata.reading import digests
from dmdata.reading.headers import NPY, forget_header, read_header
from dmdata.release.opening import address_of, transport_to
from dmdata.release.pricing import price_header

Verdict: TypeAlias = Literal["confirmed", "differs", "missing", "not checked"]

_AT_ONCE = 16
# what torch writes next to the arrays: a size that was inferred from these does not count it
_PT_DIRECTORY_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Answer:
    """What the source answers about one object of a catalog.

    Attributes
    ----------
    name : str
    verdict : {"confirmed", "differs", "missing", "not checked"}
    words : tuple of str
        What differs, or could not be looked at, and why.
    state : ObjectState or None
        None where the object was not reached, or is a Zarr array.
    sha256 : str or None
        As recorded when this object was read whole.
    """

    name: str
    verdict: Verdict
    words: tuple[str, ...] = ()
    state: ObjectState | None = None
    sha256: str | None = None


def prices(artifacts: Sequence[Artifact], terms: Terms) -> list[tuple[Artifact, Estimate]]:
    """Price what `confirm` reads, upper bound."""
    return [
        (artifact, price_header(artifact.stored.format, terms))
        for artifact in artifacts
        if artifact.stored.format != "zarr"
    ]


def confirm(
    artifacts: Sequence[Artifact], terms: Terms, *, progress: Callable[[int, int], object] | None = None
) -> list[Answer]:
    """Compare claims of objects with what lies there; in the order given.

    Parameters
    ----------
    artifacts : sequence of Artifact
        Whole objects, not members.
    terms : Terms
        Of the headers: decides their price.
    progress : callable, optional
        Called with the number of objects done, and of all.

    Raises
    ------
    BudgetError
    AccessError
        If not one object may be read.
    """
    found: dict[str, Answer | DmdataError] = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        futures = {pool.submit(_look_at, artifact, terms): artifact.name for artifact in artifacts}
        try:
            for future in as_completed(futures):
                found[futures[future]] = future.result()
                if progress:
                    progress(len(found), len(futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    refusals = [answer for answer in found.values() if isinstance(answer, AccessError)]
    if refusals and len(refusals) == len(found):
        raise refusals[0]
    return [_answer(artifact.name, found[artifact.name]) for artifact in artifacts]


def measured(catalog: Catalog, answers: Sequence[Answer]) -> Catalog:
    """Mark what was confirmed as measured, with the ETag, size and digest that were found."""
    confirmed = {answer.name: answer for answer in answers if answer.verdict == "confirmed"}
    document: dict[str, Any] = catalog.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    for artifact in catalog.artifacts():
        answer = confirmed.get(artifact.name)
        if answer is None:
            continue
        dataset, alpha, array = artifact.name.split("/")
        entry = document["datasets"][dataset]["alphas"][alpha]["arrays"][array]
        if answer.state is not None:
            entry["n_bytes"] = answer.state.n_bytes
            if answer.state.etag is not None and not address_of(artifact).is_local:
                entry["etag"] = answer.state.etag
        if answer.sha256 is not None:
            entry["sha256"] = answer.sha256
        looked_at = ("key", "format", "shape", "dtype", "n_bytes")
        entry["basis"] |= {fact: str(Basis.MEASURED) for fact in looked_at if fact in entry["basis"]}
    return Catalog.model_validate(document)


def _answer(name: str, found: Answer | DmdataError) -> Answer:
    if isinstance(found, Answer):
        return found
    if isinstance(found, ObjectMissingError):
        return Answer(name, "missing", (str(found),))
    if isinstance(found, AccessError):
        # others of the same catalog may be read; and S3 refuses a missing key to a reader who may not list
        return Answer(name, "missing", ("refused, although others may be read: there is likely no such key",))
    return Answer(name, "differs" if isinstance(found, FormatError) else "not checked", (str(found),))


def _look_at(artifact: Artifact, terms: Terms) -> Answer | DmdataError:
    stored, address = artifact.stored, address_of(artifact)
    if stored.format == "zarr":
        if not address.is_local:
            return Answer(artifact.name, "not checked", ("a Zarr store in a bucket is not read from there",))
        words = []
        for name, schema in ({NPY: artifact.schema} if artifact.schema else dict(stored.members)).items():
            try:
                array = InZarr(f"{artifact.url}/{name}" if name else artifact.url).open()
            except FormatError as error:
                return error
            words += _differences(name, schema, array.shape, np.dtype(array.dtype), "")
        return Answer(artifact.name, "differs" if words else "confirmed", tuple(words))
    forget_header(address)  # what is remembered is not an answer of the source
    try:
        header = read_header(transport_to(artifact, artifact.name, terms), kind=stored.format, wanted=None)
    except (AccessError, FormatError, SourceError) as error:
        return error
    state, recorded = header.state, digests.recall(address, header.state)
    words = _states_differ(artifact, state, recorded)
    claimed = {NPY: artifact.schema} if artifact.schema else dict(stored.members)
    for name, schema in claimed.items():
        layout: Layout | None = header.layouts.get(name)
        if layout is None:
            words.append(f"it holds no array {name!r}")
        else:
            words += _differences(name, schema, layout.shape, layout.dtype, layout.encoding)
    if extra := sorted(set(header.layouts) - set(claimed)):
        words.append(f"it also holds {', '.join(extra)}")
    verdict: Verdict = "differs" if words else "confirmed"
    if stored.sha256 and recorded is None and not words:
        words = ["its digest is not known here: dmdata get NAME reads it whole and records it"]
    return Answer(artifact.name, verdict, tuple(words), state, recorded)


def _states_differ(artifact: Artifact, state: ObjectState, recorded: str | None) -> list[str]:
    stored, words = artifact.stored, []
    more = state.n_bytes - stored.n_bytes
    inferred = stored.format == "pt" and stored.basis.get("n_bytes") is Basis.INFERRED
    if more and not (inferred and 0 < more <= _PT_DIRECTORY_BYTES):
        words.append(f"it has {state.n_bytes:,} bytes, not {stored.n_bytes:,}")
    if stored.etag is not None and stored.etag != state.etag:
        words.append(f"its ETag is {state.etag}, not {stored.etag}")
    if stored.sha256 and recorded and recorded != stored.sha256:
        words.append(f"its SHA-256 was {recorded} when it was read whole, not {stored.sha256}")
    return words


def _differences(
    name: str, claimed: ArraySchema | None, shape: tuple[int, ...], dtype: np.dtype[Any], encoding: str
) -> list[str]:
    if claimed is None:
        return []
    words, where = [], f"{name}: " if name else ""
    if shape != claimed.shape:
        words.append(f"{where}shape {shape}, not {claimed.shape}")
    if (dtype, encoding) != stored_as(claimed.dtype):
        words.append(f"{where}dtype {encoding or dtype}, not {claimed.dtype}")
    return words
