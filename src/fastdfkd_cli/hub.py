"""Files from the Hugging Face Hub: one download function, and its failures in one line each.

``HF_ENDPOINT``, ``HF_HUB_CACHE``, ``HF_HUB_OFFLINE`` and ``HF_TOKEN`` keep the meaning that huggingface_hub gives them.
With ``HF_HUB_OFFLINE=1`` nothing is downloaded from anywhere else either (:func:`refuse_offline`).
"""

from __future__ import annotations

import re
import socket
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fastdfkd_cli.errors import UnavailableError, UsageError

#: Seconds to wait for the Hub to accept a connection. The client itself would go on retrying for about 23 s.
CONNECT_TIMEOUT = 5.0
#: A connection that breaks while a file is on its way. The client's HTTP library differs from version to version;
#: its own errors are what the Hub's errors derive from.
_TRANSPORT_ERRORS: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)
#: What Git allows in a branch's or tag's name, more or less. The client makes file names of it.
_REVISION = re.compile(r"(?!.*(?:\.\.|//|@\{))[^\x00-\x20\x7f~^:?*\[\\/][^\x00-\x20\x7f~^:?*\[\\]*")


class HubFileMissing(UnavailableError):
    """The repository is there, the file is not."""


@dataclass(frozen=True)
class HubFile:
    """A downloaded (or cached) file and the commit it belongs to."""

    path: Path
    commit: str | None


def split_revision(repo: str) -> tuple[str, str | None]:
    """``owner/repo@rev`` -> ``(owner/repo, rev)``."""
    name, _, revision = repo.partition("@")
    return name, revision or None


@lru_cache(maxsize=8)
def _reachable(endpoint: str, minute: int) -> bool:
    """Whether the endpoint accepts a connection. Behind a proxy the client is left to find out itself.

    One model takes several files: the answer is kept for the ``minute``, which is only part of the cache's key.
    """
    try:
        url = urllib.parse.urlsplit(endpoint)
        host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
        proxies = urllib.request.getproxies()
        if (url.scheme in proxies or "all" in proxies) and not urllib.request.proxy_bypass(host):
            return True
        if not host:
            return False
        with socket.create_connection((host, port), CONNECT_TIMEOUT):
            return True
    except (OSError, ValueError):  # ValueError: the endpoint is no URL
        return False


def is_offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` is set."""
    return bool(constants.HF_HUB_OFFLINE)


def refuse_offline(what: str) -> None:
    """Keep the promise of ``HF_HUB_OFFLINE`` for downloads from elsewhere too.

    Raises:
        UnavailableError: it is set.
    """
    if is_offline():
        raise UnavailableError(f"{what} would have to be downloaded, and HF_HUB_OFFLINE is set: unset it.")


def hub_file(repo: str, filename: str, revision: str | None = None) -> HubFile:
    """Fetch one file of a Hub repository, or find it in the cache.

    Args:
        repo: ``owner/repo``.
        filename: the file's path in the repository.
        revision: a branch, tag or commit; None is the repository's default branch.

    Raises:
        HubFileMissing: the repository has no such file.
        UsageError: the name cannot be a repository's.
        UnavailableError: everything else, each with its own line.
    """
    written = f"{repo}@{revision}" if revision else repo
    if revision is not None and not _REVISION.fullmatch(revision):
        raise UsageError(f"{revision!r} is no revision: write a branch, a tag or a commit after the @ of {repo}.")
    offline = is_offline()
    unreachable = not offline and not _reachable(constants.ENDPOINT, int(time.monotonic()) // 60)
    # The order of the clauses matters: GatedRepoError is a RepositoryNotFoundError, LocalEntryNotFoundError an
    # EntryNotFoundError, and most of them are HfHubHTTPErrors.
    try:
        path = hf_hub_download(
            repo, filename, revision=revision, library_name="fastdfkd", local_files_only=offline or unreachable
        )
    except HFValidationError as error:
        raise UsageError(
            f"{repo!r} is not a Hub repository's name: write owner/repo or owner/repo@revision."
        ) from error
    except GatedRepoError as error:
        raise UnavailableError(
            f"The Hub repository {repo} is gated: accept its terms on {constants.ENDPOINT}/{repo} and log in "
            "(`hf auth login` or HF_TOKEN)."
        ) from error
    except RepositoryNotFoundError as error:
        raise UnavailableError(
            f"The Hub repository {repo} does not exist or is private: check the name, or log in "
            "(`hf auth login` or HF_TOKEN)."
        ) from error
    except RevisionNotFoundError as error:
        raise UnavailableError(
            f"The Hub repository {repo} has no revision {revision!r}: check the part after @."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if offline:
            raise UnavailableError(
                f"{filename} of {written} is not in the cache and HF_HUB_OFFLINE is set: unset it, or download the "
                f"repository first (`hf download {repo}`)."
            ) from error
        raise UnavailableError(
            f"The Hub ({constants.ENDPOINT}) cannot be reached and {filename} of {written} is not in the cache: check "
            "the network and HF_ENDPOINT."
        ) from error
    except EntryNotFoundError as error:
        raise HubFileMissing(f"The Hub repository {written} has no file {filename}.") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        raise UnavailableError(
            f"The Hub answered {status or 'with an error'} for {filename} of {written}: try again later, or check "
            "HF_ENDPOINT and HF_TOKEN."
        ) from error
    except _TRANSPORT_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UnavailableError(f"{filename} of {written} could not be downloaded: {reason}") from error
    # The cache keeps a file as .../snapshots/COMMIT/FILENAME.
    snapshot = Path(path).parents[len(Path(filename).parts) - 1]
    return HubFile(Path(path), snapshot.name if snapshot.parent.name == "snapshots" else None)


__all__ = ["CONNECT_TIMEOUT", "HubFile", "HubFileMissing", "hub_file", "is_offline", "refuse_offline", "split_revision"]
