"""Arrows point one way: lab → cache → compression → walk → stored → linalg; no layer knows its family."""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

import nsvd
from nsvd.compression.ranks import check_allocation
from nsvd.walk.processes import once
from tests.tiny import tiny_model, token_ids

PACKAGE = Path(__file__).parents[1] / "nsvd"
# Words of a longer text count only as a whole where they are short enough to occur inside others (options, graphics).
FAMILY = re.compile(r"llama|mistral|qwen|gemma|neox|(?<![a-z])(opt|phi)(?![a-z])", re.IGNORECASE)


def imports(tree: ast.AST, package: str = "nsvd") -> Iterator[str]:
    """Dotted names of all modules imported, also inside functions; relative ones in full."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def strings(tree: ast.AST) -> Iterator[str]:
    """String constants that are not docstrings."""
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.value


def foreign_to_mathematics(tree: ast.AST) -> list[str]:
    """Imports beyond tensors and the standard library."""
    known = {"torch", "numpy", "scipy", "jaxtyping", *sys.stdlib_module_names}
    return [n for n in imports(tree, "nsvd.linalg") if n.split(".")[0] not in known and not within(n, "nsvd.linalg")]


ROOMS = (
    "linalg",
    "stored",
    "walk",
    "compression",
    "cache",
    "lab",
    "cli",
)  # a file imports from its own room and those before


def upward(room: str) -> Callable[[ast.AST], list[str]]:
    """What a file of the room imports from a later one."""
    later = [f"nsvd.{other}" for other in ROOMS[ROOMS.index(room) + 1 :]]
    return lambda tree: [n for n in imports(tree, f"nsvd.{room}") if n == "nsvd" or within(n, *later)]


def prints(tree: ast.AST) -> list[str]:
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [f.id for f in calls if isinstance(f, ast.Name) and f.id == "print"]


def families(tree: ast.AST) -> list[str]:
    return [text for text in strings(tree) if FAMILY.search(text)]


def trusting(tree: ast.AST) -> list[str]:
    """Whatever transformers reads, it is told to run no code that lies there."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute))
    readers = (
        call
        for call in calls
        if call.func.attr == "from_pretrained" and ast.unparse(call.func.value).startswith("Auto")
    )
    told = {call: {word.arg: ast.unparse(word.value) for word in call.keywords} for call in readers}
    return [ast.unparse(call) for call, words in told.items() if words.get("trust_remote_code") != "False"]


def untyped(tree: ast.Module) -> list[str]:
    """Public functions and methods that do not say of every argument, or of what they return, of which type it is."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    functions = [node for part in (tree, *classes) for node in part.body if isinstance(node, ast.FunctionDef)]
    found = []
    for function in functions:
        given = function.args
        names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.annotation is None]
        missing = set(names) - {"self", "cls"} | (set() if function.returns else {"return"})
        if missing and not function.name.startswith("_"):
            found.append(f"{function.name}: {', '.join(sorted(missing))}")
    return found


FAMILIAR = (
    "if 'OPT' in name: pass",
    "x = f'model.gpt_neox.{i}'",
    "Qwen = 'Qwen2ForCausalLM'",
    "y = {'phi': 1}",
    "x = 'mistral'",
)

UNTYPED = ("def f(x) -> int: ...", "def f(): ...", "class A:\n    def g(self, *, y) -> int: ...")

RULES: list[tuple[str, Callable[[ast.AST], list[str]], tuple[str, ...]]] = [
    ("linalg", foreign_to_mathematics, ("import transformers", "from nsvd.walk.targets import targets", "from .. import walk")),
    ("stored", upward("stored"), ("from nsvd.walk import hooks", "from nsvd import load", "from ..lab import paths")),
    ("walk", upward("walk"), ("from nsvd.compression import ranks", "import nsvd", "from ..cache import latent")),
    ("compression", upward("compression"), ("from nsvd.cache import latent", "def f():\n    import nsvd.cli")),
    ("cache", upward("cache"), ("from nsvd.lab import corpora",)),
    ("lab", upward("lab"), ("from nsvd.cli import main", "from nsvd import cli")),
    *((room, prints, ("print('x')", "def f():\n    print(1)")) for room in ROOMS[:5]),
    *((room, families, FAMILIAR) for room in ROOMS[:5]),
    ("stored", trusting, ("AutoConfig.from_pretrained(f)", "AutoTokenizer.from_pretrained(f, trust_remote_code=True)")),
    *((room, untyped, UNTYPED) for room in ROOMS[:-1]),
    ("lab", trusting, ("m = AutoModelForCausalLM.from_pretrained('x', dtype=d)",)),
]  # fmt: skip


@pytest.mark.parametrize(("part", "rule", "broken"), RULES)
def test_a_rule_of_the_house_is_kept(part, rule, broken):
    """No file of the part breaks the rule; the rule sees each way of breaking it."""
    files = sorted((PACKAGE / part).rglob("*.py"))
    assert files
    found = {file.name: rule(ast.parse(file.read_text(encoding="utf-8"))) for file in files}
    assert {name: what for name, what in found.items() if what} == {}
    assert all(rule(ast.parse(text)) for text in broken)


def test_the_rules_let_pass_what_is_allowed():
    """The standard library, the package's own mathematics, docstrings that name a family, words that contain one."""
    allowed = (
        '"""Works on LLaMA."""\nimport math, torch.nn\nfrom nsvd.linalg import METHODS\nx = "options and graphics"'
    )
    for _, rule, _ in RULES:
        assert rule(ast.parse(allowed)) == []
    assert upward("walk")(ast.parse("import torch\nfrom nsvd.stored.layers import LAYERS")) == []


def traced(work: Callable[[], object]) -> tuple[set[str], set[tuple[str, str]]]:
    """The files of the package that take part in some work, and the calls from one room into a later one, as pairs of files."""
    files, upward = set(), set()

    def inside(frame) -> str | None:
        file = Path(frame.f_code.co_filename)
        return file.relative_to(PACKAGE).as_posix() if file.is_relative_to(PACKAGE) else None

    def note(frame, event: str, _value) -> None:
        if event != "call" or (file := inside(frame)) is None or "/" not in file:
            return
        files.add(file)
        caller = frame.f_back
        while caller is not None and (inside(caller) is None or "/" not in inside(caller)):
            caller = caller.f_back
        if caller is not None and ROOMS.index(inside(caller).split("/")[0]) < ROOMS.index(file.split("/")[0]):
            upward.add((inside(caller), file))

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return files, upward


def test_the_way_of_best_is_short_and_goes_one_way():
    """From the call to the last exchanged layer: eight files of the room at most, one a stage, and no other room calls back."""
    model, ids = tiny_model(), token_ids(40, 9)
    files, upward = traced(lambda: nsvd.compress_(model, method="best", ratio=0.4, windows=ids))
    room = {file for file in files if file.startswith("compression/")}
    assert {"compression/compress.py", "compression/ordered.py"} <= room
    assert len(room) <= 8
    assert upward == set()


def test_a_call_back_is_noticed():
    """Where a walk is handed a function of a later room."""
    files, upward = traced(lambda: once(partial(check_allocation, "uniform", 0.2, None, [])))
    assert upward == {("walk/processes.py", "compression/ranks.py")}
    assert files >= {"walk/processes.py", "compression/ranks.py"}
