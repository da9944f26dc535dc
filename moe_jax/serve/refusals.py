"""What a client is told it did wrong, in the shape of OpenAI's errors."""

import json
from typing import Any

from moe_jax.validation import RefusalError

SHOWN = 60  # characters of a value that a message repeats


class ApiError(RefusalError):
    """A request that is not answered: one sentence, the HTTP status, the field at fault and OpenAI's code where there is one."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


def show(value: Any) -> str:
    """`value` as JSON writes it, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "a value nested too deeply"
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def error_tree(message: str, status: int, param: str | None = None, code: str | None = None) -> dict:
    """OpenAI's error object."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def to_json(tree: Any) -> str:
    """One line of ASCII: what clients take for line ends beyond ASCII is escaped, and so is half a surrogate pair."""
    return json.dumps(tree, separators=(",", ":"))
