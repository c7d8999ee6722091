"""What a store's refusal means, in words and with the remedy: whatever boto3, obstore or the server called it.

Texts of the libraries may quote keys and tokens, so they are neither quoted nor chained.
"""

import re

import obstore.exceptions

from dmdata.address import Address, changed, ended_short
from dmdata.errors import AccessError, DmdataError, ObjectMissingError, SourceError


def store_error(address: Address, error: Exception) -> DmdataError:
    """Say what a store refused, and why, in our own words: its texts may quote keys, so they are not chained either."""
    text = str(error)
    found = re.search(r"status code: (\d{3})", text)
    status = int(found[1]) if found else None
    found = re.search(r"<Code>(\w+)</Code>", text)
    code = found[1] if found else None
    if isinstance(error, obstore.exceptions.NotFoundError | FileNotFoundError):
        status = 404
    elif isinstance(error, obstore.exceptions.PreconditionError):
        status = 412
    elif status is None and isinstance(
        error, obstore.exceptions.PermissionDeniedError | obstore.exceptions.UnauthenticatedError
    ):
        status = 403
    elif isinstance(error, ValueError) or "non-partial response" in text:
        return not_by_range(address)
    return s3_refusal(address, status, code, unsent="Connection refused" in text)


def s3_refusal(address: Address, status: int | None, code: str | None, *, unsent: bool = False) -> DmdataError:
    """Say in words what an answer means; without a status the connection itself failed."""
    if status == 404:
        return ObjectMissingError(
            f"nothing is at {address} ({code or status}); check the name",
            url=str(address),
            transient=False,
            refused=True,
        )
    if status == 412:
        return changed(address, refused=True)
    if status in (401, 403):
        return _refused(address, code)
    if status == 416:
        return ended_short(address, None, transient=False)
    if status in (301, 400) and code != "RequestTimeout":
        return SourceError(
            f"{address} was refused with {status} {code or ''}: the region or endpoint is likely wrong; set AWS_REGION "
            "to the bucket's, or unset AWS_ENDPOINT_URL",
            url=str(address),
            transient=False,
            refused=True,
        )
    what = f"{status} {code or ''}".strip() if status else "the connection broke, stalled or could not be made"
    transient = status is None or status >= 500 or status in (400, 408, 429)
    return SourceError(
        f"{address} could not be read: {what}",
        url=str(address),
        transient=transient,
        refused=status is not None,
        **({"unsent": True} if unsent else {}),
    )


def not_by_range(address: Address) -> SourceError:
    """Say that a server does not answer with ranges."""
    return SourceError(
        f"{address} cannot be read by ranges: the server sends the whole object, or does not know such a key; "
        "is it an S3 endpoint?",
        url=str(address),
        transient=False,
        whole=True,
    )


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
