"""What every test gets: a home of its own, no credentials but those it asks for, and the S3 servers.

`s3` is the small loopback server, fresh for each test. `aws` is AWS itself, played on loopback. `live_s3` is the real
one that enforces requester pays, where it has been started; tests that use it carry the mark `live` and are skipped
elsewhere. The gate must not pass by not looking: with ``DMDATA_TESTS_REQUIRE=live,browser,peers`` a test so marked
fails where it would be skipped.
"""

import importlib.util
import os
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from botocore.config import Config
from hypothesis import settings
from servers.aws import PlayedAws
from servers.aws_certificates import Authority
from servers.loopback import LoopbackS3

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# A machine's speed is not a property of the code, and the gate must give the same verdict twice.
settings.register_profile("here", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") or os.environ.get("DMDATA_TESTS_REQUIRE") else "here")

_LIVE_VARIABLES = (
    "S3_ENDPOINT",
    "S3_BUCKET",
    "OWNER_ACCESS_KEY_ID",
    "OWNER_SECRET_ACCESS_KEY",
    "READER_ACCESS_KEY_ID",
    "READER_SECRET_ACCESS_KEY",
)


# dmdata is tested without torch, too: what needs the pipeline is then left out, and said to be
_NEEDS_PIPELINE = re.compile(r"^(?:from|import) (?:dmpipeline|torch)\b", re.MULTILINE)
_LEFT_OUT = (
    []
    if importlib.util.find_spec("torch")
    else [str(path) for path in Path(__file__).parent.rglob("test_*.py") if _NEEDS_PIPELINE.search(path.read_text())]
)
collect_ignore = _LEFT_OUT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what `slower-tier.txt` lists: test functions, cases of them, or whole files."""
    lines = (Path(__file__).parent / "slower-tier.txt").read_text().splitlines()
    slower = {line for line in lines if line and not line.startswith("#")}
    for item in items:
        function = item.nodeid.partition("[")[0]
        if not slower.isdisjoint({item.nodeid, function, function.partition("::")[0]}):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test that was skipped although ``DMDATA_TESTS_REQUIRE`` names one of its marks."""
    report = yield
    required = {name.strip() for name in os.environ.get("DMDATA_TESTS_REQUIRE", "").split(",")}
    marks = sorted(required.intersection(mark.name for mark in item.iter_markers()))
    if report.skipped and marks and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"DMDATA_TESTS_REQUIRE names {', '.join(marks)}, so this must run, but: {reason}"
    return report


_FIGURES = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> list[str]:
    """Lines to print when all tests have run: what was measured along the way."""
    return pytestconfig.stash.setdefault(_FIGURES, [])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the figures of a worker process of pytest-xdist to the one that prints them."""
    if output := getattr(session.config, "workeroutput", None):
        output["figures"] = session.config.stash.get(_FIGURES, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the figures of a worker process that has ended."""
    lines = node.config.stash.setdefault(_FIGURES, [])
    lines += getattr(node, "workeroutput", {}).get("figures", [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the figures, and name the test files that are left out."""
    if _LEFT_OUT:
        terminalreporter.write_line(f"without torch, so left out: {', '.join(sorted(_LEFT_OUT))}")
    if lines := config.stash.get(_FIGURES, []):
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def dmdata_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test an empty ``DMDATA_HOME`` and no other ``DMDATA_*`` or ``AWS_*`` variable or file of the user's."""
    home = tmp_path / "dmdata-home"
    _hide_environment(monkeypatch, tmp_path)
    monkeypatch.setenv("DMDATA_HOME", str(home))
    return home


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, dmdata_home: Path) -> Iterator[LoopbackS3]:
    """Run an empty enforcing server, which the environment makes the default S3 of a stranger who may pay."""
    with LoopbackS3() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Make the certificates by which AWS is played."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def aws(authority: Authority, monkeypatch: pytest.MonkeyPatch, dmdata_home: Path) -> Iterator[PlayedAws]:
    """Play AWS itself: no endpoint and no region is set, and the keys are those of a stranger who may pay."""
    with PlayedAws(authority) as played:
        for name in ("NO_PROXY", "no_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        for name, value in played.env.items():
            monkeypatch.setenv(name, value)
        yield played


@dataclass(frozen=True, slots=True)
class LiveS3:
    """A real S3 server whose bucket has requester pays on.

    Attributes
    ----------
    endpoint_url, bucket : str
    owner : boto3 client
        May write; give objects ``ACL="authenticated-read"``, or the reader is refused.
    reader : boto3 client
        A stranger with an account of its own, who pays.
    owner_env, reader_env : dict
        The ``AWS_*`` variables by which other clients become one or the other.
    """

    endpoint_url: str
    bucket: str
    owner: "S3Client"
    reader: "S3Client"
    owner_env: dict[str, str]
    reader_env: dict[str, str]


@pytest.fixture(scope="session")
def live_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveS3]:
    """Find the real server by the variables its script exports, with the bucket made and requester pays on."""
    missing = [name for name in _LIVE_VARIABLES if name not in os.environ]
    if missing:
        pytest.skip(f'{missing[0]} is not set; start it: eval "$(tests/servers/requester-pays-s3 up)"')
    endpoint, bucket, *keys = (os.environ[name] for name in _LIVE_VARIABLES)
    owner_env, reader_env = _variables(endpoint, *keys[:2]), _variables(endpoint, *keys[2:])
    with pytest.MonkeyPatch.context() as patch:
        _hide_environment(patch, tmp_path_factory.mktemp("aws"))
        owner, reader = _client(owner_env), _client(reader_env)
    owner.create_bucket(Bucket=bucket)
    owner.put_bucket_request_payment(Bucket=bucket, RequestPaymentConfiguration={"Payer": "Requester"})
    yield LiveS3(endpoint, bucket, owner, reader, owner_env, reader_env)
    owner.close()
    reader.close()


def _hide_environment(patch: pytest.MonkeyPatch, folder: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("DMDATA_", "AWS_")) and name != "DMDATA_TESTS_REQUIRE":
            patch.delenv(name)
    patch.setenv("AWS_CONFIG_FILE", str(folder / "aws-config"))
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "aws-credentials"))
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("NO_PROXY", "no_proxy"):  # a proxy for the world outside has no way to a loopback server
        patch.setenv(name, "127.0.0.1,localhost")


def _variables(endpoint_url: str, key_id: str, secret: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL_S3": endpoint_url,
        "AWS_ACCESS_KEY_ID": key_id,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
    }


def _client(variables: dict[str, str]) -> "S3Client":
    return boto3.client(
        "s3",
        endpoint_url=variables["AWS_ENDPOINT_URL_S3"],
        aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
        region_name=variables["AWS_REGION"],
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 2}),
    )
