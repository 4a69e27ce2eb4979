"""Files of a corpus: each once, whatever its names; what walks leave out, and say so."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from stlm_models.data.corpus import load_corpus
from stlm_models.data.corpus_files import find_files, identity

TEXT = random.Random(0).randbytes(25_600)
HELD_OUT = TEXT[23_040:]


def write(root: Path, *names: str) -> None:
    """Files that hold their own names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def documents_of(*paths: object, out: Path | None = None) -> list[str]:
    """The contents of the files, which are their names."""
    files, _ = find_files([str(path) for path in paths], out=out)
    return [file.path.read_text() for file in files]


def assert_text_once(*paths: object) -> None:
    corpus = load_corpus([str(path) for path in paths])
    train = b"".join(corpus.train)
    assert train == TEXT[:23_040]
    assert corpus.held_out == [HELD_OUT]
    assert HELD_OUT not in train


class TestEachFileOnce:
    def test_of_a_hub_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hub = tmp_path / "datasets--me--corpus"
        for folder in ("blobs", "refs", "snapshots/abc", "snapshots/def"):
            (hub / folder).mkdir(parents=True)
        (hub / "blobs/9f86").write_bytes(TEXT)
        (hub / "refs/main").write_bytes(b"abc")
        for revision in ("abc", "def"):
            (hub / f"snapshots/{revision}/train.txt").symlink_to("../../blobs/9f86")
        assert_text_once(hub)
        assert_text_once(tmp_path)
        assert_text_once(hub / "blobs", hub)
        monkeypatch.chdir(hub)
        assert_text_once(".")
        files, notes = find_files([str(hub)])
        assert [path.name for path in files[0].names] == ["train.txt"] * 2
        assert notes[0].startswith("left out: 2 blobs and refs folders of hub caches")

    def test_by_links_and_paths(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "a" / "text"
        file.parent.mkdir()
        file.write_bytes(TEXT)
        (tmp_path / "soft").symlink_to(file)
        os.link(file, tmp_path / "hard")
        (tmp_path / "folder").symlink_to(file.parent)
        monkeypatch.chdir(file.parent)
        assert_text_once(tmp_path)
        assert_text_once("text", file)
        assert_text_once(file, file, "../a/text", "../folder/text", "../hard")
        assert_text_once("../*/text", "../**/te*", tmp_path / "**", tmp_path / "a" / "*")
        assert_text_once(tmp_path / "folder", tmp_path, tmp_path / "a")

    def test_without_inodes_by_path(self, tmp_path: Path) -> None:
        """Some network file systems number nothing."""
        write(tmp_path, "a", "b")
        (tmp_path / "link").symlink_to("a")
        status = os.stat_result((0o100644, 0, 7, 1, 0, 0, 5, 0, 0, 0))
        a, b, link = (identity(status, tmp_path / name) for name in ("a", "b", "link"))
        assert a == link != b

    def test_in_a_loop_of_links(self, tmp_path: Path) -> None:
        write(tmp_path, "a/1", "b/2")
        (tmp_path / "a/up").symlink_to("..")
        (tmp_path / "b/other").symlink_to("../a")
        (tmp_path / "itself").symlink_to("itself")
        assert sorted(documents_of(tmp_path)) == ["a/1", "b/2"]
        assert sorted(documents_of(tmp_path / "**/*")) == ["a/1", "b/2"]
        _, notes = find_files([str(tmp_path)])
        assert notes == [f"left out: 1 link to nothing, {tmp_path / 'itself'}"]

    def test_through_a_linked_folder(self, tmp_path: Path) -> None:
        write(tmp_path, "elsewhere/1", "data/2")
        (tmp_path / "data/more").symlink_to("../elsewhere")
        assert documents_of(tmp_path / "data") == ["data/2", "elsewhere/1"]


class TestWalks:
    def test_leave_out_what_is_not_meant_and_say_so(self, tmp_path: Path) -> None:
        write(tmp_path, "a.txt", "b/c.txt", ".git/config", ".venv/x.py", "b/.hidden", "b/.d/x")
        write(tmp_path, "runs/x/metrics.jsonl", "runs/x/checkpoints/step-00000001/config.json")
        write(tmp_path, "runs/y/checkpoints/step-00000001/manifest.json", "runs/notes.md")
        write(tmp_path, "env/pyvenv.cfg", "env/lib/x.py", "b/__pycache__/c.pyc", "out/log.txt")
        (tmp_path / "b/gone").symlink_to("nowhere")
        os.mkfifo(tmp_path / "b/pipe")
        wanted = ["a.txt", "b/c.txt", "runs/notes.md"]
        files, notes = find_files([str(tmp_path)], out=tmp_path / "out")
        assert [file.path.read_text() for file in files] == wanted
        assert documents_of(tmp_path / "**", out=tmp_path / "out") == wanted
        assert documents_of(tmp_path / "**/*.txt", out=tmp_path / "out") == wanted[:2]
        assert [note.partition(f" {tmp_path}")[0] for note in notes] == [
            "left out: 3 hidden folders, such as",
            "left out: 1 hidden file,",
            "left out: 2 folders of runs, such as",
            "left out: 1 output folder,",
            "left out: 1 virtual environment,",
            "left out: 1 __pycache__ folder,",
            "left out: 1 link to nothing,",
            "left out: 1 pipe, socket or device,",
        ]
        assert load_corpus([str(tmp_path)], out=tmp_path / "out").describe()[2:] == notes
        assert find_files([str(tmp_path), f"{tmp_path}/**"], out=tmp_path / "out")[1] == notes

    def test_what_is_named_is_read(self, tmp_path: Path) -> None:
        write(tmp_path, ".git/config", ".env", "run/metrics.jsonl", "run/checkpoints/x", "out/o")
        hidden, run = tmp_path / ".git", tmp_path / "run"
        assert documents_of(hidden) == [".git/config"]
        assert documents_of(tmp_path / ".env", tmp_path / ".g*") == [".env", ".git/config"]
        assert documents_of(run / "metrics.jsonl") == ["run/metrics.jsonl"]
        assert documents_of(run) == ["run/checkpoints/x", "run/metrics.jsonl"]
        assert documents_of(tmp_path / "out/o", out=tmp_path / "out") == ["out/o"]
        # Folders that a pattern without ** names are named as by a shell.
        assert documents_of(tmp_path / "r*") == ["run/checkpoints/x", "run/metrics.jsonl"]

    def test_the_output_folder_is_no_corpus(self, tmp_path: Path) -> None:
        write(tmp_path, "a")
        with pytest.raises(ValueError, match="data: expected another folder than the output"):
            find_files([str(tmp_path)], out=tmp_path / "." / "")
        with pytest.raises(ValueError, match="data: expected another folder than the output"):
            find_files([f"{tmp_path}/**/*"], out=tmp_path)
        assert documents_of(tmp_path, out=tmp_path / "not yet") == ["a"]

    def test_an_output_folder_by_another_name(self, tmp_path: Path) -> None:
        write(tmp_path, "a", "real/log")
        (tmp_path / "link").symlink_to("real")
        assert documents_of(tmp_path, out=tmp_path / "link") == ["a"]

    def test_patterns_with_any_number_of_folders(self, tmp_path: Path) -> None:
        write(tmp_path, "1.txt", "a/2.txt", "a/b/3.txt", "a/b/4.md", "c/b/5.txt")
        for pattern, wanted in {
            "**/*.txt": ["1.txt", "a/2.txt", "a/b/3.txt", "c/b/5.txt"],
            "a/**/*.txt": ["a/2.txt", "a/b/3.txt"],
            "**/b/*": ["a/b/3.txt", "a/b/4.md", "c/b/5.txt"],
            "[ac]/**/[35].*": ["a/b/3.txt", "c/b/5.txt"],
            "*/b/**": ["a/b/3.txt", "a/b/4.md", "c/b/5.txt"],
            "a/**": ["a/2.txt", "a/b/3.txt", "a/b/4.md"],
        }.items():
            assert documents_of(tmp_path / pattern) == wanted, pattern
        # Each walks anew, whatever was walked before.
        paths = [tmp_path / name for name in ("c", "**/[13].txt", "a/**/*.md", "a", "c/**")]
        assert documents_of(*paths[:3]) == ["1.txt", "a/b/3.txt", "a/b/4.md", "c/b/5.txt"]
        assert len(documents_of(*paths)) == 5

    def test_a_folder_that_cannot_be_read_is_an_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(tmp_path, "a/1", "b/2")
        listdir = os.listdir

        def refuse(folder: Path) -> list[str]:  # root may read everything
            if folder.name == "b":
                raise PermissionError(13, "Permission denied", str(folder))
            return listdir(folder)

        monkeypatch.setattr(os, "listdir", refuse)
        with pytest.raises(PermissionError, match=r"Permission denied: '.*/b'"):
            find_files([str(tmp_path)])


class TestNothing:
    @pytest.mark.parametrize("path", ["none", "*.txt", "**/*.txt", "no/**/x", "gone", "."])
    def test_is_an_error_that_says_what_was_left_out(self, tmp_path: Path, path: str) -> None:
        write(tmp_path, ".git/config")
        (tmp_path / "gone").symlink_to("nowhere")
        with pytest.raises(ValueError, match=r"data: expected a file, a folder .* got '") as raised:
            find_files([str(tmp_path / path)])
        assert ("left out: 1 hidden folder" in str(raised.value)) == (path in (".", "**/*.txt"))

    def test_an_empty_path(self) -> None:
        """Shells hand it over for a variable that is not set: it is not the current folder."""
        with pytest.raises(ValueError, match=r"data: expected a file, a folder .* got ''"):
            find_files([""])

    def test_one_bad_path_of_several(self, tmp_path: Path) -> None:
        write(tmp_path, "a")
        with pytest.raises(ValueError, match=r"got '.*none'"):
            find_files([str(tmp_path), str(tmp_path / "none")])

    def test_a_path_instead_of_a_list(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="data: expected a list of paths, got"):
            load_corpus(str(tmp_path))


def test_a_pipe_is_read_as_a_shell_hands_it_over(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(TEXT,))
    writer.start()
    assert_text_once(pipe, pipe)
    writer.join()
