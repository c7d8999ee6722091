"""A mirror is a release of its own, and stands for what it copies on this machine while it is whole and current."""

import json
import pickle
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from servers.loopback import BUCKET, LoopbackS3
from small_release import Pt, npy, pt, publish

import dmdata
from dmdata.cli.command import main
from dmdata.copying import registry
from dmdata.errors import BudgetError, CatalogError, DmdataError, FormatError

NAME = "toy/50pct/test_margins"
MASKS = "toy/50pct/train_masks"
PT = "toy/50pct/test_datamodels"
KEY = "toy/data/test_margins_50pct.npy"
VALUES = np.arange(60, dtype=np.float16).reshape(12, 5)
WEIGHT = np.arange(600, dtype=np.float32).reshape(30, 20)
MEMBERS = {"weight": WEIGHT, "bias": WEIGHT[0]}


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_SAID", set())


@pytest.fixture
def catalog(s3: LoopbackS3, tmp_path: Path) -> str:
    release = {NAME: VALUES, MASKS: WEIGHT > 9, PT: Pt(pt(MEMBERS), MEMBERS), "toy/10pct/test_margins": WEIGHT}
    return publish(s3, release, tmp_path)


@pytest.fixture
def mirror(s3: LoopbackS3, catalog: str, tmp_path: Path) -> Path:
    dmdata.mirror("toy/50pct/*", tmp_path / "m.zarr", catalog=catalog, progress=False)
    s3.reset_log()
    return tmp_path / "m.zarr"


def expected(name: str) -> np.ndarray:
    return {NAME: VALUES, MASKS: WEIGHT > 9, f"{PT}/weight": WEIGHT, f"{PT}/bias": WEIGHT[0]}[name]


# A catalog inside


@pytest.mark.parametrize("name", [NAME, MASKS, f"{PT}/weight", f"{PT}/bias"])
def test_a_mirror_is_a_catalog_of_what_it_holds(s3: LoopbackS3, mirror: Path, name: str) -> None:
    array = dmdata.open(name, catalog=mirror)
    np.testing.assert_array_equal(array[...], expected(name))
    assert array.dims == dmdata.load_catalog(mirror).find(name).schema.dims  # type: ignore[union-attr] # an array
    assert s3.n_requests == 0


def test_a_mirrors_catalog_lists_only_what_is_complete_in_it(s3: LoopbackS3, catalog: str, mirror: Path) -> None:
    known = dmdata.load_catalog(mirror)
    assert [artifact.name for artifact in known.artifacts()] == [NAME, MASKS, PT]
    assert known.find(NAME).rows == dmdata.load_catalog(catalog).find(NAME).rows
    dmdata.mirror(["toy/10pct/*"], mirror, catalog=catalog, progress=False)
    assert dmdata.load_catalog(mirror).has("toy/10pct/test_margins")
    assert dmdata.load_catalog(mirror).has(NAME)


def test_the_catalog_is_in_no_reader_of_zarrs_way(mirror: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sum(isinstance(node, zarr.Array) for _, node in zarr.open_group(mirror).members(max_depth=None)) == 4


def test_a_mirror_of_one_array_is_a_catalog_too(s3: LoopbackS3, catalog: str, tmp_path: Path) -> None:
    for name in (NAME, f"{PT}/weight"):
        path = tmp_path / f"{len(name)}.zarr"
        dmdata.mirror(name, path, catalog=catalog, progress=False)
        np.testing.assert_array_equal(dmdata.open(name, catalog=path)[...], expected(name))


def test_roles_of_rows_are_told_of_what_was_copied(s3: LoopbackS3, catalog: str, tmp_path: Path) -> None:
    dmdata.mirror(NAME, tmp_path / "part.zarr", rows=slice(1, 4), catalog=catalog, progress=False)
    part = dmdata.open(NAME, catalog=tmp_path / "part.zarr")
    np.testing.assert_array_equal(part[...], VALUES[1:4])
    assert part.rows is not None
    assert part.rows.evaluation == slice(0, 1)


def test_every_command_reads_the_catalog_of_a_mirror(mirror: Path) -> None:
    for arguments in (
        ["ls"],
        ["info", NAME],
        ["estimate", f"{PT}/weight"],
        ["catalog", "check", str(mirror), "--against-bucket"],
    ):
        where = [] if arguments[0] == "catalog" else ["--catalog", str(mirror)]
        command = [sys.executable, "-m", "dmdata", *arguments, *where]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_store_of_several_arrays_names_a_call_that_works(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mirror.parent)
    with pytest.raises(
        CatalogError, match=r"m\.zarr holds 4 arrays; open one of them by dmdata\.open\('(.*?)'\)"
    ) as caught:
        dmdata.open("m.zarr")
    assert caught.value.nearest is not None
    assert len(caught.value.nearest) == 4
    for call in caught.value.nearest:
        np.testing.assert_array_equal(dmdata.open(call)[...], expected(call.removeprefix("m.zarr/")))
    zarr.open_group("empty.zarr", mode="w")
    with pytest.raises(CatalogError, match="without arrays"):
        dmdata.open("empty.zarr")


# In place of the object


@pytest.mark.parametrize("name", [NAME, f"{PT}/weight"])
def test_the_ordinary_name_opens_the_mirror_says_so_and_costs_nothing(
    s3: LoopbackS3, catalog: str, mirror: Path, name: str
) -> None:
    spent = dmdata.spend()
    with dmdata.budget(usd=0):
        array = dmdata.open(name, catalog=catalog)
        assert f"from the local mirror {mirror / name}" in repr(array)
        np.testing.assert_array_equal(array[2:4], expected(name)[2:4])
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(array))[...], expected(name))
        assert array.estimate(2).usd == 0
        assert dmdata.estimate("toy/50pct/*", catalog=catalog).usd == 0
        assert dmdata.estimate(name, select="0:2", catalog=catalog).n_requests == 0
    assert dmdata.estimate("toy/**", catalog=catalog).n_bytes == dmdata.estimate("toy/10pct/*", catalog=catalog).n_bytes
    assert array.name == name
    assert array.dims == dmdata.open(name, catalog=catalog, local=False).dims
    assert s3.n_requests == 0
    assert dmdata.spend() == spent


def test_one_that_went_since_it_was_opened_says_how_to_read_the_object(catalog: str, mirror: Path) -> None:
    array = dmdata.open(NAME, catalog=catalog)
    shutil.rmtree(mirror)
    with pytest.raises(FormatError, match="local=False"):
        pickle.loads(pickle.dumps(array))[0]


def test_views_follow(s3: LoopbackS3, catalog: str, mirror: Path) -> None:
    dask, xarray = pytest.importorskip("dask"), pytest.importorskip("xarray")
    from dmdata.plugins.xarray_engine import DmdataBackendEntrypoint

    with dmdata.budget(usd=0):
        array = dmdata.open(NAME, catalog=catalog)
        np.testing.assert_array_equal(array.to_zarr()[...], VALUES)
        with dask.config.set(scheduler="processes"):
            np.testing.assert_array_equal(array.to_dask(chunks=3).compute(), VALUES)
        others = ["train_masks", "test_datamodels_weight", "test_datamodels_bias"]
        dataset = xarray.open_dataset(
            "toy/50pct", engine=DmdataBackendEntrypoint, catalog=catalog, drop_variables=others
        )
        np.testing.assert_array_equal(dataset["test_margins"].values, VALUES)
    assert s3.n_requests == 0


@pytest.mark.parametrize(
    "values",
    [
        VALUES,
        VALUES.astype(">i4"),
        np.asfortranarray(VALUES),
        VALUES[0],
        np.float32(7),
        np.zeros((3, 0)),
        VALUES[None] > 3,
    ],
    ids=["plain", "big-endian", "fortran", "one-dimensional", "scalar", "empty", "three-dimensional"],
)
def test_files_follow_to_the_byte(s3: LoopbackS3, tmp_path: Path, values: np.ndarray) -> None:
    fsspec = pytest.importorskip("fsspec")
    catalog = publish(s3, {NAME: np.asanyarray(values)}, tmp_path)
    dmdata.mirror(NAME, tmp_path / "m.zarr", catalog=catalog, progress=False)
    s3.reset_log()
    files = fsspec.filesystem("dmdata", catalog=catalog)
    content = npy(values)
    assert files.cat_file(NAME) == content
    assert files.cat_ranges([NAME] * 3, [0, 100, 140], [3, 131, None]) == [content[:3], content[100:131], content[140:]]
    with files.open(NAME) as file:
        np.testing.assert_array_equal(np.load(file), values)
    is_fortran = not np.asanyarray(values).flags.c_contiguous
    assert bool(s3.n_requests) == is_fortran, "of what lies in another order than C the object itself is read"
    assert fsspec.filesystem("dmdata", catalog=catalog, local=False).cat_file(NAME) == content
    assert s3.n_requests


def test_it_can_be_turned_off(s3: LoopbackS3, catalog: str, mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "local mirror" not in repr(dmdata.open(NAME, catalog=catalog, local=False))
    assert dmdata.estimate(NAME, catalog=catalog, local=False).usd > 0
    monkeypatch.setenv("DMDATA_LOCAL_MIRRORS", "false")
    assert "local mirror" not in repr(dmdata.open(NAME, catalog=catalog))
    assert dmdata.estimate(NAME, catalog=catalog).usd > 0
    assert "local mirror" in repr(dmdata.open(NAME, catalog=catalog, local=True))
    with dmdata.budget(usd=0), pytest.raises(BudgetError):
        dmdata.open(NAME, catalog=catalog, cache=False)[...]


def test_what_an_array_mirrors_itself_is_found_too(s3: LoopbackS3, catalog: str, tmp_path: Path) -> None:
    dmdata.open(NAME, catalog=catalog).mirror(tmp_path / "own.zarr", progress=False)
    assert str(tmp_path / "own.zarr") in repr(dmdata.open(NAME, catalog=catalog))


def test_another_servers_bucket_has_no_mirror_here(
    s3: LoopbackS3, catalog: str, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LoopbackS3() as other:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", other.endpoint_url)
        assert "local mirror" not in repr(dmdata.open(NAME, catalog=catalog))


def test_comparing_a_mirror_reads_the_object_itself(s3: LoopbackS3, catalog: str, mirror: Path) -> None:
    assert all(found.is_same for found in dmdata.verify(mirror, whole=True, catalog=catalog, progress=False))
    assert s3.n_requests > 0


# What may not stand for it


def refused(catalog: str, because: str) -> None:
    """See that a mirror is not used, and that this is said once a process."""
    with pytest.warns(dmdata.LocalMirrorWarning, match=because) as caught:
        array = dmdata.open(NAME, catalog=catalog)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert f"s3://{BUCKET}/{KEY}" in repr(array)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dmdata.open(NAME, catalog=catalog).url == array.url


def test_one_that_was_moved_is_said_to_be_gone_and_may_be_registered_where_it_is(
    s3: LoopbackS3, catalog: str, mirror: Path, tmp_path: Path
) -> None:
    mirror.rename(tmp_path / "elsewhere.zarr")
    refused(catalog, "is gone; register it where it is now: dmdata mirror --register PATH")
    assert dmdata.register_mirror(tmp_path / "elsewhere.zarr", catalog=catalog) == sorted(
        [NAME, MASKS, f"{PT}/bias", f"{PT}/weight"]
    )
    with dmdata.budget(usd=0):
        np.testing.assert_array_equal(dmdata.open(NAME, catalog=catalog)[...], VALUES)
    assert dmdata.forget_mirror(tmp_path / "elsewhere.zarr")
    assert NAME in dmdata.forget_mirror(mirror)
    assert "local mirror" not in repr(dmdata.open(NAME, catalog=catalog))


@pytest.mark.parametrize(
    "part", [{"rows": slice(0, 5)}, {"rows": [4, 2, 3]}, {"columns": [0, 2]}, {"rows": slice(None, None, -1)}]
)
def test_one_of_some_rows_or_columns_is_not_used(
    s3: LoopbackS3, catalog: str, tmp_path: Path, part: dict[str, object]
) -> None:
    dmdata.mirror(NAME, tmp_path / "m.zarr", catalog=catalog, progress=False, **part)  # type: ignore[arg-type]
    refused(catalog, "has only some rows or columns")
    with pytest.raises(DmdataError, match="only some rows or columns"):
        dmdata.register_mirror(tmp_path / "m.zarr", catalog=catalog)


def test_one_that_is_not_complete_is_not_used_and_not_registered(s3: LoopbackS3, catalog: str, mirror: Path) -> None:
    (chunk,) = (mirror / NAME / "c").glob("*/*")
    chunk.write_bytes(b"damaged")
    dmdata.verify(mirror, repair=True, catalog=catalog, progress=False)
    refused(catalog, "is not complete; run the same dmdata mirror again")
    with pytest.raises(DmdataError, match="not complete"):
        dmdata.register_mirror(mirror, catalog=catalog)
    dmdata.mirror("toy/50pct/*", mirror, catalog=catalog, progress=False)
    assert "local mirror" in repr(dmdata.open(NAME, catalog=catalog))


def test_one_of_an_earlier_version_is_not_used_once_another_etag_was_seen(
    s3: LoopbackS3, catalog: str, mirror: Path
) -> None:
    s3.put(KEY, npy(VALUES + 1))
    with pytest.raises(dmdata.IntegrityError):
        dmdata.open(NAME, catalog=catalog, local=False, cache=False)[...]
    np.testing.assert_array_equal(dmdata.open(NAME, catalog=catalog, local=False)[...], VALUES + 1)
    refused(catalog, "is of an earlier version")
    np.testing.assert_array_equal(dmdata.open(NAME, catalog=catalog)[...], VALUES + 1)


def test_one_of_another_version_than_the_catalogs_is_not_used(s3: LoopbackS3, mirror: Path, tmp_path: Path) -> None:
    shutil.rmtree(Path(registry.home()) / "headers")
    s3.put(KEY, npy(VALUES + 1))
    newer = publish(s3, {NAME: VALUES + 1}, tmp_path / "newer", etag=s3.etag(KEY))
    refused(newer, "is of an earlier version")


def test_one_whose_object_a_read_found_to_have_changed_is_not_used(s3: LoopbackS3, catalog: str, mirror: Path) -> None:
    s3.put(KEY, npy(VALUES + 1))
    with pytest.raises(dmdata.IntegrityError):
        dmdata.open(NAME, catalog=catalog, local=False, cache=False)[...]
    refused(catalog, "which has changed since")
    with pytest.raises(DmdataError, match="which has changed since"):
        dmdata.register_mirror(mirror, catalog=catalog)
    s3.put(KEY, npy(VALUES))
    np.testing.assert_array_equal(dmdata.open(NAME, catalog=catalog, local=False)[...], VALUES)
    assert "local mirror" in repr(dmdata.open(NAME, catalog=catalog)), "the object is again what was mirrored"


def test_a_catalog_that_is_newer_than_the_remembered_header_is_heeded(
    s3: LoopbackS3, mirror: Path, tmp_path: Path
) -> None:
    s3.put(KEY, npy(VALUES + 1))
    newer = publish(s3, {NAME: VALUES + 1}, tmp_path / "newer", etag=s3.etag(KEY))
    refused(newer, "the catalog has ETag")
    with pytest.raises(DmdataError, match="the catalog has ETag"):
        dmdata.register_mirror(mirror / NAME, catalog=newer)


def test_one_that_cannot_be_looked_at_is_said_to_be_so_and_the_object_read(
    s3: LoopbackS3, catalog: str, mirror: Path
) -> None:
    # a name that is too long raises for every user what a closed folder raises for all but root
    for file in (registry.home() / registry.FOLDER).iterdir():
        file.write_text(file.read_text().replace(str(mirror), str(mirror.parent / ("m" * 300))))
    refused(catalog, "cannot be read: ")


def test_mirrors_of_one_array_that_are_registered_at_once_are_all_found(
    s3: LoopbackS3, catalog: str, mirror: Path, tmp_path: Path
) -> None:
    copies = [tmp_path / f"{nth}.zarr" for nth in range(8)]
    for copy in copies:
        shutil.copytree(mirror / NAME, copy)
    with ThreadPoolExecutor(len(copies)) as pool:
        list(pool.map(lambda copy: dmdata.register_mirror(copy, catalog=catalog), copies))
    for copy in copies:
        assert dmdata.forget_mirror(copy) == [NAME]


def test_one_registered_by_a_link_is_forgotten_by_its_real_path(
    s3: LoopbackS3, catalog: str, mirror: Path, tmp_path: Path
) -> None:
    dmdata.forget_mirror(mirror)
    (tmp_path / "link").symlink_to(mirror)
    dmdata.register_mirror(tmp_path / "link", catalog=catalog)
    assert NAME in dmdata.forget_mirror(mirror)
    assert "local mirror" not in repr(dmdata.open(NAME, catalog=catalog))


def test_forgetting_what_is_not_registered_names_what_is(catalog: str, mirror: Path) -> None:
    with pytest.raises(DmdataError, match=rf"no mirror at or below .*/n\.zarr .*{mirror}/{NAME}"):
        dmdata.forget_mirror(mirror.with_name("n.zarr"))


def test_one_of_another_server_is_not_registered_until_its_etag_is_seen_here(
    s3: LoopbackS3, catalog: str, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LoopbackS3() as other:
        other.put(KEY, npy(VALUES))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", other.endpoint_url)
        with pytest.raises(DmdataError, match=r"another server's .*read_header\(\)"):
            dmdata.register_mirror(mirror / NAME, catalog=catalog)
        dmdata.open(NAME, catalog=catalog, local=False).read_header()
        assert dmdata.register_mirror(mirror / NAME, catalog=catalog) == [NAME]


def test_one_made_anew_of_another_object_is_not_used(s3: LoopbackS3, catalog: str, mirror: Path) -> None:
    shutil.rmtree(mirror)
    dmdata.mirror("toy/10pct/test_margins", mirror / NAME, catalog=catalog, progress=False)
    refused(catalog, "was replaced by a new mirror")


def test_one_whose_chunk_is_gone_never_reads_as_zeros(s3: LoopbackS3, catalog: str, mirror: Path) -> None:
    shutil.rmtree(mirror / NAME / "c")
    with pytest.raises(FormatError, match=r"chunk c/0/0 is gone.*make it again"):
        dmdata.open(NAME, catalog=catalog)[3]
    with pytest.raises(FormatError, match="is gone"):
        dmdata.open(mirror / NAME)[3]


def test_nothing_is_registered_that_is_not_listed_or_no_mirror(
    s3: LoopbackS3, catalog: str, mirror: Path, tmp_path: Path
) -> None:
    with pytest.raises(DmdataError, match="no mirror is at"):
        dmdata.register_mirror(tmp_path / "none.zarr", catalog=catalog)
    with pytest.raises(CatalogError, match="nearest"):
        dmdata.register_mirror(mirror, catalog=publish(s3, {MASKS: VALUES}, tmp_path / "less"))
    with pytest.raises(DmdataError, match="bucket"):
        dmdata.register_mirror("s3://mine/m.zarr", catalog=catalog)


def test_the_command_registers_forgets_and_copies_nothing(
    s3: LoopbackS3, catalog: str, mirror: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["mirror", *arguments, "--catalog", catalog])
        return ended.value.code, *capsys.readouterr()  # type: ignore[return-value] # an exit code

    assert run("--forget", str(mirror))[0] == 0
    assert "local mirror" not in repr(dmdata.open(NAME, catalog=catalog))
    code, out, _ = run("--register", str(mirror), "--json")
    assert (code, len(json.loads(out)["artifacts"])) == (0, 4)
    assert "local mirror" in repr(dmdata.open(NAME, catalog=catalog))
    assert s3.n_requests == 0
    for wrong in ([], ["toy/50pct/*"], ["--register", "a", "--forget", "b"], ["--register", "a", "x", "y"]):
        code, _, told = run(*wrong)
        assert (code, "--help" in told) == (2, True)


def test_a_mirror_is_read_offline(catalog: str, mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMDATA_OFFLINE", "1")
    np.testing.assert_array_equal(dmdata.open(NAME, catalog=catalog)[...], VALUES)


def test_an_interrupted_mirror_is_known_to_be_incomplete(s3: LoopbackS3, catalog: str, tmp_path: Path) -> None:
    def stop(progress: object) -> None:
        raise KeyboardInterrupt

    array = dmdata.open("toy/10pct/test_margins", catalog=catalog)
    with pytest.raises(KeyboardInterrupt):
        array.mirror(tmp_path / "m.zarr", memory_bytes=640, progress=stop)
    with pytest.warns(dmdata.LocalMirrorWarning, match="is not complete"):
        assert "local mirror" not in repr(dmdata.open("toy/10pct/test_margins", catalog=catalog))
    shutil.rmtree(tmp_path / "m.zarr")
    assert "local mirror" not in repr(dmdata.open("toy/10pct/test_margins", catalog=catalog)), "and nothing is said"


def test_a_damaged_entry_points_nowhere(s3: LoopbackS3, catalog: str, mirror: Path) -> None:
    for file in (registry.home() / registry.FOLDER).iterdir():
        file.write_text('{"places": {"/etc": 3}}')
    assert "local mirror" not in repr(dmdata.open(NAME, catalog=catalog))
    with pytest.raises(DmdataError, match="no mirror at or below"):
        dmdata.forget_mirror(mirror)
