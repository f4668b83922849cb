"""Verdicts of lm-evaluation-harness's own scorers, run by the Python of an environment that has it (graders.py does).

Reads JSON lines {"family", "text", "reference"} from standard input, writes a JSON list of verdicts (for IFEval a list
of four lists: strict and loose by instruction). Punkt's trained tables are no Python package: sentences are told by the
untrained Punkt of NLTK.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import nltk

nltk.data.find = lambda *_, **__: True  # the checker looks for the tables on import
logging.disable(logging.CRITICAL)

import langdetect  # noqa: E402
from lm_eval.api.metrics import exact_match_hf_evaluate  # noqa: E402
from lm_eval.filters.extraction import RegexFilter  # noqa: E402
from lm_eval.tasks.aime import utils as aime  # noqa: E402
from lm_eval.tasks.hendrycks_math import utils as hendrycks  # noqa: E402
from lm_eval.tasks.ifeval import instructions_util  # noqa: E402
from lm_eval.tasks.ifeval import utils as ifeval  # noqa: E402

langdetect.DetectorFactory.seed = 0
_PUNKT = nltk.tokenize.PunktSentenceTokenizer()
_WORDS = nltk.tokenize.NLTKWordTokenizer()
instructions_util._get_sentence_tokenizer = lambda: _PUNKT
nltk.word_tokenize = lambda text: [word for part in _PUNKT.tokenize(text) for word in _WORDS.tokenize(part)]

# gsm8k.yaml (flexible-extract) and mmlu_pro/_default_template_yaml of lm-eval 0.4.13
_LAST_NUMBER = RegexFilter(regex_pattern="(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
_LETTER = RegexFilter(regex_pattern=r"answer is \(?([ABCDEFGHIJ])\)?")
_GSM8K = {"ignore_case": True, "regexes_to_ignore": [",", r"\$", r"(?s).*#### ", r"\.$"]}


def _exact(found: str, wanted: str, **options: Any) -> bool:
    return bool(exact_match_hf_evaluate([found], [wanted], **options)["exact_match"])


def judge(family: str, text: str, reference: Any) -> Any:
    """One verdict of the family's reference."""
    if family == "gsm8k":
        return _exact(_LAST_NUMBER.apply([[text]], [{}])[0][0], f"#### {reference}", **_GSM8K)
    if family == "mmlu-pro":
        found = _LETTER.apply([[text]], [{}])[0][0]
        return _exact(found, reference, ignore_case=True, ignore_punctuation=True)
    if family == "aime":
        return bool(aime.process_results({"answer": reference}, [text])["exact_match"])
    if family == "math":
        box = hendrycks.last_boxed_only_string(text)
        return box is not None and hendrycks.is_equiv(hendrycks.remove_boxed(box), reference)
    result = ifeval.process_results(reference, [text])
    return [result["inst_level_strict_acc"], result["inst_level_loose_acc"]]


def main() -> None:
    verdicts = [judge(**json.loads(line)) for line in sys.stdin]
    json.dump(verdicts, sys.stdout)


if __name__ == "__main__":
    main()
