"""The page in a browser, as its readers use it: with a mouse, with keys alone, in light and dark, wide and narrow."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fuseplan.record import Comparison, GraphReport, Report
from fuseplan.report import save_html
from tests.report.synthetic import BOTH, PAD, REDUCE, Synthetic

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><b>"
# Texts whose contrast with what they stand on is below 4.5.
CONTRAST = """() => {
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const paint = (colors) => {
        canvas.clearRect(0, 0, 1, 1);
        for (const color of colors) {
            canvas.fillStyle = color;
            canvas.fillRect(0, 0, 1, 1);
        }
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const light = (rgb) => {
        const [r, g, b] = rgb.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const low = [];
    let seen = 0;
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        if (!own || !element.checkVisibility() || element.closest("script, option, .unseen, .skip")) continue;
        seen++;
        const grounds = [];
        for (let at = element; at; at = at.parentElement) grounds.unshift(getComputedStyle(at).backgroundColor);
        const style = getComputedStyle(element);
        const ink = element instanceof SVGElement ? style.fill : style.color;
        const [a, b] = [light(paint(grounds)), light(paint([...grounds, ink]))].sort((x, y) => y - x);
        const ratio = (a + 0.05) / (b + 0.05);
        if (ratio < 4.5) low.push([element.textContent.slice(0, 30), element.className, ratio.toFixed(2)]);
    }
    return seen > 300 ? low : `only ${seen} texts`;
}"""

Open = Callable[..., Any]


@dataclass(frozen=True)
class Tab:
    """The one tab that pages are opened in, and what it has done since it was last emptied."""

    page: Any
    troubles: list[str]
    requests: list[str]

    def empty(self) -> None:
        """Forgets the page, what it kept, and what came of it."""
        self.page.evaluate("localStorage.clear()")
        self.page.goto("about:blank")
        self.troubles.clear()
        self.requests.clear()


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        # A context for each test would take as long as most tests.
        page = browser.new_context(reduced_motion="reduce").new_page()
        page.set_default_timeout(5000)
        tab = Tab(page, [], [])
        page.on("console", lambda message: tab.troubles.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: tab.troubles.append(f"error: {error}"))
        page.on("request", lambda request: tab.requests.append(request.url))
        yield tab
        browser.close()


@pytest.fixture
def open_page(tab: Tab, tmp_path: Path) -> Iterator[Open]:
    """Opens a comparison from disk. At the end nothing was asked of the network, and nothing went wrong."""
    path = tmp_path / "page.html"

    def opened(comparison: Comparison, *, width: int = 1280, height: int = 900, scheme: str = "light") -> Any:
        save_html(comparison, path)
        tab.page.set_viewport_size({"width": width, "height": height})
        tab.page.emulate_media(color_scheme=scheme)
        tab.page.goto(path.as_uri())
        tab.page.locator("html[data-ready]").wait_for(state="attached")
        return tab.page

    yield opened
    troubles, requests = [*tab.troubles], {*tab.requests}
    tab.empty()
    assert troubles == []
    assert requests == {path.as_uri()}


def panel(page: Any) -> Any:
    return page.locator("#details")


def focused(page: Any) -> str:
    key: str = page.evaluate("document.activeElement.dataset.key || document.activeElement.id")
    return key


def test_shows_every_part(open_page: Open) -> None:
    page = open_page(Synthetic(layers=5, obstructed=(1,)).comparison())
    assert (
        page.locator("h1")
        .inner_text()
        .startswith("The plan saves 37.0 µs a step at 1-64 tokens: 37 % of the 100 µs of ")
    )
    for part in ("tokens", "policies", "graph", "conflicts", "misses", "costs", "constants", "run"):
        assert page.locator(f"#{part}").is_visible(), part
    assert page.locator(".layer-head").all_inner_texts() == [
        "embed", "layer 0", "layer 1", "layers 2–3\n2 alike", "layer 4", "lm_head"
    ]  # fmt: skip
    assert page.locator("#policies-table tbody tr").count() == 4
    assert "starved" in page.locator("#policies-table tbody tr").nth(2).inner_text()
    assert page.locator("#run-body").get_by_text("fuse_norm_quant has no effect").is_visible()


def test_regions_candidates_and_boxes_open_their_details(open_page: Open) -> None:
    page = open_page(Synthetic().comparison())
    layer = page.locator('[data-segment="1"]')
    layer.locator(f'.region-name:has-text("{BOTH}")').click()
    assert "Fused region" in panel(page).inner_text()
    assert panel(page).locator("h2").inner_text() == BOTH
    assert "Saves 5.00 µs" in panel(page).inner_text()
    layer.locator(f'.bracket:has-text("{PAD}")').click()
    assert "Candidate that lost" in panel(page).inner_text()
    assert panel(page).locator("h2").inner_text() == PAD
    assert f"Blocked by \n{BOTH}" in panel(page).inner_text()
    assert "3.00 µs worse" in panel(page).inner_text()
    layer.locator('.bracket:has-text("allreduce_rms")').click()
    assert "at most 7.00 µs" in panel(page).inner_text()
    layer.locator('.box:has-text("router")').click()
    assert panel(page).locator("h2").inner_text() == "router"
    panel(page).get_by_label("Close details").click()
    assert not panel(page).is_visible()


def test_a_region_goes_on_in_the_next_layer(open_page: Open) -> None:
    page = open_page(Synthetic().comparison())
    ends = page.locator(".region-name").filter(has_text="allreduce_rms").filter(has_text="↦")
    ends.first.click()
    assert panel(page).locator("h2").inner_text() == REDUCE
    takes = panel(page).locator(".links").first.inner_text()
    assert "layers.0.experts" in takes
    assert "layers.1.norm" in takes


def test_conflicts_and_near_misses_lead_into_the_graph(open_page: Open) -> None:
    page = open_page(Synthetic(obstructed=(1,)).comparison())
    page.locator("#verdicts button").first.click()
    assert page.locator("#readout").inner_text().startswith("8 tokens")
    assert panel(page).locator("h2").text_content() == f"{PAD} loses"
    panel(page).get_by_text("layers.3.post_norm").click()
    assert panel(page).locator("h2").inner_text() == PAD
    assert page.locator('.layer-row[aria-label="layer 3"] .bracket.selected').is_visible()
    page.locator(".near:not(.faint)").click()
    assert "stands between all_reduce and rms_norm" in panel(page).inner_text()
    assert "x = x * 0.5" in panel(page).inner_text()
    panel(page).get_by_role("button", name="layers.1.scale").click()
    assert page.locator('.box.selected:has-text("scale")').is_visible()


def test_slider_moves_by_keys_and_changes_plan_and_figures(open_page: Open) -> None:
    page = open_page(Synthetic().comparison())
    slider = page.locator("#size")
    before = page.locator("#policies-table tbody tr.now").inner_text()
    assert page.locator(f'.region-name:has-text("{BOTH}")').count() > 0
    assert "the best plan flips between 512 and 513 tokens" in page.locator("#tokens-note").inner_text()
    slider.focus()
    assert slider.get_attribute("aria-valuetext").startswith("8 tokens, compile range 1")
    page.keyboard.press("End")
    assert page.locator("#readout").inner_text().startswith("8,192 tokens")
    assert "513" in page.locator("#readout").inner_text()
    assert page.locator(f'.region-name:has-text("{BOTH}")').count() == 0
    assert page.locator(f'.bracket:has-text("{BOTH}")').count() > 0
    assert page.locator("#policies-table tbody tr.now").inner_text() != before
    page.keyboard.press("ArrowLeft")
    assert page.locator("#readout").inner_text().startswith("4,096 tokens")
    page.get_by_role("button", name="65", exact=False).first.click()
    assert page.locator(f'.region-name:has-text("{BOTH}")').count() > 0


def test_thumb_and_cursor_stand_together(open_page: Open) -> None:
    page = open_page(Synthetic().comparison())
    for key in ("Home", "End"):
        page.locator("#size").press(key)
        cursor, slider = page.locator(".cursor path").bounding_box(), page.locator("#size").bounding_box()
        thumb = slider["x"] + (8 if key == "Home" else slider["width"] - 8)
        assert abs(cursor["x"] - thumb) < 2


def test_policies_are_switched(open_page: Open) -> None:
    page = open_page(Synthetic().comparison())
    page.locator('input[name="policy"]').nth(1).check()
    assert page.locator(f'.region-name:has-text("{PAD}")').count() > 0
    assert "1.00 µs better" in page.locator(".bracket.better").first.inner_text()
    page.keyboard.press("ArrowDown")
    assert page.locator("#policy-picker").input_value() == "2"
    page.locator("#policy-picker").select_option("3")
    assert page.locator(".region-name").count() == 0
    assert page.locator("#policies-table tr.now").inner_text().startswith("D")


def test_search_finds_marks_and_opens(open_page: Open) -> None:
    page = open_page(Synthetic(layers=6).comparison())
    page.keyboard.press("/")
    assert focused(page) == "search"
    page.keyboard.type("router_4")
    assert page.locator("#search-results [role=option]").count() == 1
    page.keyboard.press("Enter")
    assert panel(page).locator("h2").inner_text() == "router"
    assert page.locator('.layer-row[aria-label="layer 4"] .box.selected').is_visible()
    assert focused(page).startswith("box 0 ")
    page.keyboard.press("/")
    page.keyboard.type("experts")
    assert page.locator(".box.found").count() > 0
    assert page.locator("#layers.searching").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("#layers.searching").count() == 0
    page.locator("#search").fill("no such thing")
    assert "nothing of that name" in page.locator("#search-results").inner_text()


def test_keys_alone_reach_everything(open_page: Open) -> None:
    page = open_page(Synthetic().comparison())
    page.locator("#unfold").focus()
    page.keyboard.press("Tab")
    start = focused(page)
    assert start.startswith("fusion ")
    page.keyboard.press("Enter")
    assert panel(page).is_visible()
    assert page.evaluate("document.activeElement.tagName") == "H2"
    page.keyboard.press("Escape")
    assert not panel(page).is_visible()
    assert focused(page) == start
    seen = {start}
    for key in ("Home", *["ArrowRight"] * 14, "ArrowDown", *["ArrowLeft"] * 14):
        page.keyboard.press(key)
        seen.add(focused(page))
    assert {key.split()[0] for key in seen} == {"fusion", "box", "fold", "near"}
    page.keyboard.press("Home")
    assert focused(page).startswith("fold ")
    page.keyboard.press("Enter")
    assert page.locator(".layer-row.small").count() == 2
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.locator(".layer-row.small").count() == 1
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_figures_lead_to_their_rows(open_page: Open) -> None:
    page = open_page(Synthetic().comparison())
    count = page.locator("#costs-count")
    assert count.inner_text() == "37 of 37 rows"
    page.locator(".bracket").first.click()
    panel(page).get_by_text("cost rows behind these figures").click()
    assert count.inner_text() == "4 of 37 rows"
    assert page.locator("#costs-tokens").input_value() == "8"
    page.locator("#costs-filter").fill("act_padding triton")
    assert count.inner_text() == "1 of 37 rows"
    page.locator("#costs-tools").get_by_text("Clear").click()
    page.locator("#costs-filter").fill("measured")
    assert "measured at 8 tokens; h200" in page.locator("#costs-table").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read(open_page: Open, scheme: str) -> None:
    page = open_page(Synthetic(obstructed=(1,)).comparison(), scheme=scheme)
    page.locator(".bracket").first.click()
    assert page.evaluate(CONTRAST) == []
    page.locator("h1").evaluate("each => each.style.color = '#777c'")
    assert [text for text, _, _ in page.evaluate(CONTRAST)] == ["The plan saves 29.0 µs a step "]
    page.locator("h1").evaluate("each => each.style.color = ''")
    ground = "getComputedStyle(document.body).backgroundColor"
    system = page.evaluate(ground)
    for theme in ("light", "dark"):
        page.locator("#theme").click()
        assert page.locator("html").get_attribute("data-theme") == theme
        assert (page.evaluate(ground) == system) == (theme == scheme)
        assert page.evaluate(CONTRAST) == []


@pytest.mark.parametrize("width", [400, 800, 2000])
def test_no_width_scrolls_sideways(open_page: Open, width: int) -> None:
    page = open_page(Synthetic(layers=3, obstructed=(1,), graphs=2).comparison(), width=width)
    fits = "document.documentElement.scrollWidth <= innerWidth"
    assert page.evaluate(fits)
    page.locator(".bracket").first.click()
    assert panel(page).is_visible()
    assert page.evaluate(fits)


def test_constants_can_be_read_on_a_phone(open_page: Open) -> None:
    page = open_page(Synthetic().comparison(), width=390)
    name, value, unit, source = (page.locator("#constants td").nth(index).bounding_box() for index in range(4))
    assert name["y"] == value["y"] == unit["y"]
    assert source["y"] >= name["y"] + name["height"]
    assert source["width"] > 300


def test_the_summary_says_what_each_saving_is_of(open_page: Open) -> None:
    comparison = Synthetic().comparison()
    shown = " ".join(open_page(comparison).locator("#summary").inner_text().split())
    for graph in comparison.reports[0].graphs:
        assert f"{graph.saved_ns / 1000:.1f} µs of {graph.unfused_ns / 1000:.1f}" in shown


def test_hostile_names_are_text(open_page: Open) -> None:
    page = open_page(Synthetic(name=lambda name: name + HOSTILE, obstructed=(1,), graphs=2).comparison())
    for item in (".region-name", ".bracket", ".near:not(.faint)", ".box", "#verdicts button"):
        page.locator(item).first.click()
    page.locator("#search").fill("onerror")
    assert page.locator("#search-results [role=option]").count() > 0
    assert page.locator("img, main b > b, #details b > b").count() == 0
    assert page.title().startswith("model</script><img")
    assert HOSTILE in page.locator(".facts").inner_text()


def test_graphs_are_picked(open_page: Open) -> None:
    page = open_page(Synthetic(graphs=3).comparison())
    page.locator(".box").first.click()
    page.locator("#graph-picker").select_option("2")
    assert page.locator(".box").first.get_attribute("data-key") == "box 2 0"
    assert page.locator("#run-body").get_by_text("Call to graph_break()").is_visible()


def test_shows_what_there_is(open_page: Open) -> None:
    bare = open_page(Synthetic().comparison(evidence=False))
    assert not any(bare.locator(f"#{part}").is_visible() for part in ("tokens", "graph", "costs", "constants"))
    assert bare.locator("#policies").is_visible()
    bare.locator("#control").get_by_label("513").check()
    bare.locator("#conflicts-table button").first.click()
    assert panel(bare).is_visible()
    graphs = (GraphReport(graph="graph_0", range=(1, 8)),)
    nothing = Report(policy="planned", order=(), rules=("act_quant",), graphs=graphs)
    empty = open_page(Comparison(workload="w", tp=1, device="cpu", ranges=((1, 8),), reports=(nothing,)))
    assert empty.locator("h1").inner_text() == "Nothing to fuse: no rule matches anywhere."
    none = open_page(Comparison(workload="w", tp=1, device="cpu", ranges=(), reports=()))
    assert none.locator("h1").inner_text() == "Nothing was compared"


def test_36_layers_open_within_two_seconds(open_page: Open, tmp_path: Path) -> None:
    page = open_page(Synthetic(layers=36, obstructed=(7, 8)).comparison())
    assert (tmp_path / "page.html").stat().st_size < 3_000_000
    assert page.evaluate("performance.getEntriesByName('fuseplan-ready')[0].startTime") < 2000
    page.locator("#unfold").click()
    assert page.locator(".layer-row").count() >= 36
