"""What the tests of the interface share: a page of a real browser, and where its pictures go."""

from importlib.util import find_spec

import pytest
from browser import installed_browser, open_page


@pytest.fixture
def page(lacking):
    """Give an empty page of a real browser."""
    if find_spec("playwright") is None:
        lacking("Playwright, which drives the browser,", "make browser")
    browser = installed_browser()
    if browser is None:
        lacking("Chromium", "make browser (on Debian: apt-get install chromium)")
    with open_page(browser) as page:
        yield page


@pytest.fixture
def pictures(request):
    """Give the folder for pictures, or None where none are asked for."""
    return request.config.getoption("--pictures")
