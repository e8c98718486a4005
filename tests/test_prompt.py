from ldm.prompt import chunk

WORD, COMMA, PART = "cat</w>", ",</w>", "ca"


def lengths(tokens, size=10, reach=4):
    return [len(run) for run in chunk(range(len(tokens)), tokens, size, reach)]


def test_what_fits_stays_whole():
    assert chunk([7, 8, 9], [WORD] * 3, size=3) == [[7, 8, 9]]


def test_nothing_is_one_empty_chunk():
    assert chunk([], [], size=3) == [[]]


def test_a_chunk_ends_after_the_last_comma_within_reach():
    assert lengths([WORD] * 7 + [COMMA] + [WORD] * 7) == [8, 7]


def test_a_comma_too_far_back_does_not_count():
    assert lengths([WORD, COMMA] + [WORD] * 13) == [10, 5]


def test_without_commas_a_chunk_ends_after_a_word():
    assert lengths([WORD] * 8 + [PART] * 3 + [WORD]) == [8, 4]


def test_a_word_longer_than_the_reach_is_cut_where_the_chunk_is_full():
    assert lengths([PART] * 25) == [10, 10, 5]


def test_no_item_is_lost_and_none_changes_place():
    tokens = ([WORD] * 3 + [PART, WORD, COMMA]) * 9
    assert [i for run in chunk(range(54), tokens, 10, 4) for i in run] == list(range(54))
