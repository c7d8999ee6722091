"""Whether S3 is AWS's here, or an endpoint of one's own: asked of the environment and the AWS config file alone."""

import functools
import hashlib
import os
from urllib.parse import urlsplit

from dmdata.objects.address import Address

__all__ = ["is_aws_host", "object_key", "own_endpoint", "stamp"]

_AWS_DOMAINS = ("amazonaws.com", "amazonaws.com.cn", "api.aws", "api.amazonwebservices.com.cn")
# all that botocore looks at for it; asked for at every read, so no more of the environment is gone through
_VARIABLES = (
    "AWS_CONFIG_FILE",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
    "AWS_PROFILE",
    "AWS_DEFAULT_PROFILE",
    "HOME",
)


def object_key(address: Address) -> str:
    """Name an object for what is remembered of it: by endpoint too, for another server's bucket holds other objects.

    A digest: whatever a catalog calls an object, what is remembered stays in its own folder.
    """
    endpoint = own_endpoint() if address.is_s3 else None
    return hashlib.sha256(repr((endpoint or "", address.url, address.version or "")).encode()).hexdigest()


def own_endpoint() -> str | None:
    """Find the endpoint that is set for S3 and is not AWS's; None where requests go to AWS. Sends nothing.

    Where the AWS configuration cannot be read it is taken for AWS, where reading counts.
    """
    variables = tuple(map(os.environ.get, _VARIABLES))
    return _own_endpoint(variables, stamp(variables[0] or "~/.aws/config"))


@functools.lru_cache(maxsize=8)
def _own_endpoint(variables: tuple[str | None, ...], config: tuple[int, int] | None) -> str | None:
    known = dict(zip(_VARIABLES, variables, strict=True))
    if config is not None or known["AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"]:
        endpoint = _by_botocore()
    else:  # spares the import of botocore
        endpoint = known["AWS_ENDPOINT_URL_S3"] or known["AWS_ENDPOINT_URL"]
    host = urlsplit(endpoint or "").hostname or ""
    return None if not host or is_aws_host(host) else endpoint


def is_aws_host(host: str) -> bool:
    """Whether a host is AWS's."""
    return any(host == domain or host.endswith(f".{domain}") for domain in _AWS_DOMAINS)


def _by_botocore() -> str | None:
    import botocore.configprovider
    import botocore.exceptions
    import botocore.session

    try:
        session = botocore.session.Session(include_builtin_handlers=False)
        if session.get_config_variable("ignore_configured_endpoint_urls"):
            return None
        provider = botocore.configprovider.ConfiguredEndpointProvider(
            full_config=session.full_config, scoped_config=session.get_scoped_config(), client_name="s3"
        )
        found = provider.provide()
    except (botocore.exceptions.BotoCoreError, ValueError):
        return None
    return str(found) if found else None


def stamp(file: str) -> tuple[int, int] | None:
    """Return the time of change, in nanoseconds, and the size in bytes of a file; None where there is none."""
    try:
        facts = os.stat(os.path.expanduser(file))
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size
