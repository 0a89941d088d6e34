"""README and docs name files, commands and options that exist; walks in docs/architecture.md pass few files."""

import re
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from veneer.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")))
HISTORY = "docs/LOG.md"  # tells of what is gone
SOURCE = re.compile(r"(?<![\w./-])(?:[\w.-]+/)*[\w-]+\.py\b")
IN_REPOSITORY = re.compile(r"(?<![\w./-])(?:src|tests|bench|tools|recipes|docs)/[\w./-]*\w")
MOST = {"A row, from file to loss": 10, "A setting, from YAML": 12, "An adapter, from training": 12}


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


@pytest.mark.parametrize("page", [page for page in PAGES if page != HISTORY])
def test_named_files_exist(page: str) -> None:
    files = {file.name for folder in ("src", "tests", "bench", "tools") for file in (ROOT / folder).rglob("*.py")}
    text = text_of(page)
    for name in SOURCE.findall(text):
        found = (ROOT / name).is_file() or (ROOT / "src/veneer" / name).is_file() if "/" in name else name in files
        assert found, f"{page} names {name}"
    for name in IN_REPOSITORY.findall(text):
        assert (ROOT / name).exists(), f"{page} names {name}"


def test_walks_pass_few_files() -> None:
    text = text_of("docs/architecture.md")
    for title, most in MOST.items():
        walk = text.partition(f"**{title}")[2].partition("\n\n")[0]
        files = SOURCE.findall(walk.partition("[")[0])
        assert len(set(files)) == len(files) == int(re.findall(r"\((\d+) files\)", walk)[0]) <= most


@pytest.mark.parametrize("page", [page for page in PAGES if page != HISTORY])
def test_named_commands_and_options_exist(page: str) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for block in re.findall(r"^```sh\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL):
        for name, rest in re.findall(r"^(?:\.venv/bin/)?veneer (\w+)([^#\n]*)", block, re.MULTILINE):
            assert name in commands, f"{page}: veneer {name}"
            known = {
                option for parameter in commands[name].params for option in (*parameter.opts, *parameter.secondary_opts)
            }
            assert set(re.findall(r"(?<=\s)--[\w-]+", rest)) <= known, f"{page}: veneer {name}{rest}"


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_yaml_and_of_a_shell_can_be_read(page: str) -> None:
    """Placeholders (`RUN`, `...`) are words of either."""
    text = text_of(page)
    for block in re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        assert yaml.safe_load(block) is not None, block
    if scripts := re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        read = subprocess.run(["bash", "-n"], input="\n".join(scripts), capture_output=True, text=True, check=False)
        assert read.returncode == 0, read.stderr
