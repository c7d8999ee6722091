"""What lies below an address: the objects of a bucket, page by page and priced, or the files of a folder, for free.

A page of a bucket is a LIST request, a class of its own on the bill, and its answer is bytes like any others. Each is
reserved before it is sent and settled on what came back, as reads are.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dmdata.errors import AccessError, DmdataError, SourceError
from dmdata.money.ledger import Ledger, home
from dmdata.money.prices import Terms
from dmdata.objects.address import Address
from dmdata.objects.aws import terms_of
from dmdata.objects.explaining.foreign_errors import botocore_error
from dmdata.objects.explaining.refusals import s3_refusal

PAGE_OBJECTS = 1000
"""Most objects of one page."""

PAGE_BYTES = 512 << 10
"""What is reserved for a page, of about 300 bytes an object; a longer one is settled as long as it is."""

_MOST_TRIES = 5

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listed:
    """An object of a bucket, or a file.

    Attributes
    ----------
    key : str
        Relative to what was listed, with ``/``.
    n_bytes : int
    is_archived : bool
        Whether it must be restored before it can be read.
    """

    key: str
    n_bytes: int
    is_archived: bool = False


def page_usd(terms: Terms) -> float:
    """Price one page of a bucket's list, upper bound."""
    return terms.prices.usd_per_list + terms.quote(PAGE_BYTES, 0).usd


def list_bucket(address: Address, terms: Terms, *, progress: Callable[[int], object] | None = None) -> Iterator[Listed]:
    """List what lies below ``s3://bucket/prefix/``, in the order of the keys.

    Parameters
    ----------
    address : Address
    terms : Terms
        Of the pages: decides the price of their bytes.
    progress : callable, optional
        Called with the number of objects after each page.

    Raises
    ------
    BudgetError
        From the page that would pass it, before it is asked for.
    AccessError
        If these credentials may not list; being allowed to read is not enough.
    SourceError
    """
    parts = urlsplit(address.url, allow_fragments=False)
    bucket, prefix = parts.netloc, address.url.partition("://")[2].partition("/")[2]
    if not bucket:
        raise SourceError(f"{address} names no bucket; write it like s3://bucket/prefix")
    prefix = f"{prefix.rstrip('/')}/" if prefix.strip("/") else ""
    token: str | None = None
    n_objects = 0
    while True:
        page = _page(address, bucket, prefix, token, terms)
        for entry in page.get("Contents", []):
            archived = entry.get("StorageClass") in ("GLACIER", "DEEP_ARCHIVE")
            n_objects += 1
            yield Listed(entry["Key"].removeprefix(prefix), entry["Size"], archived)
        if progress:
            progress(n_objects)
        token = page.get("NextContinuationToken")
        if not page.get("IsTruncated") or token is None:
            return


def list_folder(folder: Path) -> Iterator[Listed]:
    """List the files below a folder, in the order of their paths; links to folders are not followed."""

    def complain(error: OSError) -> None:
        raise DmdataError(f"{error.filename} cannot be listed: {error.strerror}; make it readable") from error

    for root, folders, files in os.walk(folder, onerror=complain):
        folders.sort()
        for name in sorted(files):
            path = Path(root, name)
            if path.is_file():
                yield Listed(path.relative_to(folder).as_posix(), path.stat().st_size)


def _page(address: Address, bucket: str, prefix: str, token: str | None, terms: Terms) -> dict[str, Any]:
    n_tries = 0
    while True:
        n_tries += 1
        try:
            return _ask(address, bucket, prefix, token, terms)
        except SourceError as error:
            if not error.transient or n_tries == _MOST_TRIES:
                raise
            _log.info("trying again after try %d: %s", n_tries, error)
            time.sleep(0.1 * 2**n_tries)


def _ask(address: Address, bucket: str, prefix: str, token: str | None, terms: Terms) -> dict[str, Any]:
    """Send one LIST request, and book it."""
    import botocore.exceptions

    access = terms_of(bucket, address)
    client = access.client
    more: dict[str, Any] = {"RequestPayer": "requester"} if address.requester_pays and access.credentials else {}
    if token is not None:
        more["ContinuationToken"] = token
    n_received = 0

    def measure(response_dict: dict[str, Any], **_: Any) -> None:
        nonlocal n_received
        n_received += len(response_dict["body"])

    reservation = None
    if address.requester_pays:
        reservation = Ledger(home()).reserve(
            usd=page_usd(terms),
            n_bytes=PAGE_BYTES,
            n_requests=1,
            artifact=f"list of {address}",
            destination=str(terms.destination),
        )
        _log.info(
            "listing %s: a page of up to %d objects in 1 request, up to $%.4f", address, PAGE_OBJECTS, page_usd(terms)
        )
    charged: bool | None = None
    client.meta.events.register("before-parse.s3.ListObjectsV2", measure, unique_id=f"measure-{id(measure)}")
    try:
        page: dict[str, Any] = dict(client.list_objects_v2(Bucket=bucket, Prefix=prefix, **more))
        charged = page.get("RequestCharged") == "requester" if address.requester_pays else None
        return page
    except botocore.exceptions.ClientError as error:
        n_received = 0  # nobody is charged for the text of a refusal
        status, code = error.response["ResponseMetadata"]["HTTPStatusCode"], error.response["Error"]["Code"]
        if status == 403 and code == "AccessDenied":
            # being allowed to read every object does not mean being allowed to list them
            raise AccessError(
                f"{address} may not be listed by these credentials; they need s3:ListBucket on the bucket. Where only "
                "reading is allowed, ask its owner for a catalog, or for the keys",
                url=str(address),
                cause="denied",
                refused=True,
            ) from None
        raise s3_refusal(address, status, code) from None
    except botocore.exceptions.BotoCoreError as error:
        raise botocore_error(address, error) from None
    finally:
        client.meta.events.unregister("before-parse.s3.ListObjectsV2", measure, unique_id=f"measure-{id(measure)}")
        if reservation is not None:
            usd = terms.prices.usd_per_list + terms.quote(n_received, 0).usd
            reservation.settle(usd=usd, n_bytes=n_received, n_requests=1, charged=charged)
