"""Objects in S3 and on the web: ranges through obstore, credentials and region by boto3, and every refusal in words.

The first bytes of an object in S3 are read by boto3, which shows whether the reader is charged; obstore, which reads
the rest, shows no headers. Clients are made once a process. A process forked from one that used obstore reads all by
boto3: the Rust threads behind obstore do not come along, and a call to them would hang. What libraries say is
translated here, once; their texts may quote keys, so they are neither quoted nor chained.
"""

import contextlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import obstore
import obstore.exceptions

from dmdata.address import Address, Buffer, ByPieces, ObjectState, Put, Source, changed, ended_short
from dmdata.errors import AccessError, SourceError
from dmdata.refusals import not_by_range, s3_refusal, store_error

if TYPE_CHECKING:
    import boto3
    from botocore.config import Config
    from botocore.credentials import Credentials
    from mypy_boto3_s3 import S3Client

_BOTO_CHUNK_BYTES = 128 << 10
_SILENCE_SECONDS = 20
# S3 may be silent so long while it puts an object's parts together
_COMPLETING_SECONDS = 120
# at DEBUG these write out requests and what is signed of them, a session's token among it
_LOGGERS_OF_HEADERS = tuple(f"botocore.{name}" for name in ("auth", "awsrequest", "endpoint", "hooks", "httpsession"))
# making a client asks for its terms, which are made once, too
_LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)
# by process, terms and environment; those of a parent process stay where they are, for dropping them would hang
_CLIENTS: dict[tuple[Any, ...], Any] = {}


def s3_source(address: Address) -> Source:
    """Make the reader of an object in S3; see `dmdata.source.connect`."""
    bucket, key = _bucket_and_key(address)
    if not _runtime_was_lost():
        return _S3Source(address, bucket, key)
    return _ForkedS3Source(address, bucket, key)


def web_source(address: Address) -> Source | None:
    """Make the reader of an object on the web, or None where obstore cannot: for a query, or in a forked process."""
    parts = urlsplit(address.url)
    if _runtime_was_lost() or parts.query:
        return None
    return _WebSource(address, f"{parts.scheme}://{parts.netloc}", parts.path.lstrip("/"))


@dataclass(frozen=True, slots=True)
class AccessTerms:
    """How a bucket would be spoken to; holds no credentials.

    Attributes
    ----------
    credentials : str or None
        Where they come from, as botocore calls it ("env", "sso", "iam-role"); None where there are none.
    profile : str
    endpoint : str or None
        None for AWS's own.
    region : str
        Of the bucket, as it says itself.
    """

    credentials: str | None
    profile: str
    endpoint: str | None
    region: str


def access_terms(address: Address) -> AccessTerms:
    """Find out how an object would be read, and where its bucket is. Costs nothing.

    Raises
    ------
    AccessError
        If credentials are needed and there are none, or the AWS configuration cannot be used.
    SourceError
        If the bucket cannot be asked for its region.
    """
    session, credentials, endpoint, region = _terms(_bucket_and_key(address)[0], address)
    return AccessTerms(credentials.method if credentials else None, session.profile_name, endpoint, region)


def writing_client(url: str) -> "S3Client":
    """Make a boto3 client that writes to the bucket of an S3 address with the caller's own credentials; close it.

    It tries a request up to five times.

    Raises
    ------
    AccessError
        Without credentials, or if the AWS configuration cannot be used.
    SourceError
        If the bucket cannot be asked for its region.
    """
    from botocore.config import Config

    session, endpoint, region = _terms_to_write(urlsplit(url).netloc, url)
    retries: Any = {"mode": "standard", "total_max_attempts": 5}
    config = Config(
        retries=retries,
        s3={"addressing_style": "path"} if endpoint else None,
        connect_timeout=_SILENCE_SECONDS,
        read_timeout=_COMPLETING_SECONDS,
        # an MD5 goes along with all that is put
        request_checksum_calculation="when_required",
    )
    return session.client("s3", region_name=region, config=config)


@contextlib.contextmanager
def writing(url: str) -> Iterator[None]:
    """Say in words why an S3 address could not be written while the block runs.

    Raises
    ------
    AccessError
        Without the right to do so.
    SourceError
        If the transfer failed.
    """
    import botocore.exceptions
    import urllib3.exceptions

    try:
        yield
    except botocore.exceptions.ClientError as error:
        # its text may quote keys, so it is not chained
        code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
        if code == "NoSuchUpload":
            raise SourceError(
                f"the upload of {url} was ended by somebody else; let one process write there, and try again",
                url=url,
                transient=True,
            ) from None
        if status >= 500 or code in ("RequestTimeout", "BadDigest", "InvalidPart"):
            raise SourceError(f"{url} could not be written ({code}); try again", url=url, transient=True) from None
        raise AccessError(
            f"{url} may not be written ({code} for {error.operation_name}); check the bucket's name and that these "
            "credentials may get and put objects and list multipart uploads there",
            url=url,
            cause="denied",
        ) from None
    except (botocore.exceptions.BotoCoreError, urllib3.exceptions.HTTPError) as error:
        vars(error).update(request=None, response=None)
        raise SourceError(f"{url} could not be written: {error}; try again", url=url, transient=True) from error


class _StoreSource:
    """An object by ranges through obstore. Retries are fetch's, so that each request is counted.

    A client is made for each etag, and sends it as If-Match with every request: a short range is then one call.
    """

    # the client has no bound of its own, and keeps connections for the next read; get_ranges has ten in flight
    most_at_once = 512
    pieces_at_once = 10

    def __init__(self, address: Address, key: str, store_of: Callable[[str | None], Any]) -> None:
        self.address = address
        self.key = key
        self._store_of = store_of
        self._stores: dict[str | None, Any] = {}

    def piece(self, start: int, stop: int, *, etag: str | None) -> Buffer:
        result = self.get(start, stop, etag=etag)
        with self._in_words():
            return result.bytes()  # type: ignore[no-any-return]

    def pieces(self, starts: Sequence[int], stops: Sequence[int], *, etag: str | None) -> Sequence[Buffer]:
        with self._in_words():
            # ranges that touch would still become one request, and a plan has none of those but where they are long
            return obstore.get_ranges(self.store(etag), self.key, starts=starts, ends=stops, coalesce=0)  # type: ignore[return-value]

    def read(self, start: int, stop: int, *, etag: str | None, put: Put, stopped: Callable[[], bool]) -> None:
        result = self.get(start, stop, etag=etag)
        with self._in_words():
            # every chunk as the connection gives it: where it breaks, nothing that arrived is lost
            for chunk in result.stream(min_chunk_size=1):
                put(np.frombuffer(chunk, np.uint8))
                start += len(chunk)
                if stopped():
                    return
        if start < stop:
            raise ended_short(self.address, start, transient=True)

    def get(self, start: int, stop: int, *, etag: str | None) -> Any:
        """Ask for a range, and look at whose it is."""
        with self._in_words():
            result = obstore.get(self.store(etag), self.key, options={"range": (start, stop)})
        if etag is not None and result.meta["e_tag"] != etag:
            raise changed(self.address)
        return result

    def store(self, etag: str | None) -> Any:
        """Make the client once."""
        store = self._stores.get(etag)
        if store is None:
            store = self._stores[etag] = self._store_of(etag)
        return store

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except (obstore.exceptions.BaseError, FileNotFoundError, ValueError) as error:
            raise store_error(self.address, error) from None


class _WebSource(_StoreSource):
    """An object on the web."""

    def __init__(self, address: Address, base: str, key: str) -> None:
        super().__init__(address, key, lambda etag: _web_store(base, etag))

    def start(self, n_bytes: int) -> tuple[bytes, ObjectState]:
        try:
            result = self.get(0, n_bytes, etag=None)
        except SourceError as error:
            if error.facts.get("past_end"):
                return b"", ObjectState(0, None)
            raise
        with self._in_words():
            return bytes(result.bytes()), ObjectState(result.meta["size"], result.meta["e_tag"])


class _S3Source(_StoreSource):
    """An object in S3."""

    def __init__(self, address: Address, bucket: str, key: str) -> None:
        super().__init__(address, key, lambda etag: _store(bucket, address, etag))
        self._by_boto = _ForkedS3Source(address, bucket, key)
        _terms(bucket, address)  # what is wrong with them is said before anything is sent

    def start(self, n_bytes: int) -> tuple[bytes, ObjectState]:
        return self._by_boto.start(n_bytes)


@dataclass(frozen=True, slots=True)
class _ForkedS3Source(ByPieces):
    """An object in S3 by boto3: its start always, all of it in a process forked from one that used obstore."""

    address: Address
    bucket: str
    key: str

    def start(self, n_bytes: int) -> tuple[bytes, ObjectState]:
        try:
            answer = self._get(0, n_bytes, etag=None)
        except SourceError as error:
            if error.facts.get("past_end"):
                return b"", ObjectState(0, None)
            raise
        with contextlib.closing(answer["Body"]) as body, self._broken_in_words():
            size = _size_said(answer.get("ContentRange", ""))
            if size is None:
                raise SourceError(
                    f"{self.address} was answered with another range than was asked for; try again",
                    url=str(self.address),
                    transient=True,
                )
            charged = answer.get("RequestCharged") == "requester" if self.address.requester_pays else None
            head = body.read(n_bytes)
        if len(head) != min(n_bytes, size):
            raise SourceError(
                f"{self.address} sent {len(head)} bytes where an object of {size} has {min(n_bytes, size)}; try again, "
                "or ask its publisher whether it is whole",
                url=str(self.address),
                transient=True,
            )
        return head, ObjectState(size, answer["ETag"], charged)

    def read(self, start: int, stop: int, *, etag: str | None, put: Put, stopped: Callable[[], bool]) -> None:
        with contextlib.closing(self._get(start, stop, etag=etag)["Body"]) as body, self._broken_in_words():
            while start < stop and not stopped():
                chunk = body.read(min(_BOTO_CHUNK_BYTES, stop - start))
                if not chunk:
                    raise ended_short(self.address, start, transient=True)
                put(np.frombuffer(chunk, np.uint8))
                start += len(chunk)

    def _get(self, start: int, stop: int, *, etag: str | None) -> Any:
        import botocore.exceptions

        conditions: dict[str, Any] = {"IfMatch": etag} if etag is not None else {}
        if self.address.requester_pays:
            conditions["RequestPayer"] = "requester"
        client = _boto_client(self.bucket, self.address)
        try:
            with self._broken_in_words():
                answer = client.get_object(
                    Bucket=self.bucket, Key=self.key, Range=f"bytes={start}-{stop - 1}", **conditions
                )
        except botocore.exceptions.ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            raise s3_refusal(self.address, status, error.response["Error"]["Code"]) from None
        if answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
            answer["Body"].close()
            raise not_by_range(self.address)
        if etag is not None and answer["ETag"] != etag:
            answer["Body"].close()
            raise changed(self.address)
        return answer

    @contextlib.contextmanager
    def _broken_in_words(self) -> Iterator[None]:
        import botocore.exceptions
        import urllib3.exceptions

        try:
            yield
        except botocore.exceptions.ClientError:
            raise
        except (botocore.exceptions.BotoCoreError, urllib3.exceptions.HTTPError) as error:
            vars(error).update(request=None, response=None)  # they hold the token, and Dask pickles causes along
            raise s3_refusal(self.address, None, None) from error


def _size_said(content_range: str) -> int | None:
    """Read an object's size from the answer to a request for its start; None where another range was sent."""
    found = re.fullmatch(r"bytes 0-\d+/(\d+)", content_range)
    return int(found[1]) if found else None


def _bucket_and_key(address: Address) -> tuple[str, str]:
    parts = urlsplit(address.url)
    key = parts.path.lstrip("/")
    if not parts.netloc or not key:
        raise SourceError(f"{address} names no object; write it like s3://bucket/key", transient=False)
    return parts.netloc, key


def _session() -> "boto3.Session":
    import boto3  # half a second, and only S3 needs it

    for name in _LOGGERS_OF_HEADERS:
        logging.getLogger(name).addFilter(_is_no_debug)
    # boto3 itself reads AWS_DEFAULT_REGION alone
    return boto3.Session(region_name=os.environ.get("AWS_REGION") or None)


def _is_no_debug(record: logging.LogRecord) -> bool:
    return record.levelno > logging.DEBUG


def _runtime_was_lost() -> bool:
    """Tell whether this process was forked from one that used obstore: its threads stayed there, calls would hang."""
    return any(pid != os.getpid() and "obstore" in terms for pid, *terms in _CLIENTS)


def _client_once(terms: tuple[object, ...], make: Callable[[], Any]) -> Any:
    """Make a client once a process for the same terms and AWS environment."""
    environment = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    known = (os.getpid(), *terms, environment)
    with _LOCK:
        if known not in _CLIENTS:
            _CLIENTS[known] = make()
        return _CLIENTS[known]


def _store(bucket: str, address: Address, etag: str | None) -> Any:
    terms = (bucket, address.requester_pays, address.region, etag, "obstore")
    return _client_once(terms, lambda: _new_store(bucket, address, etag))


def _boto_client(bucket: str, address: Address) -> "S3Client":
    def make() -> "S3Client":
        session, credentials, endpoint, region = _terms(bucket, address)
        config = _boto_config(signed=credentials is not None, by_path=endpoint is not None)
        return session.client("s3", region_name=region, config=config)

    client: S3Client = _client_once((bucket, address.requester_pays, address.region, "boto3"), make)
    return client


def _boto_config(*, signed: bool, by_path: bool = False) -> "Config":
    from botocore import UNSIGNED
    from botocore.config import Config

    retries: Any = {"total_max_attempts": 1}
    return Config(
        retries=retries,
        s3={"addressing_style": "path"} if by_path else None,
        connect_timeout=_SILENCE_SECONDS,
        read_timeout=_SILENCE_SECONDS,
        signature_version=None if signed else UNSIGNED,
    )


def _web_store(base: str, etag: str | None) -> Any:
    from obstore.store import HTTPStore

    options = _transport(etag, allow_http=base.startswith("http://"))
    return _client_once((base, etag, "obstore"), lambda: HTTPStore.from_url(base, **options))


def _new_store(bucket: str, address: Address, etag: str | None) -> Any:
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store

    session, credentials, endpoint, region = _terms(bucket, address)
    return S3Store(
        bucket,
        region=region,
        **_endpoint_options(endpoint),
        request_payer=address.requester_pays,
        credential_provider=Boto3CredentialProvider(session) if credentials else None,
        skip_signature=credentials is None,
        **_transport(etag, allow_http=bool(endpoint and endpoint.startswith("http://"))),
    )


def _endpoint_options(endpoint: str | None) -> dict[str, Any]:
    # obstore takes no None where it expects text: without an endpoint of one's own both are left out
    return {"endpoint": endpoint, "virtual_hosted_style_request": False} if endpoint else {}


def _transport(etag: str | None, *, allow_http: bool) -> dict[str, Any]:
    # `timeout` counts the reader's slowness too, so it is long; silence is what `read_timeout` bounds
    options: dict[str, Any] = {"allow_http": allow_http, "timeout": "600s", "read_timeout": f"{_SILENCE_SECONDS}s"}
    if etag is not None:
        options["default_headers"] = {"If-Match": etag}
    return {"client_options": options, "retry_config": {"max_retries": 0, "retry_timeout": timedelta(seconds=600)}}


def _terms(bucket: str, address: Address) -> "tuple[boto3.Session, Credentials | None, str | None, str]":
    """Find out how to speak to a bucket: session, credentials, endpoint (None: AWS's own) and region."""
    terms = (bucket, address.requester_pays, address.region, "terms")
    known: tuple[boto3.Session, Credentials | None, str | None, str] = _client_once(
        terms, lambda: _find_terms(bucket, address)
    )
    return known


def _find_terms(bucket: str, address: Address) -> "tuple[boto3.Session, Credentials | None, str | None, str]":
    import botocore.exceptions

    try:
        session = _session()
        credentials = session.get_credentials()
        client = session.client("s3", region_name=session.region_name or "us-east-1")
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise AccessError(
            f"the AWS configuration cannot be used: {error}; mend it, or choose another with AWS_PROFILE",
            url=str(address),
            cause="no_credentials",
        ) from error
    if credentials is None and address.requester_pays:
        raise AccessError(
            f"no AWS credentials were found, and {address} is requester pays: somebody must be charged; "
            "run aws configure, or set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            url=str(address),
            cause="no_credentials",
        )
    endpoint = str(client.meta.endpoint_url)
    if not endpoint.rstrip("/").endswith((".amazonaws.com", ".amazonaws.com.cn")):
        return session, credentials, endpoint, address.region or session.region_name or "us-east-1"
    return session, credentials, None, address.region or _ask_region(session, bucket) or "us-east-1"


def _ask_region(session: "boto3.Session", bucket: str) -> str | None:
    """Ask S3 where a bucket is: the answer names the region even to those who may not enter. Not charged."""
    import botocore.exceptions

    client = session.client("s3", region_name="us-east-1", config=_boto_config(signed=False))
    try:
        answer = client.head_bucket(Bucket=bucket)
    except botocore.exceptions.ClientError as error:
        answer = error.response  # type: ignore[assignment] # a refusal carries the same header
    except botocore.exceptions.BotoCoreError as error:
        raise SourceError(
            f"s3://{bucket} could not be asked for its region: {error}; is there a network?",
            url=f"s3://{bucket}",
            transient=True,
        ) from error
    return answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region") or session.region_name


def writable_store(url: str) -> Any:
    """Make an obstore store of all keys below an S3 address, read and written with the caller's own credentials.

    Parameters
    ----------
    url : str
        ``s3://bucket/prefix``.

    Raises
    ------
    AccessError
        Without credentials, or if the AWS configuration cannot be used.
    SourceError
        If the address names no prefix.
    """
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store

    bucket, prefix = _bucket_and_key(Address(url))

    def make() -> Any:
        session, endpoint, region = _terms_to_write(bucket, url)
        # nobody counts these requests, so obstore's own retries may stay
        return S3Store(
            bucket,
            prefix=prefix.rstrip("/"),
            region=region,
            **_endpoint_options(endpoint),
            credential_provider=Boto3CredentialProvider(session),
            client_options={"allow_http": bool(endpoint and endpoint.startswith("http://")), "timeout": "600s"},
        )

    return _client_once((url, "writable", "obstore"), make)


def _terms_to_write(bucket: str, url: str) -> "tuple[boto3.Session, str | None, str]":
    session, credentials, endpoint, region = _terms(bucket, Address(url))
    if credentials is None:
        raise AccessError(
            f"no AWS credentials were found to write {url}; run aws configure, or set AWS_PROFILE",
            url=url,
            cause="no_credentials",
        )
    return session, endpoint, region
