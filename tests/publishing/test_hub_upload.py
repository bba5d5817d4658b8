"""Uploads to an imitation of the Hub: the files arrive in one commit, and what fails is one line."""

import shlex

import pytest
from hub_kit import LICENSES, connected_hub
from huggingface_hub import constants

from EasyLM.errors import UserError
from EasyLM.publishing import CardTexts, card_text, prepare_repository, upload_files


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with connected_hub(monkeypatch, tmp_path) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path):
    """A folder of a small and a large file, and of one that is not uploaded."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "README.md").write_text(card_text("Model", "A model.", CardTexts(license="mit"), {}, {}))
    (path / "model.safetensors").write_bytes(b"weights" * 100)
    (path / "streaming_train_state").write_bytes(b"private")
    return path


def test_named_files_are_uploaded_in_one_commit(hub, folder):
    parent = prepare_repository("Owner/model")
    assert hub.repositories == {"Owner/model": {".gitattributes": b"*.safetensors filter=lfs"}}
    address = upload_files("Owner/model", str(folder), ["README.md", "model.safetensors"], parent)
    assert address.endswith("/Owner/model")
    files = hub.repositories["Owner/model"]
    assert set(files) == {".gitattributes", "README.md", "model.safetensors"} and hub.commits == 1
    assert files["model.safetensors"] == b"weights" * 100
    with pytest.raises(UserError, match=r"^the repository holds README\.md, model\.safetensors: name a new or"):
        prepare_repository("Owner/model")


def test_an_empty_repository_is_used(hub):
    assert prepare_repository("Owner/model") == prepare_repository("Owner/model") == hub.head("Owner/model")


def test_what_somebody_else_uploads_meanwhile_is_not_replaced(hub, folder):
    parent = prepare_repository("Owner/model")
    hub.repositories["Owner/model"]["README.md"] = b"other"
    with pytest.raises(UserError, match=r"^someone else has written to the repository since this command began"):
        upload_files("Owner/model", str(folder), ["README.md"], parent)
    assert hub.repositories["Owner/model"]["README.md"] == b"other" and not hub.commits


@pytest.mark.parametrize("name", ["model", "Owner/model/folder", "Owner/model@main", "/Owner/model", "./model"])
def test_other_names_are_refused_before_the_hub_is_asked(name):
    with pytest.raises(UserError, match=r"^must be OWNER/NAME"):
        prepare_repository(name)


def test_tokens_that_may_not_write(hub, folder, monkeypatch):
    with pytest.raises(UserError, match=r"^the token may not write there"):
        prepare_repository("Other/model")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(UserError, match=r"^there is no valid token: set HF_TOKEN"):
        prepare_repository("Owner/model")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"^there is no valid token: set HF_TOKEN"):
        prepare_repository("Owner/model")
    assert hub.repositories == {}


def test_an_upload_that_fails_names_what_is_complete(hub, folder):
    parent = prepare_repository("Owner/model")
    hub.fails = 403
    with pytest.raises(UserError, match=rf"may not write .*; {folder} is complete: `hf upload Owner/model ") as error:
        upload_files("Owner/model", str(folder), ["model.safetensors", "README.md"], parent)
    _, command, _ = str(error.value).split("`")
    # The command uploads the same files, and none of the others in the folder.
    assert shlex.split(command)[4:] == [".", "--include=README.md", "--include=model.safetensors"]
    hub.fails = 0
    (folder / "README.md").write_text("---\nlicense: unknown\n---\n")
    with pytest.raises(UserError, match=f"Invalid metadata.*must be one of \\('{LICENSES[0]}'.*hf upload") as error:
        upload_files("Owner/model", str(folder), ["README.md"], parent)
    assert "\n" not in str(error.value) and set(hub.repositories["Owner/model"]) == {".gitattributes"}


def test_no_network_is_one_line(hub, monkeypatch, port):
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(UserError, match="refused"):
        prepare_repository("Owner/model")
