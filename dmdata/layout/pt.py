"""The tensors of a ``.pt`` or ``.pth``: where each lies in the zip archive that torch 1.6 and newer write.

torch is not needed, and of the archive only its directory and its pickle are read, which `dmdata.layout.pickles`
understands without running it.
"""

import math
from dataclasses import dataclass

from dmdata.errors import FormatError
from dmdata.layout.archives import DAMAGED_ZIP, Archive, Member
from dmdata.layout.layouts import Layout, ReadAt, is_possible
from dmdata.layout.pickles import Found, StoredTensor, Unreadable, fills_its_extent, pickled_tensors

PT_HEAD_BYTES = 4096
"""What is read first of a ``.pt``: the pickle of a few tensors, which torch writes before the first; a longer one is
read on. A request costs about as much as this many bytes."""

_LONGEST_PICKLE = 16 << 20
_LONGEST_NOTE = 4096
_USUAL_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Tensors:
    """What a ``.pt`` holds.

    Attributes
    ----------
    layouts : dict of str to Layout
        By path, in the order of the file.
    unreadable : dict of str to str
        Tensors that are not read, and why, as the end of a sentence.
    """

    layouts: dict[str, Layout]
    unreadable: dict[str, str]


def pt_layouts(read_at: ReadAt, *, object_bytes: int, url: str) -> dict[str, Layout]:
    """Find the tensors of a ``.pt`` object that are read in place; see `pt_tensors`.

    Returns
    -------
    layouts : dict of str to Layout
        By path, as "model/fc.weight"; "" for a lone tensor. In the order of the file.

    Raises
    ------
    FormatError
    """
    return pt_tensors(read_at, object_bytes=object_bytes, url=url).layouts


def pt_tensors(read_at: ReadAt, *, object_bytes: int, url: str) -> Tensors:
    """Find the tensors of a ``.pt`` object, saved by torch 1.6 or newer: a state_dict, or any nest of dicts and lists.

    Parameters
    ----------
    read_at : callable
        Called for the zip directory at the end, and the pickle at the start; where torch did not write the archive,
        for 30 bytes before each tensor.
    object_bytes : int
    url : str
        Names the object in errors.

    Raises
    ------
    FormatError
        If the object is damaged, compressed, of the form before torch 1.6, a whole model, or none of its tensors can be
        read in place. The pickle is never run.
    """
    try:
        archive = Archive(read_at, object_bytes=object_bytes, url=url)
        return _found(archive, url)
    except FormatError:
        raise
    except DAMAGED_ZIP as error:
        raise FormatError(
            f"{url} is not a readable .pt ({str(error)[:200]}); if it was saved before torch 1.6, load it in torch "
            "with weights_only=True and save it again",
            url=url,
        ) from error


def _found(archive: Archive, url: str) -> Tensors:
    # the folder before each name is the name that the file was saved under
    members = {name.partition("/")[2]: member for name, member in archive.members.items()}
    if "data.pkl" not in members:
        raise FormatError(f"{url} is a zip archive without data.pkl, not a .pt saved by torch", url=url)
    small: list[str] = [name for name in ("data.pkl", ".storage_alignment", "byteorder") if name in members]
    for name in small:
        _require_stored(members[name], url)
        most = _LONGEST_PICKLE if name == "data.pkl" else _LONGEST_NOTE
        if members[name].info.file_size > most:
            raise FormatError(
                f"{url} has a {name} of {members[name].info.file_size:,} bytes; at most {most:,} are read", url=url
            )
    contents = dict(zip(small, archive.contents(members[name] for name in small), strict=True))
    if contents.get("byteorder", b"little") != b"little":
        raise FormatError(f"{url} is big-endian; load it in torch and save it on a little-endian host", url=url)
    text = contents.get(".storage_alignment", b"")
    alignment = int(text) if text.isdigit() and len(text) < 9 else 0
    found = Tensors({}, {})
    starts: dict[str, int] = {}
    for name, tensor in pickled_tensors(contents["data.pkl"], url=url).items():
        placed = _placed(tensor, archive, members, starts, alignment or _USUAL_ALIGNMENT, url)
        if isinstance(placed, Layout):
            found.layouts[name] = placed
        else:
            found.unreadable[name] = placed
    if not found.layouts:
        name, why = next(iter(found.unreadable.items()))
        raise FormatError(f"{url} holds no tensor that can be read in place: {name or 'the tensor'} {why}", url=url)
    return found


def _require_stored(member: Member, url: str) -> None:
    if not member.is_stored:
        raise FormatError(
            f"{url} is compressed or encrypted ({member.info.filename[:100]}), so its tensors cannot be read in place; "
            "load it in torch with weights_only=True and save it again",
            url=url,
        )


def _placed(
    tensor: Found, archive: Archive, members: dict[str, Member], starts: dict[str, int], alignment: int, url: str
) -> Layout | str:
    """Find where a tensor lies; returns why not, if it has a fault of its own that torch itself makes."""
    if isinstance(tensor, Unreadable):
        return tensor.why
    itemsize, n_elements = tensor.dtype.itemsize, math.prod(tensor.shape)
    member = members[f"data/{tensor.key}"]
    _require_stored(member, url)
    if tensor.n_stored != member.info.file_size:
        raise FormatError(
            f"{url} claims {tensor.n_stored} bytes in {member.info.filename[:100]}, which has {member.info.file_size}",
            url=url,
        )
    is_inside = tensor.first >= 0 and (tensor.first + n_elements) * itemsize <= tensor.n_stored
    if not is_possible(tensor.shape, itemsize) or len(tensor.shape) != len(tensor.strides) or not _reaches(tensor):
        raise FormatError(
            f"{url} has a tensor of shape {str(tensor.shape)[:100]} and strides {str(tensor.strides)[:100]} that is "
            "not within its storage; it is damaged",
            url=url,
        )
    if not is_inside or not fills_its_extent(tensor.shape, tensor.strides):
        return (
            f"has shape {tensor.shape} and strides {tensor.strides}, a view that does not fill its storage; save it "
            "again with .contiguous()"
        )
    if tensor.key not in starts:
        starts[tensor.key] = archive.start_of(member, alignment=alignment)
    offset = starts[tensor.key] + tensor.first * itemsize
    strides = tuple(stride * itemsize for stride in tensor.strides)
    return Layout(tensor.shape, tensor.dtype, offset, strides, tensor.encoding)


def _reaches(tensor: StoredTensor) -> bool:
    """Whether all elements are within the storage, as those of any view that torch could make."""
    if tensor.first < 0 or any(stride < 0 for stride in tensor.strides):
        return False
    if 0 in tensor.shape:
        return tensor.first * tensor.dtype.itemsize <= tensor.n_stored
    last = tensor.first + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    return (last + 1) * tensor.dtype.itemsize <= tensor.n_stored
