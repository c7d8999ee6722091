"""s3fs in a process and an environment of its own: its botocore cannot live beside ours. Says its seconds, a line each.

Started as `python peer_s3fs.py ENDPOINT BUCKET/KEY SIZE`; reads the object whole at every line of standard input, which
says how: `cat_ranges` or `open`.
"""

import sys
import time

import s3fs


def main(endpoint: str, path: str, size: int) -> None:
    options = {"endpoint_url": endpoint, "region_name": "us-east-1"}
    fs = s3fs.S3FileSystem(key="BENCHMARK", secret="BENCHMARK", requester_pays=True, client_kwargs=options)  # noqa: S106
    starts = list(range(0, size, 8 << 20))
    ends = [min(start + (8 << 20), size) for start in starts]
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        if line.strip() == "open":
            with fs.open(path, "rb", cache_type="readahead", block_size=8 << 20) as file:
                n_read = file.readinto(bytearray(size))
        else:
            n_read = sum(map(len, fs.cat_ranges([path] * len(starts), starts, ends)))
        seconds = time.perf_counter() - began
        assert n_read == size
        print(seconds, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
