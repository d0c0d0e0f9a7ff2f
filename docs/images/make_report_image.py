"""Makes report.png, the beginning of a report: the page of `workbench study --out RUN`.

    PYTHONPATH=.:kernels python docs/images/make_report_image.py RUN

Needs the extra `dev` and Debian's chromium with a Japanese font.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.notebooks.jupyter import browser_page

HERE = Path(__file__).resolve().parent


def main() -> None:
    report = Path(sys.argv[1]).resolve() / "report.html"
    with browser_page(viewport={"width": 1100, "height": 1500}) as watched:
        watched.page.goto(report.as_uri())
        watched.page.locator('[data-figure="load_by_language"] .main-svg').first.wait_for()
        watched.page.wait_for_timeout(2000)
        watched.page.screenshot(path=HERE / "report.png")


if __name__ == "__main__":
    main()
