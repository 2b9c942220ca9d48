"""The page in a browser: no network, no word in the console, pictures, tabs, the film, a phone, light and dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_files
from PIL import Image
from run_files import NAMES, STEPS, made_by_hand

from ssod.report.findings import Findings
from ssod.report.many import write_comparison
from ssod.report.page import Seen, write_page
from ssod.report.run import read_run

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((p for p in map(shutil.which, BROWSERS) if p), None)
    with playwright.sync_playwright() as p:
        if found is None and not Path(p.chromium.executable_path).is_file():
            pytest.skip("there is no Chromium here: install the system's, or `playwright install chromium`")
        opened = p.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every part, and a class that is named to do harm."""
    names = ["<script>document.title = 'harm'</script>", "<img src=x onerror=\"document.title = 'harm'\">", *NAMES]
    folder = made_by_hand(tmp_path_factory.mktemp("runs") / "exp", names, name="x" * 90)
    run_files.write_film(folder, names, STEPS)
    run_files.write_audit(folder, names, STEPS)
    run_files.write_alarm(folder, "a_long_word_" * 20)
    run_files.write_baseline(folder, names, STEPS)
    picture = folder / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8)).save(picture)
    truth = np.asarray([[0, 10, 10, 90, 90, 0, 0], [0, 150, 20, 190, 60, 1, 0]], float)
    found = np.asarray([[0, 12, 12, 90, 90, 0, 0.9], [0, 200, 100, 250, 150, 2, 0.8]], float)
    images = [{"file_name": "a.png", "width": 300, "height": 200}]
    findings = Findings({"conf": 0.05, "of": 1}, images, names, truth, found)
    return write_page(read_run(folder), folder / "report.html", None, Seen(findings, [picture], ""))


class Opened:
    """A page in a tab of its own; what it asked for and what it complained of."""

    def __init__(self, browser: Any, file: Path, width: int = 1280, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(file.as_uri())

    def shown(self) -> list[str]:
        """Ids of the parts that are to be seen."""
        return [s.get_attribute("id") for s in self.page.query_selector_all("main > section") if s.is_visible()]

    def of(self, script: str) -> Any:
        return self.page.evaluate(script)


def test_it_loads_alone_without_a_word_and_pictures_decode(browser: Any, page_file: Path) -> None:
    opened = Opened(browser, page_file)
    assert opened.of("document.title") == "exp – ssod", "no class name became a program"
    sizes = opened.of("Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))")
    assert len(sizes) == 4 + 3 + 2
    assert min(sizes) > 0
    assert [url for url in opened.asked if not url.startswith("data:")] == [page_file.as_uri()]
    assert opened.said == []


def test_the_policy_stops_what_would_be_asked_for(browser: Any, page_file: Path) -> None:
    opened = Opened(browser, page_file)
    loaded = opened.of(
        "new Promise(r => { const i = new Image(); i.onload = () => r(true); i.onerror = () => r(false); "
        "i.src = 'a.png'; })"  # which is there
    )
    assert loaded is False
    assert "Content Security Policy" in " ".join(opened.said)


def test_tabs_by_pointer_key_and_address(browser: Any, page_file: Path) -> None:
    opened = Opened(browser, page_file)
    assert opened.shown() == ["overview"]
    opened.page.click("#tab-validation")
    assert opened.shown() == ["validation"]
    assert opened.page.get_attribute("#tab-validation", "aria-selected") == "true"
    opened.page.keyboard.press("ArrowRight")
    assert opened.shown() == ["setup"]
    opened.page.keyboard.press("ArrowRight")
    assert opened.shown() == ["overview"]
    opened.page.goto(page_file.as_uri() + "#pseudo")
    assert opened.shown() == ["pseudo"]
    assert opened.said == []
    plain = Opened(browser, page_file, java_script_enabled=False)
    assert plain.shown() == ["overview", "pseudo", "validation", "setup"], "all of it without a script"


def test_the_film_goes_through_the_steps(browser: Any, page_file: Path) -> None:
    opened = Opened(browser, page_file)
    opened.page.click("#tab-pseudo")
    boxes = "[...document.querySelectorAll('.thumbs rect')].map(r => r.getAttribute('x') + r.getAttribute('class'))"
    last, kept = opened.of(boxes), opened.page.inner_text("#film-said")
    opened.page.fill("#film-step", "0")
    assert opened.page.inner_text("#film-now") == "20"
    assert opened.of(boxes) != last
    assert opened.page.inner_text("#film-said") != kept
    assert "<script>" in opened.of("document.querySelector('.thumbs rect title').textContent") or len(NAMES) < 4
    visible = "[...document.querySelectorAll('.thumbs .dashed')].filter(r => r.getClientRects().length).length"
    assert opened.of(visible) > 0
    opened.page.click("#film-dropped")
    assert opened.of(visible) == 0
    opened.page.click(".thumbs button >> nth=1")
    assert opened.page.locator("#film-strip figure").count() == len(STEPS)
    opened.page.click(".thumbs button >> nth=1")
    assert not opened.page.is_visible("#film-strip")
    assert opened.said == []


def test_values_are_read_off_a_curve(browser: Any, page_file: Path) -> None:
    opened = Opened(browser, page_file)
    chart = opened.page.locator(".chart", has=opened.page.locator("figcaption", has_text="AP on")).first
    chart.scroll_into_view_if_needed()
    box = chart.locator("svg").first.bounding_box()
    opened.page.mouse.move(box["x"] + box["width"] * 0.94, box["y"] + box["height"] / 2)
    said = chart.locator(".tip").inner_text().split("\n")
    assert said[0] == "60"
    values = dict(line.rsplit(" ", 1) for line in said[1:])
    assert float(values["student"]) == pytest.approx(0.14, abs=0.002)
    assert float(values["teacher"]) == pytest.approx(0.15, abs=0.002)
    assert float(values["baseline (supervised)"]) == pytest.approx(0.09, abs=0.002)


@pytest.mark.parametrize("width", [320, 375, 768])
def test_nothing_sticks_out_of_a_small_screen(browser: Any, page_file: Path, width: int) -> None:
    opened = Opened(browser, page_file, width)
    for tab in opened.page.query_selector_all("[role=tab]"):
        tab.click()
        assert opened.of("document.documentElement.scrollWidth") <= width, tab.inner_text()
    if width == 375:
        opened.page.click("#tab-overview")
        size = opened.of("document.querySelector('.chart text').getBoundingClientRect().height")
        assert size >= 10, "words in charts can be read on a phone"


def contrast(opened: Opened, selector: str, ground: str) -> float:
    """WCAG's contrast between the colour of an element and the background of another."""
    colors = opened.of(
        f"[getComputedStyle(document.querySelector('{selector}')).color, "
        f"getComputedStyle(document.querySelector('{ground}')).backgroundColor]"
    )
    lights = []
    for color in colors:
        parts = [float(v) / 255 for v in color[color.index("(") + 1 : -1].split(",")[:3]]
        linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_by_the_system_and_by_the_button(browser: Any, page_file: Path, scheme: str) -> None:
    opened = Opened(browser, page_file, color_scheme=scheme)
    ground = "getComputedStyle(document.body).backgroundColor"
    is_dark = opened.of(f"{ground}.match(/\\d+/g).map(Number).reduce((a, b) => a + b) < 200")
    assert is_dark == (scheme == "dark")
    for selector, behind in (("h1", "body"), (".sub", "body"), (".tiles dt", ".tiles > div"), (".warning", ".warning")):
        assert contrast(opened, selector, behind) >= 4.5, selector
    before = opened.of(ground)
    opened.page.click("#theme")
    assert opened.of(ground) != before
    for selector, behind in (("h1", "body"), (".sub", "body"), (".warning", ".warning")):
        assert contrast(opened, selector, behind) >= 4.5, selector
    opened.page.reload()
    assert opened.of(ground) != before, "the choice stays"
    assert opened.said == []


def test_several_runs_on_a_page(browser: Any, page_file: Path, tmp_path: Path) -> None:
    other = made_by_hand(tmp_path / "other", strategy={"name": "supervised"})
    runs = [read_run(page_file.parent), read_run(other)]
    opened = Opened(browser, write_comparison(runs, tmp_path / "comparison.html"), 375)
    for tab in opened.page.query_selector_all("[role=tab]"):
        tab.click()
        assert opened.of("document.documentElement.scrollWidth") <= 375, tab.inner_text()
    assert opened.said == []
