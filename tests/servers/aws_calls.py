"""What was asked of AWS, what it answers, and whose signature is on it: Signature Version 4, checked in earnest."""

import hashlib
import hmac
import re
import secrets
import threading
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.message import Message
from urllib.parse import quote, unquote
from xml.sax.saxutils import escape

_MOST_SKEW_SECONDS = 900


@dataclass(frozen=True, slots=True)
class Call:
    """A request as it came, its body whole."""

    method: str
    host: str
    raw_path: str
    raw_query: str
    headers: Message
    body: bytes

    @property
    def query(self) -> dict[str, str]:
        """Parameters, decoded once."""
        return dict(_parameters(self.raw_query))

    def header(self, name: str, otherwise: str = "") -> str:
        """Return a header's value."""
        return str(self.headers.get(name, otherwise))


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent back."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    charged: bool = False


class Refusal(Exception):  # noqa: N818 - an answer, not an error of this program
    """An error document of AWS; `details` become its elements."""

    def __init__(
        self, status: int, code: str, message: str, *, headers: dict[str, str] | None = None, **details: str
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.headers, self.details = headers or {}, details


@dataclass(frozen=True, slots=True)
class Key:
    """An access key. Times are of `time.time`."""

    key_id: str
    secret: str
    account: str
    token: str | None = None
    expires_at: float | None = None

    @property
    def env(self) -> dict[str, str]:
        """The variables that hold it."""
        variables = {"AWS_ACCESS_KEY_ID": self.key_id, "AWS_SECRET_ACCESS_KEY": self.secret}
        return variables | ({"AWS_SESSION_TOKEN": self.token} if self.token else {})

    @property
    def file(self) -> str:
        """The lines of a credentials file that hold it."""
        return "".join(f"{name.lower()} = {value}\n" for name, value in self.env.items())


class Keys:
    """All access keys there are, and what they sign."""

    def __init__(self) -> None:
        self.clock_ahead_seconds = 0.0  # AWS's clock against this machine's
        self._keys: dict[str, Key] = {}
        self._lock = threading.Lock()

    def now(self) -> float:
        """AWS's time."""
        return time.time() + self.clock_ahead_seconds

    def issue(self, account: str, *, seconds: float | None = None) -> Key:
        """Make a key: of a session that lasts so many seconds, or one for ever."""
        kind = "AKIA" if seconds is None else "ASIA"
        key = Key(kind + secrets.token_hex(8).upper(), secrets.token_urlsafe(30), account)
        if seconds is not None:
            key = replace(key, token="token+/" + secrets.token_urlsafe(40) + "==", expires_at=self.now() + seconds)
        with self._lock:
            self._keys[key.key_id] = key
        return key

    def expire(self, key: Key) -> None:
        """End a session now; a key for ever is deleted."""
        with self._lock:
            if key.expires_at is None:
                del self._keys[key.key_id]
            else:
                self._keys[key.key_id] = replace(key, expires_at=0.0)

    def expire_sessions(self) -> None:
        """End all sessions now."""
        with self._lock:
            sessions = [key for key in self._keys.values() if key.expires_at is not None]
        for key in sessions:
            self.expire(key)

    def signer(self, call: Call, *, region: str, service: str = "s3") -> Key | None:
        """Tell who signed a request; None where nobody did.

        Raises
        ------
        Refusal
            As AWS does, for a key, a token, a signature, a time or a region that are not right.
        """
        query = call.query
        if "X-Amz-Signature" in query:
            return self._check(call, _Signature.of_query(query), region, service)
        if "Authorization" in call.headers:
            return self._check(call, _Signature.of_header(call), region, service)
        return None

    def _check(self, call: Call, signature: "_Signature", region: str, service: str) -> Key:
        if signature.service != service or signature.region != region:
            raise Refusal(
                400,
                "AuthorizationHeaderMalformed",
                f"The authorization header is malformed; the region '{signature.region}' is wrong; expecting "
                f"'{region}'",
                headers={"x-amz-bucket-region": region},
                Region=region,
            )
        with self._lock:
            key = self._keys.get(signature.key_id)
        if key is None:
            message = "The AWS Access Key Id you provided does not exist in our records."
            raise Refusal(403, "InvalidAccessKeyId", message, AWSAccessKeyId=signature.key_id)
        if key.token != signature.token:
            raise Refusal(400, "InvalidToken", "The provided token is malformed or otherwise invalid.")
        if key.expires_at is not None and key.expires_at <= self.now():
            raise Refusal(400, "ExpiredToken", "The provided token has expired.")
        signed_at = datetime.strptime(signature.at, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
        if signature.lasts_seconds is not None:
            if self.now() > signed_at + signature.lasts_seconds:
                raise Refusal(403, "AccessDenied", "Request has expired")
        elif abs(self.now() - signed_at) > _MOST_SKEW_SECONDS:
            message = "The difference between the request time and the current time is too large."
            at = datetime.fromtimestamp(self.now(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            raise Refusal(403, "RequestTimeTooSkewed", message, RequestTime=signature.at, ServerTime=at)
        unsigned = {name.lower() for name in call.headers if name.lower().startswith("x-amz-")}
        if unsigned := unsigned.union({"host"}).difference(signature.signed_headers):
            message = "There were headers present in the request which were not signed"
            raise Refusal(403, "AccessDenied", message, HeadersNotSigned=", ".join(sorted(unsigned)))
        if not hmac.compare_digest(signature.value, signature.expected(call, key.secret)):
            message = (
                "The request signature we calculated does not match the signature you provided. Check your key and "
                "signing method."
            )
            raise Refusal(403, "SignatureDoesNotMatch", message, AWSAccessKeyId=signature.key_id)
        said = call.header("x-amz-content-sha256")
        if re.fullmatch("[0-9a-f]{64}", said) and said != hashlib.sha256(call.body).hexdigest():
            message = "The provided 'x-amz-content-sha256' header does not match what was computed."
            raise Refusal(400, "XAmzContentSHA256Mismatch", message)
        return key


@dataclass(frozen=True, slots=True)
class _Signature:
    key_id: str
    day: str
    region: str
    service: str
    signed_headers: tuple[str, ...]
    value: str
    at: str
    token: str | None
    lasts_seconds: int | None = None

    @classmethod
    def of_header(cls, call: Call) -> "_Signature":
        found = re.fullmatch(
            r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d+)/([^/]*)/(\w+)/aws4_request, ?"
            r"SignedHeaders=([\w;-]+), ?Signature=([0-9a-f]+)",
            call.header("Authorization"),
        )
        if found is None:
            raise Refusal(400, "AuthorizationHeaderMalformed", "The authorization header is malformed.")
        *scope, headers, value = found.groups()
        token = call.header("x-amz-security-token") or None
        return cls(*scope, tuple(headers.split(";")), value, call.header("x-amz-date"), token)

    @classmethod
    def of_query(cls, query: dict[str, str]) -> "_Signature":
        try:
            key_id, day, region, service, _ = query["X-Amz-Credential"].rsplit("/", 4)
            headers, at, lasts = query["X-Amz-SignedHeaders"], query["X-Amz-Date"], int(query["X-Amz-Expires"])
        except (KeyError, ValueError):
            message = "Query-string authentication requires all its parameters"
            raise Refusal(400, "AuthorizationQueryParametersError", message) from None
        token = query.get("X-Amz-Security-Token")
        signed = tuple(headers.split(";"))
        return cls(key_id, day, region, service, signed, query["X-Amz-Signature"], at, token, lasts)

    def expected(self, call: Call, secret: str) -> str:
        parameters = [(name, value) for name, value in _parameters(call.raw_query) if name != "X-Amz-Signature"]
        encoded = sorted((quote(name, safe="~"), quote(value, safe="~")) for name, value in parameters)
        headers = [f"{name}:{_joined(call.headers.get_all(name, []))}\n" for name in self.signed_headers]
        if self.lasts_seconds is not None:
            payload = "UNSIGNED-PAYLOAD"
        else:
            payload = call.header("x-amz-content-sha256") or hashlib.sha256(call.body).hexdigest()
        request = "\n".join(
            (
                call.method,
                # S3 takes the path apart and encodes it itself: who encodes otherwise than it does is refused
                quote(unquote(call.raw_path, errors="surrogateescape"), safe="/~", errors="surrogateescape"),
                "&".join(f"{name}={value}" for name, value in encoded),
                "".join(headers),
                ";".join(self.signed_headers),
                payload,
            )
        )
        scope = f"{self.day}/{self.region}/{self.service}/aws4_request"
        digest = hashlib.sha256(request.encode("utf-8", "surrogateescape")).hexdigest()
        secret_bytes = f"AWS4{secret}".encode()
        for word in scope.split("/"):
            secret_bytes = _hmac(secret_bytes, word)
        return _hmac(secret_bytes, f"AWS4-HMAC-SHA256\n{self.at}\n{scope}\n{digest}").hex()


def error_document(refusal: Refusal, request_id: str) -> bytes:
    """Write a refusal as S3 does."""
    elements = {"Code": refusal.code, "Message": refusal.message, **refusal.details}
    elements |= {"RequestId": request_id, "HostId": "played+on/loopback="}
    inside = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in elements.items())
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<Error>{inside}</Error>'.encode()


def _parameters(raw_query: str) -> list[tuple[str, str]]:
    pairs = (part.partition("=") for part in raw_query.split("&") if part)
    return [(unquote(name.replace("+", " ")), unquote(value.replace("+", " "))) for name, _, value in pairs]


def _joined(values: list[str]) -> str:
    return ",".join(re.sub(" +", " ", value.strip()) for value in values)


def _hmac(key: bytes, message: str) -> bytes:
    return hmac.new(key, message.encode(), hashlib.sha256).digest()
