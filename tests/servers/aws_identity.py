"""Single sign-on and STS, as far as profiles need them: sessions that are renewed, roles that are assumed."""

import json
import secrets
import threading
import time
from datetime import UTC, datetime

from servers.aws_calls import Answer, Call, Keys, Refusal

ROLE = "arn:aws:iam::{account}:role/reader"


class Identity:
    """The services behind portal.sso, oidc and sts.

    Attributes
    ----------
    key_seconds : float
        How long the keys last that it hands out.
    """

    def __init__(self, keys: Keys, account: str) -> None:
        self.key_seconds = 3600.0
        self.needs_mfa = False
        self._keys = keys
        self._account = account
        self._lock = threading.Lock()
        self._access: set[str] = set()
        self._refresh: set[str] = set()

    def sign_in(self) -> tuple[str, str]:
        """Make the access token and the refresh token that ``aws sso login`` would store."""
        tokens = secrets.token_urlsafe(20), secrets.token_urlsafe(20)
        with self._lock:
            self._access.add(tokens[0])
            self._refresh.add(tokens[1])
        return tokens

    def sign_out(self) -> None:
        """Let no token of before be valid any more."""
        with self._lock:
            self._access.clear()
            self._refresh.clear()

    def answer(self, call: Call) -> Answer | None:
        """Answer a request; None where the host is of another service."""
        service, _, rest = call.host.partition(".")
        if service == "portal" and rest.startswith("sso."):
            return self._role_credentials(call)
        if service == "oidc":
            return self._new_token(call)
        if service == "sts":
            return self._sts(call, rest.removesuffix("amazonaws.com").strip("."))
        return None

    def _role_credentials(self, call: Call) -> Answer:
        if call.raw_path != "/federation/credentials":
            return _json(404, {"message": "no such operation is played here"}, "ResourceNotFoundException")
        with self._lock:
            known = call.header("x-amz-sso_bearer_token") in self._access
        if not known:
            return _json(401, {"message": "Session token not found or invalid"}, "UnauthorizedException")
        if call.query["account_id"] != self._account:
            return _json(403, {"message": "No access"}, "ForbiddenException")
        key = self._keys.issue(self._account, seconds=self.key_seconds)
        expires = int((key.expires_at or 0) * 1000)
        facts = {"accessKeyId": key.key_id, "secretAccessKey": key.secret, "sessionToken": key.token}
        return _json(200, {"roleCredentials": facts | {"expiration": expires}})

    def _new_token(self, call: Call) -> Answer:
        asked = json.loads(call.body or b"{}")
        with self._lock:
            known = asked.get("grantType") == "refresh_token" and asked.get("refreshToken") in self._refresh
        if not known:
            error = {"error": "invalid_grant", "error_description": "Invalid refresh token provided"}
            return _json(400, error, "InvalidGrantException")
        access, refresh = self.sign_in()
        return _json(200, {"accessToken": access, "tokenType": "Bearer", "expiresIn": 28800, "refreshToken": refresh})

    def _sts(self, call: Call, region: str) -> Answer:
        asked = dict(part.split("=", 1) for part in call.body.decode().split("&") if "=" in part)
        action = asked.get("Action", "")
        signer = None
        if action != "AssumeRoleWithWebIdentity":
            signer = self._keys.signer(call, region=region or "us-east-1", service="sts")
            if signer is None:
                raise Refusal(403, "MissingAuthenticationToken", "Request is missing Authentication Token")
        if action == "GetCallerIdentity" and signer is not None:
            arn = f"arn:aws:iam::{signer.account}:user/somebody"
            inside = f"<Arn>{arn}</Arn><UserId>{signer.key_id}</UserId><Account>{signer.account}</Account>"
            return _xml(action, inside)
        if action in ("AssumeRole", "AssumeRoleWithWebIdentity"):
            if self.needs_mfa and "TokenCode" not in asked:
                raise Refusal(403, "AccessDenied", "MultiFactorAuthentication failed; a one time pass code is needed")
            key = self._keys.issue(self._account, seconds=self.key_seconds)
            at = datetime.fromtimestamp(time.time() + self.key_seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            return _xml(
                action,
                f"<Credentials><AccessKeyId>{key.key_id}</AccessKeyId><SecretAccessKey>{key.secret}</SecretAccessKey>"
                f"<SessionToken>{key.token}</SessionToken><Expiration>{at}</Expiration></Credentials>"
                f"<AssumedRoleUser><Arn>{ROLE.format(account=self._account)}/session</Arn>"
                "<AssumedRoleId>AROA:session</AssumedRoleId></AssumedRoleUser>",
            )
        raise Refusal(400, "InvalidAction", f"Could not find operation {action}")


def sts_error(refusal: Refusal) -> Answer:
    """Write a refusal as STS does."""
    # STS knows other names than S3
    code = {"InvalidAccessKeyId": "InvalidClientTokenId", "RequestTimeTooSkewed": "SignatureDoesNotMatch"}.get(
        refusal.code, refusal.code
    )
    status = 403 if refusal.code == "ExpiredToken" else refusal.status
    text = (
        '<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type>'
        f"<Code>{code}</Code><Message>{refusal.message}</Message></Error><RequestId>played</RequestId></ErrorResponse>"
    )
    return Answer(status, {"Content-Type": "text/xml"}, text.encode())


def _json(status: int, document: object, error: str | None = None) -> Answer:
    headers = {"Content-Type": "application/json"} | ({"x-amzn-ErrorType": error} if error else {})
    return Answer(status, headers, json.dumps(document).encode())


def _xml(action: str, inside: str) -> Answer:
    text = (
        f'<{action}Response xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><{action}Result>{inside}'
        f"</{action}Result><ResponseMetadata><RequestId>played</RequestId></ResponseMetadata></{action}Response>"
    )
    return Answer(200, {"Content-Type": "text/xml"}, text.encode())
