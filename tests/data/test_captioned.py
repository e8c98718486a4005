"""Folders and tar shards of captioned pictures."""

import io
import itertools
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from ldm.data.captioned import CaptionFolder, CaptionShards, spelt_out
from ldm.errors import RequestError


def png(colour: str, size=(12, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def take(shards: CaptionShards, count: int) -> list[str]:
    return [example["txt"] for example in itertools.islice(shards, count)]


def test_a_folder_gives_its_pictures_with_the_captions_beside_them(tmp_path):
    (tmp_path / "more").mkdir()
    for name, colour in (("b", "red"), ("more/a", "blue")):
        (tmp_path / f"{name}.png").write_bytes(png(colour))
        (tmp_path / f"{name}.txt").write_text(f"all {colour}\n")
    found = CaptionFolder(str(tmp_path), size=4)
    assert [found[i]["txt"] for i in range(len(found))] == ["all red", "all blue"]
    assert found[0]["image"].shape == (4, 4, 3)
    np.testing.assert_array_equal(found[1]["image"][0, 0], [-1, -1, 1])


def test_a_folder_may_list_its_captions_in_one_table(tmp_path):
    (tmp_path / "x.jpg").write_bytes(png("white"))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "x.jpg", "text": "snow"}) + "\n")
    assert CaptionFolder(str(tmp_path), size=2, caption_key="caption")[0]["caption"] == "snow"


def test_a_folder_without_pictures_or_captions_says_what_it_lacks(tmp_path):
    with pytest.raises(RequestError, match="no pictures"):
        CaptionFolder(str(tmp_path))
    (tmp_path / "x.png").write_bytes(png("white"))
    with pytest.raises(RequestError, match=r"no caption, e\.g\. .*x\.png"):
        CaptionFolder(str(tmp_path))


def test_shards_give_every_example_once_a_round_and_leave_out_what_cannot_be_read(tmp_path, caplog):
    write_tar(tmp_path / "00000.tar", {"a.jpg": png("red"), "a.txt": b"one", "b.png": b"no picture", "b.txt": b"bad"})
    write_tar(tmp_path / "00001.tar", {"c.png": png("red"), "c.json": b'{"caption": "two"}', "d.txt": b"alone"})
    shards = CaptionShards(str(tmp_path / "{00000..00001}.tar"), size=4, shuffle=0)
    assert sorted(take(shards, 2)) == ["one", "two"]
    assert sorted(take(shards, 6)) == ["one"] * 3 + ["two"] * 3
    assert "a.jpg" not in caplog.text
    assert caplog.text.count("left out") >= 2


def test_the_order_of_shards_depends_on_the_seed_alone(tmp_path):
    for i in range(4):
        write_tar(tmp_path / f"{i}.tar", {k: v for j in range(4) for k, v in
                                          ((f"{i}{j}.png", png("red")), (f"{i}{j}.txt", f"{i}{j}".encode()))})
    orders = [take(CaptionShards(str(tmp_path / "*.tar"), size=4, shuffle=5, seed=seed), 16) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert len({text[0] for text in orders[0][:6]}) > 1


@pytest.mark.parametrize("files", [{}, {"x.txt": b"only words"}])
def test_shards_that_hold_no_example_are_an_error_and_not_an_endless_search(tmp_path, files):
    write_tar(tmp_path / "0.tar", files)
    with pytest.raises(RequestError, match="no picture with a caption"):
        take(CaptionShards([str(tmp_path / "0.tar")]), 1)
    with pytest.raises(RequestError, match="no tar files"):
        CaptionShards(str(tmp_path / "absent-*.tar"))


def test_a_range_is_spelt_out_with_its_zeros():
    assert spelt_out("p/{08..10}-{1..2}.tar") == [f"p/{n}-{m}.tar" for n in ("08", "09", "10") for m in "12"]
