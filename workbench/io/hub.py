"""From the name of a model to a local directory: bundled models, local paths, the family by name, hub ids."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from workbench.errors import CheckpointError
from workbench.family import FAMILY

BUNDLED_DIR = Path(__file__).parents[2] / "data" / "nano"
BUNDLED = ("nano-moe-base", "nano-moe-thinking", "nano-dense-base", "nano-dense-thinking")

# Weights, configuration, tokenizer, chat template; never code, never pickles, nothing from subfolders.
_ALLOWED = ["*.safetensors", "*.json", "*.jinja"]


def resolve(path_or_name: str | os.PathLike[str]) -> Path:
    """The directory that holds a checkpoint, downloaded first if need be.

    Tried in this order: a bundled model (`nano-moe-base`), an existing directory, a family name (`llm-jp-4-8b-base`),
    a hub id (`org/name` or `org/name@revision`). Raises CheckpointError, listing close names, for anything else, and
    when the hub cannot be reached and holds no cached copy.
    """
    if not isinstance(path_or_name, str | os.PathLike):
        raise CheckpointError(f"model: expected a directory or a model name, got {path_or_name!r}.{_suggest('')}")
    name = os.fspath(path_or_name)
    if name in BUNDLED:
        return _bundled(name)
    path = Path(os.path.expanduser(name))  # unlike Path.expanduser, leaves the home of an unknown user as it is written
    if os.path.isdir(path):  # unlike Path.is_dir, false for a name too long for any file
        return path
    if os.path.isfile(path):
        raise CheckpointError(f"{name}: expected a checkpoint directory, got a file. Give the directory that holds it.")
    if name in FAMILY:
        return _download(FAMILY[name].hub_id)
    if not isinstance(path_or_name, str) or path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{name}: expected a directory or a model name, got neither.{_suggest(name)}")
    return _download(name)


def model_name(path_or_name: str) -> str:
    """What to call a model in file names and manifests: the last part of a directory's real path, or of a name."""
    path = Path(os.path.expanduser(path_or_name))
    return (path.resolve() if path.is_dir() else path).name


def _bundled(name: str) -> Path:
    path = BUNDLED_DIR / name
    if not path.is_dir():
        raise CheckpointError(
            f"{name}: expected the bundled model at data/nano/{name}, got no such directory. "
            "Work from a checkout of the repository, or rebuild it as data/README.md tells."
        )
    return path


def _suggest(name: str) -> str:
    known = [*BUNDLED, *FAMILY]
    close = difflib.get_close_matches(Path(name).name.lower(), known, n=3, cutoff=0.5)
    return f" Did you mean {', '.join(close)}?" if close else f" Known names: {', '.join(known)}."


def _download(hub_id: str) -> Path:
    """The hub's snapshot of `org/name[@revision]`; the cached copy when the hub is out of reach."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo_id, _, revision = hub_id.partition("@")
    try:
        return Path(
            snapshot_download(repo_id, revision=revision or None, allow_patterns=_ALLOWED, ignore_patterns=["*/*"])
        )
    except GatedRepoError:
        reason = "access, got a gated model. Accept its terms on its page and log in with `hf auth login`."
    except RepositoryNotFoundError:
        reason = f"a model on the hub, got none that is public.{_suggest(repo_id)}"
    except RevisionNotFoundError:
        reason = f"a revision of it on the hub, got {revision!r}. Check the branch, tag or commit."
    except HFValidationError:
        reason = "a hub id of the form org/name, got something else. Check the spelling."
    except LocalEntryNotFoundError:
        reason = (
            "a cached copy or a connection to the hub, got neither. Download it once while online, or give a directory."
        )
    except (HTTPError, OSError) as error:
        reason = f"a download from the hub, got {type(error).__name__}. Check the connection and the free disk space."
    raise CheckpointError(f"{hub_id}: expected {reason}")
