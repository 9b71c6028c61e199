"""The command line as the tests call it, and the spec of the small model that they call it with."""

from typing import Any

from typer.testing import CliRunner

from lipbounds._cli.main import app
from lipbounds.training.models import ModelSpec

SPEC = ModelSpec("mlp", (8, 8, 1), {"widths": "64-12-10", "mean": 0.3, "std": 0.4})


def run(*words: Any, code: int = 0) -> Any:
    """The result of `lipbounds WORDS`, which exits with `code`; an error is a message and no traceback."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    assert code == 0 or (result.stderr.strip() and "Traceback" not in result.output)
    return result
