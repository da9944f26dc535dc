"""The report in a browser without a network: its controls by keyboard, both colour schemes, paper, narrow windows."""

import shutil

import pytest
from report_cases import made_run
from selenium import webdriver

from moe_jax.analysis.report.write import write_report

pytestmark = [pytest.mark.slow, pytest.mark.browser]

# Every text that shows, with the contrast of its colour to the first ground behind it that is no glass (WCAG 2.2, 1.4.3).
CONTRASTS = """
const parts = color => (color.match(/[\\d.]+/g) || []).map(Number);
const luminance = color => {
  const [r, g, b] = parts(color).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = element => {
  for (let at = element; at; at = at.parentElement) {
    const color = getComputedStyle(at).backgroundColor, alpha = parts(color)[3];
    if (alpha === undefined || alpha === 1) return color;
  }
  return "rgb(255, 255, 255)";
};
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
  if (!text || ["SCRIPT", "STYLE"].includes(element.tagName) || !element.getClientRects().length) continue;
  const style = getComputedStyle(element), color = element.ownerSVGElement ? style.fill : style.color;
  const [a, b] = [luminance(color), luminance(ground(element))].sort((x, y) => y - x);
  found.push([(a + 0.05) / (b + 0.05), element.tagName, text.slice(0, 40), color]);
}
return found;
"""
# Numbers of the frames that show, by what the browser draws.
SHOWN = "return [...document.querySelectorAll('.frame')].flatMap((f, i) => getComputedStyle(f).display === 'none' ? [] : [i])"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    return write_report([made_run(folder, model__moe__exchange_factor=1.5)], folder / "out").as_uri()


@pytest.fixture(scope="module")
def browser():
    """Chromium whose network is cut off."""
    options = webdriver.ChromeOptions()
    options.add_argument("--headless=new")
    options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, address):
    """The page, freshly opened on a wide screen in light; nothing may have been logged in the end."""
    look(browser)
    size(browser, 1280)
    browser.get(address)
    browser.get_log("browser")
    browser.refresh()
    yield browser
    assert browser.get_log("browser") == []


def look(browser, scheme="light", media="screen"):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})


def size(browser, width):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def one(page, selector):
    return page.find_element("css selector", selector)


def press(control, key):
    from selenium.webdriver.common.keys import Keys

    control.send_keys(getattr(Keys, key))


def test_nothing_is_asked_for(page):
    requested = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in requested if not name.startswith("data:")] == []
    assert page.title == "Report: run"


def test_the_slider_of_the_loads(page):
    """Home, arrows and End; each stop shows one frame, its step and what is to be seen."""
    control, output = one(page, "#load-range"), one(page, "#figure-load output")
    picture, caption = one(page, "#figure-load svg"), one(page, "#figure-load figcaption .on-screen")
    assert page.execute_script(SHOWN) == [7]
    press(control, "HOME")
    seen = []
    for place in range(8):
        assert page.execute_script(SHOWN) == [place]
        assert control.get_attribute("aria-valuetext") == output.text
        assert picture.get_attribute("aria-label").endswith(f"equal share. {caption.text}")
        seen.append((output.text, caption.text))
        press(control, "ARROW_RIGHT")
    assert len(set(seen)) == 8
    assert seen[0][0] == "Training step, step 2"
    assert seen[7][0] == "Evaluation, step 10"
    press(control, "HOME")
    press(control, "END")
    assert output.text == "Evaluation, step 10"


def test_the_layer_of_the_text(page):
    """The control changes colours, titles, numbers and what is said of the passage; the box shows the numbers."""
    control, output, token = one(page, "#passages-layer"), one(page, "[data-layers] output"), one(page, "[data-e]")
    first, second = token.get_attribute("data-e").split()
    assert first != second
    looks = []
    for key, layer, expert in (("END", "layer 3", second), ("ARROW_LEFT", "layer 1", first)):
        press(control, key)
        assert output.text == layer
        assert token.get_attribute("title") == f"expert {expert}"
        assert token.get_attribute("class") == f"e{expert}"
        looks.append((token.value_of_css_property("background-color"), one(page, "[data-notes]").text))
    assert looks[0][0] != looks[1][0]
    assert looks[0][1] != looks[1][1]
    after = "return getComputedStyle(arguments[0], '::after').content"
    assert page.execute_script(after, token) == "none"
    press(one(page, "[data-layers] input[type=checkbox]"), "SPACE")
    assert page.execute_script(after, token) == f'"{first}"'


def test_colours_of_neighbouring_experts_differ(page):
    """Every expert of the legend has a look of its own."""
    style = "getComputedStyle(span).background + getComputedStyle(span).textDecoration"
    looks = f"return [...document.querySelectorAll('.legend span')].map(span => {style})"
    assert len(set(page.execute_script(looks))) == 8


@pytest.mark.parametrize(("scheme", "media"), [("light", "screen"), ("dark", "screen"), ("dark", "print")])
def test_text_can_be_read(page, scheme, media):
    look(page, scheme, media)
    page.execute_script("for (const part of document.querySelectorAll('details')) part.open = true")
    found = page.execute_script(CONTRASTS)
    assert len(found) > 1000
    assert {"TEXT", "TD", "SPAN", "text"} & {tag for _, tag, *_ in found} >= {"TD", "SPAN", "text"}
    assert [entry for entry in found if entry[0] < 4.5] == []
    ground = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light" or media == "print")


def test_paper_has_the_last_frame(page):
    """Whatever the slider was left at; controls do not print."""
    press(one(page, "#load-range"), "HOME")
    assert page.execute_script(SHOWN) == [0]
    look(page, media="print")
    assert page.execute_script(SHOWN) == [7]
    assert not one(page, "#load-range").is_displayed()
    assert one(page, "#figure-load .shown-label").text == "Shown: Evaluation, step 10"
    assert "expert 3 has 1.78 times" in one(page, "#figure-load figcaption").text


def test_without_scripts_the_last_frame_shows(browser, address):
    look(browser)
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(address)
        assert not one(browser, "#load-range").is_displayed()
        assert [
            i
            for i, frame in enumerate(browser.find_elements("css selector", ".frame"))
            if frame.value_of_css_property("display") != "none"
        ] == [7]
        assert one(browser, "#figure-load output").text == "Evaluation, step 10"
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_does_not_scroll_sideways(page, width):
    """And no picture is squeezed below what can be read: it scrolls in its own box."""
    size(page, width)
    page.execute_script("for (const part of document.querySelectorAll('details')) part.open = true")
    scrolled, seen = page.execute_script("const e = document.documentElement; return [e.scrollWidth, e.clientWidth]")
    assert scrolled == seen <= width
    outside = "!e.closest('.plot, .wide') && e.getBoundingClientRect().right > innerWidth + 1"
    wide = f"return [...document.querySelectorAll('main *')].filter(e => {outside}).map(e => e.tagName + ' ' + e.className)"
    assert page.execute_script(wide) == []
    size_of = "svg.getBoundingClientRect().width / svg.viewBox.baseVal.width"
    sizes = page.execute_script(f"return [...document.querySelectorAll('.plot svg')].map(svg => {size_of})")
    assert min(sizes) > 0.8  # of a point; letters are of 8.5 points and more
