"""Makes notebook-light.png and notebook-dark.png: two notebooks as JupyterLab shows them.

    PYTHONPATH=.:kernels python docs/images/make_notebook_images.py

Nothing is run: the stored outputs are shown. Needs the extra `dev` and Debian's chromium with a Japanese font.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from notebooks.execute import FOLDER
from tests.notebooks.jupyter import browser_page, n_figures, running_lab, wait_for_figures

HERE = Path(__file__).resolve().parent
# file name of the image -> theme, notebook, the cell that is shown on top
SHOTS = {
    "notebook-light.png": ("JupyterLab Light", "05_activation_patching", 5),
    "notebook-dark.png": ("JupyterLab Dark", "03_japanese_and_english", 4),
}


def main() -> None:
    paths = [FOLDER / f"{name}.ipynb" for _, name, _ in SHOTS.values()]
    with tempfile.TemporaryDirectory() as folder, running_lab(Path(folder), paths) as lab:
        for image, (theme, name, cell) in SHOTS.items():
            lab.use_theme(theme)
            with browser_page(viewport={"width": 1280, "height": 860}) as watched:
                page = watched.page
                page.goto(lab.url(f"{name}.ipynb"))
                wait_for_figures(page, n_figures(FOLDER / f"{name}.ipynb"))
                page.keyboard.press("Control+b")  # closes the file browser
                page.locator(".jp-Notebook .jp-Cell").nth(cell).evaluate(
                    "cell => cell.scrollIntoView({block: 'start'})"
                )
                page.wait_for_timeout(2000)
                page.screenshot(path=HERE / image)


if __name__ == "__main__":
    main()
