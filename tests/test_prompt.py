from ldm.prompt import split


def runs(*pieces, size=10, reach=4):
    """The runs into which a text is cut, whose tokens are `pieces`; a space after a piece is part of no token."""
    spans, text = [], ""
    for piece in pieces:
        spans.append((len(text), len(text) + len(piece.rstrip())))
        text += piece
    return [len(spans[run]) for run in split(text, spans, size, reach)]


def test_what_fits_stays_whole():
    assert runs(*["cat "] * 10) == [10]


def test_nothing_is_one_empty_run():
    assert runs() == [0]


def test_a_run_ends_after_the_last_comma_within_reach():
    assert runs(*["cat "] * 7, ", ", *["cat "] * 7) == [8, 7]


def test_a_comma_too_far_back_does_not_count():
    assert runs("cat", ", ", *["cat "] * 13) == [10, 5]


def test_without_commas_a_run_ends_after_a_word():
    assert runs(*["cat "] * 8, "ast", "ro", "naut ", "cat ") == [8, 4]


def test_a_hyphen_ends_a_word():
    assert runs(*["cat "] * 8, "well", "-", "known ") == [10, 1]


def test_a_word_longer_than_the_reach_is_cut_where_the_run_is_full():
    assert runs(*["a"] * 25) == [10, 10, 5]


def test_no_token_is_lost_and_none_changes_place():
    text = "a fox, a hill and an astronaut. " * 9
    spans = [(i, i + 1) for i in range(len(text))]
    assert [span for run in split(text, spans, 10, 4) for span in spans[run]] == spans
