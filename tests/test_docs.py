"""README and docs: every `ssod` command has arguments that exist, every link leads somewhere, and the page of all
arguments says what the code says."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import config_page
import pytest
import yaml

from ssod.cli import SUMMARY, report_words
from ssod.config import load_config, parse_words
from ssod.engine.setup import check_options
from ssod.errors import UserError
from ssod.modes import MODES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)
INLINE = re.compile(r"`(ssod [a-z]+ [^`]*=[^`]*)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def commands(page: Path) -> list[str]:
    """Lines of code blocks that call ssod, themselves or by torchrun; in a console block all of them are mistakes."""
    lines: list[str] = []
    for _, language, block in FENCED.findall(text_of(page)):
        if language != "console":
            lines += re.sub(r"\\\n\s*", "", block).splitlines()
    return [line for line in lines if re.match(r"\s*(ssod|torchrun .*-m ssod) ", line)]


def inline(page: Path) -> list[str]:
    """Commands within sentences; those with `...` are parts of one."""
    return [found for found in INLINE.findall(FENCED.sub("", text_of(page)).replace("\n", " ")) if "..." not in found]


def arguments(mode: str, words: list[str]) -> dict[str, Any]:
    """The first words of `ssod zoo` and `ssod report` have no key; a `model` brings arguments of its own to `train`."""
    if mode == "report":
        return report_words(words)
    bare = [word for word in words if "=" not in word and not word.startswith("-")] if mode == "zoo" else []
    given = dict(zip(("action", "entry"), bare, strict=False)) | parse_words(words[len(bare) :])
    if mode == "train":
        given.pop("model", None)
    return given


def accept(command: str) -> None:
    """Read a command as the program would, up to where it would begin to work. Raises UserError for a mistake."""
    words = shlex.split(command, comments=True)
    words = words[words.index("ssod") + 1 :]
    mode = words[0]
    assert mode in SUMMARY, f"{mode} is no mode"
    if mode == "help":
        assert set(words[1:]) <= set(SUMMARY)
    elif mode in MODES or mode == "cfg":
        given = arguments(mode, words[1:])
        config = load_config("train" if mode == "cfg" else mode, given)
        if mode in ("train", "cfg"):
            check_options(config)


def cases(of: list[tuple[Path, str]]) -> list[object]:
    return [pytest.param(command, id=f"{page.relative_to(ROOT)}: {command}") for page, command in dict.fromkeys(of)]


@pytest.mark.parametrize("command", cases([(page, line) for page in PAGES for line in commands(page)]))
def test_a_command_has_arguments_that_exist(command: str) -> None:
    accept(command)


@pytest.mark.parametrize("command", cases([(page, line) for page in PAGES for line in inline(page)]))
def test_a_command_in_a_sentence_has_arguments_that_exist(command: str) -> None:
    try:
        accept(command)
    except UserError as error:  # a sentence may leave out what it is not about, and say `seed=S+k`
        if not re.search(r"^'\w+' is missing| does not fit: ", str(error)):
            raise


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("ssod train data=my.yaml epoch=3", "epochs"),
        ("ssod train data=my.yaml strategy.tua=0.5", "tau"),
        ("ssod train cfg=no_such_recipe.yaml", "no YAML"),
        ("ssod predict model=best.pt", "source"),
        ("torchrun --nproc-per-node 2 -m ssod train data=my.yaml detector=fcoss", "fcos"),
    ],
)
def test_mistakes_are_found(command: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        accept(command)


def code(page: Path, language: str) -> list[str]:
    return [block for _, found, block in FENCED.findall(text_of(page)) if found == language]


@pytest.mark.parametrize("page", [p for p in PAGES if code(p, "python")], ids=lambda page: str(page.relative_to(ROOT)))
def test_programs_import_what_exists(page: Path) -> None:
    for block in code(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ssod":
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("page", [p for p in PAGES if code(p, "yaml")], ids=lambda page: str(page.relative_to(ROOT)))
def test_yamls_are_mappings(page: Path) -> None:
    assert all(isinstance(yaml.safe_load(block), dict) for block in code(page, "yaml"))


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", FENCED.sub("", text_of(page)), re.M):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        found.add(re.sub(r"[^\w\- ]", "", shown.lower()).strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCED.sub("", text_of(page)))
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in LINK.findall(text_of(index))}
    assert [p.name for p in PAGES if p.is_relative_to(index.parent) and p != index and p not in linked] == []


def test_the_page_of_all_arguments_is_up_to_date() -> None:
    written = text_of(ROOT / "docs" / "config.md")
    assert written == config_page.page(), "python tests/config_page.py > docs/config.md"
