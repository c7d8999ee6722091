import numpy as np
import pytest
from sklearn.datasets import load_digits

from dmpipeline.data.datasets import as_features, load_dataset, save_dataset
from dmpipeline.errors import SpecError
from dmpipeline.spec import RunSpec

ARRAYS = {
    "train_inputs": np.linspace(0, 1, 24, dtype=np.float32).reshape(6, 4),
    "train_labels": np.array([0, 1, 2, 0, 1, 2]),
    "test_inputs": np.linspace(-1, 0, 8, dtype=np.float32).reshape(2, 4),
    "test_labels": np.array([2, 1], np.uint8),
}


def save(path, **changes):
    np.savez(path, **{name: array for name, array in (ARRAYS | changes).items() if array is not None})
    return str(path)


def test_digits_are_scikit_learns_each_once():
    digits, source = load_dataset("digits"), load_digits()
    assert (digits.n_train, digits.n_test, digits.n_classes, digits.image_shape) == (1437, 360, 10, (8, 8))
    inputs = np.concatenate([digits.train_inputs, digits.test_inputs])
    labels = np.concatenate([digits.train_labels, digits.test_labels])

    def as_rows(images, targets):
        return sorted(map(tuple, np.column_stack([images, targets]).tolist()))

    assert inputs.dtype == np.float32
    assert inputs.min() == 0
    assert inputs.max() == 1
    assert as_rows(inputs * 16, labels) == as_rows(source.data, source.target)


def test_the_order_of_digits_never_changes():
    # Computed once by this code. Another value means that columns of earlier runs would mean other examples.
    assert load_dataset("digits").fingerprint == "5f14c1139bdd43e032fefa5e9c0db168a1798c17893e74ee9569619bae4ab21a"


def test_an_npz_file_is_a_dataset_named_by_its_stem(tmp_path):
    dataset = load_dataset(save(tmp_path / "letters.npz"))
    assert dataset.name == "letters"
    assert (dataset.n_train, dataset.n_test, dataset.n_classes, dataset.image_shape) == (6, 2, 3, None)
    assert (dataset.train_inputs == ARRAYS["train_inputs"]).all()
    assert dataset.test_labels.tolist() == [2, 1]


def test_pictures_stay_bytes_until_features_are_made_of_them(tmp_path):
    pictures = np.arange(6 * 2 * 2 * 3, dtype=np.uint8).reshape(6, 2, 2, 3)
    dataset = load_dataset(save(tmp_path / "rgb.npz", train_inputs=pictures, test_inputs=pictures[:2]))
    assert (dataset.image_shape, dataset.n_features) == ((2, 2, 3), 12)
    assert dataset.train_inputs.dtype == np.uint8
    assert (dataset.train_inputs == pictures).all()
    features = as_features(dataset.train_inputs)
    assert (features.dtype, features.shape) == (np.float32, (6, 12))
    np.testing.assert_allclose(features, pictures.reshape(6, 12) / 255, rtol=1e-6)
    assert (dataset.train_inputs == pictures).all()


def test_bytes_that_are_no_pictures_become_floats_from_0_to_1(tmp_path):
    rows = np.arange(24, dtype=np.uint8).reshape(6, 4)
    dataset = load_dataset(save(tmp_path / "rows.npz", train_inputs=rows, test_inputs=rows[:2]))
    assert (dataset.train_inputs.dtype, dataset.image_shape) == (np.float32, None)
    np.testing.assert_allclose(dataset.train_inputs, rows / 255, rtol=1e-6)


def test_floats_keep_their_shape_and_any_width_or_byte_order_becomes_float32(tmp_path):
    volumes = np.linspace(-1, 1, 6 * 2 * 3 * 5).reshape(6, 2, 3, 5).astype(">f8")
    dataset = load_dataset(save(tmp_path / "volumes.npz", train_inputs=volumes, test_inputs=volumes[:2]))
    assert (dataset.train_inputs.dtype, dataset.image_shape) == (np.dtype(np.float32), None)
    assert (dataset.train_inputs == volumes.astype(np.float32)).all()
    assert as_features(dataset.train_inputs).shape == (6, 30)


@pytest.mark.parametrize(("shape", "n_numbers"), [((6,), 1), ((6, 3), 3)])
def test_labels_of_floats_make_a_regression(tmp_path, shape, n_numbers):
    labels = np.linspace(-5, 5.5, 6 * n_numbers).reshape(shape)
    dataset = load_dataset(save(tmp_path / "prices.npz", train_labels=labels, test_labels=labels[:2]))
    assert (dataset.is_regression, dataset.is_sequence, dataset.n_classes) == (True, False, n_numbers)
    assert dataset.train_labels.dtype == np.float32
    assert (dataset.train_labels == labels.astype(np.float32)).all()


def test_whole_inputs_are_features_unless_they_are_said_to_be_tokens(tmp_path):
    whole = np.arange(24, dtype=np.int16).reshape(6, 4)
    path = save(tmp_path / "a.npz", train_inputs=whole, test_inputs=whole[:2])
    features = load_dataset(path)
    assert (features.train_inputs.dtype, features.inputs_form) == (np.float32, "standardised")
    assert (features.train_inputs == whole).all()
    tokens = load_dataset(path, inputs="tokens")
    assert (tokens.train_inputs.dtype, tokens.inputs_form, tokens.task) == (np.int64, "tokens", "classification")
    assert load_dataset(path, as_before=True).train_inputs.dtype == np.int64
    with pytest.raises(SpecError, match="train_inputs of float32 is to be whole numbers from 0, for tokens"):
        load_dataset(save(tmp_path / "b.npz"), inputs="tokens")
    with pytest.raises(SpecError, match="number tokens from 0"):
        load_dataset(save(tmp_path / "c.npz", train_inputs=whole - 1, test_inputs=whole[:2]), inputs="tokens")


def test_integers_are_tokens_with_a_label_at_each_position(tmp_path):
    tokens = np.arange(24, dtype=np.int16).reshape(6, 4)
    one_each = load_dataset(save(tmp_path / "a.npz", train_inputs=tokens, test_inputs=tokens[:2]), inputs="tokens")
    assert (one_each.train_inputs.dtype, one_each.is_sequence, one_each.n_classes) == (np.int64, False, 3)
    following = np.roll(tokens, -1, axis=1)
    following[:, -1] = -1
    arrays = {
        "train_inputs": tokens,
        "train_labels": following,
        "test_inputs": tokens[:2],
        "test_labels": following[:2],
    }
    sequences = load_dataset(save(tmp_path / "b.npz", **arrays))
    assert (sequences.is_sequence, sequences.is_regression) == (True, False)
    assert (sequences.n_train, sequences.n_classes, sequences.image_shape) == (6, 24, None)
    assert (sequences.train_labels == following).all()
    with pytest.raises(SpecError, match="tokens, not features"):
        as_features(sequences.train_inputs)


@pytest.mark.parametrize("name", sorted(ARRAYS))
def test_any_changed_value_changes_the_fingerprint(tmp_path, name):
    changed = ARRAYS[name].copy()
    changed[0] = 1
    first = load_dataset(save(tmp_path / "a.npz")).fingerprint
    assert load_dataset(save(tmp_path / "b.npz")).fingerprint == first
    assert load_dataset(save(tmp_path / "c.npz", **{name: changed})).fingerprint != first


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"test_labels": None}, "lacks test_labels"),
        ({"train_inputs": ARRAYS["train_inputs"][:, :3]}, "differ after the first dimension"),
        ({"train_inputs": np.full((6, 4), np.nan, np.float32)}, "finite"),
        ({"train_inputs": np.full((6, 4), 1e300)}, "finite"),
        ({"train_inputs": np.ones((6, 2, 2), int)}, "give pictures as uint8"),
        ({"train_inputs": np.ones((6, 4), complex)}, "train_inputs of complex128"),
        ({"train_inputs": np.full((6, 4), "a")}, "train_inputs of <U1"),
        ({"train_inputs": np.ones(6, np.float32)}, r"train_inputs of shape \(6,\)"),
        ({"train_inputs": np.ones((0, 4), np.float32)}, r"shape \(0, 4\)"),
        ({"train_labels": np.array([0, 1])}, r"shape \(6,\), one for each input"),
        ({"train_labels": np.linspace(0, 1, 6)}, "train_labels of float64.*differ.* in kind"),
        ({"train_labels": np.array([0, 1, 2, 0, 1, np.inf])}, "train_labels holds NaN, infinity"),
        (
            {"train_labels": np.array([0, 1, 2, 0, np.nan, 1])},
            r"1 of 6 examples have a missing value \(NaN\), namely 4",
        ),
        (
            {"train_labels": np.full((6, 4), 3), "test_labels": np.full((2, 4), 3)},
            "go with tokens of the same shape; .* --task regression",
        ),
        ({"train_labels": np.zeros(6, int)}, "of one class, 0,.* two classes or more"),
        ({"class_names": np.array(["a", "b"])}, "labels from 0 to 2 with 2 class names disagree"),
        ({"feature_names": np.array(["a", "b"])}, "2 feature_names .* disagree"),
        ({"task": np.array("classes")}, "task 'classes' in its files is to be classification, regression, tokens"),
        ({"train_labels": np.array([object()] * 6)}, "plain arrays"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused_by_name(tmp_path, changes, words):
    path = save(tmp_path / "letters.npz", **changes)
    with pytest.raises(SpecError, match=words) as caught:
        load_dataset(path)
    assert path in str(caught.value)


def test_a_sequence_without_anything_to_predict_is_refused(tmp_path):
    tokens = np.arange(24).reshape(6, 4)
    labels = tokens.copy()
    labels[4] = -1
    arrays = {"train_inputs": tokens, "train_labels": labels, "test_inputs": tokens, "test_labels": tokens}
    with pytest.raises(SpecError, match="train_labels, example 4 has nothing to predict"):
        load_dataset(save(tmp_path / "letters.npz", **arrays))


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    path = tmp_path / "letters.npz"
    whole = save(path)
    for content in (b"", b"no zip", path.read_bytes()[:200], path.read_bytes()[:-30]):
        path.write_bytes(content)
        with pytest.raises(SpecError, match=r"numpy\.savez"):
            load_dataset(whole)


def test_a_single_array_is_not_taken_for_a_dataset(tmp_path):
    with open(tmp_path / "letters.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(SpecError, match="one array"):
        load_dataset(str(tmp_path / "letters.npz"))


def test_unknown_and_missing_datasets_say_what_there_is(tmp_path):
    for wrong, right in {
        "digit": "digits",
        "cifar": "cifar10:PATH",
        "cifar:/data": "cifar10:PATH",
        "fmow:": "fmow:PATH",
    }.items():
        with pytest.raises(SpecError, match=rf"choose {right}, or the path of an \.npz file or a folder"):
            load_dataset(wrong)
    with pytest.raises(SpecError, match="choose cifar10:PATH, digits, fmow:PATH, or"):
        load_dataset("imagenet")
    with pytest.raises(SpecError, match="there is no such folder; correct the path"):
        load_dataset(str(tmp_path / "nowhere"))
    with pytest.raises(SpecError, match=r"there is no such file; correct the path, .*docs/how-to/own-data\.md"):
        load_dataset(str(tmp_path / "none.npz"))
    with pytest.raises(SpecError, match="rename the file"):
        load_dataset(save(tmp_path / "my data.npz"))


def test_what_is_in_another_form_is_refused_with_where_to_read_how_it_is_handed_over(tmp_path):
    table, pictures = tmp_path / "bc.csv", tmp_path / "pictures"
    table.write_text("a,b,label\n1,2,0\n")
    (pictures / "train").mkdir(parents=True)
    np.savez(tmp_path / "raw.npz", X=np.zeros((3, 2)), y=np.zeros(3))
    for wrong in (table, pictures, tmp_path / "raw.npz"):
        with pytest.raises(SpecError, match=r"docs/how-to/own-data\.md shows the lines for a CSV"):
            load_dataset(str(wrong))
    texts = ["a good film", "a bad one"]
    for given in (texts, np.array(texts, object)):
        with pytest.raises(SpecError, match=r"a text; make each text a row of numbers, .*own-data\.md"):
            save_dataset(tmp_path / "texts", (given, [0, 1]), (given, [0, 1]))
    with pytest.raises(SpecError, match=r"single str; give a pair \(inputs, labels\) of arrays; .*own-data\.md"):
        save_dataset(tmp_path / "pngs", "pngs/train", "pngs/test")


def test_a_spec_that_is_handed_arrays_names_what_writes_them_and_does_not_repeat_them():
    with pytest.raises(SpecError, match=r"written by dmpipeline\.save_dataset first") as refused:
        RunSpec(dataset=(np.zeros((300, 20)), np.zeros(300)))
    assert len(str(refused.value)) < 400
