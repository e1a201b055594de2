"""What pages have in common: tokens as the text they were, harmless text."""

import pytest

from flaxmlm.pages import page


@pytest.mark.parametrize(
  ("tokens", "text"),
  [
    ("▁The ▁cat s , ▁ok", " The cats, ok"),
    ("the cat ##s , ok", " the cats , ok"),
    ("The Ġcat s , Ċ ok", "The cats,\nok"),
    ("▁ 他 是 ▁a", " 他是 a"),
    ("[CLS] ▁a b [SEP]", " [CLS] ab [SEP]"),
    ("It âĢ Ļ s ĠcafÃ© </s>", "It’s café </s>"),
    ("Ã Ġ© </s> © Ġa", "\ufffd \ufffd </s>\ufffd a"),
    ("Ġä½ł <|数|>", " 你<|数|>"),
  ],
)
def test_tokens_join_to_text(tokens, text):
  joined = page.join(tokens.split())
  assert "".join(" " * space + part for space, part in joined) == text


def test_a_character_is_the_text_of_its_last_token():
  assert page.join(["Ġa", "âĢ", "Ļ"])[1:] == [(False, ""), (False, "’")]


def test_what_no_page_can_hold_is_replaced(tmp_path):
  text = "a\x00\x1b\ud800\tb\n\u200c"
  path = tmp_path / "page.html"
  page.write_page(str(path), title=text, body="", style="")
  assert "<title>a\ufffd\ufffd\ufffd\tb\n\u200c</title>" in path.read_text(
    encoding="utf-8"
  )
