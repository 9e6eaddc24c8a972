"""A headless Chromium that looks at pages; tests that need it skip with a reason where it is not installed."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="chromium and chromedriver are not installed"
)

# visible text with less than 4.5 times the luminance of what is behind it
LOW_CONTRAST = """
const rgb = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
const light = ([r, g, b]) => [r, g, b].map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const colour = rgb(getComputedStyle(e).backgroundColor);
    if (colour.length === 3 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
};
const found = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!own || !element.checkVisibility() || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
  const style = getComputedStyle(element);
  const [a, b] = [rgb(element instanceof SVGElement ? style.fill : style.color), behind(element)].map(light);
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) found.push(`${element.tagName} ${element.textContent.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
}
return found;
"""

# of each plot that is shown: its size, and how many of its marks have an extent
PLOTS = """
return [...document.querySelectorAll("svg.plot")].filter((plot) => plot.checkVisibility()).map((plot) => {
  const box = plot.getBoundingClientRect();
  const marks = [...plot.querySelectorAll('[id*="-line2d_"] > path, [id*="-LineCollection_"] path, [id*="FillBetween"] path, image')]
    .filter((mark) => !mark.closest('[id*="-matplotlib.axis_"]'))
    .filter((mark) => { const b = mark.getBBox(); return b.width + b.height > 0; });
  return { label: plot.getAttribute("aria-label"), width: box.width, height: box.height, marks: marks.length,
           outside: box.right > document.documentElement.clientWidth + 1 };
});
"""


class Browser:
    """One Chromium.

    Attributes:
        driver: Selenium's.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, file: Path, *, width: int, scheme: str) -> None:
        """Open a page of this width, in the colour scheme "light" or "dark"."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        preferred = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": preferred})
        self.messages()
        self.driver.get(file.as_uri())

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def messages(self) -> list[str]:
        """What the console has said since it was last asked."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def screenshot(self, file: Path) -> None:
        taken = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        file.write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser that is closed at the end."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
