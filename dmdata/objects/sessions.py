"""boto3 as it is used here: each request is tried once, no token is logged, and its errors are translated."""

import contextlib
import functools
import io
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dmdata.errors import AccessError, SettingsError
from dmdata.objects.address import Address
from dmdata.objects.clients import CONNECT_SECONDS, SILENCE_SECONDS, ca_bundle
from dmdata.objects.explaining.credentials import credentials_error, role_refused
from dmdata.objects.explaining.foreign_errors import botocore_error
from dmdata.objects.explaining.refusals import no_such_bucket

if TYPE_CHECKING:
    import boto3
    from botocore.config import Config
    from mypy_boto3_s3 import S3Client

# at DEBUG these write out requests and what is signed of them, a session's token among it
_LOGGERS_OF_HEADERS = tuple(f"botocore.{name}" for name in ("auth", "awsrequest", "endpoint", "hooks", "httpsession"))
# these warn with a traceback of what our error says
_LOGGERS_OF_TRACEBACKS = ("botocore.credentials", "botocore.tokens")


def new_session() -> "boto3.Session":
    """Make a boto3 session that trusts whom we trust, and logs no token.

    Raises
    ------
    AccessError
        If the AWS configuration cannot be used.
    """
    import boto3  # half a second, and only S3 needs it
    import botocore.exceptions

    for name in _LOGGERS_OF_HEADERS:
        logging.getLogger(name).addFilter(_is_no_debug)
    for name in _LOGGERS_OF_TRACEBACKS:
        logging.getLogger(name).addFilter(_is_no_traceback)
    try:
        # boto3 itself reads AWS_DEFAULT_REGION alone
        session = boto3.Session(region_name=os.environ.get("AWS_REGION") or None)
        descriptions = _descriptions(session._session.get_config_variable("data_path"))
        session._session.register_component("data_loader", descriptions)
    except botocore.exceptions.BotoCoreError as error:
        raise credentials_error(os.environ.get("AWS_PROFILE", ""), error) from None
    try:
        bundle = ca_bundle()
    except SettingsError as error:
        raise AccessError(str(error), cause="configuration", unsent=True) from None
    if bundle:
        # single sign-on and roles are asked for by clients of this session, too
        session._session.set_config_variable("ca_bundle", bundle)
    return session


@functools.cache
def _descriptions(data_path: str | None) -> Any:
    """Return botocore's loader of its descriptions of services; all sessions share it, since parsing takes longest."""
    import botocore.loaders

    return botocore.loaders.create_loader(data_path)


@contextlib.contextmanager
def credentials_in_words(profile: str) -> Iterator[None]:
    """Explain why credentials cannot be had, while the block runs.

    Raises
    ------
    AccessError, SourceError
    """
    import botocore.exceptions

    try:
        yield
    except botocore.exceptions.ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        raise role_refused(profile, error.operation_name, code) from None
    except (botocore.exceptions.BotoCoreError, OSError, ValueError, KeyError, EOFError) as error:
        # a credential process that is not installed, or says something other than JSON, comes as it is
        raise credentials_error(profile, error) from None


@contextlib.contextmanager
def configuration_in_words(address: Address) -> Iterator[None]:
    """Explain that boto3 cannot use the configuration, while the block runs."""
    import botocore.exceptions

    try:
        yield
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise botocore_error(address, error) from None


def client_config(**more: Any) -> "Config":
    """Configure a boto3 client that tries each request once."""
    from botocore.config import Config

    retries: Any = {"total_max_attempts": 1}
    return Config(retries=retries, connect_timeout=CONNECT_SECONDS, read_timeout=SILENCE_SECONDS, **more)


def region_of(client: "S3Client", bucket: str, default: str | None) -> str | None:
    """Ask S3 where a bucket is: the answer names the region even to those who may not enter. Not charged."""
    import botocore.exceptions

    client.meta.events.register("before-call.s3", follow_no_region)
    try:
        answer = client.head_bucket(Bucket=bucket)
    except botocore.exceptions.ClientError as error:
        answer = error.response  # type: ignore[assignment] # a refusal carries the same header
    if answer["ResponseMetadata"]["HTTPStatusCode"] == 404:
        raise no_such_bucket(bucket)
    return answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region") or default


def follow_no_region(context: dict[str, Any], **_: Any) -> None:
    """Keep botocore from following a bucket to its region by requests of its own, without end at some endpoints."""
    if "s3_redirect" in context:
        context["s3_redirect"]["redirected"] = True


def endpoint_of(client: "S3Client", bucket: str) -> tuple[str, bool]:
    """Ask boto3 for the URL it would read a bucket at, without sending anything; split off the bucket and key."""
    from botocore.awsrequest import AWSResponse
    from botocore.compat import HTTPHeaders

    class Nothing(io.BytesIO):
        def stream(self, *_: Any, **__: Any) -> Iterator[bytes]:
            return iter(())

    urls: list[str] = []

    def keep(request: Any, **_: Any) -> AWSResponse:
        urls.append(request.url)
        return AWSResponse(request.url, 200, HTTPHeaders(), Nothing())

    client.meta.events.register("before-send.s3.HeadObject", keep)  # type: ignore[arg-type] # its answer is used
    client.head_object(Bucket=bucket, Key="k")
    url = urls[0].removesuffix("/k")
    by_path = url.endswith(f"/{bucket}")
    return (url.removesuffix(f"/{bucket}") if by_path else url), by_path


def _is_no_debug(record: logging.LogRecord) -> bool:
    return record.levelno > logging.DEBUG


def _is_no_traceback(record: logging.LogRecord) -> bool:
    return record.exc_info is None or logging.getLogger(record.name).isEnabledFor(logging.DEBUG)
