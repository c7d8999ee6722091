"""Objects in S3: ranges through obstore, first bytes and every odd case through boto3, one configuration for both.

The first bytes of an object in S3 are read by boto3, which shows whether the reader is charged; obstore, which reads
the rest, shows no headers. A process forked from one that used obstore reads everything by boto3, and so are keys that
obstore would change and access points read. Errors of libraries are translated by `dmdata.objects.explaining`; where a
bucket refused the credentials or is elsewhere, `dmdata.objects.aws` looks for another way, and the request is tried
again.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import obstore
import obstore.exceptions

from dmdata.errors import AccessError, SourceError
from dmdata.objects.address import (
    Address,
    Buffer,
    ByPieces,
    ObjectState,
    PastEndError,
    Put,
    Source,
    changed,
    ended_short,
)
from dmdata.objects.aws import BucketAccess, another_way, bucket_and_key, split_s3, terms_of, terms_to_write
from dmdata.objects.clients import (
    CONNECT_SECONDS,
    LOCK,
    client_once,
    connection_options,
    transport_options,
)
from dmdata.objects.explaining.foreign_errors import botocore_error, store_error
from dmdata.objects.explaining.refusals import not_by_range, not_s3, s3_refusal
from dmdata.objects.forks import announce_runtime, runtime_was_lost

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_BOTO_CHUNK_BYTES = 128 << 10
# how long S3 may be silent while it puts an object's parts together
_COMPLETING_SECONDS = 120
# objects of a bucket that are read by turns with the connections they have
_MOST_STORES = 32


def s3_source(address: Address) -> Source:
    """Make the reader of an object in S3; see `dmdata.objects.source.connect`."""
    bucket, key = bucket_and_key(address)
    if runtime_was_lost() or not _is_plain(key):
        terms_of(bucket, address)  # what is wrong with them is said before anything is sent
        return _BotoSource(address, bucket, key)
    return _S3Source(address, bucket, key)


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
        If credentials are needed and there are none, or they cannot be had: an expired single sign-on among them.
    SourceError
        If the bucket cannot be asked for its region.
    """
    terms = terms_of(bucket_and_key(address)[0], address)
    method = terms.credentials.method if terms.credentials else None
    return AccessTerms(method, terms.session.profile_name, None if terms.is_aws else terms.endpoint, terms.region)


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

    terms = terms_to_write(split_s3(url)[0], url)
    retries: Any = {"mode": "standard", "total_max_attempts": 5}
    config = Config(
        retries=retries,
        connect_timeout=CONNECT_SECONDS,
        read_timeout=_COMPLETING_SECONDS,
        # an MD5 goes along with all that is put
        request_checksum_calculation="when_required",
    )
    return terms.session.client("s3", region_name=terms.region, config=config)


@contextlib.contextmanager
def writing(url: str) -> Iterator[None]:
    """Explain why an S3 address could not be written while the block runs.

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
        refusal = s3_refusal(Address(url), status, code)
        if refusal.cause in ("bad_credentials", "clock", "account", "no_such_bucket", "bucket_name"):
            raise refusal from None
        raise AccessError(
            f"{url} may not be written ({code} for {error.operation_name}); check the bucket's name and that these "
            "credentials may get and put objects and list multipart uploads there",
            url=url,
            cause="denied",
        ) from None
    except (botocore.exceptions.BotoCoreError, urllib3.exceptions.HTTPError) as error:
        failure = botocore_error(Address(url), error)
        raise failure.reworded(failure.message.replace("could not be read", "could not be written")) from None


class _S3Source:
    """An object in S3 by obstore, its start by boto3. Retries are fetch's, so that each request is counted.

    A client is made for each etag, and sends it as If-Match with every request: a short range is then one call. A weak
    etag matches nothing by RFC 9110, so it is compared with that of each answer.
    """

    most_at_once = 512
    pieces_at_once = 10

    def __init__(self, address: Address, bucket: str, key: str) -> None:
        self.address = address
        self._bucket, self._key = bucket, key
        # found again after a refusal: credentials may have been renewed meanwhile
        self._terms: BucketAccess | None = terms_of(bucket, address)

    def start(self, n_bytes: int) -> tuple[bytes, ObjectState]:
        return _BotoSource(self.address, self._bucket, self._key).start(n_bytes)

    def piece(self, start: int, stop: int, *, etag: str | None) -> Buffer:
        result = self._get(start, stop, etag=etag)
        with self._in_words():
            return result.bytes()  # type: ignore[no-any-return]

    def pieces(self, starts: Sequence[int], stops: Sequence[int], *, etag: str | None) -> Sequence[Buffer]:
        if self.address.version or _is_weak(etag):
            return [self.piece(start, stop, etag=etag) for start, stop in zip(starts, stops, strict=True)]
        with self._in_words():
            # ranges that touch would still become one request, and a plan has none of those but where they are long
            return obstore.get_ranges(self._store(etag), self._key, starts=starts, ends=stops, coalesce=0)  # type: ignore[return-value]

    def read(self, start: int, stop: int, *, etag: str | None, put: Put, stopped: Callable[[], bool]) -> None:
        result = self._get(start, stop, etag=etag)
        with self._in_words():
            # every chunk as the connection gives it: where it breaks, nothing that arrived is lost
            for chunk in result.stream(min_chunk_size=1):
                put(np.frombuffer(chunk, np.uint8))
                start += len(chunk)
                if stopped():
                    return
        if start < stop:
            raise ended_short(self.address, start, transient=True)

    def _get(self, start: int, stop: int, *, etag: str | None) -> Any:
        """Ask for a range, and look at whose it is."""
        options: dict[str, Any] = {"range": (start, stop)}
        if self.address.version:
            options["version"] = self.address.version
        with self._in_words():
            result = obstore.get(self._store(None if _is_weak(etag) else etag), self._key, options=options)  # type: ignore[arg-type]
        if etag is not None and result.meta["e_tag"] != etag:
            raise changed(self.address)
        return result

    def _store(self, etag: str | None) -> Any:
        terms = self._terms
        if terms is None:
            terms = self._terms = terms_of(self._bucket, self.address)
        store = terms.stores.get(etag)
        if store is None:
            with LOCK:  # of many threads that begin a read one makes it
                store = terms.stores.get(etag)
                if store is None:
                    if len(terms.stores) >= _MOST_STORES:  # each keeps connections
                        del terms.stores[next(iter(terms.stores))]
                    store = terms.stores[etag] = _store(self._bucket, self.address, terms, etag)
        return store

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        used = self._terms
        try:
            yield
        except (obstore.exceptions.BaseError, FileNotFoundError, ValueError) as error:
            refusal = store_error(self.address, error)
            used, self._terms = used or terms_of(self._bucket, self.address), None
            raise another_way(self._bucket, self.address, used, refusal) from None


@dataclass(frozen=True, slots=True)
class _BotoSource(ByPieces):
    """An object in S3 by boto3: its start always, all of it where obstore cannot read it."""

    address: Address
    bucket: str
    key: str

    def start(self, n_bytes: int) -> tuple[bytes, ObjectState]:
        try:
            answer, terms = self._get(0, n_bytes, etag=None)
        except PastEndError:
            return b"", ObjectState(0, None)
        with contextlib.closing(answer["Body"]) as body, self._broken_in_words():
            size = _size_said(answer.get("ContentRange", ""))
            if size is None:
                raise SourceError(
                    f"{self.address} was answered with another range than was asked for; try again",
                    url=str(self.address),
                    transient=True,
                )
            offers = self.address.requester_pays and terms.credentials is not None
            charged = answer.get("RequestCharged") == "requester" if offers else None
            head = body.read(n_bytes)
        if len(head) != min(n_bytes, size):
            raise SourceError(
                f"{self.address} sent {len(head)} bytes where an object of {size} has {min(n_bytes, size)}; try again, "
                "or ask its publisher whether it is whole",
                url=str(self.address),
                transient=True,
            )
        return head, ObjectState(size, answer.get("ETag"), charged, _foreign_encoding(answer))

    def read(self, start: int, stop: int, *, etag: str | None, put: Put, stopped: Callable[[], bool]) -> None:
        answer, _ = self._get(start, stop, etag=etag)
        with contextlib.closing(answer["Body"]) as body, self._broken_in_words():
            while start < stop and not stopped():
                chunk = body.read(min(_BOTO_CHUNK_BYTES, stop - start))
                if not chunk:
                    raise ended_short(self.address, start, transient=True)
                put(np.frombuffer(chunk, np.uint8))
                start += len(chunk)

    def _get(self, start: int, stop: int, *, etag: str | None) -> tuple[Any, BucketAccess]:
        import botocore.exceptions

        terms = terms_of(self.bucket, self.address)
        conditions: dict[str, Any] = {"IfMatch": etag} if etag is not None and not _is_weak(etag) else {}
        if self.address.requester_pays and terms.credentials is not None:
            conditions["RequestPayer"] = "requester"
        if self.address.version:
            conditions["VersionId"] = self.address.version
        try:
            with self._broken_in_words():
                answer = terms.client.get_object(
                    Bucket=self.bucket, Key=self.key, Range=f"bytes={start}-{stop - 1}", **conditions
                )
        except botocore.exceptions.ClientError as error:
            facts = error.response["ResponseMetadata"]
            headers = facts.get("HTTPHeaders", {})
            refusal = s3_refusal(
                self.address,
                facts["HTTPStatusCode"],
                error.response["Error"].get("Code"),
                region=headers.get("x-amz-bucket-region") if facts["HTTPStatusCode"] in (301, 400) else None,
                location=headers.get("location"),
            )
            raise another_way(self.bucket, self.address, terms, refusal) from None
        if answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
            answer["Body"].close()
            raise not_by_range(self.address) if "ETag" in answer else not_s3(self.address)
        if etag is not None and answer.get("ETag") != etag:
            answer["Body"].close()
            raise changed(self.address)
        return answer, terms

    @contextlib.contextmanager
    def _broken_in_words(self) -> Iterator[None]:
        import botocore.exceptions
        import botocore.parsers
        import urllib3.exceptions

        try:
            yield
        except botocore.exceptions.ClientError:
            raise
        except (
            botocore.exceptions.BotoCoreError,
            botocore.parsers.ResponseParserError,
            urllib3.exceptions.HTTPError,
        ) as error:
            raise botocore_error(self.address, error) from None  # it holds the token, and Dask pickles causes along


def _foreign_encoding(answer: Any) -> str | None:
    """Read how an object is encoded; None where ranges of it are ranges of what was saved."""
    encodings = [part.strip() for part in answer.get("ContentEncoding", "").split(",")]
    return next((part for part in encodings if part not in ("", "identity", "aws-chunked")), None)


def _size_said(content_range: str) -> int | None:
    """Read an object's size from the answer to a request for its start; None where another range was sent."""
    found = re.fullmatch(r"bytes 0-\d+/(\d+)", content_range)
    return int(found[1]) if found else None


def _is_plain(key: str) -> bool:
    """Whether obstore asks for just this key: it takes no empty, dotted or unprintable parts."""
    return key.isprintable() and not {"", ".", ".."}.intersection(key.split("/"))


def _store(bucket: str, address: Address, terms: BucketAccess, etag: str | None) -> Any:
    """Make the obstore store of a bucket that sends an etag."""
    from obstore.store import S3Store

    announce_runtime()
    return S3Store(
        bucket,
        **_where(terms),
        request_payer=address.requester_pays and terms.credentials is not None,
        **transport_options(terms.endpoint, etag),
    )


def _is_weak(etag: str | None) -> bool:
    return etag is not None and etag.startswith("W/")


def _where(terms: BucketAccess) -> dict[str, Any]:
    """Return for obstore what boto3 found out, whatever obstore itself would take from the environment."""
    return {
        "region": terms.region,
        "endpoint": terms.endpoint,
        "aws_endpoint_url_s3": terms.endpoint,  # comes before `endpoint`, and from the environment if it is not given
        "virtual_hosted_style_request": not terms.by_path,
        "skip_signature": terms.credentials is None,
        "credential_provider": terms.for_obstore if terms.credentials else None,
    }


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
        If the address names no prefix, or in a process that was forked from one that uses obstore.
    """
    from obstore.store import S3Store

    bucket, prefix = bucket_and_key(Address(url))

    def make() -> Any:
        terms = terms_to_write(bucket, url)
        options: Any = {"allow_http": terms.endpoint.startswith("http://"), "timeout": "600s"}
        options |= connection_options(terms.endpoint)
        announce_runtime()
        # nobody counts these requests, so obstore's own retries may stay
        return S3Store(
            bucket,
            prefix=prefix.rstrip("/"),
            **_where(terms),
            client_options=options,
        )

    if runtime_was_lost():
        raise SourceError(
            f"{url} cannot be read or written as a copy in a process that was forked from one that uses obstore; start "
            "processes by multiprocessing's spawn or forkserver",
            url=url,
        )
    terms_to_write(bucket, url)
    return client_once((bucket, url, "writable"), make)
