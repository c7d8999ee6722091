import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

import dmpipeline
from dmpipeline.data import examples
from dmpipeline.data.datasets import load_dataset, save_dataset
from dmpipeline.data.examples import checked_dataset
from dmpipeline.draws.masks import subset_masks
from dmpipeline.errors import RunError, SpecError
from dmpipeline.models.recipes import find_recipe
from dmpipeline.report.of_run import report_run
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec
from dmpipeline.training.train import Way, make_trainer
from dmpipeline.workflow import evaluate_run, fit_run

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (7, 4, 5, 3), np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2, 0])


class Examples(torch.utils.data.Dataset):
    """Gives each example once, as a training loop's dataset would, and notes who was asked for."""

    def __init__(self, inputs, labels):
        self.inputs, self.labels, self.asked = inputs, labels, []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.asked.append(index)
        return self.inputs[index], self.labels[index]


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_of_arrays_is_a_dataset_that_stays_on_disk(tmp_path):
    folder = dmpipeline.save_dataset(tmp_path / "birds", (PICTURES, LABELS), (PICTURES[:2], LABELS[:2]))
    dataset = load_dataset(str(folder))
    assert (dataset.name, dataset.n_train, dataset.n_test, dataset.n_classes) == ("birds", 7, 2, 3)
    assert (dataset.train_inputs.dtype, dataset.image_shape) == (np.uint8, (4, 5, 3))
    assert (dataset.train_inputs == PICTURES).all()
    assert (dataset.train_labels == LABELS).all()
    assert not dataset.train_inputs.flags.writeable
    assert isinstance(dataset.train_inputs.base, np.memmap)


def test_a_folder_and_an_npz_file_of_the_same_arrays_have_one_fingerprint(tmp_path):
    folder = save_dataset(tmp_path / "birds", (PICTURES, LABELS), (PICTURES[:2], LABELS[:2]))
    parts = {"train_inputs": PICTURES, "train_labels": LABELS, "test_inputs": PICTURES[:2], "test_labels": LABELS[:2]}
    np.savez(tmp_path / "other.npz", **parts)
    np.save(folder / "train_inputs.npy", np.asfortranarray(PICTURES))
    assert load_dataset(str(folder)).fingerprint == load_dataset(str(tmp_path / "other.npz")).fingerprint


def test_a_fingerprint_does_not_depend_on_the_pieces_it_is_made_in():
    parts = [PICTURES, LABELS, PICTURES, LABELS]
    assert examples.fingerprint_of(parts, 2 * PICTURES[0].nbytes) == examples.fingerprint_of(parts)


@given(arrays(np.uint8, (3, 2, 2)), arrays(np.uint8, (3, 2, 2)), st.permutations([0, 1, 2]))
def test_fingerprints_are_equal_exactly_where_all_values_are(first, second, labels):
    def fingerprint(inputs, labels):
        part = (inputs, np.array(labels))
        return checked_dataset("a", part, part, source="a", example_order="").fingerprint

    same = bool((first == second).all()) and labels == [0, 1, 2]
    assert (fingerprint(first, [0, 1, 2]) == fingerprint(second, labels)) == same


def test_the_same_values_in_another_shape_have_another_fingerprint():
    def fingerprint(inputs):
        part = (inputs, LABELS[:6])
        return checked_dataset("a", part, part, source="a", example_order="").fingerprint

    values = np.arange(6 * 4 * 6, dtype=np.float32)
    assert len({fingerprint(values.reshape(6, *shape)) for shape in ((4, 6), (6, 4), (24,), (1, 24))}) == 4


def test_tensors_with_channels_first_are_stored_channels_last(tmp_path):
    tensors = torch.from_numpy(PICTURES).permute(0, 3, 1, 2)
    both = [(tensors, LABELS), Examples(tensors, LABELS), Examples(tensors.float() / 255, torch.from_numpy(LABELS))]
    for number, train in enumerate(both):
        dataset = load_dataset(str(save_dataset(tmp_path / f"birds{number}", train, train)))
        assert dataset.image_shape == (4, 5, 3)
        scale = 255 if dataset.train_inputs.dtype == np.float32 else 1
        np.testing.assert_allclose(dataset.train_inputs * np.float32(scale), PICTURES, rtol=1e-6)
        assert (dataset.test_labels == LABELS).all()
    assert both[2].asked == list(range(7)) * 2


def test_pil_pictures_are_stored_as_their_bytes(tmp_path):
    colour = Examples([Image.fromarray(picture) for picture in PICTURES], LABELS.tolist())
    grey = Examples([Image.fromarray(picture[..., 0]) for picture in PICTURES], LABELS.tolist())
    assert (load_dataset(str(save_dataset(tmp_path / "rgb", colour, colour))).train_inputs == PICTURES).all()
    dataset = load_dataset(str(save_dataset(tmp_path / "grey", grey, grey)))
    assert (dataset.train_inputs == PICTURES[..., 0]).all()
    palette = Examples([Image.fromarray(picture).convert("P") for picture in PICTURES], LABELS.tolist())
    with pytest.raises(SpecError, match=r"mode P.*convert it to L, RGB or RGBA"):
        save_dataset(tmp_path / "palette", palette, palette)


def test_numbers_and_sequences_are_stored_as_labels(tmp_path):
    rows, numbers = RNG.normal(size=(7, 3)), RNG.normal(size=(7, 2))
    regression = load_dataset(str(save_dataset(tmp_path / "a", (rows, numbers), Examples(rows, torch.tensor(numbers)))))
    assert (regression.is_regression, regression.n_classes, regression.train_inputs.dtype) == (True, 2, np.float32)
    assert (regression.train_labels == regression.test_labels).all()
    single = load_dataset(str(save_dataset(tmp_path / "b", *[Examples(rows, numbers[:, 0].tolist())] * 2)))
    assert (single.is_regression, single.train_labels.shape) == (True, (7,))
    tokens = torch.arange(28).reshape(7, 4)
    following = torch.cat([tokens[:, 1:], torch.full((7, 1), -1)], 1)
    sequences = load_dataset(str(save_dataset(tmp_path / "c", Examples(tokens, following), (tokens, following))))
    assert (sequences.is_sequence, sequences.n_classes, sequences.train_inputs.dtype) == (True, 28, np.int64)
    assert (sequences.train_labels == sequences.test_labels).all()


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ((PICTURES,), "train of 1 arrays"),
        ((PICTURES, LABELS[:3]), r"train_labels of int64, shape \(3,\)"),
        ((PICTURES, LABELS.astype(complex)), "neither floats nor integers"),
        (Examples(PICTURES, []), "holds none"),
        (Examples([*PICTURES[:3], PICTURES[3, :2]], LABELS[:4]), r"example 3 is uint8 of shape \(2, 5, 3\)"),
        (Examples(PICTURES, [0, 1, 2.5, 0]), r"example 2 is .*float32 of shape \(\), where the first is .*int64"),
        ([(picture, 0) for picture in PICTURES], "train of 7 arrays"),
    ],
)
def test_what_is_no_dataset_is_refused_and_nothing_is_left(tmp_path, train, words):
    with pytest.raises(SpecError, match=words) as caught:
        save_dataset(tmp_path / "birds", train, (PICTURES, LABELS))
    assert "partial" not in str(caught.value)
    assert entries(tmp_path) == []


def test_a_dataset_that_fails_half_way_leaves_nothing(tmp_path):
    class Failing(Examples):
        def __getitem__(self, index):
            if index == 4:
                raise ZeroDivisionError
            return super().__getitem__(index)

    with pytest.raises(SpecError, match="item 4 of train: ZeroDivisionError") as caught:
        save_dataset(tmp_path / "birds", Failing(PICTURES, LABELS), (PICTURES, LABELS))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert entries(tmp_path) == []


def test_what_is_there_already_is_kept(tmp_path):
    folder = tmp_path / "birds"
    folder.mkdir()
    save_dataset(folder, (PICTURES, LABELS), (PICTURES, LABELS))
    assert entries(folder) == ["test_inputs.npy", "test_labels.npy", "train_inputs.npy", "train_labels.npy"]
    before = load_dataset(str(folder)).fingerprint
    with pytest.raises(SpecError, match="is there already; choose another folder"):
        save_dataset(folder, (PICTURES[::-1], LABELS), (PICTURES, LABELS))
    assert load_dataset(str(folder)).fingerprint == before
    with pytest.raises(SpecError, match="rename the file or folder"):
        save_dataset(tmp_path / "my birds", (PICTURES, LABELS), (PICTURES, LABELS))
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file is where a folder should be"):
        save_dataset(tmp_path / "file" / "birds", (PICTURES, LABELS), (PICTURES, LABELS))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), r"lacks test_inputs\.npy; `dmpipeline\.save_dataset` writes all four"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"test_inputs\.npy, .*cannot be read"),
        (lambda path: path.write_bytes(b""), r"test_inputs\.npy, .*cannot be read"),
        (lambda path: np.save(path, np.array([object()]), allow_pickle=True), r"test_inputs\.npy, .*cannot be read"),
        (lambda path: np.save(path, PICTURES[:, :2]), "differ after the first dimension"),
    ],
)
def test_a_folder_that_cannot_be_used_names_the_file(tmp_path, damage, words):
    folder = save_dataset(tmp_path / "birds", (PICTURES, LABELS), (PICTURES, LABELS))
    damage(folder / "test_inputs.npy")
    with pytest.raises(SpecError, match=words):
        load_dataset(str(folder))


def test_pictures_on_disk_train_as_the_same_numbers_in_memory(tmp_path):
    spec = RunSpec(n_models=3, recipe={"name": "perceptron", "epochs": 2, "hidden": 4}, held_out={"n_subsets": 0})
    pictures, labels = RNG.integers(0, 256, (40, 4, 5, 3), np.uint8), np.arange(40) % 3
    floats = pictures.reshape(40, -1) / np.float32(255)
    names = ("train_inputs", "train_labels", "test_inputs", "test_labels")
    np.savez(tmp_path / "floats.npz", **dict(zip(names, (floats, labels, floats, labels), strict=True)))
    folder = save_dataset(tmp_path / "bytes", (pictures, labels), (pictures, labels))
    recipe, way = find_recipe(spec.recipe), Way("products", 3)
    mapped, whole = (
        make_trainer(load_dataset(str(path), inputs="as-is"), recipe, seed=spec.seed, way=way).train(
            subset_masks(spec, range(3), len(labels)), spec.model_indices(range(3)), range(3)
        )
        for path in (folder, tmp_path / "floats.npz")
    )
    np.testing.assert_allclose(mapped.train, whole.train, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_pictures_of_any_channels_go_from_training_to_the_report(tmp_path, channels):
    pictures, labels = RNG.integers(0, 256, (40, 4, 5, *channels), np.uint8), np.arange(40) % 3
    folder = save_dataset(tmp_path / "birds", (pictures, labels), (pictures[:6], labels[:6]))
    held_out = {"n_subsets": 3, "n_retrainings": 2}
    recipe = {"name": "perceptron", "epochs": 2, "hidden": 4}
    run = Run.create(tmp_path / "run", RunSpec(dataset=str(folder), n_models=40, held_out=held_out, recipe=recipe))
    run.train()
    fit_run(run)
    assert report_run(run, evaluate_run(run)).read_text().count("text/plain") == 3  # numbers, and a sheet of each part


def test_a_dataset_is_replaced_only_where_that_is_asked_for_and_nothing_else_ever(tmp_path):
    rows, labels = np.arange(12, dtype=np.float32).reshape(6, 2), [0, 1, 0, 1, 0, 1]
    folder = save_dataset(tmp_path / "mine", (rows, labels), (rows, labels))
    with pytest.raises(SpecError, match=r"a dataset is there already; .* overwrite=True"):
        save_dataset(folder, (rows + 1, labels), (rows, labels))
    assert save_dataset(folder, (rows + 1, labels), (rows, labels), overwrite=True) == folder
    assert np.array_equal(load_dataset(str(folder)).train_inputs, rows + 1)
    with pytest.raises(SpecError):  # which leaves what was there
        save_dataset(folder, (rows, labels[:3]), (rows, labels), overwrite=True)
    assert np.array_equal(load_dataset(str(folder)).train_inputs, rows + 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]
    (folder / "notes.txt").write_text("of my own")
    with pytest.raises(SpecError, match="something is there already; choose another folder"):
        save_dataset(folder, (rows, labels), (rows, labels), overwrite=True)
