"""Checkpoints from the Hugging Face hub, through its own cache. Weights as safetensors only; no code is fetched."""

from __future__ import annotations

from pathlib import Path

from packlight.checkpoint.shards import PICKLE_REFUSED
from packlight.errors import CheckpointError

CONFIG_PATTERNS = ("config.json", "*.safetensors.index.json")
CHECKPOINT_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
"""What is fetched: never *.bin or *.pt, which are pickles, nor *.py."""


def snapshot(repo_id: str, weights: bool = True) -> Path:
    """The local directory of a hub repository, fetched where it is not cached.

    `HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE` and `HF_ENDPOINT` are honoured by huggingface_hub itself.

    Args:
        repo_id: `org/name`.
        weights: fetch the whole checkpoint; otherwise its config and the index of its shards.

    Raises:
        CheckpointError: not found, gated, private, not reachable and not cached, or without a config.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    # The HTTP library's base error, whichever of its generations huggingface_hub builds on.
    http_error = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    assert issubclass(http_error, Exception)
    patterns = list(CHECKPOINT_PATTERNS if weights else CONFIG_PATTERNS)
    try:
        # A pattern's * crosses folders: without the second list, other formats' folders would come along.
        directory = Path(snapshot_download(repo_id, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (http_error, OSError, ValueError) as error:
        raise CheckpointError(_sentence(repo_id, error, constants.HF_HUB_OFFLINE)) from error
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"the hub repository {repo_id} has no config.json; give one with a transformers model")
    if weights and not any(directory.glob("*.safetensors")):
        raise CheckpointError(f"the hub repository {repo_id} has no safetensors weights: {PICKLE_REFUSED}")
    return directory


def _sentence(repo_id: str, error: BaseException, offline: bool) -> str:
    """One sentence for the user. The library's own text is left out: it is long and may quote request headers."""
    kinds = {kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__}
    if offline:
        kinds.add("OfflineModeIsEnabled")
    known = next((text for kind, text in _SENTENCES.items() if kind in kinds), None)
    if known is not None:
        return known.format(repo_id)
    status = next((s for cause in _causes(error) if (s := _status(cause)) is not None), None)
    if status is not None:
        return f"the hub answered {status} for {repo_id}: try again later, or check HF_ENDPOINT and HF_TOKEN"
    return f"{repo_id} cannot be fetched from the hub ({type(error).__name__}): check the name, network and free disk"


# By the name of an error class among the causes; the first that fits is taken.
_SENTENCES = {
    "GatedRepoError": "the hub repository {} is gated: accept its terms on the hub and set HF_TOKEN",
    "RepositoryNotFoundError": "the hub has no repository {} that you may read: check the name, or set HF_TOKEN",
    "HFValidationError": "{!r} is not the name of a hub repository: give org/name or a directory",
    "OfflineModeIsEnabled": "{} is not in the local hub cache and HF_HUB_OFFLINE is set: unset it once to fetch it",
    "TransportError": "{} is not in the local hub cache and the hub is out of reach: check the network or HF_ENDPOINT",
}


def _causes(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
