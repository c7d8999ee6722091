"""Clients of remote stores, made once a process, and the one configuration that all of them get.

What boto3 takes from the environment and from AWS's files (proxies and ``NO_PROXY``, the CA bundle) is found by
botocore's own rules and handed to obstore too, so that no address can be opened by one client and not read by the
other. A client is made again when the environment or one of the files changed. After a fork a parent's clients stay
where they are, and a forked process may have to do without obstore: see `dmdata.objects.forks`.
"""

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dmdata.errors import SettingsError
from dmdata.objects.endpoints import stamp

SILENCE_SECONDS = 12
"""How long a server that was connected to may send nothing."""

CONNECT_SECONDS = 10
"""How long a connection may take to be made."""

# making a client asks for its terms, which are made once, too
LOCK = threading.RLock()
"""Held while a client is made, and over a fork."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)
# by process, terms and configuration; dropping those of a parent process would hang
_CLIENTS: dict[tuple[Any, ...], Any] = {}
# asked for at every read, so the rest of the environment is not gone through
_CONFIGURING = tuple(
    [
        f"AWS_{name}"
        for name in (
            "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "SECURITY_TOKEN", "PROFILE", "DEFAULT_PROFILE",
            "REGION", "DEFAULT_REGION", "ENDPOINT_URL", "ENDPOINT_URL_S3", "IGNORE_CONFIGURED_ENDPOINT_URLS",
            "CA_BUNDLE", "CONFIG_FILE", "SHARED_CREDENTIALS_FILE", "ROLE_ARN", "WEB_IDENTITY_TOKEN_FILE",
            "USE_DUALSTACK_ENDPOINT", "USE_FIPS_ENDPOINT", "EC2_METADATA_DISABLED", "CONTAINER_CREDENTIALS_FULL_URI",
            "CONTAINER_CREDENTIALS_RELATIVE_URI",
        )
    ]
    + [name for proxy in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY") for name in (proxy, proxy.lower())]
    + ["REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "HOME"]
)  # fmt: skip


def client_once(terms: tuple[object, ...], make: Callable[[], Any]) -> Any:
    """Make a client once a process for the same terms and configuration.

    Parameters
    ----------
    terms : tuple
        Hashable.
    make : callable
    """
    known = (os.getpid(), terms, configuration())
    with LOCK:
        if known not in _CLIENTS:
            _CLIENTS[known] = make()
        return _CLIENTS[known]


def forget(bucket: str) -> None:
    """Drop this process's clients of a bucket, so that the next one is made of what the configuration says then."""
    with LOCK:
        for known in [known for known in _CLIENTS if known[0] == os.getpid() and bucket in known[1]]:
            del _CLIENTS[known]


def ca_bundle() -> str | None:
    """Find the file of certificate authorities to trust, by botocore's rules, then OpenSSL's; None for the usual ones.

    Raises
    ------
    SettingsError
        If it cannot be read.
    """
    import botocore.exceptions
    import botocore.session

    try:
        by_botocore = botocore.session.Session(include_builtin_handlers=False).get_config_variable("ca_bundle")
    except botocore.exceptions.BotoCoreError:
        by_botocore = None  # a profile that does not exist is reported where credentials are needed
    choices = {
        "AWS_CA_BUNDLE, or ca_bundle in the AWS config file,": by_botocore,
        "REQUESTS_CA_BUNDLE": os.environ.get("REQUESTS_CA_BUNDLE"),
        "SSL_CERT_FILE": os.environ.get("SSL_CERT_FILE"),
    }
    for origin, path in choices.items():
        if path:
            found = Path(path).expanduser()
            if not found.is_file():
                raise SettingsError(
                    f"{origin} is {path}, which is not a readable file; name a file of PEM certificates, or unset it",
                    origin=origin,
                )
            return str(found)
    return None


def transport_options(url: str, etag: str | None) -> dict[str, Any]:
    """Return obstore's options of a connection to a server: timeouts, proxy, trusted authorities, If-Match.

    Retries are left to `dmdata.reading.fetch`, so that each request is counted.

    Parameters
    ----------
    url : str
        Of the server, with its scheme.
    etag : str or None
        Sent as If-Match with every request.
    """
    # `timeout` counts the reader's slowness too, so it is long; silence is what `read_timeout` bounds
    options: dict[str, Any] = {
        "allow_http": url.startswith("http://"),
        "timeout": "600s",
        "connect_timeout": f"{CONNECT_SECONDS}s",
        "read_timeout": f"{SILENCE_SECONDS}s",
        **connection_options(url),
    }
    if etag is not None:
        options["default_headers"] = {"If-Match": etag}
    return {"client_options": options, "retry_config": {"max_retries": 0, "retry_timeout": timedelta(seconds=600)}}


def connection_options(url: str) -> dict[str, Any]:
    """Return for obstore the proxy and the trusted authorities that botocore would use for a server."""
    from botocore.utils import get_environ_proxies

    options: dict[str, Any] = {}
    bundle = ca_bundle()
    if bundle:
        options["root_certificate"] = Path(bundle).read_bytes()
    proxy = get_environ_proxies(url).get(urlsplit(url).scheme)
    if proxy:
        options["proxy_url"] = proxy if "://" in proxy else f"http://{proxy}"
        if bundle and proxy.startswith("https://"):
            options["proxy_ca_certificate"] = Path(bundle).read_text()
    else:
        # obstore would take a proxy from the environment by rules of its own: one that is excluded everywhere is none
        options |= {"proxy_url": "http://127.0.0.1:9", "proxy_excludes": f"*,{urlsplit(url).hostname}"}
    return options


def configuration() -> tuple[object, ...]:
    """Collect what clients are configured by: variables, and the AWS files by size and time."""
    variables = tuple(map(os.environ.get, _CONFIGURING))
    files = (
        os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials",
        os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config",
    )
    return variables, tuple(stamp(file) for file in files)
