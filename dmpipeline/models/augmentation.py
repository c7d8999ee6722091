"""Pictures as models see them: normalised, flipped, shifted and cut out at random, and in several views at test time.

What happens to an example in an epoch is one word of 64 random bits, drawn by counter like everything else, so a model
sees the same pictures wherever and together with whichever others it is trained. Everything here works on whole
batches, of one model or of many, on any device.
"""

import functools

import numpy as np
import numpy.typing as npt
import torch

from dmpipeline.draws.masks import Purpose, draw_bits
from dmpipeline.models.recipes import Recipe

# Fields of a word, by their lowest bit. A choice among k is (field * k) >> FIELD_BITS: of 2**15 values, some choices
# have one more than others, so that probabilities differ by less than k / 2**15 of themselves: 0.1% for 32 places.
FIELD_BITS = 15
SHIFT, SHIFT_ACROSS, CUTOUT_TOP, CUTOUT_LEFT = 0, 15, 30, 45
FLIP = 60


def draw_augmentation(
    seed: int, model_index: int, orders: npt.NDArray[np.int64], recipe: Recipe
) -> npt.NDArray[np.int64]:
    """Draw how each example is altered in each epoch.

    Parameters
    ----------
    seed, model_index : int
    orders : array of int64, shape (n_epochs, size)
        The order in which the model sees its subset, from `masks.draw_orders`.
    recipe : Recipe
        With `flip: alternating`, an example's flip is drawn for the first epoch and inverted in every other one.

    Returns
    -------
    words : array of int64, shape (n_epochs, size)
        The bits for example `orders[epoch, place]`, for `augmented`.
    """
    words = draw_bits(seed, Purpose.AUGMENTATION, model_index, orders.size).reshape(orders.shape)
    if recipe.flip == "alternating":
        by_example = np.argsort(orders, axis=1)
        first = (words[0] >> np.uint64(FLIP) & np.uint64(1))[by_example[0]]
        inverted = np.arange(len(orders), dtype=np.uint64)[:, None] % np.uint64(2)
        flips = np.empty_like(words)
        np.put_along_axis(flips, by_example, first ^ inverted, axis=1)
        words = words & ~np.uint64(1 << FLIP) | flips << np.uint64(FLIP)
    return words.view(np.int64)


def augmented(images: torch.Tensor, words: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Flip, shift and cut out pictures, in this order, as their words say.

    Parameters
    ----------
    images : float tensor, shape (n, channels, height, width)
        Normalised, so that zero, which fills what is shifted in and what is cut out, is the mean colour.
    words : int64 tensor, shape (n,)
        On the same device, from `draw_augmentation`.
    recipe : Recipe
        `flip` mirrors the width where the word says so. `translate` t shifts by -t..t pixels along each axis, all
        equally likely. `cutout` s blanks a square of s pixels a side wholly inside the picture; its upper left corner
        is at any of (height - s) x (width - s) places, as in ffcv, so the last row and column are never blanked.

    Returns
    -------
    images : float tensor, shape (n, channels, height, width)
        New, in the channels_last layout; `images` itself if the recipe alters nothing.
    """
    if recipe.flip == "none" and not recipe.translate and not recipe.cutout:
        return images
    pixels = images.permute(0, 2, 3, 1)  # a pixel's channels are moved together
    n, height, width, n_channels = pixels.shape
    if recipe.flip != "none" or recipe.translate:
        pad = recipe.translate
        tall, wide = height + 2 * pad, width + 2 * pad
        rows = torch.arange(height, device=words.device) + _choice(words, SHIFT, 2 * pad + 1)
        columns = torch.arange(width, device=words.device) + _choice(words, SHIFT_ACROSS, 2 * pad + 1)
        if recipe.flip != "none":
            # the padded picture is mirrored as a whole: padding is the same on both sides
            columns = torch.where((words >> FLIP & 1).bool()[:, None], wide - 1 - columns, columns)
        rows = rows + tall * torch.arange(n, device=words.device)[:, None]
        wanted = (wide * rows[:, :, None] + columns[:, None, :]).flatten()
        padded = torch.nn.functional.pad(pixels, (0, 0, pad, pad, pad, pad)).reshape(-1, n_channels)
        pixels = padded.index_select(0, wanted).reshape(n, height, width, n_channels)
    if recipe.cutout:
        side = recipe.cutout
        below = torch.arange(height, device=words.device) - _choice(words, CUTOUT_TOP, height - side)
        right = torch.arange(width, device=words.device) - _choice(words, CUTOUT_LEFT, width - side)
        blank = ((below >= 0) & (below < side))[:, :, None] & ((right >= 0) & (right < side))[:, None, :]
        pixels = pixels.masked_fill(blank[..., None], 0)
    return pixels.permute(0, 3, 1, 2)


def normalised(inputs: torch.Tensor, image_shape: tuple[int, ...], recipe: Recipe) -> torch.Tensor:
    """Turn inputs as they are stored into pictures as networks take them.

    Parameters
    ----------
    inputs : tensor of uint8 on 0..255, or of floats on 0..1, shape (n, ...)
        Whatever reshapes to (n, *image_shape).
    image_shape : tuple of int
        Height, width and perhaps channels, last.
    recipe : Recipe
        With its `mean` and `std`, each channel on 0..255 less its mean, over its deviation; without, on 0..1.

    Returns
    -------
    images : tensor of float32, shape (n, channels, height, width)
        On the device of `inputs`, in the channels_last layout.
    """
    images = inputs.reshape(len(inputs), *image_shape[:2], -1).permute(0, 3, 1, 2)
    stored_as_bytes = images.dtype == torch.uint8
    images = images.float()
    if recipe.mean is None or recipe.std is None:
        return images / 255 if stored_as_bytes else images
    if not stored_as_bytes:
        images = images * 255
    mean, std = (_constant(numbers, images.device) for numbers in (recipe.mean, recipe.std))
    return (images - mean) / std


def tta_views(images: torch.Tensor, recipe: Recipe) -> list[torch.Tensor]:
    """List the versions of pictures whose logits are averaged at test time.

    Parameters
    ----------
    images : float tensor, shape (n, channels, height, width)
    recipe : Recipe
        Its `tta`: `mirror` adds the mirror images; `channel_flip` adds the pictures with their channels reversed, which
        is what torch.fliplr does to this layout and the release's code therefore did.

    Returns
    -------
    views : list of tensors like `images`
    """
    match recipe.tta:
        case "none":
            return [images]
        case "mirror":
            return [images, images.flip(3)]
        case "channel_flip":
            return [images, images.flip(1)]


@functools.lru_cache(maxsize=16)
def _constant(numbers: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Put numbers, one a channel, on a device once: a copy in each step would have a GPU and its host wait."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.float32, device=device)[:, None, None]


def _choice(words: torch.Tensor, lowest_bit: int, n: int) -> torch.Tensor:
    """Choose from 0..n - 1 by a field of each word, (n_words, 1)."""
    field = words >> lowest_bit & (1 << FIELD_BITS) - 1
    return (field * n >> FIELD_BITS)[:, None]
