"""The architecture as a table: which room may import which. Also: import cycles, lazy imports, sizes, annotations."""

import ast
import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# A room (sub-package) may import the rooms on its right, and EasyLM's own modules (vocab, errors, flags, ...).
ALLOWED = {
    # EasyLM has no code for images or prompts.
    "EasyLM": "",
    "EasyLM.storage": "",
    "EasyLM.data": "EasyLM.storage",
    "EasyLM.checkpoints": "EasyLM.storage EasyLM.parallel",  # processes write one file together
    "EasyLM.parallel": "",
    "EasyLM.training": "EasyLM.storage EasyLM.checkpoints EasyLM.parallel",
    "EasyLM.planning": "EasyLM.checkpoints EasyLM.parallel EasyLM.training",
    "EasyLM.publishing": "EasyLM.storage",  # not a part of it: workers import storage, and need no flags
    "EasyLM.models": "",
    "EasyLM.models.attention": "EasyLM.models EasyLM.parallel",  # a kernel runs on each device of the mesh
    "EasyLM.models.llama": "EasyLM.storage EasyLM.data EasyLM.checkpoints EasyLM.parallel EasyLM.training "
    "EasyLM.planning EasyLM.publishing EasyLM.models EasyLM.models.attention",
    # Images and videos to visual sentences. Only the trainer's command uses EasyLM's upper rooms.
    "tokenizer.media": "EasyLM.storage",
    "tokenizer.formats": "EasyLM.storage EasyLM.checkpoints",
    "tokenizer.sources": "EasyLM.storage tokenizer.media",
    "tokenizer.synthetic": "tokenizer.media",
    "tokenizer.vqgan": "EasyLM.storage EasyLM.checkpoints tokenizer.formats",
    "tokenizer.image_quality": "EasyLM.storage tokenizer.formats tokenizer.vqgan",
    "tokenizer.training": "EasyLM.storage EasyLM.data tokenizer.media tokenizer.vqgan tokenizer.image_quality",
    "tokenizer.sentence_files": "EasyLM.storage EasyLM.data tokenizer.media tokenizer.image_quality",
    "tokenizer.builders": "EasyLM.storage EasyLM.data EasyLM.parallel tokenizer.media tokenizer.sources "
    "tokenizer.formats",
    "tokenizer.filter": "EasyLM.storage tokenizer.media tokenizer.sources tokenizer.builders",
    "tokenizer.mappings": "EasyLM.storage EasyLM.data tokenizer.media tokenizer.formats tokenizer.synthetic "
    "tokenizer.vqgan tokenizer.builders",
    "tokenizer": "EasyLM.storage EasyLM.data EasyLM.checkpoints EasyLM.parallel EasyLM.training EasyLM.publishing "
    "tokenizer.media tokenizer.formats tokenizer.synthetic tokenizer.vqgan tokenizer.image_quality tokenizer.training "
    "tokenizer.sentence_files tokenizer.sources tokenizer.builders",
    # Prompts and answers.
    "evaluation.prompting": "EasyLM.storage EasyLM.checkpoints EasyLM.parallel EasyLM.publishing EasyLM.models "
    "EasyLM.models.llama tokenizer.formats tokenizer.vqgan",
    "evaluation.tasks": "EasyLM.storage tokenizer.media tokenizer.builders tokenizer.image_quality tokenizer.synthetic "
    "tokenizer.mappings evaluation.prompting",
    "evaluation.runs": "EasyLM.storage tokenizer.media evaluation.prompting evaluation.tasks",
    "evaluation.serving": "tokenizer.media evaluation.prompting evaluation.tasks",
    "evaluation.page": "EasyLM.storage tokenizer.media tokenizer.builders tokenizer.synthetic evaluation.prompting "
    "evaluation.serving",
    "evaluation": "EasyLM.storage tokenizer.media tokenizer.image_quality "
    "evaluation.prompting evaluation.tasks evaluation.runs evaluation.serving evaluation.page",
}
# Users know this command by its old name. It imports the service inside its main function.
ALIASES = {"EasyLM.models.llama.llama_serve"}
OPTIONAL = {"torch", "transformers", "datasets", "sentencepiece", "tokenizers", "av", "gradio", "fastapi", "uvicorn"}
OPTIONAL |= {"skimage", "sklearn", "pyarrow", "wandb", "tensorboardX", "matplotlib", "starlette", "fastapi_offline"}
MOST_MODULES = 9  # directly in a package: its commands
MOST_FUNCTION_LINES, MOST_FILE_LINES, MOST_TEST_LINES = 60, 300, 400


def _modules() -> dict[str, pathlib.Path]:
    """Every module and package of the project by its dotted name."""
    paths = {}
    for package in ("EasyLM", "tokenizer", "evaluation"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            paths[name.removesuffix(".__init__")] = path
    return paths


MODULES = _modules()


def room_of(name: str) -> str:
    return name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]


@functools.cache
def parsed(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(name: str, top_level_only: bool = False) -> set[str]:
    """The modules that a module imports, by their dotted names."""
    tree = parsed(MODULES[name])
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {member if member in MODULES else node.module for member in members}
    return names


# The rules of files are loops: a test of its own for each of a thousand files takes longer than what it checks.
def test_imports_follow_the_table():
    problems = []
    for name in MODULES:
        allowed = {"EasyLM", room_of(name), *ALLOWED[room_of(name)].split()}
        for imported in imports(name, top_level_only=name in ALIASES) & set(MODULES):
            if room_of(imported) not in allowed:
                problems.append(f"{name} imports {imported}: ALLOWED[{room_of(name)!r}] lacks its room")
    assert not problems, "\n".join(problems)


def test_the_table_has_no_unused_entry():
    rooms = {room: set() for room in ALLOWED}
    for name in MODULES:
        rooms[room_of(name)] |= {room_of(imported) for imported in imports(name) & set(MODULES)}
    for room, allowed in ALLOWED.items():
        assert set(allowed.split()) <= rooms[room], f"{room} does not import {set(allowed.split()) - rooms[room]}"


def test_no_import_cycles():
    """The files of one room have no cycles either. A room's `__init__` counts as a file."""
    below = {name: imports(name, top_level_only=True) & set(MODULES) for name in MODULES}
    finished, path = set(), []

    def visit(name):
        assert name not in path, f"import cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in finished:
            path.append(name)
            for imported in sorted(below[name]):
                visit(imported)
            finished.add(path.pop())

    for name in sorted(MODULES):
        visit(name)


def test_optional_packages_are_imported_where_needed():
    at_the_top = {name: {module.split(".")[0] for module in imports(name, top_level_only=True)} for name in MODULES}
    optional = {name: packages & OPTIONAL for name, packages in at_the_top.items() if packages & OPTIONAL}
    assert not optional, f"imported at the top of a module: {optional}"


def test_no_module_imports_a_command():
    commands = {name for name, path in MODULES.items() if '__name__ == "__main__"' in path.read_text()} - ALIASES
    for name in set(MODULES) - ALIASES:
        assert not commands & imports(name), f"{name} imports a command"


@pytest.mark.parametrize("package", ["EasyLM", "tokenizer", "evaluation"])
def test_a_package_has_few_modules_outside_its_rooms(package):
    modules = [name for name in MODULES if name.rpartition(".")[0] == package and room_of(name) != name]
    assert len(modules) <= MOST_MODULES, modules


def test_every_folder_of_modules_is_a_documented_package():
    for folder in {str(pathlib.Path(file).parent) for file in _files("EasyLM", "tokenizer", "evaluation")}:
        init = ROOT / folder / "__init__.py"
        assert init.exists(), f"{init} is missing"
        assert ast.get_docstring(parsed(init)), f"{init}: no docstring"


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_names_what_it_may_import_and_what_it_contains(room):
    text = ast.get_docstring(parsed(MODULES[room]))
    rooms = [name.rpartition(".")[2] for name in ALLOWED if name.rpartition(".")[0] == room]
    imported = ALLOWED[room].split() if "." in room and "May import every" not in text else []
    missing = [name for name in (*rooms, *imported) if name not in text]
    assert not missing, f"the docstring of {room} does not name {missing}"


def _files(*folders: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py"))


CODE = _files("EasyLM", "tokenizer", "evaluation", "scripts")


def _long_files(files: list[str], most: int) -> dict[str, int]:
    """The numbers of lines of the files that have more than `most`."""
    lines = {file: len((ROOT / file).read_text().splitlines()) for file in files}
    return {file: count for file, count in lines.items() if count > most}


def test_files_are_short():
    assert not _long_files(CODE, MOST_FILE_LINES)
    assert not _long_files(_files("tests"), MOST_TEST_LINES)


def test_functions_are_short():
    long = [
        f"{file}: {node.name} is too long"
        for file in CODE
        for node in ast.walk(parsed(ROOT / file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= MOST_FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


def _public_functions(body: list[ast.stmt], owner: str = ""):
    """Yields name and node of the public functions of a module or class, and the constructors."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _public_functions(node.body, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (
            not node.name.startswith("_") or node.name in ("__init__", "__call__")
        ):
            yield owner + node.name, node


def test_public_functions_are_annotated():
    problems = []
    for file in CODE:
        for name, node in _public_functions(parsed(ROOT / file).body):
            rest = [node.args.vararg, node.args.kwarg]
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, *filter(None, rest)]
            bare = [arg.arg for arg in arguments if arg.annotation is None and arg.arg not in ("self", "cls")]
            problems += [f"{file}: {name}: no annotation of {', '.join(bare)}"] if bare else []
            if node.returns is None and not name.endswith("__init__"):
                problems.append(f"{file}: {name}: no annotation of what it returns")
    assert not problems, "\n".join(problems)


def test_private_parts_of_jax_are_not_imported():
    for file in _files("EasyLM", "tokenizer", "evaluation", "scripts", "tests"):
        source = (ROOT / file).read_text()
        if "jax._src" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            names = [alias.name for alias in getattr(node, "names", []) if isinstance(node, ast.Import)]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith("jax._src")], f"{file} imports jax._src"
