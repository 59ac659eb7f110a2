"""Search the documentation on your own disk: embed docstrings of the installed packages, then ask for things.

python examples/demo.py --documents 4000 --output demo-output
"""

import argparse
import ast
import itertools
import os
import re
import shutil
import sysconfig
import zlib
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from reviews import reviews  # the file beside this one
from rich.console import Console
from rich.markup import escape

import headrace as hr

QUERIES = ["open a compressed file", "matrix multiplication", "retry a request that failed", "how far apart are two words"]


def docstrings(file: Path, module: str):
    """(name, text) for every documented module, class and function of a file, which is parsed and never imported."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            text, name = ast.get_docstring(node) or "", getattr(node, "name", "")
            if 60 <= len(text) <= 2000 and not name.startswith("_") and len(text.split()) >= 8:
                yield (f"{module}.{name}" if name else module), text


def collect(count: int) -> pa.Table:
    """`count` docstrings of the standard library and all packages, one of each in turn; the same ones on every call."""
    packages = defaultdict(list)
    for root in map(Path, dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("stdlib", "purelib"))):
        for file in root.rglob("*.py"):
            module = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            if not re.search(r"\b(_|test|site-packages|idlelib|lib2to3)", module):
                packages[module.partition(".")[0]].append((zlib.crc32(module.encode()), file, module))  # mixed, and always alike
    streams = [(one for _, file, module in sorted(files) for one in itertools.islice(docstrings(file, module), 3)) for _, files in sorted(packages.items())]
    chosen: dict[str, str] = {}
    turns = filter(None, itertools.chain.from_iterable(itertools.zip_longest(*streams)))
    for name, text in itertools.takewhile(lambda _: len(chosen) < count, turns):  # parses only as many files as that takes
        chosen.setdefault(text, name)
    return pa.table({"name": list(chosen.values()), "text": list(chosen)})


def main(documents: int, output: Path) -> None:
    source, vectors, console = output / "documents.parquet", output / "vectors", Console(highlight=False)
    if output.exists() and (others := {path.name for path in output.iterdir()} - {source.name, vectors.name}):
        raise SystemExit(f"{output} holds {', '.join(sorted(others))}, which is not from this demo; choose another --output")
    shutil.rmtree(vectors, ignore_errors=True)  # of the last time
    output.mkdir(parents=True, exist_ok=True)
    pq.write_table(collect(documents), source, row_group_size=1000)
    console.print(f"[bold]{pq.read_metadata(source).num_rows:,} docstrings[/] of the packages installed here, in {source}")
    print(hr.run(reviews, input=str(source), output=str(vectors), keep="name"))
    found = pq.read_table(vectors)
    matrix = found["vector"].combine_chunks().flatten().to_numpy().reshape(len(found), -1)  # of length 1 each: a product is the cosine
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for query, row in zip(QUERIES, reviews.local([{"text": query} for query in QUERIES]), strict=True):
        console.print(f"\n[bold cyan]{query}[/]")
        scores = matrix @ row["vector"]
        for at in (-scores).argsort()[:3].tolist():
            console.print(f"  {scores[at]:.2f}  [green]{found['name'][at]}[/]  {escape(found['text'][at].as_py())}", no_wrap=True, overflow="ellipsis")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    main(**vars(parser.parse_args()))
