"""From names to directories: bundled models, paths, the family, the hub online and offline."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import REPOSITORY, assert_same_weights, run_python
from workbench.errors import CheckpointError
from workbench.io import hub
from workbench.io.saving import save_model
from workbench.io.weights import load_model
from workbench.models import Llama


def test_bundled_names_mean_the_repository(moe: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.BUNDLED_DIR == REPOSITORY / "data" / "nano"
    monkeypatch.setattr(hub, "BUNDLED_DIR", tmp_path)
    save_model(moe, tmp_path / "nano-moe-base")
    loaded = load_model("nano-moe-base")
    assert loaded.source == "nano-moe-base"
    with pytest.raises(
        CheckpointError, match="nano-dense-base: expected the bundled model at data/nano/nano-dense-base"
    ):
        load_model("nano-dense-base")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("nano-moe-bse", "Did you mean nano-moe-base"),
        ("llm-jp-4-8b-bas", "Did you mean llm-jp-4-8b-base"),
        ("entirely-else-123", "Known names: nano-moe-base"),
        ("./llm-jp-4-8b-base", "Did you mean llm-jp-4-8b-base"),
        ("~nobody-by-this-name/x", "expected a directory or a model name, got neither"),
        ("x" * 5000, "expected a directory or a model name, got neither"),
        ("/no/such/directory", "expected a directory or a model name, got neither"),
        (Path("org/name"), "expected a directory or a model name, got neither"),
        ("a/b/c", "expected a directory or a model name, got neither"),
        (None, "expected a directory or a model name, got None. Known names: nano-moe-base"),
        (b"nano-moe-base", "expected a directory or a model name, got b'nano-moe-base'"),
        (__file__, "expected a checkpoint directory, got a file"),
    ],
)
def test_unknown_names_are_explained(name: Any, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        load_model(name)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, the hub switched off, and no connection tolerated."""
    constants = pytest.importorskip("huggingface_hub.constants")

    def connect(*args: object, **kwargs: object) -> None:
        pytest.fail("tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cache_snapshot(model: Llama, hub_cache: Path, repo: str, commit: str = "c" * 40) -> None:
    """Lay a checkpoint out as huggingface_hub caches it."""
    folder = hub_cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    save_model(model, folder / "snapshots" / commit)


@pytest.mark.parametrize("name", ["llm-jp-4-8b-base", "llm-jp/llm-jp-4-8b-base", "llm-jp/llm-jp-4-8b-base@main"])
def test_offline_without_a_copy_is_one_line(hub_cache: Path, name: str) -> None:
    with pytest.raises(
        CheckpointError, match="expected a cached copy or a connection to the hub, got neither"
    ) as caught:
        load_model(name)
    assert str(caught.value).startswith("llm-jp/llm-jp-4-8b-base")
    assert "\n" not in str(caught.value)


def test_offline_with_a_copy_loads_it(model: Llama, hub_cache: Path) -> None:
    cache_snapshot(model, hub_cache, "llm-jp/llm-jp-4-8b-base")
    for name in ("llm-jp-4-8b-base", "llm-jp/llm-jp-4-8b-base", "llm-jp/llm-jp-4-8b-base@" + "c" * 40):
        loaded = load_model(name)
        assert loaded.source == name
        assert_same_weights(model, loaded)


def test_the_offline_variable_is_honoured(tmp_path: Path) -> None:
    script = "from workbench.io.hub import resolve; resolve('llm-jp-4-8b-base')"
    result = run_python(script, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert "CheckpointError: llm-jp/llm-jp-4-8b-base: expected a cached copy or a connection" in result.stderr


@pytest.mark.parametrize("name", ["org/bad..name", "org/name@no-such-branch"])
def test_bad_hub_ids_and_revisions_are_explained(model: Llama, hub_cache: Path, name: str) -> None:
    cache_snapshot(model, hub_cache, "org/name")
    with pytest.raises(CheckpointError, match=r"expected a (cached copy|hub id of the form org/name)"):
        load_model(name)


@pytest.mark.parametrize(
    ("error", "match"),
    [
        ("GatedRepoError", "expected access, got a gated model"),
        ("RepositoryNotFoundError", "expected a model on the hub, got none"),
        ("RevisionNotFoundError", "expected a revision of it on the hub, got 'v9'"),
        ("HfHubHTTPError", "expected a download from the hub, got HfHubHTTPError"),
    ],
)
def test_answers_of_the_hub_become_one_line(monkeypatch: pytest.MonkeyPatch, error: str, match: str) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    errors = pytest.importorskip("huggingface_hub.errors")
    kind = getattr(errors, error)

    def refuse(*args: object, **kwargs: object) -> str:
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_model("org/name@v9")
    assert "\n" not in str(caught.value)


def test_only_weights_and_texts_are_downloaded(one_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked: dict[str, object] = {}

    def snapshot_download(repo_id: str, **kwargs: object) -> str:
        asked.update(kwargs, repo_id=repo_id)
        return str(one_file)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    load_model("llm-jp-4-32b-a3b-base")
    assert asked["repo_id"] == "llm-jp/llm-jp-4-32b-a3b-base"
    assert asked["allow_patterns"] == ["*.safetensors", "*.json", "*.jinja"]
