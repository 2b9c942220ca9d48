"""docs/reliability.md tells of the tests there are, and every fault has one."""

from __future__ import annotations

import re

from reliability_page import PAGE, ROWS, known, marked


def test_every_fault_is_injected_by_a_test() -> None:
    assert sorted(marked()) == sorted(ROWS)


def test_the_page_names_these_tests() -> None:
    said = re.findall(r"(?m)^\| (\d+) \|[^|]*\|[^|]*\| ([^|]*) \|", PAGE.read_text(encoding="utf-8"))
    named = {int(row): re.findall(r"`([^`]+)`", tests) for row, tests in said}
    assert named == marked(), "python tests/reliability_page.py --dry"


def test_none_of_them_failed_when_they_last_ran() -> None:
    assert {t: said for t, said in known().items() if "failed" in said} == {}
