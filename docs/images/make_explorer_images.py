"""Makes explorer-light.png and explorer-dark.png: a small study of the bundled model, opened in chromium.

    python docs/images/make_explorer_images.py

Takes about a minute on 2 cores. Needs the extra `dev` and Debian's chromium with a Japanese font.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from workbench import Run, explore, load_model, load_prompts, run_study
from workbench.study import Settings

HERE = Path(__file__).resolve().parent
N_GROUPS = 8


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        run = small_study(Path(folder))
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        for scheme, compare in (("light", False), ("dark", True)):
            path = explore(run, compare=compare).to_html(Path(folder) / f"{scheme}.html")
            page = browser.new_page(color_scheme=scheme, viewport={"width": 1280, "height": 700})
            page.goto(path.as_uri())
            pose(page, compare)
            page.screenshot(path=HERE / f"explorer-{scheme}.png", full_page=True)
        browser.close()


def small_study(folder: Path) -> Run:
    model, prompts = load_model("nano-moe-thinking"), load_prompts(HERE.parents[1] / "data/prompts/parallel.jsonl")
    groups = sorted({prompt.group_id for prompt in prompts})[:N_GROUPS]
    chosen = [prompt for prompt in prompts if prompt.group_id in groups]
    return run_study(model, chosen, folder / "run", Settings(max_new_tokens=160, batch_size=8))


def pose(page: Any, compare: bool) -> None:
    """A token pinned; with two texts an expert is chosen, which shows its card."""
    token = page.locator(".wbx-in-user [data-t]").nth(4)
    token.click()
    if compare:
        canvas = page.locator(".wbx-map").first
        canvas.focus()
        for key in ("ArrowDown", "ArrowDown", "ArrowDown", *["ArrowRight"] * 5, "Enter"):
            page.keyboard.press(key)
    else:
        page.locator("summary").click()
    page.mouse.move(0, 0)
    page.wait_for_timeout(200)


if __name__ == "__main__":
    main()
