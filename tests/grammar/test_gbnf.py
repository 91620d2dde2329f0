"""GBNF is put in words that the library's converter takes."""

from __future__ import annotations

import pytest

from kvferry.grammar.gbnf import plain_gbnf, with_whole_root


@pytest.mark.parametrize("escape", [r"\u00e9", r"\U000000E9"])
def test_a_character_beyond_ascii_stands_for_itself(escape: str) -> None:
    assert plain_gbnf(f"root ::= [{escape}]") == "root ::= [\u00e9]"


@pytest.mark.parametrize("text", ['root ::= ("a" "b"+)* "+)?" [+)?] # (x+)?', r'root ::= "\\u00e9\n\x41" (x | y+)'])
def test_what_the_converter_takes_stays_as_it_is(text: str) -> None:
    assert plain_gbnf(text).replace(' ""', "") == text


def test_the_root_stands_in_a_rule_of_its_own_whose_name_nobody_has() -> None:
    text = 'root ::= "root" | Root_ root # root\nRoot_ ::= [root]'
    assert with_whole_root(text) == ('root-- ::= "root" | Root_ root-- # root\nRoot_ ::= [root]\nroot ::= root--\n')
