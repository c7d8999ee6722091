"""The arrays of a ``.npz``: each is a ``.npy`` in a zip archive, read in place where it is stored as it is."""

from dataclasses import dataclass, replace

from dmdata.errors import FormatError
from dmdata.layout.archives import DAMAGED_ZIP, Archive, Member
from dmdata.layout.layouts import Layout, ReadAt, listed
from dmdata.layout.npy import NPY_PREFIX_BYTES, npy_layout

NPZ_HEAD_BYTES = 4096
"""What is read first of a ``.npz``: all of a small one, and the header of the first array of any."""

# what numpy writes before a member's data: a fixed part, the 64-bit sizes, and the name
_USUAL_LOCAL_HEADER_BYTES = 30 + 20 + 64


@dataclass(frozen=True, slots=True)
class Npz:
    """What a ``.npz`` holds.

    Attributes
    ----------
    names : tuple of str
        Of all arrays, without ".npy", in the order of the file.
    layouts : dict of str to Layout
        Of those that were asked for.
    """

    names: tuple[str, ...]
    layouts: dict[str, Layout]


def npz_arrays(read_at: ReadAt, *, object_bytes: int, url: str, wanted: str | None = None) -> Npz:
    """Find the arrays of a ``.npz`` object as ``np.savez`` writes it.

    Parameters
    ----------
    read_at : callable
        Called for the zip directory at the end, and for the header of each array that is asked for.
    object_bytes : int
    url : str
        Names the object in errors.
    wanted : str, optional
        The only array to look at, with or without ".npy"; by default all of them.

    Raises
    ------
    FormatError
        If the object is damaged, an array is compressed (as by ``np.savez_compressed``) or holds objects.
    """
    try:
        archive = Archive(read_at, object_bytes=object_bytes, url=url)
        members = {
            name.removesuffix(".npy"): member for name, member in archive.members.items() if name.endswith(".npy")
        }
        if not members:
            raise FormatError(
                f"{url} is a zip archive that holds no .npy, not a .npz saved by NumPy ({listed(archive.members)})",
                url=url,
            )
        asked = members if wanted is None else [wanted if wanted in members else wanted.removesuffix(".npy")]
        names = [name for name in asked if name in members]
        layouts = {name: _placed(members[name], read_at, f"{url}/{name}", url) for name in names}
        return Npz(tuple(members), layouts)
    except FormatError:
        raise
    except DAMAGED_ZIP as error:
        raise FormatError(f"{url} is not a readable .npz ({str(error)[:200]}); fetch it again", url=url) from error


def _placed(member: Member, read_at: ReadAt, shown: str, url: str) -> Layout:
    if not member.is_stored:
        raise FormatError(
            f"{shown} is compressed or encrypted, so its elements cannot be read in place; load it by np.load and save "
            "it by np.savez instead of np.savez_compressed, or download the whole file",
            url=url,
        )
    offset = member.info.header_offset
    # one read for the header of the zip and that of the array
    head = bytes(read_at(offset, min(offset + _USUAL_LOCAL_HEADER_BYTES + NPY_PREFIX_BYTES, member.stop)))
    start = member.start_by(head, url)

    def read_inside(first: int, stop: int) -> bytes:
        first, stop = start + first, start + min(stop, member.info.file_size)
        return head[first - offset : stop - offset] if stop - offset <= len(head) else bytes(read_at(first, stop))

    try:
        layout = npy_layout(read_inside, object_bytes=member.info.file_size, url=shown)
    except FormatError as error:
        raise error.reworded(str(error), url=url) from error
    return replace(layout, offset=start + layout.offset)
