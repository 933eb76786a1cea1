"""The project's rules on size, imports and safety, read from the source, and what its documents must name."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "onejump"
OURS = sorted(PACKAGE.rglob("*.py"))
ALL = OURS + sorted((ROOT / "tests").rglob("*.py"))

# A module imports only from lines above its own, or from its own folder.
LAYERS = """
page signals svg types watchdog
data draws ema evaluation losses metrics_log networks optim svg_heatmap tensor_file vp
checkpoint lpips_backbones precond reference times update
analytic_jump hand_over judge lpips model posthoc sharded
analytic_table distributed engine solvers
alignment analytic analytic_page by_first join methods samplers saver
alignment_page config generate phases running_sums
config_json cost fit plain run_state
intervals overrides recipes run_folder saved
cli_ema cli_input exporters guidance hub importers prompts report_charts report_hand_over run_record
cli_import cli_judge cli_recipes cli_results cli_sampling cli_team memory parts report teacher train
bench cli_analytic cli_export cli_text estimate evaluate start
cli_bench cli_data cli_show compare_cost run_evaluation search_times
cli_evaluate compare_models watch
cli_model compare pipeline
cli_training compare_verdict
compare_page
cli_compare
cli
__main__
"""
RANK = {name: rank for rank, line in enumerate(LAYERS.split("\n")) for name in line.split()}
TYPES_ONLY = ("networks", "data", "evaluation")  # import nothing else of ours
FOR_METHODS = (
    "types",
    "draws",
    "precond",
    "losses",
    "times",
    "vp",
    "optim",
    "model",
    "solvers",
)  # all that they may import


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def walk(paths: list[Path]) -> Iterator[tuple[str, ast.AST]]:
    """Every node of every file, with the place to name if it is wrong."""
    for path in paths:
        for node in ast.walk(tree(path)):
            yield f"{name_of(path)}:{getattr(node, 'lineno', 0)}", node


def imports(node: ast.AST) -> list[str]:
    """The dotted names that an import statement brings in, [] for other nodes."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative import"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def our_imports(path: Path) -> set[str]:
    """The parts of the package (first name after `onejump`) that this file imports, wherever it does so."""
    names = {name for node in ast.walk(tree(path)) for name in imports(node) if name.startswith("onejump.")}
    return {name.split(".")[1] for name in names} - {"__version__"}


def part_of(path: Path) -> str:
    """`train` for onejump/train.py, `methods` for onejump/methods/ict.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_files_and_lines_keep_their_length():
    texts = {name_of(path): path.read_text().splitlines() for path in ALL}
    long_files = [f"{name}: {len(lines)} lines" for name, lines in texts.items() if len(lines) > 300]
    long_lines = [f"{name}:{i}" for name, lines in texts.items() for i, line in enumerate(lines, 1) if len(line) > 120]
    assert not long_files + long_lines


def test_methods_are_as_short_as_their_papers_algorithm():
    for name in ("ict", "ect", "tcm", "ct", "cd", "ctm", "ctm_gan"):
        assert len((PACKAGE / "methods" / f"{name}.py").read_text().splitlines()) <= 60, name


def test_functions_keep_their_length():
    found = []
    for place, node in walk(ALL):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length, limit = node.end_lineno - node.lineno + 1, 80 if place.startswith("onejump/train.py") else 40
            limit = limit if node.name == "train" else 40
            found += [f"{place} {node.name}: {length} lines"] if length > limit else []
    assert not found


def test_a_method_has_at_most_8_fields():
    found = []
    for place, node in walk(sorted((PACKAGE / "methods").glob("*.py"))):
        if isinstance(node, ast.ClassDef):
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            found += [f"{place} {node.name}: {len(fields)} fields"] if len(fields) > 8 else []
    assert not found


def test_imports_point_one_way():
    found = []
    for path in OURS:
        part = part_of(path)
        if part == "__init__":
            assert not our_imports(path), "onejump/__init__.py stays light"
            continue
        assert part in RANK, f"{name_of(path)}: give it a line in LAYERS"
        found += [f"{name_of(path)} imports {p}" for p in our_imports(path) - {part} if RANK[p] >= RANK[part]]
        if part in TYPES_ONLY:
            found += [f"{name_of(path)} imports {p}" for p in our_imports(path) - {part, "types"}]
        if part == "methods":
            found += [f"{name_of(path)} imports {p}" for p in our_imports(path) - {part, *FOR_METHODS}]
    assert not found


FORBIDDEN = {"torchvision", "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def test_nothing_unpickles_code_or_needs_torchvision():
    found = []
    for place, node in walk(ALL):
        names = {n.split(".")[0] for n in imports(node)} & FORBIDDEN
        if place.startswith("tests"):
            names -= {"pickle"}  # tests may write one, to see it refused
        found += [f"{place} imports {n}" for n in names]
        if isinstance(node, ast.Call):
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if ast.unparse(node.func) == "torch.load" and options.get("weights_only") != "True":
                found.append(f"{place} torch.load without weights_only=True")
            if ast.unparse(node.func) in ("pickle.load", "pickle.loads", "pickle.Unpickler"):
                found.append(f"{place} unpickles")
            if options.get("allow_pickle") == "True":
                found.append(f"{place} allow_pickle=True")
    assert not found


def test_code_is_plain():
    """No delayed annotations (run-time checks need them), no **kwargs passed on, no hasattr, nothing left to do."""
    found = []
    for place, node in walk(OURS):
        if "__future__.annotations" in imports(node):
            found.append(f"{place} from __future__ import annotations")
        if isinstance(node, ast.FunctionDef) and node.args.kwarg:
            passed = {
                ast.unparse(k.value) for n in ast.walk(node) if isinstance(n, ast.Call) for k in n.keywords if not k.arg
            }
            found += [f"{place} passes **{node.args.kwarg.arg} on"] if node.args.kwarg.arg in passed else []
        if isinstance(node, ast.Name) and node.id in ("hasattr", "NotImplementedError"):
            found.append(f"{place} {node.id}")
    found += [name_of(path) for path in OURS if re.search(r"#.*\b(TODO|FIXME|XXX)\b", path.read_text())]
    assert not found


def test_methods_are_silent_and_never_wait_for_the_device():
    found = []
    for place, node in walk(sorted((PACKAGE / "methods").glob("*.py"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).split(".")[-1]
            found += [f"{place} {name}()"] if name in ("item", "cpu", "tolist", "numpy", "print", "manual_seed") else []
    assert not found


def test_the_command_line_starts_without_heavy_packages():
    code = """
import sys, onejump.cli
onejump.cli.parser().format_help()
print(*sorted({"torch", "sklearn", "scipy", "PIL", "numpy", "rich", "tensorboard"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def constraints() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "exact versions only, no local part"
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_constraints_cover_every_dependency():
    wanted, pinned = pyproject()["dependencies"], constraints()
    for extra in pyproject()["optional-dependencies"].values():
        wanted = wanted + extra
    for requirement in map(Requirement, wanted):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}, but constraints.txt has {version}"


def test_documents_name_every_dependency_method_and_recipe():
    from onejump.recipes import NAMES

    documents = {
        f"docs/{name}.md": (ROOT / f"docs/{name}.md").read_text() for name in ("recipes", "methods", "dependencies")
    }
    for path in (PACKAGE / "methods").glob("*.py"):
        assert path.name == "__init__.py" or f"methods/{path.name}" in documents["docs/methods.md"], path.name
    for recipe in NAMES:
        assert f"`{recipe}`" in documents["docs/recipes.md"], recipe
    for package in constraints():
        assert re.search(rf"\b{package}\b", documents["docs/dependencies.md"].lower().replace("_", "-")), package


def test_documents_name_files_that_exist():
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def test_the_method_in_contributing_trains():
    names: dict = {"__name__": "example"}
    for block in python_blocks("CONTRIBUTING.md"):
        exec(block, names)
    assert names["loss"].isfinite() and names["stats"]["distance"].shape == (64,)


def test_the_python_examples_in_the_readme_run(tmp_path, monkeypatch):
    from onejump.networks import SongUNetConfig
    from onejump.samplers import Multistep
    from onejump.saved import ConsistencyModel, SavedModel, save_model

    monkeypatch.chdir(tmp_path)
    network = SongUNetConfig(8, 1, 10, model_channels=16, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    saved = SavedModel(ConsistencyModel(network.build()), network, Multistep(), (1, 8, 8), tuple("0123456789"))
    save_model(Path("runs/digits/model"), saved)
    names: dict = {"__name__": "example"}
    for block in python_blocks("README.md"):
        exec(block, names)
    assert names["images"].shape == (20, 1, 8, 8) and names["loss"].isfinite()


def test_the_commands_in_the_readme_are_valid():
    from onejump.cli import read
    from onejump.data.digits import digits
    from onejump.overrides import apply_overrides
    from onejump.recipes import build_recipe

    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(line, comments=True)[1:] for line in re.findall(r"^    (onejump .*)$", text, re.MULTILINE)]
    assert len(commands) >= 8
    for command in commands:
        args = read(command)
        if command[0] in ("run", "train"):
            apply_overrides(build_recipe(args.recipe, digits()), args.overrides)
