"""Rewards computed from the text alone, by the libraries that define them."""

from __future__ import annotations

from ppo_fast.loop.data.packages import require
from ppo_fast.loop.rewards.calls import RewardFn


def letters(prompts: list[str], completions: list[str]) -> list[float]:
    """The share of ASCII letters in the completion, in [0, 1]: what a tiny model can learn."""
    return [sum(c.isascii() and c.isalpha() for c in t) / max(1, len(t)) for t in completions]


def vader() -> RewardFn:
    """VADER's compound sentiment of the completion alone, in [-1, 1] (Hutto and Gilbert 2014)."""
    module = require("vaderSentiment.vaderSentiment", "vaderSentiment")
    analyzer = module.SentimentIntensityAnalyzer()

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(analyzer.polarity_scores(text)["compound"]) for text in completions]

    return reward


def rouge(words: int = 8, length_penalty: float = 0.1) -> RewardFn:
    """ROUGE-L F1 against the column `reference`, in [0, 1] (Lin 2004).

    Each word of the completion beyond `words` costs `length_penalty`.
    """
    scorer = require("rouge_score.rouge_scorer", "rouge-score").RougeScorer(["rougeL"])

    def reward(prompts: list[str], completions: list[str], reference: list[str]) -> list[float]:
        out = []
        for wanted, text in zip(reference, completions, strict=True):
            f1 = scorer.score(wanted, text)["rougeL"].fmeasure
            out.append(float(f1) - length_penalty * max(0, len(text.split()) - words))
        return out

    return reward


def chrf() -> RewardFn:
    """chrF2, character n-grams shared with the column `reference`, in [0, 1] (Popović 2015)."""
    metric = require("sacrebleu", "sacrebleu").CHRF()

    def reward(prompts: list[str], completions: list[str], reference: list[str]) -> list[float]:
        return [
            float(metric.sentence_score(text.strip(), [wanted]).score) / 100
            for wanted, text in zip(reference, completions, strict=True)
        ]

    return reward
