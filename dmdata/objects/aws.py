"""How a bucket is spoken to: credentials, region, endpoint and host style, found by boto3 for both clients.

boto3 reads the environment, AWS's files, single sign-on, roles and credential processes; what it would do for a bucket,
down to the URL, is asked of it and not computed again. Terms are kept for a process, and found again when the
environment or a file changes, or when a bucket refused the credentials: what was renewed meanwhile is then used.
"""

import math
import os
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dmdata.errors import AccessError, DmdataError, SourceError
from dmdata.objects.address import Address
from dmdata.objects.clients import client_once, configuration, forget
from dmdata.objects.endpoints import is_aws_host
from dmdata.objects.explaining.credentials import no_credentials
from dmdata.objects.explaining.refusals import WrongRegionError, bad_bucket_name
from dmdata.objects.sessions import (
    client_config,
    configuration_in_words,
    credentials_in_words,
    endpoint_of,
    follow_no_region,
    new_session,
    region_of,
)

if TYPE_CHECKING:
    import boto3
    from botocore.credentials import Credentials
    from mypy_boto3_s3 import S3Client

# how long a copy of credentials is used without looking whether botocore has newer ones
_COPY_SECONDS = 600
# a bucket that nobody must pay for may be readable by everybody: the refusal that led to reading it unsigned
_UNSIGNED: dict[tuple[object, ...], DmdataError] = {}
# when the credentials for a bucket were last found to have been renewed: other threads may still be refused
_RENEWED: dict[str, float] = {}
_RENEWAL_SECONDS = 5.0
_REGIONS: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class BucketAccess:
    """How a bucket is spoken to.

    Attributes
    ----------
    session : boto3.Session
    credentials : botocore credentials or None
        None: requests are not signed.
    endpoint : str
        Scheme and host, and a path where there is one before the bucket; has the bucket in it unless `by_path`.
    by_path : bool
        Whether the bucket is the first part of the path, not of the host's name.
    region : str
        Of the bucket.
    is_aws : bool
        Whether the endpoint is one of AWS's own.
    client : S3Client
        boto3's, which tries each request once.
    stores : dict
        obstore's, by the etag that they send.
    """

    session: "boto3.Session"
    credentials: "Credentials | None"
    endpoint: str
    by_path: bool
    region: str
    is_aws: bool
    client: "S3Client"
    stores: dict[str | None, Any] = field(default_factory=dict, compare=False, repr=False)

    def current_credentials(self) -> tuple[str | None, str | None, str | None]:
        """Take the key id, secret and token in force, refreshed where that is due.

        Raises
        ------
        AccessError
            If they cannot be had: an expired single sign-on, a role that may not be assumed.
        """
        if self.credentials is None:
            return None, None, None
        with credentials_in_words(self.session.profile_name):
            frozen = self.credentials.get_frozen_credentials()
        return frozen.access_key, frozen.secret_key, frozen.token

    def for_obstore(self) -> dict[str, Any]:
        """Return for obstore the credentials in force; see `obstore.store.S3Store`."""
        key_id, secret, token = self.current_credentials()
        # those of a file never expire; whatever boto3 renews is asked for again in time
        lasts = (
            datetime.now(UTC) + timedelta(seconds=_COPY_SECONDS)
            if hasattr(self.credentials, "refresh_needed")
            else None
        )
        return {"access_key_id": key_id, "secret_access_key": secret, "token": token, "expires_at": lasts}


def terms_of(bucket: str, address: Address) -> BucketAccess:
    """Find out how to speak to a bucket, once a process and configuration. Costs nothing.

    Raises
    ------
    AccessError
        If credentials are needed and there are none, or they cannot be had.
    SourceError
        If the bucket cannot be asked for its region.
    """
    known = (bucket, address.requester_pays, address.listed, address.region, "terms")
    try:
        terms: BucketAccess = client_once(known, lambda: _find(bucket, address))
        terms.current_credentials()
    except AccessError as error:
        # what everybody may read is read, whatever keys lie about
        if error.cause != "bad_credentials" or not _may_be_public(address) or _here(bucket) in _UNSIGNED:
            raise
        _UNSIGNED[_here(bucket)] = error
        forget(bucket)
        try:
            terms = client_once(known, lambda: _find(bucket, address))
        except DmdataError:
            del _UNSIGNED[_here(bucket)]
            raise error from None
    return terms


def _may_be_public(address: Address) -> bool:
    return not (address.listed and address.requester_pays)


def terms_to_write(bucket: str, url: str) -> BucketAccess:
    """Find out how to write to a bucket with the caller's own credentials.

    Raises
    ------
    AccessError, SourceError
        As `terms_of`; also without credentials.
    """
    terms = terms_of(bucket, Address(url))
    if terms.credentials is None:
        before = _UNSIGNED.get(_here(bucket))
        if before is not None and before.cause == "bad_credentials":
            raise before
        raise no_credentials(url, f"no AWS credentials were found to write {url}")
    return terms


def known_to_be_unsigned(address: Address) -> bool:
    """Whether an S3 address was last read without a signature, so that nobody can be charged. Asks nothing."""
    return bool(_UNSIGNED) and _may_be_public(address) and _here(split_s3(address.url)[0]) in _UNSIGNED


def another_way(bucket: str, address: Address, used: BucketAccess, refusal: DmdataError) -> DmdataError:
    """Look for other terms after a bucket refused those in use: its true region, renewed credentials, no signature.

    Returns
    -------
    error : DmdataError
        The refusal, or one that says to try again because other terms are in force now.
    """
    if isinstance(refusal, WrongRegionError) and refusal.region:
        if refusal.region == used.region or not used.is_aws:
            return refusal
        _REGIONS[bucket] = refusal.region
        forget(bucket)
        return _again(refusal, f"its bucket is in {refusal.region}")
    known = _here(bucket)
    if used.credentials is None:
        # nothing is public there: what kept the credentials from being used is the reason
        before = _UNSIGNED.pop(known, None) if isinstance(refusal, AccessError) else None
        return before or refusal
    if refusal.cause != "bad_credentials":
        return refusal
    if time.monotonic() - _RENEWED.get(bucket, -math.inf) < _RENEWAL_SECONDS:
        return _again(refusal, "the credentials were renewed")
    before_refusal = used.current_credentials()
    forget(bucket)
    try:
        renewed = terms_of(bucket, address)
        has_changed = renewed.current_credentials() != before_refusal
    except DmdataError as error:
        return error
    if has_changed:
        _RENEWED[bucket] = time.monotonic()
        return _again(refusal, "the credentials were renewed")
    if _may_be_public(address):
        _UNSIGNED[known] = refusal
        forget(bucket)
        return _again(refusal, "it may be readable without a signature")
    return refusal


def bucket_and_key(address: Address) -> tuple[str, str]:
    """Split an S3 address; a key is taken as it is written, whatever characters it has.

    Raises
    ------
    SourceError
        If it names no object.
    """
    bucket, key = split_s3(address.url)
    if bucket.startswith("arn:"):
        raise bad_bucket_name(address)
    if not bucket or not key:
        raise SourceError(f"{address} names no object; write it like s3://bucket/key")
    return bucket, key


def split_s3(url: str) -> tuple[str, str]:
    """Split ``s3://bucket/key``."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket.rpartition("@")[2], key


def _find(bucket: str, address: Address) -> BucketAccess:
    """Find out all of a bucket's terms; the region is asked for, which is not charged."""
    from botocore import UNSIGNED

    session = new_session()
    credentials = _find_credentials(session, bucket, address)
    with configuration_in_words(address):
        asking = session.client(
            "s3", region_name=session.region_name or "us-east-1", config=client_config(signature_version=UNSIGNED)
        )
        is_aws = is_aws_host(str(urlsplit(asking.meta.endpoint_url).hostname))
        region = _REGIONS.get(bucket) or address.region
        if is_aws and region is None:
            region = region_of(asking, bucket, session.region_name)
        region = region or session.region_name or "us-east-1"
        signature = {"signature_version": UNSIGNED} if credentials is None else {}
        client = session.client("s3", region_name=region, config=client_config(**signature))
        if asking.meta.region_name != region:
            asking = session.client("s3", region_name=region, config=client_config(signature_version=UNSIGNED))
        endpoint, by_path = endpoint_of(asking, bucket)
    # a moved bucket is for `another_way` to look into, with a request that is counted
    client.meta.events.register("before-call.s3", follow_no_region)
    return BucketAccess(session, credentials, endpoint, by_path, region, is_aws, client)


def _find_credentials(session: "boto3.Session", bucket: str, address: Address) -> "Credentials | None":
    """Find the credentials that requests are signed with; None where they are not signed."""
    if _here(bucket) in _UNSIGNED:
        credentials = None
    else:
        with credentials_in_words(session.profile_name):
            credentials = session.get_credentials()
    if credentials is not None:
        return credentials
    if not _may_be_public(address):
        raise no_credentials(
            str(address), f"no AWS credentials were found, and {address} is requester pays: somebody must be charged"
        )
    if address.requester_pays and _here(bucket) not in _UNSIGNED:
        refusal = no_credentials(str(address), f"no AWS credentials were found, and {address} needs them")
        _UNSIGNED[_here(bucket)] = refusal
    return None


def _here(bucket: str) -> tuple[object, ...]:
    return os.getpid(), bucket, configuration()


def _again(refusal: DmdataError, why: str) -> SourceError:
    return SourceError(f"{refusal}; tried again, since {why}", transient=True, refused=True)
