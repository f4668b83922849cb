"""The model that is served at this moment, and how another one takes its place while the server runs."""

from __future__ import annotations

import logging
import math
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tafkir.errors import CheckpointError
from tafkir.serve.errors import ApiError
from tafkir.serve.options import ServerOptions
from tafkir.serve.served import Served
from tafkir.serve.worker import EngineWorker

if TYPE_CHECKING:
    from tafkir.data.tokenizer import Tokenizer
    from tafkir.engine.engine import Engine

__all__ = ["Live"]

logger = logging.getLogger(__name__)


class Live:
    """Loads a checkpoint, and later others beside it.

    Args:
        path: the first one's folder.
        model_name: what clients call every one of them; None names each after its folder.
        max_queue: most requests that wait.
        num_threads: CPU threads of the model; None leaves torch's choice.
        options: limits of those who call.
        sizes: further arguments of `build_engine`, the same for all.

    Attributes:
        served: the present one. A request takes it once, when it comes, and stays with it.
        version: what the last replacement was called by who asked for it.

    Raises:
        CheckpointError, DataError, CapacityError: as `build_app`.
    """

    def __init__(
        self,
        path: Path,
        model_name: str | None,
        max_queue: int,
        num_threads: int | None,
        options: ServerOptions,
        sizes: dict[str, Any],
    ) -> None:
        from tafkir.data.published_tokenizer import load_tokenizer
        from tafkir.recipe.bundled import find_checkpoint
        from tafkir.serve.loading import build_engine

        self._name, self._num_threads, self._sizes = model_name, num_threads, sizes
        self._replacing = threading.Lock()
        self.version = "default"
        path = find_checkpoint(path)
        tokenizer = load_tokenizer(path)
        worker = EngineWorker(lambda: build_engine(path, tokenizer, num_threads, **sizes), max_queue=max_queue)
        worker.start()
        self.served = self._served(path, tokenizer, worker.engine, worker, options)

    @property
    def worker(self) -> EngineWorker:
        """The thread that runs them all."""
        return self.served.worker

    def _served(
        self, path: Path, tokenizer: Tokenizer, engine: Engine, worker: EngineWorker, options: ServerOptions
    ) -> Served:
        from tafkir.serve.loading import name_of

        served = Served(self._name or name_of(path), path, int(time.time()), tokenizer, engine, worker, options)
        _ = served.fingerprint  # now: the files may be others when somebody asks
        return served

    def replace(self, path: Path | None, *, version: str = "default", drain_s: float = math.inf) -> int:
        """Load a checkpoint of any architecture beside the present one, try it, and let it take what comes from now on.

        The present one's requests go on, for at most `drain_s` seconds; its weights and its cache are given back
        with the last of them. Whatever fails, nothing has changed. Both are in memory until then.

        Args:
            path: the folder; None reads the present one's again.
            version: what to call it.
            drain_s: see above.

        Returns:
            How many requests go on with the one before.

        Raises:
            ApiError: 409 while another one is being loaded.
            CheckpointError, DataError, CapacityError, RecipeError: it cannot be served.
            Stopped: the server is about to end.
        """
        from tafkir.data.published_tokenizer import load_tokenizer
        from tafkir.recipe.bundled import find_checkpoint
        from tafkir.serve.loading import build_engine

        if not self._replacing.acquire(blocking=False):
            raise ApiError(409, "another checkpoint is being loaded", code="busy")
        try:
            began, before = time.monotonic(), self.served
            path = find_checkpoint(path or before.path)
            tokenizer = load_tokenizer(path)
            engine = build_engine(path, tokenizer, self._num_threads, **self._sizes)
            _try(engine, tokenizer, path)
            served = self._served(path, tokenizer, engine, before.worker, before.options)
            going_on = before.worker.replace(engine, drain_s)
            self.served, self.version = served, version
        finally:
            self._replacing.release()
        took_s = time.monotonic() - began
        logger.info("%s takes the place of %s after %.1f s (%d requests go on)", path, before.path, took_s, going_on)
        return going_on


def _try(engine: Engine, tokenizer: Tokenizer, path: Path) -> None:
    """One pass over some tokens: what a folder of sound files can still get wrong.

    Raises:
        CheckpointError: tokens that the model does not have, or numbers that are not finite.
    """
    from tafkir.engine.prompt_scores import score_prompts

    vocab = engine.decoder.config.vocab_size
    if tokenizer.vocab_size > vocab:
        what = f"the tokenizer has {tokenizer.vocab_size} tokens"
        raise CheckpointError(what, where=str(path), expected=f"at most the model's {vocab}")
    (scores,) = score_prompts(engine.decoder, [tokenizer.encode("1 + 1 = 2. واحد وواحد")], 1)
    if not all(map(math.isfinite, scores.logprobs)):
        raise CheckpointError("the model's log-probabilities are not finite", where=str(path))
