"""`report.html` in a real browser: run by ci/browser.sh, which sees to it that there is one."""

from __future__ import annotations

import datetime
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

from dsv4_hal.conformance.judging.results import About, Outcome, jobs
from dsv4_hal.conformance.judging.waivers import Waiver
from dsv4_hal.conformance.models.compare import Compared
from dsv4_hal.conformance.models.drift import Free, Part, Picks
from dsv4_hal.conformance.reports import html, model_report, report, saved
from dsv4_hal.conformance.reports.report import Run

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver, see ci/browser.sh"),
]
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1280,900"),
)
HOSTILE = "</script><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"
METRICS = {"y": {"nmse": 1e-10, "max_abs": 1e-5, "max_rel": 1e-5, "cosine": 1.0}, "same": {"differing": 0.0}}

# Text whose contrast with what is behind it is under 4.5 (WCAG 1.4.3), and edges of controls under 3 (1.4.11).
FAINT = """
const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function rgb(color) {
  context.clearRect(0, 0, 1, 1);
  context.fillStyle = color;
  context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data];
}
function light(color) {
  const [r, g, b] = rgb(color).map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function ratio(a, b) {
  const [x, y] = [light(a), light(b)];
  return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
}
const opaque = (color) => rgb(color)[3] > 0;
function behind(element) {
  for (; element; element = element.parentElement) {
    const style = getComputedStyle(element);
    const found = [...(style.backgroundImage.match(/rgba?\\([^)]*\\)/g) ?? []), style.backgroundColor].filter(opaque);
    const clear = style.backgroundImage.includes("rgba(0, 0, 0, 0)");
    if (found.length) return clear ? [...found, ...behind(element.parentElement)] : found;
  }
  return ["white"];
}
const faint = [];
let seen = 0;
for (const element of document.querySelectorAll("body *")) {
  const style = getComputedStyle(element), svg = element.tagName === "text";
  const told = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!element.checkVisibility() || element.matches(".vh, script, title")) continue;
  for (const back of behind(element)) {
    seen += 1;
    const found = ratio(svg ? style.fill : style.color, back);
    if (told && found < 4.5) faint.push(`${element.tagName}.${element.className}: ${found.toFixed(2)}`);
    const edge = element.matches("input, select, button") ? ratio(style.borderTopColor, back) : 21;
    if (edge < 3) faint.push(`edge of ${element.id}: ${edge.toFixed(2)}`);
  }
}
return [seen, [...new Set(faint)]];
"""


def results(folder: Path) -> list[saved.OpsRun | saved.ModelRun]:
    """Real ids on three backends (shapes, failures of every kind, fallbacks, waivers) and a model of 8 layers."""
    about = About("", {"exact": {"storage": "float32"}}, {"machine": {"system": "a chip " * 30}}, "interpreted")
    work, outcomes = jobs(size="interpreted"), dict[str, list[Outcome]](reference=[], null=[], mychip=[])
    for number, job in enumerate(work):
        facts = {"op": job.op, "case": job.case, "mode": job.mode}
        outcomes["null"].append(Outcome("null", **facts, runs_as="native", verdict="shapes"))
        kind, share = ("native", "reference", "composite")[len(job.op) % 3], (number * 37 % 100) / 100
        agrees = {"verdict": "agrees", "of_budget": share, "metrics": METRICS}
        outcomes["reference"].append(Outcome("reference", **facts, runs_as="reference", **agrees))
        if job.op == "hadamard":
            agrees |= {"verdict": "disagrees", "of_budget": math.inf, "message": HOSTILE}
        elif job.op == "rope" and number % 2:
            agrees |= {"verdict": "disagrees", "of_budget": 30 * share + 1.01, "message": "y: too far"}
        elif job.op == "sample":
            agrees = {"verdict": "crash", "message": "exit code 11"}
        outcomes["mychip"].append(Outcome("mychip", **facts, runs_as=kind, **agrees))
    outcomes["mychip"].append(Outcome("mychip", HOSTILE, HOSTILE, "exact", HOSTILE, "error", HOSTILE))
    days = [datetime.date.today() + datetime.timedelta(days) for days in (-4, 30)]
    waivers = (Waiver("hadamard[", "scale", *days), Waiver("swiglu[", "was wrong once", *days))
    for backend, found in outcomes.items():
        report.write(Run(backend, found, about, waivers if backend == "mychip" else ()), folder / backend)
    rows: list[Any] = [Part("mychip", None, None, "embed")]
    for layer in range(8):
        for part in ("streams", "attn", "ffn"):
            error = layer * 1e-4 if part != "attn" else 2e-3 * 2**layer
            told = ("disagrees", HOSTILE) if error > 0.1 else ("agrees", "")
            rows.append(Part("mychip", layer, 4, part, error, 0.1, 0.0, 0.1, 0.1, 0.5, error / 0.1, *told))
        rows.append(Picks("mychip", layer, "experts", 1.0, 0.98, "agrees"))
    rows.append(Free("mychip", 90, 0.96, 0.02, 0.99, 0.1, 7, 9))
    head = {
        "baseline": "reference", "backends": ["mychip"], "model": {"name": HOSTILE}, "mode": "deployed",
        "prompts": [60], "steps": ["60", "1"], "profiles": {"mychip": {}}, "environment": {"mychip": {}}, "ops": {},
    }  # fmt: skip
    model_report.write(Compared(head, rows), folder / "model")
    return [run for name in (*outcomes, "model") for run in saved.read(folder / name)]


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a page with everything on it."""
    folder = tmp_path_factory.mktemp("report")
    html.write(results(folder), folder / "report.html")
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = Chrome(options, Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Chrome, page: str) -> Chrome:
    """The page, fresh, on a wide window in light colours."""
    setting(browser)
    browser.get("about:blank")
    browser.get(page)
    return browser


def setting(browser: Chrome, scheme: str = "light", media: str = "", width: int = 1280) -> None:
    wanted = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in wanted.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def ask(browser: Chrome, script: str, *arguments: Any) -> Any:
    return browser.execute_script(script, *arguments)


def press(browser: Chrome, *keys: str) -> None:
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


def test_nothing_is_fetched_and_nothing_goes_wrong(opened: Chrome, page: str) -> None:
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    mine = {e["request"]["url"] for e in asked if e["documentURL"] == page}
    assert mine == {page}, mine
    assert not [e for e in asked if e["request"]["url"].startswith("http")]
    assert [entry for entry in opened.get_log("browser") if entry["level"] != "INFO"] == []


def test_hostile_text_does_nothing(opened: Chrome) -> None:
    assert "hacked" not in opened.title.split("'")[0] and opened.title.startswith("dsv4-hal: reference; null; mychip")
    assert ask(opened, "return document.images.length") == 0
    assert ask(opened, "return document.scripts.length") == 1
    assert HOSTILE in ask(opened, "return document.querySelector('.failures').textContent")


def test_an_inserted_script_is_not_run(opened: Chrome) -> None:
    """The policy holds, not only the escaping."""
    ask(opened, "const s = document.createElement('script'); s.text = 'window.ran = true'; document.body.append(s)")
    assert ask(opened, "return window.ran === undefined")
    assert any("Content Security Policy" in entry["message"] for entry in opened.get_log("browser"))


def test_landmarks_and_names(opened: Chrome) -> None:
    nodes = opened.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    told = [(n.get("role", {}).get("value"), n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"]]
    roles = [role for role, _ in told]
    assert all(roles.count(role) == 1 for role in ("banner", "main", "navigation", "contentinfo", "form"))
    named = (
        "link",
        "region",
        "table",
        "button",
        "searchbox",
        "combobox",
        "checkbox",
        "columnheader",
        "rowheader",
        "image",
    )
    assert [role for role, name in told if role in named and not name.strip()] == []
    assert any(r == "link" and "0.99" in name and "agrees, by the backend’s own code" in name for r, name in told)
    headings = ask(opened, "return [...document.querySelectorAll('h1, h2')].map((h) => h.textContent.trim())")
    assert headings[:5] == ["dsv4-hal Conformance report", "Runs", "Matrix", "Errors", "Cases"]


def test_a_cell_opens_its_cases_by_keyboard(opened: Chrome) -> None:
    press(opened, Keys.TAB)
    assert opened.switch_to.active_element.text == "Skip to the results"
    ask(opened, "[...document.querySelectorAll('.matrix a.fails')].at(-1).focus()")
    press(opened, Keys.ENTER)
    WebDriverWait(opened, 5).until(lambda b: b.switch_to.active_element.tag_name == "summary")
    summary = opened.switch_to.active_element
    inside = "return arguments[0].parentElement"
    assert ask(opened, f"{inside}.open && {inside[7:]}.querySelector(location.hash) !== null", summary)
    assert ask(
        opened, "const r = arguments[0].getBoundingClientRect(); return r.top >= 0 && r.bottom <= innerHeight", summary
    )
    assert ask(opened, "return getComputedStyle(arguments[0]).outlineStyle", summary) == "solid"
    press(opened, Keys.TAB)
    assert opened.switch_to.active_element.get_attribute("role") == "region"
    ask(opened, "arguments[0].focus()", summary)
    press(opened, Keys.ENTER)
    assert not ask(opened, f"{inside}.open", summary)


def test_filters(opened: Chrome) -> None:
    left = "return [...document.querySelectorAll('.cases tbody')].filter((b) => !b.closest('[hidden]')).length"
    every = ask(opened, left)
    count = opened.find_element("id", "count")
    assert every == 3 * len(jobs(size="interpreted")) + 1 and count.text == f"{every} of {every} cases"
    field = opened.find_element("id", "f-text")
    field.send_keys("rope disagrees heads=2")
    WebDriverWait(opened, 5).until(lambda b: count.text != f"{every} of {every} cases")
    found = ask(opened, left)
    assert 0 < found < 50 and count.text == f"{found} of {every} cases"
    shown = "return [...document.querySelectorAll('.cases tbody')].filter((b) => b.checkVisibility()).length"
    assert ask(opened, shown) == found
    opened.find_element("id", "f-run").send_keys("null")
    WebDriverWait(opened, 5).until(lambda b: count.text == f"0 of {every} cases")
    assert opened.find_element("id", "nothing").is_displayed()
    opened.find_element("css selector", "#filters button").send_keys(Keys.ENTER)
    WebDriverWait(opened, 5).until(lambda b: count.text == f"{every} of {every} cases")
    assert ask(opened, shown) == 0
    opened.find_element("id", "f-state").send_keys("waived")
    WebDriverWait(opened, 5).until(lambda b: count.text != f"{every} of {every} cases")
    waived = ask(opened, "return document.querySelectorAll('.cases tbody[data-state=waived]').length")
    assert ask(opened, shown) == ask(opened, left) == waived > 0


def test_a_link_finds_what_a_filter_hides(opened: Chrome) -> None:
    count = opened.find_element("id", "count")
    before = count.text
    opened.find_element("id", "f-text").send_keys("rope")
    WebDriverWait(opened, 5).until(lambda b: count.text != before)
    ask(opened, "document.querySelector('.matrix a').click()")
    WebDriverWait(opened, 5).until(lambda b: b.switch_to.active_element.tag_name == "summary")
    assert opened.find_element("css selector", "details.cases[open] table").is_displayed()


def test_only_what_differs(opened: Chrome) -> None:
    rows = "return [...document.querySelectorAll('#environments tbody tr')].filter((r) => r.checkVisibility()).length"
    every = ask(opened, rows)
    ask(opened, "document.querySelector('#environments input').focus()")
    press(opened, Keys.SPACE)
    assert 0 < ask(opened, rows) < every


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(opened: Chrome, scheme: str) -> None:
    setting(opened, scheme)
    some = ".op:nth-of-type(9n), .op:nth-of-type(9n) *, figure *"
    ask(opened, "for (const one of document.querySelectorAll('details')) one.open = one.matches(arguments[0])", some)
    dark = ask(opened, "return getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert dark == (scheme == "dark")
    seen, faint = ask(opened, FAINT)
    assert seen > 1000 and faint == []


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_never_scrolls_sideways(opened: Chrome, width: int) -> None:
    setting(opened, width=width)
    ask(opened, "for (const one of [...document.querySelectorAll('details')].slice(0, 60)) one.open = true")
    assert ask(opened, "return document.documentElement.scrollWidth") <= width
    wide = "(e) => e.checkVisibility() && e.scrollWidth > e.clientWidth"
    regions = ask(opened, f"return [...document.querySelectorAll('.scroll')].filter({wide})")
    assert regions or width > 390
    assert all(region.get_attribute("tabindex") == "0" and region.get_attribute("aria-label") for region in regions)


def test_print(opened: Chrome) -> None:
    assert len(opened.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]) > 10_000
    setting(opened, "dark", "print")
    hidden = "return document.querySelector(arguments[0]).checkVisibility()"
    shown = {name: ask(opened, hidden, name) for name in ("nav", "#filters", ".op", ".failures", ".matrix", ".card")}
    assert shown == {"nav": False, "#filters": False, ".op": False, ".failures": True, ".matrix": True, ".card": True}
    assert ask(opened, "return getComputedStyle(document.body).color") == "rgb(28, 33, 38)"  # that of light


def test_it_can_be_read_without_javascript(opened: Chrome, page: str) -> None:
    opened.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened.get(page + "?")
        assert not opened.find_element("id", "filters").is_displayed()
        assert opened.find_element("css selector", ".matrix a.fails").is_displayed()
        opened.find_element("css selector", ".matrix a.fails").click()
        assert opened.find_element("css selector", "details[open] details[open] table").is_displayed()
    finally:
        opened.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
