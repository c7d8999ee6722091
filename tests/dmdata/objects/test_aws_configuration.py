"""What boto3 takes from the environment and from ``~/.aws``, obstore gets too.

An array is opened by one and read by the other.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from aws_profiles import configure_process, configure_sso, forget_keys, sign_in, write_config, write_credentials
from servers.aws import READER, PlayedAws, Tunnel
from servers.aws_calls import Key
from servers.loopback import BUCKET, Fault, LoopbackS3
from small_release import npy, publish

import dmdata
from dmdata.errors import AccessError, DmdataError, ObjectMissingError

NAME = "toy/50pct/test_margins"
VALUES = np.random.default_rng(0).normal(size=(200, 300)).astype(np.float16)


@pytest.fixture
def catalog(aws: PlayedAws, tmp_path: Path) -> str:
    return publish(aws.release, {NAME: VALUES}, tmp_path)  # type: ignore[arg-type] # has the same `put`


@pytest.fixture(autouse=True)
def nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the server for what is read again."""
    monkeypatch.setenv("DMDATA_CACHE_GIB", "0")


def read_all(catalog: str) -> dmdata.LazyArray:
    """Open by boto3, and read by obstore."""
    opened = dmdata.open(NAME, catalog=catalog).read_header()
    np.testing.assert_array_equal(opened[...], VALUES)
    return opened


def signed_by(aws: PlayedAws) -> set[str | None]:
    return {request.key_id for request in aws.log if request.status == 206}


# certificates and proxies


@pytest.mark.parametrize("origin", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "ca_bundle"])
def test_a_ca_bundle_is_trusted_by_both_clients(
    aws: PlayedAws, catalog: str, monkeypatch: pytest.MonkeyPatch, origin: str
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.delenv("AWS_CA_BUNDLE")
    if origin == "ca_bundle":
        write_config(f"[default]\nca_bundle = {aws.authority.bundle}\n")
    else:
        monkeypatch.setenv(origin, aws.authority.bundle)
    read_all(catalog)
    copy = dmdata.mirror(NAME, f"s3://{aws.own.name}/copy.zarr", catalog=catalog)
    np.testing.assert_array_equal(np.asarray(copy[...]), VALUES)  # type: ignore[index] # an array


@pytest.mark.parametrize(
    "exempt",
    [
        "127.0.0.1",
        "localhost,127.0.0.1",
        "127.0.0.1:{port}",
        "*",
        " 127.0.0.1:{port} , elsewhere",
    ],
)
@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_who_is_exempt_from_the_proxy_is_asked_directly_by_both_clients(
    aws: PlayedAws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exempt: str, name: str
) -> None:
    with LoopbackS3() as server:
        catalog = publish(server, {NAME: VALUES}, tmp_path)
        for variable, value in server.env.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.setenv("http_proxy", aws.proxy_url)
        monkeypatch.setenv(name, exempt.format(port=server.endpoint_url.rpartition(":")[2]))
        read_all(catalog)
        assert aws.tunnels == ()
        assert server.n_object_bytes == VALUES.nbytes + 128


def test_who_is_not_exempt_is_asked_through_the_proxy_alone(
    aws: PlayedAws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LoopbackS3() as server:
        catalog = publish(server, {NAME: VALUES}, tmp_path)
        for variable, value in server.env.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.setenv("http_proxy", aws.proxy_url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1:1,elsewhere")
        with pytest.raises(DmdataError):
            read_all(catalog)
        assert Tunnel(server.endpoint_url.removeprefix("http://"), "no such host") in aws.tunnels
        assert server.n_requests == 0


def test_a_proxy_is_given_its_password_by_both_clients(
    aws: PlayedAws, catalog: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    aws.proxy_password = "p@ss word"
    address = aws.proxy_url.replace("http://", "http://somebody:p%40ss%20word@")
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, address)
    read_all(catalog)
    assert {tunnel.outcome for tunnel in aws.tunnels} == {"open"}


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy"])
def test_a_proxy_is_found_by_either_spelling(
    aws: PlayedAws, catalog: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv({"HTTPS_PROXY": "https_proxy", "https_proxy": "HTTPS_PROXY"}[name])
    read_all(catalog)


# hosts


@pytest.mark.parametrize(
    ("line", "host"),
    [
        ("use_dualstack_endpoint = true", "s3.dualstack.us-east-1."),
        ("use_fips_endpoint = true", "s3-fips.us-east-1."),
        ("s3 =\n  use_accelerate_endpoint = true", "s3-accelerate."),
        ("s3 =\n  addressing_style = virtual", f"{BUCKET}.s3."),
    ],
)
def test_hosts_that_the_config_file_chooses_are_asked_by_both_clients(
    aws: PlayedAws, catalog: str, line: str, host: str
) -> None:
    write_config(f"[default]\nregion = us-east-1\n{line}\n")
    read_all(catalog)
    assert all(host in request.host for request in aws.log if request.key), {request.host for request in aws.log}


@pytest.mark.parametrize("where", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "endpoint_url", "services"])
def test_an_endpoint_is_found_wherever_it_is_named(
    aws: PlayedAws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    with LoopbackS3() as server:
        catalog = publish(server, {NAME: VALUES}, tmp_path)
        for variable, value in server.env.items():
            if not variable.startswith("AWS_ENDPOINT"):
                monkeypatch.setenv(variable, value)
        if where.startswith("AWS_"):
            monkeypatch.setenv(where, server.endpoint_url)
        elif where == "services":
            write_config(f"[default]\nservices = lab\n[services lab]\ns3 =\n  endpoint_url = {server.endpoint_url}\n")
        else:
            write_config(f"[default]\nendpoint_url = {server.endpoint_url}\n")
        read_all(catalog)
        assert server.n_object_bytes == VALUES.nbytes + 128
    assert aws.log == ()


def test_an_endpoint_that_is_to_be_ignored_is(aws: PlayedAws, catalog: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    read_all(catalog)


def test_awss_own_endpoint_may_be_named(aws: PlayedAws, catalog: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://s3.us-east-1.amazonaws.com")
    read_all(catalog)


# credentials


def by_file(aws: PlayedAws, patch: pytest.MonkeyPatch, folder: Path) -> None:
    forget_keys(patch)
    write_credentials(aws.keys.issue(READER, seconds=3600))


def by_profile(aws: PlayedAws, patch: pytest.MonkeyPatch, folder: Path) -> None:
    forget_keys(patch)
    write_config(f"[profile lab]\n{aws.keys.issue(READER, seconds=3600).file}")
    patch.setenv("AWS_PROFILE", "lab")


def by_sso_session(aws: PlayedAws, patch: pytest.MonkeyPatch, folder: Path) -> None:
    configure_sso(aws, patch, folder, legacy=False)


def by_legacy_sso(aws: PlayedAws, patch: pytest.MonkeyPatch, folder: Path) -> None:
    configure_sso(aws, patch, folder, legacy=True)


def by_refreshed_sso(aws: PlayedAws, patch: pytest.MonkeyPatch, folder: Path) -> None:
    configure_sso(aws, patch, folder, legacy=False)
    sign_in(aws, folder, legacy=False, seconds=60)  # botocore renews it by the refresh token


def by_process(aws: PlayedAws, patch: pytest.MonkeyPatch, folder: Path) -> None:
    forget_keys(patch)
    configure_process(folder, aws.keys.issue(READER, seconds=3600))


def by_role(aws: PlayedAws, patch: pytest.MonkeyPatch, folder: Path) -> None:
    forget_keys(patch)
    role = "role_arn = arn:aws:iam::222222222222:role/reader\nsource_profile = base\n"
    write_config(f"[default]\n{role}[profile base]\n{aws.keys.issue(READER).file}")


def by_web_identity(aws: PlayedAws, patch: pytest.MonkeyPatch, folder: Path) -> None:
    forget_keys(patch)
    (folder / "token").write_text("a token of the cluster")
    patch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(folder / "token"))
    patch.setenv("AWS_ROLE_ARN", "arn:aws:iam::222222222222:role/reader")


Origin = Callable[[PlayedAws, pytest.MonkeyPatch, Path], None]
ORIGINS: list[Origin] = [
    by_file,
    by_profile,
    by_sso_session,
    by_legacy_sso,
    by_refreshed_sso,
    by_process,
    by_role,
    by_web_identity,
]


@pytest.mark.parametrize("origin", ORIGINS, ids=lambda origin: origin.__name__)
def test_credentials_of_every_origin_read(
    aws: PlayedAws, catalog: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, origin: Origin
) -> None:
    origin(aws, monkeypatch, tmp_path)
    read_all(catalog)
    keys = signed_by(aws)
    assert keys.isdisjoint({aws.reader.key_id, None}), "another key than that of the fixture"
    assert len(keys) == 1, "both clients have the same key"
    assert aws.bill(aws.release).n_bytes == VALUES.nbytes + 128


def test_a_new_credentials_file_is_used_by_the_same_process(
    aws: PlayedAws, catalog: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_keys(monkeypatch)
    old, new = (aws.keys.issue(READER, seconds=3600) for _ in range(2))
    write_credentials(old)
    opened = read_all(catalog)
    aws.keys.expire(old)
    with pytest.raises(AccessError) as caught:
        opened[3]
    assert caught.value.cause == "bad_credentials"
    write_credentials(new)
    np.testing.assert_array_equal(opened[3], VALUES[3])
    read_all(catalog)
    assert signed_by(aws) == {old.key_id, new.key_id}


@pytest.mark.parametrize("legacy", [False, True], ids=["sso_session", "sso_start_url"])
def test_who_signed_in_again_goes_on_in_the_same_process(
    aws: PlayedAws, catalog: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, legacy: bool
) -> None:
    configure_sso(aws, monkeypatch, tmp_path, legacy=legacy)
    opened = read_all(catalog)
    aws.keys.expire_sessions()
    aws.identity.sign_out()
    for work in (lambda: opened[3], lambda: read_all(catalog)):
        with pytest.raises(AccessError) as caught:
            work()
        assert "aws sso login" in str(caught.value)
        assert caught.value.exit_code == 4
    sign_in(aws, tmp_path, legacy=legacy)
    np.testing.assert_array_equal(opened[3], VALUES[3])
    read_all(catalog)


def test_a_process_that_prints_other_keys_is_asked_again(
    aws: PlayedAws, catalog: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    forget_keys(monkeypatch)
    old, new = (aws.keys.issue(READER, seconds=3600) for _ in range(2))
    configure_process(tmp_path, old)
    opened = read_all(catalog)
    aws.keys.expire(old)
    configure_process(tmp_path, new)
    np.testing.assert_array_equal(opened[3], VALUES[3])


def test_keys_that_end_soon_are_renewed_while_an_array_is_read(
    aws: PlayedAws, catalog: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    configure_sso(aws, monkeypatch, tmp_path, legacy=False)
    aws.identity.key_seconds = 30  # less than what botocore holds for enough
    opened = read_all(catalog)
    aws.identity.key_seconds = 3600
    np.testing.assert_array_equal(opened[3], VALUES[3])
    np.testing.assert_array_equal(dmdata.open(NAME, catalog=catalog)[3], VALUES[3])


# public buckets


@pytest.fixture
def public(aws: PlayedAws) -> str:
    bucket = aws.make("open-to-all", public=True)
    bucket.put("x.npy", npy(VALUES))
    return f"s3://{bucket.name}/x.npy"


def test_a_public_bucket_is_read_without_keys(aws: PlayedAws, public: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_keys(monkeypatch)
    np.testing.assert_array_equal(dmdata.open(public)[...], VALUES)
    assert signed_by(aws) == {None}
    assert dmdata.spend().usd == 0


def test_what_a_public_bucket_answers_without_keys_is_told_as_it_is(
    aws: PlayedAws, public: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_keys(monkeypatch)
    opened = dmdata.open(public).read_header()
    aws.inject(Fault(status=503, code="SlowDown"), times=2)
    np.testing.assert_array_equal(opened[5], VALUES[5])
    aws.inject(Fault(status=404, code="NoSuchKey"), times=1)
    with pytest.raises(ObjectMissingError, match="nothing is at"):
        opened[6]
    with pytest.raises(AccessError, match="no AWS credentials were found to write"):
        opened.mirror("s3://open-to-all/copy.zarr")


def test_who_may_not_write_for_an_ended_session_is_told_so(
    aws: PlayedAws, public: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    configure_sso(aws, monkeypatch, tmp_path, legacy=False)
    aws.identity.sign_out()
    sign_in(aws, tmp_path, legacy=False, seconds=-60)
    aws.identity.sign_out()
    opened = dmdata.open(public).read_header()
    with pytest.raises(AccessError, match="aws sso login"):
        opened.mirror("s3://open-to-all/copy.zarr")


@pytest.mark.parametrize("lying_about", ["expired", "deleted", "wrong", "sso"])
def test_a_public_bucket_is_read_whatever_keys_lie_about(
    aws: PlayedAws, public: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lying_about: str
) -> None:
    if lying_about == "sso":
        configure_sso(aws, monkeypatch, tmp_path, legacy=False)
        aws.identity.sign_out()
        sign_in(aws, tmp_path, legacy=False, seconds=-60)
        aws.identity.sign_out()
    else:
        key = aws.keys.issue(READER, seconds=60 if lying_about == "expired" else None)
        if lying_about == "wrong":
            key = Key(key.key_id, "another secret", READER)
        else:
            aws.keys.expire(key)
        for name, value in key.env.items():
            monkeypatch.setenv(name, value)
    np.testing.assert_array_equal(dmdata.open(public)[...], VALUES)
    assert signed_by(aws) == {None}
