"""Errors for credentials that are missing or cannot be had, with the remedy. Nothing was sent to a bucket."""

from dmdata.errors import AccessError, DmdataError, SourceError
from dmdata.objects.explaining.failures import TRANSIENT, WORDS, kind_of_chain, without_requests
from dmdata.objects.explaining.refusals import BAD_CREDENTIALS, EXPIRED


def is_of_credentials(error: Exception) -> bool:
    """Whether boto3's error says that it has no credentials, or could not get them."""
    import botocore.exceptions as by

    kinds = (
        by.NoCredentialsError, by.PartialCredentialsError, by.CredentialRetrievalError, by.TokenRetrievalError,
        by.NoAuthTokenError, by.SSOError, by.LoginError, by.ProfileNotFound, by.ConfigParseError, by.ConfigNotFound,
        by.InvalidConfigError, by.UnknownCredentialError, by.RefreshWithMFAUnsupportedError,
        by.MissingDependencyException, by.MetadataRetrievalError,
    )  # fmt: skip
    return isinstance(error, kinds)


def no_credentials(url: str, words: str) -> AccessError:
    """State that there are no credentials; `words` state what needs them."""
    return AccessError(
        f"{words}; run aws configure, or set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        url=url,
        cause="no_credentials",
        unsent=True,
    )


def credentials_error(profile: str, error: Exception) -> DmdataError:
    """Explain why credentials cannot be had: nothing was sent to a bucket.

    Parameters
    ----------
    profile : str
        Of the AWS configuration; "" where it is not known.
    error : Exception
        Of botocore's, or what a credential process raised.
    """
    import botocore.exceptions as by

    without_requests(error)
    of = f" of profile {profile}" if profile else ""
    option = f" --profile {profile}" if profile and profile != "default" else ""
    cause = "bad_credentials"
    if isinstance(error, by.SSOError | by.TokenRetrievalError | by.NoAuthTokenError):
        words = f"the single sign-on session{of} has expired or was never begun; run aws sso login{option}"
    elif isinstance(error, by.LoginError):
        words = f"the login session{of} has expired; run aws login{option}"
    elif isinstance(error, EOFError | by.RefreshWithMFAUnsupportedError):
        words = (
            f"the role{of} needs a code of a multi-factor device, and there is nobody to ask; get a session in a "
            "terminal (aws sts assume-role ... --token-code, or aws configure export-credentials) and use its keys"
        )
    elif isinstance(error, by.ProfileNotFound):
        cause = "configuration"
        words = (
            f"the AWS files have no profile {profile or 'of that name'}; choose another with AWS_PROFILE, or unset it"
        )
    elif isinstance(error, by.ConfigParseError | by.ConfigNotFound):
        cause, words = "configuration", "the AWS config or credentials file cannot be read; correct its syntax"
    elif isinstance(error, by.InvalidConfigError | by.UnknownCredentialError):
        cause = "configuration"
        words = (
            f"the AWS configuration{of} contradicts itself or lacks a setting; check it with aws configure list{option}"
        )
    elif isinstance(error, by.MissingDependencyException):
        cause, words = "configuration", f"the credentials{of} need AWS's own runtime; pip install 'botocore[crt]'"
    elif isinstance(error, by.PartialCredentialsError | by.NoCredentialsError):
        missing = getattr(error, "kwargs", {}).get("cred_var", "a part")
        words = (
            f"{missing} of the credentials{of} is missing; set both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "run aws configure"
        )
    elif isinstance(error, by.CredentialRetrievalError | OSError | ValueError | KeyError):
        words = (
            f"the credential process{of} failed, or is not installed; run the command of credential_process in the AWS "
            "config file by hand to see why"
        )
    else:
        kind = kind_of_chain(error)
        words = f"AWS could not be asked for the credentials{of}: {WORDS[kind]}"
        return SourceError(words, cause=kind, transient=kind in TRANSIENT, unsent=True)
    return AccessError(words, cause=cause, unsent=True)


def role_refused(profile: str, operation: str, code: str) -> AccessError:
    """State that AWS refused to hand out credentials."""
    of = f" of profile {profile}" if profile else ""
    if code in BAD_CREDENTIALS:
        how = "have expired" if code in EXPIRED else "are not valid"
        words = (
            f"the keys{of} that ask for its role {how} ({code}); renew them (aws sso login, aws configure), or choose "
            "others with AWS_PROFILE"
        )
    elif operation == "GetRoleCredentials" or "Unauthorized" in code:
        words = (
            f"the single sign-on session{of} is not accepted any more ({code}); run aws sso login --profile {profile}"
        )
    else:
        words = (
            f"AWS does not hand out the role{of} ({code or 'refused'} for {operation}); check role_arn and "
            "source_profile, and that the role trusts these keys"
        )
    return AccessError(words, cause="bad_credentials", code=code, unsent=True)
