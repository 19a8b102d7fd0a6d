"""What the documents say about the code stays true."""

import re
from pathlib import Path

import pytest

from benchmarks import results, shrink
from benchmarks.sections import RESULTS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def section(name: str, file: Path = README) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", file.read_text(), re.DOTALL)
    assert found, f"{file.name} has no section {name}"
    return found.group(1).strip()


def rows(table: str) -> dict[str, list[str]]:
    """The cells of each row of a Markdown table, by its first."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {name.strip(): cells for name, *cells in lines[2:]}


def test_the_method_table_is_made_from_the_method_files() -> None:
    assert section("methods") == results.method_table()


def test_the_results_name_every_recipe_that_makes_them() -> None:
    assert list(rows(section("results", RESULTS))) == list(results.RECIPES)
    assert list(rows(section("results"))) == list(results.README)


@pytest.mark.parametrize("part", ["results", *(part for part in shrink.PARTS if part != "sparsity")])
def test_the_readme_says_in_brief_what_the_results_say_whole(part: str) -> None:
    whole, brief = rows(section(part, RESULTS)), rows(section(part))
    assert brief
    for name, cells in brief.items():
        assert set(cells) <= set(whole[name])


def test_links_between_documents_lead_somewhere() -> None:
    for file in (README, *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text()):
            assert (file.parent / target).exists(), f"{file.name}: {target}"


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_file_that_a_map_names_is_there(document: str) -> None:
    tree = (ROOT / document).read_text().split("## Where things are")[1].split("```")[1]
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
        file
        for pattern in ("*.md", "docs/*.md", "engine/**/*.py", "ui/**/*.py", "tests/**/*.py")
        for file in ROOT.glob(pattern)
    )
    for file in files:
        assert not private.search(file.read_text()), file.name
