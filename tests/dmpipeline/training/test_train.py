import numpy as np
import pytest
import torch

from dmpipeline.data.datasets import load_dataset
from dmpipeline.draws.masks import draw_masks, draw_orders, draw_uniform
from dmpipeline.errors import TrainingError
from dmpipeline.models.recipes import Perceptron
from dmpipeline.training.train import GradientTrainer, Way

SMALL = Perceptron(hidden=12, epochs=3, batch_size=50)


PRODUCTS = Way("products", 64)


def trained(indices, recipe=SMALL, *, alpha=0.2, seed=5, way=PRODUCTS):
    digits = load_dataset("digits")
    numbers = np.array(indices, np.uint64)
    masks = draw_masks(seed, numbers, digits.n_train, alpha)
    trainer = GradientTrainer(digits, recipe, seed=seed, way=way)
    return trainer.train(masks, numbers, range(100, 100 + len(masks)))


def trained_plainly(index, recipe=SMALL, *, alpha=0.2, seed=5):
    """Train one model as a textbook would, by torch's own layers, autograd and optimizer; return its logits."""
    digits = load_dataset("digits")
    n_features, hidden, n_classes = digits.train_inputs.shape[1], recipe.hidden, digits.n_classes
    drawn = draw_uniform(seed, index, n_features * hidden + hidden + hidden * n_classes + n_classes)
    w1, b1, w2, b2 = np.split(drawn, np.cumsum([n_features * hidden, hidden, hidden * n_classes]))
    network = torch.nn.Sequential(
        torch.nn.Linear(n_features, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, n_classes)
    )
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor(w1.reshape(n_features, hidden).T / n_features**0.5))
        network[0].bias.copy_(torch.tensor(b1 / n_features**0.5))
        network[2].weight.copy_(torch.tensor(w2.reshape(hidden, n_classes).T / hidden**0.5))
        network[2].bias.copy_(torch.tensor(b2 / hidden**0.5))
    optimizer = torch.optim.SGD(network.parameters(), lr=recipe.lr, momentum=recipe.momentum)
    subset = np.flatnonzero(draw_masks(seed, np.array([index], np.uint64), digits.n_train, alpha)[0])
    size = min(recipe.batch_size, len(subset))
    n_steps = recipe.epochs * (len(subset) // size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1 - step / n_steps if recipe.schedule == "linear" else 1
    )
    for order in draw_orders(seed, index, subset, recipe.epochs):
        for start in range(0, len(order) - size + 1, size):
            batch = order[start : start + size]
            optimizer.zero_grad()
            logits = network(torch.tensor(digits.train_inputs[batch]))
            torch.nn.functional.cross_entropy(logits, torch.tensor(digits.train_labels[batch])).backward()
            optimizer.step()
            scheduler.step()
    with torch.no_grad():
        return network(torch.tensor(digits.train_inputs)).numpy(), network(torch.tensor(digits.test_inputs)).numpy()


@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize("index", [0, 3])
def test_hand_written_gradients_train_the_model_that_autograd_trains(index, schedule):
    recipe = Perceptron(hidden=12, epochs=6, batch_size=50, schedule=schedule)
    together = trained([9, 3, 0, 4], recipe)
    place = [9, 3, 0, 4].index(index)
    train, test = trained_plainly(index, recipe)
    assert np.abs(test).max() > 2  # it has moved well away from where it began
    np.testing.assert_allclose(together.train[place], train, atol=0.02)
    np.testing.assert_allclose(together.test[place], test, atol=0.02)


def test_a_subset_smaller_than_a_batch_is_one_batch():
    recipe = Perceptron(hidden=6, epochs=2, batch_size=500)
    np.testing.assert_allclose(trained([1], recipe).test[0], trained_plainly(1, recipe)[1], atol=0.01)


@pytest.mark.parametrize(("hidden", "batch_size"), [(12, 50), (64, 64), (7, 33)])
def test_a_model_is_the_same_to_the_bit_whichever_others_are_trained_with_it(hidden, batch_size):
    recipe = Perceptron(hidden=hidden, epochs=2, batch_size=batch_size)
    many = trained(range(PRODUCTS.n_models + 3), recipe)
    for others in ([17], [PRODUCTS.n_models + 1, 17], [1, 2, 3, 4, 5, 17, 6], range(16, 16 + 41)):
        few = trained(others, recipe)
        place = list(others).index(17)
        assert (many.test[17] == few.test[place]).all()
        assert (many.train[17] == few.train[place]).all()


def test_the_number_of_threads_changes_nothing_and_is_left_as_it_was():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = trained(range(5))
        torch.set_num_threads(3)
        shared = trained(range(5))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert (alone.test == shared.test).all()


def test_logits_have_the_shapes_and_dtype_that_are_stored():
    logits = trained([1, 2, 3])
    assert logits.train.shape == (3, 1437, 10)
    assert logits.test.shape == (3, 360, 10)
    assert logits.train.dtype == logits.test.dtype == np.float16


def test_retrainings_of_one_subset_differ():
    digits = load_dataset("digits")
    masks = np.repeat(draw_masks(0, np.array([0], np.uint64), digits.n_train, 0.2), 2, axis=0)
    trainer = GradientTrainer(digits, SMALL, seed=0, way=PRODUCTS)
    logits = trainer.train(masks, np.array([0, 1], np.uint64), range(2)).test
    assert (logits[0] != logits[1]).mean() > 0.9


def test_the_full_recipe_learns_digits():
    digits = load_dataset("digits")
    logits = trained(range(4), Perceptron(), alpha=0.5)
    assert (logits.test.argmax(-1) == digits.test_labels).mean() > 0.93


@pytest.mark.parametrize("lr", [1e6, 1e30])
def test_a_model_that_diverges_is_named_by_its_row(lr):
    with pytest.raises(TrainingError, match="lower the recipe's lr") as caught:
        trained([0, 1], Perceptron(hidden=12, epochs=2, lr=lr))
    assert set(caught.value.rows) <= {100, 101}
    assert caught.value.rows
