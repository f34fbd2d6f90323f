"""The text of keys: what is refused without a look into the database."""

import pytest

from app.access.tokens import MAX_CHARACTERS, new_token, parse_token
from app.errors import NotAuthenticated

KEY_ID = "key_" + "a1" * 13
TEXT = new_token("live", KEY_ID).render()


def test_a_token_is_read_as_it_was_written() -> None:
    token = new_token("live", KEY_ID)
    assert parse_token(token.render(), "live") == token
    assert len(token.render()) <= MAX_CHARACTERS
    assert token.secret not in repr(token)
    assert new_token("live", KEY_ID).secret != token.secret


def test_every_changed_character_is_noticed() -> None:
    for place in range(len(TEXT)):
        changed = TEXT[:place] + ("b" if TEXT[place] == "a" else "a") + TEXT[place + 1 :]
        with pytest.raises(NotAuthenticated):
            parse_token(changed, "live")


@pytest.mark.parametrize(
    "text",
    ["", "pare", TEXT[:-1], TEXT + "0", TEXT.upper(), f" {TEXT}", f"{TEXT}\n", "x" * 10_000,
     TEXT.replace("a1", "\u0430" + "1"), TEXT.replace("_", "-"), "\x00"],
    ids=range(11),  # the secret differs from process to process, and names of tests must not
)  # fmt: skip
def test_what_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(NotAuthenticated, match="form or its checksum"):
        parse_token(text, "live")


def test_a_token_of_another_environment_is_refused_by_name() -> None:
    with pytest.raises(NotAuthenticated, match="for the environment 'live'; this service is 'trial'"):
        parse_token(TEXT, "trial")
