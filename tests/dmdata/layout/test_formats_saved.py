"""What people really saved, by the programs that save it: checkpoints, dates, records, ``.npz``, ``.safetensors``.

Every file is opened by its address and compared with what the program that wrote it reads back.
"""

import collections
import io
import json
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers.loopback import LoopbackS3

import dmdata
from dmdata.errors import CatalogError, DmdataError, FormatError
from dmdata.layout.formats import TrailingBytesWarning, pt_layouts
from dmdata.money.ledger import home
from dmdata.release.opening import open_object

torch = pytest.importorskip("torch")

FLOATS_OF_8_BITS = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]


def saved(contents: Any, path: Path, **options: Any) -> Path:
    torch.save(contents, path, **options)
    return path


def model() -> Any:
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(2, 5))


# .pt


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_state_dict_of_a_model_is_read_tensor_by_tensor(tmp_path: Path, protocol: int) -> None:
    state = model().state_dict()
    path = saved(state, tmp_path / "model.pth", pickle_protocol=protocol)
    for name, tensor in state.items():
        lazy = dmdata.open(f"{path}/{name}")
        np.testing.assert_array_equal(lazy[...], tensor.numpy())
        assert lazy.dtype == tensor.numpy().dtype


def test_the_tensors_of_a_checkpoint_are_read_by_path(tmp_path: Path) -> None:
    net = model()
    optimizer = torch.optim.Adam(net.parameters())
    net[2](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    contents = {
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5]).state_dict(),
        "epoch": 3,
        "loss": 0.25,
        "best": np.float64(0.5),
        "history": np.arange(3),
        "tags": {"a", "b"},
        "when": None,
        "text": "a note",
        "bytes": b"raw",
        "huge": 10**30,
        "pair": (torch.arange(3), [torch.arange(4), 1.5]),
        "defaults": collections.defaultdict(list, {1: torch.ones(2)}),
        "dtype": torch.float32,
        "size": torch.Size([1, 2]),
        "device": torch.device("cuda", 0),
        (1, 2): torch.zeros(1),
    }
    path = saved(contents, tmp_path / "checkpoint.pt")
    moments = optimizer.state_dict()["state"]
    first = next(key for key in moments)
    for name, tensor in {
        "model/0.weight": net.state_dict()["0.weight"],
        f"optimizer/state/{first}/exp_avg": moments[first]["exp_avg"],
        "pair/0": contents["pair"][0],
        "pair/1/0": contents["pair"][1][0],
        "defaults/1": torch.ones(2),
    }.items():
        np.testing.assert_array_equal(dmdata.open(f"{path}/{name}")[...], tensor.numpy())


def test_a_lone_tensor_is_opened_by_the_address_of_its_file(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(dmdata.open(saved(tensor, tmp_path / "x.pt"))[1:, 2], tensor[1:, 2])
    np.testing.assert_array_equal(dmdata.open(saved([tensor], tmp_path / "y.PTH") / "0")[...], tensor)


@pytest.mark.parametrize(
    "name",
    [
        "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32",
        "float64", "complex64", "complex128",
    ],
)  # fmt: skip
def test_tensors_of_every_dtype_that_numpy_has_are_read(tmp_path: Path, name: str) -> None:
    tensor = torch.arange(6).to(getattr(torch, name)).reshape(2, 3)
    path = saved({"x": tensor, "transposed": tensor.T, "later": tensor[1:]}, tmp_path / "x.pt")
    for key, theirs in torch.load(path, weights_only=True).items():
        lazy = dmdata.open(f"{path}/{key}")
        assert lazy.dtype == theirs.numpy().dtype
        np.testing.assert_array_equal(lazy[...], theirs.numpy())


def every_bfloat16() -> Any:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).reshape(256, 256)


def test_every_bfloat16_is_read_as_the_same_float32(tmp_path: Path) -> None:
    tensor = every_bfloat16()
    path = saved({"x": tensor, "transposed": tensor.T, "scalar": tensor[0, 1]}, tmp_path / "x.pt")
    lazy = dmdata.open(f"{path}/x")
    assert lazy.dtype == np.float32
    assert "bfloat16" in repr(lazy)
    ours, theirs = lazy[...], tensor.to(torch.float32).numpy()
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))
    np.testing.assert_array_equal(dmdata.open(f"{path}/transposed")[3:7, [2, 1]], theirs.T[3:7, [2, 1]])
    assert dmdata.open(f"{path}/scalar")[()].dtype == np.float32
    np.testing.assert_array_equal(lazy.oindex[[5, 2], ::9], theirs[np.ix_([5, 2], range(0, 256, 9))])


@pytest.mark.parametrize("name", FLOATS_OF_8_BITS)
def test_every_float_of_8_bits_is_read_as_the_same_float32(tmp_path: Path, name: str) -> None:
    tensor = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(getattr(torch, name))
    lazy = dmdata.open(saved(tensor, tmp_path / "x.pt"))
    assert lazy.dtype == np.float32
    theirs = tensor.to(torch.float32).numpy()
    np.testing.assert_array_equal(lazy[...], theirs)
    scalar = dmdata.open(saved(tensor[3], tmp_path / "scalar.pt"))
    assert (scalar.shape, scalar[()], scalar[...].shape) == ((), theirs[3], ())
    numbers = ~np.isnan(theirs)
    np.testing.assert_array_equal(np.signbit(lazy[...])[numbers], np.signbit(theirs)[numbers])


@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")
def test_complex_numbers_of_two_halves_are_read_as_complex64(tmp_path: Path) -> None:
    tensor = torch.tensor([1 + 2j, -0.5j, 3e4]).to(torch.complex32)
    lazy = dmdata.open(saved(tensor, tmp_path / "x.pt"))
    assert lazy.dtype == np.complex64
    np.testing.assert_array_equal(lazy[...], tensor.to(torch.complex64).numpy())


def test_what_is_priced_and_fetched_of_bfloat16_is_two_bytes_an_element(s3: LoopbackS3, tmp_path: Path) -> None:
    tensor = torch.randn(1000, 500).to(torch.bfloat16)
    s3.put("x.pt", saved({"w": tensor}, tmp_path / "x.pt").read_bytes())
    lazy = dmdata.open("s3://madrylab-datamodels/x.pt/w")
    assert (lazy.layout.n_bytes, lazy.nbytes, lazy.size) == (1_000_000, 2_000_000, 500_000)
    assert lazy.estimate(np.s_[:100]).n_bytes == 100_000
    before = s3.n_object_bytes
    np.testing.assert_array_equal(lazy[:100], tensor[:100].to(torch.float32).numpy())
    assert s3.n_object_bytes - before == 100_000
    again = dmdata.open("s3://madrylab-datamodels/x.pt/w")
    assert again.layout == lazy.layout, "as it is remembered"


def test_bfloat16_is_mirrored_and_computed_with_as_float32(tmp_path: Path) -> None:
    tensor = torch.randn(60, 50).to(torch.bfloat16)
    lazy = dmdata.open(saved({"w": tensor}, tmp_path / "x.pt") / "w")
    expected = tensor.to(torch.float32).numpy()
    np.testing.assert_array_equal(lazy.mirror(tmp_path / "m.zarr")[...], expected)
    np.testing.assert_array_equal(lazy.to_dask(chunks=(7, 50)).compute(), expected)
    with pytest.raises(FormatError, match="bfloat16, for which Zarr v3 has no data type"):
        lazy.to_zarr()


def test_parameters_buffers_and_tensors_with_attributes_are_tensors(tmp_path: Path) -> None:
    values = torch.arange(6.0).reshape(2, 3)
    with_attribute = torch.nn.Parameter(values)
    with_attribute.tag = "a"
    contents = {"p": torch.nn.Parameter(values), "b": torch.nn.Buffer(values), "a": with_attribute, "v": values[1:]}
    path = saved(contents, tmp_path / "x.pt")
    for name, tensor in contents.items():
        np.testing.assert_array_equal(dmdata.open(f"{path}/{name}")[...], tensor.detach().numpy())


def test_a_tensor_that_cannot_be_read_says_why_and_its_neighbours_are_read(tmp_path: Path) -> None:
    dense = torch.eye(3)
    complex_ = torch.tensor([1j, 2])
    contents = {
        "fine": dense,
        "sparse": dense.to_sparse(),
        "strided": torch.arange(10.0)[::2],
        "expanded": torch.zeros(3, 1).expand(3, 4),
        "columns": torch.zeros(4, 6)[:, :3],
        "meta": torch.zeros(2, device="meta"),
        "conjugate": complex_.conj(),
        "inner": {"csr": None},
    }
    path = saved(contents, tmp_path / "x.pt")
    np.testing.assert_array_equal(dmdata.open(f"{path}/fine")[...], dense)
    for name, words in {
        "sparse": "is sparse",
        "strided": "contiguous",
        "expanded": "contiguous",
        "columns": "contiguous",
        "meta": "meta device",
        "conjugate": "conjugate",
    }.items():
        with pytest.raises(FormatError, match=words) as caught:
            dmdata.open(f"{path}/{name}")
        assert "run code" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_quantized_tensor_is_refused_by_name(tmp_path: Path) -> None:
    tensor = torch.quantize_per_tensor(torch.ones(3), 0.5, 0, torch.qint8)
    with pytest.raises(FormatError, match="quantized"):
        dmdata.open(saved(tensor, tmp_path / "x.pt"))


def test_a_whole_model_is_refused_with_what_to_save_instead(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"torch\.nn.*could run code.*nothing was run.*state_dict"):
        dmdata.open(saved(model(), tmp_path / "x.pt"))


def test_keys_that_make_the_same_path_are_refused_not_confused(tmp_path: Path) -> None:
    path = saved({"a": {"b": torch.zeros(1)}, "a/b": torch.ones(1), "c": torch.ones(2)}, tmp_path / "x.pt")
    with pytest.raises(FormatError, match="one of two that have this path"):
        dmdata.open(f"{path}/a/b")
    assert dmdata.open(f"{path}/c").shape == (2,)


def test_a_name_that_is_not_there_is_answered_with_the_nearest(tmp_path: Path) -> None:
    path = saved({f"layer{nth}.weight": torch.zeros(1) for nth in range(100)}, tmp_path / "x.pt")
    with pytest.raises(FormatError, match=r"layer42\.weight.*and 92 others"):
        dmdata.open(f"{path}/layer42.wieght")
    with pytest.raises(CatalogError, match=r"several arrays.*as .*x\.pt/layer0\.weight") as caught:
        dmdata.open(path)
    assert len(str(caught.value)) < 600


def test_a_tensor_saved_from_a_gpu_is_read(tmp_path: Path) -> None:
    """The location is only a word in the pickle, so that no GPU is needed to write it."""
    path = saved({"x": torch.arange(3.0)}, tmp_path / "x.pt")
    moved = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(moved, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith("data.pkl"):
                assert b"X\x03\x00\x00\x00cpu" in content
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            new.writestr(info.filename, content)
    path.write_bytes(moved.getvalue())
    np.testing.assert_array_equal(dmdata.open(f"{path}/x")[...], np.arange(3.0))


def resnet50() -> Any:
    """Make a state_dict with the names and number of tensors of a ResNet-50, 51 MB large."""
    state = collections.OrderedDict()
    for layer, n_blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(n_blocks):
            for nth in (1, 2, 3):
                width = 32 << layer
                state[f"layer{layer}.{block}.conv{nth}.weight"] = torch.zeros(width, 480 + nth)
                for name in ("weight", "bias", "running_mean", "running_var"):
                    state[f"layer{layer}.{block}.bn{nth}.{name}"] = torch.zeros(width)
                state[f"layer{layer}.{block}.bn{nth}.num_batches_tracked"] = torch.tensor(0)
    state["fc.weight"] = torch.zeros(5000, 2048)
    return state


def test_the_header_of_a_state_dict_of_hundreds_of_tensors_takes_four_requests(s3: LoopbackS3, tmp_path: Path) -> None:
    state = resnet50()
    state["fc.weight"][7] = 1
    blob = saved(state, tmp_path / "resnet.pt").read_bytes()
    assert len(blob) > 40e6
    s3.put("resnet.pt", blob)
    lazy = dmdata.open("s3://madrylab-datamodels/resnet.pt/fc.weight")
    assert s3.n_requests <= 4, [request.range for request in s3.log]
    assert s3.n_object_bytes <= 64 << 10
    np.testing.assert_array_equal(lazy[6:8, 5], [0, 1])
    assert len(pt_layouts(lambda start, stop: blob[start:stop], object_bytes=len(blob), url="x")) == len(state)


def test_a_large_pickle_is_read_in_one_further_request(tmp_path: Path) -> None:
    state = {f"a_rather_long_name_of_a_tensor.{nth}": torch.zeros(2) for nth in range(5000)}
    blob = saved(state, tmp_path / "x.pt").read_bytes()
    reads: list[int] = []

    def read_at(start: int, stop: int) -> bytes:
        reads.append(stop - start)
        return blob[start:stop]

    assert len(pt_layouts(read_at, object_bytes=len(blob), url="x")) == 5000
    assert len(reads) <= 3, reads


# .npy


RECORD = np.dtype([("name", "<U4"), ("when", "<M8[s]"), ("at", [("x", "<f4"), ("y", "<f8")]), ("rgb", "u1", (3,))])
VALUES: dict[str, Any] = {
    "days": np.array(["2020-01-01", "NaT", "1969-07-20"], "M8[D]"),
    "nanoseconds": np.array(["2020-01-01T00:00:00.123456789"], "M8[ns]"),
    "25 seconds": np.array([3, 4], "m8[25s]"),
    "microseconds": np.array([3, -4], ">m8[us]"),
    "text": np.array([["abc", "de"], ["f", "\u00e9\u4e2d"]]),
    "big-endian text": np.array(["abc", "de"], ">U3"),
    "bytes": np.array([b"hello", b"x"]),
    "void": np.array([b"abcdefgh12345678"] * 3, "V16"),
    "record": np.array([("ab", "2020-01-01", (1, 2), (1, 2, 3)), ("cd", "NaT", (3, 4), (4, 5, 6))], RECORD),
    "aligned record": np.ones(3, np.dtype([("a", "u1"), ("b", "<f8"), ("c", "<i2")], align=True)),
    "titled record": np.ones(2, np.dtype([(("a title", "a"), "<i4"), ("b", "<f4")])),
    "long double": np.ones(2, np.longdouble),
}


@pytest.mark.parametrize("kind", VALUES)
def test_dates_text_raw_bytes_and_records_are_read(tmp_path: Path, kind: str, s3: LoopbackS3) -> None:
    values = VALUES[kind]
    np.save(tmp_path / "x.npy", values)
    s3.put("x.npy", (tmp_path / "x.npy").read_bytes())
    for where in (tmp_path / "x.npy", "s3://madrylab-datamodels/x.npy", "s3://madrylab-datamodels/x.npy"):
        lazy = dmdata.open(where)
        theirs = np.load(tmp_path / "x.npy")
        assert lazy.dtype == theirs.dtype
        assert lazy[...].tobytes() == theirs.tobytes()
        assert lazy[1:].tobytes() == theirs[1:].tobytes()
        assert lazy[0].tobytes() == theirs[0].tobytes()
    assert len(list((home() / "headers").iterdir())) == 1
    assert dmdata.open(tmp_path / "x.npy").to_dask().compute().tobytes() == values.tobytes()


@pytest.mark.parametrize("kind", ["days", "text", "bytes", "void", "record"])
def test_what_zarr_cannot_store_is_refused_before_anything_is_paid(tmp_path: Path, kind: str, s3: LoopbackS3) -> None:
    np.save(tmp_path / "x.npy", VALUES[kind])
    s3.put("x.npy", (tmp_path / "x.npy").read_bytes())
    lazy = dmdata.open("s3://madrylab-datamodels/x.npy")
    before = s3.n_requests
    for attempt in (lambda: lazy.mirror(tmp_path / "m.zarr"), lazy.to_zarr):
        with pytest.raises(FormatError, match="Zarr v3 has no data type"):
            attempt()
    assert s3.n_requests == before
    assert not (tmp_path / "m.zarr").exists()


def test_objects_alone_could_run_code(tmp_path: Path) -> None:
    for values in (np.array([{}, None]), np.array([(1, None)], [("a", "i4"), ("b", "O")])):
        np.save(tmp_path / "x.npy", values)
        with pytest.raises(FormatError, match=r"could run code.*np\.load"):
            dmdata.open(tmp_path / "x.npy")


@pytest.mark.parametrize("shape", ["(6L,)", "(2L, 3L)", "(6L, )", "(2L,3)"])
def test_a_header_written_by_python_2_is_read_as_numpy_reads_it(tmp_path: Path, shape: str) -> None:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    data = np.arange(6, dtype="<f4").tobytes()
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = np.load(tmp_path / "x.npy")
    np.testing.assert_array_equal(dmdata.open(tmp_path / "x.npy")[...], theirs)


def two_in_one(path: Path) -> Path:
    with path.open("wb") as file:
        np.save(file, np.arange(6.0))
        np.save(file, np.ones(3))
    return path


def test_of_two_arrays_in_one_file_the_first_is_read_with_a_warning(tmp_path: Path, s3: LoopbackS3) -> None:
    path = two_in_one(tmp_path / "x.npy")
    s3.put("x.npy", path.read_bytes())
    for where in (path, "s3://madrylab-datamodels/x.npy", "s3://madrylab-datamodels/x.npy"):
        with pytest.warns(TrailingBytesWarning, match=r"has 328 bytes.*ends at byte 176"):
            lazy = dmdata.open(where)
        np.testing.assert_array_equal(lazy[...], np.load(path))
    path.write_bytes(path.read_bytes()[:170])
    with pytest.raises(FormatError, match="truncated"):
        dmdata.open(path)


# .npz


ARRAYS = {"weight": np.arange(12.0).reshape(3, 4), "dir/b.c": np.arange(5, dtype=">i2"), "days": VALUES["days"]}


def test_the_arrays_of_a_npz_are_read_in_place(tmp_path: Path, s3: LoopbackS3) -> None:
    np.savez(tmp_path / "x.npz", **ARRAYS)
    s3.put("x.npz", (tmp_path / "x.npz").read_bytes())
    for name, values in ARRAYS.items():
        for where in (tmp_path / "x.npz", "s3://madrylab-datamodels/x.npz", "s3://madrylab-datamodels/x.npz"):
            for asked in (name, f"{name}.npy"):
                np.testing.assert_array_equal(dmdata.open(f"{where}/{asked}")[1:], values[1:])
    with pytest.raises(FormatError, match="holds no array 'bias'; it holds days, weight"):
        dmdata.open(tmp_path / "x.npz" / "bias")
    with pytest.raises(CatalogError, match="holds several arrays"):
        dmdata.open(tmp_path / "x.npz")


def test_only_the_header_of_the_array_that_is_asked_for_is_read(tmp_path: Path, s3: LoopbackS3) -> None:
    np.savez(tmp_path / "x.npz", a=np.zeros(200_000), b=np.arange(200_000), c=np.zeros(200_000))
    s3.put("x.npz", (tmp_path / "x.npz").read_bytes())
    lazy = dmdata.open("s3://madrylab-datamodels/x.npz/b")
    assert s3.n_requests == 3
    assert s3.n_object_bytes < 40_000
    assert lazy[7] == 7
    dmdata.open("s3://madrylab-datamodels/x.npz/c")
    before = s3.n_requests
    dmdata.open("s3://madrylab-datamodels/x.npz/b")
    dmdata.open("s3://madrylab-datamodels/x.npz/c")
    assert s3.n_requests == before, "both are remembered"


def test_a_compressed_npz_says_what_to_do(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", **ARRAYS)
    with pytest.raises(FormatError, match=r"compressed.*np\.savez instead of np\.savez_compressed"):
        dmdata.open(tmp_path / "x.npz" / "weight")


def test_a_npz_of_objects_or_without_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", good=np.ones(2), bad=np.array([{}]))
    assert dmdata.open(tmp_path / "x.npz" / "good").shape == (2,)
    with pytest.raises(FormatError, match=r"x\.npz/bad holds Python objects"):
        dmdata.open(tmp_path / "x.npz" / "bad")
    with zipfile.ZipFile(tmp_path / "y.npz", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(FormatError, match=r"holds no \.npy"):
        dmdata.open(tmp_path / "y.npz" / "a")


# .safetensors


def safetensors(tensors: dict[str, tuple[str, Any]], *, pad: int = 0, **more: Any) -> bytes:
    """Write a file as the safetensors package does; checked against it."""
    header: dict[str, Any] = dict(more)
    at = 0
    for name, (code, values) in tensors.items():
        header[name] = {"dtype": code, "shape": list(values.shape), "data_offsets": [at, at + values.nbytes]}
        at += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + pad)
    return len(text).to_bytes(8, "little") + text + b"".join(values.tobytes() for _, values in tensors.values())


SAFE: dict[str, tuple[str, Any]] = {
    "model.fc.weight": ("F32", np.arange(12, dtype="<f4").reshape(3, 4)),
    "model/fc/bias": ("F16", np.arange(5, dtype="<f2")),
    "mask": ("BOOL", np.array([True, False, True])),
    "scalar": ("I64", np.array(7)),
    "nothing": ("U8", np.zeros((0, 3), np.uint8)),
    "u16": ("U16", np.arange(4, dtype="<u2")),
    "u64": ("U64", np.array([2**64 - 1], "<u8")),
    "c64": ("C64", np.array([1 + 2j], "<c8")),
    "f64": ("F64", np.array([0.1])),
}


def test_the_tensors_of_a_safetensors_are_read_in_place(tmp_path: Path, s3: LoopbackS3) -> None:
    blob = safetensors(SAFE, __metadata__={"format": "pt"})
    (tmp_path / "x.safetensors").write_bytes(blob)
    s3.put("x.safetensors", blob)
    for name, (_, values) in SAFE.items():
        for where in (tmp_path / "x.safetensors", "s3://madrylab-datamodels/x.safetensors"):
            lazy = dmdata.open(f"{where}/{name}")
            assert lazy.dtype == values.dtype
            np.testing.assert_array_equal(lazy[...], values)


@pytest.mark.parametrize(
    ("code", "name"), [("BF16", "bfloat16"), ("F8_E4M3", FLOATS_OF_8_BITS[0]), ("F8_E5M2", FLOATS_OF_8_BITS[1])]
)
def test_small_floats_of_a_safetensors_are_read_as_float32(tmp_path: Path, code: str, name: str) -> None:
    tensor = torch.randn(30, 4).to(getattr(torch, name))
    bits = tensor.view(torch.uint16 if code == "BF16" else torch.uint8).numpy()
    (tmp_path / "x.safetensors").write_bytes(safetensors({"w": (code, bits)}))
    lazy = dmdata.open(tmp_path / "x.safetensors" / "w")
    np.testing.assert_array_equal(lazy[3:, 1], tensor[3:, 1].to(torch.float32).numpy())


def test_a_safetensors_header_takes_one_request(s3: LoopbackS3) -> None:
    many = {f"model.layers.{nth}.self_attn.q_proj.weight": ("F32", np.full(4000, nth, "<f4")) for nth in range(400)}
    s3.put("x.safetensors", safetensors(many))
    lazy = dmdata.open("s3://madrylab-datamodels/x.safetensors/model.layers.321.self_attn.q_proj.weight")
    assert s3.n_requests == 1
    assert lazy[5] == 321


def retold(change: Callable[[dict[str, Any]], object]) -> bytes:
    blob = safetensors(SAFE)
    n_header = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + n_header])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + blob[8 + n_header :]


@pytest.mark.parametrize(
    "blob",
    [
        safetensors(SAFE)[:-1],
        safetensors(SAFE) + b"\0",
        safetensors(SAFE)[:200],
        safetensors(SAFE)[:5],
        (1 << 63).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"[[]]",
        (2).to_bytes(8, "little") + b"{}" + b"holes",
        (30000).to_bytes(8, "little") + b"[" * 30000,
        retold(lambda header: header["mask"].update(dtype="F4")),
        retold(lambda header: header["mask"].update(shape=[4])),
        retold(lambda header: header["mask"].update(shape=[-1, -3])),
        retold(lambda header: header["mask"].update(shape=[3.0])),
        retold(lambda header: header["mask"].update(shape=[2**62, 0])),
        retold(lambda header: header["mask"].update(data_offsets=[0, 3])),
        retold(lambda header: header["mask"].update(data_offsets=[1 << 70, (1 << 70) + 3])),
        retold(lambda header: header["mask"].pop("shape")),
        retold(lambda header: header.pop("mask")),
        retold(lambda header: header.update(twin=header["mask"])),
        safetensors(SAFE).replace(b'"u16"', b'"u64"'),
    ],
)
def test_a_safetensors_that_lies_is_refused(tmp_path: Path, blob: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(blob)
    with pytest.raises(FormatError, match=r"x\.safetensors"):
        dmdata.open(tmp_path / "x.safetensors" / "model.fc.weight")


# Addresses


def test_a_suffix_in_capitals_a_path_object_and_first_bytes_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: LoopbackS3
) -> None:
    monkeypatch.chdir(tmp_path)
    values = np.arange(6.0)
    (tmp_path / "sub").mkdir()
    with (tmp_path / "X.NPY").open("wb") as file:
        np.save(file, values)
    (tmp_path / "sub" / "run1").write_bytes((tmp_path / "X.NPY").read_bytes())
    np.savez(tmp_path / "sub" / "z.npz", a=values)
    (tmp_path / "sub" / "z").write_bytes((tmp_path / "sub" / "z.npz").read_bytes())
    saved(torch.from_numpy(values), tmp_path / "sub" / "p")
    (tmp_path / "sub" / "s").write_bytes(safetensors({"a": ("F64", values)}))
    for where in ("X.NPY", Path("X.NPY"), Path("sub/run1"), "sub/run1", Path("sub/p")):
        np.testing.assert_array_equal(dmdata.open(where)[...], values)
    for where in ("sub/z", "sub/s"):
        with pytest.raises(CatalogError, match=r"open one of a"):
            dmdata.open(Path(where))
    s3.put("run1", (tmp_path / "X.NPY").read_bytes())
    np.testing.assert_array_equal(dmdata.open("s3://madrylab-datamodels/run1")[...], values)
    (tmp_path / "sub" / "text").write_text("not an array, but a note")
    with pytest.raises(FormatError, match="none of npy, npz, pt, safetensors"):
        dmdata.open(Path("sub/text"))


def test_the_bytes_of_an_object_are_opened_by_its_address(tmp_path: Path) -> None:
    path = saved({"a": torch.arange(3)}, tmp_path / "x.pt")
    octets = open_object(path)
    assert bytes(octets[:]) == path.read_bytes()
    with pytest.raises(CatalogError, match="is a part of the object"):
        open_object(path / "a")


def test_a_folder_that_is_named_like_a_file_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "runs.pt").mkdir()
    np.save(tmp_path / "runs.pt" / "x.npy", np.arange(3))
    saved({"w": torch.arange(4)}, tmp_path / "runs.pt" / "m.pt")
    assert dmdata.open(tmp_path / "runs.pt" / "x.npy").shape == (3,)
    assert dmdata.open(tmp_path / "runs.pt" / "m.pt" / "w").shape == (4,)


def test_get_checks_the_header_of_every_kind(tmp_path: Path, s3: LoopbackS3) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros(4))
    blobs = {"npz": (tmp_path / "x.npz").read_bytes(), "safetensors": safetensors({"a": ("F64", np.zeros(4))})}
    facts = {"title": "t", "n_train": 1, "n_test": 1, "example_order": "o"}
    rows = {"alpha": 0.5, "rows": {"fit": [0, 1], "evaluation": [1, 2]}}
    arrays: dict[str, Any] = {}
    for kind, blob in blobs.items():
        s3.put(f"d/x.{kind}", blob)
        stored = {"key": f"d/x.{kind}", "format": kind, "n_bytes": len(blob)}
        members = {"a": {"shape": [4], "dtype": "float64", "dims": ["n"]}}
        arrays[kind] = stored | {"members": members, "basis": dict.fromkeys(stored, "measured")}
    source = {"url": "s3://madrylab-datamodels", "requester_pays": True}
    catalog = dmdata.Catalog.model_validate(
        {
            "version": 1,
            "title": "t",
            "source": source | {"basis": dict.fromkeys(source, "measured")},
            "datasets": {
                "d": facts
                | {"basis": dict.fromkeys(facts, "measured")}
                | {"alphas": {"50pct": rows | {"basis": dict.fromkeys(rows, "measured"), "arrays": arrays}}}
            },
        }
    )
    assert dmdata.open("d/50pct/safetensors/a", catalog=catalog).shape == (4,)
    assert dmdata.estimate("d/50pct/*", catalog=catalog).n_bytes >= sum(len(blob) for blob in blobs.values())
    for kind, blob in blobs.items():
        assert dmdata.get(f"d/50pct/{kind}", tmp_path / f"got.{kind}", catalog=catalog).read_bytes() == blob
        s3.put(f"d/x.{kind}", blob[:-30])
        with pytest.raises(DmdataError):
            dmdata.get(f"d/50pct/{kind}", tmp_path / f"again.{kind}", catalog=catalog)
        assert not (tmp_path / f"again.{kind}").exists()
