"""The notebooks: what is committed of each, and whether each still runs, in a kernel of its own, without an error or a word on stderr.

Each rule is a function from a notebook to the list of its offences; below it stands the rule applied to notebooks/*.ipynb, and a small
notebook that breaks it.
"""

import ast
import asyncio
import copy
import os
import pathlib
import re
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 500_000
MAX_FUNCTION_LINES = 15  # what is longer belongs in the package
SECONDS = 600  # ends a kernel that hangs; on two quiet cores each takes one to two minutes
IMPORTED = {"moe_jax", "configs", "jax", "numpy", "matplotlib", "flax", "optax", *sys.stdlib_module_names}
DRAWING = {"show", "figure", "subplots", "subplot_mosaic"}
# a slash, two names at least, and before it nothing that makes it a fraction, an address or the end of a relative path
ABSOLUTE_PATH = re.compile(r"(?<![\w.~:/*%)\]}>-])/(?:[\w.+-]+/)+[\w.+-]+|\b[A-Za-z]:\\\w+|file:///")


def read(path):
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def markdown_cells(notebook):
    return [cell.source.strip() for cell in notebook.cells if cell.cell_type == "markdown"]


def sentences(text):
    """Parts that end with a full stop, question mark or exclamation mark before a space or the end; a decimal point is none."""
    return [part for part in re.split(r"(?<=[.!?])[*_)]*\s+", text.strip()) if part]


def question_offences(notebook):
    first = notebook.cells[0] if notebook.cells else None
    if first is None or first.cell_type != "markdown":
        return ["the first cell is not markdown"]
    heading, _, rest = first.source.strip().partition("\n")
    if not re.fullmatch(r"# \S.*\?", heading):
        return [f"the first line is {heading!r}: write '# The question?'"]
    return [] if len(sentences(rest)) == 2 else [f"{len(sentences(rest))} sentences, and not two, follow the question"]


def answer_offences(notebook):
    last = (markdown_cells(notebook) or [""])[-1]
    answer = re.fullmatch(r"(?:#+ Answer|\*\*Answer[.:]?\*\*)\s+(.*)", last, re.DOTALL)
    if not answer:
        return ["the last markdown cell does not begin with '## Answer'"]
    count = len(sentences(answer[1]))
    pictured = any(has_picture(cell) for cell in code_cells(notebook)[-1:])
    figure = [] if pictured else ["the last code cell draws no figure"]
    return figure + ([] if count == 2 else [f"the answer has {count} sentences, not two"])


def has_picture(cell):
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


def calls(tree):
    """Names of what a cell calls, function bodies aside."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Call):
            yield getattr(node.func, "id", getattr(node.func, "attr", ""))
        yield from calls(node)


def shows_value(tree, source):
    """Whether the cell's last line is a value: no call, whose answer may be None, and no semicolon."""
    last = tree.body[-1] if tree.body else None
    return (
        isinstance(last, ast.Expr) and not isinstance(last.value, ast.Call | ast.Constant) and not source.rstrip().endswith(";")
    )


def output_offences(notebook):
    offences = []
    for number, cell in enumerate(code_cells(notebook), start=1):
        tree = ast.parse(cell.source)
        called = set(calls(tree))
        if called & DRAWING and not has_picture(cell):
            offences.append(f"code cell {number} draws, and no picture is saved")
        if ({"print", "display"} & called or shows_value(tree, cell.source)) and not cell.outputs:
            offences.append(f"code cell {number} shows something, and no output is saved")
    counts = [cell.execution_count for cell in code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        offences.append(f"the execution counts are {counts}: run all cells in order, once, in a new kernel")
    return offences


def trouble_offences(notebook):
    """Errors, and anything on stderr."""
    offences = []
    for number, cell in enumerate(code_cells(notebook), start=1):
        for output in cell.outputs:
            if output.output_type == "error":
                offences.append(f"code cell {number} ends in {output.ename}: {output.evalue}")
            elif output.output_type == "stream" and output.name != "stdout":
                offences.append(f"code cell {number} writes to {output.name}: {output.text[:500]}")
    return offences


def texts(notebook):
    """(where, text) of all that a reader sees, pictures aside."""
    for index, cell in enumerate(notebook.cells):
        yield f"cell {index}", cell.source
        for output in cell.get("outputs", ()):
            yield f"the output of cell {index}", output.get("text", "") + "".join(output.get("traceback", ()))
            for kind, data in output.get("data", {}).items():
                if not kind.startswith("image/"):
                    yield f"the output of cell {index}", str(data)


def path_offences(notebook):
    found = [(where, match[0]) for where, text in texts(notebook) for match in ABSOLUTE_PATH.finditer(text)]
    return [f"{where} has the path {path}" for where, path in found]


def code_offences(notebook):
    """Imports that are not allowed, magics, and functions that belong in the package."""
    offences = []
    for number, cell in enumerate(code_cells(notebook), start=1):
        try:
            nodes = list(ast.walk(ast.parse(cell.source)))
        except SyntaxError as error:
            offences.append(f"code cell {number} is not Python: {error.text}")
            continue
        for node in nodes:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            offences += [f"code cell {number} imports {name}" for name in modules if name.split(".")[0] not in IMPORTED]
            if isinstance(node, ast.FunctionDef) and (lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES:
                offences.append(f"code cell {number}: {node.name} has {lines} lines, more than {MAX_FUNCTION_LINES}")
    return offences


RULES = [code_offences, question_offences, answer_offences, output_offences, trouble_offences, path_offences]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps(path, rule):
    notebook = read(path)
    nbformat.validate(notebook)
    assert rule(notebook) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small(path):
    assert path.stat().st_size < MAX_BYTES


def test_the_readme_lists_the_notebooks_with_their_questions():
    rows = re.findall(r"\[([^\]]+\?)\]\((\w+\.ipynb)\)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    questions = [(read(path).cells[0].source.splitlines()[0].removeprefix("# "), path.name) for path in NOTEBOOKS]
    assert rows == questions
    assert rows != []


def picture():
    return new_output("display_data", {"image/png": "aGVsbG8="})


def example(*middle):
    """A notebook that keeps every rule, with more cells in the middle."""
    cells = [
        new_markdown_cell("# How much is one and one?\n\nIt is worked out. It costs 0.5 seconds."),
        new_code_cell("print(1 + 1)", outputs=[new_output("stream", text="2")]),
        *middle,
        new_code_cell("import matplotlib.pyplot as plt\nplt.figure();", outputs=[picture()]),
        new_markdown_cell("## Answer\n\nOne and one are 2.0. There is no more to it."),
    ]
    for number, cell in enumerate((cell for cell in cells if cell.cell_type == "code"), start=1):
        cell.execution_count = number
    return new_notebook(cells=cells)


def with_source(index, source):
    notebook = example()
    notebook.cells[index].source = source
    return notebook


def without_outputs(index):
    notebook = example()
    notebook.cells[index].outputs = []
    return notebook


def counted(counts):
    notebook = example()
    for cell, count in zip(code_cells(notebook), counts, strict=True):
        cell.execution_count = count
    return notebook


def printing(text, name="stdout"):
    return example(new_code_cell("print()", outputs=[new_output("stream", text=text, name=name)]))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_good_notebook_passes(rule):
    assert rule(example(new_markdown_cell("more"), new_code_cell("def f():\n    print(1)\nf();\nx = 1"))) == []


@pytest.mark.parametrize(
    ("rule", "notebook"),
    [
        (code_offences, example(new_code_cell("import torch"))),
        (code_offences, example(new_code_cell("def f():\n    from tests import tolerance"))),
        (code_offences, example(new_code_cell("import numpy, pandas.io"))),
        (code_offences, example(new_code_cell("%matplotlib inline"))),
        (code_offences, example(new_code_cell("!ls"))),
        (code_offences, example(new_code_cell("def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES))),
        (question_offences, with_source(0, "# One and one\n\nIt is worked out. It is 2.")),
        (question_offences, with_source(0, "How much is it?\n\nIt is worked out. It is 2.")),
        (question_offences, with_source(0, "# How much is it?\n\nIt is worked out.")),
        (question_offences, new_notebook(cells=example().cells[1:])),
        (question_offences, new_notebook()),
        (answer_offences, with_source(-1, "One and one are 2. No more.")),
        (answer_offences, with_source(-1, "## Answer\n\nOne and one are 2.0")),
        (answer_offences, with_source(-1, "**Answer.** It is 2. It is. It is.")),
        (answer_offences, without_outputs(-2)),
        (output_offences, without_outputs(1)),
        (output_offences, without_outputs(-2)),
        (output_offences, example(new_code_cell("x = 1\nx"))),
        (output_offences, example(new_code_cell("for i in range(2):\n    print(i)"))),
        (output_offences, counted([1, 3])),
        (output_offences, counted([2, 1])),
        (output_offences, counted([None, None])),
        (
            trouble_offences,
            example(new_code_cell("1 / 0", outputs=[new_output("error", ename="ZeroDivisionError", evalue="")])),
        ),
        (trouble_offences, printing("a warning", "stderr")),
        (path_offences, printing("read /tmp/run/metrics.jsonl")),
        (path_offences, printing("PosixPath('/home/someone')")),
        (path_offences, printing(r"C:\Users\someone")),
        (path_offences, with_source(1, "print(open('/etc/hosts').read())")),
        (path_offences, example(new_code_cell("x", outputs=[new_output("execute_result", {"text/plain": "'/opt/a'"})]))),
    ],
)
def test_a_bad_notebook_is_found(rule, notebook):
    assert len(rule(notebook)) == 1


@pytest.mark.parametrize(
    "text", ["tokens/s/device", "runs/a/b.json", "https://a.org/b/c", "3.35 TB/s / 2 / x", "../a/b", "(a)/b/c"]
)
def test_what_is_no_absolute_path_passes(text):
    assert path_offences(printing(text)) == []


@pytest.fixture
def kernel_environment(tmp_path):
    """That of a student's shell: nothing of what the tests set for JAX but the platform, and nobody's own settings of IPython."""
    import matplotlib.font_manager  # noqa: F401  the first import on a machine lists the fonts, and says so

    ours = ("JAX_", "PYTEST_", "IPYTHON", "JUPYTER")
    names = {"XLA_FLAGS", "NPROC", "MPLBACKEND", "PYTHONWARNINGS"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours) and name not in names}
    return kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path / "ipython")}


def execute(notebook, environment, folder):
    """Runs all cells in a new kernel, which is this interpreter, in `folder`; gives the notebook with its new outputs."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    notebook = copy.deepcopy(notebook)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    kernel = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))  # no folder: ipykernel's own is left
    assert kernel.kernel_spec.argv[0] == sys.executable
    settings = {"allow_errors": True, "coalesce_streams": True, "resources": {"metadata": {"path": str(folder)}}}
    client = NotebookClient(notebook, km=kernel, **settings)

    async def within_time():
        await asyncio.wait_for(client.async_execute(env=environment), SECONDS)

    asyncio.run(within_time())
    return notebook


def kinds(cell):
    """What a cell's outputs are, each kind once: stream names, MIME types."""
    found = (output.get("name") or "+".join(sorted(output.get("data", {}))) for output in cell.outputs)
    return sorted(set(found))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, kernel_environment, tmp_path):
    committed, folder = read(path), tmp_path / "work"
    folder.mkdir()
    executed = execute(committed, kernel_environment, folder)
    for rule in (trouble_offences, output_offences, path_offences):
        assert rule(executed) == []
    assert [kinds(cell) for cell in code_cells(executed)] == [kinds(cell) for cell in code_cells(committed)]


@pytest.mark.slow
def test_the_kernel_is_this_python_and_not_these_tests(kernel_environment, tmp_path, monkeypatch):
    source = (
        "import os, pathlib, sys, jax, moe_jax\nprint(sys.executable, pathlib.Path.cwd(), moe_jax.__file__, jax.device_count())"
    )
    seen = example(new_code_cell(source), new_code_cell("print(os.environ.keys() & {'XLA_FLAGS', 'NPROC'})"))
    executed = execute(seen, kernel_environment, tmp_path)
    expected = f"{sys.executable} {tmp_path} {ROOT / 'moe_jax' / '__init__.py'} 1\n"
    assert [cell.outputs[0].text for cell in code_cells(executed)[1:3]] == [expected, "set()\n"]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["1 / 0", "import warnings\nwarnings.warn('look')", "import os\nos.write(2, b'look');"])
def test_trouble_in_a_kernel_is_found(source, kernel_environment, tmp_path):
    executed = execute(example(new_code_cell(source), new_code_cell("x = 1")), kernel_environment, tmp_path)
    assert len(trouble_offences(executed)) == 1
