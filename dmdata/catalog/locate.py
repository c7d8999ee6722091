"""What an address names: an object, and an array inside it, as "s3://bucket/x.pt/model/fc.weight".

The end of the path alone decides, in capitals or not: not the host, nor what is asked of the server behind a question
mark.
"""

import os
import re

from dmdata.layout.kinds import NPY, kind_by_suffix

_OF_SEVERAL = re.compile(r"\.(pt|pth|npz|safetensors)/(?=.)", re.IGNORECASE)
_ZARR = re.compile(r"\.zarr(/|$)", re.IGNORECASE)
# in the keys of S3 a question mark may stand for itself
_S3_QUERY = re.compile(r"\?versionId=[^/?]*$")
_QUERY = re.compile(r"[?#].*$", re.DOTALL)


def is_address(name: str) -> bool:
    """Whether this is an address, not the name of an artifact, without looking for either."""
    return (
        "://" in name
        or name.startswith(("/", "./", "../", "~"))
        or bool(_ZARR.search(name))
        or bool(_ways_to_read(name))
    )


def may_be_an_object(path: str) -> bool:
    """Whether any part of a path ends like an object with arrays or a Zarr store, or a file is there."""
    return bool(_ZARR.search(path) or _ways_to_read(path)) or os.path.isfile(os.path.expanduser(path))


def path_of(url: str) -> str:
    """Take the path out of an address, without host and query."""
    return _parts_of(url)[1]


def url_and_member(address: str) -> tuple[str, str]:
    """Find which object an address means, and which array in it; "" is the only one of its object.

    Of several ways to read a local path, as below a folder named ``x.pt``, the first at which there is a file counts.
    """
    ways = _ways_to_read(address)
    if "://" not in address:
        for url, member in ways:
            if os.path.isfile(os.path.expanduser(url)):
                return url, member
    return ways[0] if ways else (address, NPY)


def _parts_of(url: str) -> tuple[str, str, str]:
    """Split an address into what is before its path, the path, and the query; of a local path all is path."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        return "", url, ""
    host, slash, path = rest.partition("/")
    query = (_S3_QUERY if scheme == "s3" else _QUERY).search(path)
    cut = query.start() if query else len(path)
    return f"{scheme}://{host}{slash}", path[:cut], path[cut:]


def _ways_to_read(address: str) -> list[tuple[str, str]]:
    """List the objects, and the arrays in them, that an address may mean; none where no part of it has a known end."""
    before, path, query = _parts_of(address)
    ways = [(before + path[: found.end() - 1] + query, path[found.end() :]) for found in _OF_SEVERAL.finditer(path)]
    return [*ways, (address, NPY)] if kind_by_suffix(path) else ways
