"""Litestar route handlers: https://docs.litestar.dev"""

from litestar import get
from litestar.exceptions import ValidationException


# without "open" it would need the key that --api-key sets, as the API's routes do
@get("/example-plugin/hello", opt={"open": True})
async def hello(name: str = "world") -> dict[str, str]:
    """``name`` comes from the query string."""
    if not name.strip():
        raise ValidationException("name must not be empty")
    return {"message": f"Hello, {name}!"}
