"""What README.md and docs/ show is what is there."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])


def snippets(page):
    """(file, code) of each block that follows a line with nothing but a file name in backquotes."""
    return re.findall(r"^`([\w/.-]+\.\w+)`\n+```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_snippet_that_names_a_file_stands_in_it_word_for_word(page):
    for name, code in snippets(page):
        for part in re.split(r"^\s*# \.\.\.\n", code, flags=re.M):                      # a line `# ...` leaves something out
            assert part.strip("\n") in ROOT.joinpath(name).read_text(encoding="utf-8"), f"{page.name} differs from {name}:\n{part}"


def test_the_guide_shows_every_file_of_the_plugin():
    plugin = ROOT / "tests" / "plugin"
    files = {str(path.relative_to(ROOT)) for path in plugin.rglob("*.*") if path.suffix in (".py", ".toml")}
    assert {name for name, _ in snippets(ROOT / "docs" / "plugins.md")} == files


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert page.parent.joinpath(target).exists(), f"{page.name} links to {target}"


def test_the_readme_opens_with_the_two_commands_that_ci_runs():
    commands = [line for line in ROOT.joinpath("README.md").read_text().splitlines() if line.startswith("pip install -e ")]
    assert commands[:2] == ["pip install -e . && python tools/train.py configs/quickstart.py", "pip install -e '.[test]' && pytest"]
