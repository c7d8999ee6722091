"""A throw-away certificate authority, and the certificates of AWS's hosts as AWS writes them. Made by openssl.

As on AWS one certificate covers ``s3.REGION.amazonaws.com`` and one label before it, so that a bucket whose name has
dots fails TLS verification where it is asked for as a host.
"""

import re
import ssl
import subprocess
import threading
from pathlib import Path

_ANY_CA = ("basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign", "subjectKeyIdentifier=hash")
_LEAF = (
    "basicConstraints=critical,CA:FALSE",
    "keyUsage=critical,digitalSignature",
    "extendedKeyUsage=serverAuth",
    "subjectKeyIdentifier=hash",
    "authorityKeyIdentifier=keyid",
)


class Authority:
    """Signs certificates on demand; those made stay in its folder.

    Parameters
    ----------
    folder : Path
        An empty one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._contexts: dict[str, ssl.SSLContext] = {}
        for name in ("ca", "leaf"):
            self._openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", f"{name}.key")
        self._openssl("req", "-x509", "-key", "ca.key", "-out", "ca.pem", "-subj", "/CN=throw-away", *_with(_ANY_CA))

    @property
    def bundle(self) -> str:
        """Path of the file by which clients trust it."""
        return str(self._folder / "ca.pem")

    def context(self, host: str) -> ssl.SSLContext:
        """Make what ends the TLS of a connection to a host, once."""
        names = _names(host)
        with self._lock:
            if names[0] not in self._contexts:
                self._contexts[names[0]] = self._new_context(names)
            return self._contexts[names[0]]

    def _new_context(self, names: tuple[str, ...]) -> ssl.SSLContext:
        file = f"{names[0].replace('*', '_')}.pem"
        if not (self._folder / file).exists():
            alternatives = "subjectAltName=" + ",".join(f"DNS:{name}" for name in names)
            subject = ("-key", "leaf.key", "-out", file, "-subj", f"/CN={names[0]}")
            signed_by = ("-CA", "ca.pem", "-CAkey", "ca.key")
            self._openssl("req", "-x509", *subject, *signed_by, *_with((*_LEAF, alternatives)))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._folder / file, self._folder / "leaf.key")
        return context

    def _openssl(self, *words: str) -> None:
        # the machine's own openssl.cnf would add extensions of its own
        (self._folder / "openssl.cnf").write_text("[req]\ndistinguished_name=name\n[name]\n")
        environment = {"OPENSSL_CONF": str(self._folder / "openssl.cnf"), "PATH": "/usr/local/bin:/usr/bin:/bin"}
        done = subprocess.run(
            ["openssl", *words], cwd=self._folder, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"openssl {words[0]} failed: {done.stderr}")


def _with(extensions: tuple[str, ...]) -> list[str]:
    return ["-days", "2", *(word for extension in extensions for word in ("-addext", extension))]


def _names(host: str) -> tuple[str, ...]:
    """Names on the certificate of the server that answers for a host: the first names the certificate."""
    found = re.search(
        r"(?:^|\.)(s3(?:-fips|-accelerate)?(?:\.dualstack)?(?:\.[a-z]{2}-[a-z-]+-\d)?\.amazonaws\.com)$", host
    )
    return (found[1], f"*.{found[1]}") if found else (host,)
