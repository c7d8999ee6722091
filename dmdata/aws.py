"""How a bucket is spoken to: credentials, region, endpoint and host style, found by boto3 for both clients.

boto3 reads the environment, AWS's files, single sign-on, roles and credential processes; what it would do for a bucket,
down to the URL, is asked of it and not computed again. Terms are kept for a process, and found again when the
environment or a file changes, or when a bucket refused the credentials: what was renewed meanwhile is then used.
"""

import contextlib
import io
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dmdata.address import Address
from dmdata.clients import CONNECT_SECONDS, SILENCE_SECONDS, ca_bundle, client_once, configuration, forget
from dmdata.errors import AccessError, DmdataError, SettingsError, SourceError
from dmdata.refusals import (
    bad_bucket_name,
    botocore_error,
    credentials_error,
    no_credentials,
    no_such_bucket,
    role_refused,
)

if TYPE_CHECKING:
    import boto3
    from botocore.config import Config
    from botocore.credentials import Credentials
    from mypy_boto3_s3 import S3Client

# at DEBUG these write out requests and what is signed of them, a session's token among it
_LOGGERS_OF_HEADERS = tuple(f"botocore.{name}" for name in ("auth", "awsrequest", "endpoint", "hooks", "httpsession"))
# these warn with a traceback of what is said in words
_LOGGERS_OF_TRACEBACKS = ("botocore.credentials", "botocore.tokens")
_AWS_HOSTS = (".amazonaws.com", ".amazonaws.com.cn", ".api.aws", ".api.amazonwebservices.com.cn")
# how long a copy of credentials is used without looking whether botocore has newer ones
_COPY_SECONDS = 600
# a bucket that nobody must pay for may be readable by everybody: the refusal that led to reading it unsigned
_UNSIGNED: dict[tuple[object, ...], DmdataError] = {}
# when the credentials for a bucket were last found to have been renewed: other threads may still be refused
_RENEWED: dict[str, float] = {}
_RENEWAL_SECONDS = 5.0
_REGIONS: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Terms:
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
        """Give obstore the credentials in force; see `obstore.store.S3Store`."""
        key_id, secret, token = self.current_credentials()
        # those of a file never expire; whatever boto3 renews is asked for again in time
        lasts = (
            datetime.now(UTC) + timedelta(seconds=_COPY_SECONDS)
            if hasattr(self.credentials, "refresh_needed")
            else None
        )
        return {"access_key_id": key_id, "secret_access_key": secret, "token": token, "expires_at": lasts}


def terms_of(bucket: str, address: Address) -> Terms:
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
        terms: Terms = client_once(known, lambda: _find(bucket, address))
        terms.current_credentials()
    except AccessError as error:
        # what everybody may read is read, whatever keys lie about
        if error.facts.get("cause") != "bad_credentials" or not _may_be_public(address) or _here(bucket) in _UNSIGNED:
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


def terms_to_write(bucket: str, url: str) -> Terms:
    """Find out how to write to a bucket with the caller's own credentials.

    Raises
    ------
    AccessError, SourceError
        As `terms_of`; also without credentials.
    """
    terms = terms_of(bucket, Address(url))
    if terms.credentials is None:
        before = _UNSIGNED.get(_here(bucket))
        if before is not None and before.facts.get("cause") == "bad_credentials":
            raise before
        raise no_credentials(url, f"no AWS credentials were found to write {url}")
    return terms


def known_to_be_unsigned(address: Address) -> bool:
    """Tell whether an S3 address was last read without a signature, so that nobody can be charged. Asks nothing."""
    return bool(_UNSIGNED) and _may_be_public(address) and _here(split_s3(address.url)[0]) in _UNSIGNED


def another_way(bucket: str, address: Address, used: Terms, refusal: DmdataError) -> DmdataError:
    """Look for other terms after a bucket refused those in use: its true region, renewed credentials, no signature.

    Returns
    -------
    error : DmdataError
        The refusal, or one that says to try again because other terms are in force now.
    """
    if region := refusal.facts.get("region"):
        if region == used.region or not used.is_aws:
            return refusal
        _REGIONS[bucket] = region
        forget(bucket)
        return _again(refusal, f"its bucket is in {region}")
    known = _here(bucket)
    if used.credentials is None:
        # nothing is public there: what kept the credentials from being used is the reason
        before = _UNSIGNED.pop(known, None) if isinstance(refusal, AccessError) else None
        return before or refusal
    if refusal.facts.get("cause") != "bad_credentials":
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
        raise SourceError(f"{address} names no object; write it like s3://bucket/key", transient=False)
    return bucket, key


def split_s3(url: str) -> tuple[str, str]:
    """Split ``s3://bucket/key``."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket.rpartition("@")[2], key


@contextlib.contextmanager
def credentials_in_words(profile: str) -> Iterator[None]:
    """Say in words why credentials cannot be had, while the block runs.

    Raises
    ------
    AccessError, SourceError
    """
    import botocore.exceptions

    try:
        yield
    except botocore.exceptions.ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        raise role_refused(profile, error.operation_name, code) from None
    except (botocore.exceptions.BotoCoreError, OSError, ValueError, KeyError, EOFError) as error:
        # a credential process that is not installed, or says something else than JSON, comes as it is
        raise credentials_error(profile, error) from None


def _find(bucket: str, address: Address) -> Terms:
    from botocore import UNSIGNED

    session = _session()
    credentials = None
    if _here(bucket) not in _UNSIGNED:
        with credentials_in_words(session.profile_name):
            credentials = session.get_credentials()
    if credentials is None and not _may_be_public(address):
        raise no_credentials(
            str(address), f"no AWS credentials were found, and {address} is requester pays: somebody must be charged"
        )
    if credentials is None and address.requester_pays and _here(bucket) not in _UNSIGNED:
        refusal = no_credentials(str(address), f"no AWS credentials were found, and {address} may not be read without")
        _UNSIGNED[_here(bucket)] = refusal
    with _configured(address):
        asking = session.client(
            "s3", region_name=session.region_name or "us-east-1", config=_config(signature_version=UNSIGNED)
        )
        is_aws = str(urlsplit(asking.meta.endpoint_url).hostname).endswith(_AWS_HOSTS)
        region = _REGIONS.get(bucket) or address.region
        if is_aws and region is None:
            region = _ask_region(asking, bucket, session.region_name)
        region = region or session.region_name or "us-east-1"
        signature = {"signature_version": UNSIGNED} if credentials is None else {}
        client = session.client("s3", region_name=region, config=_config(**signature))
        unsigned = session.client("s3", region_name=region, config=_config(signature_version=UNSIGNED))
        endpoint, by_path = _endpoint_of(unsigned, bucket)
    # a moved bucket is for `another_way` to look into, with a request that is counted
    client.meta.events.register("before-call.s3", _follow_no_region)
    return Terms(session, credentials, endpoint, by_path, region, is_aws, client)


@contextlib.contextmanager
def _configured(address: Address) -> Iterator[None]:
    import botocore.exceptions

    try:
        yield
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise botocore_error(address, error) from None


def _session() -> "boto3.Session":
    import boto3  # half a second, and only S3 needs it
    import botocore.exceptions

    for name in _LOGGERS_OF_HEADERS:
        logging.getLogger(name).addFilter(_is_no_debug)
    for name in _LOGGERS_OF_TRACEBACKS:
        logging.getLogger(name).addFilter(_is_no_traceback)
    try:
        # boto3 itself reads AWS_DEFAULT_REGION alone
        session = boto3.Session(region_name=os.environ.get("AWS_REGION") or None)
    except botocore.exceptions.BotoCoreError as error:
        raise credentials_error(os.environ.get("AWS_PROFILE", ""), error) from None
    try:
        bundle = ca_bundle()
    except SettingsError as error:
        raise AccessError(str(error), cause="configuration", unsent=True) from None
    if bundle:
        # single sign-on and roles are asked for by clients of this session, too
        session._session.set_config_variable("ca_bundle", bundle)
    return session


def _is_no_debug(record: logging.LogRecord) -> bool:
    return record.levelno > logging.DEBUG


def _is_no_traceback(record: logging.LogRecord) -> bool:
    return record.exc_info is None or logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


def _config(**more: Any) -> "Config":
    from botocore.config import Config

    retries: Any = {"total_max_attempts": 1}
    return Config(retries=retries, connect_timeout=CONNECT_SECONDS, read_timeout=SILENCE_SECONDS, **more)


def _ask_region(client: "S3Client", bucket: str, default: str | None) -> str | None:
    """Ask S3 where a bucket is: the answer names the region even to those who may not enter. Not charged."""
    import botocore.exceptions

    client.meta.events.register("before-call.s3", _follow_no_region)
    try:
        answer = client.head_bucket(Bucket=bucket)
    except botocore.exceptions.ClientError as error:
        answer = error.response  # type: ignore[assignment] # a refusal carries the same header
    if answer["ResponseMetadata"]["HTTPStatusCode"] == 404:
        raise no_such_bucket(bucket)
    return answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region") or default


def _follow_no_region(context: dict[str, Any], **_: Any) -> None:
    """Keep botocore from following a bucket to its region by requests of its own, without end at some endpoints."""
    if "s3_redirect" in context:
        context["s3_redirect"]["redirected"] = True


def _endpoint_of(client: "S3Client", bucket: str) -> tuple[str, bool]:
    """Ask boto3 for the URL it would read a bucket at, without sending anything; split off the bucket and key."""
    from botocore.awsrequest import AWSResponse
    from botocore.compat import HTTPHeaders

    class Nothing(io.BytesIO):
        def stream(self, *_: Any, **__: Any) -> Iterator[bytes]:
            return iter(())

    urls: list[str] = []

    def keep(request: Any, **_: Any) -> AWSResponse:
        urls.append(request.url)
        return AWSResponse(request.url, 200, HTTPHeaders(), Nothing())

    client.meta.events.register("before-send.s3.HeadObject", keep)  # type: ignore[arg-type] # its answer is used
    client.head_object(Bucket=bucket, Key="k")
    url = urls[0].removesuffix("/k")
    by_path = url.endswith(f"/{bucket}")
    return (url.removesuffix(f"/{bucket}") if by_path else url), by_path


def _here(bucket: str) -> tuple[object, ...]:
    return os.getpid(), bucket, configuration()


def _again(refusal: DmdataError, why: str) -> SourceError:
    return SourceError(f"{refusal}; tried again, since {why}", transient=True, refused=True, again=True)
