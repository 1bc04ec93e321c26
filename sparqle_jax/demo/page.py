"""The page that the demo leaves: one HTML file with everything in it."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Template

TEMPLATE = Path(__file__).with_name("page.html")


def write_page(file: Path, content: dict[str, Any]) -> None:
    """Writes the page of this content (see `report` in __main__.py for its form).

    The content travels as JSON in a script element, escaped so that none of its texts can end that element;
    the page puts every text in its place as text, never as markup.
    """
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    text = text.replace("</", "<\\/").replace("<!--", "<\\u0021--")
    template = Template(TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True)
    file.write_text(template.render(content_json=text), encoding="utf-8")
