"""What a store's refusal means, in words and with the remedy: whatever boto3, obstore or the server called it.

Texts of the libraries may quote keys and tokens, so they are neither quoted nor chained. The facts of an error say what
a reader needs to know: `transient` whether trying again may help by itself, `refused` that the store answered with an
error instead of the object's bytes, `unsent` that nothing reached the store, so that nothing can be billed, `silent`
that a server never answered, `region` where S3 says that the bucket is.
"""

import re
import socket
import ssl
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import obstore.exceptions

from dmdata.address import Address, changed, ended_short
from dmdata.errors import AccessError, DmdataError, ObjectMissingError, SourceError

# what is wrong and what to do; whether it may pass by itself; whether nothing was sent
_CONNECTIONS: dict[str, tuple[str, bool, bool]] = {
    "dns": (
        "the name of its server could not be found; check the network, and the spelling of the address or of "
        "AWS_ENDPOINT_URL",
        False,
        True,
    ),
    "refused": (
        "its server refuses connections; check that it runs, and the address or AWS_ENDPOINT_URL, then try again",
        True,
        True,
    ),
    "certificate": (
        "the certificate of its server is not trusted; where a company's proxy or an authority of your own has signed "
        "it, set AWS_CA_BUNDLE to the PEM file of that authority",
        False,
        True,
    ),
    "tls": (
        "its server does not speak TLS there; check whether the address or AWS_ENDPOINT_URL should begin with http:// "
        "or https://, and its port",
        False,
        True,
    ),
    "proxy": (
        "the proxy in HTTPS_PROXY or HTTP_PROXY cannot be reached or refuses to connect to the server; correct or "
        "unset it, or add the server to NO_PROXY",
        False,
        True,
    ),
    "proxy_password": (
        "the proxy in HTTPS_PROXY or HTTP_PROXY asks for a user and a password; write them into it, as "
        "http://USER:PASSWORD@HOST:PORT",
        False,
        True,
    ),
    "unreachable": (
        "no connection to its server could be made in time; check the network, or try again later",
        True,
        True,
    ),
    "silent": ("its server accepted the connection and then did not answer; try again later", True, False),
    "broken": ("the connection broke", True, False),
}


def connection_error(address: Address | str, kind: str, host: str = "") -> SourceError:
    """Say that a server was not reached, or how its connection failed.

    Parameters
    ----------
    address : Address or str
    host : str
        Of the server, where it is known.
    kind : {"dns", "refused", "certificate", "tls", "proxy", "proxy_password", "unreachable", "silent", "broken"}
    """
    words, transient, unsent = _CONNECTIONS[kind]
    if host:
        words = words.replace("its server", f"its server {host}", 1)
    return SourceError(
        f"{address} could not be read: {words}",
        url=str(address),
        cause=kind,
        transient=transient,
        unsent=unsent,
        silent=kind in ("silent", "unreachable"),
    )


def store_error(address: Address, error: Exception) -> DmdataError:
    """Say what one of obstore's stores refused, and why."""
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
    """Say why boto3 could not send a request, or get its answer."""
    import botocore.exceptions as by
    import botocore.parsers

    _without_requests(error)

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
    if isinstance(error, _of_credentials()):
        return credentials_error("", error)
    asked = getattr(error, "kwargs", {}).get("endpoint_url") or ""
    return connection_error(address, _kind_of_chain(error), urlsplit(str(asked)).netloc.rpartition("@")[2])


def _kind_of_chain(error: BaseException) -> str:
    import botocore.exceptions as by

    chain = list(_causes(error))
    if any(isinstance(cause, by.ProxyConnectionError) for cause in chain):
        return "proxy_password" if any("407" in str(cause) for cause in chain) else "proxy"
    if any(isinstance(cause, socket.gaierror) for cause in chain):
        return "dns"
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in chain):
        return "certificate"
    if any(isinstance(cause, ConnectionRefusedError) for cause in chain):
        return "refused"
    if any(isinstance(cause, by.ConnectTimeoutError) for cause in chain):
        return "unreachable"
    if any(isinstance(cause, by.ReadTimeoutError) or type(cause).__name__ == "ReadTimeoutError" for cause in chain):
        return "silent"
    if any(isinstance(cause, by.SSLError | ssl.SSLError) for cause in chain):
        return "tls"
    return "broken"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Walk from an error through those it was made of, whichever way it holds them."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        found = waiting.pop()
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        waiting += [found.__cause__, found.__context__, getattr(found, "reason", None)]
        kwargs: Any = getattr(found, "kwargs", None)
        waiting += [kwargs.get("error")] if isinstance(kwargs, dict) else []
        waiting += [part for part in found.args if isinstance(part, BaseException)]


def _without_requests(error: Exception) -> None:
    """Take requests out of an error and what it was made of: they hold the token, and Dask pickles contexts along."""
    for cause in _causes(error):
        for name in ("request", "response"):
            if getattr(cause, name, None) is not None:
                vars(cause)[name] = None


def _of_credentials() -> tuple[type[Exception], ...]:
    import botocore.exceptions as by

    return (
        by.NoCredentialsError, by.PartialCredentialsError, by.CredentialRetrievalError, by.TokenRetrievalError,
        by.NoAuthTokenError, by.SSOError, by.LoginError, by.ProfileNotFound, by.ConfigParseError, by.ConfigNotFound,
        by.InvalidConfigError, by.UnknownCredentialError, by.RefreshWithMFAUnsupportedError,
        by.MissingDependencyException, by.MetadataRetrievalError,
    )  # fmt: skip


def no_credentials(url: str, words: str) -> AccessError:
    """Say that there are no credentials; `words` say what needs them."""
    return AccessError(
        f"{words}; run aws configure, or set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        url=url,
        cause="no_credentials",
        unsent=True,
    )


def credentials_error(profile: str, error: Exception) -> DmdataError:
    """Say why credentials cannot be had: nothing was sent to a bucket.

    Parameters
    ----------
    profile : str
        Of the AWS configuration; "" where it is not known.
    error : Exception
        Of botocore's, or what a credential process raised.
    """
    import botocore.exceptions as by

    _without_requests(error)
    of = f" of profile {profile}" if profile else ""
    option = f" --profile {profile}" if profile and profile != "default" else ""
    cause = "bad_credentials"
    if isinstance(error, by.SSOError | by.TokenRetrievalError | by.NoAuthTokenError):
        words = f"the single sign-on session{of} has expired or was never begun; run aws sso login{option}"
    elif isinstance(error, by.LoginError):
        words = f"the login session{of} has expired; run aws login{option}"
    elif isinstance(error, EOFError | by.RefreshWithMFAUnsupportedError):
        words = (
            f"the role{of} needs a code of a multi-factor device, and there is nobody to ask; get a session in a "
            "terminal (aws sts assume-role ... --token-code, or aws configure export-credentials) and use its keys"
        )
    elif isinstance(error, by.ProfileNotFound):
        cause = "configuration"
        words = (
            f"the AWS files have no profile {profile or 'of that name'}; choose another with AWS_PROFILE, or unset it"
        )
    elif isinstance(error, by.ConfigParseError | by.ConfigNotFound):
        cause, words = "configuration", "the AWS config or credentials file cannot be read; correct its syntax"
    elif isinstance(error, by.InvalidConfigError | by.UnknownCredentialError):
        cause = "configuration"
        words = (
            f"the AWS configuration{of} contradicts itself or lacks a setting; check it with aws configure list{option}"
        )
    elif isinstance(error, by.MissingDependencyException):
        cause, words = "configuration", f"the credentials{of} need AWS's own runtime; pip install 'botocore[crt]'"
    elif isinstance(error, by.PartialCredentialsError | by.NoCredentialsError):
        missing = getattr(error, "kwargs", {}).get("cred_var", "a part")
        words = (
            f"{missing} of the credentials{of} is missing; set both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "run aws configure"
        )
    elif isinstance(error, by.CredentialRetrievalError | OSError | ValueError | KeyError):
        words = (
            f"the credential process{of} failed, or is not installed; run the command of credential_process in the AWS "
            "config file by hand to see why"
        )
    else:
        kind = _kind_of_chain(error)
        described, transient, _ = _CONNECTIONS[kind]
        words = f"AWS could not be asked for the credentials{of}: {described}"
        return SourceError(words, cause=kind, transient=transient, unsent=True)
    return AccessError(words, cause=cause, unsent=True)


def role_refused(profile: str, operation: str, code: str) -> AccessError:
    """Say that AWS refused to hand out credentials."""
    of = f" of profile {profile}" if profile else ""
    if code in _BAD_CREDENTIALS:
        how = "have expired" if code in _EXPIRED else "are not valid"
        words = (
            f"the keys{of} that ask for its role {how} ({code}); renew them (aws sso login, aws configure), or choose "
            "others with AWS_PROFILE"
        )
    elif operation == "GetRoleCredentials" or "Unauthorized" in code:
        words = (
            f"the single sign-on session{of} is not accepted any more ({code}); run aws sso login --profile {profile}"
        )
    else:
        words = (
            f"AWS does not hand out the role{of} ({code or 'refused'} for {operation}); check role_arn and "
            "source_profile, and that the role trusts these keys"
        )
    return AccessError(words, cause="bad_credentials", code=code, unsent=True)


def s3_refusal(
    address: Address, status: int, code: str | None, *, region: str | None = None, location: str | None = None
) -> DmdataError:
    """Say in words what an answer of S3 means.

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

    def failed(words: str, **facts: Any) -> SourceError:
        facts = {"cause": None, "transient": False} | facts
        return SourceError(
            f"{address} could not be read ({said}): {words}", url=str(address), refused=True, code=code, **facts
        )

    if code in _BAD_CREDENTIALS or code in _CLOCK or code in _ACCOUNT or (code or "").startswith("KMS."):
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
            url=str(address), transient=False, refused=True,
        )  # fmt: skip
    if status == 404:
        hint = "" if code or not address.is_s3 else ", and that an S3 endpoint answers: see AWS_ENDPOINT_URL"
        return ObjectMissingError(
            f"nothing is at {address} ({said}); check the name{hint}", url=str(address), transient=False, refused=True
        )
    if status == 412:
        return changed(address, refused=True)
    if status == 416:
        return ended_short(address, None, transient=False)
    if code in _PASSING or status >= 500 or status in (408, 425, 429):
        slow = status in (429, 503) or code in _THROTTLED
        return failed(
            "the store asks to slow down" if slow else "the store has a fault of its own", transient=True, slow=slow
        )
    if code in _ELSEWHERE or region or (status in (301, 307) and not location and address.is_s3):
        where = f"in {region}" if region else "in another region, or at another endpoint"
        return failed(
            f"the bucket is {where}; set AWS_REGION to its region, or unset AWS_ENDPOINT_URL",
            cause="region",
            region=region,
        )
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


def not_by_range(address: Address) -> SourceError:
    """Say that a server does not answer with ranges."""
    return SourceError(
        f"{address} cannot be read by ranges: the server sends the whole object, or does not know such a key; "
        "is it an S3 endpoint?",
        url=str(address),
        transient=False,
        whole=True,
    )


def encoded(address: Address, encoding: str) -> SourceError:
    """Say that an object is sent compressed, so that its ranges are not those of its elements."""
    return SourceError(
        f"{address} is stored or sent with Content-Encoding {encoding}, so its elements cannot be read by ranges; "
        "download it as it is (dmdata get), unpack it, and read the file, or ask its publisher for another",
        url=str(address),
        cause="encoded",
        by_download=True,
        transient=False,
    )


def not_s3(address: Address, said: str = "") -> SourceError:
    """Say that a server does not answer as S3 does."""
    answer = f" ({said})" if said else ""
    return SourceError(
        f"{address} could not be read: its server does not answer as S3 does{answer}; check AWS_ENDPOINT_URL, and "
        "whether a proxy or a login page answers in its place",
        url=str(address),
        cause="not_s3",
        transient=False,
        refused=True,
    )


def no_such_bucket(address: Address | str) -> ObjectMissingError:
    """Say that there is no such bucket."""
    return ObjectMissingError(
        f"nothing is at {address} (404 NoSuchBucket): there is no such bucket at this endpoint; check its name, and "
        "AWS_ENDPOINT_URL where one is set",
        url=str(address),
        cause="no_such_bucket",
        transient=False,
        refused=True,
    )


def bad_bucket_name(address: Address) -> SourceError:
    """Say that no bucket can have this name."""
    if address.url.startswith("s3://arn:"):
        return SourceError(
            f"{address} names an access point by its ARN, which is not read; write the access point's alias, as "
            "NAME-s3alias, or the bucket's own name, as s3://bucket/key",
            url=str(address),
            cause="bucket_name",
            transient=False,
            unsent=True,
        )
    return SourceError(
        f"{address} names a bucket that cannot exist: names have 3 to 63 small letters, digits, dots and hyphens; "
        "check its spelling, as s3://bucket/key",
        url=str(address),
        cause="bucket_name",
        transient=False,
        refused=True,
    )


_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_BAD_CREDENTIALS = _EXPIRED | {
    "AuthFailure",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
}
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


def _refused(address: Address, code: str | None) -> AccessError:
    """Tell the causes of a 403 apart as far as can be: credentials, requester pays, no such key, no rights."""
    if code in _EXPIRED:
        cause, words = "bad_credentials", (
            f"the AWS credentials in use have expired ({code}); renew them (aws sso login, aws configure), or choose "
            "others with AWS_PROFILE"
        )  # fmt: skip
    elif code in _BAD_CREDENTIALS:
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
