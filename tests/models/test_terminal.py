"""Commands and the terminal: any text, any argument, and no traceback where none is printed."""

from __future__ import annotations

import importlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.models import TINY, scrambled

import stlm_kernels.env
import stlm_models.compress
import stlm_models.decompress
import stlm_models.generate
import stlm_models.presets
import stlm_models.summary
import stlm_models.train
from stlm_kernels.terminal import bytes_of, command, note, print_result
from stlm_models.checkpoint import Checkpoint, save_checkpoint

ROOT = Path(__file__).parents[2]
COMMANDS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("stlm_kernels", "stlm_models", "bench")
    for path in sorted((ROOT / package).rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text()
]
WORDS = b"the cat sat on the mat, and the dog sat by the door. " * 60


@contextmanager
def standard_output(
    to: str | Path, encoding: str = "utf-8", errors: str = "strict"
) -> Iterator[Any]:
    """A standard output of the process: "closed" is a pipe that is not read, else a path.

    At its end it is flushed, as the interpreter does, which would complain about what is left.
    """
    if to == "closed":
        reader, descriptor = os.pipe()
        os.close(reader)
    else:
        descriptor = os.open(to, os.O_WRONLY | os.O_CREAT, 0o666)
    before = sys.stdout
    sys.stdout = io.TextIOWrapper(os.fdopen(descriptor, "wb"), encoding=encoding, errors=errors)
    try:
        yield sys.stdout
        assert sys.stdout.errors == errors, "put back"
        sys.stdout.close()
    finally:
        sys.stdout = before


@pytest.fixture(name="run")
def run_folder(tmp_path: Path) -> Path:
    checkpoint = Checkpoint(TINY, scrambled().state_dict(), {}, {"step": 1})
    save_checkpoint(tmp_path / "run", checkpoint)
    return tmp_path / "run"


class TestCommand:
    def test_the_status(self) -> None:
        assert [command()(lambda status=s: status)() for s in (None, 0, 1, 7)] == [0, 0, 1, 7]

    @pytest.mark.parametrize("n_lines", [1, 100_000])  # what a buffer holds, and more
    @pytest.mark.parametrize("status", [0, 3])
    def test_a_closed_pipe(
        self, capsys: pytest.CaptureFixture[str], n_lines: int, status: int
    ) -> None:
        @command(on_closed_pipe=status)
        def main() -> None:
            for line in range(n_lines):
                print(line)

        with standard_output("closed"):
            assert main() == status
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("n_lines", [1, 100_000])
    def test_a_full_device(self, capsys: pytest.CaptureFixture[str], n_lines: int) -> None:
        @command()
        def main() -> None:
            for line in range(n_lines):
                print(line)

        with standard_output("/dev/full"):
            assert main() == 1
        assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"

    def test_ctrl_c(self, capsys: pytest.CaptureFixture[str]) -> None:
        @command()
        def main() -> None:
            print("half a line", end="")
            raise KeyboardInterrupt

        assert main() == 130
        assert capsys.readouterr() == ("half a line", "\nstopped\n")

    def test_a_verdict_that_is_not_read(self) -> None:
        @command()
        def main() -> int:
            print("failed")
            return 5

        with standard_output("closed"):
            assert main() == 5

    def test_another_pipe_that_is_closed(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Pipes to a process that has died are no quiet end."""

        @command()
        def main() -> None:
            raise BrokenPipeError(32, "Broken pipe")

        assert main() == 1
        assert capsys.readouterr().err == "error: [Errno 32] Broken pipe\n"

    @pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "koi8-r"])
    @pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
    def test_text_beyond_the_encoding(self, tmp_path: Path, encoding: str, errors: str) -> None:
        @command()
        def main() -> None:
            print("\ufffd 𝄞 \udce9 \u2028.")

        with standard_output(tmp_path / "out", encoding, errors):
            assert main() == 0
        assert (tmp_path / "out").read_bytes() == b"\\ufffd \\U0001d11e \\udce9 \\u2028.\n"

    def test_a_choice_of_the_user(self, tmp_path: Path) -> None:
        """PYTHONIOENCODING=ascii:replace, for instance."""

        @command()
        def main() -> None:
            print("é")

        with standard_output(tmp_path / "out", "ascii", "replace"):
            assert main() == 0
        assert (tmp_path / "out").read_bytes() == b"?\n"

    def test_without_any_output(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """None stands for outputs closed by `>&-` and `2>&-`; print takes it for stdout."""
        monkeypatch.setattr(sys, "stdout", None)
        monkeypatch.setattr(sys, "stderr", None)

        @command()
        def main() -> int:
            print("out")
            note("note")
            print_result("result")
            return 4

        assert main() == 4

    def test_without_standard_error(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "stderr", None)
        note("for standard error alone")
        assert capsys.readouterr().out == ""

    def test_a_standard_error_that_is_closed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        stderr = io.TextIOWrapper(os.fdopen(writer, "wb", 0), write_through=True)
        monkeypatch.setattr(sys, "stderr", stderr)
        note("a line", "another")
        stderr.close()
        note("even then")

    @pytest.mark.parametrize(
        ("to", "message"),
        [("closed", ""), ("/dev/full", "warning: the result could not be printed: [Errno 28]")],
    )
    def test_a_result_that_cannot_be_printed(
        self, capsys: pytest.CaptureFixture[str], to: str, message: str
    ) -> None:
        """The work is done and kept."""

        @command()
        def main() -> None:
            for _ in range(2):
                print_result("bits per byte")

        with standard_output(to):
            assert main() == 0
        error = capsys.readouterr().err
        assert error.startswith(message)
        assert error.count("\n") == bool(message)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("to", ["closed", "/dev/full"])
def test_every_command_shows_its_help(
    capsys: pytest.CaptureFixture[str], name: str, to: str
) -> None:
    main = importlib.import_module(name).main
    assert hasattr(main, "__wrapped__"), (
        f"{name}.main: decorate it with stlm_kernels.terminal.command"
    )
    with standard_output(to):
        try:
            status = main(["--help"])
        except SystemExit as end:
            status = end.code
    error = capsys.readouterr().err
    if to == "closed":
        assert (status, error) in ((0, ""), (1, ""))
    else:
        assert (status, error) == (1, "error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_keeps_the_lines_of_the_description(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    module = importlib.import_module(name)
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    assert module.__doc__.strip() in capsys.readouterr().out


def test_there_are_commands() -> None:
    assert {"stlm_models.train", "stlm_models.generate", "stlm_kernels.env"} < set(COMMANDS)


class TestGenerate:
    """Case f09."""

    def generate(self, run: Path, *arguments: str) -> int:
        common = ["--run", str(run), "--max-new-bytes", "60", "--seed", "1"]
        return stlm_models.generate.main([*common, *arguments])

    def test_an_encoding_that_cannot_hold_the_text(self, run: Path, tmp_path: Path) -> None:
        with standard_output(tmp_path / "out", "cp1252"):
            assert self.generate(run, "--prompt", "abc") == 0
        text = (tmp_path / "out").read_bytes().decode("cp1252")
        assert text.startswith("abc")
        assert r"\ufffd" in text  # the scrambled model's bytes are no UTF-8

    @pytest.mark.parametrize("prompt", [b"caf\xe9", b"\xff", b"\xc3", b"\x80abc\xfe", b"\xc3\xa9"])
    def test_a_prompt_of_any_bytes(
        self,
        run: Path,
        prompt: bytes,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        seen: list[object] = []

        def stream(model: object, prompt: object, **_: object) -> Iterator[str]:
            seen.append(prompt)
            return iter(["!"])

        monkeypatch.setattr(stlm_models.STLM, "stream", stream)
        assert self.generate(run, "--prompt", os.fsdecode(prompt)) == 0
        assert seen == [prompt]
        assert capsys.readouterr().out == prompt.decode("utf-8", "backslashreplace") + "!\n"

    def test_a_stop_of_any_bytes(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: dict[str, Any] = {}

        def stream(model: object, prompt: object, **options: object) -> Iterator[str]:
            seen.update(options)
            return iter(())

        monkeypatch.setattr(stlm_models.STLM, "stream", stream)
        assert self.generate(run, "--stop", "\udcff", "--stop", "ë") == 0
        assert seen["stop"] == [b"\xff", "ë".encode()]

    def test_what_is_no_argument(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.generate(run, "--prompt", "\ud800") == 1
        assert capsys.readouterr().err.startswith("error: argument: expected text, got '\\ud800'")

    @pytest.mark.parametrize(("to", "status", "lines"), [("closed", 0, 0), ("/dev/full", 1, 1)])
    def test_where_it_cannot_be_printed(
        self, run: Path, capsys: pytest.CaptureFixture[str], to: str, status: int, lines: int
    ) -> None:
        with standard_output(to):
            assert self.generate(run, "--prompt", "abc") == status
        assert capsys.readouterr().err.count("\n") == lines


def test_a_shell(run: Path) -> None:
    """The whole way: arguments, encoding and pipes as the system hands them over."""
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT)}
    told = f"{sys.executable} -m stlm_models.generate --run {run} --max-new-bytes 9 --seed 1"
    script = f"""
set -o pipefail
{told} --prompt "$(printf 'caf\\351')"; echo "status $?"
{sys.executable} -m stlm_kernels.env | head -1; echo "status $?"
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, env=environment)
    assert done.stderr == b""
    assert done.stdout.startswith(rb"caf\xe9")
    assert re.findall(rb"status (\d+)", done.stdout) == [b"0", b"0"]
    assert b"\nstlm: " in done.stdout


class TestFiles:
    def test_a_name_that_is_not_utf8(self, run: Path, tmp_path: Path) -> None:
        source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
        source.write_bytes(WORDS[:50])
        with standard_output(tmp_path / "out"):
            assert stlm_models.compress.main(["--run", str(run), str(source)]) == 0
        assert rb"caf\udce9.stlm: 50 bytes" in (tmp_path / "out").read_bytes()
        back = tmp_path / "back"
        packed = f"{source}.stlm"
        assert stlm_models.decompress.main(["--run", str(run), packed, "-o", str(back)]) == 0
        assert back.read_bytes() == WORDS[:50]

    def test_a_file_on_standard_output_and_nothing_else(
        self, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        source, packed, back = (tmp_path / name for name in ("text", "packed", "back"))
        source.write_bytes(WORDS[:50])
        to_stdout = ["--run", str(run), "-o", "/dev/stdout"]
        for main, read, written in (
            (stlm_models.compress.main, source, packed),
            (stlm_models.decompress.main, packed, back),
        ):
            with written.open("wb") as file, redirected(1, file.fileno()):
                assert main([*to_stdout, str(read)]) == 0
        assert back.read_bytes() == WORDS[:50]
        assert capfd.readouterr().err.count("/dev/stdout: ") == 2

    @pytest.mark.parametrize(("to", "status", "lines"), [("closed", 0, 0), ("/dev/full", 1, 1)])
    def test_where_sizes_cannot_be_printed(
        self,
        run: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        to: str,
        status: int,
        lines: int,
    ) -> None:
        source = tmp_path / "text"
        source.write_bytes(WORDS[:20])
        with standard_output(to):
            assert stlm_models.compress.main(["--run", str(run), str(source)]) == status
        error = [line for line in capsys.readouterr().err.splitlines() if "bytes/s" not in line]
        assert len(error) == lines
        assert (tmp_path / "text.stlm").exists()

    @pytest.mark.parametrize("main", [stlm_models.compress.main, stlm_models.decompress.main])
    def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(
        self,
        run: Path,
        tmp_path: Path,
        main: Callable[..., int],
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for module in (stlm_models.compress, stlm_models.decompress):
            monkeypatch.setattr(module, "load_checkpoint", lambda run: pytest.fail("work"))
        (tmp_path / "text.stlm").write_bytes(b"x")
        out = tmp_path / "none" / "out"
        assert main(["--run", str(run), str(tmp_path / "text.stlm"), "-o", str(out)]) == 1
        assert capsys.readouterr().err == f"error: [Errno 2] No such file or directory: '{out}'\n"


@contextmanager
def redirected(descriptor: int, to: int) -> Iterator[None]:
    before = os.dup(descriptor)
    os.dup2(to, descriptor)
    try:
        yield
    finally:
        os.dup2(before, descriptor)
        os.close(before)


class TestTrain:
    @pytest.fixture(autouse=True)
    def small_demo(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(stlm_models.presets.PRESETS, "demo", TINY)
        monkeypatch.setattr(stlm_models.train, "FINAL_SAMPLE_BYTES", 9)

    @pytest.mark.parametrize(
        ("to", "encoding", "warnings"),
        [("closed", "utf-8", 0), ("/dev/full", "utf-8", 1), ("out", "ascii", 0)],
    )
    def test_a_finished_training_has_not_failed(
        self,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        to: str,
        encoding: str,
        warnings: int,
    ) -> None:
        (tmp_path / "text").write_bytes(WORDS)
        monkeypatch.setattr(stlm_models.train, "sample", lambda trainer, n_bytes: "\ufffd")
        told = ["--data", str(tmp_path / "text"), "--out", str(tmp_path / "run"), "--steps", "1"]
        with standard_output(tmp_path / to if to == "out" else to, encoding):
            assert stlm_models.train.main([*told, "--batch-size", "1", "--precision", "fp32"]) == 0
        assert (tmp_path / "run" / "result.json").exists()
        assert capsys.readouterr().err.count("warning: the result could not be printed") == warnings
        if to == "out":
            assert (tmp_path / "out").read_text().endswith("sample:\n\\ufffd\n")

    def test_progress_that_is_not_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`2>&1 | head -1` ends what is shown, not the training."""
        (tmp_path / "text").write_bytes(WORDS)
        reader, writer = os.pipe()
        os.close(reader)
        told = ["--data", str(tmp_path / "text"), "--out", str(tmp_path / "run"), "--steps", "1"]
        stderr = io.TextIOWrapper(os.fdopen(writer, "wb", 0), write_through=True)
        monkeypatch.setattr(sys, "stderr", stderr)
        assert stlm_models.train.main([*told, "--batch-size", "1", "--precision", "fp32"]) == 0
        assert (tmp_path / "run" / "result.json").exists()


def test_bytes_of_an_argument() -> None:
    for data in (b"", b"abc", b"\xff\xfe", "é𝄞".encode(), bytes(range(1, 256))):
        assert bytes_of(os.fsdecode(data)) == data


@pytest.mark.parametrize("to", ["closed", "/dev/full"])
def test_commands_that_only_print(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    monkeypatch.setattr(stlm_kernels.env, "describe_ops", lambda: ["  op: torch"])
    monkeypatch.setitem(stlm_models.presets.PRESETS, "demo", TINY)
    for main in (lambda: stlm_kernels.env.main([]), lambda: stlm_models.summary.main(["demo"])):
        with standard_output(to):
            assert main() == (0 if to == "closed" else 1)
        assert capsys.readouterr().err.count("\n") == (0 if to == "closed" else 1)


@pytest.mark.parametrize("script", ["stlm-train", "stlm-compress", "stlm-decompress", "stlm-env"])
def test_help_names_commands_as_they_were_called(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = "stlm_kernels" if script == "stlm-env" else "stlm_models"
    module = importlib.import_module(f"{package}.{script.removeprefix('stlm-')}")
    for name, said, unsaid in (
        (f"/usr/bin/{script}", script, "python -m"),
        ("module.py", f"python -m {package}", "stlm-"),
    ):
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit):
            module.main()
        text = capsys.readouterr().out
        assert f"usage: {said}" in text
        assert unsaid not in text
