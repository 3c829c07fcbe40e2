"""Documented commands are accepted by the program, and links in the documentation lead to files."""

import re
import shlex
from pathlib import Path

import pytest

from gnvc_jax import cli
from gnvc_jax.commands.training import load_experiment

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += sorted(ROOT.glob("gnvc_jax/pretrained/*.md"))
SCRIPTS = {"eval.py": "eval", "train.py": "train"}


def documented_commands() -> list[tuple[str, str]]:
    """(page, arguments) of each line of a code block that calls gnvc, eval.py or train.py."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")  # continued lines
        for line in re.findall(r"^    (?:gnvc|python (?:eval|train)\.py) .*$", text, re.MULTILINE):
            words = shlex.split(line.partition(" | ")[0], comments=True)
            if words[0] == "python":
                script, *words = words[1:]
                words = words if words[0] in cli.COMMANDS else [SCRIPTS[script], *words]
            else:
                words = words[1:]
            if "..." not in words:
                found.append((page.name, shlex.join(words)))
    return found


def test_there_are_documented_commands():
    names = {shlex.split(line)[0] for _, line in documented_commands()}
    assert {"encode", "decode", "eval", "train", "port", "plan", "cache-latents"} <= names


@pytest.mark.parametrize(("page", "line"), documented_commands())
def test_documented_commands_are_accepted(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, _, call = cli.parse(shlex.split(line))  # SystemExit for an option that does not exist
    options = call.keywords
    if "settings" in options:
        load_experiment(options["config"], options["settings"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_examples_of_the_library_page_run():
    """All its Python blocks, one after another, in one namespace."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(), re.DOTALL)
    assert len(blocks) > 3
    exec("\n".join(blocks), {})
