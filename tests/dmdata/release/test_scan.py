"""A catalog of what is there: listed and read for a price that is asked first, and compared with its source later."""

import hashlib
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
import zarr
from servers.loopback import BUCKET, OWNER_KEY_ID, READER_KEY_ID, Fault, LoopbackS3
from small_release import Pt, npy, pt, publish, write_locally

import dmdata
from dmdata.cli.command import main
from dmdata.release.scan import propose_name

MASKS = np.random.default_rng(0).random((40, 30)) < 0.5
MARGINS = np.arange(40 * 20, dtype=np.float16).reshape(40, 20)
WEIGHT = {"weight": np.arange(600, dtype=np.float32).reshape(30, 20), "bias": np.zeros(20, np.float32)}


@pytest.fixture
def bucket(s3: LoopbackS3) -> LoopbackS3:
    """A server whose reader may list."""
    s3.hide_missing = False
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


def fill(s3: LoopbackS3) -> None:
    s3.put("cifar/data/train_masks_50pct.npy", npy(MASKS))
    s3.put("cifar/data/test_margins_50pct.npy", npy(MARGINS))
    s3.put("cifar/datamodels/test_50pct.pt", pt(WEIGHT))
    s3.put("cifar/readme.txt", b"read me")


def assert_booked_as_served(s3: LoopbackS3) -> None:
    spent = dmdata.spend()
    assert (spent.n_requests, spent.n_bytes) == (s3.n_requests, s3.n_bytes)


def test_a_release_is_recognised_by_its_keys_and_opened_by_the_catalog_made(
    bucket: LoopbackS3, dm: Any, tmp_path: Path
) -> None:
    fill(bucket)
    output = tmp_path / "made.yaml"
    facts = as_json(dm("catalog", "scan", f"s3://{BUCKET}", "-o", output, "-y", "--json"))
    assert facts["artifacts"] == ["cifar/50pct/test_margins", "cifar/50pct/train_masks", "cifar/50pct/test_datamodels"]
    assert (facts["requester_pays"], facts["region"]) == (True, "us-east-1")
    assert facts["remarks"] == ["1 objects are not of a kind whose arrays are read"]
    assert_booked_as_served(bucket)
    known = dmdata.load_catalog(output)
    masks = known.find("cifar/50pct/train_masks")
    assert (masks.alpha, masks.schema and masks.schema.dims) == (0.5, ("model", "train_example"))
    assert masks.basis == {
        **dict.fromkeys(["key", "format", "shape", "dtype", "n_bytes"], "measured"),
        "dims": "inferred",
    }
    assert masks.stored.etag == bucket.etag(masks.stored.key)
    before = bucket.n_requests
    assert np.array_equal(dmdata.open("cifar/50pct/train_masks", catalog=output)[:], MASKS)
    assert np.array_equal(dmdata.open("cifar/50pct/test_datamodels/weight", catalog=output)[3], WEIGHT["weight"][3])
    assert bucket.n_requests == before + 2, "the headers are remembered"
    assert as_json(dm("catalog", "check", output, "--json"))["artifacts"] == 3
    assert "cifar/50pct/train_masks" in dm("ls", "--catalog", output)[1]
    assert as_json(dm("info", "cifar/50pct/train_masks", "--catalog", output, "--json"))["fit_rows"] is None


def test_nothing_is_listed_and_no_header_read_before_somebody_agreed(
    bucket: LoopbackS3, dm: Any, tmp_path: Path
) -> None:
    fill(bucket)
    for nth in range(6):
        bucket.put(f"cifar/more/{nth}.pt", pt(WEIGHT))
    output = tmp_path / "made.yaml"
    code, out, err = dm("catalog", "scan", f"s3://{BUCKET}", "-o", output)
    assert (code, out, bucket.n_requests) == (6, "", 0)
    assert "1,000 objects" in err
    facts = as_json(dm("catalog", "scan", f"s3://{BUCKET}", "-o", output, "--dry-run", "--json"))
    assert (bucket.n_requests, facts["objects_per_page"]) == (0, 1000)
    assert 0.000005 < facts["usd_per_page"] < 0.0001
    priced = as_json(dm("catalog", "scan", f"s3://{BUCKET}", "-o", output, "--dry-run", "-y", "--json"))
    assert (bucket.n_requests, len(priced["artifacts"])) == (1, 9), "only the list was asked for"
    assert dm("catalog", "scan", f"s3://{BUCKET}", "-o", output, "-y", "--max-cost", "0.0000001")[0] == 8
    assert bucket.n_requests == 1
    assert dm("catalog", "scan", f"s3://{BUCKET}", "-o", output, "-y", "--max-cost", "0.00006")[0] == 8
    assert bucket.n_requests == 2, "the list fits that budget, the headers do not"
    assert not output.exists()
    assert dm("catalog", "scan", f"s3://{BUCKET}", "-o", output, "-y")[0] == 0
    assert dmdata.spend().usd <= 0.00006 + priced["usd"] * 2
    assert_booked_as_served(bucket)


def test_lists_of_many_pages_are_read_to_their_end_and_each_page_is_booked(
    bucket: LoopbackS3, dm: Any, tmp_path: Path
) -> None:
    keys = [f"run/n{nth:04}.txt" for nth in range(2100)]
    for key in [*keys, "run/a b+cé.npy", "run/z.npy", "runner/other.npy"]:
        bucket.put(key, npy(MARGINS) if key.endswith("npy") else b"")
    facts = as_json(dm("catalog", "scan", f"s3://{BUCKET}/run", "-o", tmp_path / "made.yaml", "-y", "--json"))
    lists = [request for request in bucket.log if not request.key]
    assert len(lists) == 3
    assert all(request.charged for request in lists), "the offer to pay was sent"
    assert "run/all/z" in facts["artifacts"]
    assert not any("other" in name for name in facts["artifacts"]), "runner/ is not below run/"
    assert_booked_as_served(bucket)


def test_a_page_that_breaks_is_asked_for_again_and_booked_each_time(
    bucket: LoopbackS3, dm: Any, tmp_path: Path
) -> None:
    fill(bucket)
    bucket.inject(Fault(status=503), times=2)
    assert dm("catalog", "scan", f"s3://{BUCKET}", "-o", tmp_path / "made.yaml", "-y")[0] == 0
    assert [request.status for request in bucket.log[:3]] == [503, 503, 200]
    assert dmdata.spend().n_requests == bucket.n_requests


def test_who_may_not_list_is_told_so(s3: LoopbackS3, dm: Any, tmp_path: Path) -> None:
    fill(s3)
    code, _, err = dm("catalog", "scan", f"s3://{BUCKET}", "-o", tmp_path / "made.yaml", "-y")
    assert code == 4
    assert "s3:ListBucket" in err
    assert dmdata.spend().n_bytes == 0, "a refusal costs its request alone"


def test_what_cannot_be_read_is_left_out_with_its_reason(bucket: LoopbackS3, dm: Any, tmp_path: Path) -> None:
    fill(bucket)
    bucket.put("cifar/data/broken.npy", b"no array at all")
    bucket.put("cifar/data/empty.npy", b"")
    bucket.put("cifar/data/objects.npy", b"\x93NUMPY\x01\x00" + pickle.dumps({}))
    bucket.put("cifar/../up.npy", npy(MARGINS))
    facts = as_json(dm("catalog", "scan", f"s3://{BUCKET}", "-o", tmp_path / "made.yaml", "-y", "--json"))
    assert len(facts["artifacts"]) == 3
    left_out = [remark for remark in facts["remarks"] if "left out" in remark]
    assert sorted(remark.partition("'")[2].partition("'")[0] for remark in left_out) == [
        "cifar/../up.npy",
        "cifar/data/broken.npy",
        "cifar/data/empty.npy",
        "cifar/data/objects.npy",
    ]


def test_a_scan_that_breaks_off_writes_nothing_and_pays_no_header_twice(
    bucket: LoopbackS3, dm: Any, tmp_path: Path
) -> None:
    fill(bucket)
    # a header that takes two requests, between which the object is replaced
    changing, wide = "cifar/data/train_masks_50pct.npy", MASKS.reshape(40, 30, *[1] * 28)
    bucket.put(changing, npy(wide))
    bucket.inject(Fault(replace=npy(~wide)), when=lambda request: request.key == changing, after=1)
    output = tmp_path / "made.yaml"
    assert dm("catalog", "scan", f"s3://{BUCKET}", "-o", output, "-y")[0] == 3
    assert os.listdir(tmp_path).count("made.yaml") == 0
    read_before = {request.key for request in bucket.log if request.status == 206} - {changing}
    bucket.reset_log()
    assert dm("catalog", "scan", f"s3://{BUCKET}", "-o", output, "-y")[0] == 0
    assert not read_before & {request.key for request in bucket.log}


def test_a_catalog_is_never_written_over_what_is_there(bucket: LoopbackS3, dm: Any, tmp_path: Path) -> None:
    fill(bucket)
    output = tmp_path / "made.yaml"
    output.write_text("mine")
    code, _, err = dm("catalog", "scan", f"s3://{BUCKET}", "-o", output, "-y")
    assert (code, output.read_text(), bucket.n_requests) == (2, "mine", 0)
    assert "--force" in err
    assert dm("catalog", "scan", f"s3://{BUCKET}", "-o", output, "-y", "--force")[0] == 0
    assert dmdata.load_catalog(output).has("cifar/50pct/train_masks")
    assert dm("catalog", "scan", f"s3://{BUCKET}", "-o", tmp_path / "no" / "made.yaml", "-y")[0] == 2


def test_the_owner_of_a_bucket_says_that_its_readers_pay(
    bucket: LoopbackS3, dm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(bucket)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", OWNER_KEY_ID)
    facts = as_json(dm("catalog", "scan", f"s3://{BUCKET}", "-o", tmp_path / "a.yaml", "-y", "--json"))
    assert facts["requester_pays"] is False
    assert any("--requester-pays" in remark for remark in facts["remarks"])
    told = as_json(
        dm("catalog", "scan", f"s3://{BUCKET}", "-o", tmp_path / "b.yaml", "-y", "--json", "--requester-pays")
    )
    assert told["requester_pays"] is True
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER_KEY_ID)
    assert dmdata.open("cifar/50pct/train_masks", catalog=tmp_path / "b.yaml")[0].shape == (30,)


def test_a_folder_is_scanned_for_free_with_its_zarr_arrays(dm: Any, tmp_path: Path) -> None:
    folder = tmp_path / "lab"
    (folder / "acts" / "run 1").mkdir(parents=True)
    (folder / "acts" / "run 1" / "layer.npy").write_bytes(npy(MARGINS))
    (folder / "top.npy").write_bytes(npy(MASKS))
    group = zarr.open_group(folder / "store", mode="w")
    group.create_array("inner", data=MARGINS, chunks=(10, 20))
    output = folder / "catalog.yaml"
    facts = as_json(dm("catalog", "scan", folder, "-o", output, "--json"))
    assert sorted(facts["artifacts"]) == ["acts/run_1/layer", "lab/all/top", "store/all/inner"]
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    for name, values in {"acts/run_1/layer": MARGINS, "lab/all/top": MASKS, "store/all/inner": MARGINS}.items():
        assert np.array_equal(dmdata.open(name, catalog=moved)[:], values), "the catalog lies with its arrays"
    assert dmdata.spend().n_requests == 0
    assert dm("catalog", "check", moved / "catalog.yaml", "--against-bucket")[0] == 0


def test_names_are_proposed_in_the_same_way_whatever_the_order(dm: Any, tmp_path: Path) -> None:
    keys = ["a/x.npy", "a/x.pt", "a b/x.npy", "a_b/x.npy", "a/x y.npy", "a/x_y.npy", "-q/é.npy", "a/b/c/d.npy"]
    texts = set()
    for nth in range(3):
        folder = tmp_path / str(nth) / "lab"
        random.Random(nth).shuffle(keys)  # noqa: S311 - no secret
        for key in keys:
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            (folder / key).write_bytes(npy(MARGINS) if key.endswith("npy") else pt(WEIGHT))
        assert dm("catalog", "scan", folder, "-o", folder / "catalog.yaml")[0] == 0
        texts.add((folder / "catalog.yaml").read_text().replace(str(folder), "FOLDER"))
        assert len(list(dmdata.load_catalog(folder).artifacts())) == len(keys), "none hides another"
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("fmow/data/train_masks_20pct.npy", ("fmow", "20pct", "train_masks")),
        ("data/train_masks_12.5pct.npy", ("root", "12.5pct", "train_masks")),
        ("a/b/datamodels/train_50pct.pt", ("a.b", "50pct", "train_datamodels")),
        ("x.npy", ("root", "all", "x")),
        ("..npy", ("root", "all", "x.")),
    ],
)
def test_a_name_is_proposed_for_every_key(key: str, name: tuple[str, str, str]) -> None:
    assert propose_name(key, "root") == name


@pytest.mark.parametrize("target", ["https://example.org/data", "nowhere", "s3://"])
def test_what_cannot_be_listed_is_refused_by_name(dm: Any, target: str, tmp_path: Path) -> None:
    code, _, err = dm("catalog", "scan", target, "-o", tmp_path / "made.yaml", "-y")
    assert code in (2, 5)
    assert "s3://bucket/prefix" in err


# What of a catalog its source confirms


NAME = "toy/50pct/test_margins"
MODEL = "toy/50pct/test_datamodels"


@pytest.fixture
def catalog(s3: LoopbackS3, tmp_path: Path) -> str:
    return publish(s3, {NAME: MARGINS, MODEL: Pt(pt(WEIGHT), WEIGHT)}, tmp_path)


def against_bucket(dm: Any, catalog: str, *options: str) -> tuple[int, dict[str, Any], str]:
    code, out, err = dm("catalog", "check", catalog, "--against-bucket", "-y", "--json", *options)
    return code, json.loads(out), err


def test_a_true_catalog_is_confirmed_by_headers_that_are_paid_for_and_asked_first(
    s3: LoopbackS3, catalog: str, dm: Any
) -> None:
    assert dm("catalog", "check", catalog, "--against-bucket")[0] == 6
    priced = as_json(dm("catalog", "check", catalog, "--against-bucket", "--dry-run", "--json"))
    assert (s3.n_requests, len(priced["artifacts"])) == (0, 2)
    assert dm("catalog", "check", catalog)[0] == 0
    assert s3.n_requests == 0, "without the option nothing is asked"
    dmdata.open(NAME, catalog=catalog).read_header()
    code, facts, _ = against_bucket(dm, catalog)
    assert (code, facts["confirmed"]) == (0, 2)
    assert len([request for request in s3.log if "margins" in request.key]) == 2, "what is remembered is no answer"
    assert facts["artifacts"][0]["etag"] == s3.etag("toy/data/test_margins_50pct.npy")
    assert dmdata.spend().usd <= priced["usd"] * 2
    assert_booked_as_served(s3)


@pytest.mark.parametrize(
    ("content", "verdict", "words"),
    [
        (npy(MARGINS[:30]), "differs", "shape (30, 20), not (40, 20)"),
        (npy(MARGINS.astype(np.float32)), "differs", "dtype float32, not float16"),
        (npy(MARGINS)[:-1], "differs", "bytes"),
        (b"no array", "differs", "not a .npy"),
        (None, "missing", "no such key"),
    ],
    ids=["shape", "dtype", "truncated", "no array", "missing"],
)
def test_what_differs_is_named_and_ends_with_3(
    s3: LoopbackS3, catalog: str, dm: Any, content: bytes | None, verdict: str, words: str
) -> None:
    key = "toy/data/test_margins_50pct.npy"
    s3.put(key, content) if content is not None else s3.delete(key)
    code, facts, err = against_bucket(dm, catalog)
    answers = {answer["name"]: answer for answer in facts["artifacts"]}
    assert (code, answers[NAME]["verdict"], answers[MODEL]["verdict"]) == (3, verdict, "confirmed")
    assert words in "; ".join(answers[NAME]["what"])
    assert NAME in err


def test_a_catalog_of_a_bucket_that_refuses_all_is_not_judged(s3: LoopbackS3, catalog: str, dm: Any) -> None:
    s3.inject(Fault(status=403), times=9)
    assert dm("catalog", "check", catalog, "--against-bucket", "-y")[0] == 4


def test_the_first_whole_reading_records_a_digest_that_the_next_and_the_catalog_are_held_to(
    s3: LoopbackS3, catalog: str, dm: Any, tmp_path: Path
) -> None:
    dmdata.get(NAME, tmp_path / "first.npy", catalog=catalog)
    code, facts, _ = against_bucket(dm, catalog)
    recorded = facts["artifacts"][0]["sha256"]
    assert (code, recorded) == (0, hashlib.sha256(npy(MARGINS)).hexdigest())
    about = yaml.safe_load(Path(catalog).read_text())
    about["datasets"]["toy"]["alphas"]["50pct"]["arrays"]["test_margins"]["sha256"] = "0" * 64
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "catalog.yaml"
    other.write_text(yaml.safe_dump(about))
    code, facts, _ = against_bucket(dm, str(other))
    assert (code, facts["differs"]) == (3, 1)
    # bytes that changed on their way, under the same ETag, are not those of the first reading
    [path] = (Path(os.environ["DMDATA_HOME"]) / "digests").iterdir()
    path.write_text(path.read_text().replace(recorded, "0" * 64))
    with pytest.raises(dmdata.errors.IntegrityError, match="earlier reading"):
        dmdata.get(NAME, tmp_path / "second.npy", catalog=catalog)
    assert not (tmp_path / "second.npy").exists()
    # another object under the key has a digest of its own
    s3.put("toy/data/test_margins_50pct.npy", npy(MARGINS + 1))
    dmdata.get(NAME, tmp_path / "third.npy", catalog=catalog)


def test_what_is_confirmed_is_marked_as_measured_on_request(s3: LoopbackS3, catalog: str, dm: Any) -> None:
    about = yaml.safe_load(Path(catalog).read_text())
    arrays = about["datasets"]["toy"]["alphas"]["50pct"]["arrays"]
    for entry in arrays.values():
        entry["basis"] = dict.fromkeys(entry["basis"], "inferred")
    Path(catalog).write_text(yaml.safe_dump(about))
    s3.put("toy/data/test_margins_50pct.npy", npy(MARGINS[:30]))
    assert dm("catalog", "check", catalog, "--against-bucket", "-y", "--write")[0] == 3
    known = dmdata.load_catalog(catalog)
    assert set(known.find(NAME).stored.basis.values()) == {"inferred"}
    assert known.find(MODEL).stored.basis["n_bytes"] == "measured"
    assert known.find(MODEL).stored.etag == s3.etag("toy/datamodels/test_datamodels_50pct.pt")


def test_a_mark_in_a_local_catalog_leaves_its_relative_address(dm: Any, tmp_path: Path) -> None:
    catalog = write_locally({NAME: MARGINS}, tmp_path / "run")
    assert dm("catalog", "check", catalog, "--against-bucket", "--write")[0] == 0
    assert yaml.safe_load(Path(catalog).read_text())["source"]["url"] == "."
    (tmp_path / "run").rename(tmp_path / "moved")
    assert np.array_equal(dmdata.open(NAME, catalog=tmp_path / "moved")[:], MARGINS)
