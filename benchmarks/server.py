"""nginx from Debian as a requester-pays bucket on loopback, with a log of every byte, and a slow face.

The slow face sends 50 MB/s a connection and waits 30 ms before each answer, as a store across a country does.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BUCKET = "madrylab-datamodels"
SLOW_BYTES_PER_SECOND = 50_000_000
SLOW_SECONDS_TO_FIRST_BYTE = 0.03

# what the largest benchmark puts there
_MOST_OBJECT_BYTES = 4 << 30
_MODULES = Path("/usr/share/nginx/modules")
_CONFIG = """
load_module {modules}/ndk_http_module.so;
load_module {modules}/ngx_http_lua_module.so;
worker_processes 2;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 4096; }}
worker_rlimit_nofile 10000;
http {{
  log_format served '$status $body_bytes_sent $http_range';
  access_log {folder}/access.log served;
  sendfile on; tcp_nopush on; keepalive_requests 1000000; types {{ }}
  client_body_temp_path {folder}/t; proxy_temp_path {folder}/t; fastcgi_temp_path {folder}/t;
  uwsgi_temp_path {folder}/t; scgi_temp_path {folder}/t;
  server {{
    listen 127.0.0.1:{port} backlog=2048;
    root {root};
    location / {{
      if ($http_x_amz_request_payer != "requester") {{ return 403; }}
      add_header x-amz-request-charged requester;
    }}
  }}
  server {{
    listen 127.0.0.1:{slow_port} backlog=2048;
    root {root};
    location / {{
      if ($http_x_amz_request_payer != "requester") {{ return 403; }}
      add_header x-amz-request-charged requester;
      limit_rate {rate};
      sendfile_max_chunk 256k;  # the last piece is sent without a wait: by default 2 MB of each range
      access_by_lua_block {{ ngx.sleep({delay}) }}
    }}
  }}
}}
"""


@dataclass(frozen=True, slots=True)
class Nginx:
    """A running server; objects are the files below `objects`."""

    objects: Path
    log: Path
    endpoint: str
    slow_endpoint: str

    def served(self) -> tuple[int, int]:
        """Count requests and body bytes since the start."""
        time.sleep(0.2)  # lines are written when an answer is complete
        lines = [line.split(" ", 2) for line in self.log.read_text().splitlines()]
        return len(lines), sum(int(size) for _, size, _ in lines)


@contextlib.contextmanager
def nginx() -> Iterator[Nginx]:
    """Run the server, and make the environment that of a stranger who pays.

    Raises
    ------
    SystemExit
        If nginx or its Lua module is not there.
    """
    modules = [_MODULES / name for name in ("ndk_http_module.so", "ngx_http_lua_module.so")]
    if not shutil.which("nginx") or not all(module.exists() for module in modules):
        raise SystemExit("the reading benchmarks need nginx: apt-get install nginx-light libnginx-mod-http-lua")
    with tempfile.TemporaryDirectory(dir=_memory()) as root, tempfile.TemporaryDirectory() as folder:
        ports = [_free_port(), _free_port()]
        objects = Path(root) / BUCKET
        objects.mkdir()
        for path in (Path(root), Path(folder)):
            path.chmod(0o755)  # nginx's workers are other users
        config = Path(folder) / "nginx.conf"
        config.write_text(
            _CONFIG.format(
                modules=_MODULES,
                folder=folder,
                root=root,
                port=ports[0],
                slow_port=ports[1],
                rate=SLOW_BYTES_PER_SECOND,
                delay=SLOW_SECONDS_TO_FIRST_BYTE,
            )
        )
        endpoints = [f"http://127.0.0.1:{port}" for port in ports]
        environment = {
            "AWS_ENDPOINT_URL_S3": endpoints[0],
            "AWS_ACCESS_KEY_ID": "BENCHMARK",
            "AWS_SECRET_ACCESS_KEY": "BENCHMARK",
            "AWS_REGION": "us-east-1",
            "AWS_CONFIG_FILE": f"{folder}/none",
            "AWS_SHARED_CREDENTIALS_FILE": f"{folder}/none",
            "NO_PROXY": "127.0.0.1",
            "DMDATA_HOME": f"{folder}/home",
            "DMDATA_CACHE_GIB": "0",  # the second round would read nothing
        }
        for name in [name for name in os.environ if name.startswith(("AWS_", "DMDATA_"))]:
            del os.environ[name]  # a user's profile, catalog or budget
        os.environ |= environment
        with subprocess.Popen(["nginx", "-c", str(config)], stderr=subprocess.DEVNULL) as process:
            try:
                _wait_for(ports, Path(folder) / "error.log")
                yield Nginx(objects, Path(folder) / "access.log", *endpoints)
            finally:
                process.terminate()


def _memory() -> str | None:
    """Find a folder in memory with room for the objects: a disk would be measured instead."""
    shared = "/dev/shm"  # noqa: S108 - for a folder of our own in it
    return shared if os.path.isdir(shared) and shutil.disk_usage(shared).free > _MOST_OBJECT_BYTES else None


def _said(errors: Path) -> str:
    return errors.read_text().strip() if errors.exists() else "it could not read its configuration"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_for(ports: list[int], errors: Path) -> None:
    deadline = time.monotonic() + 10
    for port in ports:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if time.monotonic() > deadline:
                raise SystemExit(f"nginx did not start: {_said(errors)}")
            time.sleep(0.05)
