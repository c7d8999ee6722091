"""Where bytes come from: S3 through obstore, local files, and any other URL through fsspec.

An `Address` says where an object is and travels between processes; it holds no credentials. `connect` makes the
client, once a process and bucket, and anew after a fork. Errors of the libraries below are translated here, once, and
say what to do; no key or token is ever in one. Nothing here knows of money: that is `fetch`'s.
"""

import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import fsspec
import obstore
import obstore.exceptions

from dmdata.errors import AccessError, DmdataError, IntegrityError, ObjectMissingError, SourceError

if TYPE_CHECKING:
    import boto3
    from obstore.store import S3Store

# small, so that a broken transfer loses little of what arrived; obstore hands over more where it has more
_STREAM_BYTES = 128 << 10
_LOCK = threading.Lock()
_STORES: dict[tuple[object, ...], "S3Store"] = {}


@dataclass(frozen=True, slots=True)
class Address:
    """Where one object is, and on what terms. Holds no credentials.

    Attributes
    ----------
    url : str
        ``s3://bucket/key``, an absolute path, or any URL that fsspec reads.
    requester_pays : bool
        Whether the reader is charged: then reads go through budget and ledger.
    region : str or None
        Of the bucket; None asks the bucket.
    listed : bool
        Whether a catalog lists the object: tells a missing key from missing rights where both answer 403.
    """

    url: str
    requester_pays: bool = False
    region: str | None = None
    listed: bool = False

    @property
    def is_s3(self) -> bool:
        """Whether S3's own client reads it."""
        return self.url.startswith("s3://")

    @property
    def is_local(self) -> bool:
        """Whether it is a file of this machine."""
        return "://" not in self.url or self.url.startswith("file://")


@dataclass(frozen=True, slots=True)
class ObjectState:
    """Size and identity of an object at one moment; `etag` is None where the store has none."""

    n_bytes: int
    etag: str | None


class Source(Protocol):
    """One object's bytes."""

    def start(self, n_bytes: int) -> tuple[bytes, ObjectState]:
        """Read up to `n_bytes` from the start, in one request, with the object's size and etag.

        Raises
        ------
        ObjectMissingError, AccessError, SourceError
        """

    def read_into(self, buffer: memoryview, start: int, *, etag: str | None, stopped: Callable[[], bool]) -> None:
        """Fill a buffer from byte `start` on, in one request.

        Raises
        ------
        IntegrityError
            If the object's etag is not the one given.
        SourceError
            If the transfer broke: `n_received` bytes are in the buffer; `transient` tells whether to try again.
        """


def connect(address: Address) -> Source:
    """Make the reader of one object. Touches no network."""
    if not address.is_local and os.environ.get("DMDATA_OFFLINE", "0") not in ("", "0"):
        raise SourceError(
            f"{address.url} is remote and DMDATA_OFFLINE is set; unset it to read", url=address.url, transient=False
        )
    if address.is_local:
        return _LocalSource(address)
    return _S3Source(address) if address.is_s3 else _FsspecSource(address)


def has_credentials() -> bool:
    """Tell whether AWS credentials can be found, without using them."""
    return _session().get_credentials() is not None


def upload(path: Path, url: str, *, acl: str | None) -> None:
    """Put a local file under an S3 address, in parts where it is large.

    Parameters
    ----------
    path : Path
    url : str
        ``s3://bucket/key``; replaced if it is there.
    acl : str or None
        Canned ACL of the object, as "authenticated-read".

    Raises
    ------
    AccessError
        Without credentials, or without the right to write there.
    SourceError
        If the transfer failed; nothing, or what was there before, is under the address.
    """
    import boto3.exceptions
    import botocore.exceptions

    bucket, key = _bucket_and_key(Address(url))
    try:
        _session().client("s3").upload_file(str(path), bucket, key, ExtraArgs={"ACL": acl} if acl else None)
    except botocore.exceptions.NoCredentialsError as error:
        raise AccessError(
            f"no AWS credentials were found to write {url}; run aws configure, or set AWS_PROFILE",
            url=url,
            cause="no_credentials",
        ) from error
    except (boto3.exceptions.S3UploadFailedError, botocore.exceptions.ClientError) as error:
        # its text may quote keys, so it is not chained
        found = re.search(r"\((\w+)\) when calling", str(error))
        code = found[1] if found else "no reason given"
        raise AccessError(
            f"{url} may not be written ({code}); check the bucket's name and that these credentials may put objects",
            url=url,
            cause="denied",
        ) from None
    except botocore.exceptions.BotoCoreError as error:
        raise SourceError(f"{url} could not be written: {error}; try again", url=url, transient=True) from error


@dataclass(frozen=True, slots=True)
class _S3Source:
    """An object in S3, by ranges through obstore. Retries are fetch's, so that each request is counted."""

    address: Address

    def start(self, n_bytes: int) -> tuple[bytes, ObjectState]:
        result = self._get(0, n_bytes, etag=None)
        try:
            return bytes(result.bytes()), ObjectState(result.meta["size"], result.meta["e_tag"])
        except obstore.exceptions.BaseError as error:
            raise _s3_error(self.address, error) from None

    def read_into(self, buffer: memoryview, start: int, *, etag: str | None, stopped: Callable[[], bool]) -> None:
        done = 0
        try:
            result = self._get(start, start + len(buffer), etag=etag)
            if etag is not None and result.meta["e_tag"] != etag:
                raise _changed(self.address.url)
            for chunk in result.stream(min_chunk_size=_STREAM_BYTES):
                n_fitting = min(len(chunk), len(buffer) - done)
                buffer[done : done + n_fitting] = memoryview(chunk)[:n_fitting]
                done += n_fitting
                if stopped():
                    return
        except obstore.exceptions.BaseError as error:
            raise _s3_error(self.address, error, n_received=done) from None
        if done != len(buffer):
            raise _short(self.address.url, start + done, transient=True, n_received=done)

    def _get(self, start: int, stop: int, *, etag: str | None) -> Any:
        bucket, key = _bucket_and_key(self.address)
        store = _store(bucket, self.address)
        options: dict[str, Any] = {"range": (start, stop)}
        if etag is not None:
            options["if_match"] = etag
        try:
            return obstore.get(store, key, options=options)  # type: ignore[arg-type] # a TypedDict of stubs only
        except (obstore.exceptions.BaseError, FileNotFoundError, ValueError) as error:
            raise _s3_error(self.address, error) from None


def _bucket_and_key(address: Address) -> tuple[str, str]:
    parts = urlsplit(address.url)
    key = parts.path.lstrip("/")
    if not parts.netloc or not key:
        raise SourceError(f"{address.url} names no object; write it like s3://bucket/key", transient=False)
    return parts.netloc, key


def _session() -> "boto3.Session":
    import boto3  # half a second, and only S3 needs it

    return boto3.Session()


def _store(bucket: str, address: Address) -> "S3Store":
    """Make the client of a bucket once a process: Rust's threads do not survive a fork."""
    terms = (os.getpid(), bucket, address.requester_pays, address.region)
    environment = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    with _LOCK:
        if (terms, environment) not in _STORES:
            _STORES[terms, environment] = _new_store(bucket, address)
        return _STORES[terms, environment]


def _new_store(bucket: str, address: Address) -> "S3Store":
    import botocore.exceptions
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store

    session = _session()
    try:
        credentials = session.get_credentials()
        client = session.client("s3", region_name=session.region_name or "us-east-1")
    except botocore.exceptions.BotoCoreError as error:
        raise AccessError(
            f"the AWS configuration cannot be used: {error}; mend it, or choose another with AWS_PROFILE",
            url=address.url,
            cause="no_credentials",
        ) from error
    if credentials is None and address.requester_pays:
        raise AccessError(
            f"no AWS credentials were found, and {address.url} is requester pays: somebody must be charged; "
            "run aws configure, or set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            url=address.url,
            cause="no_credentials",
        )
    endpoint = str(client.meta.endpoint_url)
    own_server = not endpoint.rstrip("/").endswith((".amazonaws.com", ".amazonaws.com.cn"))
    region = address.region or (session.region_name if own_server else _ask_region(session, bucket))
    return S3Store(
        bucket,
        region=region or "us-east-1",
        endpoint=endpoint if own_server else None,
        virtual_hosted_style_request=False if own_server else None,
        request_payer=address.requester_pays,
        credential_provider=Boto3CredentialProvider(session) if credentials else None,
        skip_signature=credentials is None,
        client_options={"allow_http": endpoint.startswith("http://"), "timeout": "120s", "read_timeout": "20s"},
        retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=180)},
    )


def _ask_region(session: "boto3.Session", bucket: str) -> str | None:
    """Ask S3 where a bucket is: the answer names the region even to those who may not enter. Not charged."""
    import botocore.exceptions
    from botocore import UNSIGNED
    from botocore.config import Config

    client = session.client("s3", region_name="us-east-1", config=Config(signature_version=UNSIGNED))
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


def _s3_error(address: Address, error: Exception, *, n_received: int = 0) -> DmdataError:
    """Say what S3 refused, and why, in our own words: its texts may quote keys, so they are not chained either."""
    url, text = address.url, str(error)
    found = re.search(r"status code: (\d{3})", text)
    status = int(found[1]) if found else None
    found = re.search(r"<Code>(\w+)</Code>", text)
    code = found[1] if found else None
    if isinstance(error, obstore.exceptions.NotFoundError | FileNotFoundError) or status == 404:
        return ObjectMissingError(f"nothing is at {url} ({code or status}); check the name", url=url, transient=False)
    if isinstance(error, obstore.exceptions.PreconditionError) or status == 412:
        return _changed(url)
    if status in (401, 403) or isinstance(
        error, obstore.exceptions.PermissionDeniedError | obstore.exceptions.UnauthenticatedError
    ):
        return _refused(address, code)
    if status == 416:
        return _short(url, None, transient=False)
    if status in (301, 400) and code not in ("RequestTimeout", None):
        return SourceError(
            f"{url} was refused with {status} {code}: the region or endpoint is likely wrong; set AWS_REGION to the "
            "bucket's, or unset AWS_ENDPOINT_URL",
            url=url,
            transient=False,
        )
    if isinstance(error, ValueError) or "non-partial response" in text:
        what = "its key is not one S3 knows" if isinstance(error, ValueError) else "it was sent whole, not by range"
        return SourceError(f"{url} cannot be read by ranges: {what}; is this an S3 endpoint?", url=url, transient=False)
    what = f"{status} {code or ''}".strip() if status else "the connection broke, stalled or could not be made"
    transient = status is None or status >= 500 or status in (400, 408, 429)
    return SourceError(f"{url} could not be read: {what}", url=url, transient=transient, n_received=n_received)


_BAD_CREDENTIALS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
}


def _refused(address: Address, code: str | None) -> AccessError:
    """Tell the causes of a 403 apart as far as can be: credentials, requester pays, no such key, no rights."""
    if code in _BAD_CREDENTIALS:
        cause, words = "bad_credentials", (
            f"the AWS credentials in use are not valid there ({code}); renew them (aws sso login, aws configure), or "
            "choose others with AWS_PROFILE"
        )  # fmt: skip
    elif not address.requester_pays:
        cause, words = "requester_pays", (
            "no offer to pay was sent; if the bucket is requester pays, open it with requester_pays=True, or set "
            "requester_pays: true in its catalog. Otherwise these credentials may not read it, or there is no such key"
        )  # fmt: skip
    elif not address.listed:
        cause, words = "not_in_release", (
            "no catalog lists this key, and S3 answers 403, not 404, for keys that do not exist; find the name with "
            "dmdata ls. If the key does exist, these credentials may not read it"
        )  # fmt: skip
    else:
        cause, words = "denied", (
            "the key is catalogued and the offer to pay was sent, so these credentials' own policy is likely in the "
            "way: they need s3:GetObject on the bucket; see which ones are used with aws sts get-caller-identity"
        )  # fmt: skip
    return AccessError(f"{address.url} was refused: {words}", url=address.url, cause=cause, code=code)


@dataclass(frozen=True, slots=True)
class _LocalSource:
    address: Address

    def start(self, n_bytes: int) -> tuple[bytes, ObjectState]:
        path = _local_path(self.address.url)
        try:
            with path.open("rb") as file:
                return file.read(n_bytes), _state_of_file(file.fileno())
        except OSError as error:
            raise _os_error(self.address.url, error) from error

    def read_into(self, buffer: memoryview, start: int, *, etag: str | None, stopped: Callable[[], bool]) -> None:
        done = 0
        try:
            with _local_path(self.address.url).open("rb", buffering=0) as file:
                if etag is not None and _state_of_file(file.fileno()).etag != etag:
                    raise _changed(self.address.url)
                file.seek(start)
                while done < len(buffer) and not stopped():
                    n_read = file.readinto(buffer[done:])
                    if not n_read:
                        raise _short(self.address.url, start + done, transient=False)
                    done += n_read
        except OSError as error:
            if isinstance(error, SourceError):
                raise
            raise _os_error(self.address.url, error) from error


def _local_path(url: str) -> Path:
    return Path(url.removeprefix("file://"))


def _state_of_file(descriptor: int) -> ObjectState:
    facts = os.fstat(descriptor)
    return ObjectState(facts.st_size, f"{facts.st_ino:x}-{facts.st_mtime_ns:x}-{facts.st_size:x}")


@dataclass(frozen=True, slots=True)
class _FsspecSource:
    """Any store fsspec knows; identity is its etag, checksum or time, asked before each read."""

    address: Address

    def start(self, n_bytes: int) -> tuple[bytes, ObjectState]:
        state = self._state()
        return self._cat(0, min(n_bytes, state.n_bytes)), state

    def read_into(self, buffer: memoryview, start: int, *, etag: str | None, stopped: Callable[[], bool]) -> None:
        if stopped():
            return
        if etag is not None and self._state().etag != etag:
            raise _changed(self.address.url)
        data = self._cat(start, start + len(buffer))
        buffer[: len(data)] = data[: len(buffer)]
        if len(data) != len(buffer):
            raise _short(self.address.url, start + len(data), transient=True, n_received=min(len(data), len(buffer)))

    def _state(self) -> ObjectState:
        filesystem, path = self._open()
        try:
            facts = filesystem.info(path)
        except (OSError, ValueError) as error:
            raise _os_error(self.address.url, error) from error
        identity = [facts.get(name) for name in ("ETag", "etag", "checksum", "mtime", "LastModified", "created")]
        identity = [str(value) for value in identity if value is not None]
        return ObjectState(int(facts["size"] or 0), identity[0] if identity else None)

    def _cat(self, start: int, stop: int) -> bytes:
        filesystem, path = self._open()
        try:
            return bytes(filesystem.cat_file(path, start=start, end=stop)) if stop > start else b""
        except (OSError, ValueError) as error:
            raise _os_error(self.address.url, error) from error

    def _open(self) -> tuple[Any, str]:
        try:
            filesystem, path = fsspec.url_to_fs(self.address.url)
        except (ValueError, ImportError) as error:
            raise SourceError(
                f"no reader for {self.address.url}: {error}", url=self.address.url, transient=False
            ) from error
        return filesystem, path


def _os_error(url: str, error: Exception) -> SourceError | AccessError:
    if isinstance(error, FileNotFoundError):
        return ObjectMissingError(f"nothing is at {url}; check the name", url=url, transient=False)
    if isinstance(error, PermissionError):
        return AccessError(f"{url} may not be read by this user ({error})", url=url, cause="denied")
    transient = isinstance(error, ConnectionError | TimeoutError)
    return SourceError(f"{url} could not be read: {error}", url=url, transient=transient)


def _changed(url: str) -> IntegrityError:
    return IntegrityError(
        f"{url} changed since it was first read, so what was read before does not belong to it; "
        "open it again and read anew",
        url=url,
    )


def _short(url: str, at: int | None, *, transient: bool, n_received: int = 0) -> SourceError:
    where = "before" if at is None else f"at byte {at}, inside"
    return SourceError(
        f"{url} ended {where} the range that was asked for", url=url, transient=transient, n_received=n_received
    )
