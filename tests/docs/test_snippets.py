"""Every snippet of README.md and docs/ runs: Python, doctests and the console script."""

from __future__ import annotations

import doctest
import re
import shlex
import subprocess
import sysconfig
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import attrs
import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>[^\n]*)\n"
    r"(?P<body>.*?)^(?P=indent)(?P=fence) *$",
    re.MULTILINE | re.DOTALL,
)
LOOKS_RUN = re.compile(r"\b(py|python3?|pycon|console)\b")
COMMAND = re.compile(r"^\$? *monoquant ", re.MULTILINE)


@attrs.frozen
class Snippet:
    """A fenced block: its info string, its text, and the line of its page where the text starts."""

    info: str
    text: str
    line: int


def snippets(text: str, line: int = 1) -> Iterator[Snippet]:
    for match in FENCE.finditer(text):
        info, body = match["info"].strip(), match["body"]
        start = line + text.count("\n", 0, match.start("body"))
        yield Snippet(info, re.sub("^" + match["indent"], "", body, flags=re.MULTILINE), start)
        if info.startswith("{"):  # a directive may hold snippets of its own
            yield from snippets(body, start)


def run_doctest(snippet: Snippet, namespace: dict[str, object], name: str) -> None:
    parser = doctest.DocTestParser()
    test = parser.get_doctest(snippet.text, namespace, name, name, snippet.line - 1)
    printed = StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    if runner.run(test, out=printed.write, clear_globs=False).failed:
        pytest.fail(printed.getvalue(), pytrace=False)
    namespace.update(test.globs)


def run_console(snippet: Snippet) -> None:
    for line in snippet.text.replace("\\\n", " ").splitlines():
        if line.startswith("$ monoquant"):
            _, *arguments = shlex.split(line.removeprefix("$ "))
            program = Path(sysconfig.get_path("scripts"), "monoquant")
            done = subprocess.run(
                [program, *arguments], check=False, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_snippet_of_the_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = str(page.relative_to(ROOT))
    namespace: dict[str, object] = {"__name__": "__main__"}
    for snippet in snippets(page.read_text(encoding="utf-8")):
        match snippet.info:
            case "python":
                padded = "\n" * (snippet.line - 1) + snippet.text
                exec(compile(padded, page, "exec"), namespace)
            case "pycon":
                run_doctest(snippet, namespace, name)
            case "console":
                run_console(snippet)
            case info:
                shown = LOOKS_RUN.search(info) or COMMAND.search(snippet.text)
                assert not shown, f"{name}:{snippet.line}: a `{info}` block is never run"
