"""Whatever takes a name takes an address: priced and asked first, and booked as it was served."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import fsspec
import numpy as np
import pytest
import zarr
from servers.loopback import BUCKET, Fault, LoopbackS3, Request
from small_release import Pt, npy, pt, publish, write_locally

import dmdata
from dmdata.cli.command import main
from dmdata.cli.completion import complete_artifacts
from dmdata.errors import BudgetError, CatalogError, FormatError
from dmdata.home import home
from dmdata.money.prices import Terms
from dmdata.release import catalogs, opening
from dmdata.release.pricing import place_of

VALUES = np.arange(900 * 40, dtype=np.float32).reshape(900, 40)
CONTENT = npy(VALUES)
MEMBERS = {"weight": VALUES[:30], "bias": np.arange(40, dtype=np.float32)}
ARRAY = f"s3://{BUCKET}/lab/x.npy"
MODEL = f"s3://{BUCKET}/lab/model.pt"
NAME = "toy/50pct/test_margins"


@pytest.fixture
def bucket(s3: LoopbackS3) -> LoopbackS3:
    s3.put("lab/x.npy", CONTENT)
    s3.put("lab/model.pt", pt(MEMBERS))
    s3.put("lab/notes.txt", b"some words")
    return s3


@pytest.fixture
def dm(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def as_json(outcome: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = outcome
    assert code == 0, err
    facts: dict[str, Any] = json.loads(out)
    return facts


def assert_booked_as_served(s3: LoopbackS3) -> None:
    spent = dmdata.spend()
    assert (spent.n_requests, spent.n_bytes) == (s3.n_requests, s3.n_bytes)


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", ARRAY],
        ["info", f"{MODEL}/weight"],
        ["estimate", ARRAY],
        ["estimate", ARRAY, "--select", "0:10"],
        ["get", ARRAY],
        ["mirror", ARRAY, "copy"],
        ["doctor", ARRAY, "--probe"],
    ],
    ids=" ".join,
)
def test_nothing_of_a_paid_address_is_read_before_somebody_agreed(
    bucket: LoopbackS3, dm: Any, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = dm(*arguments)
    assert (code, out, bucket.n_requests) == (6, "", 0)
    assert "add -y" in err
    if "--probe" not in arguments:
        assert dm(*arguments, "-y", "--max-cost", "0")[0] == 8
        assert dm(*arguments, "--dry-run")[0] == 0
        assert bucket.n_requests == 0
    assert dm(*arguments, "-y")[0] == 0
    assert_booked_as_served(bucket)


def test_info_of_an_address_is_what_its_header_says(bucket: LoopbackS3, dm: Any) -> None:
    facts = as_json(dm("info", ARRAY, "-y", "--json"))
    assert (facts["shape"], facts["dtype"], facts["bytes"]) == ([900, 40], "float32", len(CONTENT))
    assert (facts["url"], facts["etag"]) == (ARRAY, bucket.etag("lab/x.npy"))
    assert (facts["format"], facts["requester_pays"]) == ("npy", True)
    assert set(facts["basis"].values()) == {"measured"}
    whole = as_json(dm("info", MODEL, "-y", "--json"))
    assert (whole["members"], whole["shape"]) == (["weight", "bias"], None)
    member = as_json(dm("info", f"{MODEL}/bias", "-y", "--json"))
    assert (member["shape"], member["name"]) == ([40], f"{MODEL}/bias")
    assert "the reader" in dm("info", ARRAY, "-y")[1]
    plain = as_json(dm("info", f"s3://{BUCKET}/lab/notes.txt", "-y", "--json"))
    assert (plain["format"], plain["bytes"], plain["shape"]) == ("bytes", 10, None)
    assert_booked_as_served(bucket)


def test_an_estimate_of_an_address_is_that_of_the_same_array_in_a_catalog(
    bucket: LoopbackS3, dm: Any, tmp_path: Path
) -> None:
    catalog = publish(bucket, {NAME: VALUES}, tmp_path)
    for select in ([], ["--select", "0:10"], ["--select", ":,3"]):
        by_address = as_json(dm("estimate", ARRAY, *select, "-y", "--json"))
        by_name = as_json(dm("estimate", NAME, *select, "--catalog", catalog, "--json"))
        assert {**by_address, "artifacts": []} == {**by_name, "artifacts": []}
    both = as_json(dm("estimate", NAME, ARRAY, MODEL, "--catalog", catalog, "-y", "--json"))
    assert [part["name"] for part in both["artifacts"]] == [NAME, ARRAY, MODEL]
    assert dmdata.estimate([NAME, ARRAY, MODEL], catalog=catalog).n_bytes == both["bytes"]
    with pytest.raises(FormatError, match="dmdata get"):
        dmdata.estimate(f"s3://{BUCKET}/lab/notes.txt", select="0:3")


def test_an_address_needs_no_catalog(dm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMDATA_CATALOG", str(tmp_path / "nowhere.yaml"))
    (tmp_path / "x.npy").write_bytes(CONTENT)
    assert as_json(dm("estimate", tmp_path / "x.npy", "--json"))["bytes"] == len(CONTENT)
    assert as_json(dm("info", f"file://{tmp_path}/x.npy", "--json"))["shape"] == [900, 40]
    with pytest.raises(CatalogError):
        dmdata.estimate(NAME)


@pytest.mark.parametrize(
    ("key", "content"),
    [("lab/x.npy", CONTENT), ("lab/model.pt", pt(MEMBERS)), ("lab/notes.txt", b"some words"), ("lab/empty", b"")],
)
def test_any_object_is_downloaded_by_its_address(
    bucket: LoopbackS3, dm: Any, tmp_path: Path, key: str, content: bytes
) -> None:
    bucket.put(key, content)
    path = tmp_path / "out" / key.rpartition("/")[2]
    path.parent.mkdir()
    facts = as_json(dm("get", f"s3://{BUCKET}/{key}", "-o", path.parent, "-y", "--json"))
    assert (Path(facts["path"]), path.read_bytes()) == (path, content)
    path.unlink()
    assert dmdata.get(f"s3://{BUCKET}/{key}", path) == path
    assert path.read_bytes() == content
    assert dmdata.spend().n_bytes == bucket.n_object_bytes


def test_what_is_no_array_is_not_downloaded_as_one(bucket: LoopbackS3, tmp_path: Path) -> None:
    bucket.put("lab/false.npy", b"no array at all")
    with pytest.raises(FormatError):
        dmdata.get(f"s3://{BUCKET}/lab/false.npy", tmp_path / "false.npy")
    assert not (tmp_path / "false.npy").exists()


def test_get_of_a_member_is_of_the_whole_object(bucket: LoopbackS3, dm: Any, tmp_path: Path) -> None:
    assert dmdata.get(f"{MODEL}/weight", tmp_path / "a.pt").read_bytes() == bucket.content("lab/model.pt")
    assert dm("get", f"{MODEL}/weight", "-o", tmp_path / "b.pt", "-y")[0] == 0
    assert (tmp_path / "b.pt").read_bytes() == bucket.content("lab/model.pt")


def test_one_address_is_mirrored_as_an_array_and_resumed_for_free(bucket: LoopbackS3, dm: Any, tmp_path: Path) -> None:
    assert dm("mirror", ARRAY, tmp_path / "copy", "--select", "0:100", "-y")[0] == 0
    assert np.array_equal(zarr.open_array(tmp_path / "copy", mode="r")[:], VALUES[:100])
    before = bucket.n_requests
    assert dm("mirror", ARRAY, tmp_path / "copy", "--select", "0:100", "-y")[0] == 0
    assert bucket.n_requests == before
    assert dm("verify", tmp_path / "copy")[0] == 0
    assert dm("mirror", f"{MODEL}/bias", tmp_path / "bias", "-y")[0] == 0
    assert np.array_equal(zarr.open_array(tmp_path / "bias", mode="r")[:], MEMBERS["bias"])
    assert_booked_as_served(bucket)


def test_names_and_addresses_are_mirrored_together_into_a_group(bucket: LoopbackS3, dm: Any, tmp_path: Path) -> None:
    catalog = publish(bucket, {NAME: VALUES}, tmp_path / "release")
    (tmp_path / "x.npy").write_bytes(CONTENT)
    wanted = [NAME, MODEL, ARRAY, str(tmp_path / "x.npy")]
    assert dm("mirror", *wanted, tmp_path / "copy", "--catalog", catalog, "-y")[0] == 0
    group = zarr.open_group(tmp_path / "copy", mode="r")
    assert np.array_equal(group[NAME][:], VALUES)
    assert np.array_equal(group[f"{BUCKET}/lab/model.pt/weight"][:], MEMBERS["weight"])
    assert np.array_equal(group[f"{BUCKET}/lab/x.npy"][:], VALUES)
    assert np.array_equal(group[str(tmp_path / "x.npy").lstrip("/")][:], VALUES)
    assert dm("verify", tmp_path / "copy", "--catalog", catalog)[0] == 0
    with dmdata.budget(usd=0.0):
        dmdata.mirror(wanted, tmp_path / "copy", catalog=catalog)


@pytest.mark.parametrize("key", ["a/../../../up.npy", "a//./.././b.npy", "__hidden/zarr.json/c.npy"])
def test_a_key_cannot_lead_out_of_the_group_it_is_mirrored_to(bucket: LoopbackS3, tmp_path: Path, key: str) -> None:
    bucket.put(key, CONTENT)
    place = place_of(opening.describe(f"s3://{BUCKET}/{key}", Terms.in_force())[0])
    inside = (tmp_path / place).resolve()
    assert inside == tmp_path / place
    assert inside.is_relative_to(tmp_path / BUCKET)
    zarr.open_group(tmp_path, mode="a").create_array(place, data=VALUES)


def test_a_whole_object_of_one_member_is_still_a_group(bucket: LoopbackS3, tmp_path: Path) -> None:
    bucket.put("one.pt", pt({"weight": VALUES}))
    group = dmdata.mirror(f"s3://{BUCKET}/one.pt", tmp_path / "copy")
    assert np.array_equal(group[f"{BUCKET}/one.pt/weight"][:], VALUES)


def test_a_mirror_of_what_is_no_array_says_what_to_do(bucket: LoopbackS3, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="dmdata get"):
        dmdata.mirror(f"s3://{BUCKET}/lab/notes.txt", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_member_that_is_not_there_is_refused_by_name(bucket: LoopbackS3, dm: Any) -> None:
    code, _, err = dm("info", f"{MODEL}/wight", "-y")
    assert code == 1
    assert "weight" in err


def test_a_budget_holds_for_the_header_of_an_address(bucket: LoopbackS3) -> None:
    with dmdata.budget(usd=0.0), pytest.raises(BudgetError):
        dmdata.estimate(ARRAY)
    assert bucket.n_requests == 0


def test_doctor_looks_at_an_address_without_reading_it(bucket: LoopbackS3, dm: Any, tmp_path: Path) -> None:
    facts = as_json(dm("doctor", ARRAY, "--json"))
    assert facts["artifact"] == ARRAY
    assert "x-amz-request-payer" in {f["topic"]: f["words"] for f in facts["findings"]}["requester pays"]
    assert bucket.n_requests == 0
    (tmp_path / "x.npy").write_bytes(CONTENT)
    local = as_json(dm("doctor", tmp_path / "x.npy", "--probe", "--json"))
    assert "free" in {f["topic"]: f["words"] for f in local["findings"]}["source"]


def test_ls_sends_whoever_lists_an_address_to_what_describes_it(dm: Any) -> None:
    code, _, err = dm("ls", ARRAY)
    assert code == 2
    assert "catalog scan" in err


def test_a_zarr_array_is_described_and_not_downloaded(dm: Any, tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "y.zarr", data=VALUES, chunks=(100, 40))
    assert as_json(dm("info", tmp_path / "y.zarr", "--json"))["shape"] == [900, 40]
    assert dm("mirror", tmp_path / "y.zarr", tmp_path / "copy")[0] == 0
    code, _, err = dm("get", tmp_path / "y.zarr", "-o", tmp_path / "z")
    assert code == 2
    assert "dmdata mirror" in err


def test_the_query_of_an_address_is_never_shown(dm: Any, tmp_path: Path, bucket: LoopbackS3) -> None:
    bucket.requester_pays = False
    url = f"{bucket.endpoint_url}/{BUCKET}/lab/x.npy"
    facts = as_json(dm("info", url, "--json"))
    assert (facts["shape"], facts["requester_pays"], facts["url"]) == ([900, 40], False, url)
    assert dm("get", url, "-o", tmp_path / "x.npy")[0] == 0
    assert dmdata.spend().n_requests == 0
    shown = opening.address_named(f"{url}?X-Amz-Signature=secret")
    assert "secret" not in str(shown)


def test_completion_offers_files_for_an_address_and_pays_for_no_catalog(
    bucket: LoopbackS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, argument = click.Context(click.Command("info")), click.Argument(["name"])
    [item] = complete_artifacts(context, argument, "./x")
    assert (item.value, item.type) == ("./x", "file")
    assert [item.value for item in complete_artifacts(context, argument, "cif")] == ["cifar/"]
    monkeypatch.setenv("DMDATA_CATALOG", f"s3://{BUCKET}/run")
    assert complete_artifacts(context, argument, "to") == []
    assert bucket.n_requests == 0


# A catalog by URL


def lists_of(s3: LoopbackS3) -> int:
    return sum(request.key.endswith("catalog.yaml") for request in s3.log)


@pytest.fixture
def remote(bucket: LoopbackS3, tmp_path: Path) -> str:
    catalog = publish(bucket, {NAME: VALUES, "toy/50pct/model": Pt(pt(MEMBERS), MEMBERS)}, tmp_path / "release")
    bucket.put("run/catalog.yaml", Path(catalog).read_bytes())
    return f"s3://{BUCKET}/run"


def test_a_catalog_by_url_is_fetched_once_a_process(bucket: LoopbackS3, remote: str) -> None:
    files = fsspec.filesystem("dmdata", catalog=remote)
    assert files.glob("toy/*/test_*") == [NAME]
    assert NAME in files.find("toy")
    files.cat_file(NAME)
    for _ in range(10):
        dmdata.open(NAME, catalog=remote)
    dmdata.estimate("toy/**", catalog=f"{remote}/catalog.yaml")
    assert lists_of(bucket) == 1
    assert_booked_as_served(bucket)


def test_threads_that_need_a_catalog_at_once_fetch_it_once(bucket: LoopbackS3, remote: str) -> None:
    bucket.latency_seconds = 0.1
    threads = [threading.Thread(target=dmdata.load_catalog, args=(remote,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lists_of(bucket) == 1


def test_a_catalog_that_is_slow_to_come_holds_up_no_other_and_no_fork(
    bucket: LoopbackS3, remote: str, tmp_path: Path
) -> None:
    bucket.put("other/catalog.yaml", Path(publish(bucket, {NAME: VALUES}, tmp_path / "other")).read_bytes())
    begun = threading.Event()

    def is_slow(request: Request) -> bool:
        if request.key == "run/catalog.yaml":
            begun.set()
        return request.key == "run/catalog.yaml"

    bucket.inject(Fault(stall_seconds=3), when=is_slow)
    slow = threading.Thread(target=dmdata.load_catalog, args=(remote,))
    slow.start()
    assert begun.wait(10)
    assert dmdata.load_catalog(f"s3://{BUCKET}/other").has(NAME)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert slow.is_alive(), "both were done before the slow one came"
    slow.join()


def test_a_catalog_is_looked_at_again_after_a_while_and_read_again_if_it_changed(
    bucket: LoopbackS3, remote: str, tmp_path: Path
) -> None:
    assert dmdata.load_catalog(remote).has(NAME)
    before = bucket.n_object_bytes
    assert dmdata.load_catalog(remote, max_age_seconds=0).has(NAME)
    assert (lists_of(bucket), bucket.n_object_bytes - before) == (2, 1), "its ETag comes with one byte"
    other = publish(bucket, {"toy/50pct/other": VALUES}, tmp_path / "other")
    bucket.put("run/catalog.yaml", Path(other).read_bytes())
    assert not dmdata.load_catalog(remote, max_age_seconds=0).has(NAME)
    assert_booked_as_served(bucket)


def test_another_process_reads_one_byte_of_a_catalog_that_is_the_same(
    bucket: LoopbackS3, remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dmdata.load_catalog(remote)
    for served in (1, 1):
        monkeypatch.setattr(catalogs, "_CATALOGS", {})
        bucket.reset_log()
        assert dmdata.load_catalog(remote).has(NAME)
        assert (lists_of(bucket), bucket.n_object_bytes) == (1, served)
    other = publish(bucket, {"toy/50pct/other": VALUES}, tmp_path / "other")
    bucket.put("run/catalog.yaml", Path(other).read_bytes())
    monkeypatch.setattr(catalogs, "_CATALOGS", {})
    assert dmdata.load_catalog(remote).has("toy/50pct/other")
    (kept,) = (home() / "catalogs").iterdir()
    for damage in (kept.read_text().replace("toy", "boy"), "[]", ""):
        kept.write_text(damage)
        monkeypatch.setattr(catalogs, "_CATALOGS", {})
        assert dmdata.load_catalog(remote).has("toy/50pct/other")


def test_another_endpoint_is_another_catalog(
    bucket: LoopbackS3, remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dmdata.load_catalog(remote).has(NAME)
    with LoopbackS3() as other:
        other.put("run/catalog.yaml", Path(publish(other, {"toy/50pct/b": VALUES}, tmp_path / "b")).read_bytes())
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", other.endpoint_url)
        assert not dmdata.load_catalog(remote).has(NAME)


def test_a_catalog_that_cannot_be_read_is_asked_for_again(bucket: LoopbackS3) -> None:
    bucket.put("bad/catalog.yaml", b"[]")
    for _ in range(2):
        with pytest.raises(CatalogError):
            dmdata.load_catalog(f"s3://{BUCKET}/bad")
    assert lists_of(bucket) == 2


def test_a_local_catalog_is_read_each_time(tmp_path: Path) -> None:
    path = write_locally({NAME: VALUES}, tmp_path / "run")
    assert dmdata.load_catalog(f"file://{path}").has(NAME)
    Path(path).write_text(Path(path).read_text().replace("test_margins:", "renamed:"))
    assert not dmdata.load_catalog(f"file://{path}").has(NAME)
