"""The project in numbers: folders, lines, the longest files and functions, circles of imports, how much there is to read.

    python tests/structure.py            this checkout
    python tests/structure.py FOLDER     another one, for a comparison

Code lines have code in them: neither blank, nor comment, nor docstring.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("reference", "datasets", "gpu", "conformance")
LONGEST = 8
"""How many of the longest files and functions are named."""


def imported_modules(source: str, package: str) -> list[tuple[int, str]]:
    """(line, absolute name) of all that a module of smca.`package` imports; "smca.x.y" for ``from smca.x import y``."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # the packages are flat: one dot is smca.<package>, two are smca
                stem = ["smca", package][: 3 - node.level]
                base = ".".join([*stem, base] if base else stem)
            names += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            names.append((node.lineno, str(node.args[0].value)))
    return names


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the four packages, by name."""
    by_name = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = ("smca", *path.relative_to(root).with_suffix("").parts)
            by_name[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return by_name


def imports_of(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of ours that a module imports when it is itself imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):  # what is imported when called, or for types alone, comes later or never
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [ast.Pass()]
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
            node.body = [ast.Pass()]
    names = set()
    for _, target in imported_modules(ast.unparse(tree), name.split(".")[1]):
        stem = target if target in known else target.rpartition(".")[0]
        if stem in known:
            names.add(stem)
    return names - {name}


def circles(needed: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that need each other."""
    reach = {name: set(others) for name, others in needed.items()}
    for middle in needed:
        for name in needed:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    groups = {frozenset(o for o in reach if o in reach[n] and n in reach[o]) for n in reach if n in reach[n]}
    return [set(group) for group in groups]


def docstrings(tree: ast.AST) -> list[ast.Expr]:
    """Strings that stand alone: docstrings of modules, classes, functions and fields."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]


def code_lines(source: str) -> int:
    """Lines with code in them."""
    prose = {
        line
        for node in docstrings(ast.parse(source))
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    nothing = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    code = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in nothing
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(code - prose)


def prose_words(source: str) -> int:
    """Words of docstrings and comments."""
    texts = [ast.literal_eval(node.value) for node in docstrings(ast.parse(source))]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return sum(len(text.split()) for text in [*texts, *(t.string for t in tokens if t.type == tokenize.COMMENT)])


def minutes(source: str) -> float:
    """To read a module once: its prose at 200 words a minute, its code at 15 lines a minute."""
    return prose_words(source) / 200 + code_lines(source) / 15


def functions(source: str) -> list[tuple[int, str]]:
    """(lines from the first statement after the docstring to the end, name) of every function."""
    lengths = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if node.body[0] in docstrings(node) else node.body
            lengths.append(((body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0, node.name))
    return lengths


def describe(root: Path) -> str:
    """The numbers of a checkout, as a text."""
    sources = {
        path.relative_to(root): path.read_text(encoding="utf-8")
        for folder in (*PACKAGES, "tests")
        for path in sorted((root / folder).rglob("*.py"))
    }
    code = {path: code_lines(source) for path, source in sources.items()}
    lines = [f"{'folder':32}{'files':>6}{'lines':>8}{'code':>8}"]
    for folder in sorted({parent for path in sources for parent in path.parents if parent.parts}):
        inside = [path for path in sources if folder in path.parents]
        total = sum(len(sources[path].splitlines()) for path in inside)
        name = "  " * (len(folder.parts) - 1) + folder.name + "/"
        lines.append(f"{name:32}{len(inside):6}{total:8,}{sum(code[path] for path in inside):8,}")
    lines += ["", f"longest files{'lines':>35}{'code':>8}"]
    longest = sorted(sources, key=lambda path: len(sources[path].splitlines()), reverse=True)[:LONGEST]
    lines += [f"  {path!s:38}{len(sources[path].splitlines()):8,}{code[path]:8,}" for path in longest]
    lines += ["", f"longest functions outside tests{'lines':>17}"]
    by_length = sorted(
        ((n, name, path) for path, s in sources.items() if path.parts[0] != "tests" for n, name in functions(s))
    )
    lines += [f"  {f'{path}: {name}':62}{n:6}" for n, name, path in by_length[: -LONGEST - 1 : -1]]
    known = modules(root)
    groups = circles({name: imports_of(name, path, known) for name, path in known.items()})
    lines += ["", f"circles of imports: {len(groups)}", *(f"  {', '.join(sorted(group))}" for group in groups)]
    reference = [source for path, source in sources.items() if path.parts[0] == "reference"]
    words, lines_of_code = sum(map(prose_words, reference)), sum(map(code_lines, reference))
    checks, to_read = sum(source.count("raise ") for source in reference), sum(map(minutes, reference))
    lines += [
        "",
        f"reference: {words:,} words of docstrings and comments, {lines_of_code:,} lines of code, {to_read:.0f} minutes to read; "
        f"{checks} errors that are raised",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT))
