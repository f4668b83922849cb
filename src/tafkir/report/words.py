"""Short explanations of the page's terms, and the headings of its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["ACCURACY_HEAD", "COST_HEAD", "DIFFERENCE_HEAD", "RETENTION_HEAD", "WORDS"]

ACCURACY_HEAD: Sequence[str] = ("", "Sampled, 95 %", "Greedy, 95 %", "Any of k", "Cut off", "Problems")
RETENTION_HEAD: Sequence[str] = ("Model", "Problems", "Answers", "Kept", "95 %", "Of")
DIFFERENCE_HEAD: Sequence[str] = ("Change", "Points, 95 %", "Up / down", "p", "Detectable")
COST_HEAD: Sequence[str] = ("Stage", "State", "Steps", "Tokens", "Wall time", "CPU time", "Tokens/s", "Peak memory")

WORDS: Mapping[str, str] = {
    "95 % interval": (
        "The range that would hold the true value in 19 of 20 repeats with fresh problems. Several answers to one "
        "problem count as one observation, so that sampling more does not feign certainty."
    ),
    "Sampled, avg@k": (
        "Each problem is answered k times with chance in the choice of words; the share of right answers is averaged. "
        "Any of k (pass@k): at least one of k answers is right."
    ),
    "Greedy": "One answer a problem, always the most probable next token.",
    "Paired difference": (
        "Both sides answer the same problems and are compared problem by problem, which is far sharper than comparing "
        "two averages. Detectable: the difference that this many problems would show four times in five."
    ),
    "Trivial baselines": (
        "What one gets without any learning: always the same operator, or adding up all the numbers."
    ),
    "RLVR, reward": (
        "Reinforcement learning with verifiable rewards: the model tries a problem several times, a checker compares "
        "the answer with the known one, and what led to right answers becomes more likely."
    ),
    "Mismatch, IcePop": (
        "The engine that writes answers and the trainer that learns from them compute the same model in different "
        "ways, so their log-probabilities differ a little. IcePop leaves out the tokens where they differ a lot."
    ),
    "Experts, router": (
        "Each token visits only a few of a layer's experts; the router picks them. A healthy router uses all of them."
    ),
}
