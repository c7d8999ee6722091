"""Labels of every kind become classes with names, numbers or tokens; doubt is refused with how to say it."""

import numpy as np
import pandas as pd
import pytest
import torch

from dmpipeline.data.datasets import load_dataset, save_dataset
from dmpipeline.errors import SpecError

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(30, 4))
CLASSES = np.arange(30) % 3
NAMES = np.array(["newt", "auk", "emu"])
SORTED = ("auk", "emu", "newt")
BY_NAME = np.array([2, 0, 1])[CLASSES]


def saved(folder, labels, test_labels=None, **options):
    test = labels[:12] if test_labels is None else test_labels
    return str(save_dataset(folder, (INPUTS, labels), (INPUTS[: len(test)], test), **options))


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (NAMES[CLASSES], SORTED, BY_NAME),
        (NAMES[CLASSES].astype(object), SORTED, BY_NAME),
        (NAMES[CLASSES].tolist(), SORTED, BY_NAME),
        (NAMES[CLASSES].astype("S"), SORTED, BY_NAME),
        (NAMES[CLASSES][:, None], SORTED, BY_NAME),
        (pd.Series(NAMES[CLASSES]), SORTED, BY_NAME),
        (pd.Series(NAMES[CLASSES], dtype="string"), SORTED, BY_NAME),
        (pd.Series(NAMES[CLASSES], dtype="category", index=range(50, 80)), SORTED, BY_NAME),
        (pd.Categorical(NAMES[CLASSES], categories=["newt", "auk", "emu", "yak"]), SORTED, BY_NAME),
        (pd.get_dummies(NAMES[CLASSES]), SORTED, BY_NAME),
        (pd.DataFrame({"animal": NAMES[CLASSES]}), SORTED, BY_NAME),
        (CLASSES == 1, ("False", "True"), (CLASSES == 1).astype(int)),
        (CLASSES + 1, ("1", "2", "3"), CLASSES),
        (np.where(CLASSES == 1, 1, -1), ("-1", "1"), (CLASSES == 1).astype(int)),
        (np.array([10, 2, 0])[CLASSES], ("0", "2", "10"), np.array([2, 1, 0])[CLASSES]),
        (pd.Series(CLASSES + 1, dtype="Int64"), ("1", "2", "3"), CLASSES),
        (CLASSES, None, CLASSES),
        (CLASSES[:, None], None, CLASSES),
        (np.eye(3)[CLASSES], None, CLASSES),
        (np.eye(3, dtype=int)[CLASSES], None, CLASSES),
        (torch.from_numpy(CLASSES), None, CLASSES),
    ],
)
def test_classes_are_numbered_by_their_names_which_are_kept(tmp_path, labels, names, numbers):
    dataset = load_dataset(saved(tmp_path / "animals", labels))
    assert (dataset.task, dataset.class_names) == ("classification", names)
    assert dataset.n_classes == len(set(numbers))
    assert dataset.train_labels.dtype == np.int64
    assert (dataset.train_labels == numbers).all()
    assert (dataset.test_labels == numbers[:12]).all()
    assert dataset.name_of(numbers[0]) == (names[numbers[0]] if names else str(numbers[0]))


@pytest.mark.parametrize(
    "labels",
    [
        INPUTS[:, 0],
        INPUTS[:, :1],
        INPUTS[:, :2],
        pd.Series(INPUTS[:, 0]),
        torch.from_numpy(INPUTS[:, 0]).bfloat16(),
        np.arange(30) * 7.0,
    ],
)
def test_floats_are_a_regression(tmp_path, labels):
    dataset = load_dataset(saved(tmp_path / "prices", labels))
    assert (dataset.task, dataset.class_names, dataset.train_labels.dtype) == ("regression", None, np.float32)
    whole = labels.float().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels, np.float32)
    expected = whole[:, 0] if whole.shape == (30, 1) else whole
    assert (dataset.train_labels == expected).all()


@pytest.mark.parametrize(
    ("labels", "possible"),
    [
        (CLASSES.astype(float), ("classification", "regression")),
        ((CLASSES > 1).astype(np.float32), ("classification", "regression")),
        (np.arange(30) * 7, ("classification", "regression")),
    ],
)
def test_what_may_be_classes_or_amounts_is_refused_until_it_is_said(tmp_path, labels, possible):
    path = saved(tmp_path / "values", labels)
    with pytest.raises(SpecError, match="may be classes or amounts; say which by --task classification or --task reg"):
        load_dataset(path)
    for task in possible:
        assert load_dataset(path, task=task).task == task
        assert load_dataset(saved(tmp_path / task, labels, task=task)).task == task
    as_floats = load_dataset(path, task="regression").train_labels
    assert (as_floats == labels).all()


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([None, *NAMES[CLASSES][1:]], r"train_labels: 1 of 30 examples have a missing value \(None\), namely 0"),
        ([*NAMES[CLASSES][:29], float("nan")], r"missing value \(nan\), namely 29; fill them, or leave these"),
        (np.where(CLASSES == 1, np.nan, INPUTS[:, 0]), r"10 of 30 .*\(NaN\), namely 1, 4, 7, 10, 13, \.\.\."),
        (pd.Series([pd.NA, *CLASSES[1:]], dtype="Int64"), "1 of 30 examples have a missing value"),
        ([1, *NAMES[CLASSES][1:]], "of mixed or unknown kinds: 29 of text, 1 of whole number"),
        (np.array(["2020-01-01"] * 30, "datetime64[D]"), "neither floats nor integers nor text"),
        (RNG.integers(0, 2, (30, 4)) * [[1, 1, 1, 1]], "several classes an example are not known"),
        (["newt"] * 30, "of one class, newt,.*shuffle before splitting"),
    ],
)
def test_labels_that_cannot_be_used_say_what_is_wrong_and_leave_nothing(tmp_path, labels, words):
    with pytest.raises(SpecError, match=words):
        saved(tmp_path / "animals", labels)
    assert not (tmp_path / "animals").exists()


@pytest.mark.parametrize(
    ("labels", "task", "words"),
    [
        (NAMES[CLASSES], "regression", "of text is to be numbers for task regression"),
        (INPUTS[:, 0], "classification", "with fractions"),
        (INPUTS[:, :2], "classification", "one class an example"),
        (CLASSES, "tokens", "train_inputs of float32 is to be whole numbers"),
        (CLASSES, "ranking", "choose classification, regression, tokens"),
    ],
)
def test_a_task_that_labels_cannot_be_of_is_refused(tmp_path, labels, task, words):
    with pytest.raises(SpecError, match=words):
        saved(tmp_path / "animals", labels, task=task)


def test_classes_are_those_of_train_and_test_together(tmp_path):
    labels, test = NAMES[CLASSES], np.array(["yak", "auk"])
    dataset = load_dataset(saved(tmp_path / "animals", labels, test))
    assert dataset.class_names == ("auk", "emu", "newt", "yak")
    assert dataset.test_labels.tolist() == [3, 0]


def test_an_npz_file_of_ones_own_may_have_text_and_names(tmp_path):
    parts = {"train_inputs": INPUTS, "test_inputs": INPUTS[:6]}
    np.savez(tmp_path / "text.npz", **parts, train_labels=NAMES[CLASSES], test_labels=NAMES[CLASSES][:6])
    dataset = load_dataset(str(tmp_path / "text.npz"))
    assert (dataset.class_names, dataset.train_labels.tolist()) == (SORTED, BY_NAME.tolist())
    numbers = {"train_labels": CLASSES, "test_labels": CLASSES[:6]}
    np.savez(tmp_path / "named.npz", **parts, **numbers, class_names=NAMES, feature_names=np.array(list("abcd")))
    named = load_dataset(str(tmp_path / "named.npz"))
    assert (named.class_names, named.feature_names) == (tuple(NAMES), ("a", "b", "c", "d"))
    assert (named.train_labels == CLASSES).all()
    np.savez(tmp_path / "objects.npz", **parts, train_labels=NAMES[CLASSES].astype(object), test_labels=CLASSES[:6])
    with pytest.raises(SpecError, match=r"train_labels of Python objects is never unpickled; .*labels\.astype\(str\)"):
        load_dataset(str(tmp_path / "objects.npz"))


def test_a_folder_of_ones_own_may_have_text_and_refuses_python_objects(tmp_path):
    folder = tmp_path / "animals"
    folder.mkdir()
    for part, n in (("train", 30), ("test", 6)):
        np.save(folder / f"{part}_inputs.npy", INPUTS[:n])
        np.save(folder / f"{part}_labels.npy", NAMES[CLASSES][:n])
    assert load_dataset(str(folder)).class_names == SORTED
    np.save(folder / "train_labels.npy", NAMES[CLASSES].astype(object))
    with pytest.raises(SpecError, match=r"train_labels\.npy, .* nothing is unpickled; .*labels\.astype\(str\)"):
        load_dataset(str(folder))


def test_arrays_are_read_as_before_where_a_run_was_created_so(tmp_path):
    parts = {"train_inputs": INPUTS, "test_inputs": INPUTS[:6]}
    np.savez(tmp_path / "gaps.npz", **parts, train_labels=CLASSES * 2, test_labels=CLASSES[:6] * 2)
    before, now = (load_dataset(str(tmp_path / "gaps.npz"), as_before=old) for old in (True, False))
    assert (before.n_classes, now.n_classes) == (5, 3)
    assert (before.scaling, before.class_names) == (None, None)
    np.savez(tmp_path / "whole.npz", **parts, train_labels=CLASSES * 1.0, test_labels=CLASSES[:6] * 1.0)
    assert load_dataset(str(tmp_path / "whole.npz"), as_before=True).is_regression
