"""Whether S3 is AWS's here, or an endpoint of one's own: asked of the environment and the AWS config file alone."""

import functools
import os
from pathlib import Path
from urllib.parse import urlsplit

__all__ = ["own_endpoint"]

_AWS_DOMAINS = ("amazonaws.com", "amazonaws.com.cn", "api.aws")
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


def own_endpoint() -> str | None:
    """Find the endpoint that is set for S3 and is not AWS's; None where requests go to AWS. Sends nothing.

    Where the AWS configuration cannot be read it is taken for AWS, where reading counts.
    """
    config = Path(os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config").expanduser()
    try:
        facts = config.stat()
        changed: tuple[int, int] | None = (facts.st_mtime_ns, facts.st_size)
    except OSError:
        changed = None
    variables = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    return _own_endpoint(variables, changed)


@functools.lru_cache(maxsize=8)
def _own_endpoint(variables: tuple[tuple[str, str], ...], config: tuple[int, int] | None) -> str | None:
    known = dict(variables)
    if config is not None or "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS" in known:
        endpoint = _by_botocore()
    else:  # spares the import of botocore
        endpoint = next((known[name] for name in _ENDPOINTS if known.get(name)), None)
    host = urlsplit(endpoint or "").hostname or ""
    is_aws = not host or any(host == domain or host.endswith(f".{domain}") for domain in _AWS_DOMAINS)
    return None if is_aws else endpoint


def _by_botocore() -> str | None:
    import botocore.configprovider
    import botocore.exceptions
    import botocore.session

    try:
        session = botocore.session.Session()
        if session.get_config_variable("ignore_configured_endpoint_urls"):
            return None
        provider = botocore.configprovider.ConfiguredEndpointProvider(
            full_config=session.full_config, scoped_config=session.get_scoped_config(), client_name="s3"
        )
        found = provider.provide()
    except (botocore.exceptions.BotoCoreError, ValueError):
        return None
    return str(found) if found else None
