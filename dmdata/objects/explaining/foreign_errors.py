"""What an error of obstore or boto3 means, whatever they call it.

Their texts may quote keys and tokens, so they are neither quoted nor chained.
"""

import re
from urllib.parse import urlsplit

import obstore.exceptions

from dmdata.errors import AccessError, DmdataError
from dmdata.objects.address import Address
from dmdata.objects.explaining.credentials import credentials_error, is_of_credentials
from dmdata.objects.explaining.failures import connection_error, kind_of_chain, without_requests
from dmdata.objects.explaining.refusals import bad_bucket_name, not_by_range, not_s3, s3_refusal


def store_error(address: Address, error: Exception) -> DmdataError:
    """State what one of obstore's stores refused, and why."""
    text = str(error)
    found = re.search(r"status code: (\d{3})", text)
    status = int(found[1]) if found else None
    found = re.search(r"<Code>([\w.]+)</Code>", text)
    code = found[1] if found else None
    found = re.search(r"<Region>([\w-]+)</Region>", text)
    region = found[1] if found else None
    if isinstance(error, obstore.exceptions.NotFoundError | FileNotFoundError):
        status = 404
    elif isinstance(error, obstore.exceptions.PreconditionError):
        status = 412
    elif "without LOCATION" in text:
        status, code = 301, code or "PermanentRedirect"
    elif status is None and isinstance(
        error, obstore.exceptions.PermissionDeniedError | obstore.exceptions.UnauthenticatedError
    ):
        status = 403
    elif status is None and (isinstance(error, ValueError) or "non-partial response" in text):
        return not_by_range(address)
    if status is None:
        found = re.search(r"Error performing \w+ \w+://(?:[^/@\s]*@)?([^/\s]+)", text)
        return connection_error(address, _kind_of_text(text), found[1] if found else "")
    return s3_refusal(address, status, code, region=region)


# obstore shows what its Rust libraries say: which of their words means what
_TEXTS = (
    ("dns error", "dns"),
    ("ProxyAuthRequired", "proxy_password"),
    ("TunnelUnsuccessful", "proxy"),
    ("ConnectFailed", "proxy"),
    ("InvalidCertificate", "certificate"),
    ("InvalidMessage", "tls"),
    ("AlertReceived", "tls"),
    ("ConnectionRefused", "refused"),
)


def _kind_of_text(text: str) -> str:
    for words, kind in _TEXTS:
        if words in text:
            return kind
    if "TimedOut" in text or "kind: Timeout" in text or "deadline has elapsed" in text:
        return "unreachable" if "kind: Connect" in text else "silent"
    return "broken"


def botocore_error(address: Address, error: Exception) -> DmdataError:
    """Explain why boto3 could not send a request, or get its answer."""
    import botocore.exceptions as by
    import botocore.parsers

    without_requests(error)

    if isinstance(error, by.ParamValidationError | by.InvalidDNSNameError | by.InvalidHostLabelError):
        return bad_bucket_name(address)
    if isinstance(error, by.EndpointProviderError | by.InvalidRegionError | by.InvalidEndpointConfigurationError) or (
        isinstance(error, ValueError) and not isinstance(error, by.BotoCoreError)
    ):
        return AccessError(
            f"{address} could not be read: the endpoint or the region of the AWS configuration is not valid; correct "
            "AWS_ENDPOINT_URL (as https://HOST) or AWS_REGION (as us-east-1), or unset them",
            url=str(address), cause="configuration", unsent=True,
        )  # fmt: skip
    inner = getattr(error, "kwargs", {}).get("error")
    if isinstance(error, botocore.parsers.ResponseParserError) or (
        # an answer that botocore itself stumbles over, as 303
        type(error) is by.HTTPClientError and isinstance(inner, TypeError | ValueError | LookupError)
    ):
        return not_s3(address)
    if is_of_credentials(error):
        return credentials_error("", error)
    asked = getattr(error, "kwargs", {}).get("endpoint_url") or ""
    return connection_error(address, kind_of_chain(error), urlsplit(str(asked)).netloc.rpartition("@")[2])
