"""The page at /: one file that loads nothing, with a policy that lets a browser run only its own script."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, Response


async def show_page(_: HttpRequest) -> Response:
    """Answer GET /."""
    content, headers = _page()
    return HTMLResponse(content, headers=headers)


@cache
def _page() -> tuple[str, dict[str, str]]:
    """Return the page and its headers."""
    content = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    script, style = (_hash(content, tag) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:;"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return content, headers


def _hash(content: str, tag: str) -> str:
    """Return the hash by which a policy allows the only element with a tag."""
    (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", content, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
