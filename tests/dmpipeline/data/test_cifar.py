import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from dmpipeline.data import cifar
from dmpipeline.data.datasets import load_dataset
from dmpipeline.errors import SpecError

N = 12  # pictures a file here, where CIFAR-10 has 10,000
NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def load(spelled):
    return cifar.load_cifar(Path(spelled.removeprefix("cifar10:")), n_pictures=N)


def test_files_are_held_to_the_size_of_cifar_10s_own(tmp_path, batches):
    with pytest.raises(SpecError, match="10,000 pictures"):
        load_dataset(write(tmp_path, batches, as_binary, ".bin"))


@pytest.fixture
def batches():
    """Pixels as the files have them, (N, 3072), and labels, of each file."""
    rng = np.random.default_rng(0)
    return {name: (rng.integers(0, 256, (N, 3072), np.uint8), rng.integers(0, 10, N)) for name in NAMES}


def as_binary(pixels, labels):
    return np.column_stack([labels.astype(np.uint8), pixels]).tobytes()


def as_python_2(pixels, labels):
    """What Python 2's cPickle writes, protocol 2: str for keys, names and the array's bytes."""

    def text(word):
        return b"U" + bytes([len(word)]) + word

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85q\x05U\x01bq\x06\x87q\x07Rq\x08"
        + b"(K\x01" + b"".join(b"M" + struct.pack("<H", length) for length in pixels.shape) + b"\x86q\x09"
        + b"cnumpy\ndtype\nq\x0aU\x02u1q\x0bK\x00K\x01\x87q\x0cRq\x0d"
        + b"(K\x03U\x01|q\x0eNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0fb"
        + b"\x89T" + struct.pack("<I", pixels.size) + pixels.tobytes() + b"q\x10tq\x11b"
    )  # fmt: skip
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels.tolist()) + b"e"
    names = b"](" + b"".join(text(b"truck_s_%06d.png" % i) for i in range(len(labels))) + b"e"
    keys = [
        (b"batch_label", text(b"training batch 1 of 5")),
        (b"labels", listed),
        (b"data", array),
        (b"filenames", names),
    ]
    return b"\x80\x02}q\x01(" + b"".join(text(key) + value for key, value in keys) + b"u."


def as_python_3(pixels, labels):
    """The same written again by Python 3 for Python 2."""
    return pickle.dumps({b"data": pixels, b"labels": labels.tolist()}, protocol=2)


def write(folder, batches, form, suffix=""):
    folder.mkdir(parents=True, exist_ok=True)
    for name, batch in batches.items():
        (folder / f"{name}{suffix}").write_bytes(form(*batch))
    return f"cifar10:{folder}"


def test_the_python_2_form_of_these_tests_is_one():
    pixels, labels = np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8), np.array([3, 9])
    batch = pickle.loads(as_python_2(pixels, labels), encoding="bytes")
    assert (batch[b"data"] == pixels).all()
    assert (batch[b"labels"], batch[b"filenames"][1]) == ([3, 9], b"truck_s_000001.png")


@pytest.mark.parametrize(
    ("form", "suffix"), [(as_binary, ".bin"), (as_python_2, ""), (as_python_3, "")], ids=["binary", "py2", "py3"]
)
def test_each_form_gives_the_pictures_in_the_order_of_the_files(tmp_path, batches, form, suffix):
    dataset = load(write(tmp_path, batches, form, suffix))
    assert (dataset.name, dataset.n_train, dataset.n_test, dataset.n_classes) == ("cifar", 5 * N, N, 10)
    assert (dataset.image_shape, dataset.train_inputs.dtype) == ((32, 32, 3), np.uint8)
    for place, name in enumerate(NAMES[:5]):
        pixels, labels = batches[name]
        rows = slice(place * N, (place + 1) * N)
        assert (dataset.train_labels[rows] == labels).all()
        # red, green and blue planes, each 32 rows of 32
        for channel in range(3):
            plane = pixels[:, channel * 1024 : (channel + 1) * 1024].reshape(N, 32, 32)
            assert (dataset.train_inputs[rows, :, :, channel] == plane).all()
    assert (dataset.test_labels == batches["test_batch"][1]).all()
    assert dataset.test_inputs[3, 5, 7].tolist() == [
        batches["test_batch"][0][3, c * 1024 + 5 * 32 + 7] for c in range(3)
    ]


def test_the_forms_are_one_dataset_wherever_they_are_unpacked(tmp_path, batches):
    write(tmp_path / "bin" / "cifar-10-batches-bin", batches, as_binary, ".bin")
    write(tmp_path / "py" / "cifar-10-batches-py", batches, as_python_2)
    spelled = ("bin", "bin/cifar-10-batches-bin", "py", "py/cifar-10-batches-py")
    assert len({load(f"cifar10:{tmp_path / place}").fingerprint for place in spelled}) == 1


class Runs:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def raw(*opcodes):
    return b"\x80\x02" + b"".join(opcodes) + b"."


HOSTILE = {
    "runs a command": pickle.dumps({b"data": Runs(os.mkdir, "ran"), b"labels": [0] * N}, 2),
    "evaluates": pickle.dumps(Runs(eval, "__import__('os').mkdir('ran')"), 2),
    "asks numpy to load": raw(b"cnumpy\nload\n", pickle.dumps(("ran",), 2)[2:-1], b"R"),
    "walks attributes of a known name": b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.",
    "encodes to another codec": raw(b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R"),
    "sets attributes of what it got": raw(b"cnumpy\nndarray\n}X\x01\x00\x00\x00aK\x01sb"),
    "claims a huge memo": raw(b"Nr\xff\xff\xff\xff"),
    "claims a huge string": b"\x80\x04\x8e" + struct.pack("<Q", 2**50) + b".",
    "is no dict": raw(b"K\x01"),
    "ends at once": b"\x80\x02",
    "ends within a number": b"\x80\x02" + b"N" * (N * 3072 - 4) + b"M\x01",
    "is no pickle": b"\xff" * 50,
    "has no array": pickle.dumps({b"data": [1], b"labels": [0] * N}, 2),
    "has a list in the array": pickle.dumps({b"data": np.array([[[]]], object), b"labels": [0] * N}, 2),
    "has wide numbers": pickle.dumps({b"data": np.zeros((N, 3072), np.int16), b"labels": [0] * N}, 2),
    "has few pixels": as_python_2(np.zeros((N, 3000), np.uint8), np.zeros(N, int)),
    "has few labels": as_python_3(np.zeros((N, 3072), np.uint8), np.zeros(N - 1, int)),
    "has labels of text": pickle.dumps({b"data": np.zeros((N, 3072), np.uint8), b"labels": ["a"] * N}, 2),
    "has huge labels": pickle.dumps({b"data": np.zeros((N, 3072), np.uint8), b"labels": [2**20_000] * N}, 2),
    "has keys of text": pickle.dumps({"data": np.zeros((N, 3072), np.uint8), "labels": [0] * N}, 2),
    "has an eleventh class": as_python_2(np.zeros((N, 3072), np.uint8), np.full(N, 10)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_pickle_that_is_no_batch_is_refused_and_does_nothing(tmp_path, batches, what, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spelled = write(tmp_path, batches, as_python_2)
    # filled up to the size of a batch, for a pickle ends at its own end
    content = HOSTILE[what].ljust(N * 3072, b"\0")
    (tmp_path / "data_batch_3").write_bytes(content)
    with pytest.raises(SpecError, match="data_batch_3") as caught:
        load(spelled)
    assert not (tmp_path / "ran").exists()
    assert len(str(caught.value)) < 1000


def test_what_a_pickle_did_to_the_reader_does_not_last(tmp_path, batches):
    spelled = write(tmp_path, batches, as_python_2)
    whole = load(spelled).fingerprint
    # sets __init__ of what it gets for numpy.dtype to 1
    hostile = raw(b"cnumpy\ndtype\nN}X\x08\x00\x00\x00__init__K\x01s\x86b")
    (tmp_path / "data_batch_3").write_bytes(hostile.ljust(N * 3072, b"\0"))
    with pytest.raises(SpecError, match="data_batch_3"):
        load(spelled)
    write(tmp_path, batches, as_python_2)
    assert load(spelled).fingerprint == whole


@pytest.mark.parametrize("n_bytes", [0, N * 3073 - 1, N * 3073 + 1])
def test_a_binary_file_of_another_size_says_found_and_expected(tmp_path, batches, n_bytes):
    spelled = write(tmp_path, batches, as_binary, ".bin")
    path = tmp_path / "data_batch_2.bin"
    path.write_bytes(path.read_bytes().ljust(n_bytes, b"\0")[:n_bytes])
    with pytest.raises(SpecError, match=rf"data_batch_2\.bin: {n_bytes:,} bytes is to have {N * 3073:,}, {N} pictures"):
        load(spelled)


def test_a_python_file_that_is_truncated_or_far_too_large_is_not_read(tmp_path, batches):
    spelled = write(tmp_path, batches, as_python_2)
    path = tmp_path / "test_batch"
    whole = path.read_bytes()
    for content in (whole[: N * 3072 - 1], whole + bytes(N * 6000)):
        path.write_bytes(content)
        with pytest.raises(SpecError, match=rf"test_batch: {len(content):,} bytes is to have"):
            load(spelled)
    path.write_bytes(whole[:-20])
    with pytest.raises(SpecError, match=r"test_batch: a pickle that cannot be read"):
        load(spelled)


def test_a_label_that_no_class_has_is_refused(tmp_path, batches):
    batches["data_batch_4"][1][2] = 10
    with pytest.raises(SpecError, match=r"data_batch_4\.bin: labels from \d to 10"):
        load(write(tmp_path, batches, as_binary, ".bin"))


def test_what_is_missing_is_named(tmp_path, batches):
    spelled = write(tmp_path, batches, as_binary, ".bin")
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(SpecError, match=r"test_batch\.bin: No such file"):
        load(spelled)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpecError, match=r"without data_batch_1\.bin or data_batch_1"):
        load(f"cifar10:{tmp_path / 'empty'}")
    with pytest.raises(SpecError, match="no folder"):
        load(f"cifar10:{tmp_path / 'nowhere'}")
