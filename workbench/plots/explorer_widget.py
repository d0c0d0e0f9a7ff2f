"""The explorer as a notebook widget: the same script, with the selection shared between the page and Python."""

from __future__ import annotations

from functools import cache
from typing import Any

from workbench.errors import RunError
from workbench.plots.explorer import explorer_module

_RENDER = """
export default {
  render({ model, el }) {
    const explorer = mount(el, model.get("payload"), (selection) => {
      model.set("selection", selection);
      model.save_changes();
    });
    const follow = () => explorer.select(model.get("selection"));
    follow();
    model.on("change:selection", follow);
    return () => { model.off("change:selection", follow); explorer.destroy(); };
  },
};
"""


def explorer_widget(payload: dict[str, Any]) -> Any:
    """An anywidget over an explorer's payload. Its trait `selection` is a dict of doc_id, pos, layer and expert.

    What is not chosen is None. Setting it moves the page. Raises RunError when anywidget is not installed.
    """
    return _widget_class()(payload=payload)


@cache
def _widget_class() -> Any:
    try:
        import anywidget
        import traitlets
    except ImportError as error:
        raise RunError(
            f"widget: expected anywidget, got no package {error.name!r}. "
            "Install the extra `notebooks`; the explorer itself needs none of it."
        ) from None
    module, style = explorer_module()

    class ExplorerWidget(anywidget.AnyWidget):
        _esm = module + _RENDER
        _css = style
        payload = traitlets.Dict().tag(sync=True)
        selection = traitlets.Dict({"doc_id": None, "pos": None, "layer": None, "expert": None}).tag(sync=True)

    return ExplorerWidget
