from __future__ import annotations

import pytest

from tafkir.data.corpus import Corpus, load_corpus
from tafkir.data.tokenizer import Tokenizer
from tafkir.recipe.schema import DataConfig


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    return load_corpus(DataConfig())


@pytest.fixture(scope="session")
def tokenizer(corpus: Corpus) -> Tokenizer:
    return Tokenizer.train([problem.question for problem in corpus.train[::10]], 800)
