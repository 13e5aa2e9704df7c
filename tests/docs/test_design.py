"""The rules of docs/design.md, each by a look at the sources."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpe import _torch

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fastpe"
# what a module of a floor may import: its own floor and those behind it
FLOORS = (
    ("nn", "distributed", "integrations", "diagnostics"),
    ("attention",),
    ("feature_maps",),
    ("encodings",),
    ("ops",),
    ("backends",),
    ("backends.specs", "_checks"),
    ("_torch",),
)
FILES = sorted(PACKAGE.rglob("*.py"))


def _module(file):
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def _imports(file):
    """Yield (module of fastpe, name) for each name that a file imports from the package."""
    here = _module(file)
    folder = here if file.name == "__init__.py" else here[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = folder[: len(folder) - (node.level - 1)] + tuple((node.module or "").split("."))
        base = tuple(part for part in base if part)
        for name in node.names:
            whole = (*base, name.name)
            is_module = (PACKAGE.joinpath(*whole)).is_dir() or PACKAGE.joinpath(*whole).with_suffix(
                ".py"
            ).exists()
            yield (whole if is_module else base), name.name


def _floor(module):
    names = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    return names.get(".".join(module[:2]), names.get(module[0]) if module else None)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down(file):
    here = _floor(_module(file))
    if here is None:  # __init__.py, which has what users import
        return
    for module, name in _imports(file):
        assert module or name == "__version__", f"{name} is imported from the top"
        if not module:
            continue
        assert _floor(module) is not None, f"{'.'.join(module)} is on no floor"
        assert _floor(module) >= here, f"{name} of {'.'.join(module)} lies above"


def test_backends_are_apart():
    """Kernels of one backend do not need those of another; all may use the specification."""
    names = {"native", "triton", "reference"}
    for file in FILES:
        module = _module(file)
        if module[:1] != ("backends",) or len(module) < 2 or module[1] not in names:
            continue
        used = {m[1] for m, _ in _imports(file) if m[:1] == ("backends",) and len(m) > 1}
        assert used & names <= {module[1], "reference"}, file


def test_the_top_holds_what_users_import():
    top = {file.stem for file in PACKAGE.glob("*.py")}
    assert top == {"__init__", "_checks", "_torch", "nn", "distributed", "diagnostics"}


@pytest.mark.parametrize("stem", ["causal_dot", "sine_features"])
def test_an_operator_has_one_stem(stem):
    backends = [PACKAGE / "backends" / name for name in ("reference", "native", "triton")]
    for folder in (PACKAGE / "ops", *backends):
        assert (folder / f"{stem}.py").exists(), folder
    for folder in ("cpu", "cuda"):
        assert (ROOT / "csrc" / folder / f"{stem}.h").exists(), folder


def test_the_reference_is_a_backend_like_others():
    for file in FILES:
        if _module(file)[:1] == ("backends",):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare):
                values = [x.value for x in ast.walk(node) if isinstance(x, ast.Constant)]
                assert "reference" not in values, f"{file.name}:{node.lineno}"


def test_the_general_path_knows_no_feature_map():
    """A route is chosen by an attribute, so that another FAVOR+ needs no change of the path."""
    for file in FILES:
        if _module(file)[:1] in (("attention",), ("ops",)) and file.name != "favor.py":
            assert "Favor)" not in file.read_text(), file


def test_private_functions_of_torch_are_in_one_file():
    """Public modules of torch may begin with an underscore nowhere."""
    for file in FILES:
        if _module(file) == ("_torch",):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                names = [*node.module.split("."), *(name.name for name in node.names)]
            elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
                names = ast.unparse(node).split(".")
            else:
                continue
            private = [x for x in names if x.startswith("_") and not x.startswith("__")]
            assert not private, f"{file}:{node.lineno}"


def test_torch_has_what_is_called():
    """A private function that this torch lacks has a slower fallback: find its new name."""
    assert _torch.MISSING == []


def test_a_torch_that_lacks_private_functions(tmp_path):
    """The fallbacks are right: a layer with noise under a checkpoint, prefill and a step."""
    results = []
    for blind in ("", "blind"):
        run = subprocess.run(
            [sys.executable, "-c", WITHOUT, str(PACKAGE), f"{tmp_path}/out{blind}.pt", blind],
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        results.append(torch.load(f"{tmp_path}/out{blind}.pt"))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


WITHOUT = """
import sys
import types
import torch
from torch.utils.checkpoint import checkpoint

package, out, blind = sys.argv[1:]
sys.path.insert(0, package.rpartition("/")[0])
if blind:
    module = types.ModuleType("fastpe._torch")
    source = open(f"{package}/_torch.py").read()
    lacking = source.replace("found = getattr(found, part, None)", "found = None")
    assert lacking != source
    exec(lacking, module.__dict__)
    assert len(module.MISSING) > 5
    sys.modules["fastpe._torch"] = module

import fastpe

torch.manual_seed(0)
encoding = fastpe.SineSPE(8, 2, seed=3)
layer = fastpe.nn.CausalLinearAttention(16, 2, pos_encoding=encoding)
x = torch.randn(1, 9, 16)
y = checkpoint(layer, x, use_reentrant=False)
again = checkpoint(layer, x, use_reentrant=False)
assert not torch.equal(y, again)
(y.square().sum() + again.sum()).backward()
grads = [p.grad for p in layer.parameters()]
layer.eval()
with torch.no_grad():
    o, state = layer(x[:, :8], output_final_state=True)
    last, _ = layer.step(x[:, 8], state)
    torch.testing.assert_close(layer(x)[:, 8], last)
torch.save([y.detach(), again.detach(), o, last, *grads], out)
"""


def test_private_names_stay_in_their_file():
    for file in FILES:
        for module, name in _imports(file):
            is_module = module and module[-1] == name
            assert is_module or name[0] != "_" or name == "__version__", (
                f"{name} of {'.'.join(module)} in {file.name}"
            )


# what examples write
WRITTEN = {"study.md"}


def test_nothing_cites_what_is_not_here():
    """Other documents than those of this repository: by the name of a page, or of its sections."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = [ROOT / name for name in tracked.stdout.splitlines()]
    if not files:
        pytest.skip("not a checkout of git: which files belong to it is not known")
    names = {file.name for file in files}
    for file in files:
        if (
            file.suffix not in (".py", ".md", ".h", ".cpp", ".cu", ".sh", ".toml")
            or not file.exists()
        ):
            continue
        text = file.read_text()
        for page in re.findall(r"\b[\w-]+\.md\b", text):
            assert page in names | WRITTEN, f"{file.name} cites {page}"
        section = re.search(r"\bMATH section", text) if file != Path(__file__) else None
        assert section is None, f"{file.name} cites a section of a page that is not here"
