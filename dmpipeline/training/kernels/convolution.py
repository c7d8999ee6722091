# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# compiled kernels take their types from what they are called with

"""Convolutions of many models' pictures, and their gradients, which visit only what has an error.

Pictures lie with channels last and a border of zeros, so that the numbers under a row of a filter are one run of
memory: `taps * channels` numbers, in whole lines. Going forward a filter line's sums over four places at once are held
in registers. Going back, an output without an error is skipped: of four places that are pooled three have none, and the
fourth has none where it was not positive. That is why this beats matrix products of patches, which are also never made.
"""

from typing import NamedTuple

import numpy as np

from dmpipeline.compute import kernel
from dmpipeline.training.kernels.lines import (
    LINE,
    constant,
    load,
    multiply_add,
    spread,
    store,
    store_bytes,
    where_larger,
)

GROUP = 3
"""Lines of a filter that are taken together: as many as registers hold, with what is added to them."""


class Form(NamedTuple):
    """Sizes of a convolution that keeps the size of its pictures.

    Attributes
    ----------
    height, width, channels : int
        Of the pictures that come in. Channels are whole lines, but for those of a network's inputs.
    taps : int
        A filter's height and width, odd.
    n_outputs : int
        Channels that go out.
    """

    height: int
    width: int
    channels: int
    taps: int
    n_outputs: int


class Units(NamedTuple):
    """Room for the outputs of some pictures that have an error, one channel at a time.

    Attributes
    ----------
    corners : array of int64
        Where the numbers that an output was made of begin, in its picture.
    errors : array of float32
    """

    corners: np.ndarray
    errors: np.ndarray


@kernel
def row_size(form):
    """Count the numbers of a picture's row with its border."""
    return (form.width + form.taps - 1) * form.channels


def bordered_size(form: Form, n_pictures: int) -> int:
    """Count the numbers of pictures with borders, and of what is read beyond them by lines that begin within."""
    border = form.taps - 1
    return (n_pictures * (form.height + border) * (form.width + border) + 3) * form.channels + LINE


def filter_lines(form: Form) -> np.ndarray:
    """Return where the lines of a filter meet a picture, as distances from the filter's corner, in whole groups.

    A filter lies row by row, each in whole lines. What fills up a group lies at 0.
    """
    row, run = row_size(form), form.taps * form.channels
    places = [y * row + start for y in range(form.taps) for start in range(0, run, LINE)]
    return np.array(places + [0] * (-len(places) % GROUP), np.int64)


def learned_numbers(form: Form) -> np.ndarray:
    """Return which numbers of a filter's lines are learned, as ones; the others only fill up lines and groups."""
    run = form.taps * form.channels
    rows = np.zeros((form.taps, -(-run // LINE) * LINE), np.float32)
    rows[:, :run] = 1
    return np.pad(rows.ravel(), (0, -rows.size % (GROUP * LINE)))


def corners_of_places(form: Form, window: int) -> np.ndarray:
    """Return where the first filter of each window lies in its picture; a window of 1 is a place."""
    row: int = row_size(form)
    corners = np.arange(0, form.height - window + 1, window)[:, None] * row
    return (corners + np.arange(0, form.width - window + 1, window) * form.channels).ravel()


def steps_to_winners(form: Form) -> np.ndarray:
    """Return how far each of a window's four places lies from its first; 0 for a window without a winner."""
    row = row_size(form)
    return np.array([0, 0, form.channels, row, row + form.channels])


@kernel
def border(pictures, form, bordered):
    """Copy pictures, shape (n, height * width * channels), into a flat array of them with borders."""
    row = row_size(form)
    first = form.taps // 2 * (row + form.channels)
    for n in range(len(pictures)):
        for y in range(form.height):
            source = pictures[n, y * form.width * form.channels :]
            target = bordered[(n * (form.height + form.taps - 1) + y) * row + first :]
            for i in range(form.width * form.channels):
                target[i] = source[i]


@kernel
def convolve(bordered, form, weights, biases, filters, out):
    """Compute outputs, shape (n_models, batch, height * width, n_outputs in whole lines)."""
    row = row_size(form)
    n_models, batch, _, n_padded = out.shape
    for model in range(n_models):
        _lay_filters(weights[model], form, filters)
        for n in range(batch):
            picture = (model * batch + n) * (form.height + form.taps - 1) * row
            for y in range(form.height):
                for x in range(0, form.width, 4):
                    corner = picture + y * row + x * form.channels
                    place = (model * batch + n) * form.height * form.width + y * form.width + x
                    for channel in range(0, n_padded, LINE):
                        bias = load(biases, model * n_padded + channel)
                        a, b, c, d = _four_sums(
                            bordered, corner, form.channels, 2 * form.channels, form, filters, channel, bias
                        )
                        store(out, place * n_padded + channel, a)
                        if x + 1 < form.width:
                            store(out, (place + 1) * n_padded + channel, b)
                        if x + 2 < form.width:
                            store(out, (place + 2) * n_padded + channel, c)
                        if x + 3 < form.width:
                            store(out, (place + 3) * n_padded + channel, d)


@kernel
def convolve_and_pool(bordered, form, weights, biases, filters, is_rectified, pooled, winners):
    """Compute the largest of each window of 2 x 2 outputs, and which of the four it is, -1 if it is rectified away.

    Both have shape (n_models, batch, height // 2 * (width // 2), n_outputs in whole lines); winners are int8.
    """
    row = row_size(form)
    n_models, batch, n_windows, n_padded = pooled.shape
    across = form.width // 2
    none, zero, one = constant(np.float32(-1)), constant(np.float32(0)), constant(np.float32(1))
    two, three = constant(np.float32(2)), constant(np.float32(3))
    for model in range(n_models):
        _lay_filters(weights[model], form, filters)
        for n in range(batch):
            picture = (model * batch + n) * (form.height + form.taps - 1) * row
            for y in range(form.height // 2):
                for x in range(across):
                    corner = picture + 2 * (y * row + x * form.channels)
                    window = (model * batch + n) * n_windows + y * across + x
                    for channel in range(0, n_padded, LINE):
                        bias = load(biases, model * n_padded + channel)
                        a, b, c, d = _four_sums(bordered, corner, form.channels, row, form, filters, channel, bias)
                        above, below = where_larger(b, a, b, a), where_larger(d, c, d, c)
                        winner = where_larger(
                            below, above, where_larger(d, c, three, two), where_larger(b, a, one, zero)
                        )
                        largest = where_larger(below, above, below, above)
                        if is_rectified:
                            winner = where_larger(largest, zero, winner, none)
                            # what is not a number is kept, so that it is seen
                            largest = where_larger(zero, largest, zero, largest)
                        store(pooled, window * n_padded + channel, largest)
                        store_bytes(winners, window * n_padded + channel, winner)


@kernel
def _four_sums(bordered, corner, across, down, form, filters, channel, bias):
    """Apply a line of filters where they begin at a corner, one step across, one down, and one of both."""
    row, run = row_size(form), form.taps * form.channels
    a = b = c = d = bias
    place = channel * form.taps * run
    for y in range(form.taps):
        for i in range(corner + y * row, corner + y * row + run):
            weight = load(filters, place)
            a = multiply_add(spread(bordered, i), weight, a)
            b = multiply_add(spread(bordered, i + across), weight, b)
            c = multiply_add(spread(bordered, i + down), weight, c)
            d = multiply_add(spread(bordered, i + down + across), weight, d)
            place += LINE
    return a, b, c, d


@kernel
def _lay_filters(weights, form, filters):
    """Lay a model's filters, (n_outputs in whole lines, groups of lines), side by side by lines of outputs."""
    run = form.taps * form.channels
    padded_run = -(-run // LINE) * LINE
    for channel in range(len(weights)):
        first = channel // LINE * LINE * form.taps * run + channel % LINE
        for y in range(form.taps):
            source, target = weights[channel, y * padded_run :], filters[first + y * run * LINE :]
            for i in range(run):
                target[i * LINE] = source[i]


@kernel
def add_gradients(bordered, form, weights, errors, winners, tables, units, chunk, weight_sums, bias_sums, back, backs):
    """Add the gradients with respect to filters and biases, and compute those with respect to the pictures.

    Parameters
    ----------
    bordered : array of float32, flat
        The pictures of all models.
    form : Form
    weights : array of float32, shape (n_models, n_outputs in whole lines, groups of lines)
    errors : array of float32, shape (n_models, batch, places or windows, n_outputs in whole lines)
    winners : array of int8
        As `convolve_and_pool` returns them; empty where nothing is pooled.
    tables : tuple of arrays
        `filter_lines`, `learned_numbers`, `corners_of_places`, `steps_to_winners`.
    units : Units
        For all places of as many pictures as `chunk`, and one more.
    chunk : int
        Pictures at a time: as many as stay in a core's own cache.
    weight_sums, bias_sums : array of float32
        Of the shapes of `weights` and (n_models, n_outputs in whole lines).
    back : array of float32
        Room for the gradients of `chunk` pictures with their borders; empty where none are wanted.
    backs : array of float32, shape (n_models, batch, height * width * channels)
        Those of the pictures.
    """
    lines, learned, corners, steps = tables
    size = (form.height + form.taps - 1) * row_size(form)
    n_models, batch = errors.shape[:2]
    n_padded, filter_size = weights.shape[1:]
    for model in range(n_models):
        for start in range(0, batch, chunk):
            some = slice(start, min(start + chunk, batch))
            pictures = (model * batch + start) * size
            back[:] = 0
            for channel in range(form.n_outputs):
                if winners.size:
                    count = _list_winners(
                        errors[model, some, :, channel], winners[model, some, :, channel], size, corners, steps, units
                    )
                else:
                    count = _list_errors(errors[model, some, :, channel], size, corners, units)
                total = np.float32(0)
                for error in units.errors[:count]:
                    total += error
                bias_sums[model, channel] += total
                place = (model * n_padded + channel) * filter_size
                for group in range(0, len(lines), GROUP):
                    _visit(
                        bordered,
                        pictures,
                        weights,
                        place + group * LINE,
                        lines[group:],
                        learned,
                        group * LINE,
                        units,
                        count,
                        weight_sums,
                        back,
                    )
            if back.size:
                _take_inside(back, form, backs[model, some])


@kernel
def _list_winners(errors, winners, size, corners, steps, units):
    """List where the winners of a channel were, and their errors; windows of different pictures alternate.

    So two neighbours, whose gradients meet in the same numbers, are not added right after one another.
    """
    count = 0
    for window in range(errors.shape[1]):
        for n in range(len(errors)):
            winner = winners[n, window]
            units.corners[count] = n * size + corners[window] + steps[winner + 1]
            units.errors[count] = errors[n, window]
            count += winner >= 0
    return count


@kernel
def _list_errors(errors, size, corners, units):
    """List the places of a channel that have an error."""
    count = 0
    for place in range(errors.shape[1]):
        for n in range(len(errors)):
            units.corners[count] = n * size + corners[place]
            units.errors[count] = errors[n, place]
            count += errors[n, place] != 0
    return count


@kernel
def _visit(bordered, pictures, weights, place, lines, learned, first, units, count, weight_sums, back):
    """Add the gradients that three lines of a filter share with all outputs that have an error."""
    p, q, r = lines[0], lines[1], lines[2]
    weight_p, weight_q, weight_r = load(weights, place), load(weights, place + LINE), load(weights, place + 2 * LINE)
    sum_p = sum_q = sum_r = constant(np.float32(0))
    # two loops, for one that asked each time would be slower
    if back.size:
        for unit in range(count):
            corner, error = units.corners[unit], spread(units.errors, unit)
            sum_p = multiply_add(error, load(bordered, pictures + corner + p), sum_p)
            sum_q = multiply_add(error, load(bordered, pictures + corner + q), sum_q)
            sum_r = multiply_add(error, load(bordered, pictures + corner + r), sum_r)
            store(back, corner + p, multiply_add(error, weight_p, load(back, corner + p)))
            store(back, corner + q, multiply_add(error, weight_q, load(back, corner + q)))
            store(back, corner + r, multiply_add(error, weight_r, load(back, corner + r)))
    else:
        for unit in range(count):
            corner, error = pictures + units.corners[unit], spread(units.errors, unit)
            sum_p = multiply_add(error, load(bordered, corner + p), sum_p)
            sum_q = multiply_add(error, load(bordered, corner + q), sum_q)
            sum_r = multiply_add(error, load(bordered, corner + r), sum_r)
    _add(weight_sums, place, sum_p, learned, first)
    _add(weight_sums, place + LINE, sum_q, learned, first + LINE)
    _add(weight_sums, place + 2 * LINE, sum_r, learned, first + 2 * LINE)


@kernel
def _add(sums, place, line, learned, first):
    store(sums, place, multiply_add(line, load(learned, first), load(sums, place)))


@kernel
def _take_inside(bordered, form, pictures):
    """Copy what lies inside the borders into `pictures`: `border` turned round."""
    row = row_size(form)
    first = form.taps // 2 * (row + form.channels)
    for n in range(len(pictures)):
        for y in range(form.height):
            source = bordered[(n * (form.height + form.taps - 1) + y) * row + first :]
            target = pictures[n, y * form.width * form.channels :]
            for i in range(form.width * form.channels):
                target[i] = source[i]
