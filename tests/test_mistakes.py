"""docs/mistakes.md says what is said: every mistake is run and answered."""

from mistakes import MISTAKES, PAGE, page


def test_the_page_is_current_and_every_mistake_is_answered() -> None:
    written = page()
    assert sum(len(codes) for _, codes in MISTAKES) >= 40
    for line in written.splitlines():
        assert not line.endswith("|  |"), f"nothing is said about {line}"
    assert written == PAGE.read_text(encoding="utf-8"), "run python -m tests.mistakes"
