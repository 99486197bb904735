"""`meshd ask --image` and `--audio`: what is sent, and what is said about a file that is of no use."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from tests.unit.support_media import audio_part, image_part, jpeg, png, text_part, wav

from meshd.cli import cli
from meshd.cli.attach import FILES_BYTES_MAX, message_of
from meshd.cli.failures import Exit


def written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def test_files_come_before_the_text_and_are_called_what_they_are(tmp_path: Path) -> None:
    red = written(tmp_path, "red.jpg", png())  # called JPEG, and none
    said = written(tmp_path, "said.wav", wav())
    assert message_of("What is it?", [red], [said]) == {
        "role": "user",
        "content": [image_part(png()), audio_part(wav()), text_part("What is it?")],
    }
    assert message_of("", [red], []) == {"role": "user", "content": [image_part(png())]}


def test_a_file_that_is_of_no_use_is_named_with_what_to_do(tmp_path: Path) -> None:
    heic = written(tmp_path, "photo.heic", b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.raises(click.UsageError, match=r"--image takes png.*magick photo.heic photo.jpg"):
        message_of("What?", [heic], [])
    song = written(tmp_path, "song.mp3", b"ID3\4" + bytes(40))
    with pytest.raises(click.UsageError, match=r"song\.mp3 is mp3; --image takes png, jpeg"):
        message_of("What?", [song], [])
    with pytest.raises(click.UsageError, match=r"red\.png is png; --audio takes wav, mp3, flac"):
        message_of("What?", [], [written(tmp_path, "red.png", png())])
    with pytest.raises(click.UsageError, match=r"cannot read .*none.png: No such file"):
        message_of("What?", [tmp_path / "none.png"], [])


def test_files_are_too_large_together(tmp_path: Path) -> None:
    half = written(tmp_path, "half.jpg", jpeg(FILES_BYTES_MAX // 2))
    message_of("", [half, half], [])
    with pytest.raises(click.UsageError, match=r"at most 12 MB together; make it smaller"):
        message_of("", [half, half, written(tmp_path, "one.png", png())], [])
    with pytest.raises(click.UsageError, match="17 images and sounds; at most 16"):
        message_of("", [half] * 17, [])


@pytest.mark.parametrize("option", ["--image", "--audio"])
def test_the_command_says_it_before_it_asks(tmp_path: Path, option: str) -> None:
    path = written(tmp_path, "notes.txt", b"hello")
    missing = str(tmp_path / "meshd.sock")
    told = CliRunner().invoke(cli, ["--socket", missing, "ask", "auto", "What?", option, str(path)])
    assert told.exit_code == Exit.USAGE
    assert "notes.txt is something else" in told.stderr
    ready = written(tmp_path, "a", png() if option == "--image" else wav())
    told = CliRunner().invoke(cli, ["--socket", missing, "ask", "auto", option, str(ready)])
    assert told.exit_code == Exit.UNREACHABLE  # a file alone is a question
