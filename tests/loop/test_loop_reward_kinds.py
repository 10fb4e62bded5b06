"""Rewards beside those of text: columns, weighted sums, verifiable answers and a server's."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tyro", reason="the loop's command line needs tyro")

from loop_helpers import TEXTS, trainer

from ppo_fast.loop import RewardError, RewardLengthError, TrainConfig
from ppo_fast.loop.cli import parse
from ppo_fast.loop.rewards import letters, load_reward, score, taken
from ppo_fast.loop.rewards.answer import answer, boxed
from ppo_fast.loop.rewards.http import HttpReward
from ppo_fast.loop.rewards.weighted import WeightedSum

CPU = torch.device("cpu")
COLUMNS = {"answer": ["1", "2"], "level": [3, 4]}


def plain(prompts: list[str], completions: list[str]) -> list[float]:
    return [1.0] * len(prompts)


def by_level(prompts: list[str], completions: list[str], *, level: list[int]) -> list[float]:
    return [float(x) for x in level]


def every(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
    assert columns == {name: values[: len(prompts)] for name, values in COLUMNS.items()}
    return [2.0] * len(prompts)


def with_default(prompts: list[str], texts: list[str], other: Any = None) -> list[float]:
    return [5.0 if other is None else 0.0] * len(prompts)


def test_a_reward_gets_the_columns_that_its_signature_takes() -> None:
    def answering(questions: list[str], texts: list[str]) -> list[float]:
        return [float(len(text)) for text in texts]  # the completions, whatever it calls them

    wanted = {
        plain: [],
        by_level: ["level"],
        every: ["answer", "level"],
        with_default: [],
        answering: [],
        math.fsum: [],
    }
    for reward, names in wanted.items():
        assert taken(reward, COLUMNS) == names
    prompts, texts = ["p", "q"], ["ab", "c"]
    got = {f: score(f, prompts, texts, columns=COLUMNS).values for f in list(wanted)[:5]}
    assert list(got.values()) == [[1.0, 1.0], [3.0, 4.0], [2.0, 2.0], [5.0, 5.0], [2.0, 1.0]]
    with pytest.raises(RewardError, match=r"takes level, .* columns of the data; there are none"):
        taken(by_level, [])


def test_arguments_in_another_order_are_refused() -> None:
    """They are given by place: such a function would take prompts for completions."""

    def by_name(completions: list[str], answer: list[str], **rest: Any) -> list[float]:
        return [0.0] * len(completions)

    def swapped(completions: list[str], prompts: list[str]) -> list[float]:
        return [0.0] * len(completions)

    def a_column(prompts: list[str], answer: list[str]) -> list[float]:
        return [0.0] * len(prompts)

    for reward in (by_name, swapped, a_column):
        with pytest.raises(RewardError, match="must take prompts and completions as its first"):
            taken(reward, COLUMNS)
    assert taken(every, ["prompts", "completions", "level"]) == ["level"]


def test_a_sample_that_raises_is_asked_for_with_its_own_columns() -> None:
    def picky(prompts: list[str], completions: list[str], level: list[int]) -> list[float]:
        if 4 in level:
            raise ValueError("four")
        return [float(x) for x in level]

    found = score(picky, ["p", "q"], ["a", "b"], columns=COLUMNS)
    assert found.values == [3.0, 0.0] and found.faults == {1: "reward raised ValueError: four"}


def test_a_weighted_sum() -> None:
    both = WeightedSum([by_level, letters], [0.5, -2.0])
    assert score(both, ["p", "q"], ["ab", "a1"], columns=COLUMNS).values == [1.5 - 2, 2.0 - 1]
    none = WeightedSum([lambda p, c: [None, 1.0], letters], [1.0, 1.0])
    assert list(score(none, ["p", "q"], ["ab", "a1"]).faults) == [0]
    short = WeightedSum([lambda p, c: [1.0], letters], [1.0, 1.0])
    with pytest.raises(RewardLengthError, match="must return 2 numbers, got 1"):
        score(short, ["p", "q"], ["ab", "a1"])


def test_the_log_has_the_mean_of_each_reward(tmp_path: Path) -> None:
    """Before its weight, over the samples that it has a number for."""
    reward = WeightedSum([letters, lambda p, c: [4.0] * 7 + [None]], [1.0, -0.5], ["a", "b:c"])
    record, sample = trainer(tmp_path, reward).iteration()
    assert record["rewards"]["b:c"] == 4.0 and list(sample.scores.faults) == [7]
    shares = sample.scores.parts["a"]
    assert shares == letters(sample.prompts, sample.texts)
    assert record["rewards"]["a"] == pytest.approx(sum(shares) / 8)
    assert record["reward"] == pytest.approx(sum(shares[:7]) / 7 - 2.0)
    twice = WeightedSum([letters, letters], [1.0, 1.0], ["letters", "letters"])
    assert twice.names == ["letters 1", "letters 2"]


def test_a_weighted_sum_takes_what_its_rewards_take() -> None:
    assert taken(WeightedSum([by_level, letters], [1.0, 1.0]), COLUMNS) == ["level"]
    assert taken(WeightedSum([with_default, every], [1.0, 1.0]), COLUMNS) == ["answer", "level"]
    with pytest.raises(RewardError, match="reward WeightedSum takes level"):
        taken(WeightedSum([letters, by_level], [1.0, 1.0]), ["answer"])


def test_several_rewards_by_name() -> None:
    config = parse(["--reward", "letters", "--reward", "task", "--reward-weights", "1,0.25"])
    assert config.reward == "letters,task" and config.weights() == [1.0, 0.25]
    reward = load_reward(config, plain, CPU)
    assert reward(["p"], ["a1"]) == [0.75]
    assert load_reward(TrainConfig(reward="letters"), None, CPU) is letters


@pytest.mark.parametrize("weights", ["1", "1,2,3", "1,x", "1,inf", "1,nan", ""])
def test_weights_that_do_not_fit_the_rewards_are_refused(weights: str) -> None:
    with pytest.raises(ValueError, match="reward_weights must be 2 numbers, one for each reward"):
        TrainConfig(reward="letters,task", reward_weights=weights)


def test_states_of_several_rewards_are_kept_apart() -> None:
    class Counting:
        def __init__(self, n: int) -> None:
            self.n = torch.tensor(n)

        def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
            return [0.0] * len(prompts)

        def state_dict(self) -> dict[str, torch.Tensor]:
            return {"n": self.n}

        def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
            self.n = state["n"]

    saved = WeightedSum([Counting(1), letters, Counting(2)], [1.0] * 3).state_dict()
    again = WeightedSum([Counting(0), letters, Counting(0)], [1.0] * 3)
    again.load_state_dict(saved)
    assert [int(r.n) for r in again.rewards[::2]] == [1, 2]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("completion", "wanted", "equal"),
    [
        ("14", "14", True),
        (" it is 8 + 6 = 14.\n", "14", True),
        ("14 or 15", "14", False),
        (r"so \boxed{14}, not 15", 14, True),
        (r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{2}}", True),
        (r"\boxed{1} then \boxed{2", "1", True),
        ("5 + 5\n#### 10\n", "... #### 10", True),
        ("The answer is: 1,000 dollars", "1000", True),
        ("Answer: 1e3", "1000.0", True),
        ("0.5", "1/2", True),
        ("50%", "0.5", True),
        ("-3", "3", False),
        ("no number", "3", False),
        ("The answer is Paris.", "paris", True),
        ("Paris", "paris ", True),
        ("I like Paris", "Paris", False),
        ("", "", True),
    ],
)
def test_verifiable_answers(completion: str, wanted: Any, equal: bool) -> None:
    assert answer(["p"], [completion], [wanted]) == [float(equal)]


def test_a_row_without_an_answer_is_dropped() -> None:
    assert math.isnan(answer(["p"], ["1"], [None])[0])


def test_the_last_whole_box_counts() -> None:
    assert boxed(r"\boxed{a{b}c} \boxed{d") == "a{b}c"
    assert boxed("none") is None


class Server:
    """A local server that answers with what `answers` holds, (status, text) in turn."""

    def __init__(self, answers: list[tuple[int, str]]) -> None:
        self.asked: list[Any] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                server.asked.append(json.loads(body))
                status, text = answers.pop(0)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing: the tests' console is not the place."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/score"


@pytest.fixture
def served() -> Iterator[Any]:
    servers: list[Server] = []

    def serve(*answers: tuple[int, str]) -> Server:
        servers.append(Server(list(answers)))
        threading.Thread(target=servers[-1].http.serve_forever, daemon=True).start()
        return servers[-1]

    yield serve
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def test_a_server_is_asked_for_the_whole_batch(served: Any) -> None:
    server = served((200, '{"rewards": [0.5, null]}'), (200, "[1, 2]"))
    reward = HttpReward(server.url)
    found = score(reward, ["p", "q"], ["a", "b"], columns=COLUMNS)
    assert found.values == [0.5, 0.0] and list(found.faults) == [1]
    assert server.asked == [{"prompts": ["p", "q"], "completions": ["a", "b"], **COLUMNS}]
    assert score(reward, ["p", "q"], ["a", "b"]).values == [1.0, 2.0]


def test_a_server_that_is_busy_is_asked_again(served: Any) -> None:
    server = served((503, "busy"), (429, "slowly"), (200, "[1]"))
    assert HttpReward(server.url, wait=0.0)(["p"], ["a"]) == [1]
    assert len(server.asked) == 3


def test_the_last_reason_is_told(served: Any) -> None:
    server = served((503, "busy"), (503, "busy"), (404, "not here"))
    with pytest.raises(ConnectionError, match=r"after 2 tries: status 503 .*b'busy'"):
        HttpReward(server.url, retries=1, wait=0.0)(["p"], ["a"])
    with pytest.raises(ConnectionError, match=r"after 1 try: status 404 .*b'not here'"):
        HttpReward(server.url, wait=0.0)(["p"], ["a"])
    server.http.shutdown()
    server.http.server_close()
    gone = HttpReward(server.url, retries=1, wait=0.0)
    with pytest.raises(ConnectionError, match=r"after 2 tries: URLError"):
        gone(["p"], ["a"])
    tries: list[int] = []
    gone._answer = lambda body, ask=gone._answer: tries.append(1) or ask(body)  # type: ignore
    assert list(score(gone, ["p"] * 4, ["a"] * 4).faults) == [0, 1, 2, 3]
    assert len(tries) == 2  # no sample is asked for alone


@pytest.mark.parametrize("text", ["<html>", "{}", "3", '{"rewards": 3}'])
def test_an_answer_that_is_no_list_is_named(served: Any, text: str) -> None:
    server = served((200, text))
    with pytest.raises(ValueError, match="must answer with"):
        HttpReward(server.url)(["p"], ["a"])


def test_a_run_learns_from_a_server(served: Any, tmp_path: Any) -> None:
    server = served((200, json.dumps([0.25] * 8)), (200, json.dumps([0.75] * 8)))
    rows = [{"prompt": text, "answer": text[:3]} for text in TEXTS]
    t = trainer(tmp_path, HttpReward(server.url), prompts=rows)
    assert [t.step()["reward"], t.step()["reward"]] == [0.25, 0.75]
    t.close()
    asked = server.asked[0]
    assert asked["answer"] == [prompt[:3] for prompt in asked["prompts"]]
