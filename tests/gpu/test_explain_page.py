"""The page of ``smca explain`` in a browser, by clicks and by keys."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explained_photo import CLASSES, NAME, PHOTO, explained, model
from PIL import Image

from smca.gpu import explain
from smca.gpu.model.explanation import Explanation

webdriver = pytest.importorskip("selenium.webdriver", reason="nothing to drive a browser with: pip install selenium")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

READ_ATLAS = """
const [j, kind, which, done] = arguments;
atlas(1, kind).then(({values, width}) => {
  const [rows, columns, , , top] = data.grids[j], largest = data.detections[1].largest[which][j], maps = [];
  for (let m = 0; m < M; m++)
    for (let i = 0; i < h; i++)
      for (let r = 0; r < rows; r++)
        for (let c = 0; c < columns; c++)
          maps.push((values[4 * ((top + m * rows + r) * width + i * columns + c)] / 255) ** 2 * largest[m][i]);
  done(maps);
});
"""
BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def photo() -> tuple[Explanation, Explanation]:
    return explained()


@pytest.fixture
def shown(photo: tuple[Explanation, Explanation]) -> Explanation:
    return photo[0]


@pytest.fixture
def everyone(photo: tuple[Explanation, Explanation]) -> Explanation:
    return photo[1]


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    if BROWSER is None or DRIVER is None:
        pytest.skip("no Chromium with its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for switch in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "disable-component-update",
    ):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def opened(browser: webdriver.Chrome, shown: Explanation, everyone: Explanation, tmp_path: Path) -> webdriver.Chrome:
    text, count = explain.page(PHOTO, NAME, shown, everyone, CLASSES)
    assert count == 3
    return open_page(browser, text, tmp_path)


def open_page(browser: webdriver.Chrome, text: str, folder: Path) -> webdriver.Chrome:
    (folder / "page.html").write_text(text, encoding="utf-8")
    browser.set_window_size(1200, 900)
    browser.get((folder / "page.html").as_uri())
    WebDriverWait(browser, 30).until(lambda page: page.execute_script("return document.body.dataset.ready"))
    return browser


def text_of(page: webdriver.Chrome, name: str) -> str:
    return page.find_element(By.ID, name).text


def chosen(page: webdriver.Chrome) -> str | None:
    return page.find_element(By.CSS_SELECTOR, "input[name=detection]:checked").get_attribute("value")


def ellipses(page: webdriver.Chrome) -> int:
    return len(page.find_elements(By.CSS_SELECTOR, "#marks ellipse"))


def test_strings_are_text_and_nothing_is_fetched(opened: webdriver.Chrome) -> None:
    assert text_of(opened, "name") == NAME
    assert opened.title == f"Why: {NAME}"
    assert not opened.find_elements(By.CSS_SELECTOR, "b, i")
    resources = opened.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith("data:") for name in resources)
    assert opened.get_log("browser") == []


def test_a_click_on_a_box_chooses_it(opened: webdriver.Chrome, shown: Explanation) -> None:
    assert chosen(opened) == "0"
    assert f"(query {shown.queries[0]}), layer by layer" in text_of(opened, "heading")
    box = opened.find_element(By.CSS_SELECTOR, "#marks rect[data-detection='2']")
    opened.execute_script("arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))", box)
    assert chosen(opened) == "2"
    assert f"(query {shown.queries[2]}), layer by layer" in text_of(opened, "heading")
    assert opened.find_element(By.ID, "lookers").text == "", "the click was the box's"


def test_keys_do_everything(opened: webdriver.Chrome, shown: Explanation) -> None:
    heads = shown.attention[0].shape[2]
    assert ellipses(opened) == 2 * 2 * heads
    opened.find_element(By.CSS_SELECTOR, "input[name=detection]:checked").send_keys(Keys.ARROW_DOWN)
    assert chosen(opened) == "1"
    opened.find_element(By.ID, "layer").send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert text_of(opened, "layerNumber") == "1 of 3"
    assert opened.find_element(By.CSS_SELECTOR, "tr.now").text.startswith("1 ")
    opened.find_element(By.ID, "head").send_keys("2")
    assert ellipses(opened) == 2 * 2
    opened.find_element(By.ID, "level").send_keys("2")
    assert ellipses(opened) == 2
    opened.find_element(By.ID, "prior").send_keys(Keys.SPACE)
    assert ellipses(opened) == 0
    for name, value in (("x", "30"), ("y", "20")):
        field = opened.find_element(By.ID, name)
        field.clear()
        field.send_keys(value)
    opened.find_element(By.ID, "x").send_keys(Keys.ENTER)
    assert text_of(opened, "lookers").startswith("looks here says score")


def test_who_looks_at_a_point(opened: webdriver.Chrome, everyone: Explanation) -> None:
    """By the Gaussians of the last layer: Σ over heads and levels of the level's weight times G, per head."""
    marks = opened.find_element(By.ID, "marks")
    move = webdriver.ActionChains(opened).move_to_element_with_offset(marks, -marks.rect["width"] / 2 + 3, 0)
    move.click().perform()
    point = [float(opened.find_element(By.ID, name).get_attribute("value") or "nan") for name in ("x", "y")]
    assert point[0] < 5
    assert abs(point[1] - 25) <= 1
    at = opened.execute_script("return state.point")
    assert everyone.centers_xy is not None
    assert everyone.sigmas_xy is not None
    g = np.exp(-0.5 * (((at - everyone.centers_xy[-1]) / everyone.sigmas_xy[-1]) ** 2).sum(-1))  # [N, h, J]
    looks = np.einsum("nhj,nj->n", g, everyone.level_weights[-1]) / g.shape[1]
    first = opened.find_elements(By.CSS_SELECTOR, "#lookers tr")[1].text
    found = re.match(r"query (\d+) ([\d.]+) ", first)
    assert found is not None, first
    assert int(found[1]) == looks.argmax()
    assert abs(float(found[2]) - looks.max()) < 0.03  # centres and widths are rounded to a tenth of a pixel


def test_a_phone_and_the_dark(opened: webdriver.Chrome) -> None:
    def background() -> list[int]:
        color = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
        return [int(part) for part in re.findall(r"\d+", color)[:3]]

    assert min(background()) > 200
    opened.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    assert max(background()) < 60
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        assert opened.execute_script("return document.documentElement.scrollWidth") <= 360
        assert opened.find_element(By.ID, "photo").rect["width"] > 300
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


STATES = {
    "opened": "",
    "one head of the first layer without its prior": """
        for (const [id, value] of [["layer", 1], ["head", 1], ["level", 0]]) {
          const field = document.getElementById(id);
          field.value = value;
          for (const kind of ["input", "change"]) field.dispatchEvent(new Event(kind, {bubbles: true}));
        }
        document.getElementById("prior").click();""",
    "who looks at a point": """
        document.getElementById("x").value = 30;
        document.getElementById("y").value = 20;
        document.getElementById("x").form.requestSubmit();""",
}


@pytest.mark.parametrize("state", STATES)
def test_screenshots(state: str, opened: webdriver.Chrome, tmp_path: Path) -> None:
    """Three states in both colour schemes, as pictures in pytest's folder (--basetemp=DIR)."""
    opened.execute_script(STATES[state])
    light = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        opened.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 200))")
        path = tmp_path / f"{scheme}.png"
        assert opened.save_screenshot(str(path))
        pixels = np.asarray(Image.open(path).convert("L"))
        light[scheme] = float(np.median(pixels))
        assert pixels.std() > 20, "a blank page"
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert light["light"] > 200
    assert light["dark"] < 60


@pytest.mark.parametrize("kind", ["attention", "plain"])
def test_the_maps_are_the_models(opened: webdriver.Chrome, shown: Explanation, kind: str) -> None:
    """As the page's script reads them: s² of the largest, with s in steps of 1/255."""
    for j, level in enumerate(shown.attention if kind == "attention" else shown.attention_without_prior):
        read: Any = opened.execute_async_script(READ_ATLAS, j, kind, int(kind == "plain"))
        want = level[:, 1]
        got = np.reshape(read, want.shape)
        assert np.abs(got - want).max() < 0.005 * want.max()


@pytest.mark.parametrize("most", [2, 0])
def test_a_model_without_a_prior_and_an_image_without_detections(
    most: int, browser: webdriver.Chrome, tmp_path: Path
) -> None:
    made, _ = model({"strides": (4, 8), "cross_attention": "dense", "scale_selection": False})
    shown = made.explain(PHOTO, queries=range(most))
    everyone = made.explain(PHOTO, queries=range(made.config.num_queries), maps=False)
    names = [f"class {n}" for n in range(made.config.num_classes)]
    page = open_page(browser, explain.page(PHOTO, "p.png", shown, everyone, names)[0], tmp_path)
    assert len(page.find_elements(By.CSS_SELECTOR, "input[name=detection]")) == most
    assert not page.find_element(By.ID, "prior").is_enabled()
    page.find_element(By.ID, "x").send_keys("3", Keys.ENTER)
    assert text_of(page, "lookers") == "This model has no prior to ask."
    assert page.get_log("browser") == []
