"""Each cause that keeps AWS from answering has its own sentence, remedy and exit code, and is not tried six times."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from aws_profiles import configure_sso, forget_keys, sign_in, write_config
from servers.aws import READER, PlayedAws
from servers.aws_calls import Key
from servers.loopback import BUCKET, Fault
from small_release import document, key_of, npy, write_catalog

import dmdata
from dmdata.errors import AccessError, DmdataError, ObjectMissingError, SourceError

NAME = "toy/50pct/test_margins"
VALUES = np.random.default_rng(0).normal(size=(200, 300)).astype(np.float16)
KEY = key_of(NAME, VALUES)


@dataclass(frozen=True, slots=True)
class World:
    """What a case may put out of order."""

    aws: PlayedAws
    patch: pytest.MonkeyPatch
    folder: Path

    def use(self, key: Key) -> Key:
        """Make a key the environment's."""
        forget_keys(self.patch)
        for name, value in key.env.items():
            self.patch.setenv(name, value)
        return key

    def session(self) -> Key:
        return self.use(self.aws.keys.issue(READER, seconds=3600))

    def proxy(self, url: str) -> None:
        for name in ("HTTPS_PROXY", "https_proxy"):
            self.patch.setenv(name, url)

    def endpoint(self, url: str) -> None:
        self.patch.setenv("AWS_ENDPOINT_URL_S3", url)

    def refuse(self, status: int, code: str) -> None:
        self.aws.inject(Fault(status=status, code=code), times=1000)

    def catalog(self, bucket: str = BUCKET) -> str:
        about = document({NAME: VALUES}, url=f"s3://{bucket}", requester_pays=True)
        return write_catalog(about, self.folder)


def unused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Case:
    """Something out of order: what is done about it, and what must be said."""

    name: str
    break_it: Callable[[World], object]
    kind: type[DmdataError]
    exit_codes: tuple[int, ...]
    words: str  # a pattern: the cause
    remedy: str  # a pattern: the next step
    bucket: str = BUCKET
    cause: str | None = None  # of an AccessError


def sso_ended(world: World, *, legacy: bool) -> None:
    configure_sso(world.aws, world.patch, world.folder, legacy=legacy)
    world.aws.identity.sign_out()
    sign_in(world.aws, world.folder, legacy=legacy, seconds=-3600)
    world.aws.identity.sign_out()


def sso_revoked(world: World) -> None:
    configure_sso(world.aws, world.patch, world.folder, legacy=True)
    world.aws.identity.sign_out()


def never_signed_in(world: World, *, legacy: bool) -> None:
    configure_sso(world.aws, world.patch, world.folder, legacy=legacy)
    for token in (world.folder / ".aws" / "sso" / "cache").iterdir():
        token.unlink()


def role_refused(world: World) -> None:
    base = world.aws.keys.issue(READER)
    forget_keys(world.patch)
    role = "role_arn = arn:aws:iam::222222222222:role/reader\nsource_profile = base\n"
    write_config(f"[default]\n{role}[profile base]\n{base.file}")
    world.aws.identity.needs_mfa = True


def role_of_deleted_key(world: World) -> None:
    base = world.aws.keys.issue(READER)
    forget_keys(world.patch)
    role = "role_arn = arn:aws:iam::222222222222:role/reader\nsource_profile = base\n"
    write_config(f"[default]\n{role}[profile base]\n{base.file}")
    world.aws.keys.expire(base)


def process_without(world: World, line: str) -> None:
    forget_keys(world.patch)
    write_config(f"[default]\ncredential_process = {line}\n")


def untrusted(world: World) -> None:
    world.patch.delenv("AWS_CA_BUNDLE")
    world.patch.delenv("SSL_CERT_FILE")


def not_there(world: World, name: str) -> None:
    world.patch.setenv("AWS_CA_BUNDLE", str(world.folder / name))


def profile_not_there(world: World) -> None:
    forget_keys(world.patch)
    world.patch.setenv("AWS_PROFILE", "nobody")


def bad_config(world: World) -> None:
    forget_keys(world.patch)
    write_config("[default\nregion us-east-1\n")


def password_needed(world: World) -> None:
    world.aws.proxy_password = "a password"


def skewed(world: World) -> None:
    world.aws.keys.clock_ahead_seconds = 3600


def archived(world: World) -> None:
    world.aws.release.put(KEY, npy(VALUES), storage_class="GLACIER")


def gone(world: World) -> None:
    world.aws.release.delete(KEY)


def deleted_key(world: World) -> None:
    world.aws.keys.expire(world.use(world.aws.keys.issue(READER)))


def wrong_secret(world: World) -> None:
    world.use(Key(world.aws.reader.key_id, "another secret", READER))


def expired_session(world: World) -> None:
    world.aws.keys.expire(world.session())


def lost_token(world: World) -> None:
    key = world.session()
    world.patch.setenv("AWS_SESSION_TOKEN", f"{key.token}and more")


def half_a_key(world: World) -> None:
    world.patch.delenv("AWS_SECRET_ACCESS_KEY")


ACCESS_POINT = "arn:aws:s3:us-east-1:111111111111:accesspoint:lab"
LOGIN = "aws sso login"
CASES = [
    Case("expired session", expired_session, AccessError, (4,), "expired", "renew|sso login", cause="bad_credentials"),
    Case("token mangled", lost_token, AccessError, (4,), "InvalidToken|token", "AWS_SESSION_TOKEN|renew"),
    Case("key deleted", deleted_key, AccessError, (4,), "InvalidAccessKeyId", "AWS_PROFILE", cause="bad_credentials"),
    Case("wrong secret", wrong_secret, AccessError, (4,), "SignatureDoesNotMatch|secret", "AWS_|aws configure"),
    Case("no keys", lambda world: forget_keys(world.patch), AccessError, (4,), "no AWS credentials", "aws configure"),
    Case(
        "half a key",
        half_a_key,
        AccessError,
        (4,),
        "AWS_SECRET_ACCESS_KEY .* missing",
        "AWS_SECRET_ACCESS_KEY|aws configure",
    ),
    Case("SSO ended", lambda world: sso_ended(world, legacy=False), AccessError, (4,), "expired|sign", LOGIN),
    Case("legacy SSO ended", lambda world: sso_ended(world, legacy=True), AccessError, (4,), "expired|sign", LOGIN),
    Case("SSO revoked", sso_revoked, AccessError, (4,), "expired|sign|SSO", LOGIN),
    Case("no SSO", lambda world: never_signed_in(world, legacy=False), AccessError, (4,), "sign|SSO|expired", LOGIN),
    Case("no legacy SSO", lambda world: never_signed_in(world, legacy=True), AccessError, (4,), "sign|SSO", LOGIN),
    Case("role needs MFA", role_refused, AccessError, (4,), "role|MFA", "MFA|trust|sts|AWS_PROFILE"),
    Case(
        "role of a deleted key", role_of_deleted_key, AccessError, (4,), "role|STS|sts", "renew|AWS_PROFILE|configure"
    ),
    Case(
        "process not installed",
        lambda world: process_without(world, "/nowhere/get-keys"),
        AccessError,
        (4,),
        "credential_process",
        "install|~/.aws/config|AWS_PROFILE",
    ),
    Case(
        "process fails",
        lambda world: process_without(world, "false"),
        AccessError,
        (4,),
        "credential_process",
        "by hand|run|AWS_PROFILE",
    ),
    Case("no such profile", profile_not_there, AccessError, (4,), "nobody", "AWS_PROFILE"),
    Case("broken config file", bad_config, AccessError, (4,), "config", "fix|mend|correct|AWS_PROFILE"),
    Case("no such bucket", lambda _: None, SourceError, (1,), "no bucket|NoSuchBucket", "check", bucket="no-such-lab"),
    Case("capitals", lambda _: None, SourceError, (1,), "name", "lower|small|check", bucket="The-Lab"),
    Case("access point", lambda _: None, SourceError, (1,), "access point", "bucket", bucket=ACCESS_POINT),
    Case("untrusted", untrusted, SourceError, (1,), "certificate", "AWS_CA_BUNDLE"),
    Case("no such bundle", lambda world: not_there(world, "x.pem"), DmdataError, (1, 4), "x.pem", "AWS_CA_BUNDLE"),
    Case(
        "dead proxy",
        lambda world: world.proxy(f"http://127.0.0.1:{unused_port()}"),
        SourceError,
        (1,),
        "proxy",
        "HTTPS_PROXY|NO_PROXY",
    ),
    Case("proxy password", password_needed, SourceError, (1,), "proxy", "password|HTTPS_PROXY"),
    Case("skewed clock", skewed, AccessError, (4,), "clock", "set|NTP|time"),
    Case("archived", archived, SourceError, (1,), "archive|Glacier|GLACIER", "restore"),
    Case("account closed", lambda world: world.refuse(403, "AccountProblem"), AccessError, (4,), "account", "AWS"),
    Case("not signed up", lambda world: world.refuse(403, "NotSignedUp"), AccessError, (4,), "account", "AWS"),
    Case(
        "all disabled", lambda world: world.refuse(403, "AllAccessDisabled"), AccessError, (4,), "disabled", "owner|ask"
    ),
    Case("object gone", gone, AccessError, (4,), "key|may not", "dmdata ls|s3:GetObject"),
    Case(
        "refused by policy",
        lambda world: world.refuse(403, "AccessDenied"),
        AccessError,
        (4,),
        "s3:GetObject",
        "aws sts",
    ),
    Case(
        "connection refused",
        lambda world: world.endpoint(f"http://127.0.0.1:{unused_port()}"),
        SourceError,
        (1, 5),
        "refused|connect",
        "AWS_ENDPOINT_URL",
    ),
    Case(
        "no such name",
        lambda world: (world.proxy(""), world.endpoint("http://no-such-host.invalid")),
        SourceError,
        (1, 5),
        "no-such-host.invalid",
        "AWS_ENDPOINT_URL|network",
    ),
]


@pytest.fixture
def world(aws: PlayedAws, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    aws.release.put(KEY, npy(VALUES))
    return World(aws, monkeypatch, tmp_path)


def assert_said(world: World, case: Case, error: DmdataError) -> None:
    text = str(error)
    assert isinstance(error, case.kind), f"{type(error).__name__}: {text}"
    assert error.exit_code in case.exit_codes, f"{error.exit_code}: {text}"
    assert re.search(case.words, text), text
    assert re.search(case.remedy, text), text
    assert error.exit_code == 5 or "try again later" not in text
    assert case.cause in (None, error.facts.get("cause"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        value = os.environ.get(name)
        assert not value or (value not in text and value not in str(error.__cause__))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_what_keeps_an_array_from_being_opened_is_named(world: World, case: Case) -> None:
    catalog = world.catalog(case.bucket)
    case.break_it(world)
    with pytest.raises(DmdataError) as caught:
        dmdata.open(NAME, catalog=catalog).read_header()
    assert_said(world, case, caught.value)
    asked = [request for request in world.aws.log if request.key]
    assert len(asked) <= 2, "what does not pass by itself is not tried again"
    assert len(world.aws.tunnels) <= 6
    assert dmdata.spend().n_bytes == 0, "nothing was sent by the bucket"


BY_THE_SERVER = {
    "skewed clock",
    "archived",
    "account closed",
    "not signed up",
    "all disabled",
    "object gone",
    "refused by policy",
}


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name in BY_THE_SERVER],
    ids=lambda case: case.name.replace(" ", "-"),
)
def test_what_keeps_an_open_array_from_being_read_is_named(world: World, case: Case) -> None:
    opened = dmdata.open(NAME, catalog=world.catalog()).read_header()
    n_bytes, n_asked = dmdata.spend().n_bytes, len(world.aws.log)
    case.break_it(world)
    with pytest.raises(DmdataError) as caught:
        opened[...]
    assert_said(world, case, caught.value)
    assert len(world.aws.log) - n_asked <= 2
    assert dmdata.spend().n_bytes == n_bytes


@pytest.mark.parametrize("how", ["expired", "deleted", "not trusted", "dead proxy"])
def test_what_ends_between_opening_and_reading_is_named(world: World, how: str) -> None:
    key = world.use(world.aws.keys.issue(READER, seconds=3600 if how == "expired" else None))
    opened = dmdata.open(NAME, catalog=world.catalog()).read_header()
    spent = dmdata.spend()
    if how in ("expired", "deleted"):
        world.aws.keys.expire(key)
    elif how == "not trusted":
        untrusted(world)
    else:
        world.proxy(f"http://127.0.0.1:{unused_port()}")
    with pytest.raises(DmdataError) as caught:
        opened[...]
    words = {"expired": "expired", "deleted": "InvalidAccessKeyId", "not trusted": "certificate", "dead proxy": "proxy"}
    assert words[how] in str(caught.value)
    assert caught.value.exit_code == (4 if how in ("expired", "deleted") else 1)
    assert dmdata.spend() == spent or how in ("expired", "deleted")


def test_a_bucket_that_slows_readers_down_may_be_tried_again(world: World) -> None:
    opened = dmdata.open(NAME, catalog=world.catalog()).read_header()
    world.refuse(503, "SlowDown")
    with pytest.raises(SourceError, match=r"SlowDown|slow") as caught:
        opened[...]
    assert caught.value.exit_code == 5


def test_a_key_that_is_not_there_is_missing_where_the_reader_may_list(world: World) -> None:
    with pytest.raises(ObjectMissingError) as caught:
        dmdata.open(f"s3://{world.aws.own.name}/nothing.npy")
    assert caught.value.exit_code == 1


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked += 1  # type: ignore[attr-defined]
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        page = b"<html><body>welcome to the router</body></html>"
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page)

    do_HEAD = do_GET  # noqa: N815 - names that http.server calls

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's own name
        pass


@pytest.mark.parametrize("status", [200, 403, 404, 405])
def test_a_server_that_is_not_s3_is_named(world: World, status: int) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Page)
    server.status, server.asked = status, 0  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        world.endpoint(f"http://127.0.0.1:{server.server_address[1]}")
        with pytest.raises(SourceError, match="S3") as caught:
            dmdata.open(NAME, catalog=world.catalog()).read_header()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert caught.value.exit_code == 1
    assert "AWS_ENDPOINT_URL" in str(caught.value)
    assert server.asked <= 2  # type: ignore[attr-defined]


COMMAND = "from dmdata.cli.command import main; main()"


def command(world: World, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run a command as a job without a terminal."""
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *words, "--catalog", world.catalog()],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        cwd=world.folder,
    )


def role_with_mfa(world: World) -> None:
    base = world.aws.keys.issue(READER)
    forget_keys(world.patch)
    role = "role_arn = arn:aws:iam::222222222222:role/reader\nsource_profile = base\n"
    mfa = "mfa_serial = arn:aws:iam::222222222222:mfa/phone\n"
    write_config(f"[default]\n{role}{mfa}[profile base]\n{base.file}")


@pytest.mark.parametrize(
    ("break_it", "exit_code", "words"),
    [
        (expired_session, 4, "expired"),
        (role_with_mfa, 4, "MFA"),
        (lambda world: process_without(world, "/nowhere/get-keys"), 4, "credential_process"),
        (untrusted, 1, "AWS_CA_BUNDLE"),
    ],
    ids=["expired", "MFA", "process", "untrusted"],
)
def test_a_command_ends_with_one_sentence_and_the_exit_code_of_the_cause(
    world: World, break_it: Callable[[World], object], exit_code: int, words: str
) -> None:
    break_it(world)
    done = command(world, "get", NAME, "-o", "x.npy", "-y")
    assert "Traceback" not in done.stderr
    assert "botocore" not in done.stderr
    assert done.returncode == exit_code, done.stderr
    assert words in done.stderr


@pytest.mark.parametrize("legacy", [False, True], ids=["sso_session", "sso_start_url"])
def test_doctor_sees_a_session_that_has_ended_without_paying(world: World, legacy: bool) -> None:
    sso_ended(world, legacy=legacy)
    done = command(world, "doctor", NAME, "--json")
    findings = {finding["topic"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert findings["credentials"]["state"] == "fail"
    assert "aws sso login" in findings["credentials"]["next"]
    assert done.returncode == 1
    assert not [request for request in world.aws.log if request.key]
    assert "Traceback" not in done.stderr
