"""README, CONTRIBUTING, docs/ and examples/: bounded, linked, and what they show happens."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import pkgutil
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.wording import IDENTIFIERS, WORDS
from torch import Tensor, nn

import stlm_kernels
from stlm_kernels.registry import OPS

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
TEXT = README.read_text()
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
         *sorted((ROOT / "docs").glob("*.md"))]  # fmt: skip
MOST_LINES, MOST_WORDS, INSTALL_BY_LINE = 160, 1100, 40
SPAN = re.compile(r"`[^`\n]*\]\([^`\n]*`")
"""Code that looks like a link, as a launch `kernel[grid](...)` does."""
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")
BLOCK = re.compile(r"```(\w+)\n(.*?)```", flags=re.DOTALL)
FOLDERS = r"(?:stlm_kernels|stlm_models|bench|tests|docs|examples|findings|\.ci)"
PATH_IN_TEXT = re.compile(rf"`({FOLDERS}/[\w./-]*)`")
COMMAND = re.compile(r"(?:python3? -m ((?:stlm_\w+|bench)(?:\.\w+)*)|\b(stlm-\w+))([^`\n]*)")
MAKE = re.compile(r"\bmake ([a-z][a-z0-9-]*)([^`\n#]*)")
NAME = re.compile(r"`((?:stlm_kernels|stlm_models|bench)(?:\.\w+)+)\b")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def in_code(text: str) -> str:
    """Blocks of code and code within lines; a command may be broken over two of these."""
    parts = [body for language, body in BLOCK.findall(text) if language in ("bash", "text")]
    prose = BLOCK.sub("", text)
    parts += [" ".join(part.split()) for part in re.findall(r"`([^`]+)`", prose)]
    return "\n".join(parts)


# The README's bounds


def test_the_readme_is_short() -> None:
    assert len(TEXT.splitlines()) <= MOST_LINES
    assert len(TEXT.split()) <= MOST_WORDS, "code and tables count"


def test_installing_comes_first_and_is_two_commands() -> None:
    (language, commands), *_ = (found for found in BLOCK.findall(TEXT) if found[0] == "bash")
    assert language == "bash"
    assert len(commands.strip().splitlines()) == 2
    before = TEXT[: TEXT.index(commands)] + commands
    assert len(before.splitlines()) <= INSTALL_BY_LINE
    extras = set(re.findall(r"\[(\w+)\]'?$", commands, flags=re.M))
    assert extras
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, flags=re.M) for extra in extras)
    assert all((ROOT / file).exists() for file in re.findall(r"-c (\S+)", commands))


def test_the_readme_has_its_picture_with_ops_on_its_arrows() -> None:
    (picture,) = (body for language, body in BLOCK.findall(TEXT) if language == "mermaid")
    named = set(re.findall(r"[a-z]+(?:_[a-z]+)+|attention", picture))
    assert len(named) >= 5
    assert named <= set(stlm_kernels.__all__)


def test_the_table_of_ops_is_the_registry() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", TEXT.split("## Ops")[1].split("##")[0], flags=re.M)
    assert sorted(rows) == sorted(OPS)


def test_the_layout_is_that_of_the_checkout() -> None:
    tree = TEXT.split("## Layout")[1].split("```text\n")[1].split("```")[0]
    shown: set[Path] = set()
    folder = ROOT
    for line in tree.splitlines():
        names, _ = re.split(r"\s{2,}", line.strip(), maxsplit=1)  # from what they hold
        is_top = not line.startswith(" ")
        paths = [(ROOT if is_top else folder) / name for name in names.split()]
        shown.update(paths)
        folder = paths[0] if is_top else folder
    shown = {Path(str(path).replace("<op>", "byte_pool")) for path in shown}
    assert not [path for path in shown if not path.exists()]
    kept = {".py", ".md", ".sh"}
    folders = {path.parent for path in ROOT.glob("[a-z]*/*") if path.suffix in kept}
    assert shown >= folders - {ROOT / "build"}


# Links and names


def links(page: Path) -> Iterator[tuple[str, Path, str]]:
    for text, target in LINK.findall(SPAN.sub("", BLOCK.sub("", page.read_text()))):
        if not target.startswith(("http:", "https:", "#")):
            path, _, fragment = target.partition("#")
            yield text, page.parent / path, fragment


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for _, path, _ in links(page):
        assert path.exists(), f"{page.name} links {path}"


def value_at(path: Path, pointer: str) -> float:
    """The number that a JSON pointer (RFC 6901) names."""
    value: Any = json.loads(path.read_text())
    for key in pointer.strip("/").split("/"):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return float(value)


@pytest.mark.parametrize("page", [README, ROOT / "docs/results.md"], ids=name_of)
def test_a_linked_figure_is_what_its_file_says(page: Path) -> None:
    found = [link for link in links(page) if link[1].suffix == ".json" and link[2]]
    assert len(found) >= 10
    for figure, path, pointer in found:
        digits = len(figure.partition(".")[2])
        assert f"{value_at(path, pointer):.{digits}f}" == figure, f"{path.name}#{pointer}"


def test_a_linked_figure_is_of_the_row_and_column_that_it_stands_in() -> None:
    results = TEXT.split("## Results")[1].split("##")[0]
    linked = [line for line in results.splitlines() if LINK.search(line) and line.startswith("|")]
    assert len(linked) >= 6
    for line in linked:
        op = re.match(r"\| `(\w+)`", line)
        cells = [LINK.findall(cell)[0][1].partition("#") for cell in line.split("|")[2:-1]]
        rows = [(path, _row(ROOT / path, pointer)) for path, _, pointer in cells]
        if op:
            assert {(row["op"], row["direction"]) for _, row in rows} == {(op[1], "fwd+bwd")}
            assert ["1-thread" in path for path, _ in rows] == [True, False]
            assert len({row["case"] for _, row in rows}) == 1
        else:
            assert [row["model"] for _, row in rows] == ["10m", "10m-word", "10m-flat"]
            text = "stdlib" if "standard library" in line else "wikitext2"
            assert all(text in path for path, _ in rows)


def _row(path: Path, pointer: str) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(path.read_text())["rows"][int(pointer.split("/")[2])]
    return row


def test_the_shown_end_of_a_training_run_is_that_of_its_file() -> None:
    path = ROOT / "bench/results/train-demo-make-train-cpu-2026-12-01.json"
    result = json.loads(path.read_text())["rows"][0]
    others = ", ".join(f"{name}: {bits:.4f}" for name, bits in result["compressors"].items())
    ours = f"{result['held_out_bytes']:,} bytes: {result['bits_per_byte']:.4f} bits per byte"
    assert f"held out, {ours} ({others})" in TEXT
    assert name_of(path) in TEXT


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_in_the_text_exist(page: Path) -> None:
    for path in PATH_IN_TEXT.findall(page.read_text()):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_dotted_names_in_the_text_exist(page: Path) -> None:
    has_transformers = importlib.util.find_spec("transformers") is not None
    for name in NAME.findall(page.read_text()):
        if has_transformers or not name.startswith("stlm_models.huggingface"):
            pkgutil.resolve_name(name)


# Commands


def commands() -> list[Any]:
    """Every command that a page shows: its module, and the options it is given."""
    scripts = re.findall(r'^(stlm-\w+) = "([\w.]+):main"', (ROOT / "pyproject.toml").read_text(),
                         flags=re.M)  # fmt: skip
    found: dict[str, set[str]] = {}
    for page in PAGES:
        for module, script, rest in COMMAND.findall(in_code(page.read_text())):
            options = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", rest.split(" #")[0]))
            found.setdefault(module or dict(scripts)[script], set()).update(options)
    return [pytest.param(module, options, id=module) for module, options in sorted(found.items())]


@pytest.mark.parametrize(("module", "options"), commands())
def test_a_command_of_the_pages_exists_and_has_its_options(
    module: str, options: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec(f"{module}.__main__" if _is_package(module) else module) is None:
        pytest.fail(f"no module {module}")
    main = importlib.import_module(f"{module}.__main__" if _is_package(module) else module).main
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    known = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", capsys.readouterr().out))
    assert options <= known | {"--nproc-per-node"}


def _is_package(module: str) -> bool:
    return (ROOT / module.replace(".", "/")).is_dir()


def targets() -> list[tuple[str, str]]:
    found = {
        (target, " ".join(re.findall(r"\b[A-Z_]+=(?:'[^']*'|\"[^\"]*\"|\S+)", rest)))
        for page in PAGES
        for target, rest in MAKE.findall(in_code(page.read_text()))
    }
    return sorted(found)


@pytest.mark.parametrize(("target", "variables"), targets())
def test_a_make_target_of_the_pages_runs_dry(target: str, variables: str) -> None:
    command = f"make -n {target} {variables} GPU_PYTHON=false PYTHON=python3 WHEELS=x"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    makefile = (ROOT / "Makefile").read_text()
    for name in re.findall(r"(\w+)=", variables):
        assert re.search(rf"\$\({name}\)|\${{{name}}}", makefile), f"no variable {name}"


# Snippets and examples


def snippets() -> list[Any]:
    """Python of all pages, each with what the page says that it prints."""
    found = []
    for page in PAGES:
        blocks = re.findall(
            r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", page.read_text(), flags=re.DOTALL
        )
        found += [pytest.param(*block, id=f"{name_of(page)}-{i}") for i, block in enumerate(blocks)]
    return found


def require_imports(code: str) -> None:
    packages = set(re.findall(r"^(?:import|from) (\w+)", code, flags=re.M))
    if "transformers" in packages:
        packages.add("accelerate")  # which its Trainer needs
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")


def output_of(path: Path) -> str:
    """Run a program by itself and return what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(path), run_name="__main__")
    return out.getvalue()


@pytest.mark.parametrize(("code", "printed"), snippets())
def test_a_snippet_runs(
    code: str, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_imports(code)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "snippet.py").write_text(code)
    out = output_of(tmp_path / "snippet.py")
    if printed:
        assert out == printed


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=name_of)
def test_an_example_learns(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example at least halves the first figure that it prints until it prints the second."""
    require_imports(path.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    out = output_of(path)
    before, after = map(float, re.findall(r"\d+\.\d+", out)[:2])
    assert after < before / 2
    shown = re.search(rf"{path.stem}\.py`:\n\n```text\n(.*?)```", TEXT, flags=re.DOTALL)
    if shown:  # the figures hang on the CPU
        assert _without_figures(shown[1]) == _without_figures(out)
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"


def _without_figures(text: str) -> list[str]:
    return [re.sub(r"\d+\.\d+|b'.*'|b\".*\"", "...", line) for line in text.splitlines()]


def test_the_readme_links_every_example_and_every_page() -> None:
    linked = {path.resolve() for _, path, _ in links(README)}
    pages = {path for path in PAGES if path.parent.name == "docs"}
    beyond = {
        path.resolve() for page in linked & pages | {ROOT / "CONTRIBUTING.md"}
        for _, path, _ in links(page)
    }  # fmt: skip
    assert linked >= set(EXAMPLES)
    assert linked | beyond >= pages


# Migrations

Q, KV, HEADS, WIDTH = 40, 40, 2, 16


def liger() -> nn.Module:
    """The contract of Liger's fused loss, which may not be installed."""

    class Loss(nn.Module):
        def forward(self, w: Tensor, h: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(h, w), t)

    return Loss()


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    *, causal: bool, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """The contract of flash-attention's function on packed (T, H, K)."""
    assert causal
    document = torch.bucketize(torch.arange(len(q)), cu_q[1:-1].long(), right=True)
    back = torch.arange(len(q))[:, None] - torch.arange(len(q))
    seen = (document[:, None] == document) & (back >= 0) & (back <= window_size[0])
    heads = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads, attn_mask=seen).transpose(0, 1)


def migrations() -> list[Any]:
    section = TEXT.split("## Drop-in")[1].split("##")[0]
    rows = re.findall(r"^\| `([^`]+)`[^|]*\| `([^`]+)`", section, flags=re.M)
    return [pytest.param(old, new, id=re.split(r"[.(]", old)[1]) for old, new in rows]


def test_all_migrations_are_there() -> None:
    text = str([case.values[0] for case in migrations()])
    for name in ("EmbeddingBag", "F.cross_entropy", "F.linear_cross_entropy", "F.kl_div", "Liger",
                 "flash_attn_varlen_func", "F.scaled_dot_product_attention"):  # fmt: skip
        assert name in text


@pytest.mark.parametrize(("old", "new"), migrations())
def test_a_migration_gives_the_same(old: str, new: str) -> None:
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(256, 8, mode="mean", include_last_offset=True)
    q, k, v = torch.randn(3, Q, HEADS, WIDTH)
    if "scaled_dot_product" in old:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    names = {
        **{name: getattr(stlm_kernels, name) for name in stlm_kernels.__all__},
        **{"F": F, "bag": bag, "ids": torch.randint(256, (20,)), "q": q, "k": k, "v": v},
        **{"offsets": torch.tensor([0, 3, 3, 11, 20]), "h": torch.randn(Q, WIDTH)},
        **{"w": torch.randn(30, WIDTH), "t": torch.randint(30, (Q,)), "n": 25},
        **{"p": torch.randn(Q, 30).softmax(-1), "cu": torch.tensor([0, 15, 40]).int()},
        "LigerFusedLinearCrossEntropyLoss": liger,
        "flash_attn_varlen_func": flash_attn_varlen_func,
    }
    if not hasattr(F, old.split("(")[0].removeprefix("F.")) and old.startswith("F."):
        pytest.skip("a newer torch has it")
    expected = eval(old.replace("nn.EmbeddingBag(..., include_last_offset=True)", "bag"), names)
    if "scaled_dot_product" in old:
        names |= {name: names[name].transpose(1, 2) for name in "qkv"}
        expected = expected.transpose(1, 2)
    torch.testing.assert_close(eval(new, names), expected, rtol=1e-5, atol=1e-5)


# What is published beside the pages


def test_the_change_log_and_the_citation_name_this_version() -> None:
    version = stlm_kernels.__version__
    log = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (\S+)", log, flags=re.M)[0] == version
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^version: {re.escape(version)}$", citation, flags=re.M)
    assert "2405.14159" in citation
    assert "license: Apache-2.0" in citation


def test_pages_use_the_words_of_the_glossary() -> None:
    """Pages avoid the words that code avoids, but for the glossary's last column."""
    banned = re.compile(rf"\b({'|'.join({*WORDS, *IDENTIFIERS})})\b", re.IGNORECASE)
    for page in PAGES:
        text = page.read_text()
        if page.name == "glossary.md":
            text = re.sub(r"\|[^|\n]*\|$", "|", text, flags=re.M)  # what is not said
        prose = re.sub(r"\]\([^)]*\)|`[^`\n]*`", "", text)
        assert not banned.findall(prose), page.name
