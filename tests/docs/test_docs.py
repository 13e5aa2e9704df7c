"""The documentation: its blocks run, what it names is there, and what is public says what it is."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers import traced

import fastpe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# has names of its own, but needs a package that may not be installed
OPTIONAL = "fastpe.integrations.transformers"


class Block(NamedTuple):
    """A fenced block of code, and what the comment above it says that it needs."""

    page: Path
    line: int
    language: str
    needs: str
    text: str


def _blocks(page):
    """Yield the blocks of a page; <!-- needs: X --> above one says that it needs X."""
    fence, above = None, ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```") and fence is None:
            found = re.fullmatch(r"<!-- needs: (.+) -->", above)
            fence, start, body = line[3:], number, []
            needs = found[1] if found else ""
        elif line == "```":
            yield Block(page, start, fence, needs, "\n".join(body) + "\n")
            fence = None
        elif fence is not None:
            body.append(line)
        above = line or above
    assert fence is None, f"{page.name}: the block of line {start} has no end"


def _python_blocks():
    for page in PAGES:
        for block in _blocks(page):
            if block.language == "python":
                yield pytest.param(block, id=f"{page.name}:{block.line}")


def _run(block):
    # lines are counted as in the page
    code = compile("\n" * block.line + block.text, str(block.page), "exec")
    exec(code, {"__name__": "__main__"})


def _run_as_rank(group, block):
    # the rank is in a group already, of all ranks
    dist.init_process_group, init = (lambda *args, **options: None), dist.init_process_group
    try:
        _run(block)
    finally:
        dist.init_process_group = init


@traced
@pytest.mark.parametrize("block", list(_python_blocks()))
def test_python_runs(request, block, tmp_path, monkeypatch):
    """Each block stands alone, so that it can be copied alone."""
    monkeypatch.chdir(tmp_path)
    if block.needs == "4 ranks":
        ranks = request.getfixturevalue("ranks")
        ranks(4, _run_as_rank, block)
        return
    if block.needs:
        pytest.importorskip(block.needs, reason=f"{block.needs} is not installed")
    torch._dynamo.reset()
    _run(block)


def test_blocks_are_found():
    languages = [block.language for page in PAGES for block in _blocks(page)]
    assert set(languages) == {"python", "sh"}
    # a fence that is not at the start of a line would be none
    assert sum(page.read_text().count("```") for page in PAGES) == 2 * len(languages)


def _anchors(page):
    """Return the anchors that GitHub gives to the headings of a page."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    text = re.sub(r"https?://[^\s)]+", "", page.read_text())
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file), target
    folders = "fastpe|tests|benchmarks|examples|scripts|csrc|docs"
    for path in re.findall(rf"(?<![\w-])(?:{folders})/[\w./*-]+", text):
        assert list(ROOT.glob(path.rstrip("./"))), path


def _names():
    spans = [s for page in PAGES for s in re.findall(r"`([^`\n]+)`", page.read_text())]
    return sorted({name for s in spans for name in re.findall(r"\bfastpe(?:\.\w+)+", s)})


@pytest.mark.parametrize("name", [n for n in _names() if not n.endswith((".so", ".h"))])
def test_names_exist(name):
    if name.startswith(OPTIONAL):
        pytest.importorskip("transformers", reason=f"transformers is not installed: {name}")
    assert pkgutil.resolve_name(name) is not None


def _public():
    """Yield the names of what is public: of the package, and of the modules that it names."""
    for name in fastpe.__all__:
        found = getattr(fastpe, name)
        if inspect.ismodule(found):
            for inner, x in vars(found).items():
                if inner[0] != "_" and getattr(x, "__module__", None) == found.__name__:
                    yield f"{found.__name__}.{inner}"
        elif callable(found):
            yield f"fastpe.{name}"
    yield from (f"{OPTIONAL}.{name}" for name in ("StateCache", "register"))


def _documented(owner, name):
    """Return the docstrings of a method, of a class and of those of ours that it is made from."""
    ours = [cls for cls in owner.__mro__ if cls.__module__.startswith("fastpe")]
    found = [vars(cls)[name] for cls in ours if name in vars(cls)]
    return [inspect.cleandoc(x.__doc__ or "") for x in found]


def _check_parameters(function, docs, name):
    text = "\n".join(docs)
    if "whose arguments these are" in text or re.search(r"Arguments are\s+those of", text):
        return
    for parameter in inspect.signature(function).parameters:
        if parameter != "self":
            assert re.search(rf"\b{parameter}\b", text), f"{name}: {parameter} is not explained"


@pytest.mark.parametrize("name", list(_public()))
def test_docstrings(name):
    """All that is public has a docstring, and its parameters are in it."""
    module = name.rpartition(".")[0]
    if module == OPTIONAL:
        pytest.importorskip("transformers", reason=f"transformers is not installed: {name}")
        names = importlib.import_module(module).__all__
        assert sorted(names) == ["StateCache", "register"]
    found = pkgutil.resolve_name(name)
    doc = inspect.cleandoc(vars(found).get("__doc__") or "") if inspect.isclass(found) else ""
    if not inspect.isclass(found):
        assert found.__doc__, name
        _check_parameters(found, [found.__doc__], name)
        return
    assert doc, name
    # arguments stand on the class, the fields of a tuple too
    if issubclass(found, tuple) or _documented(found, "__init__"):
        _check_parameters(found, [doc], name)
    for member, x in vars(found).items():
        if member[0] == "_" or not (inspect.isroutine(x) or isinstance(x, property)):
            continue
        docs = _documented(found, member)
        assert docs[0], f"{name}.{member}"
        if inspect.isfunction(x):
            _check_parameters(x, docs, f"{name}.{member}")
