import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from dmpipeline.data.examples import checked_dataset
from dmpipeline.errors import SpecError
from dmpipeline.models.outputs import (
    LARGEST_LOGIT,
    check_outputs,
    correct_class_margins,
    default_outputs,
    dims_of,
    log_likelihoods,
    output_of,
    predicted_labels,
    squared_errors,
)
from dmpipeline.spec import RunSpec


@given(
    shape=st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(2, 5)),
    dtype=st.sampled_from([np.float16, np.float32]),
    seed=st.integers(0, 1000),
)
def test_a_margin_is_the_true_logit_less_the_largest_other(shape, dtype, seed):
    rng = np.random.default_rng(seed)
    # few distinct values, so that ties between classes occur
    logits = rng.integers(-3, 4, shape).astype(dtype) * dtype(1.5)
    labels = rng.integers(0, shape[2], shape[1])
    margins = correct_class_margins(logits, labels)
    assert margins.shape == shape[:2]
    assert margins.dtype == np.float32
    for model in range(shape[0]):
        for example, label in enumerate(labels):
            others = np.delete(logits[model, example].astype(np.float32), label)
            assert margins[model, example] == np.float32(logits[model, example, label]) - others.max()


def test_no_margin_is_made_of_what_is_not_a_number():
    logits = np.zeros((4, 1, 3), np.float16)
    logits[range(3), 0, range(3)] = np.nan
    assert np.isnan(correct_class_margins(logits, np.array([1]))[:, 0]).tolist() == [True, True, True, False]


def test_logits_are_left_as_they_were():
    logits = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    before = logits.copy()
    correct_class_margins(logits, np.array([0, 2]))
    assert (logits == before).all()


def test_float16_logits_are_widened_before_they_are_subtracted():
    logits = np.array([[[2048, 0.5]]], np.float16)
    assert correct_class_margins(logits, np.array([0]))[0, 0] == 2047.5


def test_logits_within_the_bound_have_margins_within_float16():
    logits = np.array([[[LARGEST_LOGIT, -LARGEST_LOGIT]]], np.float16)
    assert np.isfinite(correct_class_margins(logits, np.array([0])).astype(np.float16)).all()
    assert float(logits.max()) == LARGEST_LOGIT


@pytest.mark.parametrize(
    ("logits_shape", "labels"),
    [((2, 3, 4), [0, 1]), ((2, 3, 1), [0, 0, 0]), ((3,), [0, 1, 2]), ((2, 2, 3), [0, 3]), ((2, 2, 3), [0, -1])],
)
def test_labels_that_do_not_belong_to_the_logits_are_refused(logits_shape, labels):
    with pytest.raises(SpecError):
        correct_class_margins(np.zeros(logits_shape, np.float32), np.array(labels))


def test_labels_that_are_no_integers_are_refused():
    with pytest.raises(SpecError, match="integers"):
        correct_class_margins(np.zeros((1, 2, 3), np.float32), np.array([0.0, 1.0]))


def dataset(labels, inputs=None):
    inputs = np.zeros((len(labels), 3)) if inputs is None else inputs
    return checked_dataset("made", (inputs, labels), (inputs[:2], labels[:2]), source="made", example_order="as made")


CLASSES = dataset(np.array([0, 1, 2, 0]))
ONE_NUMBER, TWO_NUMBERS = dataset(np.ones(4)), dataset(np.ones((4, 2)))
SEQUENCES = dataset(np.array([[0, 1, 2, -1]] * 4), np.zeros((4, 4), int))


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(2, 6)),
    dtype=st.sampled_from([np.float16, np.float32]),
    scale=st.sampled_from([1, 100, 10_000]),
    seed=st.integers(0, 1000),
)
def test_a_log_likelihood_is_the_log_of_the_true_classes_softmax(shape, dtype, scale, seed):
    rng = np.random.default_rng(seed)
    logits = (scale * rng.normal(size=shape)).clip(-60_000, 60_000).astype(dtype)
    labels = rng.integers(0, shape[2], shape[1])
    found = log_likelihoods(logits, labels)
    assert found.shape == shape[:2]
    assert found.dtype == np.float32
    expected = log_softmax(logits.astype(np.float64), -1)[:, np.arange(shape[1]), labels]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert (found <= 0).all()


def test_a_sequences_log_likelihood_is_the_sum_of_its_tokens_and_the_rest_counts_for_nothing():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4, 5, 6)).astype(np.float16)
    labels = rng.integers(-1, 6, (4, 5))
    found = log_likelihoods(logits, labels)
    for model in range(3):
        for example in range(4):
            wide = log_softmax(logits[model, example].astype(np.float64), -1)
            expected = sum(wide[place, token] for place, token in enumerate(labels[example]) if token >= 0)
            assert found[model, example] == pytest.approx(expected, rel=1e-6)
    disturbed = np.where((labels < 0)[None, ..., None], np.float16(9) * logits, logits)
    assert (log_likelihoods(disturbed, labels) == found).all()


def test_a_predicted_label_is_the_first_of_the_largest_logits():
    logits = np.array([[[1, 3, 3], [5, 5, 0]]], np.float16)
    assert predicted_labels(logits).tolist() == [[1, 0]]
    assert predicted_labels(logits).dtype == np.int32
    assert predicted_labels(np.zeros((2, 3, 4, 5), np.float16)).shape == (2, 3, 4)


@pytest.mark.parametrize(("labels_shape", "k"), [((4,), 1), ((4, 1), 1), ((4, 2), 2)])
def test_a_squared_error_is_averaged_over_an_examples_numbers(labels_shape, k):
    rng = np.random.default_rng(0)
    predictions, labels = rng.normal(size=(3, 4, k)).astype(np.float32), rng.normal(size=labels_shape)
    found = squared_errors(predictions, labels)
    assert found.shape == (3, 4)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, ((predictions - labels.reshape(4, k)) ** 2).mean(-1), rtol=1e-6)


def test_predictions_have_an_axis_for_numbers_only_where_labels_have():
    raw = np.ones((3, 4, 1), np.float32)
    assert output_of("test_predictions")(raw, np.ones(4)).shape == (3, 4)
    assert output_of("test_predictions")(raw, np.ones((4, 1))).shape == (3, 4, 1)


@pytest.mark.parametrize(
    ("array", "of", "dims"),
    [
        ("train_margins", CLASSES, {"train_example": 4}),
        ("test_logits", CLASSES, {"test_example": 2, "class": 3}),
        ("test_predicted_labels", CLASSES, {"test_example": 2}),
        ("test_log_likelihoods", SEQUENCES, {"test_example": 2}),
        ("test_logits", SEQUENCES, {"test_example": 2, "position": 4, "class": 3}),
        ("train_predicted_labels", SEQUENCES, {"train_example": 4, "position": 4}),
        ("train_predictions", ONE_NUMBER, {"train_example": 4}),
        ("train_predictions", TWO_NUMBERS, {"train_example": 4, "number": 2}),
        ("test_squared_errors", TWO_NUMBERS, {"test_example": 2}),
    ],
)
def test_dimensions_are_those_of_what_is_measured(array, of, dims):
    assert dims_of(array, of) == dims
    n = of.n_train if array.startswith("train") else of.n_test
    positions = of.train_labels.shape[1:] if of.is_sequence else ()
    raw = np.zeros((5, n, *positions, of.n_classes), np.float32 if of.is_regression else np.float16)
    labels = of.train_labels if array.startswith("train") else of.test_labels
    measured = output_of(array)(raw, labels)
    assert measured.shape == (5, *dims.values())
    assert measured.dtype == output_of(array).dtype


@pytest.mark.parametrize(
    ("arrays", "of", "words"),
    [
        (("test_margins",), SEQUENCES, "sequences.*log_likelihoods"),
        (("train_logits",), ONE_NUMBER, "numbers.*squared_errors, predictions"),
        (("test_margins", "train_squared_errors"), CLASSES, "outputs squared_errors.*classes.*margins, logits"),
        (("test_predictions",), SEQUENCES, "outputs predictions.*sequences"),
    ],
)
def test_outputs_that_models_do_not_have_are_refused_naming_what_they_have(arrays, of, words):
    with pytest.raises(SpecError, match=words):
        check_outputs(arrays, of)


@pytest.mark.parametrize("of", [CLASSES, ONE_NUMBER, TWO_NUMBERS, SEQUENCES])
def test_what_is_stored_by_default_is_always_possible(of):
    check_outputs(RunSpec(outputs=default_outputs(of)).arrays[1:], of)
