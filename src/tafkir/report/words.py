"""Short explanations of the page's terms, and the headings of its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["ACCURACY_HEAD", "COST_HEAD", "DIFFERENCE_HEAD", "EVALUATION_WORDS", "RETENTION_HEAD", "WORDS"]

ACCURACY_HEAD: Sequence[str] = ("Stage or baseline", "Sampled, 95 %", "Greedy, 95 %", "Any of k", "Cut off", "Problems")
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

_ENGLISH: Mapping[str, str] = {
    "title": "Tafkir evaluation",
    "tasks": "Tasks",
    "sections": "Sections",
    "evaluation": "Scores",
    "retention": "What is kept",
    "card": "What answers cost",
    "model": "Model",
    "task": "Task",
    "right": "Right, 95 %",
    "steps": "steps",
    "rating": "rating",
    "items": "Items × samples",
    "cut": "Cut off",
    "none": "No answer",
    "failed": "Failed",
    "tokens": "Tokens an answer",
    "to": "to",
    "no_end": "no end",
    "look_scores": (
        "Dots are means over items, bars their 95 % intervals; all samples of an item count as one observation. Failed "
        "requests are no zeros: they are left out and counted."
    ),
    "lead_kept": (
        "Beside the first model, on the same items. Equivalent: two one-sided tests put the difference within "
        "a margin of {margin} (in points). “Could have been seen”: the difference that so many items show four times "
        "in five."
    ),
    "beside": "{second} beside {first}",
    "points": "points",
    "verdict": "Verdict",
    "better": "better",
    "worse": "worse",
    "equivalent": "equivalent",
    "undecided": "undecided",
    "kept": "Kept, 95 %",
    "difference": "Points, 95 %",
    "flips": "Down / up",
    "seen": "Could have been seen",
    "lead_card": (
        "Accuracy against what an answer takes. The dashed line is Pareto's front, a star stands on it: no other model "
        "here is as right for less."
    ),
    "look_card": "Look for the upper left corner: right answers for little. Bars are 95 % intervals.",
    "parameters": "Parameters",
    "active": "active",
    "bytes": "Bytes",
    "axis_flops": "FLOP an answer",
    "axis_tokens": "tokens an answer",
    "speed": "Tokens/s",
    "dollars": "$ per 1,000",
    "footer": "Made by Tafkir from the results file alone; every number can be recomputed from it.",
}

_ARABIC: Mapping[str, str] = {
    "title": "تقييم تفكير",
    "tasks": "المهام",
    "sections": "الأقسام",
    "evaluation": "النتائج",
    "retention": "ما الذي بقي",
    "card": "كلفة الإجابات",
    "model": "النموذج",
    "task": "المهمة",
    "right": "الصحيح، \u206695 %\u2069",
    "steps": "الخطوات",
    "rating": "التصنيف",
    "items": "الأسئلة × العيّنات",
    "cut": "مقطوعة",
    "none": "بلا جواب",
    "failed": "فشلت",
    "tokens": "رموز الإجابة",
    "to": "إلى",
    "no_end": "بلا حدّ",
    "look_scores": (
        "النقاط متوسطات على الأسئلة، والأشرطة مجالات ثقة \u206695 %\u2069؛ كل عيّنات السؤال الواحد مشاهدة واحدة. "
        "الطلبات التي فشلت ليست أصفارًا: تُستبعد وتُعَدّ."
    ),
    "lead_kept": (
        "بجانب النموذج الأول، على الأسئلة نفسها. «مكافئ» تعني أن اختبارين من طرف واحد يضعان الفرق ضمن {margin} نقطة؛ "
        "و«ما كان يمكن رؤيته» هو الفرق الذي يُظهره هذا العدد من الأسئلة أربع مرات من خمس."
    ),
    "beside": "{second} بجانب {first}",
    "points": "نقطة",
    "verdict": "الحكم",
    "better": "أفضل",
    "worse": "أسوأ",
    "equivalent": "مكافئ",
    "undecided": "غير محسوم",
    "kept": "ما بقي، \u206695 %\u2069",
    "difference": "النقاط، \u206695 %\u2069",
    "flips": "نزل / صعد",
    "seen": "ما كان يمكن رؤيته",
    "lead_card": (
        "الدقة مقابل ما تتطلبه الإجابة. الخط المتقطع جبهة باريتو، وعليها النجمة: لا نموذج آخر هنا بهذه الدقة بكلفة أقل."
    ),
    "look_card": "انظر إلى الزاوية العليا اليسرى: إجابات صحيحة بكلفة قليلة. الأشرطة مجالات ثقة \u206695 %\u2069.",
    "parameters": "المعاملات",
    "active": "نشطة",
    "bytes": "بايت",
    "axis_flops": "عمليات الإجابة (FLOP)",
    "axis_tokens": "رموز الإجابة",
    "speed": "رمز/ثانية",
    "dollars": "دولار لكل 1,000",
    "footer": "صنعه تفكير من ملف النتائج وحده؛ كل رقم يمكن أن يُحسب منه من جديد.",
}

EVALUATION_WORDS: Mapping[str, Mapping[str, str]] = {"en": _ENGLISH, "ar": _ARABIC}
"""The words of an evaluation's report, by language; both have the same keys."""
