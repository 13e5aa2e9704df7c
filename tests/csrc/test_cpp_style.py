"""The C++ of csrc/: formatted, one assignment a statement, named casts."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
if not FILES:
    pytest.skip("not in a clone: csrc/ was not checked", allow_module_level=True)

LAUNCH = re.compile(r"<<<.*?>>>", re.S)
TEMPLATE = re.compile(r"(?:(?<=\w)|(?<=template ))<[^<>;(){}]*>")
# a declaration starts with two words, perhaps with `*` or `&` between them
DECLARATION = re.compile(r"[\w:]+(?: |[*&])+\w")
LABEL = re.compile(r"\s*(?:case\b[^:]*|default|public|private|protected):(?!:)")
HEADER = re.compile(r"\s*(?:else\b|do\b|(?:if constexpr|if|for|while)\s*\(\))")
NAME = r"(?:const )?[A-Za-z_][\w:]*(?:<[^()]*>)?"
POINTER_CAST = re.compile(rf"(?<![\w>])\( ?{NAME} ?\*+(?: ?const)?\)\s*[\w(&*]")
NUMBER = r"S|T|bool|char|double|float|int|u?int\d+_t|size_t"
NUMBER_CAST = re.compile(rf"(?<![\w>\]])\((?:{NUMBER})\)[\w(-]")


def code_of(text):
    """Return text without comments, strings and preprocessor lines; lines keep their numbers."""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r'"(?:\\.|[^"\\\n])*"|' + r"'(?:\\.|[^'\\\n])'", "0", text)
    return re.sub(r"^#(?:[^\n]*\\\n)*[^\n]*", lambda m: "\n" * m[0].count("\n"), text, flags=re.M)


def statements(code):
    """Yield (line, text) of each statement, without blocks and the text in parentheses."""
    text, line, outer = "", 1, []
    for char in code:
        line += char == "\n"
        if char in "([{":
            outer.append((char, text))
            text = ""
        elif char in ")]}":
            opened, before = outer.pop()
            value = opened == "{" and re.search(r"(?:[=,]\s*|\breturn\s+|[\w>])$", before)
            block = opened == "{" and not value
            inside = any(x in "([" for x, _ in outer)
            text = "" if block and not inside else f"{before}{opened}{char}"
        elif char == ";" and not (outer and outer[-1][0] == "("):
            yield line, text
            text = ""
        else:
            text += char


def comma_statements(code):
    """Return the lines where a comma joins two statements."""
    found = []
    for line, text in statements(code):
        text = LAUNCH.sub("", text)
        while TEMPLATE.search(text):
            text = TEMPLATE.sub("", text)
        while match := LABEL.match(text) or HEADER.match(text):
            text = text[match.end() :]
        text = text.strip()
        returns = re.match(r"return\b", text)
        if "," in text and (returns or not DECLARATION.match(text)):
            found.append(line)
    return found


def old_casts(code):
    """Return the lines with C-style casts."""
    lines = enumerate(code.splitlines(), 1)
    return [n for n, line in lines if POINTER_CAST.search(line) or NUMBER_CAST.search(line)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_one_assignment_a_statement(path):
    assert comma_statements(code_of(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_casts_are_named(path):
    assert old_casts(code_of(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("a = 1, b = 2;", True),
        ("if (x) a = 1, b = 2;", True),
        ("for (;;) { f(a, b), g(c); }", True),
        ("switch (x) { case 1: a = f(1, 2), b = 3; }", True),
        ("each(n, [&](int i) { a[i] = 0, b[i] = 1; });", True),
        ("S f() { return a = 1, b; }", True),
        ("int a = 1, b = f(1, 2);", False),
        ("const S *a = p, *b = q;", False),
        ("Vec<S> c = load(a), s = load(b);", False),
        ("S x[2] = {1, 2}, y;", False),
        ("for (int i = 0, j = 0; i < n; ++i, ++j) f<S, 2>(i, j);", False),
        ("enum { A, B };", False),
        ("X() : a_(1), b_(2) {}", False),
        ("return {1, 2};", False),
        ("if (x) { f(); } else { g(); } Vec<S> a, b;", False),
        ("if (x) { f(); } else { g(); } a = 1, b = 2;", True),
        ("struct X { int at(int i) const { return i; } }; template <int n, bool b> int y;", False),
        ("auto f = [&](int i, int j) { g(i, j); };", False),
    ],
)
def test_comma_statements_are_found(code, found):
    assert bool(comma_statements(code)) == found


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("x = (const S *)p;", True),
        ("f((char *)x.data + 1);", True),
        ("y = (Pair<S> *)(p + 1);", True),
        ("i = (int64_t)n;", True),
        ("x = as<const S>(p);", False),
        ("void f(const S *); int g(int);", False),
        ("operator S *() const { return data_; }", False),
        ("i = int64_t(n) * (a * b);", False),
    ],
)
def test_old_casts_are_found(code, found):
    assert bool(old_casts(code)) == found


def test_format():
    """To format: `clang-format -i $(find csrc -type f)`."""
    if shutil.which("clang-format") is None:
        pytest.skip("clang-format is not installed: the format of csrc/ was not checked")
    run = ["clang-format", "--dry-run", "-Werror", *map(str, FILES)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]
