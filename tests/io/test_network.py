"""Without a network: one sentence that names the file, the server, and the ways on; no retries in the log."""

import logging
import socket

import pytest
from PIL import Image
from tiny import prompt
from typer.testing import CliRunner

import mergetune as mt
from mergetune.cli import app

FAULT = socket.gaierror(-2, "Name or service not known")


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Every connection fails at once, as without a network; nothing has been downloaded before."""

    def refuse(*args, **kwargs):
        raise FAULT

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "what", "way_on"),
    [
        (("ViT-B-32", "laion2b_s34b_b79k"), "the weights 'laion2b_s34b_b79k' of 'ViT-B-32'", "a checkpoint file"),
        (("hf-hub:org/clip",), "open_clip_config.json of hf-hub:org/clip", "local-dir:FOLDER"),
    ],
)
def test_a_download_without_a_network_is_one_sentence(no_network, arguments, what, way_on, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError) as caught:
        mt.load_clip(*arguments, cache_dir=no_network / "cache")
    said = str(caught.value)
    assert said.startswith(f"{what} could not be downloaded (https://huggingface.co: ")
    assert "check the network connection, or" in said and way_on in said and "cache_dir" in said
    assert "\n" not in said and len(said) < 400
    assert caught.value.__cause__ is None and caught.value.__suppress_context__  # no chain of tracebacks
    assert not [record for record in caplog.records if "etry" in record.message]


def test_on_the_command_line_it_is_one_line(no_network):
    for name in ("cat", "dog"):
        (no_network / "photos" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(no_network / "photos" / "train" / name / "a.png")
    arguments = ["cache", no_network / "photos", "--out", no_network / "out", "--backbone", "hf-hub:org/clip"]
    shown = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert shown.exit_code == 1 and len(shown.stderr.strip().splitlines()) == 1
    assert shown.stderr.startswith("failed: open_clip_config.json of hf-hub:org/clip could not be downloaded")


def test_an_upload_without_a_network_is_one_sentence(no_network):
    with pytest.raises(RuntimeError, match=r"^me/prompt could not be uploaded \(https://huggingface.co: ") as caught:
        mt.push_to_hub(prompt(1), "me/prompt", token="hf_none")
    assert "\n" not in str(caught.value) and "to_hub" in str(caught.value)
