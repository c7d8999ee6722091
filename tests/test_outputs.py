import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmpipeline.errors import SpecError
from dmpipeline.outputs import LARGEST_LOGIT, correct_class_margins


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
