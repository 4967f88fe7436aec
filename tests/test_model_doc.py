"""docs/model.md is as its command makes it, and says something of every rule."""

from __future__ import annotations

import pytest

from harness import model_doc
from harness.model.liberties import Liberties
from harness.model.rules import RULES, Rule


def test_it_is_up_to_date() -> None:
    made = model_doc.page(model_doc.scenarios_by_rule())
    assert model_doc.PAGE.read_text(encoding="utf-8") == made, f"docs/model.md is out of date: {model_doc.COMMAND}"


def test_every_rule_is_in_it() -> None:
    text = model_doc.page({})
    assert [rule for rule in RULES if f"**`{rule}`**" not in text] == []
    assert all(len(line) <= 125 for line in text.splitlines())


def test_a_rule_without_a_section() -> None:
    with pytest.raises(KeyError, match="_SECTIONS"):
        model_doc.section(Rule("new.rule", "1.1", "It is new."))


def test_every_liberty_is_named() -> None:
    assert [name for name in Liberties._fields if f"`{name}`" not in model_doc.page({})] == []


def test_what_is_said_of_a_rule() -> None:
    text = " ".join(model_doc.page({"guest.user": ["walk/a", "walk/b", "walk/c"]}).split())
    assert "**`guest.user`** (5.6.1): At CPL 3 only user pages" in text
    assert "- shown by `walk/a`, `walk/b`" in text and "walk/c" not in text
    assert "- not at PAE pdpte: PDPTEs of PAE mode have no R/W" in text
    assert "- needs smep" in text
    assert "- in no cell of coverage: computed, and compared with nothing" in text
