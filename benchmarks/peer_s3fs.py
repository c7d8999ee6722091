"""s3fs in a process and an environment of its own: its botocore cannot live beside ours. Says its seconds, a line each.

Started as `python peer_s3fs.py ENDPOINT BUCKET/KEY SIZE`; reads the object whole at every line of standard input, in
the way that the line names.
"""

import sys
import time

import s3fs


def main(endpoint: str, path: str, size: int) -> None:
    options = {"endpoint_url": endpoint, "region_name": "us-east-1"}
    fs = s3fs.S3FileSystem(key="BENCHMARK", secret="BENCHMARK", requester_pays=True, client_kwargs=options)  # noqa: S106
    starts = list(range(0, size, 8 << 20))
    ends = [min(start + (8 << 20), size) for start in starts]

    def cat_ranges() -> int:
        return sum(map(len, fs.cat_ranges([path] * len(starts), starts, ends)))

    def open_and_read() -> int:
        with fs.open(path, "rb") as file:
            return len(file.read())

    ways = {"cat_ranges": cat_ranges, "open": open_and_read}
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        n_bytes = ways[line.strip()]()
        seconds = time.perf_counter() - began
        assert n_bytes == size
        print(seconds, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
