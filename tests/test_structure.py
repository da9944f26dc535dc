"""The house: floors, sizes, names, collectives, docstrings, read off the syntax tree of every module.

Each rule is a function from a module to the list of its offences; below it stands the rule applied to the repository, and a small
module that breaks it.
"""

import ast
import pathlib
from dataclasses import dataclass
from functools import cached_property

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# The longest prefix decides. A module imports its own floor and lower ones.
FLOORS = {
    "moe_jax": 0,
    "moe_jax.config": 0,
    "moe_jax.guards_config": 0,
    "moe_jax.validation": 0,
    "moe_jax.mesh": 0,
    "moe_jax.processes": 0,
    "moe_jax.xla_flags": 0,
    "moe_jax.heap": 0,
    "moe_jax.ops": 1,
    "moe_jax.routing": 2,
    "moe_jax.dispatch": 3,
    "moe_jax.sizes": 3,
    "moe_jax.exchange": 4,
    "moe_jax.layers": 5,
    "moe_jax.models": 6,
    "moe_jax.data": 7,
    "moe_jax.train": 7,
    "moe_jax.convert": 7,
    "moe_jax.plan": 8,
    "moe_jax.serve": 7,
    "moe_jax.analysis": 8,
    "moe_jax.train.loop": 8,
    "configs": 9,
    "launch": 9,
}
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 80
FORBIDDEN_NAMES = ("utils", "util", "common", "helpers", "misc")
COLLECTIVES = {
    "psum",
    "psum_scatter",
    "pmean",
    "pmax",
    "pmin",
    "all_gather",
    "all_to_all",
    "ppermute",
    "pshuffle",
    "ragged_all_to_all",
    "psend",
    "precv",
}
# Collectives belong to the exchange alone; a module that must have its own is named here with the reason.
COLLECTIVES_ALLOWED = {
    "moe_jax.exchange": "the floor of collectives",
    "moe_jax.analysis.plan_calibration": "times each kind alone",
}
MODEL_NAMES = ("mixtral", "deepseek", "switch", "qwen", "llama", "olmo", "gemma", "grok", "gpt-oss", "gpt_oss", "mistral")


@dataclass(frozen=True)
class Module:
    """One source file: its dotted name and its text."""

    name: str
    text: str
    is_package: bool = False

    @cached_property
    def tree(self):
        return ast.parse(self.text)

    @cached_property
    def nodes(self):
        return list(ast.walk(self.tree))


def modules(*tops):
    for top in tops:
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            package = parts[-1] == "__init__"
            yield Module(".".join(parts[:-1] if package else parts), path.read_text(encoding="utf-8"), package)


REPOSITORY = list(modules("moe_jax", "configs", "launch"))


def floor(name):
    """The floor of a dotted name, None for what is not ours."""
    parts = name.split(".")
    prefixes = [".".join(parts[: n + 1]) for n in range(len(parts))]
    if len(parts) > 1 and parts[0] == "moe_jax" and prefixes[1] not in FLOORS:
        return None
    return next((FLOORS[prefix] for prefix in reversed(prefixes) if prefix in FLOORS), None)


def imported(module):
    """(line, dotted name) of every import, wherever it stands; `from a import b` gives a.b."""
    for node in module.nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - module.is_package
                parents = module.name.split(".")
                base = ".".join(filter(None, [*parents[: len(parents) - up], base]))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def floor_offences(module):
    mine = floor(module.name)
    if mine is None:
        return [f"{module.name} stands on no floor; add it to FLOORS"]
    above = []
    for line, name in imported(module):
        top = name.split(".")[0]
        # `from moe_jax import __version__` names no module, and the package itself is on floor 0
        theirs = floor(name) if floor(name) is not None else 0
        if top in ("moe_jax", "configs", "launch") and theirs > mine:
            above.append(f"{module.name}:{line} (floor {mine}) imports {name} (floor {theirs})")
        if top == "tests":
            above.append(f"{module.name}:{line} imports {name}")
    return above


def size_offences(module):
    """A config's `get_config` may be long: it is the list of fields, not a function in the ordinary sense."""
    exempt = "get_config" if module.name.split(".")[0] == "configs" else None
    long = []
    lines = len(module.text.splitlines())
    if lines > MAX_FILE_LINES:
        long.append(f"{module.name} has {lines} lines, more than {MAX_FILE_LINES}")
    for node in module.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION_LINES and node.name != exempt:
                long.append(f"{module.name}:{node.lineno} {node.name} has {lines} lines, more than {MAX_FUNCTION_LINES}")
    return long


def name_offences(module):
    last = module.name.split(".")[-1]
    return [f"{module.name} says nothing: name it after its one idea"] if last in FORBIDDEN_NAMES else []


def collective_offences(module):
    if any(module.name == allowed or module.name.startswith(allowed + ".") for allowed in COLLECTIVES_ALLOWED):
        return []
    used = [(n.lineno, n.attr) for n in module.nodes if isinstance(n, ast.Attribute) and n.attr in COLLECTIVES]
    used += [(line, name.split(".")[-1]) for line, name in imported(module) if name.split(".")[-1] in COLLECTIVES]
    return [f"{module.name}:{line} uses {name}, which belongs to moe_jax/exchange" for line, name in used]


def check_vma_offences(module):
    keywords = [n for n in module.nodes if isinstance(n, ast.keyword) and n.arg in ("check_vma", "check_rep")]
    return [
        f"{module.name}:{keyword.value.lineno} turns {keyword.arg} off"
        for keyword in keywords
        if not (isinstance(keyword.value, ast.Constant) and keyword.value.value is True)
    ]


def model_name_offences(module):
    """Comparisons, match cases and startswith/endswith tests with the name of a model in them."""
    tests = [n for n in module.nodes if isinstance(n, ast.Compare | ast.MatchValue)]
    calls = [n for n in module.nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    tests += [n for n in calls if n.func.attr in ("startswith", "endswith")]
    strings = [
        (test.lineno, n.value)
        for test in tests
        for n in ast.walk(test)
        if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]
    return [
        f"{module.name}:{line} tests for {value!r}: write it as parameters, or as an entry of a table"
        for line, value in strings
        if any(name in value.lower() for name in MODEL_NAMES)
    ]


def docstring_offences(module):
    """Modules everywhere; public functions and classes of the package (a program's `main` is told by its module)."""
    missing = [] if ast.get_docstring(module.tree) or not module.tree.body else [f"{module.name} has no docstring"]
    for node in module.tree.body if module.name.split(".")[0] == "moe_jax" else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
            missing.append(f"{module.name}:{node.lineno} {node.name} has no docstring")
    return missing


RULES = [
    floor_offences,
    size_offences,
    name_offences,
    collective_offences,
    check_vma_offences,
    model_name_offences,
    docstring_offences,
]


def test_the_repository_is_read():
    names = {module.name for module in REPOSITORY}
    assert {"moe_jax", "moe_jax.config", "moe_jax.routing.contract", "moe_jax.train.optimizer", "launch.train"} <= names


@pytest.mark.parametrize("rule", RULES)
def test_the_repository_keeps(rule):
    offences = [offence for module in REPOSITORY for offence in rule(module)]
    assert offences == [], "\n" + "\n".join(offences)


@pytest.mark.parametrize(
    ("name", "package", "source", "offends"),
    [
        ("moe_jax.ops.rope", False, "from moe_jax.routing import contract", True),
        ("moe_jax.ops.rope", False, "from moe_jax import routing", True),
        ("moe_jax.ops.rope", False, "import moe_jax.layers.moe", True),
        ("moe_jax.ops.rope", False, "def f():\n    from moe_jax.train import loop", True),
        ("moe_jax.ops.rope", False, "from ..routing import contract", True),
        ("moe_jax.ops", True, "from ..routing import contract", True),
        ("moe_jax.ops", True, "from .rope import rotate", False),
        ("moe_jax.ops.rope", False, "from tests import tolerance", True),
        ("moe_jax.train.state", False, "from moe_jax.train import loop", True),
        ("moe_jax.train.state", False, "from moe_jax.train.loop import train", True),
        ("moe_jax.data.files", False, "from configs import base", True),
        ("moe_jax.new_idea", False, "import jax", True),
        ("launch.train", False, "from moe_jax.train import loop\nfrom launch import cli", False),
        (
            "moe_jax.routing.switch",
            False,
            "import jax\nfrom moe_jax import __version__, config\nfrom moe_jax.ops import rope",
            False,
        ),
    ],
)
def test_floors_are_told_apart(name, package, source, offends):
    assert bool(floor_offences(Module(name, source, package))) == offends


def test_sizes_are_counted():
    body = "    x = 1\n" * MAX_FUNCTION_LINES
    assert size_offences(Module("m", f"def f():\n{body}")) == ["m:1 f has 81 lines, more than 80"]
    assert size_offences(Module("m", f"def f():\n{body[: -len('    x = 1') - 1]}")) == []
    assert size_offences(Module("m", "x = 1\n" * 351)) == ["m has 351 lines, more than 350"]
    assert size_offences(Module("m", "x = 1\n" * 350)) == []
    assert size_offences(Module("configs.base", f"def get_config():\n{body}")) == []
    assert size_offences(Module("configs.base", f"def other():\n{body}")) != []


@pytest.mark.parametrize(
    ("name", "offends"), [("moe_jax.ops.utils", True), ("moe_jax.common", True), ("moe_jax.ops.rope", False)]
)
def test_empty_names_are_found(name, offends):
    assert bool(name_offences(Module(name, ""))) == offends


@pytest.mark.parametrize(
    ("name", "source", "offends"),
    [
        ("moe_jax.layers.moe", "import jax\njax.lax.psum(x, 'data')", True),
        ("moe_jax.layers.moe", "from jax import lax\ny = lax.all_gather", True),
        ("moe_jax.layers.moe", "from jax.lax import psum as total", True),
        ("moe_jax.exchange_other", "import jax\njax.lax.psum(x, 'data')", True),
        ("moe_jax.exchange.plan", "import jax\njax.lax.psum(x, 'data')", False),
        ("moe_jax.layers.moe", "# lax.psum\ny = 'psum'", False),
    ],
)
def test_collectives_are_found(name, source, offends):
    assert bool(collective_offences(Module(name, source))) == offends


@pytest.mark.parametrize(
    ("source", "offends"),
    [
        ("jax.shard_map(f, check_vma=False)", True),
        ("jax.shard_map(f, check_vma=flag)", True),
        ("partial(shard_map, check_rep=False)", True),
        ("jax.shard_map(f, check_vma=True)", False),
        ("jax.shard_map(f)", False),
    ],
)
def test_an_unchecked_shard_map_is_found(source, offends):
    assert bool(check_vma_offences(Module("m", source))) == offends


@pytest.mark.parametrize(
    ("source", "offends"),
    [
        ("if config.name == 'mixtral': pass", True),
        ("if name in ('switch', 'x'): pass", True),
        ("if name.startswith('Qwen'): pass", True),
        ("match name:\n    case 'deepseek':\n        pass", True),
        ("ROUTERS = {'mixtral': 1}\nrouter = ROUTERS[name]", False),
        ("if activation == 'swiglu': pass", False),
    ],
)
def test_behaviour_keyed_on_a_model_is_found(source, offends):
    assert bool(model_name_offences(Module("m", source))) == offends


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("x = 1", 1),
        ("", 0),
        ('"""M."""\ndef f(): pass\nclass C: pass\ndef _g(): pass', 2),
        ('"""M."""\ndef f():\n    """F."""\nclass C:\n    """C."""\n    def method(self): pass', 0),
    ],
)
def test_missing_docstrings_are_found(source, count):
    assert len(docstring_offences(Module("moe_jax.m", source))) == count
