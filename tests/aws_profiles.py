"""What users have in ``~/.aws``, written for AWS as it is played."""

import hashlib
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from botocore.credentials import SSOProvider
from botocore.tokens import SSOTokenProvider
from servers.aws import READER, PlayedAws
from servers.aws_calls import Key

START_URL = "https://the-lab.awsapps.com/start"


def forget_keys(patch: pytest.MonkeyPatch) -> None:
    """Take the keys out of the environment."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        patch.delenv(name, raising=False)


def write_config(text: str) -> None:
    """Write the AWS config file."""
    Path(os.environ["AWS_CONFIG_FILE"]).write_text(text)


def write_credentials(key: Key) -> None:
    """Write the shared credentials file, as a tool does that hands out keys."""
    path = Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"])
    new = path.with_name("new")
    new.write_text(f"[default]\n{key.file}")
    new.replace(path)


def configure_sso(aws: PlayedAws, patch: pytest.MonkeyPatch, home: Path, *, legacy: bool) -> None:
    """Write a profile of single sign-on, and sign in."""
    forget_keys(patch)
    patch.setenv("HOME", str(home))
    cache = str(home / ".aws" / "sso" / "cache")
    for reader in (SSOProvider, SSOTokenProvider):  # which have looked where the home is when they were imported
        patch.setattr(reader, "_SSO_TOKEN_CACHE_DIR", cache)
    account = f"sso_account_id = {READER}\nsso_role_name = reader\nregion = us-east-1\n"
    where = f"sso_start_url = {START_URL}\nsso_region = us-east-1\n"
    if legacy:
        write_config(f"[default]\n{where}{account}")
    else:
        scopes = "sso_registration_scopes = sso:account:access\n"
        write_config(f"[default]\nsso_session = lab\n{account}[sso-session lab]\n{where}{scopes}")
    sign_in(aws, home, legacy=legacy)


def sign_in(aws: PlayedAws, home: Path, *, legacy: bool, seconds: float = 8 * 3600) -> None:
    """Do what ``aws sso login`` does: write a token that lasts so many seconds."""
    access, refresh = aws.identity.sign_in()
    token = {"startUrl": START_URL, "region": "us-east-1", "accessToken": access, "expiresAt": _at(seconds)}
    if not legacy:
        token |= {"clientId": "client", "clientSecret": "secret", "registrationExpiresAt": _at(90 * 86400)}
        token |= {"refreshToken": refresh}
    name = hashlib.sha1((START_URL if legacy else "lab").encode(), usedforsecurity=False).hexdigest()
    path = home / ".aws" / "sso" / "cache" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(token))


def configure_process(folder: Path, key: Key) -> None:
    """Write a profile whose keys are printed by a program."""
    facts = {"Version": 1, "AccessKeyId": key.key_id, "SecretAccessKey": key.secret}
    facts |= {"SessionToken": key.token, "Expiration": _at(3600)} if key.token else {}
    program = folder / "print_keys.py"
    program.write_text(f"print({json.dumps(facts)!r})")
    write_config(f"[default]\ncredential_process = {sys.executable} {program}\n")


def _at(seconds: float) -> str:
    return datetime.fromtimestamp(time.time() + seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
