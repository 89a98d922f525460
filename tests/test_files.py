"""Places to write, and damaged files."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lerobot_vla0 import files
from lerobot_vla0.files import check_place, new_file, new_folder, read_json, reading


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_new_folder_is_whole_or_absent(tmp_path):
    (tmp_path / "out").mkdir()  # empty
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("content")
        assert not any((tmp_path / "out").iterdir())
    assert tree(tmp_path) == {"out", "out/file"}
    with pytest.raises(FileExistsError, match="exists and is not empty"), new_folder(tmp_path / "out"):
        pytest.fail("must not begin")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "deep/er/other") as folder:
        (folder / "file").write_text("content")
        raise KeyboardInterrupt
    with new_folder(tmp_path / "out", replace=True) as folder:
        (folder / "second").touch()
        assert (tmp_path / "out/file").is_file()
    assert tree(tmp_path) == {"out", "out/second"}


def test_new_file_is_whole_or_as_before(tmp_path):
    out = tmp_path / "deep/file.txt"
    with new_file(out) as draft:
        draft.write_text("first")
    with pytest.raises(RuntimeError), new_file(out) as draft:
        draft.write_text("half")
        raise RuntimeError
    assert out.read_text() == "first" and tree(tmp_path) == {"deep", "deep/file.txt"}


@pytest.mark.parametrize(
    ("out", "kind", "message"),
    [
        (".", "new folder", "out='.' is the working directory"),
        ("", "new folder", "out='' is the working directory"),
        ("../cwd", "new folder", "is the working directory"),
        ("link", "new folder", "out='link' is a symbolic link. Name a new folder in it"),
        ("dangling", "new folder", "out='dangling' is there and is no folder"),
        ("file", "new folder", "out='file' is there and is no folder"),
        ("file/out", "new folder", "cannot be made: .*file is no folder"),
        ("file/out", "file", "cannot be made: .*file is no folder"),
        ("file/out", "folder", "cannot be made: .*file is no folder"),
        ("../empty", "file", "out='../empty' is there and is no plain file"),
        ("/dev/null", "file", "out='/dev/null' is there and is no plain file"),
        ("pipe", "file", "is there and is no plain file"),
        ("file_link", "file", "is there and is no plain file"),
        ("/proc/no/such", "new folder", "out='/proc/no/such' cannot be written"),
        ("/proc/file", "file", "out='/proc/file' cannot be written"),
        ("/sys", "folder", "out='/sys' cannot be written"),
        ("a" * 300, "new folder", "cannot be written .*name too long"),
        ("a" * 300, "file", "cannot be written .*name too long"),
        ("nul\0l", "folder", "cannot be written .*null byte"),
    ],
)
def test_places_that_cannot_be_written(out, kind, message, tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    if out not in (".", "", "../cwd"):
        os.symlink(tmp_path / "empty", "link")
        os.symlink("gone", "dangling")
        os.symlink("file", "file_link")
        os.mkfifo("pipe")
        Path("file").touch()
    before = tree(tmp_path)
    with pytest.raises(OSError, match=f"(?i){message}"):
        check_place(out, kind)
    assert tree(tmp_path) == before


def test_mount_point(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(FileExistsError, match="is a mount point. Name a new folder in it"):
        check_place(tmp_path, "new folder")
    assert check_place(tmp_path, "folder") == tmp_path  # files are written into it


def test_read_only_place(tmp_path, monkeypatch):
    """Root may write anywhere else than on a read-only file system."""

    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("lerobot_vla0.files.tempfile.mkdtemp", refuse)
    for kind in ("new folder", "folder", "file"):
        with pytest.raises(OSError, match=r"output_dir=.*cannot be written \(Read-only file system\)"):
            check_place(tmp_path / "out", kind, "output_dir")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # as tokenizers
        OSError(27, "File too large"),
    ],
)
def test_full_disk(error, tmp_path):
    for write in (new_folder, new_file):
        message = "out' could not be written: .*Nothing of it was left"
        with pytest.raises(OSError, match=message), write(tmp_path / "sub/out"):
            raise error
        assert not tree(tmp_path)


def test_left_overs_of_killed_runs(tmp_path):
    """Of this place only, and not those of a run that is still at work."""
    code = """
import os, runpy, signal, sys
new_folder = runpy.run_path(sys.argv[2])["new_folder"]  # without the package, whose import takes seconds
with new_folder(sys.argv[1]) as folder:
    (folder / "weights").touch()
    print(flush=True)
    sys.stdin.read() or os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out"), files.__file__]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    runs = [subprocess.Popen(command, **pipes) for _ in range(2)]
    killed, running = runs
    for run in runs:
        run.stdout.readline()
    killed.stdin.close()
    assert killed.wait() == -signal.SIGKILL
    (tmp_path / ".out-other").mkdir()
    (tmp_path / ".out2-partial-x").mkdir()
    assert len(list(tmp_path.glob(".out-partial-*"))) == 2
    with new_folder(tmp_path / "out") as folder:
        assert len(list(tmp_path.glob(".out-partial-*"))) == 2  # the running one's, and this one's
        assert folder.parent.parent == tmp_path
    running.kill()
    running.wait()
    with new_folder(tmp_path / "out", replace=True):
        pass
    assert tree(tmp_path) == {"out", ".out-other", ".out2-partial-x"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"[1]", "must hold a JSON object, not list"),
        (b"\xff\xfe", "'utf-8' codec can't decode"),
        (b"[" * 100_000, "recursion"),
        (b'{"a": {"b": [1]}}', "the field 'steps' is missing"),
        (b'{"steps": 3}', "a field has a value of the wrong type"),
        (b'{"steps": {"a": 1}}', "the field 'name' is missing"),
        (b'{"steps": {"name": {}}}', "a field has a value of the wrong type"),
    ],
)
def test_damaged_json(content, message, tmp_path):
    file = tmp_path / "some.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"some.json is damaged.*{message}"), reading(file):
        read_json(file)["steps"]["name"].lower()
