"""What S3 answers: buckets in regions, versions, listings, uploads in parts, and who may do what and is charged."""

import base64
import hashlib
import re
import secrets
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from os import PathLike
from pathlib import Path
from urllib.parse import quote, unquote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from servers.aws_calls import Answer, Call, Key, Keys, Refusal

GLOBAL_REGION = "us-east-1"
_HOST = re.compile(
    r"(?:(?P<bucket>.+)\.)?s3(?:-fips|-accelerate)?(?:\.dualstack)?(?:\.(?P<region>[a-z]{2}-[a-z]+-\d))?\.amazonaws\.com"
)
_LEAST_PART_BYTES = 5 << 20


@dataclass(frozen=True, slots=True)
class _Version:
    id: str
    content: bytes
    etag: str
    modified: float
    storage_class: str = "STANDARD"


@dataclass(slots=True)
class _Upload:
    key: str
    parts: dict[int, bytes] = field(default_factory=dict)


@dataclass(slots=True)
class Bucket:
    """A bucket.

    Attributes
    ----------
    account : str
        Its owner's, who may do anything and is charged by nobody.
    requester_pays : bool
        Whoever else signs must offer to pay; who does not sign is refused.
    public : bool
        Anybody may read its objects, also unsigned; else whoever signs.
    lists : bool
        Whoever may read may list, so a missing key is 404; else it is 403.
    versioning : bool
        Keep versions that were replaced.
    """

    name: str
    region: str
    account: str
    requester_pays: bool = False
    public: bool = False
    lists: bool = False
    versioning: bool = False
    _objects: dict[str, list[_Version]] = field(default_factory=dict)
    _uploads: dict[str, _Upload] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def put(self, key: str, content: bytes | bytearray | memoryview | str | PathLike[str], **facts: str) -> str:
        """Store bytes, or those of the file at a path; returns the ETag, quotes included."""
        data = Path(content).read_bytes() if isinstance(content, str | PathLike) else bytes(content)
        return self.add(key, data, f'"{_md5(data).hexdigest()}"', **facts).etag

    def add(self, key: str, data: bytes, etag: str, **facts: str) -> _Version:
        """Store bytes with an ETag."""
        version = _Version(secrets.token_urlsafe(24) if self.versioning else "null", data, etag, time.time(), **facts)
        with self._lock:
            self._objects[key] = [*(self._objects.get(key, []) if self.versioning else []), version]
        return version

    def content(self, key: str) -> bytes:
        """Return what is stored under a key; `KeyError` where nothing is."""
        with self._lock:
            return self._objects[key][-1].content

    def etag(self, key: str) -> str:
        """Return the ETag, quotes included; `KeyError` where nothing is."""
        with self._lock:
            return self._objects[key][-1].etag

    def versions(self, key: str) -> list[str]:
        """Return the ids of all versions, the oldest first."""
        with self._lock:
            return [version.id for version in self._objects.get(key, [])]

    def delete(self, key: str) -> None:
        """Forget an object and its versions, if it is there."""
        with self._lock:
            self._objects.pop(key, None)

    def keys(self) -> list[str]:
        """All keys, in the order of their bytes."""
        with self._lock:
            return sorted(self._objects, key=str.encode)

    def find(self, key: str, version_id: str | None) -> _Version | None:
        """Look an object up."""
        with self._lock:
            found = self._objects.get(key, [])
            if version_id is None:
                return found[-1] if found else None
            return next((version for version in found if version.id == version_id), None)


class S3:
    """All buckets of all regions."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._buckets: dict[str, Bucket] = {}

    def make(self, bucket: Bucket) -> Bucket:
        """Add a bucket."""
        self._buckets[bucket.name] = bucket
        return bucket

    @staticmethod
    def address(call: Call) -> tuple[str, str, str | None] | None:
        """Read (bucket, key, region of the host) off a request of either style; None where the host is not S3's."""
        match = _HOST.fullmatch(call.host)
        if match is None:
            return None
        path = call.raw_path.removeprefix("/")
        bucket = match["bucket"]
        if bucket is None:
            bucket, _, path = path.partition("/")
        return unquote(bucket), unquote(path, errors="surrogateescape"), match["region"]

    def answer(self, call: Call, name: str, key: str, region: str | None) -> tuple[Answer, Key | None]:
        """Answer a request that came to a host of a region; None is the host without one."""
        bucket = self._buckets.get(name)
        by_host = call.host.startswith(f"{name}.")
        # the host without a region leads to where the bucket is; a path there to the first region
        here = region or (bucket.region if bucket is not None and by_host else GLOBAL_REGION)
        if bucket is not None and bucket.region != here:
            host = f"{name}.s3.{bucket.region}.amazonaws.com"
            message = "The bucket you are attempting to access must be addressed using the specified endpoint."
            headers = {"x-amz-bucket-region": bucket.region}
            raise Refusal(301, "PermanentRedirect", message, headers=headers, Endpoint=host, Bucket=name)
        signer = self._keys.signer(call, region=here)
        if bucket is None:
            raise Refusal(404, "NoSuchBucket", "The specified bucket does not exist", BucketName=name)
        body = _plain_body(call)
        return _Asked(call, bucket, key, signer, body).answer(), signer


@dataclass(frozen=True, slots=True)
class _Asked:
    call: Call
    bucket: Bucket
    key: str
    signer: Key | None
    body: bytes

    def answer(self) -> Answer:
        query, method = self.call.query, self.call.method
        is_read = method in ("GET", "HEAD")
        self._authorize(is_read, is_list=is_read and not self.key)
        if not self.key:
            if method == "HEAD":
                return self._answered(Answer(200, {"x-amz-bucket-region": self.bucket.region}))
            if method == "GET" and "uploads" in query:
                return self._list_uploads()
            if method == "GET" and query.get("list-type") == "2":
                return self._list(query)
            if method == "POST" and "delete" in query:
                return self._delete_many()
        elif is_read and "uploadId" in query:
            return self._list_parts(query["uploadId"])
        elif is_read:
            return self._read(query.get("versionId"))
        elif method == "POST" and "uploads" in query:
            return self._begin_upload()
        elif method == "POST" and "uploadId" in query:
            return self._complete(query["uploadId"])
        elif method == "DELETE" and "uploadId" in query:
            self._upload(query["uploadId"])
            del self.bucket._uploads[query["uploadId"]]
            return self._answered(Answer(204))
        elif method == "DELETE":
            self.bucket.delete(self.key)
            return self._answered(Answer(204))
        elif method == "PUT" and "partNumber" in query:
            with self.bucket._lock:
                self._upload(query["uploadId"]).parts[int(query["partNumber"])] = self.body
            return self._answered(Answer(200, {"ETag": f'"{_md5(self.body).hexdigest()}"'}))
        elif method == "PUT" and "acl" in query:
            return self._answered(Answer(200))
        elif method == "PUT" and "x-amz-copy-source" not in self.call.headers:
            return self._store()
        raise Refusal(501, "NotImplemented", "A header or parameter you provided implies functionality not played here")

    @property
    def _is_owner(self) -> bool:
        return self.signer is not None and self.signer.account == self.bucket.account

    @property
    def _may_list(self) -> bool:
        return self._is_owner or self.bucket.lists

    def _authorize(self, is_read: bool, *, is_list: bool) -> None:
        denied = Refusal(403, "AccessDenied", "Access Denied", headers={"x-amz-bucket-region": self.bucket.region})
        if self._is_owner:
            return
        if not is_read or (self.signer is None and not self.bucket.public) or (is_list and not self._may_list):
            raise denied
        offer = self.call.header("x-amz-request-payer") or self.call.query.get("x-amz-request-payer", "")
        if self.bucket.requester_pays and (self.signer is None or offer.lower() != "requester"):
            raise denied

    def _answered(self, answer: Answer) -> Answer:
        charged = self.bucket.requester_pays and not self._is_owner
        headers = answer.headers | ({"x-amz-request-charged": "requester"} if charged else {})
        return Answer(answer.status, headers, answer.body, charged)

    def _read(self, version_id: str | None) -> Answer:
        version = self.bucket.find(self.key, version_id)
        if version is None:
            if not self._may_list:
                raise Refusal(403, "AccessDenied", "Access Denied")
            if version_id is not None:
                raise Refusal(404, "NoSuchVersion", "The specified version does not exist.", VersionId=version_id)
            raise Refusal(404, "NoSuchKey", "The specified key does not exist.", Key=self.key)
        headers = {
            "ETag": version.etag,
            "Last-Modified": formatdate(version.modified, usegmt=True),
            "Accept-Ranges": "bytes",
            "Content-Type": "binary/octet-stream",
        }
        if version.id != "null":
            headers["x-amz-version-id"] = version.id
        if version.storage_class != "STANDARD":
            headers["x-amz-storage-class"] = version.storage_class
            if self.call.method == "GET" and version.storage_class in ("GLACIER", "DEEP_ARCHIVE"):
                message = "The operation is not valid for the object's storage class"
                raise Refusal(403, "InvalidObjectState", message, StorageClass=version.storage_class)
        wanted = self.call.header("If-Match")
        if wanted and wanted != "*" and version.etag.strip('"') not in (tag.strip(' "') for tag in wanted.split(",")):
            message = "At least one of the pre-conditions you specified did not hold"
            raise Refusal(412, "PreconditionFailed", message, Condition="If-Match")
        span = _span(self.call.header("Range"), len(version.content))
        if span is None:
            return self._answered(Answer(200, headers, version.content))
        headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{len(version.content)}"
        return self._answered(Answer(206, headers, version.content[span]))

    def _store(self) -> Answer:
        condition, match = self.call.header("If-None-Match"), self.call.header("If-Match")
        there = self.bucket.find(self.key, None)
        if (condition == "*" and there is not None) or (match and (there is None or there.etag != match)):
            raise Refusal(412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold")
        version = self.bucket.add(self.key, self.body, f'"{_md5(self.body).hexdigest()}"')
        versions = {"x-amz-version-id": version.id} if version.id != "null" else {}
        return self._answered(Answer(200, {"ETag": version.etag} | versions))

    def _begin_upload(self) -> Answer:
        upload_id = secrets.token_urlsafe(32)
        with self.bucket._lock:
            self.bucket._uploads[upload_id] = _Upload(self.key)
        where = {"Bucket": self.bucket.name, "Key": self.key, "UploadId": upload_id}
        return self._answered(_document("InitiateMultipartUploadResult", _elements(where)))

    def _upload(self, upload_id: str) -> _Upload:
        upload = self.bucket._uploads.get(upload_id)
        if upload is None or upload.key != self.key:
            raise Refusal(404, "NoSuchUpload", "The specified multipart upload does not exist.", UploadId=upload_id)
        return upload

    def _complete(self, upload_id: str) -> Answer:
        with self.bucket._lock:
            upload = self._upload(upload_id)
            contents, digests = [], b""
            for part in _named(self.body, "Part"):
                number, etag = int(part["PartNumber"]), part["ETag"].strip('"')
                data = upload.parts.get(number)
                if data is None or _md5(data).hexdigest() != etag:
                    raise Refusal(400, "InvalidPart", "One or more of the specified parts could not be found.")
                contents.append(data)
                digests += _md5(data).digest()
            if any(len(data) < _LEAST_PART_BYTES for data in contents[:-1]):
                raise Refusal(400, "EntityTooSmall", "Your proposed upload is smaller than the minimum allowed size")
            etag = f'"{_md5(digests).hexdigest()}-{len(contents)}"'
            self.bucket.add(self.key, b"".join(contents), etag)
            del self.bucket._uploads[upload_id]
        where = {"Bucket": self.bucket.name, "Key": self.key, "ETag": etag}
        return self._answered(_document("CompleteMultipartUploadResult", _elements(where)))

    def _list_parts(self, upload_id: str) -> Answer:
        parts = [
            f"<Part>{_elements({'PartNumber': number, 'ETag': _quoted(data), 'Size': len(data)})}</Part>"
            for number, data in sorted(self._upload(upload_id).parts.items())
        ]
        about = {"Bucket": self.bucket.name, "Key": self.key, "UploadId": upload_id, "IsTruncated": "false"}
        return self._answered(_document("ListPartsResult", _elements(about) + "".join(parts)))

    def _list_uploads(self) -> Answer:
        prefix = self.call.query.get("prefix", "")
        encode = _encoder(self.call.query)
        found = [
            f"<Upload>{_elements({'Key': encode(upload.key), 'UploadId': upload_id})}</Upload>"
            for upload_id, upload in sorted(self.bucket._uploads.items())
            if upload.key.startswith(prefix)
        ]
        about = {"Bucket": self.bucket.name, "Prefix": encode(prefix), "IsTruncated": "false"}
        about |= {"EncodingType": "url"} if "encoding-type" in self.call.query else {}
        return self._answered(_document("ListMultipartUploadsResult", _elements(about) + "".join(found)))

    def _list(self, query: dict[str, str]) -> Answer:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = base64.b64decode(query.get("continuation-token", "")).decode() or query.get("start-after", "")
        most, encode = min(int(query.get("max-keys", "1000")), 1000), _encoder(query)
        entries: dict[str, str] = {}
        truncated = False
        for key in sorted(self.bucket._objects, key=str.encode):
            tail = key.removeprefix(prefix)
            if not key.startswith(prefix):
                continue
            group = prefix + tail[: tail.index(delimiter) + len(delimiter)] if delimiter and delimiter in tail else None
            entry = group or key
            if entry in entries or entry.encode() <= after.encode():
                continue
            if len(entries) == most:
                truncated = True
                break
            if group:
                entries[group] = f"<CommonPrefixes>{_elements({'Prefix': encode(group)})}</CommonPrefixes>"
            elif version := self.bucket.find(key, None):
                at = datetime.fromtimestamp(version.modified, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
                facts = {"Key": encode(key), "LastModified": at, "ETag": version.etag, "Size": len(version.content)}
                entries[key] = f"<Contents>{_elements(facts | {'StorageClass': version.storage_class})}</Contents>"
        about = {"Name": self.bucket.name, "Prefix": encode(prefix), "KeyCount": len(entries), "MaxKeys": most}
        about |= {"Delimiter": encode(delimiter)} if delimiter else {}
        about |= {"EncodingType": "url"} if "encoding-type" in query else {}
        about |= {"IsTruncated": str(truncated).lower()}
        if truncated:
            about["NextContinuationToken"] = base64.b64encode(list(entries)[-1].encode()).decode()
        return self._answered(_document("ListBucketResult", _elements(about) + "".join(entries.values())))

    def _delete_many(self) -> Answer:
        keys = [part["Key"] for part in _named(self.body, "Object")]
        for key in keys:
            self.bucket.delete(key)
        deleted = "".join(f"<Deleted>{_elements({'Key': key})}</Deleted>" for key in keys)
        return self._answered(_document("DeleteResult", deleted))


def _plain_body(call: Call) -> bytes:
    """Take a body out of aws-chunked, and compare it with the checksums that came along."""
    body, sums = call.body, {name.lower(): str(value) for name, value in call.headers.items()}
    if call.header("x-amz-content-sha256").startswith("STREAMING-"):
        plain, trailers = _unchunked(body)
        sums |= trailers
        if len(plain) != int(call.header("x-amz-decoded-content-length")):
            raise Refusal(400, "IncompleteBody", "You did not provide the number of bytes specified")
        body = plain
    for name, made in (
        ("content-md5", lambda: _md5(body).digest()),
        ("x-amz-checksum-crc32", lambda: zlib.crc32(body).to_bytes(4, "big")),
        ("x-amz-checksum-sha1", lambda: hashlib.sha1(body, usedforsecurity=False).digest()),
        ("x-amz-checksum-sha256", lambda: hashlib.sha256(body).digest()),
    ):
        if name in sums and base64.b64decode(sums[name]) != made():
            raise Refusal(400, "BadDigest", f"The {name} you specified did not match the calculated checksum.")
    return body


def _unchunked(body: bytes) -> tuple[bytes, dict[str, str]]:
    plain, at = [], 0
    while True:
        end = body.index(b"\r\n", at)
        size = int(body[at:end].partition(b";")[0], 16)
        at = end + 2
        if not size:
            break
        plain.append(body[at : at + size])
        at += size + 2
    lines = (line.partition(":") for line in body[at:].decode().split("\r\n") if line)
    return b"".join(plain), {name.lower().strip(): value.strip() for name, _, value in lines}


def _span(header: str, size: int) -> slice | None:
    """Read a single byte range; None for the whole object, as for several ranges and malformed ones."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match.groups()
    if first and last and int(last) < int(first):
        return None
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        headers, message = {"Content-Range": f"bytes */{size}"}, "The requested range is not satisfiable"
        raise Refusal(416, "InvalidRange", message, headers=headers, ActualObjectSize=str(size))
    return slice(start, stop)


def _encoder(query: dict[str, str]):  # type: ignore[no-untyped-def]
    return (lambda text: quote(text, safe="/")) if query.get("encoding-type") == "url" else (lambda text: text)


def _elements(facts: dict[str, object]) -> str:
    return "".join(f"<{name}>{escape(str(value))}</{name}>" for name, value in facts.items())


def _document(name: str, inside: str) -> Answer:
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n<{name} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    return Answer(200, {"Content-Type": "application/xml"}, f"{text}{inside}</{name}>".encode())


def _named(body: bytes, name: str) -> Iterator[dict[str, str]]:
    for element in ElementTree.fromstring(body).iter():  # noqa: S314
        if element.tag.rpartition("}")[2] == name:
            yield {child.tag.rpartition("}")[2]: child.text or "" for child in element}


def _quoted(data: bytes) -> str:
    return f'"{_md5(data).hexdigest()}"'


def _md5(data: bytes) -> "hashlib._Hash":
    return hashlib.md5(data, usedforsecurity=False)
