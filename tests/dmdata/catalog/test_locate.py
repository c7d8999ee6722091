"""An address names an object and an array inside it by the end of its path alone."""

import pytest

from dmdata.catalog.locate import is_address, path_of, url_and_member


@pytest.mark.parametrize(
    ("address", "url", "member"),
    [
        ("s3://b/x.npy", "s3://b/x.npy", ""),
        ("s3://b/x.pt/model/fc.weight", "s3://b/x.pt", "model/fc.weight"),
        ("s3://b/x.PTH/w", "s3://b/x.PTH", "w"),
        ("s3://bucket.pt/x.npy", "s3://bucket.pt/x.npy", ""),
        ("s3://bucket.pt/x.npz/w.npy", "s3://bucket.pt/x.npz", "w.npy"),
        ("s3://b/x.npy?versionId=a.b", "s3://b/x.npy?versionId=a.b", ""),
        ("s3://b/x.pt/w?versionId=old", "s3://b/x.pt?versionId=old", "w"),
        ("s3://b/what?.pt/w", "s3://b/what?.pt", "w"),
        ("https://my.pt/x.npy?sig=a/b.pt/w", "https://my.pt/x.npy?sig=a/b.pt/w", ""),
        ("https://h/x.safetensors/a.b?sig=1&t=%2F", "https://h/x.safetensors?sig=1&t=%2F", "a.b"),
        ("x.pt", "x.pt", ""),
        ("sub/x.safetensors/a/b", "sub/x.safetensors", "a/b"),
        ("cifar/50pct/test_margins", "cifar/50pct/test_margins", ""),
        ("s3://b", "s3://b", ""),
    ],
)
def test_the_path_alone_says_which_object_and_which_array(address: str, url: str, member: str) -> None:
    assert url_and_member(address) == (url, member)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("https://h/x.npy?sig=1", "x.npy"),
        ("s3://b/k/x.npy?versionId=1", "k/x.npy"),
        ("s3://b/what?.npy", "what?.npy"),
        ("/a/b?.npy", "/a/b?.npy"),
    ],
)
def test_what_is_asked_of_the_server_is_not_in_the_path(url: str, path: str) -> None:
    assert path_of(url) == path


@pytest.mark.parametrize(
    "name",
    [
        "x.npy",
        "X.NPY",
        "d/x.npz/w",
        "m.pth",
        "m.safetensors",
        "r.zarr",
        "r.ZARR/a",
        "./run1",
        "~/run1",
        "/run1",
        "s3://b/k",
    ],
)
def test_suffixes_schemes_and_roots_make_an_address(name: str) -> None:
    assert is_address(name)


@pytest.mark.parametrize(
    "name", ["cifar/50pct/test_margins", "cifar/50pct/x.ptx", "cifar/50pct/npy", "run1", "a.pt2/x"]
)
def test_names_of_artifacts_are_no_addresses(name: str) -> None:
    assert not is_address(name)
