"""Files are written whole or not at all."""

from __future__ import annotations

import pytest

from trilemma.core.errors import OutputError
from trilemma.core.files import write_whole


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    place = tmp_path / "a.json"
    assert write_whole(place, "one") == place
    write_whole(str(place), "zwei ü")
    assert place.read_text(encoding="utf-8") == "zwei ü"
    assert list(tmp_path.iterdir()) == [place]


def test_what_can_not_be_written_leaves_the_old_file(tmp_path):
    place = tmp_path / "a.json"
    write_whole(place, "one")
    with pytest.raises(UnicodeEncodeError):
        write_whole(place, "\ud800")  # a lone surrogate is no UTF-8
    assert place.read_text(encoding="utf-8") == "one"
    assert list(tmp_path.iterdir()) == [place]
    with pytest.raises(OutputError, match="Can not write"):
        write_whole(tmp_path / "missing" / "a.json", "one")
    with pytest.raises(OutputError, match="Can not write"):
        write_whole(tmp_path, "a folder is there")
