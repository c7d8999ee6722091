"""Errors for what S3 refuses, by status and code, with the remedy."""

from dmdata.errors import AccessError, DmdataError, ObjectMissingError, SourceError
from dmdata.objects.address import Address, changed, past_end

EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
"""Codes of S3 and STS for keys that were valid once."""

BAD_CREDENTIALS = EXPIRED | {
    "AuthFailure",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
}
"""Codes of S3 and STS for keys that are not valid."""

_CLOCK = {"RequestTimeTooSkewed", "RequestInTheFuture"}
_ACCOUNT = {
    "AccountProblem",
    "AllAccessDisabled",
    "InvalidPayer",
    "NotDeviceOwnerError",
    "NotSignedUp",
    "OptInRequired",
    "UserSuspended",
}
_ARCHIVED = {"InvalidObjectState", "ObjectNotInActiveTierError"}
_ELSEWHERE = {
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "IncorrectEndpoint",
    "PermanentRedirect",
    "TemporaryRedirect",
}
_THROTTLED = {"BandwidthLimitExceeded", "RequestLimitExceeded", "SlowDown", "Throttling", "ThrottlingException"}
_PASSING = _THROTTLED | {"InternalError", "OperationAborted", "RequestTimeout", "ServiceUnavailable", "TooManyRequests"}


class WrongRegionError(SourceError):
    """A bucket is in another region than it was asked for in: in `region`, where S3 says so."""

    region: str | None = None


def s3_refusal(
    address: Address, status: int, code: str | None, *, region: str | None = None, location: str | None = None
) -> DmdataError:
    """Explain an answer of S3.

    Parameters
    ----------
    address : Address
    status : int
        Of HTTP.
    code : str or None
        Of S3's error document; None where it could not be read.
    region : str, optional
        Where S3 says that the bucket is.
    location : str, optional
        Where the answer redirects to.
    """
    code = code if code and not code.isdecimal() else None
    said = f"{status} {code}" if code else str(status)

    def failed(words: str, *, cause: str | None = None, transient: bool = False) -> SourceError:
        words = f"{address} could not be read ({said}): {words}"
        return SourceError(words, url=str(address), cause=cause, code=code, transient=transient, refused=True)

    if code in BAD_CREDENTIALS or code in _CLOCK or code in _ACCOUNT or (code or "").startswith("KMS."):
        return _refused(address, code)
    if code in _ARCHIVED:
        return failed(
            "the object is archived (Glacier), and must be restored before it can be read: aws s3api restore-object, "
            "or ask its owner",
            cause="archived",
        )
    if code == "NoSuchBucket":
        return no_such_bucket(address)
    if code == "InvalidBucketName":
        return bad_bucket_name(address)
    if code in ("NoSuchVersion", "InvalidVersionId") or (address.version and status in (400, 405)):
        return ObjectMissingError(
            f"nothing is at {address} ({said}): there is no such version; see aws s3api list-object-versions",
            url=str(address), refused=True,
        )  # fmt: skip
    if status == 404:
        hint = "" if code or not address.is_s3 else ", and that an S3 endpoint answers: see AWS_ENDPOINT_URL"
        return ObjectMissingError(
            f"nothing is at {address} ({said}); check the name{hint}", url=str(address), refused=True
        )
    if status == 412:
        return changed(address, refused=True)
    if status == 416:
        return past_end(address)
    if code in _PASSING or status >= 500 or status in (408, 425, 429):
        slow = status in (429, 503) or code in _THROTTLED
        return failed("the store asks to slow down" if slow else "the store has a fault of its own", transient=True)
    if code in _ELSEWHERE or region or (status in (301, 307) and not location and address.is_s3):
        where = f"in {region}" if region else "in another region, or at another endpoint"
        words = f"the bucket is {where}; set AWS_REGION to its region, or unset AWS_ENDPOINT_URL"
        words = f"{address} could not be read ({said}): {words}"
        return WrongRegionError(words, url=str(address), cause="region", code=code, region=region, refused=True)
    if 300 <= status < 400:
        to = f" to {Address(location.partition('?')[0])}" if location else ""
        return failed(
            f"its server redirects{to}, which S3's own clients do not follow; set AWS_ENDPOINT_URL to the address it "
            "redirects to",
            cause="redirect",
        )
    if status in (401, 403) and (code or not address.is_s3):
        return _refused(address, code)
    if code is None and address.is_s3:
        return not_s3(address, said)
    return failed("the store does not accept the request; check the address, and whether it is an S3 endpoint")


def _refused(address: Address, code: str | None) -> AccessError:
    """Distinguish the causes of a 403 as far as possible: credentials, requester pays, no such key, no rights."""
    if code in EXPIRED:
        cause, words = "bad_credentials", (
            f"the AWS credentials in use have expired ({code}); renew them (aws sso login, aws configure), or choose "
            "others with AWS_PROFILE"
        )  # fmt: skip
    elif code in BAD_CREDENTIALS:
        cause, words = "bad_credentials", (
            f"the AWS credentials in use are not valid there ({code}); renew them (aws sso login, aws configure), or "
            "choose others with AWS_PROFILE"
        )  # fmt: skip
    elif code in _CLOCK:
        cause, words = "clock", (
            f"the clock of this machine differs too much from the store's ({code}); set it right, as with "
            "timedatectl set-ntp true"
        )  # fmt: skip
    elif code in _ACCOUNT:
        cause, words = "account", (
            f"AWS has disabled or does not serve this account or bucket ({code}); see the account's billing page, or "
            "ask AWS's support, or the bucket's owner"
        )  # fmt: skip
    elif code and code.startswith("KMS."):
        cause, words = "denied", (
            f"the object is encrypted with a key that cannot be used ({code}); ask the bucket's owner for kms:Decrypt "
            "on it"
        )  # fmt: skip
    elif not address.is_s3:
        cause, words = "denied", (
            "its server wants a login or another address; where the address is a signed one, it may have expired: ask "
            "for a new one"
        )  # fmt: skip
    elif not address.requester_pays:
        cause, words = "requester_pays", (
            "no offer to pay was sent; if the bucket is requester pays, set requester_pays: true in its catalog. "
            "Otherwise these credentials may not read it, or there is no such key"
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
    return AccessError(f"{address} was refused: {words}", url=str(address), cause=cause, code=code, refused=True)


def not_by_range(address: Address) -> SourceError:
    """State that a server does not answer with ranges."""
    return SourceError(
        f"{address} cannot be read by ranges: the server sends the whole object, or does not know such a key; "
        "is it an S3 endpoint?",
        url=str(address),
        whole=True,
    )


def encoded(address: Address, encoding: str) -> SourceError:
    """State that an object is sent compressed, so that its ranges are not those of its elements."""
    return SourceError(
        f"{address} is stored or sent with Content-Encoding {encoding}, so its elements cannot be read by ranges; "
        "download it as it is (dmdata get URL), unpack it, and read the file, or ask its publisher for another",
        url=str(address),
        cause="encoded",
        by_download=True,
    )


def not_s3(address: Address, said: str = "") -> SourceError:
    """State that a server does not answer as S3 does."""
    answer = f" ({said})" if said else ""
    return SourceError(
        f"{address} could not be read: its server does not answer as S3 does{answer}; check AWS_ENDPOINT_URL, and "
        "whether a proxy or a login page answers in its place",
        url=str(address),
        cause="not_s3",
        refused=True,
    )


def no_such_bucket(address: Address | str) -> ObjectMissingError:
    """State that there is no such bucket."""
    return ObjectMissingError(
        f"nothing is at {address} (404 NoSuchBucket): there is no such bucket at this endpoint; check its name, and "
        "AWS_ENDPOINT_URL where one is set",
        url=str(address),
        cause="no_such_bucket",
        refused=True,
    )


def bad_bucket_name(address: Address) -> SourceError:
    """State that no bucket can have this name."""
    if address.url.startswith("s3://arn:"):
        return SourceError(
            f"{address} names an access point by its ARN, which is not read; write the access point's alias, as "
            "NAME-s3alias, or the bucket's own name, as s3://bucket/key",
            url=str(address),
            cause="bucket_name",
            unsent=True,
        )
    return SourceError(
        f"{address} names a bucket that cannot exist: names have 3 to 63 small letters, digits, dots and hyphens; "
        "check its spelling, as s3://bucket/key",
        url=str(address),
        cause="bucket_name",
        refused=True,
    )
