"""Where a start model is: a Hugging Face directory, or a name in the local Hugging Face cache. No torch."""

from __future__ import annotations

from pathlib import Path

from offtrail.platform.config.validate import hub_cache


class StartError(RuntimeError):
    """The start model cannot be had; one line that says why and the way out."""


def resolve(path: str) -> Path:
    """A local Hugging Face directory as it is; any other name in the local Hugging Face cache. Nothing is downloaded.

    Raises StartError when it is in neither place.
    """
    if Path(path).is_dir():
        return Path(path).resolve()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, cache_dir=hub_cache(), local_files_only=True))
    except Exception as error:  # the hub's errors are many; each means that there is no model
        raise StartError(
            f"model.path={path}: neither a directory here nor in the Hugging Face cache ({type(error).__name__}); "
            f"fetch it first: hf download {path}"
        ) from error
