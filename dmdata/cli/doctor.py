"""What would go wrong, and why, before anything is asked for: credentials, region, requester pays, prices, disk.

Every finding is data: what was looked at, how it is, in words, and the next command. Nothing is spent: the bucket is
asked for its region, which is free, and for nothing else, unless a probe of one byte is asked for.
"""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, TypeAlias

from dmdata.errors import AccessError, DmdataError
from dmdata.money.ledger import DEFAULT_PROCESS_USD, Ledger, Spending, home
from dmdata.money.prices import Destination, price_table, prices_in_words, readable_bytes, readable_usd
from dmdata.objects.address import Address
from dmdata.objects.endpoints import own_endpoint
from dmdata.objects.s3 import access_terms
from dmdata.reading.fetch import Transport
from dmdata.reading.headers import known_charge
from dmdata.settings import settings

State: TypeAlias = Literal["ok", "warn", "fail"]

_OLD_PRICES_DAYS = 180
_PACKAGES = ("dmdata", "numpy", "zarr", "obstore", "boto3", "fsspec", "torch", "dask", "xarray")
_CREDENTIALS = {
    "env": "environment variables",
    "shared-credentials-file": "the shared credentials file",
    "config-file": "the AWS config file",
    "sso": "single sign-on",
    "iam-role": "the role of this instance",
    "container-role": "the role of this container",
    "assume-role": "an assumed role",
    "assume-role-with-web-identity": "an assumed role with web identity",
    "custom-process": "a credential process",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    topic : str
    state : {"ok", "warn", "fail"}
    words : str
        How it is.
    remedy : str
        The next command, or what to do; empty where nothing is wrong.
    """

    topic: str
    state: State
    words: str
    remedy: str = ""


def examine(address: Address, *, n_bytes: int | None, destination: Path) -> list[Finding]:
    """Look at all that a read of an object needs, without spending anything.

    Parameters
    ----------
    address : Address
        Of the object that would be read.
    n_bytes : int or None
        Its size, for the disk that a copy would take; None where that is known only by reading it.
    destination : Path
        Where a copy would go.
    """
    return [
        _software(),
        _home(),
        _disk(destination, n_bytes),
        *_money(address),
        *_access(address),
    ]


def probe(address: Address, *, artifact: str) -> Finding:
    """Read one byte of an object: under the budget, and noted in the ledger.

    Raises
    ------
    BudgetError
        If even that is over it.
    """
    try:
        _, state = Transport(address, artifact).start(1)
    except AccessError as error:
        return Finding("probe", "fail", str(error), _REMEDIES.get(error.cause or "", ""))
    charged = {
        True: "the source confirms that the reader is charged (x-amz-request-charged)",
        False: "the source does not say that the reader is charged",
        None: "reading it is free",
    }[state.charged]
    return Finding("probe", "ok", f"{address} can be read: {readable_bytes(state.n_bytes)}; {charged}")


_REMEDIES = {
    "no_credentials": "aws configure",
    "bad_credentials": "aws sso login, or aws configure",
    "requester_pays": "set requester_pays: true in the catalog",
    "not_in_release": "dmdata ls",
    "denied": "aws sts get-caller-identity, and ask for s3:GetObject on the bucket",
}


def _software() -> Finding:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return Finding("software", "ok", f"Python {platform.python_version()}, {', '.join(found)}")


def _home() -> Finding:
    folder = home()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if os.access(existing, os.W_OK | os.X_OK) and existing.is_dir():
        return Finding("DMDATA_HOME", "ok", f"{folder} holds the ledger and the cache")
    return Finding(
        "DMDATA_HOME",
        "fail",
        f"{folder} cannot be written, so nothing can be spent: without a ledger no budget holds",
        "export DMDATA_HOME=DIRECTORY",
    )


def _disk(destination: Path, n_bytes: int | None) -> Finding:
    place = destination.absolute()
    free = shutil.disk_usage(next(path for path in (place, *place.parents) if path.is_dir())).free
    if n_bytes is None:
        return Finding("disk", "ok", f"{readable_bytes(free)} free at {place}")
    words = f"{readable_bytes(free)} free at {place}; a copy as it is takes {readable_bytes(n_bytes)}"
    if free >= n_bytes:
        return Finding("disk", "ok", words)
    return Finding("disk", "warn", words, "mirror rows and columns with --select, or to s3://...")


def _money(address: Address) -> Iterator[Finding]:
    prices = price_table()
    age = (datetime.now(UTC).date() - date.fromisoformat(prices.date)).days
    about = f"{prices_in_words()}; to the internet {readable_usd(prices.internet_tiers[0][1])} a GB"
    if age > _OLD_PRICES_DAYS:
        yield Finding("prices", "warn", f"{about}: {age} days old", "dmdata prices show, and override what changed")
    else:
        yield Finding("prices", "ok", about)
    try:
        month = f"{datetime.now(UTC):%Y-%m}"
        spent = Ledger(home()).spent(by="month").get(month, Spending(0.0, 0, 0, 0))
    except DmdataError as error:
        yield Finding("ledger", "fail", str(error))
        return
    limit = settings().max_cost
    words = f"{readable_usd(spent.usd)} in {month}; "
    if limit is None:
        words += f"no monthly budget: {readable_usd(DEFAULT_PROCESS_USD)} a process"
    else:
        words += f"at most {readable_usd(limit)} a month"
    transport = Transport(address, str(address), charged=known_charge(address))
    if not transport.is_paid:
        words += f"; this source is free: {why_free(address)}"
    elif address.requester_pays:
        words += "; this source charges the reader"
    yield Finding("budget", "ok", words)


def why_free(address: Address) -> str:
    """Explain why reads that are not counted are not."""
    if address.is_local:
        return "it is on this machine"
    if address.is_s3 and own_endpoint():
        return "an endpoint of your own without prices (dmdata config set endpoint_prices.usd_per_get ...)"
    return "its owner pays"


def _access(address: Address) -> Iterator[Finding]:
    if address.is_local:
        yield Finding("source", "ok", f"{address} is on this machine: reading it is free")
        return
    if settings().offline:
        yield Finding("source", "fail", "DMDATA_OFFLINE is set, so nothing remote is read", "unset DMDATA_OFFLINE")
        return
    if not address.is_s3:
        yield Finding("source", "ok", f"{address} is read over the web, for free")
        return
    try:
        terms = access_terms(address)
    except DmdataError as error:
        cause = error.cause or ""
        yield Finding(
            "credentials" if cause else "source", "fail", str(error), _REMEDIES.get(cause, "is there a network?")
        )
        return
    if terms.credentials is None:
        yield Finding("credentials", "ok", "none, and none are needed")
    else:
        origin = _CREDENTIALS.get(terms.credentials, terms.credentials)
        yield Finding("credentials", "ok", f"from {origin}, profile {terms.profile}; not sent anywhere yet")
    where = f"endpoint {terms.endpoint}, signed for" if terms.endpoint else "AWS;"
    yield Finding("source", "ok", f"{where} region {terms.region}: a reader there pays for requests only, see {_SAME}")
    if address.requester_pays:
        offer = "x-amz-request-payer: requester is sent with each request; the account of these credentials is billed"
        yield Finding("requester pays", "ok", offer)
    else:
        words = "no offer to pay is sent; a requester-pays bucket would refuse"
        yield Finding("requester pays", "ok", words)


_SAME = f"--to {Destination.SAME_REGION}"
