import numpy as np
import pytest

from dmpipeline.errors import SpecError
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.fitting.readings import find_space


def written(*, alpha, noise=0.5, n_models=60, n_targets=5, seed=0):
    """Weights as a file holds them, with the masks and outputs of models whose size is alpha of all examples."""
    rng = np.random.default_rng(seed)
    masks = rng.random((n_models, 80)).argsort(axis=1) < round(80 * alpha)
    weight = (rng.standard_normal((80, n_targets)) * (rng.random((80, n_targets)) < 0.3)).astype(np.float32)
    raw = Datamodels(weight=weight, bias=np.full(n_targets, 2, np.float32), lam=np.ones(n_targets, np.float32))
    outputs = masks @ weight + 2 + noise * rng.standard_normal((n_models, n_targets))
    return raw, masks, outputs.astype(np.float16)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 0.75])
@pytest.mark.parametrize("space", ["raw", "standardised"])
@pytest.mark.parametrize("claimed", ["raw", "standardised"])
def test_either_space_is_found_whatever_the_file_claims(alpha, space, claimed):
    raw, masks, outputs = written(alpha=alpha)
    datamodels = raw if space == "raw" else raw.to_standardised(mean=alpha)
    reading = find_space(datamodels.read_as(claimed), masks, outputs)
    assert reading.space == space
    assert reading.is_sure
    assert reading.share_of_targets == 1
    assert f"surely {space}" in str(reading)
    own, other = (reading.mse_raw, reading.mse_standardised)[:: 1 if space == "raw" else -1]
    assert own == pytest.approx(0.25, rel=0.3)
    assert other > 2 * own


def test_each_examples_own_share_of_subsets_may_be_given():
    raw, masks, outputs = written(alpha=0.5)
    mean = np.random.default_rng(1).uniform(0.3, 0.7, 80)
    assert find_space(raw.to_standardised(mean=mean), masks, outputs, mean=mean).mse_standardised < 0.3


def test_weights_that_foresee_nothing_are_in_no_sure_space():
    raw, masks, outputs = written(alpha=0.5, n_models=12)
    noise = np.random.default_rng(2).standard_normal(outputs.shape)
    tiny = Datamodels(weight=raw.weight * 1e-3, bias=np.zeros(5, np.float32), lam=raw.lam)
    reading = find_space(tiny, masks, noise)
    assert not reading.is_sure
    assert "perhaps" in str(reading)


def test_models_that_do_not_fit_or_are_too_few_are_refused():
    raw, masks, outputs = written(alpha=0.5)
    with pytest.raises(SpecError, match="do not fit datamodels of 80 examples and 5 targets"):
        find_space(raw, masks, outputs[:, :4])
    with pytest.raises(SpecError, match="at least 10"):
        find_space(raw, masks[:9], outputs[:9])
