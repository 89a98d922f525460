import json
from pathlib import Path

import pytest

from lerobot_vla0.files import check_place, new_file, new_folder, read_json, reading, weight_files


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
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "other") as folder:
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


def test_places_that_hold_something_else(tmp_path):
    (tmp_path / "file").touch()
    for kind in ("new folder", "folder"):
        with pytest.raises(FileExistsError, match="output_dir='.*file' is there and is no folder"):
            check_place(tmp_path / "file", kind, "output_dir")
    with pytest.raises(FileExistsError, match="is there and is no file"):
        check_place(tmp_path, "file")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[1]", "not a JSON object but a list"),
        (b"\xff\xfe", "utf-8"),
        (b"[" * 100_000, "recursion"),
        (b"{}", "KeyError: 'steps'"),
        (b'{"steps": 3}', "TypeError"),
    ],
)
def test_damaged_json(content, reason, tmp_path):
    file = tmp_path / "some.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"some.json is damaged .*{reason}"), reading(file):
        read_json(file)["steps"]["name"]


def test_weights_elsewhere(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for name in ("../elsewhere.safetensors", "/etc/passwd"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError, match=f"names '{name}', which is not in its folder"):
            weight_files(tmp_path)
