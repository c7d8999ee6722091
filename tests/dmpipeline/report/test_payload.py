import base64
import zlib

import numpy as np
import pytest

from dmpipeline.report.payload import packed


def test_arrays_are_packed_one_after_the_other_at_places_that_any_of_them_may_lie():
    arrays = {
        "a": np.arange(3, dtype=np.uint8),
        "b": np.array([[1.5, np.nan]], np.float32),
        "c": np.array([], np.int32),
    }
    text, places = packed(arrays)
    block = zlib.decompress(base64.b64decode(text))
    assert places["b"] == {"dtype": "f4", "shape": [1, 2], "offset": 8}
    assert all(place["offset"] % 8 == 0 for place in places.values())
    for name, array in arrays.items():
        read = np.frombuffer(block, array.dtype, array.size, places[name]["offset"]).reshape(array.shape)
        np.testing.assert_array_equal(read, array)


def test_an_array_that_the_script_cannot_read_is_refused():
    with pytest.raises(TypeError, match="array wide is of float64"):
        packed({"wide": np.zeros(2)})
