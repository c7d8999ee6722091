import numpy as np
import pytest
import torch

from dmpipeline.draws.masks import draw_orders
from dmpipeline.models.augmentation import augmented, draw_augmentation, normalised, tta_views
from dmpipeline.models.recipes import CIFAR_MEAN, CIFAR_STD, ConvNet, Perceptron, Resnet9Release

SUBSET = np.array([2, 3, 5, 7, 11, 13, 17, 19, 23, 29])


def words_of(n, recipe, *, seed=1, index=2):
    orders = draw_orders(seed, index, np.arange(n), 1)
    return torch.from_numpy(draw_augmentation(seed, index, orders, recipe)[0])


def altered_slowly(image, word, recipe):
    """Alter one picture (channels, height, width) pixel by pixel, from the fields that a word is documented to have."""
    word = int(word) & (2**64 - 1)
    down, right, top, left = (word // 2**place % 2**15 for place in (0, 15, 30, 45))
    height, width = image.shape[1:]
    down, right = (part * (2 * recipe.translate + 1) // 2**15 - recipe.translate for part in (down, right))
    if recipe.flip != "none" and word // 2**60 % 2:
        image = image[:, :, ::-1]
    result = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            if 0 <= row + down < height and 0 <= column + right < width:
                result[:, row, column] = image[:, row + down, column + right]
    if recipe.cutout:
        top, left = top * (height - recipe.cutout) // 2**15, left * (width - recipe.cutout) // 2**15
        result[:, top : top + recipe.cutout, left : left + recipe.cutout] = 0
    return result


@pytest.mark.parametrize(
    "options",
    [
        {"flip": "random"},
        {"translate": 2},
        {"cutout": 3},
        {"flip": "random", "translate": 1},
        {"flip": "random", "translate": 3, "cutout": 2},
        {"flip": "alternating", "translate": 2, "cutout": 4},
    ],
)
@pytest.mark.parametrize("shape", [(3, 9, 9), (1, 6, 11), (2, 12, 7)])
def test_pictures_are_altered_as_one_by_one(options, shape):
    recipe = ConvNet(**options)
    images = torch.randn(300, *shape)
    words = words_of(300, recipe)
    expected = np.stack([altered_slowly(*pair, recipe) for pair in zip(images.numpy(), words, strict=True)])
    before = images.clone()
    np.testing.assert_array_equal(augmented(images, words, recipe).numpy(), expected)
    assert (images == before).all()


def test_a_batch_is_altered_as_its_parts_and_in_its_own_dtype():
    recipe = Resnet9Release()
    images, words = torch.randn(64, 3, 32, 32).half(), words_of(64, recipe)
    whole = augmented(images, words, recipe)
    parts = [augmented(images[start : start + 16], words[start : start + 16], recipe) for start in range(0, 64, 16)]
    assert whole.dtype == torch.float16
    assert (whole == torch.cat(parts)).all()
    assert whole.is_contiguous(memory_format=torch.channels_last)


def test_a_recipe_that_alters_nothing_gives_the_pictures_themselves():
    images = torch.randn(5, 1, 8, 8)
    assert augmented(images, words_of(5, Perceptron()), Perceptron()) is images


def test_shifts_and_places_are_equally_likely_and_independent():
    recipe = ConvNet(flip="random", translate=2, cutout=2)
    n = 100_000
    words = words_of(n, recipe)
    dot = torch.zeros(n, 1, 7, 7)
    dot[:, :, 3, 3] = 1
    shifted = augmented(dot, words, ConvNet(flip="random", translate=2)).flatten(1)
    at = shifted.argmax(1).numpy()
    counts = np.bincount(at, minlength=49).reshape(7, 7)
    assert (shifted.sum(1) == 1).all()
    assert (counts[1:6, 1:6].sum(), counts.sum()) == (n, n)
    assert ((counts[1:6, 1:6] - n / 25) ** 2 / (n / 25)).sum() < 60  # 99.99% of chi-square with 24 degrees
    holes = augmented(torch.ones(n, 1, 7, 7), words, ConvNet(cutout=2)).flatten(1)
    assert (holes.sum(1) == 45).all()
    corner = holes.argmin(1).numpy()
    places = np.bincount(corner, minlength=49).reshape(7, 7)
    assert places[:5, :5].sum() == n  # the last row and column are never blanked
    assert ((places[:5, :5] - n / 25) ** 2 / (n / 25)).sum() < 60
    left = torch.zeros(n, 1, 7, 7)
    left[:, :, 3, 0] = 1
    flipped = augmented(left, words, ConvNet(flip="random"))[:, 0, 3, 6].numpy()
    assert abs(flipped.mean() - 0.5) < 4 * 0.5 / n**0.5
    facts = np.array([at // 7, at % 7, corner // 7, corner % 7, flipped])
    assert np.abs(np.corrcoef(facts) - np.eye(5)).max() < 5 / n**0.5


def test_words_depend_on_seed_and_model_alone():
    recipe, orders = Resnet9Release(), draw_orders(3, 4, SUBSET, 5)
    words = draw_augmentation(3, 4, orders, recipe)
    assert words.shape == (5, 10)
    assert words.dtype == np.int64
    assert (words == draw_augmentation(3, 4, orders, recipe)).all()
    for seed, index in ((2, 4), (3, 5)):
        assert (words != draw_augmentation(seed, index, orders, recipe)).all()
    # later epochs alter none of the earlier ones
    assert (words[:2] == draw_augmentation(3, 4, orders[:2], recipe)).all()
    assert len(np.unique(words)) == words.size


def test_words_are_pinned_so_that_no_release_changes_a_row_unnoticed():
    orders = draw_orders(7, 3, SUBSET, 2)
    # Computed once by this code. Another value here means that runs made before can no longer be replayed.
    assert draw_augmentation(7, 3, orders, Resnet9Release())[1, :2].tolist() == [
        7764491680293902283,
        8677924368052844263,
    ]
    assert draw_augmentation(7, 3, orders, ConvNet(flip="alternating"))[1, :2].tolist() == [
        8917413184900749259,
        7525002863445997287,
    ]


def flips_by_example(recipe, n_epochs=6, *, index=0):
    orders = draw_orders(9, index, SUBSET, n_epochs)
    flips = draw_augmentation(9, index, orders, recipe) >> 60 & 1
    return np.array(
        [[flip[order == example][0] for example in SUBSET] for flip, order in zip(flips, orders, strict=True)]
    )


def test_an_alternating_flip_is_drawn_for_each_example_and_inverted_every_other_epoch():
    flips = np.stack([flips_by_example(ConvNet(flip="alternating"), index=index) for index in range(200)])
    assert (flips[:, 0] == flips[:, 2]).all()
    assert (flips[:, 0] == flips[:, 4]).all()
    assert (flips[:, 1::2] == 1 - flips[:, :1]).all()
    assert abs(flips[:, 0].mean() - 0.5) < 4 * 0.5 / 2000**0.5
    assert np.abs(flips[:, 0].mean(0) - 0.5).max() < 4 * 0.5 / 200**0.5


def test_a_random_flip_is_drawn_anew_in_each_epoch():
    flips = np.stack([flips_by_example(ConvNet(flip="random"), index=index) for index in range(200)])
    repeated = (flips[:, 1:] == flips[:, :-1]).mean()
    assert abs(repeated - 0.5) < 4 * 0.5 / 10_000**0.5


def test_alternating_changes_nothing_but_the_flip():
    orders = draw_orders(0, 0, SUBSET, 4)
    drawn, alternating = (draw_augmentation(0, 0, orders, ConvNet(flip=flip)) for flip in ("random", "alternating"))
    assert not ((drawn ^ alternating) & ~(1 << 60)).any()


def test_bytes_and_floats_of_one_picture_are_normalised_alike():
    stored = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), np.uint8)
    expected = ((stored.astype(float) - CIFAR_MEAN) / CIFAR_STD).transpose(0, 3, 1, 2)
    images = normalised(torch.from_numpy(stored), (5, 6, 3), Resnet9Release())
    assert (images.dtype, images.shape) == (torch.float32, (4, 3, 5, 6))
    np.testing.assert_allclose(images, expected, atol=1e-5)
    flat = torch.from_numpy((stored / 255).astype(np.float32).reshape(4, -1))
    np.testing.assert_allclose(normalised(flat, (5, 6, 3), Resnet9Release()), expected, atol=1e-5)


def test_without_a_mean_pictures_are_on_zero_to_one():
    stored = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    images = normalised(stored, (16, 16), ConvNet())
    assert images.shape == (1, 1, 16, 16)
    assert (images.min(), images.max()) == (0, 1)
    floats = torch.rand(3, 16)
    assert (normalised(floats, (4, 4), ConvNet()) == floats.reshape(3, 1, 4, 4)).all()


def test_what_is_shifted_in_or_cut_out_is_the_mean_colour():
    recipe = Resnet9Release(flip="none")
    images = normalised(torch.full((50, 32, 32, 3), 255, dtype=torch.uint8), (32, 32, 3), recipe)
    filled = augmented(images, words_of(50, recipe), recipe).permute(0, 2, 3, 1)
    stored = filled * torch.tensor(CIFAR_STD) + torch.tensor(CIFAR_MEAN)
    mean = (stored - torch.tensor(CIFAR_MEAN)).abs().amax(-1) < 1e-3
    assert (mean | ((stored - 255).abs().amax(-1) < 1e-3)).all()
    assert (mean.flatten(1).sum(1) >= 16).all()


def test_the_release_averages_over_reversed_channels_and_mirror_is_what_was_meant():
    images = torch.randn(2, 3, 4, 4)
    (alone,) = tta_views(images, ConvNet())
    assert alone is images
    first, reversed_channels = tta_views(images, Resnet9Release())
    assert first is images
    assert (reversed_channels == torch.fliplr(images)).all()
    assert (reversed_channels[:, 0] == images[:, 2]).all()
    _, mirrored = tta_views(images, Resnet9Release(tta="mirror"))
    assert (mirrored[..., 0] == images[..., 3]).all()
    assert (mirrored[:, 0] == images[:, 0].flip(-1)).all()
