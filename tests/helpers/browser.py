"""A real browser that looks at the MLflow interface. Run as a script, it gets the browser where there is none."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# What MLflow shows to a newcomer once, and a picture should not show: the assistant, which opens by itself.
KNOWN_VISITOR = """
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
"""

# Before a picture, what differs at each execution becomes a dash: dates, durations, ids and the folder of the store.
# The colours that MLflow derives from ids become one, and the assistant's button goes.
STILL = r"""
() => {
  const changing = [
    /\d+\/\d+\/\d{4}, \d+:\d+:\d+ [AP]M/g, /\d+ (second|minute|hour)s? ago|just now/g, /^\d+(\.\d+)?(ms|s|min)$/g,
    /\b(m-)?[0-9a-f]{32}\b/g, /(?<=file:\/\/\/).*(?=\/mlruns)/g, /(?<![:\/])\/.*(?=\/mlruns)/g,
  ];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode())
    for (const pattern of changing)
      walker.currentNode.nodeValue = walker.currentNode.nodeValue.replace(pattern, "\u2014");
  for (const button of document.querySelectorAll("[data-assistant-ui]")) button.remove();
  for (const dot of document.querySelectorAll("[style*='background-color']"))
    if (dot.offsetWidth < 20) dot.style.backgroundColor = "steelblue";
  document.activeElement.blur();
}
"""


def installed_browser() -> str | None:
    """Return the path of a Chromium on this machine: the system's, else the one that Playwright fetched."""
    names = ["chromium", "chromium-browser", "google-chrome", "chrome"]
    if found := next(filter(None, map(shutil.which, names)), None):
        return found
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        fetched = playwright.chromium.executable_path
    return fetched if Path(fetched).exists() else None


@contextlib.contextmanager
def open_page(browser: str) -> Iterator:
    """Open the ``browser`` at that path, headless, and give an empty page that waits up to a minute."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        chromium = playwright.chromium.launch(executable_path=browser, args=options)
        try:
            page = chromium.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light", locale="en-GB")
            page.set_default_timeout(60_000)
            page.add_init_script(KNOWN_VISITOR)
            yield page
        finally:
            chromium.close()


def picture(page, folder: Path | None, name: str) -> None:
    """Save what ``page`` shows as ``folder/name``, less what differs at each execution; without folder, do nothing."""
    if folder is not None:
        page.mouse.move(0, 0)
        page.evaluate(STILL)
        page.wait_for_timeout(500)  # until the outline of what was clicked has faded
        folder.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=folder / name, animations="disabled")


if __name__ == "__main__":
    if found := installed_browser():
        print(f"Browser: {found}")
    else:
        sys.exit(subprocess.call([sys.executable, "-m", "playwright", "install", "chromium"]))
