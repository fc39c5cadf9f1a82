"""A judge behind an endpoint that is slow, busy, broken or late, and what is made of its verdicts."""

import email.utils
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.structures import SEG_MARKER
from tests.unit.judge_server import Reply, completion, judge_server, says
from utils.cli.errors import UserError
from utils.evaluation.judge import asking, prompts, scoring
from utils.evaluation.judge.asking import ReplyCache, Unanswered, ask_all
from utils.evaluation.judge.endpoint import Endpoint, RequestSettings
from utils.evaluation.run_lengths import encode_masks

KEY = "sk-very-secret-0123456789"
HASTY = RequestSettings(timeout=60.0, tries=3, parallel=1)
# On a busy machine a good reply may be late too: then it is asked for again.
IMPATIENT = RequestSettings(timeout=1.0, tries=6, parallel=3)


def ask(url: str, prompt: str = "which?", settings: RequestSettings = HASTY) -> str:
    return Endpoint(url, "judge-1", KEY, settings).ask(prompt)


def test_a_request_is_a_chat_completion_with_the_key_in_its_header_alone() -> None:
    with judge_server(lambda n, prompt: says("Fine. SCORE: 7")) as server:
        assert ask(server.url, "which?") == "Fine. SCORE: 7"
        ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body == {"model": "judge-1", "temperature": 0.0, "messages": [{"role": "user", "content": "which?"}]}


def test_without_a_key_none_is_sent_and_a_temperature_only_where_wanted() -> None:
    with judge_server(lambda n, prompt: says("SCORE: 1")) as server:
        Endpoint(f"{server.url}/chat/completions?version=2", "m", "", RequestSettings(temperature=-1)).ask("q")
        ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions?version=2"
    assert KEY not in headers["Authorization"] and "temperature" not in body


@pytest.mark.parametrize(
    "bad",
    [
        Reply(429),
        Reply(500, b"oops"),
        Reply(503, headers={"Retry-After": "0.01"}),
        Reply(408),
        Reply(body=completion("SCORE: 9"), cut=20),
    ],
    ids=lambda reply: f"{reply.status}-{reply.body[:14].decode()}-{reply.cut}-{reply.delay}-{reply.drip}",
)
def test_what_may_go_well_at_another_try_is_tried_again(bad: Reply) -> None:
    with judge_server(lambda n, prompt: bad if n == 0 else says("SCORE: 4")) as server:
        assert ask(server.url) == "SCORE: 4"
        assert len(server.requests) == 2


@pytest.mark.parametrize("bad", [says("SCORE: 9", delay=2.0)])
def test_a_reply_that_comes_late_is_not_waited_for(bad: Reply) -> None:
    with judge_server(lambda n, prompt: bad if n == 0 else says("SCORE: 4")) as server:
        assert ask(server.url, settings=IMPATIENT) == "SCORE: 4"
        assert len(server.requests) >= 2


@pytest.mark.parametrize(
    "body",
    [b"<html>not json</html>", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": 3}}]}', b"[1"],
)
def test_a_reply_that_is_no_completion_is_none(body: bytes) -> None:
    with judge_server(lambda n, prompt: Reply(body=body)) as server, pytest.raises(Unanswered):
        ask(server.url)


def test_tries_end() -> None:
    with judge_server(lambda n, prompt: Reply(500, b"boom")) as server:
        with pytest.raises(Unanswered, match=r"status 500 from .*: boom, at the last of 3 tries"):
            ask(server.url)
        assert len(server.requests) == 3


def test_nobody_there() -> None:
    with judge_server(lambda n, prompt: says("")) as server:
        url = server.url
    with pytest.raises(Unanswered, match="Connection error"):
        ask(url)


def test_a_refused_question_is_not_repeated() -> None:
    with judge_server(lambda n, prompt: Reply(400, b'{"error": "content filter"}')) as server:
        with pytest.raises(Unanswered, match=r"status 400 .*content filter"):
            ask(server.url)
        assert len(server.requests) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_who_may_not_ask_at_all_is_told_so(status: int) -> None:
    with (
        judge_server(lambda n, prompt: Reply(status, b"no")) as server,
        pytest.raises(UserError, match=f"status {status}.*JUDGE_API_KEY"),
    ):
        ask(server.url)


def test_a_redirect_does_not_carry_the_key_elsewhere() -> None:
    with (
        judge_server(lambda n, prompt: says("SCORE: 10")) as other,
        judge_server(lambda n, prompt: Reply(302, headers={"Location": other.url})) as server,
    ):
        with pytest.raises(UserError, match="wants to send requests elsewhere"):
            ask(server.url)
        assert not other.requests


@pytest.mark.parametrize("told", ["0.4", email.utils.formatdate(time.time() + 2, usegmt=True)])
def test_retry_after_is_kept_to(told: str) -> None:
    again = email.utils.formatdate(time.time() + 2, usegmt=True) if "GMT" in told else told
    busy = Reply(429, headers={"Retry-After": again})
    with judge_server(lambda n, prompt: says("SCORE: 4") if n else busy) as server:
        start = time.monotonic()
        assert ask(server.url) == "SCORE: 4"
    assert time.monotonic() - start >= (0.4 if "GMT" not in told else 0.9)


def test_the_rate_is_kept_to() -> None:
    settings = RequestSettings(rate=60 * 20, parallel=4)
    with judge_server(lambda n, prompt: says("SCORE: 4")) as server:
        endpoint = Endpoint(server.url, "m", KEY, settings)
        start = time.monotonic()
        ask_all(endpoint, [f"q{n}" for n in range(7)], _memory(), False)
        assert time.monotonic() - start >= 6 / 20  # 20 a second: the seventh waits for six others
        assert len(server.requests) == 7


def _memory() -> ReplyCache:
    class Memory(ReplyCache):
        def __init__(self) -> None:
            self._known = {}

        def keep(self, key: str, reply: str) -> None:
            self._known[key] = reply

    return Memory()


def test_late_answers_go_to_nobody(tmp_path: Path) -> None:
    """Each question's first reply comes after it was given up; it must not be taken for another question's."""
    seen: set[str] = set()

    def respond(number: int, prompt: str) -> Reply:
        late = prompt not in seen
        seen.add(prompt)
        return says("SCORE: 0", delay=2.0) if late else says(f"SCORE: {prompt}")

    with judge_server(respond) as server:
        told = ask_all(Endpoint(server.url, "m", KEY, IMPATIENT), ["1", "2", "3"], ReplyCache(tmp_path / "c"), False)
    assert told.replies == ["SCORE: 1", "SCORE: 2", "SCORE: 3"]


def test_a_second_run_makes_no_request_and_equal_prompts_are_asked_once(tmp_path: Path) -> None:
    asked = ["a", "b", "a"]
    with judge_server(lambda n, prompt: says(f"SCORE: {len(prompt)}")) as server:
        first = ask_all(Endpoint(server.url, "m", KEY, HASTY), asked, ReplyCache(tmp_path / "c"), False)
        assert sorted(server.prompts) == ["a", "b"] and first.asked == 2
        second = ask_all(Endpoint(server.url, "m", KEY, HASTY), asked, ReplyCache(tmp_path / "c"), False)
        assert len(server.requests) == 2 and second.asked == 0
        assert first.replies == second.replies == ["SCORE: 1"] * 3
        # Another model, another question: asked.
        ask_all(Endpoint(server.url, "other", KEY, HASTY), ["a"], ReplyCache(tmp_path / "c"), False)
        ask_all(Endpoint(server.url, "m", KEY, HASTY), ["a "], ReplyCache(tmp_path / "c"), False)
        assert len(server.requests) == 4


def test_an_ended_run_goes_on(tmp_path: Path) -> None:
    broken = True

    def respond(number: int, prompt: str) -> Reply:
        return Reply(500) if broken and prompt > "2" else says(f"SCORE: {prompt}")

    with judge_server(respond) as server:
        with pytest.raises(UserError, match=r"did not reply to 3 questions in a row .*run the same command again"):
            ask_all(Endpoint(server.url, "m", KEY, HASTY), list("123456"), ReplyCache(tmp_path / "c"), False)
        kept = (tmp_path / "c").read_bytes()
        assert kept.count(b"\n") == 2
        (tmp_path / "c").write_bytes(kept[:-4])  # cut off while the second reply was written
        broken = False
        del server.requests[:]
        told = ask_all(Endpoint(server.url, "m", KEY, HASTY), list("123456"), ReplyCache(tmp_path / "c"), False)
        assert server.prompts == list("23456")
    assert told.replies == [f"SCORE: {n}" for n in "123456"]
    assert len(ReplyCache(tmp_path / "c")._known) == 6


def test_a_question_without_a_reply_does_not_end_the_others(tmp_path: Path) -> None:
    with judge_server(lambda n, prompt: Reply(400) if prompt == "2" else says("SCORE: 1")) as server:
        told = ask_all(Endpoint(server.url, "m", KEY, HASTY), list("1234"), ReplyCache(tmp_path / "c"), False)
    assert told.replies == ["SCORE: 1", None, "SCORE: 1", "SCORE: 1"]


def test_a_file_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c").write_text('{"id": 1}\n')
    with pytest.raises(UserError, match=r"line 1 of .* is no judge's reply"):
        ReplyCache(tmp_path / "c")


@pytest.mark.parametrize(
    ("url", "key", "said"),
    [
        ("ftp://host/v1", "", "must be an address"),
        ("host/v1", "", "must be an address"),
        ("http://", "", "must be an address"),
        ("http://me:word@host/v1", "", "carries a password or key"),
        ("https://host/v1?version=1&api-key=abc", "", "carries a password or key"),
        ("http://host:port/v1", "", "must be an address"),
        ("http://host/v1", "a\nb", "signs that no key has"),
        ("http://host/v1", "schlüssel", "signs that no key has"),
    ],
)
def test_addresses_and_keys_that_cannot_be(url: str, key: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        Endpoint(url, "m", key)
    assert not key or key not in str(refused.value)


def test_a_server_that_echoes_the_key_does_not_spread_it(tmp_path: Path) -> None:
    echo = f"you sent Bearer {KEY}"
    with judge_server(lambda n, prompt: Reply(400, echo.encode())) as server:
        with pytest.raises(Unanswered) as refused:
            ask(server.url)
        assert KEY not in str(refused.value) and "you sent" in str(refused.value)
    with judge_server(lambda n, prompt: says(f"{echo} SCORE: 1")) as server:
        ask_all(Endpoint(server.url, "m", KEY, HASTY), ["q"], ReplyCache(tmp_path / "c"), False)
    assert "you sent" in (tmp_path / "c").read_text() and KEY not in (tmp_path / "c").read_text()


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Good.\nSCORE: 7", 7),
        ("**Score: 8/10**", 8),
        ("score = 0", 0),
        ("SCORE: 10.", 10),
        ("SCORE: 6.5\n", 6.5),
        ("<think>SCORE: 2</think>\nSCORE: 9", 9),
        ("SCORE: 7\nSCORE: 7", 7),
        ("SCORE: 7\nSCORE: 8", None),  # which?
        ("SCORE: 11", None),
        ("SCORE: -1", None),
        ("SCORE: number", None),
        ("I would say 7", None),
        ("7", None),
        ("The SCORE: 7 is too high", None),
        ("SCORE: 7 of 9", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_or_it_is_none(reply: str, score: float | None) -> None:
    assert prompts.read_verdict(reply) == score


def test_our_own_prompt_asks_about_all_three_and_knows_its_hash(tmp_path: Path) -> None:
    ours = prompts.read_prompt()
    filled = ours.filled("Which? $answer", "the cup ($5)", "the jug")
    assert all(text in filled for text in ("Which? $answer", "the cup ($5)", "the jug"))
    (tmp_path / "p.txt").write_text(ours.text + "\nBe kind.")
    assert prompts.read_prompt(tmp_path / "p.txt").sha256 != ours.sha256


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("$question", r"lacks \$answer"),
        ("$question $answer $image", r"holds '\$image'"),
        ("$question $answer costs $5", r"holds '\$'"),
    ],
)
def test_prompts_that_cannot_be_used(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "p.txt").write_text(text)
    with pytest.raises(UserError, match=said):
        prompts.read_prompt(tmp_path / "p.txt")


def boxed(*boxes: tuple[int, int, int, int]) -> list[str]:
    masks = np.zeros((len(boxes), 10, 10), dtype=bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return encode_masks(masks)


def line(number: int = 0, **changed: Any) -> dict[str, Any]:
    """A scored question: a cup found, a jug not, and a mask too many."""
    told: dict[str, Any] = {
        "id": f"m#{number}",
        "dataset": "MultiReasonSeg",
        "image_path": f"{number}.png",
        "question": f"What is there, {number}?",
        "names": ["cup", "old jug"],
        "true_masks": boxed((0, 1, 4, 5), (5, 5, 9, 10)),
        "size": [10, 10],
        "true_answer": "The cup {seg} and the old jug {seg}.",
        "answer": "A vase {seg} and a mug {seg}.",
        "muse": {"iou": 0.5, "intersection": 10, "union": 40, "partners": [None, 0]},
    }
    return told | changed


def test_groups_become_what_they_were_matched_with() -> None:
    answer, truth = prompts.texts_for_judge(line())
    assert answer == "A vase (none) and a mug (cup [0, 1, 4, 5])."
    assert truth == "The cup (cup [0, 1, 4, 5]) and the old jug (old jug [5, 5, 9, 10])."


def test_words_that_hold_a_marker_themselves_get_their_groups_at_the_end() -> None:
    answer, _ = prompts.texts_for_judge(line(answer=f"A {SEG_MARKER} {SEG_MARKER} {SEG_MARKER}"))
    assert answer == "A {seg} {seg} {seg} (none) (cup [0, 1, 4, 5])"


def test_nothing_asked_for_and_nothing_said_has_no_groups() -> None:
    nothing = line(names=[], true_masks=[], true_answer="There is none.", answer="None.")
    assert prompts.texts_for_judge(nothing | {"muse": {"partners": []}}) == ("None.", "There is none.")


class Told:
    """A judge that says what it is told to, by the number in the question."""

    facts: Mapping[str, Any] = {"kind": "told"}
    parallel = 1

    def __init__(self, replies: dict[int, str | None]) -> None:
        self.replies, self.asked = replies, 0

    def ask(self, prompt: str) -> str:
        self.asked += 1
        (number,) = (n for n in self.replies if f"there, {n}?" in prompt)
        reply = self.replies[number]
        if reply is None:
            raise Unanswered("no")
        return reply

    def close(self) -> None:
        pass


def muse(iou: float, intersection: int, union: int) -> dict[str, Any]:
    return {"iou": iou, "intersection": intersection, "union": union, "partners": [None, 0]}


LINES = [
    line(0, muse=muse(1.0, 40, 40)),
    line(1, muse=muse(0.5, 10, 40)),
    line(2, muse=muse(0.25, 10, 20)),
    line(3, muse=muse(0.8, 8, 10)),
    line(4, muse=muse(0.6, 6, 10)),
]
REPLIES = {0: "SCORE: 9", 1: "SCORE: 5", 2: "SCORE: 2", 3: "no idea", 4: None}


def judged(tmp_path: Path, threshold: float = 5.0) -> tuple[dict[str, Any], dict[str, Any]]:
    told = Told(REPLIES)
    scores, facts = scoring.judge_answers(LINES, told, prompts.read_prompt(), tmp_path / "cache", tmp_path, threshold)
    return scores["MultiReasonSeg"], facts


def test_a_low_verdict_zeroes_the_iou_and_none_is_guessed(tmp_path: Path) -> None:
    found, facts = judged(tmp_path)
    assert (found["n"], found["unparsable"], found["unanswered"]) == (3, 1, 1)
    assert found["giou"] == pytest.approx((1.0 + 0.5 + 0) / 3)
    assert found["ciou"] == pytest.approx((40 + 10 + 0) / (40 + 40 + 20))
    # The two without a verdict had 0.8 and 0.6.
    assert found["giou_range"] == pytest.approx([1.5 / 5, (1.5 + 0.8 + 0.6) / 5])
    assert found["giou_interval"][0] <= found["giou"] <= found["giou_interval"][1]
    assert facts["kind"] == "told" and facts["threshold"] == 5.0 and facts["asked"] == 5
    assert facts["prompt_sha256"] == prompts.read_prompt().sha256


def test_the_threshold_decides_and_all_are_told(tmp_path: Path) -> None:
    found, _ = judged(tmp_path, threshold=6)
    assert found["giou"] == pytest.approx(1.0 / 3)
    table = found["by_threshold"]
    assert list(table) == [str(n) for n in range(11)]
    assert [table[str(n)]["passed"] for n in range(11)] == [3, 3, 3, 2, 2, 2, 1, 1, 1, 1, 0]
    assert table["0"]["giou"] == pytest.approx((1.0 + 0.5 + 0.25) / 3)
    assert table["5"] == {"passed": 2, "giou": pytest.approx(1.5 / 3), "ciou": pytest.approx(50 / 100)}
    assert table["10"]["giou"] == table["10"]["ciou"] == 0.0


def test_verdicts_are_told_one_by_one(tmp_path: Path) -> None:
    judged(tmp_path)
    rows = [json.loads(text) for text in (tmp_path / scoring.VERDICTS).read_text().splitlines()]
    assert [row["verdict"] for row in rows] == [9, 5, 2, None, None]
    assert [row["reply"] for row in rows] == list(REPLIES.values())
    assert rows[0]["answer"] == "A vase (none) and a mug (cup [0, 1, 4, 5])."


def test_before_a_judge_every_iou_counts() -> None:
    (found,) = scoring.pre_judge(LINES).values()
    assert found["n"] == 5 and found["giou"] == pytest.approx((1.0 + 0.5 + 0.25 + 0.8 + 0.6) / 5)
    assert found["ciou"] == pytest.approx((40 + 10 + 10 + 8 + 6) / (40 + 40 + 20 + 10 + 10))
    assert scoring.pre_judge([]) == {}


def test_three_in_a_row_are_counted_in_a_row() -> None:
    assert asking.IN_A_ROW == 3
    told = Told({0: None, 1: None, 2: "SCORE: 1", 3: None, 4: None})
    replies = ask_all(told, [f"there, {n}?" for n in range(5)], _memory(), False)
    assert replies.replies == [None, None, "SCORE: 1", None, None]
