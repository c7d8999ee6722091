"""The command: data on standard output, people on standard error, consent before money, and an exit code each."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from processes import Child, wait_until
from servers.loopback import Fault, LoopbackS3
from small_release import npy, publish, write_locally

import dmdata
from dmdata.cli.command import main
from dmdata.money.ledger import home

MARGINS = "toy/50pct/test_margins"
VALUES = np.random.default_rng(0).normal(size=(2000, 1000)).astype(np.float16)
SMALL = "toy/50pct/train_masks"
MASKS = np.random.default_rng(1).random((300, 70)) < 0.5
ESTIMATE_FIELDS = {"bytes", "requests", "usd", "usd_low", "usd_high", "seconds"}

# any attempt to open a connection ends the process
NO_NETWORK = """
import sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen"):
        raise SystemExit(f"{event} {arguments}")
sys.addaudithook(refuse)
from dmdata.cli.command import main
main()
"""
# a test run started in the background hands down an ignored SIGINT, which a terminal never does
COMMAND = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from dmdata.cli import main; main()"


@pytest.fixture(autouse=True)
def quiet_again() -> Iterator[None]:
    """Take away the log handler that a command puts on its standard error."""
    before = list(logging.getLogger().handlers)
    level = logging.getLogger().level
    yield
    logging.getLogger().handlers[:] = before
    logging.getLogger().setLevel(level)


@pytest.fixture
def catalog(s3: LoopbackS3, tmp_path: Path) -> str:
    return publish(s3, {MARGINS: VALUES, SMALL: MASKS}, tmp_path)


@pytest.fixture
def dm(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: its exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return run


def as_json(outcome: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = outcome
    assert code == 0, err
    facts: dict[str, Any] = json.loads(out)
    return facts


def in_subprocess(*arguments: object, program: str = COMMAND, **env: str | None) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in (os.environ | env).items() if value is not None}
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


# Without network


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ls", "cifar/50pct/*"], "310,000 x 10,000"),
        (["info", "cifar/50pct/test_margins"], "published"),
        (["info", "fmow"], "25.4"),
        (["estimate", "cifar/**", "fmow/**"], "total, cheapest"),
        (["spend"], "$0.00"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_needs_no_network_uses_none_and_needs_no_credentials(arguments: list[str], words: str) -> None:
    done = in_subprocess(*arguments, program=NO_NETWORK, AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert (done.returncode, words in done.stdout) == (0, True), done.stdout + done.stderr


def test_the_list_names_everything_with_shape_size_and_price(dm: Any) -> None:
    listed = as_json(dm("ls", "--json"))["artifacts"]
    assert len(listed) == 4 * 6 + 1 + 3 * 4
    by_name = {artifact["name"]: artifact for artifact in listed}
    margins = by_name["cifar/50pct/test_margins"]
    assert (margins["shape"], margins["dtype"], margins["bytes"]) == ([310_000, 10_000], "float16", 6_200_000_128)
    assert margins["usd"] == pytest.approx(6_200_000_128 * 0.09 / 2**30, rel=1e-3)
    assert by_name["cifar/50pct/train_datamodels"]["members"] == ["weight", "bias", "lam"]
    assert as_json(dm("ls", "**/bias", "--json"))["artifacts"][0]["shape"] == [10_000]


@pytest.mark.parametrize("command", ["ls", "estimate", "info"])
@pytest.mark.parametrize(("name", "glob"), [("cifar/50pct", "cifar/50pct/**"), ("cifar/50pct/", "cifar/50pct/**")])
def test_the_name_of_an_alpha_stands_for_all_below_it(dm: Any, command: str, name: str, glob: str) -> None:
    wanted = as_json(dm("ls" if command == "info" else command, glob, "--json"))
    assert as_json(dm(command, name, "--json")) == wanted
    assert len(wanted["artifacts"]) == 7


def test_the_name_of_a_dataset_stands_for_all_below_it_also_where_it_is_left_out(dm: Any) -> None:
    for name in ("cifar", "cifar/", "cifar/*pct"):
        assert as_json(dm("ls", name, "--json")) == as_json(dm("ls", "cifar/**", "--json"))
    some = as_json(dm("estimate", "cifar", "--exclude", "cifar/10pct", "--json"))
    assert some == as_json(dm("estimate", "cifar/**", "--exclude", "cifar/10pct/**", "--json"))
    assert as_json(dm("info", "cifar/", "--json")) == as_json(dm("info", "cifar", "--json"))
    assert dm("ls", "")[0] == dm("ls", "cifar/30pct")[0] == 2


def test_the_facts_of_an_artifact_come_with_how_they_are_known(dm: Any) -> None:
    facts = as_json(dm("info", "cifar/50pct/train_logits", "--json"))
    assert facts["basis"]["dtype"] == "published"
    assert facts["basis"]["shape"] == "inferred"
    assert facts["requester_pays"] is True
    assert facts["evaluation_rows"] == [300_000, 310_000]
    assert "the page prints n_test" in facts["note"]
    dataset = as_json(dm("info", "cifar", "--json"))
    assert (dataset["n_train"], dataset["alphas"]) == (50_000, ["10pct", "20pct", "50pct", "75pct"])
    for size in dataset["sizes"]:
        assert size["derived_gib"] == pytest.approx(size["published_gib"], rel=0.045)


def test_an_estimate_as_json_has_the_promised_fields(dm: Any) -> None:
    everything = as_json(dm("estimate", "cifar/**", "fmow/**", "--json"))
    assert set(everything) >= ESTIMATE_FIELDS | {"artifacts"}
    assert everything["usd"] == pytest.approx(374, rel=0.02)
    assert len(everything["artifacts"]) == 37
    assert all(set(artifact) >= ESTIMATE_FIELDS | {"name"} for artifact in everything["artifacts"])
    assert sum(artifact["bytes"] for artifact in everything["artifacts"]) == everything["bytes"]
    assert everything["usd_low"] < everything["usd"] == everything["usd_high"]
    without = as_json(dm("estimate", "cifar/**", "fmow/**", "--exclude", "**/*_logits", "--json"))
    assert without["usd"] == pytest.approx(53, rel=0.02)


def test_an_estimate_of_a_selection_and_destination(dm: Any) -> None:
    name = "cifar/50pct/test_margins"
    part = as_json(dm("estimate", name, "--select", "0:1000,42", "--json"))
    assert (part["bytes"], part["requests"]) == (1000 * 2 + 128, 1001)
    assert part["fastest"]["requests"] < 1001
    inside = as_json(dm("estimate", name, "--to", "same-region", "--json"))
    assert inside["usd"] == pytest.approx(inside["requests"] * 0.0004 / 1000)


def test_tables_are_for_people_and_remarks_go_to_standard_error(dm: Any) -> None:
    code, out, err = dm("estimate", "cifar/50pct/*_margins")
    assert code == 0
    assert "cifar/50pct/train_margins" in out
    assert "list prices" in err
    assert "list prices" not in out
    assert dm("estimate", "cifar/50pct/*_margins", "-q")[2] == ""


# Spending


def test_a_mirror_spends_what_was_estimated_and_spend_shows_it(
    dm: Any, s3: LoopbackS3, catalog: str, tmp_path: Path
) -> None:
    price = as_json(dm("estimate", SMALL, "--catalog", catalog, "--json"))
    outcome = as_json(dm("mirror", SMALL, tmp_path / "m.zarr", "--catalog", catalog, "-y", "--json"))
    assert outcome["artifacts"] == [SMALL]
    np.testing.assert_array_equal(np.asarray(zarr.open_array(tmp_path / "m.zarr", mode="r")[...]), MASKS)
    spent = as_json(dm("spend", "--json"))
    assert set(spent) >= {"bytes", "requests", "usd"}
    assert spent["bytes"] == s3.n_bytes == price["bytes"]
    assert spent["requests"] == s3.n_requests == price["requests"]
    assert spent["usd"] == pytest.approx(price["usd"])
    by_artifact = as_json(dm("spend", "--by", "artifact", "--json"))["by_artifact"]
    assert by_artifact[SMALL]["bytes"] == spent["bytes"]
    assert "$" in dm("spend")[1]


def test_a_download_by_command(dm: Any, s3: LoopbackS3, catalog: str, tmp_path: Path) -> None:
    outcome = as_json(dm("get", SMALL, "-o", tmp_path / "x.npy", "--catalog", catalog, "-y", "--json"))
    assert outcome == {"path": str(tmp_path / "x.npy"), "bytes": len(npy(MASKS)), "present": False}
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), MASKS)


@pytest.mark.parametrize("command", ["get", "mirror"])
def test_a_dry_run_shows_the_price_and_does_nothing(
    dm: Any, s3: LoopbackS3, catalog: str, tmp_path: Path, command: str
) -> None:
    target = ["-o", tmp_path / "x"] if command == "get" else [tmp_path / "x"]
    price = as_json(dm(command, SMALL, *target, "--catalog", catalog, "--dry-run", "--json"))
    assert set(price) >= ESTIMATE_FIELDS
    assert price["usd"] > 0
    assert s3.n_requests == 0
    assert not (tmp_path / "x").exists()
    assert not home().exists()


def test_what_is_free_needs_no_consent(dm: Any, tmp_path: Path) -> None:
    catalog = write_locally({SMALL: MASKS}, tmp_path / "run")
    assert dm("mirror", SMALL, tmp_path / "m.zarr", "--catalog", catalog)[0] == 0
    assert dm("get", SMALL, "-o", tmp_path / "x.npy", "--catalog", tmp_path / "run")[0] == 0


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("0:100", VALUES[:100]),
        ("0:100,5", VALUES[:100, 5:6]),
        ("::500,[7,3]", VALUES[::500][:, [7, 3]]),
        ("::-500", VALUES[::-500]),
        (":,0:10", VALUES[:, :10]),
        ("...,-1", VALUES[:, -1:]),
    ],
)
def test_rows_and_columns_are_mirrored_by_command(
    dm: Any, s3: LoopbackS3, catalog: str, tmp_path: Path, select: str, expected: Any
) -> None:
    arguments = ["mirror", MARGINS, tmp_path / "m.zarr", "--catalog", catalog, "--select", select, "-y"]
    code, _, err = dm(*arguments)
    assert code == 0, err
    copy = np.asarray(zarr.open_array(tmp_path / "m.zarr", mode="r")[...])
    np.testing.assert_array_equal(copy.reshape(expected.shape), expected)


def test_rows_alone_leave_every_column_of_every_array(dm: Any, s3: LoopbackS3, tmp_path: Path) -> None:
    narrow, broad = VALUES[:50, :10], VALUES[:50, :90]
    catalog = publish(s3, {MARGINS: narrow, "toy/50pct/train_margins": broad}, tmp_path)
    code, _, err = dm("mirror", "toy/50pct/*", tmp_path / "g.zarr", "--catalog", catalog, "--select", "0:20", "-y")
    assert code == 0, err
    group = zarr.open_group(tmp_path / "g.zarr", mode="r")
    assert group[MARGINS].shape == (20, 10)  # type: ignore[union-attr] # an array
    assert group["toy/50pct/train_margins"].shape == (20, 90)  # type: ignore[union-attr] # an array


# How a command ends


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["info", "cifar/50pct/test_margin"], "nearest: cifar/50pct/test_margins"),
        (["estimate", "cifar/30pct/test_margins"], "choose 10%, 20%, 50% or 75%"),
        (["estimate", "cifar/50pct/test_margins", "--select", "400000"], "out of bounds"),
        (["estimate", "cifar/50pct/test_margins", "--select", "a:b"], "write it like"),
        (["estimate", "cifar/50pct/test_datamodels", "--select", "0"], "test_datamodels/weight"),
        (["get", "cifar/20pct/train_datamodels"], "CIFAR at 50% alone"),
        (["estimate"], "PATTERNS"),
        (["estimate", "cifar/**", "--to", "moon"], "moon"),
        (["ls", "--catalog", "/nowhere/catalog.yaml"], "/nowhere/catalog.yaml"),
        (["nonsense"], "nonsense"),
        (["ls", "--nonsense"], "nonsense"),
        (["mirror", "cifar/50pct/test_margins", "x", "--max-cost", "-1", "-y"], "max-cost"),
        (["mirror", "cifar/50pct/test_margins", "x", "--max-cost", "nan", "-y"], "max-cost"),
        (["mirror", "cifar/50pct/test_margins", "x", "--memory", "0", "-y"], "memory"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_says_what_is_right(
    dm: Any, arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = dm(*arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err


def test_help_and_version_end_with_0(dm: Any) -> None:
    for arguments in (["--help"], ["-h"], ["mirror", "--help"], ["--version"]):
        code, out, _ = dm(*arguments)
        assert (code, bool(out)) == (0, True)


def test_a_damaged_object_ends_with_1(dm: Any, s3: LoopbackS3, catalog: str, tmp_path: Path) -> None:
    s3.put("toy/data/train_masks_50pct.npy", b"nonsense" * 50)
    code, out, err = dm("mirror", SMALL, tmp_path / "m.zarr", "--catalog", catalog, "-y")
    assert (code, out) == (1, "")
    assert "is not a .npy file" in err
    assert not (tmp_path / "m.zarr").exists()


def test_a_changed_object_ends_with_3(dm: Any, s3: LoopbackS3, catalog: str, tmp_path: Path) -> None:
    s3.inject(Fault(replace=npy(~MASKS)), after=1)
    assert dm("get", SMALL, "-o", tmp_path / "x.npy", "--catalog", catalog, "-y")[0] == 3
    assert not (tmp_path / "x.npy").exists()


def test_missing_or_wrong_credentials_end_with_4(
    dm: Any, s3: LoopbackS3, catalog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["get", SMALL, "-o", tmp_path / "x.npy", "--catalog", catalog, "-y"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "SOMEBODYELSE")
    code, _, err = dm(*arguments)
    assert (code, "InvalidAccessKeyId" in err) == (4, True), err
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3.reset_log()
    code, _, err = dm(*arguments)
    assert (code, "no AWS credentials were found" in err) == (4, True), err
    assert s3.n_requests == 0
    assert list(tmp_path.glob("x.npy*")) == []


def test_a_server_that_is_down_ends_with_5(
    dm: Any, catalog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    code, _, err = dm("get", SMALL, "-o", tmp_path / "x.npy", "--catalog", catalog, "-y")
    assert (code, "try again later" in err) == (5, True), err


def test_without_consent_and_terminal_it_ends_with_6(dm: Any, s3: LoopbackS3, catalog: str, tmp_path: Path) -> None:
    for arguments in (["mirror", SMALL, tmp_path / "m.zarr"], ["get", SMALL, "-o", tmp_path / "x.npy"]):
        done = in_subprocess(*arguments, "--catalog", catalog)
        assert (done.returncode, done.stdout) == (6, "")
        assert "will cost up to $0.00000" in done.stderr
        assert "add -y" in done.stderr
    assert s3.n_requests == 0
    assert dmdata.spend().n_reads == 0


def test_over_the_budget_it_ends_with_8_before_any_byte(
    dm: Any, s3: LoopbackS3, catalog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["mirror", MARGINS, tmp_path / "m.zarr", "--catalog", catalog, "-y"]
    code, _, err = dm(*arguments, "--max-cost", "0.0001")
    assert (code, "--max-cost" in err) == (8, True)
    monkeypatch.setenv("DMDATA_MAX_COST", "0.0002")
    code, _, err = dm(*arguments)
    assert (code, "DMDATA_MAX_COST" in err) == (8, True)
    assert s3.n_requests == 0
    monkeypatch.setenv("DMDATA_MAX_COST", "0.01")
    assert dm(*arguments)[0] == 0


def test_the_default_dollar_stops_a_command_that_would_cost_more(dm: Any, s3: LoopbackS3, tmp_path: Path) -> None:
    code, _, err = dm("mirror", "cifar/10pct/test_margins", tmp_path / "m.zarr", "-y")
    assert (code, "default budget a process of $1.00" in err) == (8, True)
    assert s3.n_requests == 0


def test_a_command_that_is_interrupted_ends_with_130_keeps_what_is_complete_and_goes_on(
    s3: LoopbackS3, catalog: str, tmp_path: Path
) -> None:
    s3.latency_seconds = 0.15
    destination = tmp_path / "m.zarr"
    arguments = ["mirror", MARGINS, str(destination), "--catalog", catalog, "--memory", "1", "-y"]
    with Child(
        [sys.executable, "-c", COMMAND, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        wait_until(lambda: s3.n_requests >= 7)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, out) == (130, ""), err
    assert "interrupted" in err
    assert "Traceback" not in err
    before = s3.n_requests
    assert before < 17
    # a request is in the ledger before it is sent: the last may not have got to the server
    assert 0 <= dmdata.spend().n_requests - before <= 1
    s3.latency_seconds = 0
    done = in_subprocess(*arguments)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.asarray(zarr.open_array(destination, mode="r")[...]), VALUES)
    assert s3.n_requests <= 18, "header, sixteen blocks, and at most the one in flight again"


def test_an_interrupted_read_leaves_a_receipt_for_all_that_may_be_billed(
    s3: LoopbackS3, catalog: str, tmp_path: Path
) -> None:
    s3.bytes_per_second = 3e6
    arguments = ["mirror", MARGINS, str(tmp_path / "m.zarr"), "--catalog", catalog, "-y"]
    with Child([sys.executable, "-c", COMMAND, *arguments], stderr=subprocess.PIPE) as process:
        wait_until(lambda: s3.n_bytes > 2_200_000)
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode == 130
    spent = dmdata.spend()
    assert spent.n_requests == s3.n_requests == 2
    assert s3.n_object_bytes < VALUES.nbytes
    assert s3.n_object_bytes <= spent.n_bytes <= VALUES.nbytes + 128, "what was cut off may be billed whole"


def test_a_reader_that_goes_away_is_no_crash() -> None:
    program = f"{sys.executable} -c {COMMAND!r} ls | head -n 1"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr
    assert done.stdout


def test_options_of_all_commands_are_taken_before_or_after_the_command(dm: Any, catalog: str, tmp_path: Path) -> None:
    after = dm("ls", MARGINS, "--json", "--catalog", catalog)
    assert after[0] == 0
    assert (
        dm("--json", "--catalog", catalog, "ls", MARGINS) == dm("--catalog", catalog, "ls", "--json", MARGINS) == after
    )
    assert dm("config", "--json", "get", "max_cost") == dm("config", "get", "max_cost", "--json")
    assert dm("--json", "config") == dm("config", "--json")
    assert dm("-q", "cache") == dm("cache", "-q") != dm("cache")
    assert dm("--catalog", catalog, "catalog", "show") == dm("catalog", "--catalog", catalog, "show")
    assert dm("--catalog", "elsewhere", "ls", MARGINS, "--catalog", catalog) == dm("ls", MARGINS, "--catalog", catalog)
    assert "Traceback" in dm("--debug", "ls", "--catalog", tmp_path / "none.yaml")[2]


def test_every_command_has_help_with_an_explanation(dm: Any) -> None:
    for command in ("ls", "info", "estimate", "get", "mirror", "spend"):
        code, out, _ = dm(command, "--help")
        assert code == 0
        assert "--json" in out
        assert len(out.splitlines()) > 5
