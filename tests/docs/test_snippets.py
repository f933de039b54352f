"""Every snippet of README.md and docs/ runs, and prints what the page says that it prints.

A ``text`` block right after a ``python`` or ``console`` block is the output of it. In such a block
``...`` stands for whatever differs from machine to machine, as in doctests. In a ``text near``
block, decibels, shares and what a model scores are those of one machine, and may be a tenth off on
another: processors add floats in different orders, and a model that is trained, or is quantized by
what it computes, is another one for it. Sizes are exact there too.
"""

from __future__ import annotations

import doctest
import io
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

import attrs
import pytest

from mono_quant.kernels import VARIABLE, use
from tests.models import AssetUnavailable

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>[^\n]*)\n"
    r"(?P<body>.*?)^(?P=indent)(?P=fence) *$",
    re.MULTILINE | re.DOTALL,
)
NEAR = "text near"
SCORE = re.compile(
    r"\d+(?:\.\d+)?(?= dB|%)|(?:(?<=perplexity )|(?<=entropy )|(?<=with people ))\d+\.\d+"
)
"""What differs a little from processor to processor."""
OFF = 0.1
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
    printed = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    if runner.run(test, out=printed.write, clear_globs=False).failed:
        pytest.fail(printed.getvalue(), pytrace=False)
    namespace.update(test.globs)


def run_python(snippet: Snippet, namespace: dict[str, object], page: Path) -> str:
    """Run a block and return what it prints; skip its page where a model cannot be fetched."""
    padded = "\n" * (snippet.line - 1) + snippet.text
    printed = io.StringIO()
    with redirect_stdout(printed):
        try:
            exec(compile(padded, page, "exec"), namespace)
        except AssetUnavailable as error:
            pytest.skip(f"{page.name}:{snippet.line}: {error}")
    return printed.getvalue()


def run_console(snippet: Snippet) -> str:
    """Run the commands of a block and return what they print, one after the other."""
    printed = ""
    for line in snippet.text.replace("\\\n", " ").splitlines():
        if line.startswith("$ monoquant"):
            _, *arguments = shlex.split(line.removeprefix("$ "))
            program = Path(sysconfig.get_path("scripts"), "monoquant")
            done = subprocess.run(
                [program, *arguments], check=False, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            printed += done.stdout
    return printed


def as_lines(text: str) -> str:
    """Return a text without whitespace at the ends of its lines, and blank ones around it."""
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines()) + "\n"


def assert_printed(said: Snippet, printed: str, name: str) -> None:
    """Assert that a block prints what the page says, where ``...`` stands for anything."""
    example = doctest.Example("", as_lines(said.text))
    found, checker = as_lines(printed), doctest.OutputChecker()
    if said.info == NEAR:
        found = with_near_scores(found, example.want)
    if not checker.check_output(example.want, found, doctest.ELLIPSIS):
        flags = doctest.ELLIPSIS | doctest.REPORT_NDIFF
        difference = checker.output_difference(example, found, flags)
        pytest.fail(f"{name}:{said.line}: {difference}", pytrace=False)


def with_near_scores(found: str, said: str) -> str:
    """Return what was found with the page's scores in place of those that are near them."""
    scores = iter(SCORE.findall(said))

    def settled(match: re.Match[str]) -> str:
        score = next(scores, match[0])
        return score if abs(float(match[0]) - float(score)) <= OFF * float(score) else match[0]

    return SCORE.sub(settled, found)


@pytest.fixture
def one_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have all computed by one kernel, here and in what snippets start.

    Which one is fastest is a matter of the machine, and 4 bits differ by a tenth of a dB.
    """
    monkeypatch.setenv(VARIABLE, "reference")
    use.reread()
    yield
    monkeypatch.undo()
    use.reread()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.usefixtures("one_kernel")
def test_every_snippet_of_the_page_runs_and_prints_what_it_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = str(page.relative_to(ROOT))
    program = ModuleType("__main__")  # where pickle looks for the classes of a page
    monkeypatch.setitem(sys.modules, "__main__", program)
    namespace: dict[str, object] = vars(program)
    printed: str | None = None  # by the block just before
    for snippet in snippets(page.read_text(encoding="utf-8")):
        before, printed = printed, None
        match snippet.info:
            case "python":
                printed = run_python(snippet, namespace, page)
            case "pycon":
                run_doctest(snippet, namespace, name)
            case "console":
                printed = run_console(snippet)
            case "text" | "text near" if before is not None and not COMMAND.search(snippet.text):
                assert_printed(snippet, before, name)
            case info:
                shown = LOOKS_RUN.search(info) or COMMAND.search(snippet.text)
                assert not shown, f"{name}:{snippet.line}: a `{info}` block is never run"


def test_three_dots_stand_for_anything_and_nothing_else_does() -> None:
    said = Snippet("text", "peak memory: ... MB  \nvalid\n", 1)
    assert_printed(said, "peak memory: 2.3 MB\nvalid\n\n", "page")
    for other in ("peak memory: 2.3 MB\n", "peak memory: 2.3 MB\n invalid\n", ""):
        with pytest.raises(pytest.fail.Exception, match="page:1"):
            assert_printed(said, other, "page")


def test_near_scores_may_be_a_tenth_off_and_nothing_else() -> None:
    said = Snippet(NEAR, "90.26 MB -> 22.76 MB\n25.8 dB, correlation with people 0.66\n91.5%\n", 1)
    assert_printed(said, said.text.replace("25.8", "24.0").replace("91.5", "92.2"), "page")
    for one, other in (("25.8", "22.9"), ("22.76", "22.77"), ("people", "dogs"), ("0.66", "0.80")):
        with pytest.raises(pytest.fail.Exception, match="page:1"):
            assert_printed(said, said.text.replace(one, other), "page")
    with pytest.raises(pytest.fail.Exception, match="page:1"):
        assert_printed(Snippet("text", said.text, 1), said.text.replace("25.8", "25.7"), "page")
