"""The house style that no linter knows: sizes, layout, words, and what may be where."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ROOTS = ("services", "protos", "kernels", "shared")
NUM_FUNCTION_LINES_MAX = 70
# A Triton kernel is one function by nature.
NUM_KERNEL_LINES_MAX = 150
NUM_FILE_LINES_MAX = 400
# Scenarios over one stage stay together.
NUM_TEST_FILE_LINES_MAX = 500
GENERATED = REPOSITORY / "protos" / "pageframe" / "v1"

# Serialisers that run code when they read.
BANNED_IMPORTS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
# gRPC and generated code stay where bytes become domain types.
EDGE_NAMES = {"servicer.py", "server.py", "client.py", "convert.py"}
# The simulation stands in for gRPC itself.
EDGE_FOLDERS = {"wire", "rpc", "client", "testing", "simulation"}
# Policy that runs unchanged in tests and replay; only these files of the scheduler may wait.
SCHEDULER_EDGE = EDGE_NAMES | {"loop.py", "__main__.py"}
BANNED_IN_PURE_CODE = {"asyncio", "grpc", "torch", "threading", "time", "random", "pageframe.v1"}

LEFTOVER = re.compile(r"\b(TODO|FIXME|XXX|HACK|WIP)\b")
PRIVATE_PATH = re.compile(r"""(?<![\w.~}/)])/(?:home|root|work|Users)/[\w.]""")
BANNED_WORDS = re.compile(
    r"\b((?<!asked )for now|temporar(?:y|ily) hack|sanity check|dummy|utili[sz]e[sd]?)\b",
    re.IGNORECASE,
)


def python_files(*folders: str) -> list[Path]:
    """Every Python file of ours, generated ones left out."""
    return sorted(
        path
        for folder in folders
        for path in (REPOSITORY / folder).rglob("*.py")
        if GENERATED not in path.parents and "__pycache__" not in path.parts
    )


def text_files() -> list[Path]:
    """Everything that a person reads."""
    named = [REPOSITORY / "Makefile", REPOSITORY / "pyproject.toml", *REPOSITORY.glob("*.md")]
    documents = [*(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / "protos").rglob("*.proto")]
    return [*named, *documents, *python_files(*ROOTS, "tests", "bench")]


def short(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def imports_of(path: Path) -> Iterator[str]:
    """Full names of all modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_under(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def matches(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    return [
        f"{short(path)}:{number}: {found[0]}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (found := pattern.search(line))
    ]


def test_functions_fit_on_a_screen() -> None:
    too_long = []
    for path in python_files(*ROOTS, "tests", "bench"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            decorators = [ast.unparse(item) for item in node.decorator_list]
            is_kernel = any("triton" in item and "jit" in item for item in decorators)
            num_lines_max = NUM_KERNEL_LINES_MAX if is_kernel else NUM_FUNCTION_LINES_MAX
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if num_lines > num_lines_max:
                too_long.append(f"{short(path)}:{node.lineno} {node.name}: {num_lines} lines")
    assert not too_long, "\n".join(too_long)


def test_files_can_be_read_in_one_sitting() -> None:
    too_long = {
        short(path): num_lines
        for folders, num_lines_max in (
            ((*ROOTS, "bench"), NUM_FILE_LINES_MAX),
            (("tests",), NUM_TEST_FILE_LINES_MAX),
        )
        for path in python_files(*folders)
        if (num_lines := len(path.read_text(encoding="utf-8").splitlines())) > num_lines_max
    }
    assert not too_long


def test_the_namespace_package_has_four_roots_and_no_init_of_its_own() -> None:
    """One ``__init__.py`` there would hide the other three roots."""
    for root in ROOTS:
        namespace = REPOSITORY / root / "pageframe"
        assert not list(namespace.glob("*.py")), f"{root}/pageframe may hold packages only"


def test_every_package_is_typed_and_has_a_name_of_its_own() -> None:
    packages = [
        path
        for root in ROOTS
        for path in (REPOSITORY / root / "pageframe").iterdir()
        if path.is_dir() and path.name != "__pycache__"
    ]
    for package in packages:
        assert (package / "__init__.py").is_file(), package
        assert (package / "py.typed").is_file(), package
    names = [package.name for package in packages]
    assert len(names) == len(set(names)), sorted(names)


def test_nothing_reads_a_format_that_runs_code() -> None:
    found = [
        f"{short(path)}: {module}"
        for path in python_files(*ROOTS, "bench")
        for module in imports_of(path)
        if is_under(module, BANNED_IMPORTS)
    ]
    found += matches(re.compile(r"\btorch\.(load|save)\("), python_files(*ROOTS, "bench"))
    assert not found


def test_grpc_and_generated_code_stay_at_the_edge() -> None:
    found = [
        f"{short(path)}: {module}"
        for path in python_files("services", "kernels", "shared")
        if path.name not in EDGE_NAMES
        and not path.name.endswith("_servicer.py")
        and not EDGE_FOLDERS & set(path.parts)
        for module in imports_of(path)
        if is_under(module, {"grpc", "pageframe.v1"})
    ]
    assert not found


def test_policy_and_memory_never_wait() -> None:
    services = REPOSITORY / "services" / "pageframe"
    pure = [
        *(services / "executor" / "memory").rglob("*.py"),
        *(
            path
            for path in (services / "scheduler").rglob("*.py")
            if path.name not in SCHEDULER_EDGE
        ),
    ]
    assert len(pure) > 10, "the cores have moved; say where they are"
    waiting = (ast.Await, ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith)
    found = []
    for path in pure:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [short(path) for node in ast.walk(tree) if isinstance(node, waiting)]
        found += [
            f"{short(path)}: {module}"
            for module in imports_of(path)
            if is_under(module, BANNED_IN_PURE_CODE)
        ]
    assert not found


def test_nothing_listens_on_every_interface_by_itself() -> None:
    assert not matches(re.compile(r"""["'(]0\.0\.0\.0|\[::\]:"""), python_files(*ROOTS, "bench"))


def test_nothing_is_left_for_later() -> None:
    others = [path for path in text_files() if path != Path(__file__)]
    assert not matches(LEFTOVER, others)


def test_no_path_of_somebodys_machine_is_written_down() -> None:
    others = [path for path in text_files() if path != Path(__file__)]
    assert not matches(PRIVATE_PATH, others)
    assert not matches(re.compile(r"""["'`]/tmp/"""), python_files(*ROOTS, "bench"))


def test_one_word_for_one_thing() -> None:
    others = [path for path in text_files() if path != Path(__file__)]
    assert not matches(BANNED_WORDS, others)


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        (LEFTOVER, "x = 1  # TODO later"),
        (PRIVATE_PATH, 'open("/home/ada/notes")'),
        (BANNED_WORDS, "a stub, for now"),
    ],
)
def test_the_patterns_find_what_they_are_for(pattern: re.Pattern[str], line: str) -> None:
    assert pattern.search(line)
