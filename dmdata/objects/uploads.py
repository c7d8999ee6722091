"""Objects put into a bucket while their bytes are made: in parts, side by side, resumed where a killed try ended.

Nothing about an upload is kept on this machine. The bucket itself is asked which parts of an unfinished upload it has;
a part is there if it has the size and the MD5 of the one that would be sent, and an object is, if its ETag is the one
that its bytes give. The size of parts depends on the object's alone, so that another try makes the same ones. Where
ETags are no MD5s, as under SSE-KMS, all is sent again.

An object changes at once, when its upload is completed: until then, what was there before stays.
"""

import base64
import contextlib
import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from dmdata.errors import SourceError
from dmdata.objects.s3 import writing, writing_client

PART_BYTES = 8 << 20
"""Size of the parts of all but the largest objects; S3 takes parts from 5 MiB."""

_MOST_PARTS = 10_000
_MIB = 1 << 20
_N_CONNECTIONS = 4


def part_bytes(n_bytes: int) -> int:
    """Choose the size of the parts of an object of `n_bytes`, so that S3 takes that many."""
    return max(PART_BYTES, -(-n_bytes // _MOST_PARTS // _MIB) * _MIB)


class EtagDigest:
    """The ETag that an object of `n_bytes` has once it was uploaded here; takes its bytes in order."""

    def __init__(self, n_bytes: int) -> None:
        self._n_bytes = n_bytes
        self._part_bytes = part_bytes(n_bytes)
        self._parts: list[bytes] = []
        self._part = _md5()
        self._filled = 0

    def write(self, data: bytes | memoryview) -> None:
        """Take the next bytes."""
        left = memoryview(data)
        while len(left):
            piece = left[: self._part_bytes - self._filled]
            self._part.update(piece)
            self._filled += len(piece)
            left = left[len(piece) :]
            if self._filled == self._part_bytes:
                self._end_part()

    @property
    def etag(self) -> str:
        """In hexadecimal, with the number of parts where there are several; of all bytes written so far."""
        parts = [*self._parts, *([self._part.digest()] if self._filled or not self._parts else [])]
        return parts[0].hex() if self._n_bytes <= self._part_bytes else _etag_of(parts)

    def _end_part(self) -> None:
        self._parts.append(self._part.digest())
        self._part, self._filled = _md5(), 0


class Uploads:
    """Objects under one S3 address, written with the caller's own credentials; used in a `with`.

    Four connections send parts while the next are filled. Memory holds one part for each object that is begun, and
    four that are sent. Leaving the `with` by an error or Ctrl-C ends what is being sent at once; parts that have
    arrived stay, and cost storage, until the objects are uploaded again or the bucket's lifecycle rule for incomplete
    multipart uploads removes them.

    Parameters
    ----------
    url : str
        ``s3://bucket`` or ``s3://bucket/prefix``; names of objects start there.
    acl : str, optional
        Canned ACL of the objects, as "authenticated-read"; by default they are private.

    Raises
    ------
    AccessError
        Without credentials, or, from any method, without the right to do it.
    SourceError
        If the address names no bucket; from any method, if the transfer failed.
    """

    def __init__(self, url: str, *, acl: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._bucket = urlsplit(url).netloc
        self._prefix = urlsplit(url).path.strip("/")
        if not self._bucket:
            raise SourceError(f"{url} names no bucket; write it like s3://bucket/prefix", url=url)
        self._acl = acl
        self._client = writing_client(url)
        self._pool = ThreadPoolExecutor(_N_CONNECTIONS, "dmdata-upload")
        self._room = threading.BoundedSemaphore(_N_CONNECTIONS)
        self._stopped = threading.Event()
        self._unfinished: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    @property
    def has_unfinished(self) -> bool:
        """Whether an upload in parts was begun that is not complete."""
        return bool(self._unfinished)

    def read(self, name: str) -> bytes | None:
        """Read a small object; None if there is none."""
        with self._at(name), self._none_if("NoSuchKey", "404"):
            return self._client.get_object(**self._where(name))["Body"].read()
        return None

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Put a small object in one request."""
        md5 = base64.b64encode(_md5(data).digest()).decode()
        with self._at(name):
            self._client.put_object(**self._where(name), Body=io.BytesIO(data), ContentMD5=md5, **self._terms)

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        with self._at(name):
            self._client.delete_object(**self._where(name))

    def etag(self, name: str, n_bytes: int) -> str | None:
        """Look up the ETag of an object; None if there is none of this size, or it may not be looked at."""
        with self._at(name), self._none_if("404", "403", "NoSuchKey", "AccessDenied"):
            answer = self._client.head_object(**self._where(name))
            return answer["ETag"].strip('"') if answer["ContentLength"] == n_bytes else None
        return None

    def begin(self, name: str, n_bytes: int) -> "Upload":
        """Begin to write an object of `n_bytes`, or resume where an earlier try ended.

        Of unfinished uploads under this name, the one with the most usable parts is resumed, the others are aborted.
        """
        if n_bytes <= part_bytes(n_bytes):
            return Upload(self, name, n_bytes, None, None)
        upload_id, parts = self._resumable(name, n_bytes)
        if upload_id is None:
            with self._at(name):
                upload_id = self._client.create_multipart_upload(**self._where(name), **self._terms)["UploadId"]
        self._unfinished.add(upload_id)
        return Upload(self, name, n_bytes, upload_id, parts)

    def keep(self, name: str) -> None:
        """Leave an object as it is, but for its ACL, which becomes that of an object that is put."""
        from botocore.exceptions import ClientError

        with self._at(name):
            try:
                self._client.put_object_acl(**self._where(name), ACL=self._acl or "private")  # type: ignore[arg-type]
            except ClientError as error:
                # who may not set ACLs, in a bucket that has none or with these credentials, has set none before
                has_none = error.response["Error"]["Code"] in ("AccessControlListNotSupported", "AccessDenied")
                if not has_none or self._acl not in (None, "bucket-owner-full-control"):
                    raise

    def abort_unfinished(self, folder: str, belongs: Callable[[str], bool]) -> None:
        """Abort unfinished uploads below `folder`, a name or empty, whose name `belongs`."""
        for name, upload_id in self._list_unfinished(f"{folder}/" if folder else ""):
            if belongs(name):
                self._abort(name, upload_id)

    def _resumable(self, name: str, n_bytes: int) -> "tuple[str | None, dict[int, _Part] | None]":
        found: list[tuple[str, dict[int, _Part]]] = []
        for there, upload_id in self._list_unfinished(name):
            if there != name:
                continue
            parts = self._parts(name, upload_id)
            if all(part.n_bytes == _length_of_part(number, n_bytes) for number, part in parts.items()):
                found.append((upload_id, parts))
            else:
                self._abort(name, upload_id)
        if not found:
            return None, None
        found.sort(key=lambda upload: len(upload[1]))
        for upload_id, _ in found[:-1]:
            self._abort(name, upload_id)
        return found[-1]

    def _list_unfinished(self, start: str) -> list[tuple[str, str]]:
        pages = self._client.get_paginator("list_multipart_uploads")
        found = []
        with self._at(start):
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._key(start)):
                found += [(upload["Key"], upload["UploadId"]) for upload in page.get("Uploads", [])]
        skipped = len(self._key(""))
        return [(key[skipped:], upload_id) for key, upload_id in found]

    def _parts(self, name: str, upload_id: str) -> "dict[int, _Part]":
        pages = self._client.get_paginator("list_parts")
        found = {}
        with self._at(name), self._none_if("NoSuchUpload"):
            for page in pages.paginate(**self._where(name), UploadId=upload_id):
                for part in page.get("Parts", []):
                    found[part["PartNumber"]] = _Part(part["ETag"].strip('"'), part["Size"])
        return found

    def _abort(self, name: str, upload_id: str) -> None:
        with self._at(name), self._none_if("NoSuchUpload"):
            self._client.abort_multipart_upload(**self._where(name), UploadId=upload_id)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _where(self, name: str) -> Any:
        return {"Bucket": self._bucket, "Key": self._key(name)}

    @property
    def _terms(self) -> Any:
        return {"ACL": self._acl} if self._acl else {}

    def _at(self, name: str) -> contextlib.AbstractContextManager[None]:
        return writing(f"{self.url}/{name}")

    @contextlib.contextmanager
    def _none_if(self, *codes: str) -> Iterator[None]:
        from botocore.exceptions import ClientError

        try:
            yield
        except ClientError as error:
            if error.response["Error"]["Code"] not in codes:
                raise


class Upload:
    """One object that is being written; made by `Uploads.begin`.

    Attributes
    ----------
    sent_bytes : int
        Bytes of it that were sent rather than found in the bucket; known when it is in place.
    """

    def __init__(
        self, uploads: Uploads, name: str, n_bytes: int, upload_id: str | None, there: "dict[int, _Part] | None"
    ) -> None:
        self.sent_bytes = 0
        self._uploads = uploads
        self._name = name
        self._n_bytes = n_bytes
        self._upload_id = upload_id
        self._where: Any = uploads._where(name) | {"UploadId": upload_id}
        self._there = there or {}
        self._is_resumed = there is not None
        self._part_bytes = part_bytes(n_bytes)
        self._filled = _Body(uploads._stopped)
        self._sent: list[Future[tuple[str, int]]] = []
        self._etags: list[str] = []

    def write(self, data: bytes | memoryview) -> None:
        """Take the object's next bytes; waits while four parts are being sent.

        Raises
        ------
        AccessError, SourceError
            If one of its parts could not be sent.
        """
        left = memoryview(data)
        while len(left):
            piece = left[: self._part_bytes - self._filled.tell()]
            self._filled.write(piece)
            left = left[len(piece) :]
            if self._filled.tell() == self._part_bytes and self._upload_id:
                self._hand_over()

    def finish(self) -> None:
        """Wait until all of it but what is put in place in one request is in the bucket."""
        if self._upload_id:
            if self._filled.tell():
                self._hand_over()
            for part in self._sent:
                etag, sent_bytes = part.result()
                self._etags.append(etag)
                self.sent_bytes += sent_bytes

    def put_in_place(self) -> None:
        """Make it the object of its name, after `finish`."""
        uploads = self._uploads
        if self._upload_id is None:
            uploads.put(self._name, self._filled.getbuffer())
            self.sent_bytes = self._n_bytes
            return
        with uploads._at(self._name):
            self._complete()
        uploads._unfinished.discard(self._upload_id)
        if self._is_resumed:  # it was begun by another try, perhaps with another ACL
            uploads.keep(self._name)

    def _complete(self) -> None:
        from botocore.exceptions import ClientError

        parts: Any = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(self._etags, 1)]
        uploads = self._uploads
        try:
            uploads._client.complete_multipart_upload(**self._where, MultipartUpload={"Parts": parts})
        except ClientError as error:
            # where the answer was lost, the request was repeated, although the first had done it
            whole = _etag_of([bytes.fromhex(etag) for etag in self._etags])
            if error.response["Error"]["Code"] != "NoSuchUpload" or whole != uploads.etag(self._name, self._n_bytes):
                raise

    def _hand_over(self) -> None:
        for part in self._sent:
            if part.done():
                part.result()
        body, self._filled = self._filled, _Body(self._uploads._stopped)
        self._uploads._room.acquire()
        self._sent.append(self._uploads._pool.submit(self._send, len(self._sent) + 1, body))

    def _send(self, number: int, body: "_Body") -> tuple[str, int]:
        """Send a part if it is not there; return its ETag and the bytes sent."""
        uploads = self._uploads
        try:
            n_bytes, md5 = body.tell(), _md5(body.getbuffer())
            if self._there.get(number) == _Part(md5.hexdigest(), n_bytes):
                return md5.hexdigest(), 0
            body.seek(0)
            with uploads._at(self._name):
                answer = uploads._client.upload_part(
                    **self._where,
                    PartNumber=number,
                    Body=body,
                    ContentMD5=base64.b64encode(md5.digest()).decode(),
                )
            return answer["ETag"].strip('"'), n_bytes
        finally:
            uploads._room.release()


@dataclass(frozen=True, slots=True)
class _Part:
    """A part in the bucket, as its list of parts describes it."""

    etag: str
    n_bytes: int


class _Stopped(BaseException):
    """Ends a request from within; no Exception, which botocore would take for a fault and try again."""


class _Body(io.BytesIO):
    """A part's bytes, which are read no further once the upload was stopped."""

    def __init__(self, stopped: threading.Event) -> None:
        super().__init__()
        self._stopped = stopped

    def read(self, size: int | None = -1, /) -> bytes:
        if self._stopped.is_set():
            raise _Stopped
        return super().read(size)


def _length_of_part(number: int, n_bytes: int) -> int:
    return max(0, min(part_bytes(n_bytes), n_bytes - (number - 1) * part_bytes(n_bytes)))


def _etag_of(parts: list[bytes]) -> str:
    return f"{_md5(b''.join(parts)).hexdigest()}-{len(parts)}"


def _md5(data: bytes | memoryview = b"") -> Any:
    return hashlib.md5(data, usedforsecurity=False)
