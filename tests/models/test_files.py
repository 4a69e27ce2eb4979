"""Writing a file: no other file changes, and the file itself stays what it is."""

from __future__ import annotations

import argparse
import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import bench.tune
import stlm_models.files
from bench.harness import results
from stlm_models.files import is_stdout, replace_file, require_writable
from stlm_models.training.progress import Metrics, draw_loss_curve, read_metrics

NOT_FOR_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")


def in_a_child(work: Callable[[], None], stdout: int | None = None) -> None:
    """Run `work` in a process of its own, whose standard output is this descriptor."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if stdout is not None:
                os.dup2(stdout, 1)
            work()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class TestNeighbours:
    """Case f01: `.NAME`, which a user may have, was taken for the temporary of NAME."""

    @pytest.mark.parametrize(
        "neighbour", [".env", "env.part", "env.tmp", "env~", ".env.part", ".stlm-00.part"]
    )
    def test_they_stay(self, tmp_path: Path, neighbour: str) -> None:
        (tmp_path / neighbour).write_text("SECRET=mine\n")
        (tmp_path / "env").write_text("old")
        replace_file(tmp_path / "env", b"A=1\n")
        assert (tmp_path / neighbour).read_text() == "SECRET=mine\n"
        assert (tmp_path / "env").read_bytes() == b"A=1\n"
        assert sorted(os.listdir(tmp_path)) == sorted(["env", neighbour])

    def test_a_folder_named_as_a_temporary(self, tmp_path: Path) -> None:
        (tmp_path / ".env").mkdir()
        replace_file(tmp_path / "env", b"x")
        assert sorted(os.listdir(tmp_path)) == [".env", "env"]

    def test_the_longest_name(self, tmp_path: Path) -> None:
        name = "n" * 255
        replace_file(tmp_path / name, b"x")
        assert os.listdir(tmp_path) == [name]

    def test_two_writers_at_once(self, tmp_path: Path) -> None:
        contents = [bytes([letter]) * 100_000 for letter in b"ab"]
        writers = [
            threading.Thread(target=lambda c=c: [replace_file(tmp_path / "f", c) for _ in range(9)])
            for c in contents
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert (tmp_path / "f").read_bytes() in contents
        assert os.listdir(tmp_path) == ["f"]


class TestWriters:
    """Writers of files go through `replace_file`: neighbours and links stay."""

    def test_of_a_run(self, tmp_path: Path) -> None:
        kept = [".loss.png", ".metrics.jsonl"]
        for name in kept:
            (tmp_path / name).write_text("mine")
        (tmp_path / "elsewhere").write_text("")
        (tmp_path / "metrics.jsonl").symlink_to("elsewhere")
        metrics = Metrics(tmp_path)
        record = {"step": 1, "seconds": 60.0, "bits_per_byte": 2.0}
        metrics.write(record)
        draw_loss_curve(tmp_path)
        Metrics(tmp_path, step=1)
        assert [(tmp_path / name).read_text() for name in kept] == ["mine"] * 2
        assert (tmp_path / "metrics.jsonl").is_symlink()
        assert json.loads((tmp_path / "elsewhere").read_text()) == record
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")

    def test_metrics_that_go_to_a_device(self, tmp_path: Path) -> None:
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left on device"):
            Metrics(tmp_path).write({"step": 1})
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").symlink_to("/dev/null")
        Metrics(tmp_path).write({"step": 1})
        assert read_metrics(tmp_path) == []

    def test_of_benchmarks(self, tmp_path: Path) -> None:
        (tmp_path / "device.part").write_text("mine")
        about = dict.fromkeys(("device", "torch", "triton", "commit", "date"), "x")
        bench.tune.write(tmp_path / "device.json", about, {"key": {"us": 1.0}})
        bench.tune.write(tmp_path / "device.json", about, {"other": {"us": 2.0}})
        assert (tmp_path / "device.part").read_text() == "mine"
        assert bench.tune.entries_of_file(tmp_path / "device.json").keys() == {"key", "other"}
        assert sorted(os.listdir(tmp_path)) == ["device.json", "device.part"]

    def test_the_place_of_a_result_is_tried_without_a_trace(self, tmp_path: Path) -> None:
        """Trying left an empty file, which stayed where the work failed."""
        parser = argparse.ArgumentParser()
        path = results.result_path(tmp_path / "new" / "result.json", "name", parser)
        assert not path.exists()
        results.write_json(path, {"a": 1})
        assert json.loads(path.read_text()) == {"a": 1}
        with pytest.raises(SystemExit):
            results.result_path(tmp_path, "name", parser)


class TestLinks:
    def test_a_link_stays_and_its_file_changes(self, tmp_path: Path) -> None:
        (tmp_path / "real").write_text("old")
        (tmp_path / "link").symlink_to(tmp_path / "real")
        replace_file(tmp_path / "link", b"new")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real").read_bytes() == b"new"

    def test_relative_links_in_a_chain(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "there").mkdir()
        (tmp_path / "there" / "real").write_text("old")
        (tmp_path / "there" / "second").symlink_to("real")
        (tmp_path / "first").symlink_to("there/second")
        monkeypatch.chdir(tmp_path)
        replace_file(Path("first"), b"new")
        assert os.readlink("first") == "there/second"
        assert os.readlink("there/second") == "real"
        assert (tmp_path / "there" / "real").read_bytes() == b"new"
        assert sorted(os.listdir("there")) == ["real", "second"]

    def test_a_link_to_a_file_that_is_yet_to_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "there").mkdir()
        (tmp_path / "link").symlink_to("there/real")
        replace_file(tmp_path / "link", b"new")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "there" / "real").read_bytes() == b"new"

    def test_a_link_to_itself(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("link")
        with pytest.raises(OSError, match="link") as caught:
            replace_file(tmp_path / "link", b"x")
        assert caught.value.errno == errno.ELOOP
        assert os.readlink(tmp_path / "link") == "link"

    def test_other_hard_links_keep_the_old_content(self, tmp_path: Path) -> None:
        (tmp_path / "one").write_text("old")
        os.link(tmp_path / "one", tmp_path / "two")
        replace_file(tmp_path / "one", b"new")
        assert (tmp_path / "two").read_text() == "old"
        assert (tmp_path / "one").read_bytes() == b"new"


class TestWhatIsNoRegularFile:
    @pytest.mark.parametrize("size", [1, 300_000])  # more than a pipe holds
    def test_a_fifo(self, tmp_path: Path, size: int) -> None:
        os.mkfifo(tmp_path / "fifo")
        read: list[bytes] = []
        reader = threading.Thread(target=lambda: read.append((tmp_path / "fifo").read_bytes()))
        reader.start()
        replace_file(tmp_path / "fifo", b"x" * size)
        reader.join()
        assert read == [b"x" * size]
        assert (tmp_path / "fifo").is_fifo()
        assert os.listdir(tmp_path) == ["fifo"]

    def test_a_fifo_that_no_process_reads_from(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Writing to it would lose what is written."""
        monkeypatch.setattr(stlm_models.files, "SECONDS_FOR_A_READER", 0.05)
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(OSError, match=r"No process reads from this FIFO: '.*/fifo'"):
            replace_file(tmp_path / "fifo", b"x")
        assert (tmp_path / "fifo").is_fifo()

    def test_a_device(self) -> None:
        replace_file(Path("/dev/null"), b"x")
        assert Path("/dev/null").is_char_device()
        with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
            replace_file(Path("/dev/full"), b"x")
        assert Path("/dev/full").is_char_device()

    def test_a_folder(self, tmp_path: Path) -> None:
        for write in (lambda: replace_file(tmp_path, b"x"), lambda: require_writable(tmp_path)):
            with pytest.raises(IsADirectoryError, match=str(tmp_path)):
                write()

    @pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
    def test_standard_output_that_is_a_file(self, tmp_path: Path, name: str) -> None:
        """Output is not replaced under its name: what was written before and after stays."""
        (tmp_path / "link").symlink_to("/dev/stdout")
        path = tmp_path / name  # which is name where that is absolute

        def write() -> None:
            os.write(1, b"before ")
            assert is_stdout(path)
            replace_file(path, b"data")
            os.write(1, b" after")

        with (tmp_path / "out").open("wb") as out:
            in_a_child(write, out.fileno())
        assert (tmp_path / "out").read_bytes() == b"before data after"
        assert sorted(os.listdir(tmp_path)) == ["link", "out"]

    def test_standard_output_that_is_a_pipe(self) -> None:
        reader, writer = os.pipe()
        in_a_child(lambda: replace_file(Path("/dev/stdout"), b"data"), writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            assert pipe.read() == b"data"

    def test_what_is_not_standard_output(self, tmp_path: Path) -> None:
        (tmp_path / "1").touch()
        for path in ("/dev/null", "/dev/stderr", tmp_path / "1", tmp_path / "none"):
            assert not is_stdout(Path(path))


class TestModes:
    @pytest.mark.parametrize("mode", [0o600, 0o640, 0o755, 0o666])
    def test_the_mode_stays(self, tmp_path: Path, mode: int) -> None:
        (tmp_path / "f").touch()
        (tmp_path / "f").chmod(mode)
        replace_file(tmp_path / "f", b"new")
        assert (tmp_path / "f").stat().st_mode & 0o7777 == mode

    @pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
    def test_a_new_file_honours_the_umask(self, tmp_path: Path, mask: int) -> None:
        before = os.umask(mask)
        try:
            replace_file(tmp_path / "f", b"new")
        finally:
            os.umask(before)
        assert (tmp_path / "f").stat().st_mode & 0o7777 == 0o666 & ~mask

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
    def test_the_owner_stays(self, tmp_path: Path) -> None:
        (tmp_path / "f").touch()
        os.chown(tmp_path / "f", 1234, 2345)
        replace_file(tmp_path / "f", b"new")
        found = (tmp_path / "f").stat()
        assert (found.st_uid, found.st_gid) == (1234, 2345)

    def test_the_group_stays_where_the_owner_cannot(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file of a colleague's that the group may write to."""
        given = []

        def chown(path: Path, owner: int, group: int) -> None:
            if owner != -1:
                raise PermissionError(errno.EPERM, "Operation not permitted")
            given.append(group)

        (tmp_path / "f").touch()
        monkeypatch.setattr(os, "chown", chown)
        replace_file(tmp_path / "f", b"new")
        assert given == [(tmp_path / "f").stat().st_gid]


class TestFailures:
    @pytest.mark.parametrize("name", ["write", "fsync", "replace"])
    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
    def test_the_old_file_stays_and_no_temporary(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException
    ) -> None:
        def fail(*_: object) -> None:
            raise error

        (tmp_path / "f").write_text("old")
        if name == "write":
            monkeypatch.setattr(stlm_models.files, "_write_all", fail)
        else:
            monkeypatch.setattr(os, name, fail)
        with pytest.raises(type(error)):
            replace_file(tmp_path / "f", b"new")
        assert (tmp_path / "f").read_text() == "old"
        assert os.listdir(tmp_path) == ["f"]

    def test_a_missing_folder(self, tmp_path: Path) -> None:
        for write in (lambda p: replace_file(p, b"x"), require_writable):
            with pytest.raises(FileNotFoundError, match=r"No such file .*: '.*/none/f'"):
                write(tmp_path / "none" / "f")

    def test_a_folder_that_vanishes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        replace = os.replace

        def late(source: Path, target: Path) -> None:
            source.unlink()
            folder.rmdir()
            replace(source, target)

        monkeypatch.setattr(os, "replace", late)
        with pytest.raises(FileNotFoundError, match=r"'.*/folder/f'"):
            replace_file(folder / "f", b"x")
        assert os.listdir(tmp_path) == []

    def test_a_folder_that_cannot_be_synced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The file is there all the same: no error may say that it is not."""

        def fail(folder: Path) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(stlm_models.files, "sync_folder", fail)
        replace_file(tmp_path / "f", b"new")
        assert (tmp_path / "f").read_bytes() == b"new"

    @NOT_FOR_ROOT
    @pytest.mark.parametrize("what", ["folder", "file"])
    def test_what_is_read_only(self, tmp_path: Path, what: str) -> None:
        check_read_only(tmp_path, what)

    @pytest.mark.skipif(os.geteuid() != 0, reason="as another user, which only root may become")
    @pytest.mark.parametrize("what", ["folder", "file"])
    def test_what_is_read_only_for_another_user(self, tmp_path: Path, what: str) -> None:
        for folder in (tmp_path, *tmp_path.parents[:2]):
            folder.chmod(0o755)
        os.chown(tmp_path, 65534, 65534)

        def check() -> None:
            os.setgid(65534)
            os.setuid(65534)
            check_read_only(tmp_path, what)

        in_a_child(check)

    def test_whether_it_can_be_written_is_asked_without_a_trace(self, tmp_path: Path) -> None:
        require_writable(tmp_path / "new")
        assert os.listdir(tmp_path) == []
        (tmp_path / "old").write_text("old")
        os.mkfifo(tmp_path / "fifo")
        for name in ("old", "fifo"):
            require_writable(tmp_path / name)
        require_writable(Path("/dev/stdout"))
        assert (tmp_path / "old").read_text() == "old"
        assert sorted(os.listdir(tmp_path)) == ["fifo", "old"]


def check_read_only(folder: Path, what: str) -> None:
    """A read-only file in a folder of ours, or one of ours in a read-only folder, is refused."""
    (folder / "f").write_text("old")
    (folder / "f").chmod(0o444 if what == "file" else 0o644)
    folder.chmod(0o555 if what == "folder" else 0o755)
    try:
        for write in (lambda p: replace_file(p, b"new"), require_writable):
            with pytest.raises(PermissionError, match=r"Permission denied: '.*/f'"):
                write(folder / "f")
        assert (folder / "f").read_text() == "old"
        assert os.listdir(folder) == ["f"]
    finally:
        folder.chmod(0o755)
