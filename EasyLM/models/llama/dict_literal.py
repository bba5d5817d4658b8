"""Python dict literals in flags."""

import ast
from typing import Any

from EasyLM.errors import UserError


def parse_dict(text: str) -> dict[Any, Any]:
    """Returns the dict of a literal such as `{'hidden_size': 64}` or `dict(hidden_size=64)`. Executes no code.

    Raises:
      UserError: if the text is not such a literal.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if isinstance(tree, ast.Call) and getattr(tree.func, "id", "") == "dict" and not tree.args:
            return {keyword.arg: ast.literal_eval(keyword.value) for keyword in tree.keywords}
        return dict(ast.literal_eval(tree).items())
    except (SyntaxError, ValueError, AttributeError):
        raise UserError("not a Python dict literal, such as {'hidden_size': 64}") from None
