"""The session book: paths, branches, capacity."""

from __future__ import annotations

import pytest

from skyrl_train.engines.session_book import Node, SessionBook
from skyrl_train.errors import RequestRejected
from skyrl_train.types import SessionRef


def answered(
    book: SessionBook, session: str, name: str, parent: str | None, new: tuple[int, ...], answer: tuple[int, ...]
) -> tuple[int, ...]:
    ref = SessionRef(session_id=session, parent_request_id=parent)
    before = book.reserve(ref, name, len(new), len(answer))
    book.settle(ref, name, Node(parent=parent, token_ids=new + answer))
    book.check_integrity()
    return before


def test_a_child_follows_its_parent_and_branches_do_not_see_each_other() -> None:
    book = SessionBook("e")
    session = book.open(100)
    assert answered(book, session, "r1", None, (12, 7, 3), (9, 2)) == ()
    assert answered(book, session, "r2", "r1", (4, 4), (8,)) == (12, 7, 3, 9, 2)
    assert answered(book, session, "r3", "r1", (5,), (6, 6)) == (12, 7, 3, 9, 2)
    assert answered(book, session, "r4", "r2", (1,), (1,)) == (12, 7, 3, 9, 2, 4, 4, 8)


def test_capacity_counts_answers_on_their_way() -> None:
    book = SessionBook("e")
    session = book.open(10)
    root = SessionRef(session_id=session)
    book.reserve(root, "a", 2, 4)
    with pytest.raises(RequestRejected, match=r"holds 6 of 10 tokens, 2 new ones with max_new_tokens=3 need 5"):
        book.reserve(root, "b", 2, 3)
    book.settle(root, "a", Node(parent=None, token_ids=(1, 2, 3)))
    book.reserve(root, "b", 2, 5)
    book.check_integrity()


def test_a_request_that_is_made_again_replaces_what_it_had() -> None:
    book = SessionBook("e")
    session = book.open(10)
    answered(book, session, "a", None, (1, 2), (3, 4, 5))
    assert answered(book, session, "a", None, (1, 2), (7, 7, 7, 7, 7, 7, 7, 7)) == ()
    assert book.path(SessionRef(session_id=session, parent_request_id="a")) == (1, 2, *[7] * 8)


def test_what_is_not_there_is_named() -> None:
    book = SessionBook("e")
    session = book.open(10)
    with pytest.raises(RequestRejected, match="no answered request 'x'"):
        book.reserve(SessionRef(session_id=session, parent_request_id="x"), "a", 1, 1)
    book.close(session)
    book.close(session)
    with pytest.raises(RequestRejected, match="has no open session"):
        book.reserve(SessionRef(session_id=session), "a", 1, 1)
    with pytest.raises(RequestRejected, match="a session of 0 tokens"):
        book.open(0)
    assert len(book) == 0


def test_a_cleared_session_starts_empty_and_not_under_a_running_request() -> None:
    book = SessionBook("e")
    session = book.open(10)
    answered(book, session, "a", None, (1, 2), (3, 4, 5))
    book.reserve(SessionRef(session_id=session), "b", 1, 1)
    with pytest.raises(RequestRejected, match="1 requests run in it"):
        book.clear(session)
    book.settle(SessionRef(session_id=session), "b", None)
    book.clear(session)
    book.check_integrity()
    assert answered(book, session, "c", None, (1,), (2,) * 9) == ()
    with pytest.raises(RequestRejected, match="no answered request 'a'"):
        book.path(SessionRef(session_id=session, parent_request_id="a"))


def test_what_others_go_on_after_is_not_made_again() -> None:
    book = SessionBook("e")
    session = book.open(100)
    answered(book, session, "a", None, (1, 2), (3,))
    ref = SessionRef(session_id=session, parent_request_id="a")
    book.reserve(ref, "b", 1, 1)
    with pytest.raises(RequestRejected, match="go on after a, so it can't be made again"):
        book.reserve(SessionRef(session_id=session), "a", 2, 1)
    book.settle(ref, "b", Node(parent="a", token_ids=(4, 5)))
    with pytest.raises(RequestRejected, match="go on after a, so it can't be made again"):
        book.reserve(SessionRef(session_id=session), "a", 2, 1)
    book.check_integrity()
    assert book.answered(session) == ("a", "b") and book.running(session) == ()
    assert book.answered("unknown") == book.running("unknown") == ()
