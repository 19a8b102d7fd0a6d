"""What the documents say about the code stays true."""

import re
from pathlib import Path

from benchmarks import results

ROOT = Path(__file__).parent.parent


def section(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found, f"README.md has no section {name}"
    return found.group(1).strip()


def test_the_method_table_is_made_from_the_method_files() -> None:
    assert section("methods") == results.method_table()


def test_the_results_name_every_recipe_that_makes_them() -> None:
    rows = [line.split("|")[1].strip() for line in section("results").splitlines() if line.startswith("| ")]
    assert rows[2:] == list(results.RECIPES)


def test_every_file_the_readme_names_is_there() -> None:
    tree = (ROOT / "README.md").read_text().split("## Where things are")[1].split("```")[1]
    folder, missing = ROOT, []
    for line in tree.strip().splitlines():
        if not line.startswith(" "):
            folder = ROOT / line.split()[0] if line.split()[0].endswith("/") else ROOT
        head = re.split(r"\s{2,}", line.strip())[0]
        for name in re.findall(r"[\w.]+\.py|\w+/", head):
            if not (ROOT / name).exists() and not (folder / name).exists():
                missing.append(name)
    assert missing == []


def test_no_file_of_ours_refers_to_where_it_was_built() -> None:
    private = re.compile("/" + "work/|shared" + "/[A-Z]")
    files = (
        file for pattern in ("*.md", "engine/**/*.py", "ui/**/*.py", "tests/**/*.py") for file in ROOT.glob(pattern)
    )
    for file in files:
        assert not private.search(file.read_text()), file.name
